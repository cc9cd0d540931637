"""The protected disk: a file or block device, opened so that nobody else writes to it."""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final

from agent.journal.continuity import BLOCK, DiskIdentity, read_disk_fd
from farshore.errors import Conflict, NotFound
from farshore.nbd import codec
from farshore.units import MIB

_KEEP_SIZE: Final = 1  # linux/falloc.h
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
_ZEROS: Final = bytes(MIB)
_WITNESS: Final = "user.farshore.journal_lost"
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


class Disk:
    """An open protected disk. Reads and writes from any thread; each writing thread has a `VectoredWriter`.

    Attributes:
        fd: Open for reading and writing, locked.
        direct_fd: The same past the page cache; -1 where the file system does not have that.
        size_bytes: As it was when opened.
        punches: It gives the space of zeros back, as far as is known.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd
        self.direct_fd = _past_the_page_cache(fd)
        identity = read_disk_fd(fd)
        self.size_bytes, self.is_block = identity.size_bytes, identity.kind == BLOCK
        self.punches = self._zeroes = True

    @classmethod
    def open(cls, path: Path, held: int | None = None) -> "Disk":
        """Open and lock the disk, or take over the descriptor that the supervisor ``held`` for us.

        A block device is opened O_EXCL: no mount, no swap, no other exclusive user. A file is locked with
        flock(2), which belongs to the open file description: passed on, it outlives this process.

        Raises:
            NotFound: There is no such disk.
            Conflict: Somebody else holds it, or it cannot be written.
        """
        if held is not None:
            fd = os.dup(held)
            if not _same_file(fd, path):
                os.close(fd)
                raise Conflict("the disk is another one than the supervisor holds", where=str(path))
            return cls(path, fd)
        try:
            mode = os.stat(path).st_mode
            exclusive = os.O_EXCL if stat.S_ISBLK(mode) else 0
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
        except FileNotFoundError as error:
            raise NotFound("there is no such disk", where=str(path)) from error
        except OSError as error:
            why = "somebody else uses it" if error.errno == errno.EBUSY else error.strerror or str(error)
            raise Conflict("cannot open the disk", where=str(path), why=why) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(path, fd)
        except BlockingIOError as error:
            os.close(fd)
            raise Conflict(
                "the disk is in use", where=str(path), why="another process has it locked"
            ) from error
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        if self.direct_fd >= 0:
            os.close(self.direct_fd)
        os.close(self.fd)

    def identity(self) -> DiskIdentity:
        """What tells the disk, in its state of now, from any other. Raises OSError."""
        return read_disk_fd(self.fd)

    def read_into(self, content: memoryview, offset: int) -> None:
        """Fill ``content`` from ``offset`` on. Raises OSError; EIO where the disk ends too early."""
        done = 0
        while done < len(content):
            step = os.preadv(self.fd, [content[done:]], offset + done)
            if step == 0:
                raise OSError(errno.EIO, "the disk became shorter", str(self.path))
            done += step

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, giving its space back where the disk can. Raises OSError."""
        if self.punches:
            if self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length):
                return
            self.punches = False
        if self._zeroes:
            if self._fallocate(_ZERO_RANGE | _KEEP_SIZE, offset, length):
                return
            self._zeroes = False
        at = offset
        while at < offset + length:
            part = memoryview(_ZEROS)[: offset + length - at]
            at += os.pwrite(self.fd, part, at)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        while _fallocate(self.fd, mode, offset, length):
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), str(self.path))
        return True

    def sync(self) -> None:
        """Make everything written durable. Raises OSError: it is not known what is."""
        os.fdatasync(self.fd)

    def extents(self, offset: int, length: int) -> list[codec.Extent]:
        """Which parts of a range are holes, by SEEK_DATA and SEEK_HOLE; all data where that is not known."""
        if self.is_block:
            return [codec.Extent(length, 0)]
        found: list[codec.Extent] = []
        at, end = offset, offset + length
        while at < end and len(found) < codec.EXTENTS_MAX:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    return [codec.Extent(length, 0)]
                data = end
            if data > at:
                found.append(codec.Extent(min(data, end) - at, codec.STATE_HOLE | codec.STATE_ZERO))
                at = min(data, end)
                continue
            hole = min(os.lseek(self.fd, at, os.SEEK_HOLE), end)
            found.append(codec.Extent(hole - at, 0))
            at = hole
        return found

    def testify_loss(self) -> bool:
        """Write, durably, on the disk itself that its journal was lost; True when that was possible.

        When the journal's own disk does not answer, this is the one place left that a power cut spares.
        """
        if self.is_block:
            return False  # after a power cut a block device is always compared
        try:
            os.setxattr(self.fd, _WITNESS, b"1")
            os.fsync(self.fd)
        except OSError:
            return False
        return True

    def testimony(self) -> bool:
        """Whether `testify_loss` was called and not withdrawn."""
        try:
            os.getxattr(self.fd, _WITNESS)
        except OSError:
            return False
        return True

    def withdraw_testimony(self) -> None:
        """The journal is sound again, or a full compare is due, durably, anyway."""
        with contextlib.suppress(OSError):
            os.removexattr(self.fd, _WITNESS)
            os.fsync(self.fd)


def _past_the_page_cache(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1


def _same_file(fd: int, path: Path) -> bool:
    try:
        one, two = os.fstat(fd), os.stat(path)
    except OSError:
        return False
    if stat.S_ISBLK(one.st_mode):
        return one.st_rdev == two.st_rdev
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)
