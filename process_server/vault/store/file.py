"""A vault in a directory of this host: one file per object, durable before anybody is told.

obstore's local store never fsyncs and has no compare-and-swap; hence our own. What an fsync has refused once
is never asked again (the kernel forgets the error and calls the pages clean): the store then refuses every
write until it is opened again.
"""

import ctypes
import ctypes.util
import errno
import fcntl
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Never

import numpy as np
from blake3 import blake3

from farshore.errors import (
    CapacityError,
    ConfigError,
    Conflict,
    Failed,
    FarshoreError,
    IntegrityError,
    NotFound,
    Unreachable,
)
from farshore.failpoints import failpoint
from farshore.units import MIB
from process_server.vault.store.protocol import (
    AlreadyExists,
    Body,
    Buffer,
    Precondition,
    buffers_of,
    check_name,
    is_name,
)

DIRECT_BYTES_MIN: Final = MIB
"""From here on direct I/O pays: with buffered writes the whole ingest ran at 0.80 of the speed, since copying
and flushing the pages cost the server 3 s of system time in 10 s."""
LOCK_WAIT_S: Final = 30.0
_BLOCK: Final = mmap.PAGESIZE
_TEMPORARY: Final = ".tmp"
_IOV_MAX: Final = 512

# statfs(2) magics of file systems whose link, flock or fsync another host can contradict.
_NETWORK: Final = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x01021997: "9P",
    0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre",
    0x19830326: "BeeGFS",
    0x47504653: "GPFS",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x73757245: "Coda",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
}
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK})
_NO_DIRECT: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS})

_libc: Final = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)


class FileStore:
    """Objects below one directory (docs/formats/vault.md, "The file store").

    Args:
        path: The directory.
        owner: Hold ``.owner`` locked until `close`, clear what a crash left, make durable what can be seen.
        create: Make the directory when there is none.

    Raises:
        NotFound, ConfigError, Conflict: As `open_store` says.
    """

    def __init__(self, path: Path, *, owner: bool = False, create: bool = False) -> None:
        self._root = os.path.abspath(path)
        self._poisoned: str | None = None
        self._durable = {self._root}
        self._owner_fd: int | None = None
        try:
            if create:
                _make_directories(path)
            if not path.is_dir():
                why = "it is not a directory" if path.exists() else "there is no such directory"
                raise NotFound("cannot open the vault", where=self._root, why=why)
            _refuse_network(self._root)
            if owner:
                self._own()
        except OSError as exc:
            raise ConfigError(
                "cannot open the vault", where=self._root, why=exc.strerror or str(exc)
            ) from exc

    def put_new(self, name: str, body: Body) -> None:
        target = self._file(name)
        self._refuse_poisoned(name)
        temporary = self._write_temporary(name, body)
        try:
            self._prepare_directory(name, os.path.dirname(target))
            failpoint("vault.file.before_link")
            self._link(name, temporary, target)
            failpoint("vault.file.after_link")
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        # One sync for the new name; the temporary's removal need not be durable.
        self._sync_directory(name, os.path.dirname(target))

    def get(self, name: str) -> bytes:
        fd = self._open(name)
        try:
            return _read_all(fd)
        except OSError as exc:
            _raise_read(name, exc)
        finally:
            os.close(fd)

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        body = self.get(name)
        return body, _etag(body)

    def get_range(self, name: str, at: int, length: int) -> bytes:
        if at < 0 or length < 0:
            raise ValueError(f"no range: {length} bytes at {at}")
        fd = self._open(name)
        try:
            # Never more than there is: a length comes from a table that may be damaged.
            length = max(0, min(length, os.fstat(fd).st_size - at))
            first = os.pread(fd, length, at)
            if len(first) == length:
                return first
            return first + _read_exactly(fd, length - len(first), at + len(first))
        except OSError as exc:
            _raise_read(name, exc)
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        fd = self._open(name)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def modified_s(self, name: str) -> float:
        fd = self._open(name)
        try:
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)

    def list(self, prefix: str) -> Iterator[str]:
        folder = prefix.rpartition("/")[0]
        if folder and not is_name(folder):
            return
        waiting = [folder]
        while waiting:
            below = waiting.pop()
            try:
                entries = list(os.scandir(os.path.join(self._root, below)))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as exc:
                _raise_read(below or ".", exc)
            for entry in entries:
                name = f"{below}/{entry.name}" if below else entry.name
                if not is_name(name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if name.startswith(prefix) or prefix.startswith(f"{name}/"):
                        waiting.append(name)
                elif name.startswith(prefix) and entry.is_file(follow_symlinks=False):
                    yield name

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        target = self._file(name)
        self._refuse_poisoned(name)
        pieces = buffers_of(body)
        lock = self._lock(name)
        try:
            try:
                found: str | None = _etag(self.get(name))
            except NotFound:
                found = None
            if found != expected:
                raise Precondition("cannot replace the object", where=name, why="it has changed")
            temporary = self._write_temporary(name, pieces)
            try:
                self._prepare_directory(name, os.path.dirname(target))
                failpoint("vault.file.before_rename")
                os.rename(temporary, target)
            except OSError as exc:
                _raise_write(name, exc)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
            failpoint("vault.file.after_rename")
            self._sync_directory(name, os.path.dirname(target))
        finally:
            os.close(lock)
        return _etag(b"".join(pieces))

    def delete(self, name: str) -> None:
        try:
            os.unlink(self._file(name))
        except FileNotFoundError:
            pass
        except OSError as exc:
            _raise_write(name, exc)

    def close(self) -> None:
        if self._owner_fd is not None:
            os.close(self._owner_fd)
            self._owner_fd = None

    def _own(self) -> None:
        fd = os.open(os.path.join(self._root, ".owner"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise Conflict(
                "cannot open the vault",
                where=self._root,
                why="another server has it open",
                fix="a vault in a directory has one server; stop the other one first",
            ) from exc
        self._owner_fd = fd
        try:
            with suppress(FileNotFoundError):
                for entry in os.scandir(os.path.join(self._root, _TEMPORARY)):
                    os.unlink(entry.path)
            # What a killed predecessor linked and had not synced is visible, and will be taken for vaulted.
            if _libc.syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        except BaseException:
            self.close()
            raise

    def _file(self, name: str) -> str:
        return f"{self._root}/{check_name(name)}"

    def _open(self, name: str) -> int:
        try:
            fd = os.open(self._file(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound("no such object", where=name) from None
        except OSError as exc:
            _raise_read(name, exc)
        return fd

    def _lock(self, name: str) -> int:
        """Return a descriptor that holds the lock of all compare-and-swaps; closing it ends that."""
        try:
            fd = os.open(f"{self._root}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            _raise_write(name, exc)
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.005)
                    continue
                os.close(fd)
                raise Unreachable(
                    "cannot replace the object", where=name, why=f".lock was held for {LOCK_WAIT_S:.0f} s"
                ) from None
            return fd

    def _write_temporary(self, name: str, body: Body) -> str:
        """Return the path of a new, synced file with ``body``; nothing is left of it after an error."""
        temporary = f"{self._root}/{_TEMPORARY}/{secrets.token_hex(16)}"
        pieces = buffers_of(body)
        try:
            fd = self._create_temporary(temporary)
        except OSError as exc:
            _raise_write(name, exc)
        try:
            try:
                at = _write_direct(fd, pieces[0]) if len(pieces) == 1 else 0
                _write_rest(fd, pieces, at)
            except OSError as exc:
                _raise_write(name, exc)
            failpoint("vault.file.before_sync")
            self._sync(name, fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        return temporary

    def _create_temporary(self, temporary: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(temporary, flags, 0o600)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(temporary), 0o700)
            return os.open(temporary, flags, 0o600)

    def _prepare_directory(self, name: str, directory: str) -> None:
        """Make ``directory`` there and durable. Once per process also when it is there: its maker may be
        another process of this server that has not come to syncing it."""
        if directory in self._durable:
            return
        try:
            _make_directories(Path(directory))
        except OSError as exc:
            _raise_write(name, exc)
        above = directory
        while above != self._root:
            above = os.path.dirname(above)
            self._sync_directory(name, above)
        self._durable.add(directory)

    def _link(self, name: str, temporary: str, target: str) -> None:
        try:
            os.link(temporary, target, follow_symlinks=False)
        except FileExistsError:
            # Whoever made it may still be syncing; what we report as existing is relied on by our caller.
            self._sync_directory(name, os.path.dirname(target))
            raise AlreadyExists("cannot create the object", where=name, why="it exists") from None
        except OSError as exc:
            _raise_write(name, exc)

    def _sync(self, name: str, fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError as exc:
            self._poison(name, exc)

    def _sync_directory(self, name: str, directory: str) -> None:
        try:
            _sync_directory(directory)
        except OSError as exc:
            self._poison(name, exc)

    def _poison(self, name: str, exc: OSError) -> Never:
        if exc.errno in _FULL:  # delayed allocation: found out late, and nothing is linked yet
            _raise_write(name, exc)
        self._poisoned = f"fsync of {name} failed: {exc.strerror or exc}"
        self._refuse_poisoned(name)
        raise AssertionError("unreachable")

    def _refuse_poisoned(self, name: str) -> None:
        if self._poisoned is not None:
            raise Failed(
                "cannot write the object",
                where=name,
                why=self._poisoned,
                fix="look at the disk's own log; the server has to be started again after that",
            )


def _write_direct(fd: int, piece: Buffer) -> int:
    """Write the whole pages of ``piece`` past the page cache, where that is possible; return how much."""
    length = len(piece) // _BLOCK * _BLOCK
    if length < DIRECT_BYTES_MIN or np.frombuffer(piece, np.uint8).ctypes.data % _BLOCK:
        return 0
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return 0
    at = 0
    try:
        with memoryview(piece) as view:
            while at < length:
                with view[at:length] as rest:
                    at += os.pwrite(fd, rest, at)
                if at % _BLOCK:  # a short write in the middle of a page: the rest goes the other way
                    break
    except OSError as exc:
        if exc.errno not in _NO_DIRECT:
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return at


def _write_rest(fd: int, pieces: list[Buffer], at: int) -> None:
    """Write the bytes of ``pieces`` from byte ``at`` on, at that place."""
    skip, views = at, []
    for piece in pieces:
        view = memoryview(piece).cast("B") if not isinstance(piece, bytes) else memoryview(piece)
        if skip < len(view):
            views.append(view[skip:])
        skip = max(0, skip - len(view))
    while views:
        written = os.pwritev(fd, views[:_IOV_MAX], at)
        at += written
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


def _read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    body = os.pread(fd, size, 0)
    return body if len(body) == size else body + _read_exactly(fd, size - len(body), len(body))


def _read_exactly(fd: int, length: int, at: int) -> bytes:
    pieces = []
    while length > 0 and (piece := os.pread(fd, length, at)):
        pieces.append(piece)
        at, length = at + len(piece), length - len(piece)
    return b"".join(pieces)


def _etag(body: bytes) -> str:
    return blake3(body).hexdigest(length=16)


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directories(path: Path) -> None:
    """Make ``path`` and what is missing above it, each durable."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for new in reversed(missing):
        with suppress(FileExistsError):
            new.mkdir(mode=0o700)
        _sync_directory(os.fspath(new.parent))


def _refuse_network(path: str) -> None:
    """Raise ConfigError for a file system that other hosts write too: our locks would hold nobody off."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # The first field, as wide as a long except on s390x, whose int is all that a magic needs anyway.
    magic = ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF
    if kind := _NETWORK.get(magic):
        raise ConfigError(
            "cannot keep a vault here",
            where=path,
            why=f"it is on {kind}, a network file system",
            fix="use a local disk, or a store made for several hosts",
        )


def _raise_read(name: str, exc: OSError) -> Never:
    if exc.errno in (errno.EIO, errno.EUCLEAN, errno.EBADMSG):
        raise IntegrityError("cannot read the object", where=name, why=exc.strerror or str(exc)) from exc
    raise Failed("cannot read the object", where=name, why=exc.strerror or str(exc)) from exc


def _raise_write(name: str, exc: OSError) -> Never:
    error: type[FarshoreError] = CapacityError if exc.errno in _FULL else Failed
    fix = "free space on the vault's file system" if error is CapacityError else ""
    raise error("cannot write the object", where=name, why=exc.strerror or str(exc), fix=fix) from exc
