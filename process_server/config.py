"""``DIR/server.toml``: which vault this server serves, where it listens, which key opens it.

Written once by ``farshore server init`` or ``adopt``, read once at each start. Nothing in it is a secret: the
slot key is a file of its own, of the API token only a hash is here.
"""

import getpass
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from farshore.config import load_config, write_private
from farshore.errors import ConfigError
from farshore.ids import id_from_hex
from farshore.units import KIB, MIB

LISTEN_PORT: Final = 9443
API_PORT: Final = 9444
METRICS_PORT: Final = 9106
SLOT_KEY_BYTES: Final = 32

_SOURCE: Final = re.compile(r"file:.+|credential:[^/]+|prompt", re.DOTALL)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class KeysConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where this server's own key to the vault is.

    Attributes:
        source: ``file:PATH`` (relative to the directory), ``credential:NAME`` (systemd's LoadCredential) or
            ``prompt``.
    """

    source: str


class IngestConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the agents are told and how the pipeline is sized.

    Attributes:
        workers: Processes that end TLS, hash, compress and seal.
        point_interval_s: Seconds between the cuts of an agent: half the RPO that is aimed at.
        chunk_bytes: Aligned block that is deduplicated.
        pack_bytes: A pack is stored when it is this large.
        compression_level: zstd.
        copies_compressed_by: Who compresses copied blocks: ``agent`` (a third of the bytes on the wire, the
            work spread over all protected servers) or ``server`` (their processors are spared).
        copy_connections: Data connections an agent may use for copying.
        credit_bytes: Raw parts outstanding on a connection.
    """

    workers: Annotated[int, Meta(ge=1, le=64)] = 3
    point_interval_s: Annotated[float, Meta(ge=0.1, le=3600)] = 0.5
    chunk_bytes: Annotated[int, Meta(ge=16 * KIB, le=MIB)] = 128 * KIB
    pack_bytes: Annotated[int, Meta(ge=MIB, le=60 * MIB)] = 16 * MIB
    compression_level: Annotated[int, Meta(ge=-7, le=19)] = 1
    copies_compressed_by: Literal["agent", "server"] = "agent"
    copy_connections: Annotated[int, Meta(ge=1, le=16)] = 3
    credit_bytes: Annotated[int, Meta(ge=8 * MIB, le=256 * MIB)] = 16 * MIB


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one process server.

    Attributes:
        vault: URL of the store.
        vault_id: 32 hexadecimal digits; a store that holds another vault is refused.
        keys: See `KeysConfig`.
        api_token_sha256: SHA-256, in hexadecimal, of each bearer token the API accepts. The tokens are 256
            random bits, so a plain hash is enough; a slow one is for what people think up.
        listen: ``HOST:PORT`` for agents; port 0 lets the kernel choose, the ready line tells.
        api: ``HOST:PORT`` of the HTTPS API.
        metrics: ``HOST:PORT`` of ``/metrics`` and ``/healthz``.
        addresses: ``HOST:PORT`` under which agents reach this server, put into tokens; empty: ``listen``
            when that names a host.
        ingest: See `IngestConfig`.
    """

    vault: str
    vault_id: str
    keys: KeysConfig
    api_token_sha256: tuple[str, ...]
    listen: str = f"0.0.0.0:{LISTEN_PORT}"
    api: str = f"127.0.0.1:{API_PORT}"
    metrics: str = f"127.0.0.1:{METRICS_PORT}"
    addresses: tuple[str, ...] = ()
    ingest: IngestConfig = IngestConfig()

    @property
    def vault_bytes(self) -> bytes:
        return id_from_hex(self.vault_id)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie below a server's directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "server.toml"

    @property
    def client(self) -> Path:
        """What the client verbs need to reach this server: address, CA, bearer token."""
        return self.root / "client.toml"

    @property
    def slot_key(self) -> Path:
        return self.root / "slot.key"

    @property
    def catalog(self) -> Path:
        """What the vault's chains say, as tables; a cache."""
        return self.root / "catalog.sqlite"

    @property
    def vault(self) -> Path:
        """Default place of the vault, when no URL is given."""
        return self.root / "vault"


def parse_listen(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` or ``[V6]:PORT``; port 0 is for "any".

    Raises:
        ValueError: Neither.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host) != bracketed:
        raise ValueError(f"{text!r} is no HOST:PORT; an IPv6 address stands in brackets")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{text!r} is no HOST:PORT; the port is 0 to 65535")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """Return ``HOST:PORT``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def load(directory: Path) -> ServerConfig:
    """Read ``DIR/server.toml``.

    Raises:
        ConfigError: Missing (nothing was initialised here), not readable, or a value makes no sense.
    """
    path = Layout(directory).config
    if not path.exists():
        raise ConfigError(
            "there is no process server here",
            where=str(directory),
            why="there is no server.toml",
            fix="run 'farshore server init' or 'farshore server adopt' first",
        )
    config = load_config(path, ServerConfig)
    try:
        _ = config.vault_bytes
        for address in (config.listen, config.api, config.metrics, *config.addresses):
            parse_listen(address)
        if not _SOURCE.fullmatch(config.keys.source):
            raise ValueError(
                f"keys.source: {config.keys.source!r} is not file:PATH, credential:NAME or prompt"
            )
        if not all(_SHA256.fullmatch(entry) for entry in config.api_token_sha256):
            raise ValueError("api_token_sha256: not 64 lower-case hexadecimal digits")
    except ValueError as error:
        raise ConfigError("cannot use the configuration", where=str(path), why=str(error)) from error
    return config


def read_slot_key(directory: Path, config: ServerConfig) -> bytes:
    """Return this server's key to the vault, from where ``[keys] source`` says.

    Raises:
        ConfigError: There is none, others can read it, or it is not 32 bytes. The error never repeats it.
    """
    kind, _, value = config.keys.source.partition(":")
    if kind == "prompt":
        try:
            return _checked_key(
                bytes.fromhex(getpass.getpass("slot key (64 hexadecimal digits): ")), "prompt"
            )
        except (ValueError, EOFError) as error:
            raise ConfigError("not a slot key", where="prompt", fix="type its 64 digits") from error
    path = Path(directory, value)
    if kind == "credential":
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if not credentials:
            raise ConfigError(
                "there is no such credential",
                where=value,
                why="not started by systemd with LoadCredential",
                fix="start the unit, or set keys.source to file:PATH",
            )
        path = Path(credentials, value)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(SLOT_KEY_BYTES + 1)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError("cannot read the server's key", where=str(path), why=why) from error
    # systemd's credentials are private by their directory and mount, whatever their mode.
    if kind == "file" and stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError("others can read the server's key", where=str(path), fix=f"chmod 600 {path}")
    return _checked_key(content, str(path))


def _checked_key(key: bytes, where: str) -> bytes:
    if len(key) != SLOT_KEY_BYTES:
        raise ConfigError("not a slot key", where=where, why=f"it has not {SLOT_KEY_BYTES} bytes")
    return key


def save(directory: Path, config: ServerConfig) -> None:
    """Write ``DIR/server.toml`` whole, durable and private. Settings at their default are left out.

    Raises:
        CapacityError, Failed: See `farshore.config.write_private`.
    """
    write_private(Layout(directory).config, to_toml(config).encode())


def to_toml(settings: msgspec.Struct, table: str = "") -> str:
    """Return a config struct as TOML: plain values first, then one table for each struct in it."""
    lines, tables = [], []
    fields, values = settings.__struct_fields__, settings.__struct_defaults__
    defaults = dict(zip(reversed(fields), reversed(values), strict=False))  # they belong to the last fields
    for key in fields:
        value = getattr(settings, key)
        if key in defaults and value == defaults[key]:
            continue
        name = f"{table}.{key}" if table else key
        if isinstance(value, msgspec.Struct):
            tables.append(f"\n[{name}]\n{to_toml(value, name)}")
        else:
            # A JSON string, number or list of strings is the same in TOML, except for this one character.
            plain = list(value) if isinstance(value, tuple) else value
            lines.append(f"{key} = {json.dumps(plain)}\n".replace("\x7f", "\\u007f"))
    return "".join(lines) + "".join(tables)
