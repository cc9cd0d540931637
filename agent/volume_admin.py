"""What the ``volume`` verbs do with settings and what they print; with a running agent or without."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from agent import volumes
from agent.capture.scan import CAPTURE_MODE, ScanReplica
from agent.config import Layout, load
from agent.journal.continuity import read_disk
from agent.journal.reader import JournalReader
from agent.replicate.ports import VolumeSpec
from agent.replicate.replica import Replica, known_size
from agent.volumes import VolumeConfig
from farshore.clock import Clock, SystemClock
from farshore.errors import Conflict, UsageError
from farshore.units import SECTOR_BYTES

FUZZY_NOTE: Final = (
    "its recovery points are fuzzy: they hold what was read while others may have written. recover takes them"
    " with --allow-fuzzy; protect a snapshot, or a disk at rest, with --quiesced"
)


def to_config(
    directory: Path,
    name: str,
    disk: Path,
    capture: str,
    listen: str | None,
    attach: str | None,
    *,
    quiesced: bool = False,
    every_s: float | None = None,
) -> dict[str, Any]:
    """Return the settings that the options of ``volume protect`` ask for, as the agent is sent them.

    Args:
        every_s: Seconds from one pass of a scan to the next; None for the usual.

    Raises:
        UsageError: An option makes no sense.
        ConfigError: The directory is no agent's.
    """
    load(directory)
    if every_s is not None and capture != "scan":
        raise UsageError("cannot protect the volume", where="--every", why="it belongs to --capture scan")
    config = VolumeConfig(
        id=volumes.new_volume_id(),
        name=name,
        disk=str(disk.absolute()),
        capture="tap-nbd" if capture == "tap-nbd" else "scan",
        listen=listen or "",
        attach="loop" if attach == "loop" else "nbd" if attach == "nbd" else "",
        quota_bytes=volumes.default_quota_bytes(directory, VolumeConfig("", "", "").segment_bytes),
        scan_every_s=volumes.SCAN_EVERY_S if every_s is None else every_s,
        quiesced=quiesced,
    )
    volumes.check_settings(config)
    return msgspec.structs.asdict(config)


def other_volumes(directory: Path) -> list[VolumeConfig]:
    """The settings of every protected volume. Raises ConfigError."""
    return [volumes.load_volume(directory, name) for name in volumes.list_volumes(directory, None)]


def spec_of(directory: Path, config: VolumeConfig, known_bytes: int = 0) -> VolumeSpec:
    """What replication has to know of a volume.

    Args:
        known_bytes: Size of a disk that may be missing; 0: it may not.

    Raises:
        OSError: The disk cannot be looked at.
    """
    try:
        size_bytes = read_disk(Path(config.disk)).size_bytes
    except OSError:
        if not known_bytes:
            raise
        size_bytes = known_bytes
    return _spec(directory, config, size_bytes)


def _spec(directory: Path, config: VolumeConfig, size_bytes: int) -> VolumeSpec:
    return VolumeSpec(
        config.id_bytes,
        config.name,
        Path(config.disk),
        size_bytes,
        SECTOR_BYTES,
        Layout(directory).volume(config.name),
        volumes.state_page(directory, config),
    )


def replica_of(directory: Path, config: VolumeConfig, clock: Clock, *, journal: bool = True) -> Replica:
    """A volume as replication knows it, by its engine; without ``journal`` only its state can be asked.

    Raises:
        OSError: The disk cannot be looked at.
    """
    if config.scanned:
        # A disk that is not there now may come back; meanwhile it is in every cut, as it was.
        known = known_size(Layout(directory).volume(config.name))
        spec = spec_of(directory, config, known_bytes=known)
        return ScanReplica(spec, config.scan_every_s, config.quiesced, clock)
    spec = spec_of(directory, config)
    return Replica(spec, JournalReader(spec.folder) if journal else None)


def known_replica(directory: Path, config: VolumeConfig) -> Replica | None:
    """A volume of the tap as its own folder knows it, whether or not its disk is there.

    Returns:
        None when the folder says nothing: it was never replicated, or by an agent that did not keep its size.
    """
    folder = Layout(directory).volume(config.name)
    size_bytes = known_size(folder)
    if not size_bytes:
        return None
    return Replica(_spec(directory, config, size_bytes), JournalReader(folder))


def entry(
    directory: Path, config: VolumeConfig, state: str, capture_mode: str, device: str | None
) -> dict[str, Any]:
    """One volume as ``volume list`` prints it; the keys are a contract."""
    return {
        "name": config.name,
        "disk": config.disk,
        "capture": config.capture,
        "device": device,
        "uri": None if config.scanned else volumes.nbd_uri(directory, config),
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
            replica = replica_of(directory, config, SystemClock(), journal=False)
            state, mode = replica.name_state(), replica.capture_mode()
            replica.close()
        except OSError:
            state, mode = "failed", unknown_mode(config)
        found.append(entry(directory, config, state, mode, None))
    return found


def unknown_mode(config: VolumeConfig) -> str:
    """The capture mode of a volume that cannot be asked: never one better than it has."""
    return CAPTURE_MODE if config.scanned else "bitmap"


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
        config = volumes.load_volume(directory, name)
        volumes.remove_volume(directory, name)
        if config.scanned:
            volumes.state_page(directory, config).unlink(missing_ok=True)


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
