"""Opening a vault to recover from it: by address and recovery key alone, or as a server's directory says."""

import getpass
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farshore.errors import ConfigError, NotFound, UsageError
from process_server.vault.holders import EscrowKey, Opener, Passphrase
from process_server.vault.keys import VaultKeys, open_vault
from process_server.vault.recovery_key import SECRET_BYTES, RecoveryKey
from process_server.vault.store import Store, open_store

PASSPHRASE_PREFIX: Final = "passphrase:"
_KEY_FILE_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Access:
    """An open vault.

    Attributes:
        url: Its address, with which worker processes open it again.
        store: Where its objects lie.
        keys: What opens them.
    """

    url: str
    store: Store
    keys: VaultKeys


def open_access(*, vault: str | None, recovery_key_file: Path | None, server_dir: Path | None) -> Access:
    """Open the vault that the options name; ``server_dir`` counts only where the other two are not given.

    Raises:
        UsageError: The options do not name a vault and a key.
        ConfigError: The key file or the server's directory cannot be used.
        NotFound: There is no vault there.
        WrongKey: It is not for this key.
        IntegrityError: It is damaged, or of a newer format.
    """
    if vault is not None and recovery_key_file is not None:
        store = open_store(vault)
        return Access(vault, store, open_vault(store, read_opener(recovery_key_file)))
    if vault is None and recovery_key_file is None and server_dir is not None:
        return _open_as_server(server_dir)
    raise UsageError(
        "which vault?",
        why="neither --vault with --recovery-key-file nor --server-dir was given"
        if vault is None and recovery_key_file is None
        else "--vault and --recovery-key-file belong together",
        fix="say --vault URL --recovery-key-file FILE",
    )


def read_opener(path: Path) -> Opener:
    """Return the key in a file that nobody else may read; of ``-``, what is typed at the terminal.

    The file holds a recovery key, the private half of an escrow key (PEM), or a passphrase in a line that
    begins with ``passphrase:``.

    Raises:
        ConfigError: The file cannot be read, or others can.
        UsageError: What it holds is no key.
    """
    if str(path) == "-":
        return _typed()
    secret = _read_secret(path)
    if secret.startswith(b"-----BEGIN"):
        return EscrowKey.parse(secret)
    text = secret.decode("utf-8", "replace")
    if text.startswith(PASSPHRASE_PREFIX):
        return Passphrase(text.removeprefix(PASSPHRASE_PREFIX).strip())
    return RecoveryKey.parse(text)


def _typed() -> Opener:
    if sys.stdin.isatty():
        text = getpass.getpass("recovery key or passphrase: ")
    else:
        text = sys.stdin.readline().rstrip("\n")
    try:
        return RecoveryKey.parse(text)
    except UsageError:
        if text.upper().startswith("FSRK"):
            raise
        return Passphrase(text.strip())


def _open_as_server(directory: Path) -> Access:
    # Imported here: a recovery with vault and key should not wait for what reads a server's settings.
    from process_server.config import Layout, load

    config = load(directory)
    kind, _, value = config.keys.source.partition(":")
    if kind == "file":
        path = Layout(directory).root / value
    elif kind == "credential" and (credentials := os.environ.get("CREDENTIALS_DIRECTORY")):
        path = Path(credentials) / value
    else:
        raise ConfigError(
            "cannot read the server's key",
            where=str(Layout(directory).config),
            why=f"its source is {config.keys.source!r}",
            fix="say --vault URL --recovery-key-file FILE",
        )
    secret = _read_secret(path)
    if len(secret) != SECRET_BYTES:
        raise ConfigError("not a server's key", where=str(path), why=f"it has {len(secret)} bytes")
    store = open_store(config.vault)
    return Access(config.vault, store, open_vault(store, secret))


def _read_secret(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                raise ConfigError(
                    "the key file can be read by others",
                    where=str(path),
                    why=f"its mode is {stat.S_IMODE(found.st_mode):04o}",
                    fix=f"chmod 600 {path}",
                )
            secret = file.read(_KEY_FILE_BYTES_MAX + 1)
    except FileNotFoundError as exc:
        raise NotFound("there is no such key file", where=str(path)) from exc
    except OSError as exc:
        raise ConfigError("cannot read the key file", where=str(path), why=exc.strerror or str(exc)) from exc
    if len(secret) > _KEY_FILE_BYTES_MAX:
        raise ConfigError("not a key file", where=str(path), why="it is too long")
    return secret
