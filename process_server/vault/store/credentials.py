"""What proves to an object store who we are: systemd's credentials before the environment, never an address.

What is not found here is looked for by the client library: in the variables of the provider's own tools
(``AWS_ACCESS_KEY_ID``, ``AZURE_STORAGE_ACCOUNT_KEY``, …), a web identity, or the metadata of the instance.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farshore.errors import ConfigError

if TYPE_CHECKING:
    from obstore.store import AzureCredential, S3Credential

_BYTES_MAX: Final = 16 * 1024


def s3_credentials() -> "Callable[[], S3Credential] | None":
    """Return what gives the keys that systemd has for us, or None when it has none. Raises ConfigError."""
    key_id, secret = _read("aws_access_key_id"), _read("aws_secret_access_key")
    token = _read("aws_session_token")
    if key_id is None and secret is None:
        return None
    if key_id is None or secret is None:
        missing = "aws_access_key_id" if key_id is None else "aws_secret_access_key"
        raise ConfigError("a credential is missing", where=missing, fix="add it to LoadCredential=")
    # A function and not settings: of those the library would mix one from here with another from the
    # environment, such as a session token that belongs to other keys.
    return lambda: {"access_key_id": key_id, "secret_access_key": secret, "token": token, "expires_at": None}


def azure_credentials() -> "Callable[[], AzureCredential] | None":
    """Return what gives the key, or shared access signature, that systemd has for us. Raises ConfigError."""
    key, sas = _read("azure_storage_account_key"), _read("azure_storage_sas_token")
    if key is not None:
        return lambda: {"access_key": key, "expires_at": None}
    if sas is not None:
        return lambda: {"sas_token": sas.removeprefix("?"), "expires_at": None}
    return None


def _read(name: str) -> str | None:
    """Return the credential with the name of a variable, in lower case; None when systemd has no such one."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    path = Path(directory, name)
    try:
        with path.open("rb") as file:
            content = file.read(_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError("cannot read a credential", where=name, why=exc.strerror or str(exc)) from exc
    text = content.decode("utf-8", "replace").strip()
    if not text or len(content) > _BYTES_MAX or not text.isprintable():
        raise ConfigError("not a credential", where=name, why="it is empty, too long or no text")
    return text
