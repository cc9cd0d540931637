"""The files of a journal directory: names, allocation, recycling.

A segment's file is allocated, and named, before it is needed: what remains for the thread that captures
writes is to write into it. Files are recycled because writing over pages that exist costs an eighth of
allocating them; their old bytes are expected and never count.
"""

import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from farshore.failpoints import failpoint
from farshore.hrl.segment import SEGMENT_HEADER_BYTES

PAGE_BYTES: Final = 4096
"""Granule of the page cache: the start of a page may only be written together with its end, or a page of a
recycled file that is not cached is first read from the disk."""

START_BYTES: Final = SEGMENT_HEADER_BYTES + PAGE_BYTES
"""A segment begins with its header and a page of zeros, so that its end is told from stale bytes at once."""

POOL_FILES_MAX: Final = 4
"""Free files kept for recycling; at 64 MiB a segment that is a second of sequential writing."""

BAD_FILES_MAX: Final = 8
"""Damaged segments kept for people; a disk that damages one a day must not fill up with them."""

_SEGMENT: Final = re.compile(r"seg-([0-9]{20})\.hrl")
_FREE: Final = re.compile(r"free-([0-9]{20})\.hrl")
_BAD: Final = re.compile(r"bad-([0-9]{20})[-.].*")
_NUMBERED: Final = re.compile(r"(?:seg|free|bad)-([0-9]{20})[-.].*")
_ZEROS: Final = bytes(START_BYTES)


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"seg-{number:020}.hrl"


def free_path(directory: Path, number: int) -> Path:
    return directory / f"free-{number:020}.hrl"


def segment_number(path: Path) -> int | None:
    """The number in a segment's file name; None when it is not one."""
    match = _SEGMENT.fullmatch(path.name)
    return int(match[1]) if match else None


def list_segments(directory: Path) -> list[tuple[int, Path]]:
    """Return number and path of all that is named like a segment, in order; none without a folder."""
    return _listed(directory, _SEGMENT)


def list_free(directory: Path) -> list[tuple[int, Path]]:
    return _listed(directory, _FREE)


def highest_number(directory: Path) -> int:
    """The highest number that any file of the journal ever got and still has, 0 when there is none."""
    return max((number for number, _ in _listed(directory, _NUMBERED)), default=0)


def _listed(directory: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    matches = (pattern.fullmatch(name) for name in names)
    return sorted((int(match[1]), directory / match[0]) for match in matches if match)


def open_segment(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a segment; the caller owns the descriptor.

    Raises:
        OSError: It cannot be opened; ELOOP for a symbolic link, EINVAL for anything but a file: whoever may
            write into the directory must not make us read, or wait for, something else.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocate(directory: Path, number: int, segment_bytes: int, start: bytes = _ZEROS) -> int:
    """Make segment ``number``, durable with its name, out of a free file or a new one.

    Args:
        start: The file's first ``START_BYTES``; zeros mean a segment that has not begun.

    Returns:
        Its descriptor, open for writing; the caller owns it.

    Raises:
        OSError: ENOSPC and the like; no segment of that name was made.
    """
    assert len(start) == START_BYTES
    free = list_free(directory)
    spare = free[0][1] if free else free_path(directory, number)
    fd = os.open(spare, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _give_blocks(fd, segment_bytes)
        failpoint("journal.allocate.blocks_given")
        # Before the name: a recycled file never shows under a new name with the header of its former life.
        pwrite_all(fd, [start], 0)
        os.fsync(fd)
        failpoint("journal.allocate.file_synced")
        os.rename(spare, segment_path(directory, number))
        failpoint("journal.allocate.renamed")
        sync_directory(directory)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            spare.unlink()  # half allocated, it would be taken for a spare file again and again
        raise
    failpoint("journal.allocate.done")
    return fd


def _give_blocks(fd: int, size: int) -> None:
    status = os.fstat(fd)
    if status.st_size > size:
        os.ftruncate(fd, size)
    if status.st_size < size or status.st_blocks * 512 < size:
        os.posix_fallocate(fd, 0, size)


def release(directory: Path, path: Path, *, keep: bool) -> None:
    """Take a segment out of the log, durably, before anything of it may be overwritten.

    Args:
        keep: Keep the file for recycling; otherwise it is removed. A file with a second name (a copy by
            hard link) is always removed: recycling it would change what the other name shows.
    """
    number = segment_number(path)
    assert number is not None
    if keep and os.stat(path, follow_symlinks=False).st_nlink == 1:
        os.rename(path, free_path(directory, number))
        failpoint("journal.release.renamed")
    else:
        path.unlink()
        failpoint("journal.release.unlinked")
    sync_directory(directory)


def quarantine(directory: Path, path: Path, reason: str) -> Path:
    """Rename a file that must not count, and must not be lost either, to ``bad-…``; return the new path.

    Of more than `BAD_FILES_MAX` such files the oldest go.
    """
    number = segment_number(path) or 0
    words = re.sub(r"[^a-z0-9]+", "-", reason.lower()).strip("-")[:80]
    target = directory / f"bad-{number:020}-{words}.hrl"
    copy = 1
    while target.exists():
        copy += 1
        target = directory / f"bad-{number:020}-{words}-{copy}.hrl"
    os.rename(path, target)
    failpoint("journal.quarantine.renamed")
    for _, old in _listed(directory, _BAD)[:-BAD_FILES_MAX]:
        old.unlink()
    sync_directory(directory)
    return target


def trim_pool(directory: Path, files_max: int) -> None:
    """Remove free files beyond ``files_max``."""
    for _, path in list_free(directory)[max(files_max, 0) :]:
        path.unlink()


def pwrite_all(fd: int, buffers: list[bytes | bytearray | memoryview], at: int) -> None:
    """Write all of ``buffers`` at ``at``, going on after short writes.

    Raises:
        OSError: Part of it may have been written. A write of nothing counts as ENOSPC.
    """
    total = sum(map(len, buffers))
    written = os.pwritev(fd, buffers, at)
    if written == total:
        return
    rest = memoryview(b"".join(buffers))
    while written < total:
        step = os.pwrite(fd, rest[written:], at + written)
        if step == 0:
            raise OSError(errno.ENOSPC, "nothing could be written")
        written += step


def is_out_of_space(error: OSError) -> bool:
    """Tell whether the file system, rather than the disk, refused: freeing something mends it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
