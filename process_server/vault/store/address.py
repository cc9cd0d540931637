"""Where an object store is: ``s3://bucket/prefix?…`` or ``az://container/prefix?…``, taken apart and checked.

An address is written into settings, shown in logs and typed by hand, so it never holds a secret; and it alone
says where the vault lies, so that two processes with different environments never mean different vaults.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast
from urllib.parse import parse_qsl, urlsplit

from farshore.errors import ConfigError

Scheme = Literal["s3", "az"]

_OPTIONS: Final[Mapping[str, frozenset[str]]] = {
    "s3": frozenset({"endpoint", "region", "ca", "allow_http"}),
    "az": frozenset({"endpoint", "account", "ca", "allow_http"}),
}
_FORM: Final[Mapping[str, str]] = {
    "s3": "write s3://BUCKET/PREFIX, perhaps with ?endpoint=URL&region=NAME&ca=FILE&allow_http=true",
    "az": "write az://CONTAINER/PREFIX?account=NAME, perhaps with &endpoint=URL&ca=FILE&allow_http=true",
}
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_PREFIX_CHARS_MAX: Final = 256
"""With a name of 512 it stays below the 1,024 bytes of a key in either kind of store."""
_PLAIN: Final = re.compile(r"[A-Za-z0-9-]{1,63}")
_SECRET: Final = re.compile(r"key|secret|passw|token|credential|sas|sig", re.IGNORECASE)
_ELSEWHERE: Final[Mapping[str, tuple[str, ...]]] = {
    "s3": ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    "az": ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"),
}
"""Variables with which the client library would look for the store somewhere else."""


@dataclass(frozen=True, slots=True)
class ObjectAddress:
    """A bucket (in Azure a container) and the part of it that is ours.

    Attributes:
        prefix: Without a slash at either end; empty for the whole bucket.
        endpoint: URL of the service; empty for the provider's own.
        region: Of S3; empty for what ``AWS_REGION`` says, or us-east-1.
        account: Of Azure; empty for what ``AZURE_STORAGE_ACCOUNT_NAME`` says.
        ca: A PEM file with the authority that signed the endpoint's certificate; empty for the system's.
        allow_http: Go without TLS to another host, too. To this one that needs no leave.
    """

    scheme: Scheme
    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    account: str = ""
    ca: str = ""
    allow_http: bool = False

    def __str__(self) -> str:
        """Return what messages call it: kind, bucket and prefix."""
        return "/".join(filter(None, (f"{self.scheme}://{self.bucket}", self.prefix)))

    @property
    def is_plain_http(self) -> bool:
        return self.endpoint.startswith("http://")


def parse_object_address(url: str) -> ObjectAddress:
    """Return what ``url`` says.

    Raises:
        ConfigError: It is not such an address, holds a secret, goes without TLS to another host, or the
            environment says something else. The message repeats no value from behind the ``?``.
    """
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as exc:
        raise ConfigError("not the address of a vault", why=str(exc), fix=_FORM["s3"]) from None
    scheme = cast(Scheme, parts.scheme)
    named = dict(options)
    if "@" in parts.netloc or any(_SECRET.search(name) for name in named):
        raise _secret(scheme)
    prefix = parts.path.strip("/")
    where = f"{scheme}://{parts.netloc}{parts.path}"
    if not _BUCKET.fullmatch(parts.netloc):
        raise _refused(scheme, where, "that is not the name of a bucket")
    if prefix and (len(prefix) > _PREFIX_CHARS_MAX or not _PREFIX.fullmatch(prefix)):
        raise _refused(scheme, where, "the prefix has characters that some stores change")
    if unknown := sorted(named.keys() - _OPTIONS[scheme]):
        raise _refused(scheme, where, f"there is no option {unknown[0][:40]!r}")
    if len(named) != len(options) or parts.fragment:
        raise _refused(scheme, where, "an option is there twice, or something follows a #")
    for name in ("region", "account"):
        if name in named and not _PLAIN.fullmatch(named[name]):
            raise _refused(scheme, where, f"{name} is not a name")
    if named.get("allow_http", "true") not in ("true", "false"):
        raise _refused(scheme, where, "allow_http is true or false")
    address = ObjectAddress(
        scheme,
        parts.netloc,
        prefix,
        endpoint=named.get("endpoint", "").rstrip("/"),
        region=named.get("region", ""),
        account=named.get("account", ""),
        ca=named.get("ca", ""),
        allow_http=named.get("allow_http") == "true",
    )
    _check_endpoint(address)
    _check_environment(address)
    return address


def read_ca(address: ObjectAddress) -> bytes | None:
    """Return the PEM of the authority to trust besides the system's, if one is named. Raises ConfigError."""
    if not address.ca:
        return None
    try:
        return Path(address.ca).read_bytes()
    except OSError as exc:
        raise ConfigError(
            "cannot read the store's CA", where=address.ca, why=exc.strerror or str(exc)
        ) from exc


def _check_endpoint(address: ObjectAddress) -> None:
    if not address.endpoint:
        return
    try:
        parts = urlsplit(address.endpoint)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise _refused(address.scheme, str(address), "endpoint is not an http:// or https:// URL")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise _secret(address.scheme)
    if parts.scheme == "http" and not address.allow_http and not _is_loopback(host):
        # The objects are sealed, but what signs a request, or a shared access signature, would be readable.
        raise ConfigError(
            "the vault would be reached without TLS",
            where=str(address),
            why="endpoint is http:// on another host",
            fix="use https://, or add allow_http=true where the network itself is private",
        )


def _check_environment(address: ObjectAddress) -> None:
    if not address.endpoint and (other := next(filter(os.environ.get, _ELSEWHERE[address.scheme]), None)):
        raise ConfigError(
            "the environment points to another store",
            where=other,
            why="only the vault's address says where it is",
            fix=f"unset {other}, or add endpoint=URL to the address",
        )
    if address.scheme == "az" and not address.account and not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise _refused(address.scheme, str(address), "it names no storage account")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(scheme: str, where: str, why: str) -> ConfigError:
    return ConfigError("not the address of a vault", where=where, why=why, fix=_FORM[scheme])


def _secret(scheme: str) -> ConfigError:
    return ConfigError(
        "a vault's address holds no secret",
        where=f"{scheme}://",
        why="it would be in settings and logs",
        fix="put the credentials into the environment or into systemd's credentials, and change these",
    )
