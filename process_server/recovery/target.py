"""Where a recovered volume is written: a new file, whole or not there at all, or a block device.

Every refusal comes before the first byte is written. A file is filled under a temporary name beside its own
and renamed when all of it is durable; what a crash leaves is called ``.NAME.….partial`` and can be removed.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Never

from farshore.errors import CapacityError, Conflict, Failed, FarshoreError, NotFound
from farshore.units import KIB, MIB, format_size

RESERVE_BYTES_MIN: Final = 128 * KIB
"""Ranges from here on are allocated before they are written. ext4 wrote 320 MB/s into a sparse file (delayed
allocation, page by page) and 2,500 MB/s into allocated ranges, both through the page cache."""
DIRECT_BYTES_MIN: Final = 64 * KIB
"""Writes from here on go past the page cache. Through it, copying into fresh pages cost 1.5 ns per byte, more
than all of decrypting, decompressing and hashing, and two writers of a file waited for each other."""
_STAGED_BYTES: Final = 2 * MIB
_PAGE_BYTES: Final = 4 * KIB
_ZERO_STEP_BYTES: Final = 128 * MIB
_ZEROS: Final = bytes(MIB)
_IOV_MAX: Final = 512

# linux/fs.h
_BLKROGET: Final = 0x125E
_BLKGETSIZE64: Final = 0x80081272
_BLKZEROOUT: Final = 0x127F
_BLKFLSBUF: Final = 0x1261
# linux/falloc.h
_FALLOC_FL_KEEP_SIZE: Final = 0x01
_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Output:
    """An open file or device that pieces of a volume are written to; used by one thread of one process.

    Workers open the same output by its path, each its own.
    """

    def __init__(self, path: str, *, device: bool) -> None:
        self.path, self.device = path, device
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._fd = os.open(path, flags)
        except OSError as exc:
            _raise_write(path, exc)
        try:
            self._direct_fd = os.open(path, flags | os.O_DIRECT)
        except OSError:
            self._direct_fd = -1  # a file system that has only its page cache
        self._staged = memoryview(mmap.mmap(-1, _STAGED_BYTES))  # on a page

    def reserve(self, start: int, end: int) -> None:
        """Allocate ``[start, end)`` of a file where that is possible; they read as zeros until written.

        Raises:
            CapacityError: The file system is full.
        """
        if self.device or end - start < RESERVE_BYTES_MIN:
            return
        if _libc.fallocate(self._fd, _FALLOC_FL_KEEP_SIZE, start, end - start) != 0:
            number = ctypes.get_errno()
            if number not in _CANNOT and number != errno.EINTR:
                _raise_write(self.path, OSError(number, os.strerror(number)))

    def write(self, at: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Write ``pieces`` one after another from byte ``at`` on. Raises CapacityError, Failed."""
        if at % _PAGE_BYTES or sum(map(len, pieces)) < DIRECT_BYTES_MIN:
            self._write_cached(at, pieces)
            return
        staged, filled = self._staged, 0
        for piece in pieces:
            taken = 0
            while taken < len(piece):
                size = min(len(piece) - taken, len(staged) - filled)
                staged[filled : filled + size] = memoryview(piece)[taken : taken + size]
                taken, filled = taken + size, filled + size
                if filled == len(staged):
                    self._write_staged(at, filled)
                    at, filled = at + filled, 0
        self._write_staged(at, filled)

    def _write_staged(self, at: int, length: int) -> None:
        """Write what is staged: whole pages past the page cache if that can be done, the rest through it."""
        done, whole = 0, length // _PAGE_BYTES * _PAGE_BYTES
        try:
            while self._direct_fd >= 0 and done < whole and done % _PAGE_BYTES == 0:
                done += os.pwrite(self._direct_fd, self._staged[done:whole], at + done)
        except OSError as exc:
            if exc.errno not in _CANNOT:
                _raise_write(self.path, exc)
            self._close_direct()
        if done < length:
            self._write_cached(at + done, [self._staged[done:length]])

    def _write_cached(self, at: int, pieces: Sequence[bytes | memoryview]) -> None:
        views: list[bytes | memoryview] = list(pieces)
        try:
            while views:
                done = os.pwritev(self._fd, views[:_IOV_MAX], at)
                at += done
                index = 0
                while index < len(views) and done >= len(views[index]):
                    done -= len(views[index])
                    index += 1
                del views[:index]
                if done:
                    views[0] = memoryview(views[0])[done:]
        except OSError as exc:
            _raise_write(self.path, exc)

    def zero(self, start: int, end: int) -> None:
        """Make ``[start, end)`` read as zeros on a device; a new file does so already.

        A discard is not used: what a device returns afterwards is up to the device. BLKZEROOUT is a promise
        of the kernel, which writes zeros itself where the device cannot.
        """
        while self.device and start < end:
            step = min(end - start, _ZERO_STEP_BYTES)
            try:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", start, step))
            except OSError as exc:
                if exc.errno not in _CANNOT:
                    _raise_write(self.path, exc)
                for at in range(start, start + step, MIB):
                    self.write(at, [memoryview(_ZEROS)[: min(MIB, start + step - at)]])
            start += step

    def read_into(self, at: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``at`` on; past the page cache when both lie on pages. Raises Failed."""
        try:
            while len(buffer):
                aligned = not (at % _PAGE_BYTES or len(buffer) % _PAGE_BYTES)
                try:
                    fd = self._direct_fd if aligned and self._direct_fd >= 0 else self._fd
                    done = os.preadv(fd, [buffer], at)
                except OSError as exc:
                    if fd == self._fd or exc.errno not in _CANNOT:
                        raise
                    self._close_direct()
                    continue
                if done == 0:
                    raise Failed("cannot read back what was written", where=self.path, why="it ends early")
                at, buffer = at + done, buffer[done:]
        except OSError as exc:
            raise Failed(
                "cannot read back what was written", where=self.path, why=exc.strerror or str(exc)
            ) from exc

    def sync(self) -> None:
        """Return when all that was written through any descriptor is durable."""
        try:
            os.fsync(self._fd)
        except OSError as exc:
            _raise_write(self.path, exc)

    def close(self) -> None:
        os.close(self._fd)
        self._close_direct()

    def _close_direct(self) -> None:
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
        self._direct_fd = -1


class FileTarget:
    """A file that appears under its name whole or not at all.

    Args:
        path: The final name.
        force: Replace a file of that name.

    Raises:
        Conflict: There is one and ``force`` was not given, or it is no regular file.
        NotFound: There is no such directory.
    """

    device = False

    def __init__(self, path: Path, *, force: bool) -> None:
        self.path, self._force = path, force
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            found = None
        except OSError as exc:
            _raise_write(str(path), exc)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise Conflict("cannot write the volume", where=str(path), why="it is not a regular file")
        if found is not None and not force:
            _raise_exists(path)
        if not path.parent.is_dir():
            raise NotFound(
                "cannot write the volume", where=str(path.parent), why="there is no such directory"
            )
        # 255 bytes is the longest name of a file on every file system we meet.
        stem = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")
        self.temporary = path.parent / f".{stem}.{secrets.token_hex(4)}.partial"

    def prepare(self, size_bytes: int) -> str:
        """Make the temporary file, ``size_bytes`` long and all hole; return its path."""
        try:
            fd = os.open(
                self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            try:
                os.ftruncate(fd, size_bytes)
            finally:
                os.close(fd)
        except OSError as exc:
            self.discard()
            _raise_write(str(self.path), exc)
        return str(self.temporary)

    def commit(self, made: Path | None = None) -> None:
        """Give the finished, synced file (``made``, or the temporary one) its name, durably."""
        source = made if made is not None else self.temporary
        try:
            if self._force:
                os.replace(source, self.path)
            else:
                _rename_new(source, self.path)
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except FileExistsError:
            _raise_exists(self.path)
        except OSError as exc:
            _raise_write(str(self.path), exc)

    def discard(self) -> None:
        """Remove what was written; the final name was never touched."""
        with suppress(OSError):
            os.unlink(self.temporary)

    def space_missing(self, needed_bytes: int) -> int:
        """Return by how many bytes the file system seems too small: a warning, for it may compress."""
        found = os.statvfs(self.path.parent)
        return max(0, needed_bytes - found.f_bavail * found.f_frsize)


class DeviceTarget:
    """A block device that nobody uses, held exclusively from the first check to the last byte.

    Args:
        path: The device.
        volume: Name of the volume to be written.
        confirm: What the operator typed; has to be that name.

    Raises:
        Conflict: Not confirmed, in use, read-only.
    """

    device = True

    def __init__(self, path: Path, *, volume: str, confirm: str | None) -> None:
        self.path = path
        if confirm != volume:
            raise Conflict(
                "will not overwrite a device",
                where=str(path),
                why="not confirmed" if confirm is None else f"--confirm says {confirm!r}, not {volume!r}",
                fix=f"everything on it will be lost; say --confirm {volume}",
            )
        number = os.stat(path).st_rdev
        if user := device_user(number):
            raise Conflict("will not overwrite a device", where=str(path), why=user)
        try:
            # O_EXCL on a block device: the kernel refuses what is mounted or held by another layer.
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno in (errno.EBUSY, errno.EROFS, errno.EACCES, errno.EPERM):
                why = "it is in use" if exc.errno == errno.EBUSY else exc.strerror
                raise Conflict("will not overwrite a device", where=str(path), why=why or str(exc)) from exc
            _raise_write(str(path), exc)
        try:
            self.size_bytes = struct.unpack("Q", fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8)))[0]
            if struct.unpack("i", fcntl.ioctl(self._fd, _BLKROGET, bytes(4)))[0]:
                raise Conflict("will not overwrite a device", where=str(path), why="it is read-only")
        except BaseException:
            os.close(self._fd)
            raise

    def prepare(self, size_bytes: int) -> str:
        """Return the path to write to. Raises Conflict when the device is too small."""
        if self.size_bytes < size_bytes:
            raise Conflict(
                "the device is too small",
                where=str(self.path),
                why=f"it has {self.size_bytes} bytes, the volume {size_bytes} ({format_size(size_bytes)})",
            )
        return str(self.path)

    def commit(self) -> None:
        """Let go of the device, all of it durable and its old contents out of the page cache."""
        try:
            os.fsync(self._fd)
            with suppress(OSError):
                fcntl.ioctl(self._fd, _BLKFLSBUF, 0)
        except OSError as exc:
            _raise_write(str(self.path), exc)
        finally:
            os.close(self._fd)

    def discard(self) -> None:
        """Let go of the device. What was written to it stays: there is nothing to go back to."""
        with suppress(OSError):
            os.close(self._fd)

    def space_missing(self, needed_bytes: int) -> int:
        """Return 0: a device has its size."""
        return 0


def open_target(path: Path, *, volume: str, force: bool, confirm: str | None) -> FileTarget | DeviceTarget:
    """Return the target that ``path`` is. Raises as the two classes do."""
    try:
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        is_device = False
    if is_device:
        return DeviceTarget(Path(os.path.realpath(path)), volume=volume, confirm=confirm)
    return FileTarget(path, force=force)


def device_user(number: int, *, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> str | None:
    """Return who uses the block device ``number`` or a partition of it, in words; None when nobody does."""
    family = _family(number, sys)
    with suppress(OSError):
        for line in (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines():
            fields = line.split(" ")
            if len(fields) > 4 and fields[2] in family:
                return f"it is mounted on {fields[4]}"
    with suppress(OSError):
        for line in (proc / "swaps").read_text(errors="surrogateescape").splitlines()[1:]:
            name = line.split()[0]
            with suppress(OSError):
                if _number_text(os.stat(name).st_rdev) in family:
                    return f"{name} is swapped to"
    for member in family:
        with suppress(OSError):
            for holder in sorted(os.listdir(sys / "dev/block" / member / "holders")):
                return f"{holder} holds it"
    return None


def _family(number: int, sys: Path) -> set[str]:
    family = {_number_text(number)}
    block = sys / "dev/block" / _number_text(number)
    with suppress(OSError):
        for entry in os.listdir(block):
            with suppress(OSError):
                if (block / entry / "partition").exists():
                    family.add((block / entry / "dev").read_text().strip())
    return family


def _number_text(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _rename_new(source: Path, target: Path) -> None:
    """Rename, but never over something. Raises FileExistsError."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without links (vfat): the window between look and rename is all it offers.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from exc
        os.rename(source, target)
        return
    os.unlink(source)


def _raise_exists(path: Path) -> Never:
    raise Conflict(
        "will not overwrite a file", where=str(path), why="it exists", fix="say --force to replace it"
    ) from None


def _raise_write(where: str, exc: OSError) -> Never:
    error: type[FarshoreError] = CapacityError if exc.errno in _FULL else Failed
    fix = "free space there, or write somewhere else" if error is CapacityError else ""
    raise error("cannot write the volume", where=where, why=exc.strerror or str(exc), fix=fix) from exc
