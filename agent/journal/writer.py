"""The log of one volume, being written.

Two threads at most: one appends and rotates, one makes durable and prepares the next segment's file. The
appending thread waits for neither: it writes into files that exist, and fdatasync runs outside the lock.
"""

import contextlib
import fcntl
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.journal import segments
from agent.journal.errors import JournalFailed, JournalFull
from agent.journal.recovery import Recovered, Segment
from agent.journal.segments import PAGE_BYTES, POOL_FILES_MAX, START_BYTES
from farshore.clock import Clock
from farshore.errors import Conflict
from farshore.failpoints import failpoint
from farshore.hrl.batch import CLEAN, HEAD, SEAL, encode_head, first_digest, incarnation_key, padded
from farshore.hrl.segment import NO_INCARNATION, SEGMENT_HEADER_BYTES, Incarnation, SegmentHeader
from farshore.ids import new_id
from farshore.units import MIB

SEGMENT_SECONDS: Final = 600.0
"""A segment is ended after this time, so that a volume with little churn frees space too."""
SEGMENT_BYTES_MIN: Final = 16 * PAGE_BYTES
_END_ROOM: Final = 3 * PAGE_BYTES
"""Kept free in a segment for the zeros behind a batch and for the SEAL with its own."""
_ZEROS: Final = bytes(2 * PAGE_BYTES)
_COPY_BYTES: Final = MIB


@dataclass(slots=True)
class _Open:
    """A segment with a descriptor: the one that is written, or one just ended and not yet synced."""

    fd: int
    number: int
    path: Path
    first_lsn: int
    begun_at: float
    position: int = START_BYTES - PAGE_BYTES
    unsynced: bool = False
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class _Ended:
    """A segment that is written no more."""

    path: Path
    last_lsn: int
    log_bytes: int
    file_bytes: int


class JournalWriter:
    """One incarnation of a volume's log.

    Attributes:
        incarnation: This opening of the log.
    """

    def __init__(
        self,
        directory: Path,
        lock_fd: int,
        template: SegmentHeader,
        first: _Open,
        ended: deque[_Ended],
        segment_bytes: int,
        quota_bytes: int,
        segment_seconds: float,
        clock: Clock,
    ) -> None:
        """Use `open`."""
        self.incarnation: Final = template.incarnation
        self._directory, self._lock_fd, self._template = directory, lock_fd, template
        self._segment_bytes, self._quota_bytes = segment_bytes, quota_bytes
        self._segment_seconds, self._clock = segment_seconds, clock
        self._chain = template.chain()
        self._next_lsn = template.first_lsn
        self._appended_lsn = self._durable_lsn = template.first_lsn - 1
        self._segment = first
        self._prepared: tuple[int, int] | None = None  # number, descriptor
        self._rotated: list[_Open] = []  # not synced since they were ended
        self._ended = ended
        self._failure: str | None = None
        self._closed = False
        # Taken for a few assignments only, by any thread; never while a file is touched.
        self._state = threading.Lock()
        # Held while names change or files are allocated: prepare, free, a rotation that was not prepared.
        self._files = threading.Lock()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        machine: bytes,
        volume: bytes,
        volume_bytes: int,
        sector_bytes: int,
        segment_bytes: int,
        quota_bytes: int,
        recovered: Recovered,
        clock: Clock,
        above_lsn: int = 0,
        above_ordinal: int = 0,
        segment_seconds: float = SEGMENT_SECONDS,
    ) -> "JournalWriter":
        """Open a new incarnation behind what was recovered, and make it durable.

        What recovery found is made true first: the end of the log that only the page cache may hold is
        written again, what a power cut left behind it goes, damaged files are renamed and kept. Killed at any
        step, it can be repeated with a new `recover`. When ``recovered.corrupt`` is set, `RESYNC_REQUIRED` is
        made durable in the mark before this is called: a later `recover` need not see the damage again.
        Before the first append, a mark is written that names the new incarnation.

        Args:
            directory: Made if it does not exist.
            segment_bytes: Size of a segment's file, a multiple of 4 KiB.
            quota_bytes: All segments' files together; at least two segments.
            recovered: Of this directory, with nothing written to it since.
            above_lsn: The first LSN is also above this one.
            above_ordinal: The ordinal is also above this one.
            segment_seconds: A segment is ended after this time too.

        Raises:
            Conflict: Another writer has the journal open.
            JournalFull: No room for the first segment; tried again later it can succeed.
            JournalFailed: The disk refused.
        """
        if segment_bytes % PAGE_BYTES or segment_bytes < SEGMENT_BYTES_MIN:
            raise ValueError(f"segment_bytes {segment_bytes} is no multiple of 4 KiB from 64 KiB up")
        if quota_bytes < 2 * segment_bytes:
            raise ValueError(f"a quota of {quota_bytes} bytes does not hold two segments")
        lock_fd = -1
        try:
            if not directory.exists():
                directory.mkdir(parents=True, mode=0o700)
                segments.sync_directory(directory.parent)
            lock_fd = _lock(directory)
            ended = _settle(recovered)
            number = segments.highest_number(directory) + 1
            first_lsn = max(recovered.last_lsn, recovered.floor_lsn, above_lsn) + 1
            previous = recovered.incarnation.id if recovered.incarnation else NO_INCARNATION
            incarnation = Incarnation(
                id=new_id(),
                ordinal=max(recovered.ordinal, above_ordinal) + 1,
                previous=previous,
                previous_last_lsn=recovered.last_lsn,
                previous_digest=recovered.digest,
            )
            key = incarnation_key(machine, volume, incarnation.id)
            digest = first_digest(key, previous, recovered.last_lsn, recovered.digest)
            header = SegmentHeader(
                machine,
                volume,
                incarnation,
                number,
                first_lsn,
                digest,
                sector_bytes,
                clock.wall_ns(),
                volume_bytes,
            )
            if sum(segment.file_bytes for segment in ended) + segment_bytes > quota_bytes:
                raise _full(directory, f"the quota of {quota_bytes} bytes is used up")
            fd = segments.allocate(directory, number, segment_bytes, header.encode() + _ZEROS[:PAGE_BYTES])
        except OSError as error:
            _close(lock_fd)
            if segments.is_out_of_space(error):
                raise _full(directory, str(error)) from error
            raise _failed(directory, f"cannot open: {error}") from error
        except BaseException:
            _close(lock_fd)
            raise
        failpoint("journal.open.begun")
        path = segments.segment_path(directory, number)
        first = _Open(fd, number, path, first_lsn, clock.monotonic())
        return cls(
            directory, lock_fd, header, first, ended, segment_bytes, quota_bytes, segment_seconds, clock
        )

    @property
    def next_lsn(self) -> int:
        """LSN of the next record."""
        return self._next_lsn

    @property
    def digest(self) -> bytes:
        """Running digest of all that was appended."""
        return self._chain.value

    @property
    def appended_lsn(self) -> int:
        """Last LSN whose write(2) has returned."""
        return self._appended_lsn

    @property
    def durable_lsn(self) -> int:
        """Last LSN that `sync` has made durable."""
        return self._durable_lsn

    @property
    def backlog_bytes(self) -> int:
        """Bytes of log that were not freed yet."""
        with self._state:
            return sum(segment.log_bytes for segment in self._ended) + self._segment.position

    @property
    def failed(self) -> str | None:
        """Why the journal is not used any more; None while it is."""
        return self._failure

    def append(
        self, time_ns: int, count: int, table: bytes, payload: bytes | bytearray | memoryview, flags: int = 0
    ) -> int:
        """Append one batch; one write(2) unless a segment ends. Appending thread only.

        Args:
            time_ns: Capture time.
            count: Records, at least 1.
            table: Their rows (`farshore.hrl.batch.RECORD`).
            payload: Their payloads, in order; the caller's again when this returns.
            flags: None are defined for a batch with records.

        Returns:
            LSN of the last record. It is durable when `durable_lsn` has reached it.

        Raises:
            JournalFull: Quota or file system are full. Nothing counts as written; the writer can go on.
            JournalFailed: The disk refused. The journal is not used again.
        """
        self._check()
        payload = payload if isinstance(payload, bytes) else memoryview(payload)
        size = padded(HEAD.size + len(table) + len(payload))
        segment = self._segment
        if segment.sealed or (
            segment.position > SEGMENT_HEADER_BYTES
            and (
                segment.position + size + _END_ROOM > self._segment_bytes
                or self._clock.monotonic() - segment.begun_at >= self._segment_seconds
            )
        ):
            segment = self._rotate()
        self._write(segment, time_ns, count, table, payload, flags)
        last = self._next_lsn + count - 1
        with self._state:
            segment.position += size
            segment.unsynced = True
            self._next_lsn = last + 1
            self._appended_lsn = last
        failpoint("journal.append.written")
        return last

    def sync(self) -> int:
        """Make everything appended before the call durable; return its last LSN. Syncing thread only.

        Raises:
            JournalFailed: It is not known what is durable. Never retried: the journal is not used again.
        """
        self._check()
        with self._state:
            target = self._appended_lsn
            rotated, self._rotated = self._rotated, []
            segment = self._segment
            dirty = [*rotated, segment] if segment.unsynced else rotated
            segment.unsynced = False
        try:
            for one in dirty:
                failpoint("journal.sync.before")
                os.fdatasync(one.fd)
        except OSError as error:
            raise self._poison("cannot be made durable", error) from error
        failpoint("journal.sync.after")
        for one in rotated:
            os.close(one.fd)
        with self._state:
            # Appending cannot have failed meanwhile in a way that matters: these bytes are on the disk.
            self._durable_lsn = max(self._durable_lsn, target)
        return target

    def prepare(self) -> bool:
        """Allocate the next segment's file ahead of its use; call it after `sync`, from the syncing thread.

        Returns:
            False when quota or file system have no room for it now.

        Raises:
            JournalFailed: The disk refused.
        """
        self._check()
        if self._prepared is not None:
            return True
        with self._files:
            return self._prepare()

    def free(self, vaulted_lsn: int, stable_lsn: int) -> int:
        """Recycle the segments whose last record is at or below both marks. Any thread.

        The segment that ends with the last vaulted record itself stays until a later one is vaulted: the
        server holds the digest before its SEAL, and only the SEAL leads from there to the next segment.

        Args:
            vaulted_lsn: Everything up to here is in the vault.
            stable_lsn: The stable mark, which must already be durable in the `mark` file.

        Returns:
            Bytes of log that were freed.

        Raises:
            JournalFailed: The disk refused.
        """
        self._check()
        freed = 0
        limit = min(vaulted_lsn - 1, stable_lsn)
        with self._files:
            while True:
                with self._state:
                    if not self._ended or self._ended[0].last_lsn > min(limit, self._durable_lsn):
                        return freed
                    if any(one.path == self._ended[0].path for one in self._rotated):
                        return freed  # its SEAL is not durable; sync is about to do it
                    segment = self._ended[0]
                    used = self._used_bytes()
                try:
                    pool = len(segments.list_free(self._directory))
                    keep = (
                        segment.file_bytes == self._segment_bytes
                        and pool < POOL_FILES_MAX
                        and used + pool * self._segment_bytes <= self._quota_bytes
                    )
                    segments.release(self._directory, segment.path, keep=keep)
                except FileNotFoundError:
                    pass  # somebody removed it; it is gone all the same
                except OSError as error:
                    raise self._poison("cannot free a segment", error) from error
                with self._state:
                    self._ended.popleft()
                freed += segment.log_bytes

    def seal(self, clean: bool) -> None:
        """End the log and make it durable: nothing can be appended after this. Appending thread only.

        Args:
            clean: The stop is orderly.

        Raises:
            JournalFailed: The disk refused.
        """
        self._check()
        if not self._segment.sealed:
            try:
                self._seal(CLEAN if clean else 0)
            except JournalFull as error:
                raise self._poison("cannot be sealed", error) from error
        failpoint("journal.seal.written")
        self.sync()
        self._closed = True

    def close(self) -> None:
        """Give back descriptors and the lock; does not sync. Idempotent, and never raises for the disk."""
        self._closed = True
        with self._files, self._state:
            prepared = [self._prepared[1]] if self._prepared else []
            for fd in (*(one.fd for one in self._rotated), self._segment.fd, *prepared, self._lock_fd):
                _close(fd)
            self._rotated, self._prepared, self._lock_fd, self._segment.fd = [], None, -1, -1

    def _write(
        self,
        segment: _Open,
        time_ns: int,
        count: int,
        table: bytes,
        payload: bytes | memoryview,
        flags: int,
    ) -> int:
        """Write one batch at the segment's end; return its padded size. If it raises, nothing has changed."""
        before = self._chain.value
        head = encode_head(self._chain, self._next_lsn, time_ns, count, table, payload, flags)
        size = HEAD.size + len(table) + len(payload)
        end = segment.position + padded(size)
        # To the end of the last page, at least 8 bytes: the next batch overwrites them.
        zeros = _ZEROS[: (end // PAGE_BYTES + 1) * PAGE_BYTES - segment.position - size]
        try:
            segments.pwrite_all(segment.fd, [head, table, payload, zeros], segment.position)
        except OSError as error:
            self._chain.value = before
            if segments.is_out_of_space(error):
                raise _full(self._directory, str(error)) from error
            raise self._poison("cannot be written", error) from error
        except BaseException:
            self._chain.value = before
            raise
        return padded(size)

    def _seal(self, flags: int) -> None:
        segment = self._segment
        size = self._write(segment, self._clock.wall_ns(), 0, b"", b"", SEAL | flags)
        with self._state:
            segment.position += size
            segment.unsynced = segment.sealed = True

    def _rotate(self) -> _Open:
        """End the segment and begin the next one."""
        if self._prepared is None:
            with self._files:
                if not self._prepare():
                    raise _full(self._directory, f"the quota of {self._quota_bytes} bytes is used up")
        assert self._prepared is not None
        number, fd = self._prepared
        old = self._segment
        if not old.sealed:
            self._seal(0)
        failpoint("journal.rotate.sealed")
        template = self._template
        header = SegmentHeader(
            template.machine,
            template.volume,
            template.incarnation,
            number,
            self._next_lsn,
            self._chain.value,
            template.sector_bytes,
            self._clock.wall_ns(),
            template.volume_bytes,
        )
        try:
            segments.pwrite_all(fd, [header.encode()], 0)
        except OSError as error:
            raise self._poison("cannot be written", error) from error
        failpoint("journal.rotate.begun")
        path = segments.segment_path(self._directory, number)
        new = _Open(fd, number, path, self._next_lsn, self._clock.monotonic(), unsynced=True)
        with self._state:
            self._segment, self._prepared = new, None
            if old.unsynced:
                self._rotated.append(old)
            size = max(self._segment_bytes, old.position)
            self._ended.append(_Ended(old.path, self._next_lsn - 1, old.position, size))
        return new

    def _prepare(self) -> bool:
        with self._state:
            if self._prepared is not None:
                return True
            number = self._segment.number + 1
            used = self._used_bytes()
        if used + self._segment_bytes > self._quota_bytes:
            return False
        try:
            segments.trim_pool(
                self._directory,
                min(POOL_FILES_MAX, (self._quota_bytes - used) // self._segment_bytes),
            )
            fd = segments.allocate(self._directory, number, self._segment_bytes)
        except OSError as error:
            if segments.is_out_of_space(error):
                return False
            raise self._poison("cannot allocate a segment", error) from error
        with self._state:
            self._prepared = number, fd
        return True

    def _used_bytes(self) -> int:
        """Bytes of files that hold log, or are about to; without the pool, which gives way."""
        current = max(self._segment.position, self._segment_bytes)
        prepared = self._segment_bytes if self._prepared else 0
        return sum(segment.file_bytes for segment in self._ended) + current + prepared

    def _check(self) -> None:
        if self._failure:
            raise _failed(self._directory, self._failure)
        if self._closed:
            raise _failed(self._directory, "it was closed")

    def _poison(self, what: str, error: Exception) -> JournalFailed:
        with self._state:
            self._failure = self._failure or f"{what}: {error}"
        return _failed(self._directory, self._failure)


def _full(directory: Path, why: str) -> JournalFull:
    return JournalFull("the journal is full", where=str(directory), why=why)


def _failed(directory: Path, why: str) -> JournalFailed:
    return JournalFailed("the journal cannot be used", where=str(directory), why=why)


def _close(fd: int) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def _lock(directory: Path) -> int:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Conflict("the journal is open", where=str(directory), why="another tap writes to it") from None
    return fd


def _settle(recovered: Recovered) -> deque[_Ended]:
    """Make durable, and alone on the disk, what recovery found. Repeating it changes nothing."""
    directory = recovered.directory
    for leftover in recovered.leftovers:
        if leftover.reason is not None:
            segments.quarantine(directory, leftover.path, leftover.reason)
        else:
            segments.release(directory, leftover.path, keep=True)
    failpoint("journal.settle.leftovers_gone")
    ended = deque[_Ended]()
    for segment in recovered.segments:
        file_bytes = segment.file_bytes
        last = segment is recovered.segments[-1]
        if segment.soft_from < segment.end or (last and file_bytes != segment.end):
            _settle_segment(segment, cut=last)
            file_bytes = segment.end if last else file_bytes
        ended.append(_Ended(segment.path, segment.last_lsn, segment.end, file_bytes))
    segments.sync_directory(directory)
    failpoint("journal.settle.done")
    segments.trim_pool(directory, POOL_FILES_MAX)
    return ended


def _settle_segment(segment: Segment, *, cut: bool) -> None:
    """Write again what the mark does not vouch for, and end the file at the log's end.

    After kill -9 that part may be in the page cache only. It is written, not just synced: an fdatasync that
    failed before the kill would have left its pages clean, and a second one returns 0 for them.
    """
    fd = segments.open_segment(segment.path, os.O_RDWR)
    try:
        at = segment.soft_from
        while at < segment.end:
            part = os.pread(fd, min(_COPY_BYTES, segment.end - at), at)
            if not part:
                raise OSError(5, "the file became shorter", str(segment.path))
            segments.pwrite_all(fd, [part], at)
            at += len(part)
        failpoint("journal.settle.rewritten")
        if cut:
            os.ftruncate(fd, segment.end)
        os.fsync(fd)
        failpoint("journal.settle.synced")
    finally:
        os.close(fd)
