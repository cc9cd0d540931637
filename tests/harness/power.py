"""A disk whose power can be cut after the fact.

QEMU's ``blklogwrites`` driver writes every request of a block device to a log (the format of the kernel's
dm-log-writes: Documentation/admin-guide/device-mapper/log-writes.rst). A file system on that device runs for
real, once; afterwards any power cut of that run is rebuilt from the log: all that was flushed, and of the
writes behind the last flush any subset, each possibly torn at a sector.
"""

import os
import random
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.harness.qemu import loop_over

SECTOR_BYTES: Final = 512
FLUSH: Final = 1
FUA: Final = 2
DISCARD: Final = 4

_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_MAGIC: Final = 0x6A736677736872


@dataclass(frozen=True, slots=True)
class Entry:
    """One logged request. ``at`` is where its data lies in the log; lengths and offsets in bytes."""

    offset: int
    length: int
    flags: int
    at: int


def entries_so_far(log: Path) -> int:
    """Requests logged by now, by the log's superblock; the device may be in use."""
    with log.open("rb") as file:
        magic, _, count, _ = _SUPER.unpack(file.read(_SUPER.size))
    return int(count) if magic == _MAGIC else 0


def read_log(log: Path) -> list[Entry]:
    """All requests of a log that is no longer written."""
    with log.open("rb") as file:
        magic, version, count, sector_bytes = _SUPER.unpack(file.read(_SUPER.size))
        assert magic == _MAGIC
        assert version == 1
        entries = []
        at = sector_bytes
        for _ in range(count):
            file.seek(at)
            sector, sectors, flags, _ = _ENTRY.unpack(file.read(_ENTRY.size))
            length = sectors * sector_bytes
            entries.append(Entry(sector * sector_bytes, length, flags, at + sector_bytes))
            at += sector_bytes + (0 if flags & DISCARD else length)
    return entries


class PowerCuts:
    """Rebuilds the disk as a power cut left it.

    Cuts must be asked for in ascending order of entries: the durable part is carried on from one to the next.
    """

    def __init__(self, log: Path, disk_bytes: int, base: Path) -> None:
        """``base`` is the file that holds the durable part; it is made here, sparse."""
        self.entries = read_log(log)
        self._log = log.open("rb")
        self._base = base
        self._applied = 0
        base.touch()
        os.truncate(base, disk_bytes)

    def cut(self, after: int, target: Path, rng: random.Random) -> int:
        """Write to ``target`` the disk as it is when power fails just after entry ``after`` was submitted.

        What precedes the last flush among the first ``after`` entries is on the disk. Of the rest each write
        is, by ``rng``, kept, lost or torn at a sector; a FUA write that completed (any but the last) is kept.
        Returns the number of writes whose fate was open.
        """
        flushes = [i for i in range(self._applied, after) if self.entries[i].flags & FLUSH]
        durable_up_to = flushes[-1] if flushes else self._applied
        with self._base.open("r+b") as base:
            while self._applied < durable_up_to:
                self._write(base.fileno(), self.entries[self._applied])
                self._applied += 1
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", self._base, target], check=True)
        open_entries = [e for e in self.entries[durable_up_to:after] if e.length]
        with target.open("r+b") as file:
            for at, entry in enumerate(open_entries):
                certain = entry.flags & FUA and at + 1 < len(open_entries)
                fate = rng.random()
                if certain or fate < 0.5:
                    self._write(file.fileno(), entry)
                elif fate < 0.6 and entry.length > SECTOR_BYTES and not entry.flags & DISCARD:
                    kept = rng.randrange(1, entry.length // SECTOR_BYTES) * SECTOR_BYTES
                    self._write(file.fileno(), entry, kept)
        return len(open_entries)

    def _write(self, fd: int, entry: Entry, length: int | None = None) -> None:
        if entry.flags & DISCARD:
            zeros = bytes(1 << 20)
            for at in range(0, entry.length, len(zeros)):
                os.pwrite(fd, zeros[: entry.length - at], entry.offset + at)
        elif entry.length:
            os.pwrite(fd, os.pread(self._log.fileno(), length or entry.length, entry.at), entry.offset)

    def close(self) -> None:
        self._log.close()


@contextmanager
def in_memory(where: Path) -> Iterator[Path]:
    """A new folder whose files lie in memory, for rebuilt disks.

    What a cut left is known before the disk is rebuilt, and nothing depends on where it then lies. A copy of
    the whole for each of some hundred cuts would keep the machine's own disk busy, and other tests waiting.
    """
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@contextmanager
def logged_device(directory: Path, disk_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A loop device of ``disk_bytes`` whose every request goes to a log. Yields (device, log)."""
    disk, log = directory / "disk.img", directory / "disk.log"
    for path, size in ((disk, disk_bytes), (log, 0)):
        path.touch()
        os.truncate(path, size)
    chain = {
        "driver": "blklogwrites",
        "node-name": "logged",
        "file": {"driver": "file", "filename": str(disk)},
        "log": {"driver": "file", "filename": str(log)},
    }
    # A number of our own: the test that rebuilds cuts takes it again, and no other may come between.
    number = f"/dev/loop{1000 + os.getpid() % 100_000}"
    with loop_over(directory, chain, disk_bytes, number) as (device, _):
        yield device, log
