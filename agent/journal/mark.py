"""The ``mark`` file: how far the journal, and the disk itself, are known to be durable.

Two slots in pages of their own, written in turn: a power cut while one is written leaves the other.
"""

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from blake3 import blake3

from agent.journal.continuity import BLOCK, IMAGE, DiskIdentity
from agent.journal.errors import JournalFailed
from agent.journal.segments import open_segment, pwrite_all, sync_directory
from farshore.errors import CorruptRecord
from farshore.failpoints import failpoint

RESYNC_REQUIRED: Final = 1
"""Disk and vault may differ where no record and no dirty bit says so: compare everything."""
CLEAN: Final = 2
"""The tap stopped in order: all records applied, disk and journal durable."""
JOURNAL_LOST: Final = 4
"""Writes go past the journal and their dirty bits are in memory only."""
BITMAP: Final = 8
"""Writes go past the journal; a bit may be younger on the disk than the write it stands for."""

SLOT_BYTES: Final = 512
SLOT_STRIDE: Final = 4096
FILE_NAME: Final = "mark"

_SLOT: Final = struct.Struct("<8sQ16sQQQQQQQQ16sQQ")
_MAGIC: Final = b"FARSHMRK"
_CHECKED_BYTES: Final = SLOT_BYTES - 32


@dataclass(frozen=True, slots=True)
class Mark:
    """What one slot says.

    Attributes:
        incarnation: Id of the incarnation that ``durable_lsn`` belongs to.
        durable_lsn: fdatasync of every segment up to this record has returned 0.
        stable_lsn: The stable mark: the disk was fdatasynced after this and all earlier records were applied.
        flags: ``RESYNC_REQUIRED``, ``CLEAN``, ``JOURNAL_LOST``, ``BITMAP``.
        dirty_epoch: Grows each time the volume leaves data mode.
        disk: The protected disk, as it was when the slot was written.
        boot_id: The kernel's, 16 bytes.
        serial: Grows by one with each writing; set by `MarkFile`.
    """

    incarnation: bytes
    durable_lsn: int
    stable_lsn: int
    flags: int
    dirty_epoch: int
    disk: DiskIdentity
    boot_id: bytes
    serial: int = 0

    def encode(self) -> bytes:
        """The slot's 512 bytes."""
        disk = self.disk
        body = _SLOT.pack(
            _MAGIC,
            self.serial,
            self.incarnation,
            self.durable_lsn,
            self.stable_lsn,
            self.flags,
            self.dirty_epoch,
            disk.device,
            disk.inode,
            disk.size_bytes,
            disk.ctime_ns,
            self.boot_id,
            disk.write_counter,
            disk.kind,
        ).ljust(_CHECKED_BYTES, b"\0")
        return body + blake3(body).digest()


def decode_slot(slot: bytes) -> Mark | None:
    """The mark in a slot of 512 bytes; None when it does not check (never written, or torn)."""
    body = slot[:_CHECKED_BYTES]
    if len(slot) != SLOT_BYTES or body[:8] != _MAGIC or blake3(body).digest() != slot[_CHECKED_BYTES:]:
        return None
    _, serial, incarnation, durable, stable, flags, epoch, device, inode, size, ctime, boot, counter, kind = (
        _SLOT.unpack_from(body)
    )
    if kind not in (IMAGE, BLOCK):
        return None
    disk = DiskIdentity(kind, device, inode, size, ctime, counter)
    return Mark(incarnation, durable, stable, flags, epoch, disk, boot, serial)


def load_mark(directory: Path) -> Mark | None:
    """Return the newest mark of a journal directory, None when none was ever written.

    Raises:
        CorruptRecord: Neither slot checks: no power cut does that.
        OSError: The file cannot be read.
    """
    path = directory / FILE_NAME
    try:
        fd = open_segment(path)
    except FileNotFoundError:
        return None
    try:
        marks = _load(fd)
        never_written = not any(os.pread(fd, SLOT_STRIDE + SLOT_BYTES, 0))
    finally:
        os.close(fd)
    if never_written:
        return None
    if not marks:
        raise CorruptRecord(0, "neither slot of the mark checks", where=str(path))
    return max(marks, key=lambda mark: mark.serial)


def _load(fd: int) -> list[Mark]:
    slots = (os.pread(fd, SLOT_BYTES, index * SLOT_STRIDE) for index in (0, 1))
    return [mark for slot in slots if (mark := decode_slot(slot))]


class MarkFile:
    """The writing side. One owner, one thread at a time."""

    def __init__(self, path: Path, fd: int, serial: int) -> None:
        self._path, self._fd, self._serial = path, fd, serial
        self._failed = False

    @classmethod
    def open(cls, directory: Path) -> "MarkFile":
        """Open the mark of a journal directory, or make one that says nothing yet.

        Raises:
            OSError: As from the file system.
        """
        path = directory / FILE_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < 2 * SLOT_STRIDE:
                os.posix_fallocate(fd, 0, 2 * SLOT_STRIDE)  # so that writing a slot cannot meet a full disk
                os.fsync(fd)
                sync_directory(directory)
            serial = max((mark.serial for mark in _load(fd)), default=0)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, serial)

    def write(self, mark: Mark) -> Mark:
        """Make ``mark`` durable in the older slot and return it with its serial.

        Raises:
            JournalFailed: It is not known whether the slot is durable. The file is not used again.
        """
        if self._failed:
            raise JournalFailed("cannot write the mark", where=str(self._path), why="an earlier write failed")
        numbered = replace(mark, serial=self._serial + 1)
        try:
            pwrite_all(self._fd, [numbered.encode()], (numbered.serial % 2) * SLOT_STRIDE)
            failpoint("journal.mark.written")
            os.fdatasync(self._fd)
        except OSError as error:
            self._failed = True
            raise JournalFailed("cannot write the mark", where=str(self._path), why=str(error)) from error
        failpoint("journal.mark.synced")
        self._serial = numbered.serial
        return numbered

    def close(self) -> None:
        os.close(self._fd)
