"""What the ``volume`` verbs do with settings and what they print; with a running agent or without."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from agent import volumes
from agent.config import Layout, load
from agent.journal.continuity import read_disk
from agent.replicate.ports import VolumeSpec
from agent.replicate.replica import Replica
from agent.volumes import VolumeConfig
from farshore.errors import Conflict
from farshore.units import SECTOR_BYTES


def to_config(
    directory: Path, name: str, disk: Path, capture: str, listen: str | None, attach: str | None
) -> dict[str, Any]:
    """Return the settings that the options of ``volume protect`` ask for, as the agent is sent them.

    Raises:
        UsageError: An option makes no sense.
        ConfigError: The directory is no agent's.
    """
    load(directory)
    config = VolumeConfig(
        id=volumes.new_volume_id(),
        name=name,
        disk=str(disk.absolute()),
        capture="tap-nbd" if capture == "tap-nbd" else "scan",
        listen=listen or "",
        attach="loop" if attach == "loop" else "nbd" if attach == "nbd" else "",
        quota_bytes=volumes.default_quota_bytes(directory, VolumeConfig("", "", "").segment_bytes),
    )
    volumes.check_settings(config)
    return msgspec.structs.asdict(config)


def other_volumes(directory: Path) -> list[VolumeConfig]:
    """The settings of every protected volume. Raises ConfigError."""
    return [volumes.load_volume(directory, name) for name in volumes.list_volumes(directory)]


def spec_of(directory: Path, config: VolumeConfig) -> VolumeSpec:
    """What replication has to know of a volume. Raises OSError when its disk cannot be looked at."""
    return VolumeSpec(
        config.id_bytes,
        config.name,
        Path(config.disk),
        read_disk(Path(config.disk)).size_bytes,
        SECTOR_BYTES,
        Layout(directory).volume(config.name),
        volumes.state_page(directory, config),
    )


def entry(
    directory: Path, config: VolumeConfig, state: str, capture_mode: str, device: str | None
) -> dict[str, Any]:
    """One volume as ``volume list`` prints it; the keys are a contract."""
    return {
        "name": config.name,
        "disk": config.disk,
        "capture": config.capture,
        "device": device,
        "uri": volumes.nbd_uri(directory, config),
        "state": state,
        "capture_mode": capture_mode,
    }


def entries(directory: Path, name: str | None = None) -> list[dict[str, Any]]:
    """`entry` of each volume, or of one, while no agent runs: as far as files tell."""
    found = []
    for config in other_volumes(directory):
        if name is not None and config.name != name:
            continue
        try:
            replica = Replica(spec_of(directory, config), None)
            state, mode = replica.name_state(), replica.capture_mode()
            replica.close()
        except OSError:
            state, mode = "failed", "bitmap"
        found.append(entry(directory, config, state, mode, None))
    return found


def protect_without_agent(directory: Path, values: dict[str, Any]) -> None:
    """Write the settings of a new volume; the agent serves it when it starts.

    Raises:
        Conflict: An agent runs after all, or the disk cannot be protected.
        UsageError, NotFound, ConfigError: As from `agent.volumes.check_protect`.
    """
    with agent_lock(directory):
        config = msgspec.convert(values, VolumeConfig)
        volumes.check_protect(directory, config, other_volumes(directory))
        volumes.save_volume(directory, config)


def unprotect_without_agent(directory: Path, name: str) -> None:
    """Forget a volume. Raises NotFound, Conflict."""
    with agent_lock(directory):
        volumes.remove_volume(directory, name)


@contextmanager
def agent_lock(directory: Path) -> Iterator[None]:
    """Hold the directory as a running agent does; ends with the process at the latest.

    Raises:
        Conflict: Another agent, or another command, has it.
    """
    layout = Layout(directory)
    layout.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise Conflict(
                "an agent runs here already",
                where=str(directory),
                why=f"process {holder}" if holder else "",
                fix="stop it first",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
