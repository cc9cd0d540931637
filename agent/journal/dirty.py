"""The dirty map of bitmap mode: one bit per region of the volume, on disk and in memory.

Written in full when the volume is protected, so that a full disk cannot stop a bit from being set.
"""

import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from agent.journal.errors import JournalFailed
from agent.journal.segments import open_segment, pwrite_all, sync_directory
from farshore.errors import CorruptRecord
from farshore.failpoints import failpoint
from farshore.units import KIB

FILE_NAME: Final = "dirty"
HEADER_BYTES: Final = 4096
REGION_BYTES_MIN: Final = 64 * KIB
REGIONS_MAX: Final = 1 << 24

_HEADER: Final = struct.Struct("<8sIIQ")
_MAGIC: Final = b"FARSHDRT"
_VERSION: Final = 1
_CHECKED_BYTES: Final = HEADER_BYTES - 32
_PAGE: Final = 4096


def region_bytes_for(volume_bytes: int) -> int:
    """Size of a region: 64 KiB, or what keeps the map of a larger volume (1 TiB) at 2 MiB; a power of two."""
    wanted = -(-volume_bytes // REGIONS_MAX)
    return max(REGION_BYTES_MIN, 1 << (wanted - 1).bit_length())


def region_count(volume_bytes: int, region_bytes: int) -> int:
    return (volume_bytes + region_bytes - 1) // region_bytes


class DirtyMap:
    """Which regions hold writes that no record does. Thread-safe.

    A bit that was set stays set through kill -9 once `set` has returned, and through a power cut once `sync`
    has. `clear` need not be synced: a bit too many only costs a copy.
    """

    def __init__(self, fd: int, path: Path, region_bytes: int, volume_bytes: int, bits: bytes) -> None:
        self.region_bytes, self.volume_bytes = region_bytes, volume_bytes
        self.region_count = region_count(volume_bytes, region_bytes)
        self._fd, self._path = fd, path
        self._bits: npt.NDArray[np.uint8] = np.frombuffer(bytearray(bits), np.uint8)
        self._since_round: npt.NDArray[np.uint8] = np.zeros_like(self._bits)
        self._round = 0
        self._unwritten: set[int] = set()  # pages of the bit field
        self._unsynced = False
        self._failed = False
        self._count = int(np.bitwise_count(self._bits).sum())
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, volume_bytes: int) -> "DirtyMap":
        """Make an empty map for a volume, every byte of it durable, in place of any map there was.

        Raises:
            OSError: As from the file system; an earlier map is untouched.
        """
        region_bytes = region_bytes_for(volume_bytes)
        header = _HEADER.pack(_MAGIC, _VERSION, region_bytes, volume_bytes).ljust(_CHECKED_BYTES, b"\0")
        bits = bytes(_bit_field_bytes(volume_bytes, region_bytes))
        fresh = path.with_name(path.name + ".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            pwrite_all(fd, [header, blake3(header).digest(), bits], 0)
            os.fsync(fd)
            failpoint("journal.dirty.written")
            os.rename(fresh, path)
            failpoint("journal.dirty.renamed")
            sync_directory(path.parent)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, region_bytes, volume_bytes, bits)

    @classmethod
    def open(cls, path: Path) -> "DirtyMap":
        """Open a map that `create` made.

        Raises:
            CorruptRecord: It does not check: only a compare of the whole volume replaces it.
            OSError: As from the file system.
        """
        fd = open_segment(path, os.O_RDWR)
        try:
            header = os.pread(fd, HEADER_BYTES, 0)
            if header[:8] != _MAGIC or blake3(header[:_CHECKED_BYTES]).digest() != header[_CHECKED_BYTES:]:
                raise CorruptRecord(0, "the dirty map's header does not check", where=str(path))
            _, version, region_bytes, volume_bytes = _HEADER.unpack_from(header)
            if version != _VERSION:
                raise CorruptRecord(0, f"dirty map version {version}, not {_VERSION}", where=str(path))
            size = _bit_field_bytes(volume_bytes, region_bytes)
            bits = os.pread(fd, size, HEADER_BYTES)
            if len(bits) != size:
                raise CorruptRecord(HEADER_BYTES, "the dirty map is cut short", where=str(path))
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, region_bytes, volume_bytes, bits)

    @property
    def count(self) -> int:
        """Regions that are dirty."""
        return self._count

    def set(self, offset: int, length: int, *, write: bool = True) -> int:
        """Mark the regions that a write touches; call it before the write goes to the disk.

        Args:
            offset: First byte of the write.
            length: Its bytes; 0 marks nothing.
            write: Also write the bits into the page cache, so that they survive this process. False is for a
                journal whose disk does not answer: bits then are only in memory until `write_bits`.

        Returns:
            How many regions were not dirty before.

        Raises:
            JournalFailed: The bits are set in memory but could not be written.
        """
        if length <= 0:
            return 0
        with self._lock:
            first, last = offset // self.region_bytes, (offset + length - 1) // self.region_bytes
            if last >= self.region_count:
                raise ValueError(f"offset {offset}, length {length} is beyond {self.volume_bytes} bytes")
            _set_range(self._since_round, first, last)
            fresh = _set_range(self._bits, first, last)
            if fresh:
                self._count += fresh
                self._unwritten.update(range(first // 8 // _PAGE, last // 8 // _PAGE + 1))
            if write and self._unwritten:
                self._write_bits()
        return fresh

    def begin_round(self) -> int:
        """Start a copy of the dirty regions; returns its number, for `clear`. Take `regions` after this."""
        with self._lock:
            self._since_round.fill(0)
            self._round += 1
            return self._round

    def clear(self, regions: Iterable[int], *, copy_round: int | None = None) -> int:
        """Unmark regions whose copy is vaulted; returns how many.

        Args:
            regions: Indexes.
            copy_round: Number of the round they were copied in: regions set again since it began stay set,
                and a round that is not the newest clears nothing. None: unconditionally.
        """
        with self._lock:
            if copy_round not in (None, self._round):
                return 0
            indexes = np.fromiter(regions, np.int64)
            at, bit = indexes // 8, (1 << (indexes % 8)).astype(np.uint8)
            keep = (self._bits[at] & bit) == 0
            if copy_round is not None:
                keep |= (self._since_round[at] & bit) != 0
            at, bit = at[~keep], bit[~keep]
            np.bitwise_and.at(self._bits, at, ~bit)
            self._unwritten.update(np.unique(at // _PAGE).tolist())
            before, self._count = self._count, int(np.bitwise_count(self._bits).sum())
            return before - self._count

    def regions(self) -> npt.NDArray[np.int64]:
        """Return the indexes of the dirty regions, ascending."""
        with self._lock:
            return np.flatnonzero(np.unpackbits(self._bits, bitorder="little"))

    def is_dirty(self, offset: int, length: int) -> bool:
        """Tell whether a range touches a dirty region; redo skips those parts."""
        first, last = offset // self.region_bytes, (offset + length - 1) // self.region_bytes
        with self._lock:
            return any(self._bits[region // 8] >> (region % 8) & 1 for region in range(first, last + 1))

    def write_bits(self) -> None:
        """Write changed bits into the page cache. Raises JournalFailed."""
        with self._lock:
            self._write_bits()

    def sync(self) -> None:
        """Make every bit set before the call durable; after this a covered FLUSH may be answered.

        Raises:
            JournalFailed: It is not known which bits are durable; the map is not used again.
        """
        with self._lock:
            self._write_bits()
            if not self._unsynced:
                return
            self._unsynced = False
        failpoint("journal.dirty.bits_written")
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._fail(error) from error

    def _write_bits(self) -> None:
        if self._failed:
            raise JournalFailed("cannot write the dirty map", where=str(self._path), why="it failed before")
        while self._unwritten:
            page = min(self._unwritten)
            part = self._bits[page * _PAGE : (page + 1) * _PAGE].tobytes()
            try:
                pwrite_all(self._fd, [part], HEADER_BYTES + page * _PAGE)
            except OSError as error:
                raise self._fail(error) from error
            self._unwritten.discard(page)
            self._unsynced = True

    def _fail(self, error: OSError) -> JournalFailed:
        self._failed = True
        return JournalFailed("cannot write the dirty map", where=str(self._path), why=str(error))

    def close(self) -> None:
        os.close(self._fd)


def _bit_field_bytes(volume_bytes: int, region_bytes: int) -> int:
    return (region_count(volume_bytes, region_bytes) + 7) // 8


def _set_range(bits: npt.NDArray[np.uint8], first: int, last: int) -> int:
    """Set the bits ``first`` to ``last``; return how many were not set."""
    if first == last:  # nearly every write
        at, mask = first >> 3, 1 << (first & 7)
        value = int(bits[at])
        bits[at] = value | mask
        return 0 if value & mask else 1
    start, end = first >> 3, (last >> 3) + 1
    masks = np.full(end - start, 0xFF, np.uint8)
    masks[0] &= 0xFF << (first & 7) & 0xFF
    masks[-1] &= 0xFF >> (7 - (last & 7))
    fresh = int(np.bitwise_count(masks & ~bits[start:end]).sum())
    bits[start:end] |= masks
    return fresh
