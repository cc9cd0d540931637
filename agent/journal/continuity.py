"""Whether a disk is still what the journal left it as: DESIGN section 4, "Continuity".

`decide` is the table, and only that; `read_disk`, `read_boot` look at the host. Where the table says compare,
not one byte is written to the disk before the compare is done.
"""

import errno
import os
import stat
import struct
import time
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Final

from farshore.clock import Clock

IMAGE: Final = 1
BLOCK: Final = 2

CTIME_SLACK_NS: Final = 20_000_000
"""A write of ours can be stamped this much after the last heartbeat; under load one comes every 10 ms."""

_BLKGETSIZE64: Final = 0x80081272  # linux/fs.h
_SECTORS_WRITTEN: Final = 6  # Documentation/block/stat.rst, counted from 0


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    """What tells one disk, and one state of it, from another.

    Attributes:
        kind: ``IMAGE`` (a file) or ``BLOCK``.
        device: st_dev of an image, st_rdev of a block device.
        inode: Of an image; 0 for a block device, whose node is made anew at each boot.
        size_bytes: Of the disk.
        ctime_ns: Of an image; 0 for a block device, whose node's ctime says nothing of its content. Never
            mtime, which anybody can set.
        write_counter: Sectors written to a block device since it appeared, by the kernel's count; 0 for an
            image. Writes to a partition through the whole disk are not in the partition's count.
    """

    kind: int
    device: int
    inode: int
    size_bytes: int
    ctime_ns: int
    write_counter: int

    def same_disk(self, other: "DiskIdentity") -> bool:
        """Tell whether both are the same disk at the same size, whatever is on it."""
        mine = (self.kind, self.device, self.inode, self.size_bytes)
        return mine == (other.kind, other.device, other.inode, other.size_bytes)


@dataclass(frozen=True, slots=True)
class Boot:
    """Which boot of the kernel this is, and when it began by the wall clock as it is set now."""

    id: bytes
    time_ns: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """What the journal says of the last run of the tap.

    Attributes:
        disk: Identity at the last mark.
        boot_id: Boot it ran in.
        clean: It stopped in order: everything applied and durable, the identity taken after that.
        journal_lost: Dirty bits were only in memory.
        bitmap: Writes went past the journal; their dirty bits survive the process, not surely the kernel.
        heartbeat_ns: Wall clock of the last heartbeat in the state page; None when the page is lost.
    """

    disk: DiskIdentity
    boot_id: bytes
    clean: bool
    journal_lost: bool
    bitmap: bool
    heartbeat_ns: int | None


@dataclass(frozen=True, slots=True)
class Continuity:
    """The decision.

    Attributes:
        redo: Records after the stable mark are to be written to the disk again before it is served.
        proved: Nobody else wrote to the disk. False: compare everything, points meanwhile are fuzzy.
        why: One clause, for people.
    """

    redo: bool
    proved: bool
    why: str


def decide(stopped: Stopped, now: DiskIdentity, boot: Boot, *, supervisor_held: bool) -> Continuity:
    """Decide between redo and compare.

    Args:
        stopped: The last run.
        now: The disk as found, taken before anything opens it for writing.
        boot: This boot.
        supervisor_held: The supervisor that started the last run is alive and has held the disk open
            exclusively ever since.
    """
    if not stopped.disk.same_disk(now):
        return _compare("it is another disk, or of another size")
    if stopped.clean:
        return _after_clean_stop(stopped, now, boot)
    if stopped.journal_lost:
        return _compare("the journal was lost and the tap did not stop in order")
    same_boot = stopped.boot_id == boot.id
    if now.kind == BLOCK:
        if same_boot and supervisor_held:
            return _redo("the supervisor held the disk exclusively")
        return _compare("nothing shows that nobody else wrote to the block device")
    if same_boot:
        return _after_kill(stopped, now, supervisor_held=supervisor_held)
    return _after_power_cut(stopped, now, boot)


def _after_clean_stop(stopped: Stopped, now: DiskIdentity, boot: Boot) -> Continuity:
    if now.kind == IMAGE:
        if stopped.disk.ctime_ns == now.ctime_ns:
            return Continuity(redo=False, proved=True, why="stopped in order and not changed since")
        return _compare("the image was changed after the tap stopped in order")
    if stopped.boot_id != boot.id:
        return _compare("a block device does not tell whether it was written before this boot")
    if stopped.disk.write_counter == now.write_counter:
        return Continuity(redo=False, proved=True, why="stopped in order and nothing written since")
    return _compare("the block device was written after the tap stopped in order")


def _after_kill(stopped: Stopped, now: DiskIdentity, *, supervisor_held: bool) -> Continuity:
    if stopped.heartbeat_ns is None:
        return _compare("the state page is lost, so the last heartbeat is not known")
    if now.ctime_ns > stopped.heartbeat_ns + CTIME_SLACK_NS:
        return _compare("the image was changed after the tap's last heartbeat")
    # Under one kernel ctime only goes back when the wall clock was set back, and then it proves nothing.
    if now.ctime_ns < stopped.disk.ctime_ns:
        return _compare("the image's ctime went back: the clock was set while it was in use")
    held = ", disk held by the supervisor" if supervisor_held else ""
    return _redo(f"the image was not changed after the last heartbeat{held}")


def _after_power_cut(stopped: Stopped, now: DiskIdentity, boot: Boot) -> Continuity:
    if stopped.bitmap:
        return _compare("power failed below data mode, where a bit may be younger than its write")
    # fdatasync does not store timestamps, so after a power cut ctime may well be older than at the last mark.
    if now.ctime_ns < boot.time_ns:
        return _redo("the image was not changed since this boot")
    return _compare("the image was changed since this boot")


def _redo(why: str) -> Continuity:
    return Continuity(redo=True, proved=True, why=why)


def _compare(why: str) -> Continuity:
    return Continuity(redo=False, proved=False, why=why)


def read_disk(path: Path, *, sysfs: Path = Path("/sys")) -> DiskIdentity:
    """Take the identity of a disk: a file or a block device; a symbolic link is followed (/dev/disk/by-id).

    Raises:
        OSError: It cannot be looked at, or is neither.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return read_disk_fd(fd, sysfs=sysfs)
    finally:
        os.close(fd)


def read_disk_fd(fd: int, *, sysfs: Path = Path("/sys")) -> DiskIdentity:
    """As `read_disk`, of an open disk."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return DiskIdentity(
            IMAGE, status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns, write_counter=0
        )
    if not stat.S_ISBLK(status.st_mode):
        raise OSError(errno.EINVAL, "neither a file nor a block device")
    device = status.st_rdev
    size = struct.unpack("Q", ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    name = f"{os.major(device)}:{os.minor(device)}"
    counters = (sysfs / "dev" / "block" / name / "stat").read_text().split()
    return DiskIdentity(BLOCK, device, 0, size, 0, int(counters[_SECTORS_WRITTEN]))


def read_boot(clock: Clock, *, procfs: Path = Path("/proc")) -> Boot:
    """Return this boot. Its time moves with the wall clock; /proc/stat's would too, and has only seconds."""
    text = (procfs / "sys/kernel/random/boot_id").read_text().strip()
    since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return Boot(bytes.fromhex(text.replace("-", "")), clock.wall_ns() - since)
