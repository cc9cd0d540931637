"""The protected volumes of a machine: their settings, and what must hold before one is protected."""

import json
import os
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from agent.config import Layout
from agent.journal.continuity import read_disk
from farshore.config import load_config, write_private
from farshore.errors import ConfigError, Conflict, NotFound, UsageError
from farshore.ids import id_from_hex, id_to_hex, new_id, valid_name
from farshore.nbd.server import check_socket_path
from farshore.units import GIB, MIB, SECTOR_BYTES, format_size

CONFIG_NAME: Final = "volume.toml"
QUOTA_BYTES: Final = 8 * GIB
QUOTA_SHARE: Final = 10
"""The default quota is at most this part of the journal's free space: one tenth."""
SEGMENTS_MIN: Final = 4
"""A quota holds the segment that is written, the one prepared, and two that are being vaulted."""
VOLUME_BYTES_MAX: Final = 1 << 63
SCAN_EVERY_S: Final = 900.0
_SCAN_EVERY_MIN_S: Final = 0.5
_SCAN_EVERY_MAX_S: Final = 366 * 86_400.0
_SCAN_KEYS: Final = frozenset({"scan_every_s", "quiesced"})
# No place for a journal: gone with the kernel, or with a network that the disk does not need.
_VOLATILE: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "fuse.sshfs"})
_SHM: Final = Path("/dev/shm")


class VolumeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One volume, as ``DIR/volumes/NAME/volume.toml`` has it.

    Attributes:
        id: 32 hexadecimal digits, for ever.
        name: Also its NBD export name.
        disk: Path of the protected file or block device.
        capture: Which engine sees its writes.
        listen: Path of the NBD socket; empty for ``DIR/run/NAME.sock``.
        attach: How the workload gets a block device: ``loop``, ``nbd``, or none.
        segment_bytes: Size of a segment's file.
        segment_seconds: A segment is ended after this time too.
        quota_bytes: All segments together.
        journal_stall_max_s: The workload waits no longer than this for a journal that does not answer.
        on_journal_lost: What then: go on without a durable record, or wait for it.
        group_commit_ms: The journal is made durable after this time at the latest.
        scan_every_s: With ``scan``: from the beginning of one pass over the disk to that of the next.
        quiesced: With ``scan``: the user promises that nobody writes to the disk during a pass.
    """

    id: str
    name: str
    disk: str
    capture: Literal["tap-nbd", "scan"] = "tap-nbd"
    listen: str = ""
    attach: Literal["", "loop", "nbd"] = ""
    segment_bytes: int = 64 * MIB
    segment_seconds: float = 600.0
    quota_bytes: int = QUOTA_BYTES
    journal_stall_max_s: float = 2.0
    on_journal_lost: Literal["continue", "wait"] = "continue"
    group_commit_ms: float = 5.0
    scan_every_s: float = SCAN_EVERY_S
    quiesced: bool = False

    @property
    def scanned(self) -> bool:
        """It is compared as a whole from time to time; no tap, journal or socket belongs to it."""
        return self.capture == "scan"

    @property
    def id_bytes(self) -> bytes:
        return id_from_hex(self.id)


def config_path(directory: Path, name: str) -> Path:
    return Layout(directory).volume(name) / CONFIG_NAME


def socket_path(directory: Path, config: VolumeConfig) -> Path:
    """Where the volume's NBD server listens."""
    return Path(config.listen) if config.listen else Layout(directory).run / f"{config.name}.sock"


def nbd_uri(directory: Path, config: VolumeConfig) -> str:
    """How NBD clients are told about it."""
    return f"nbd+unix:///{config.name}?socket={socket_path(directory, config)}"


def state_page(directory: Path, config: VolumeConfig) -> Path:
    """Where the tap publishes its counters: on a tmpfs, so that a store never waits for a disk.

    ``DIR/run`` when that is one (it is below /run in production), else ``/dev/shm`` under the volume's id.
    """
    run = Layout(directory).run
    if _file_system_of(run).kind in _VOLATILE or not os.access(_SHM, os.W_OK):
        return run / f"{config.name}.state"
    return _SHM / f"farshore-{config.id}.state"


def load_volume(directory: Path, name: str) -> VolumeConfig:
    """Read one volume's settings.

    Raises:
        NotFound: There is no such volume.
        ConfigError: The file makes no sense.
    """
    path = config_path(directory, name)
    if not valid_name(name) or not path.exists():
        raise NotFound("there is no such volume", where=name, fix="farshore volume list shows them")
    config = load_config(path, VolumeConfig)
    try:
        check_settings(config)
        if config.name != name:
            raise UsageError("its name is not its folder's", where=config.name)
    except UsageError as error:
        raise ConfigError("cannot use the configuration", where=str(path), why=str(error)) from error
    return config


def save_volume(directory: Path, config: VolumeConfig) -> None:
    """Write ``volume.toml`` whole and durable, making its folder. Raises CapacityError or Failed."""
    path = config_path(directory, config.name)
    path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    # A JSON string, number or boolean is the same in TOML; the fields above need nothing more. The keys of
    # scan are written for scan alone: an agent from before it refuses what it does not know.
    values = [
        (key, value)
        for key, value in msgspec.structs.asdict(config).items()
        if config.scanned or key not in _SCAN_KEYS
    ]
    write_private(path, "".join(f"{key} = {json.dumps(value)}\n" for key, value in values).encode())


def remove_volume(directory: Path, name: str) -> None:
    """Forget a volume's settings; its journal stays where it is, under another name."""
    folder = Layout(directory).volume(name)
    target = folder.with_name(f".{name}.{secrets.token_hex(4)}.removed")
    try:
        os.rename(folder, target)
    except FileNotFoundError as error:
        raise NotFound("there is no such volume", where=name) from error


def list_volumes(directory: Path, capture: str | None = "tap-nbd") -> list[str]:
    """Names of the protected volumes of one capture engine, sorted; ``None``: of all of them.

    One whose settings cannot be read counts for every engine: who loads it is told why.
    """
    folder = Layout(directory).volumes
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(
        name
        for name in names
        if valid_name(name)
        and (path := folder / name / CONFIG_NAME).exists()
        and (capture is None or _capture_of(path) in (capture, None))
    )


def _capture_of(path: Path) -> object:
    try:
        return tomllib.loads(path.read_text()).get("capture", "tap-nbd")
    except (OSError, ValueError):
        return None


def check_settings(config: VolumeConfig) -> None:
    """Raises UsageError for a value that can never work, whatever the host is like."""

    def refuse(key: str, why: str) -> UsageError:
        return UsageError("cannot protect the volume", where=key, why=why)

    if not valid_name(config.name):
        raise refuse("name", f"{config.name!r} is not 1 to 63 of a-z0-9._-, beginning with a-z0-9")
    try:
        id_from_hex(config.id)
    except ValueError as error:
        raise refuse("id", str(error)) from error
    if not config.disk.startswith("/"):
        raise refuse("disk", f"{config.disk!r} is not an absolute path")
    if config.listen and not config.listen.startswith("/"):
        raise refuse("listen", f"{config.listen!r} is not an absolute path")
    if config.segment_bytes % 4096 or not 16 * 4096 <= config.segment_bytes <= GIB:
        raise refuse("segment_bytes", "it is a multiple of 4 KiB from 64 KiB to 1 GiB")
    if config.quota_bytes < SEGMENTS_MIN * config.segment_bytes:
        raise refuse("quota_bytes", f"it holds at least {SEGMENTS_MIN} segments")
    if not 0.1 <= config.journal_stall_max_s <= 3600:
        raise refuse("journal_stall_max_s", "it is 0.1 to 3600")
    if not 0 <= config.group_commit_ms <= 1000:
        raise refuse("group_commit_ms", "it is 0 to 1000")
    if not 1 <= config.segment_seconds <= 86_400:
        raise refuse("segment_seconds", "it is 1 to 86400")
    _check_scan(config, refuse)


def _check_scan(config: VolumeConfig, refuse: Callable[[str, str], UsageError]) -> None:
    if not _SCAN_EVERY_MIN_S <= config.scan_every_s <= _SCAN_EVERY_MAX_S:
        raise refuse("scan_every_s", f"it is {_SCAN_EVERY_MIN_S:g} to {_SCAN_EVERY_MAX_S:.0f}")
    if config.scanned and config.listen:
        raise refuse("listen", "scan has no socket: the workload goes on using the disk itself")
    if config.scanned and config.attach:
        raise refuse("attach", "scan makes no device: the workload goes on using the disk itself")
    if config.quiesced and not config.scanned:
        raise refuse("quiesced", "it belongs to --capture scan; a tap sees every write")
    if config.scan_every_s != SCAN_EVERY_S and not config.scanned:
        raise refuse("scan_every_s", "it belongs to --capture scan; a tap sees every write")


def default_quota_bytes(directory: Path, segment_bytes: int) -> int:
    """8 GiB or a tenth of the free space, whichever is smaller, and never less than a journal needs."""
    status = os.statvfs(_existing(directory))
    share = status.f_bavail * status.f_frsize // QUOTA_SHARE
    whole = min(QUOTA_BYTES, share) // segment_bytes * segment_bytes
    return max(whole, SEGMENTS_MIN * segment_bytes)


def new_volume_id() -> str:
    return id_to_hex(new_id())


@dataclass(frozen=True, slots=True)
class _Mount:
    point: str
    kind: str
    device: str  # "major:minor"
    source: str


@dataclass(frozen=True, slots=True)
class Host:
    """Where the host says what is mounted and stacked; other folders in tests."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


def check_protect(
    directory: Path, config: VolumeConfig, others: Iterable[VolumeConfig], *, host: Host | None = None
) -> None:
    """Refuse what could not be protected, at protect time and not at the first failover.

    Raises:
        UsageError: A setting, or the size of the disk, can never work.
        NotFound: There is no such disk.
        Conflict: It is mounted or used otherwise, protected already, or cannot be written.
        ConfigError: The journal must not be where it would be.
    """
    host = host or Host()
    check_settings(config)
    disk = Path(config.disk)
    if not config.scanned:
        check_socket_path(socket_path(directory, config))
    _check_shape(disk)
    for other in others:
        if other.name == config.name:
            raise Conflict("there is a volume of this name", where=config.name)
        sockets = not (config.scanned or other.scanned)
        if sockets and socket_path(directory, other) == socket_path(directory, config):
            raise Conflict("another volume listens there", where=str(socket_path(directory, other)))
        if _same_disk(disk, Path(other.disk)) or _is_part_of(disk, Path(other.disk), host):
            raise Conflict("the disk is protected already", where=config.disk, why=f"as volume {other.name}")
    if config.scanned:
        return  # it only reads: mounted, read-only and in use are all the same to it, and it keeps no journal
    _check_writable(disk)
    _check_journal_place(directory, disk, config, host)
    why = in_use(disk, host=host)
    if why:
        raise Conflict("the disk is in use", where=config.disk, why=why, fix="unmount or detach it first")


def _check_shape(disk: Path) -> None:
    try:
        identity = read_disk(disk)
    except FileNotFoundError as error:
        raise NotFound("there is no such disk", where=str(disk)) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError("cannot protect the disk", where=str(disk), why=why) from error
    if why := why_no_volume(identity.size_bytes):
        raise UsageError("cannot protect the disk", where=str(disk), why=why)


def why_no_volume(size_bytes: int) -> str:
    """Return why a disk of this size cannot be a volume, in one clause; empty when it can."""
    if size_bytes == 0:
        return "it has no bytes"
    if size_bytes % SECTOR_BYTES:
        extend = f"truncate -s %{SECTOR_BYTES} extends it"
        return f"its {size_bytes} bytes are not a multiple of {SECTOR_BYTES}: {extend}"
    if size_bytes > VOLUME_BYTES_MAX - SECTOR_BYTES:
        return "it is larger than 2^63 bytes"
    return ""


def _check_writable(disk: Path) -> None:
    try:
        os.close(os.open(disk, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        why = f"it cannot be written: {error.strerror}"
        raise Conflict("cannot protect the disk", where=str(disk), why=why) from error


def _check_journal_place(directory: Path, disk: Path, config: VolumeConfig, host: Host) -> None:
    mount = _file_system_of(directory, host)
    if mount.kind in _VOLATILE or mount.kind in _REMOTE:
        why = f"{mount.point} is {mount.kind}"
        raise ConfigError("the journal cannot be kept here", where=str(directory), why=why)
    devices = dict(_devices_on(disk, host))
    if mount.device in devices or _device_number(mount.source) in devices:
        why = f"{mount.point} lies on the protected disk: each record would make another"
        raise ConfigError("the journal cannot be kept here", where=str(directory), why=why)
    status = os.statvfs(_existing(directory))
    free = status.f_bavail * status.f_frsize
    if config.quota_bytes > free:
        why = f"quota_bytes is {format_size(config.quota_bytes)}, free are {format_size(free)}"
        raise ConfigError("the journal cannot be kept here", where=str(directory), why=why)


def in_use(disk: Path, *, host: Host | None = None) -> str:
    """Return what else uses a disk, or a device made of it, in one clause; empty when nothing does."""
    host = host or Host()
    devices = dict(_devices_on(disk, host))
    for mount in _mounts(host):
        name = devices.get(mount.device) or devices.get(_device_number(mount.source))
        if name:
            return f"{name} is mounted on {mount.point}"
    for swap in _swaps(host):
        if _same_disk(disk, swap) or _device_number(str(swap)) in devices:
            return f"{swap} is swap"
    for name in devices.values():
        holders = _names(host.sys / "class" / "block" / name / "holders")
        if holders:
            return f"{name} is part of {holders[0]}"
        if name.startswith("loop") and not _same_disk(disk, Path("/dev") / name):
            return f"it is attached to /dev/{name}"
    return ""


def loop_devices(backing: Path, *, host: Host | None = None) -> list[str]:
    """Names of the loop devices whose backing file is ``backing``."""
    host = host or Host()
    found = []
    for name in _names(host.sys / "class" / "block"):
        if not name.startswith("loop"):
            continue
        try:
            text = (host.sys / "class" / "block" / name / "loop" / "backing_file").read_text().rstrip("\n")
        except OSError:
            continue
        if text == str(backing) or _same_disk(backing, Path(text)):
            found.append(name)
    return found


def _devices_on(disk: Path, host: Host) -> Iterator[tuple[str, str]]:
    """Yield (major:minor, name) of the disk itself, its partitions, and loop devices over it with theirs."""
    tops = [*loop_devices(disk, host=host)]
    try:
        status = os.stat(disk)
    except OSError:
        return
    if stat.S_ISBLK(status.st_mode):
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        link = host.sys / "dev" / "block" / number
        tops.append(os.path.basename(os.path.realpath(link)) if link.exists() else disk.name)
        yield number, disk.name
    for name in tops:
        folder = host.sys / "class" / "block" / name
        for part in (folder, *(folder / entry for entry in _names(folder) if entry.startswith(name))):
            try:
                yield (part / "dev").read_text().strip(), part.name
            except OSError:
                continue


def _is_part_of(one: Path, two: Path, host: Host) -> bool:
    """One is a partition of the other, or a loop device over it."""
    first, second = dict(_devices_on(one, host)), dict(_devices_on(two, host))
    return bool(first.keys() & second.keys())


def _same_disk(one: Path, two: Path) -> bool:
    try:
        first, second = os.stat(one), os.stat(two)
    except OSError:
        return False
    if stat.S_ISBLK(first.st_mode):
        return stat.S_ISBLK(second.st_mode) and first.st_rdev == second.st_rdev
    return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)


def _mounts(host: Host) -> Iterator[_Mount]:
    for line in (host.proc / "self" / "mountinfo").read_text(errors="surrogateescape").splitlines():
        # proc_pid_mountinfo(5): optional fields end with a lone hyphen.
        fields, _, rest = line.partition(" - ")
        parts, kinds = fields.split(" "), rest.split(" ")
        yield _Mount(_unescape(parts[4]), kinds[0], parts[2], _unescape(kinds[1]))


def _swaps(host: Host) -> Iterator[Path]:
    try:
        lines = (host.proc / "swaps").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return
    for line in lines:
        yield Path(_unescape(line.split()[0]))


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _file_system_of(path: Path, host: Host | None = None) -> _Mount:
    """The mount that holds ``path``: the last one with the longest mount point above it."""
    real = os.path.realpath(_existing(path))
    best = _Mount("/", "", "", "")
    for mount in _mounts(host or Host()):
        inside = real == mount.point or real.startswith(mount.point.rstrip("/") + "/")
        if inside and len(mount.point) >= len(best.point):
            best = mount
    return best


def _existing(path: Path) -> Path:
    """The nearest of a path and its parents that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _device_number(source: str) -> str:
    if not source.startswith("/"):
        return ""
    try:
        status = os.stat(source)
    except OSError:
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if stat.S_ISBLK(status.st_mode) else ""


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
