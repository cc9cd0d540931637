"""``DIR/agent.toml``: who this machine is and where its process server listens.

Written once by ``farshore agent enrol``, read once at each start. The other files of ``DIR`` have their
places here too, so that no two modules spell one differently.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from farshore.config import load_config, write_private
from farshore.errors import ConfigError
from farshore.ids import id_from_hex, valid_name

METRICS_PORT: Final = 9105
SERVER_PORT: Final = 9443


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one machine's agent.

    Attributes:
        machine: Name of the machine, as the token gave it.
        machine_id: 32 hexadecimal digits.
        vault_id: 32 hexadecimal digits; the server is known by it, not by a host name.
        servers: ``HOST:PORT`` of process servers of this vault, tried in turn.
        metrics_host: Address of ``/metrics`` and ``/healthz``.
        metrics_port: Its port; 0 lets the kernel choose (the ready line tells).
    """

    machine: str
    machine_id: str
    vault_id: str
    servers: tuple[str, ...]
    metrics_host: str = "127.0.0.1"
    metrics_port: int = METRICS_PORT

    @property
    def machine_bytes(self) -> bytes:
        return id_from_hex(self.machine_id)

    @property
    def vault_bytes(self) -> bytes:
        return id_from_hex(self.vault_id)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie below an agent's directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "agent.toml"

    @property
    def identity(self) -> Path:
        """``key.pem``, ``cert.pem``, ``ca.pem``."""
        return self.root / "identity"

    @property
    def volumes(self) -> Path:
        return self.root / "volumes"

    def volume(self, name: str) -> Path:
        """Folder of one volume: ``volume.toml`` and its journal."""
        return self.volumes / name

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def tap_socket(self) -> Path:
        return self.run / "tap.sock"

    @property
    def agent_socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def lock(self) -> Path:
        return self.run / "agent.lock"


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``, ``[V6]:PORT`` or ``HOST`` (port 9443).

    Raises:
        ValueError: Neither.
    """
    host, colon, port = text.rpartition(":")
    if not colon or (text.startswith("[") and text.endswith("]")):
        host, port = text, str(SERVER_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return host, int(port)


def load(directory: Path) -> AgentConfig:
    """Read ``DIR/agent.toml``.

    Raises:
        ConfigError: Missing (the machine is not enrolled), not readable, or a value makes no sense.
    """
    path = Layout(directory).config
    if not path.exists():
        raise ConfigError(
            "this agent is not enrolled",
            where=str(directory),
            why="there is no agent.toml",
            fix="run 'farshore agent enrol' first",
        )
    config = load_config(path, AgentConfig)
    try:
        _ = config.machine_bytes, config.vault_bytes
        for server in config.servers:
            parse_address(server)
        if not valid_name(config.machine):
            raise ValueError(f"{config.machine!r} is no name of a machine")
        if not config.servers or not 0 <= config.metrics_port < 65536:
            raise ValueError("servers must not be empty, metrics_port is 0 to 65535")
    except ValueError as error:
        raise ConfigError("cannot use the configuration", where=str(path), why=str(error)) from error
    return config


def save(directory: Path, config: AgentConfig) -> None:
    """Write ``DIR/agent.toml`` whole and durable. Raises CapacityError or Failed."""
    # A JSON string or number is the same in TOML; the values above need nothing more.
    lines = []
    for key, value in msgspec.structs.asdict(config).items():
        plain = list(value) if isinstance(value, tuple) else value
        lines.append(f"{key} = {json.dumps(plain)}\n")
    write_private(Layout(directory).config, "".join(lines).encode())
