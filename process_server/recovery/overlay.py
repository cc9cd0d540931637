"""A local copy-on-write layer: what is written to an export stays in a sparse file beside it.

The file holds the volume's bytes at their own offsets, as far as they were written, and behind them a header
and one bit per cluster. A bit is stored only after its cluster is durable; so after a crash the file holds
every write that was flushed, and opening it again goes on from there.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Never

import numpy as np

from farshore.errors import CapacityError, Conflict, Failed, FarshoreError, IntegrityError
from farshore.units import KIB, MIB
from process_server.recovery.image import Piece, VolumeImage

CLUSTER_BYTES: Final = 64 * KIB
"""What is copied at the first write into it: the usual length of a chunk, which is read whole anyway."""
_MAGIC: Final = b"FARSHCOW"
_HEADER: Final = struct.Struct("<8sII16s16sQQQ")
_HEADER_BYTES: Final = 4096
_FALLOC_PUNCH: Final = 0x03  # PUNCH_HOLE | KEEP_SIZE
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class OverlayFile:
    """A volume image that can be written to. Reads may run in any thread; all else in one at a time.

    Args:
        path: Made when it is not there; else it has to be the overlay of the same volume at the same cut.
        keep: False removes the file's name at once, so that nothing of it is left at the end.

    Raises:
        Conflict: It is another's overlay, no overlay at all, or in use.
        CapacityError: There is no room for it.
    """

    def __init__(self, path: Path, image: VolumeImage, *, machine: bytes, keep: bool) -> None:
        self._path, self._image = path, image
        self.size_bytes = image.size_bytes
        self._clusters = -(-self.size_bytes // CLUSTER_BYTES)
        self._map_at = -(-self.size_bytes // MIB) * MIB
        self._header = _HEADER.pack(
            _MAGIC,
            1,
            CLUSTER_BYTES,
            machine,
            image.volume,
            image.cut.point.seq,
            image.lsn,
            self.size_bytes,
        ).ljust(_HEADER_BYTES, b"\0")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            self._raise(exc)
        try:
            self._open()
            if not keep:
                path.unlink()
        except OSError as exc:
            os.close(self._fd)
            self._raise(exc)
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict("the overlay is in use", where=str(self._path)) from None
        map_bytes = -(-self._clusters // 8)
        total = self._map_at + _HEADER_BYTES + map_bytes
        found = os.fstat(self._fd).st_size
        if found == 0:
            os.ftruncate(self._fd, total)
            self._write(self._header, self._map_at)
            os.fsync(self._fd)
        elif found != total or os.pread(self._fd, _HEADER_BYTES, self._map_at) != self._header:
            raise Conflict(
                "this is not the overlay of this volume at this point",
                where=str(self._path),
                fix="name another file, or the point it was made for",
            )
        stored = os.pread(self._fd, map_bytes, self._map_at + _HEADER_BYTES)
        bits = np.unpackbits(np.frombuffer(stored, np.uint8), bitorder="little")[: self._clusters]
        self._own = bits.astype(bool)
        self._unsaved: set[int] = set()

    @property
    def own_bytes(self) -> int:
        """Bytes that are in the file, not in the vault alone."""
        return int(self._own.sum()) * CLUSTER_BYTES

    def read(self, offset: int, length: int) -> bytes:
        """Return a byte range. Raises as `VolumeImage.read`, and Failed."""
        parts = [
            self._read_own(at, size) if own else self._image.read(at, size)
            for at, size, own in self._runs(offset, length)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write; durable after the next `flush`. Raises as `read`, and CapacityError."""
        end = offset + len(data)
        first, last = offset // CLUSTER_BYTES, (end - 1) // CLUSTER_BYTES
        # The two clusters at the edges are completed first: a bit stands for all of a cluster.
        for cluster in {first, last}:
            start = cluster * CLUSTER_BYTES
            stop = min(start + CLUSTER_BYTES, self.size_bytes)
            if not self._own[cluster] and (offset > start or end < stop):
                self._write(self._image.read(start, stop - start), start)
        self._write(data, offset)
        self._take(first, last + 1)

    def zero(self, offset: int, length: int) -> None:
        """Make a byte range read as zeros, giving its space back. Raises as `write`."""
        end = offset + length
        first = -(-offset // CLUSTER_BYTES)
        last = end // CLUSTER_BYTES if end < self.size_bytes else self._clusters
        if first >= last:
            self._write_zeros(offset, end)
            return
        start, stop = first * CLUSTER_BYTES, min(last * CLUSTER_BYTES, self.size_bytes)
        if _libc.fallocate(self._fd, _FALLOC_PUNCH, start, stop - start) != 0:
            self._write_zeros(start, stop)
        self._take(first, last)
        self._write_zeros(offset, start)
        self._write_zeros(stop, end)

    def _write_zeros(self, start: int, end: int) -> None:
        for at in range(start, end, MIB):
            self.write(at, bytes(min(MIB, end - at)))

    def flush(self) -> None:
        """Return when every write before is durable: clusters first, then the bits that vouch for them."""
        try:
            os.fdatasync(self._fd)
            if not self._unsaved:
                return
            unsaved, self._unsaved = self._unsaved, set()
            try:
                for page in sorted(unsaved):
                    bits = self._own[page * 8 * _HEADER_BYTES : (page + 1) * 8 * _HEADER_BYTES]
                    packed = np.packbits(bits, bitorder="little").tobytes()
                    self._write(packed, self._map_at + _HEADER_BYTES + page * _HEADER_BYTES)
                os.fdatasync(self._fd)
            except BaseException:
                self._unsaved |= unsaved
                raise
        except OSError as exc:
            self._raise(exc)

    def fill(self, cluster: int, data: bytes) -> None:
        """Put what the vault holds there into the file, where nothing was written; whole clusters."""
        for number in range(len(data) // CLUSTER_BYTES + (len(data) % CLUSTER_BYTES > 0)):
            if not self._own[cluster + number]:
                start = number * CLUSTER_BYTES
                self._write(data[start : start + CLUSTER_BYTES], (cluster + number) * CLUSTER_BYTES)
                self._take(cluster + number, cluster + number + 1)

    def extents(self, offset: int, length: int) -> list[Piece]:
        """Return runs of data and of zeros, in order."""
        pieces: list[Piece] = []
        for at, size, own in self._runs(offset, length):
            pieces.extend([Piece(at, size, True)] if own else self._image.extents(at, size))
        return pieces

    def close(self) -> None:
        """Flush and let go of the file."""
        try:
            self.flush()
        finally:
            os.close(self._fd)

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, in the file) for a byte range."""
        end = offset + length
        first, last = offset // CLUSTER_BYTES, -(-end // CLUSTER_BYTES)
        own = self._own[first:last].copy()
        edges = np.flatnonzero(own[1:] != own[:-1]) + 1
        for begin, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(own)], strict=True):
            start = max(offset, (first + begin) * CLUSTER_BYTES)
            yield start, min(end, (first + stop) * CLUSTER_BYTES) - start, bool(own[begin])

    def _take(self, first: int, end: int) -> None:
        self._own[first:end] = True
        bits = 8 * _HEADER_BYTES
        self._unsaved.update(range(first // bits, (end - 1) // bits + 1))

    def _read_own(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as exc:
            self._raise(exc)
        if len(data) != length:
            raise IntegrityError("the overlay ends early", where=str(self._path), why="it was cut meanwhile")
        return data

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        try:
            while len(view):
                done = os.pwrite(self._fd, view, offset)
                view, offset = view[done:], offset + done
        except OSError as exc:
            self._raise(exc)

    def _raise(self, exc: OSError) -> Never:
        error: type[FarshoreError] = CapacityError if exc.errno in _FULL else Failed
        raise error("cannot use the overlay", where=str(self._path), why=exc.strerror or str(exc)) from exc
