"""What a journal directory holds after a stop of any kind.

`recover` only reads, so it may be killed and repeated at will; `JournalWriter.open` acts on what it found.
The log is one chain: each segment names the running digest before it, each incarnation the record it goes on
from, so where two files do not fit together, something is missing between them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.journal.errors import JournalGap
from agent.journal.mark import Mark, load_mark
from agent.journal.scan import SegmentScan, decode_header, read_header, torn_bytes
from agent.journal.segments import list_segments, open_segment
from agent.journal.state import FILE_NAME as STATE_FILE_NAME
from agent.journal.state import load_state
from farshore.errors import CorruptRecord
from farshore.hrl.batch import CLEAN, Batch, first_digest, incarnation_key
from farshore.hrl.segment import NO_DIGEST, NO_INCARNATION, Incarnation, SegmentHeader


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of the log.

    Attributes:
        first_lsn: Of its first record.
        last_lsn: Of its last record that counts; ``first_lsn - 1`` when it has none.
        digest: Running digest at its end.
        end: Byte offset behind its last batch that counts; the file's size when it was not scanned.
        soft_from: Byte offset from which on the mark does not vouch for it; ``end`` when it does for all.
        file_bytes: Size of the file.
        sealed: Its last batch is the SEAL.
    """

    number: int
    path: Path
    header: SegmentHeader
    first_lsn: int
    last_lsn: int
    digest: bytes
    end: int
    soft_from: int
    file_bytes: int
    sealed: bool


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file named like a segment that is not part of the log.

    Attributes:
        reason: Why, for a file that is to be kept under another name; None for one that may be recycled:
            never begun, or behind the place where a power cut ended the log.
    """

    path: Path
    reason: str | None


@dataclass(frozen=True, slots=True)
class Recovered:
    """The log as found.

    Attributes:
        incarnation: The newest, None for a journal that has none yet.
        last_lsn: Its last record that counts (before its first: the LSN before that); 0 without any.
        digest: Running digest there.
        mark: The newest valid mark, None when there is none.
        segments: The log, in order, every file fitting the one before.
        torn_tail_bytes: Bytes of a batch that was begun at the log's end; the power cut's, and no harm.
        corrupt: None, or why the log cannot be trusted to hold what the mark says: compare the whole volume.
        clean: The log ends with the SEAL of an orderly stop.
        leftovers: Files that are not part of the log.
        floor_lsn: No record may get this LSN or a lower one: more was durable here than can be read now.
        ordinal: The highest ordinal of any incarnation seen.
    """

    directory: Path
    machine: bytes
    volume: bytes
    incarnation: Incarnation | None
    last_lsn: int
    digest: bytes
    mark: Mark | None
    segments: tuple[Segment, ...]
    torn_tail_bytes: int
    corrupt: str | None
    clean: bool
    leftovers: tuple[Leftover, ...]
    floor_lsn: int
    ordinal: int

    @property
    def durable_lsn(self) -> int:
        """What the mark vouches for; 0 without one."""
        return self.mark.durable_lsn if self.mark else 0


@dataclass(slots=True)
class _File:
    """One file named like a segment. Without header and problem: allocated and never begun."""

    number: int
    path: Path
    header: SegmentHeader | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class _End:
    """Where something ends: the last LSN and the running digest behind it."""

    lsn: int
    digest: bytes


def recover(
    directory: Path,
    machine: bytes,
    volume: bytes,
    *,
    state_page: Path | None = None,
    boot_id: bytes | None = None,
    every_byte: bool = False,
) -> Recovered:
    """Find out what a journal directory holds. Changes nothing; memory is bounded by two batches.

    Args:
        directory: The volume's journal; need not exist.
        machine: 16 bytes; files of another machine or volume never count.
        volume: 16 bytes.
        state_page: Default: ``state`` in the directory.
        boot_id: This boot. A state page of the same boot vouches for more than the mark: then damage can
            be told from a torn tail further.
        every_byte: Also read segments that lie wholly at or below the stable mark. Off by default, since the
            workload waits: redo does not need them, and who sends them checks them.

    Raises:
        OSError: The directory itself cannot be read.
    """
    files = [_look(number, path, machine, volume) for number, path in list_segments(directory)]
    problems: list[str] = []
    mark = None
    try:
        mark = load_mark(directory)
    except (CorruptRecord, OSError) as error:
        problems.append(str(error))
    vouched = {mark.incarnation: mark.durable_lsn} if mark else {}
    state = load_state(state_page or directory / STATE_FILE_NAME)
    if state and boot_id and state.boot_id == boot_id:
        vouched[state.incarnation] = max(vouched.get(state.incarnation, 0), state.durable_lsn)
    vouched.pop(NO_INCARNATION, None)
    follower = _Follower(
        files, vouched, mark.durable_lsn if mark else 0, 0 if every_byte or not mark else mark.stable_lsn
    )
    for index, file in enumerate(files):
        follower.take(index, file)
    if (
        mark is None
        and not problems
        and any(segment.last_lsn >= segment.first_lsn for segment in follower.run)
    ):
        problems.append("there are records and no mark")
    problems += follower.conclude(mark.stable_lsn if mark else None)
    headers = follower.headers
    durable_here = [*vouched.values(), *(header.first_lsn - 1 for header in headers), follower.lsn]
    return Recovered(
        directory=directory,
        machine=machine,
        volume=volume,
        incarnation=follower.incarnation,
        last_lsn=follower.lsn,
        digest=follower.digest,
        mark=mark,
        segments=tuple(follower.run),
        torn_tail_bytes=follower.torn,
        corrupt="; ".join(problems) or None,
        clean=follower.clean,
        leftovers=tuple(follower.leftovers_kept(bool(problems))),
        floor_lsn=max(durable_here) if problems else follower.lsn,
        ordinal=max((header.incarnation.ordinal for header in headers), default=0),
    )


def redo_records(recovered: Recovered, after_lsn: int) -> Iterator[Batch]:
    """Yield, in order, the batches that hold records behind ``after_lsn``, normally the stable mark.

    The first may also hold earlier records, which are skipped by their LSN. One batch is read at a time.

    Raises:
        JournalGap: Records behind ``after_lsn`` are no longer here.
        CorruptRecord: A batch that was sound in `recover` is not any more.
        OSError: A segment cannot be read.
    """
    if not recovered.segments:
        if after_lsn < recovered.last_lsn:
            raise JournalGap("cannot redo", where=str(recovered.directory), why="no segment is left")
        return
    if after_lsn < (start := lsn_before(recovered.segments[0].header)):
        why = f"records after {after_lsn} are needed, those up to {start} are gone"
        raise JournalGap("cannot redo", where=str(recovered.directory), why=why)
    for segment in recovered.segments:
        if segment.last_lsn <= after_lsn:
            continue
        fd = open_segment(segment.path)
        try:
            scan = SegmentScan(fd, segment.header.chain(), segment.first_lsn, where=str(segment.path))
            while scan.next_lsn <= segment.last_lsn:
                batch = scan.next()
                if batch is None:
                    raise CorruptRecord(scan.at, "the log ends too early", where=str(segment.path))
                if batch.last_lsn > after_lsn:
                    yield batch
        finally:
            os.close(fd)


def begins_incarnation(header: SegmentHeader) -> bool:
    """Tell whether the segment is the first of its incarnation."""
    there = header.incarnation
    key = incarnation_key(header.machine, header.volume, there.id)
    start = first_digest(key, there.previous, there.previous_last_lsn, there.previous_digest)
    return header.digest_before == start


def lsn_before(header: SegmentHeader) -> int:
    """The last LSN before a segment: an incarnation may begin higher than the one before it ended."""
    return header.incarnation.previous_last_lsn if begins_incarnation(header) else header.first_lsn - 1


def follows(header: SegmentHeader, incarnation: Incarnation, lsn: int, digest: bytes) -> bool:
    """Tell whether a segment begins exactly at ``lsn`` of ``incarnation`` with ``digest``."""
    there = header.incarnation
    if there.id == incarnation.id:
        return (header.first_lsn, header.digest_before) == (lsn + 1, digest)
    link = (there.previous, there.previous_last_lsn, there.previous_digest)
    return link == (incarnation.id, lsn, digest) and begins_incarnation(header)


def _look(number: int, path: Path, machine: bytes, volume: bytes) -> _File:
    try:
        fd = open_segment(path)
        try:
            header = decode_header(read_header(fd), number, path)
        finally:
            os.close(fd)
    except OSError as error:
        return _File(number, path, None, f"segment {number} cannot be read: {error.strerror}")
    except CorruptRecord as error:
        return _File(number, path, None, f"segment {number}: {error.reason}")
    if header and (header.machine, header.volume) != (machine, volume):
        return _File(number, path, None, f"segment {number} is of another machine or volume")
    return _File(number, path, header, None)


class _Follower:
    """Follows the chain from file to file; ``run`` is what fits together up to where it is."""

    def __init__(
        self, files: list[_File], vouched: dict[bytes, int], durable_lsn: int, skip_to_lsn: int
    ) -> None:
        self.headers = [file.header for file in files if file.header]
        self.run: list[Segment] = []
        self.incarnation: Incarnation | None = None
        self.lsn, self.digest = 0, NO_DIGEST
        self.torn, self.clean = 0, False
        self._files, self._vouched = files, vouched
        self._durable_lsn, self._skip_to_lsn = durable_lsn, skip_to_lsn
        self._problems: list[str] = []
        self._doubts: list[str] = []  # problems of files that may turn out to be beside the log
        self._leftovers: list[tuple[Leftover, bool]] = []  # with: it was begun
        self._broken = self._ended = False
        # The next incarnation says where one ended: its recovery cut it there, whatever lies behind.
        self._ends = {
            there.previous: _End(there.previous_last_lsn, there.previous_digest)
            for there in (header.incarnation for header in self.headers)
        }
        self._newest = self.headers[-1].incarnation.id if self.headers else NO_INCARNATION

    def take(self, index: int, file: _File) -> None:
        """Follow the log into ``file``, the next by number."""
        header = file.header
        if header is None:
            self._set_aside(file, file.problem)
            if file.problem:
                self._doubts.append(file.problem)
            return
        if self._ended:
            self._set_aside(file, None if header.incarnation.id == self._newest else "behind the log's end")
            return
        if self.incarnation is None:
            self._problems += self._doubts
        elif self._broken or not follows(header, self.incarnation, self.lsn, self.digest):
            if not self._broken and self._may_end_before(header):
                self._ended = True
                self._set_aside(file, None)
                return
            self._give_up_run(file.number)
        self._doubts = []
        self._broken = self.clean = False
        self.torn = 0
        self.incarnation = header.incarnation
        self.lsn, self.digest = header.first_lsn - 1, header.digest_before
        if (end := self._known_end(index)) and end.lsn <= self._skip_to_lsn:
            size = file.path.stat().st_size
            self._add(
                Segment(
                    file.number,
                    file.path,
                    header,
                    header.first_lsn,
                    end.lsn,
                    end.digest,
                    size,
                    size,
                    size,
                    True,
                )
            )
        else:
            self._scan(file, header)

    def conclude(self, stable_lsn: int | None) -> list[str]:
        """Compare with what was vouched for, after the last file; returns everything that is wrong."""
        reached = {segment.header.incarnation.id: segment.last_lsn for segment in self.run}
        if self.incarnation:
            reached.setdefault(self.incarnation.id, self.lsn)
        start = lsn_before(self.run[0].header) if self.run else self.lsn
        for incarnation, lsn in self._vouched.items():
            if incarnation in reached:
                if reached[incarnation] < lsn:
                    self._problems.append(
                        f"the log ends at LSN {reached[incarnation]} where it was durable up to {lsn}"
                    )
            elif start < lsn:  # else all of it was freed
                self._problems.append(
                    f"records up to LSN {lsn} were durable and no segment of theirs is left"
                )
        if stable_lsn is not None and start > stable_lsn and self.run and not self._problems:
            self._problems.append(f"records after the stable mark {stable_lsn} up to LSN {start} are gone")
        return self._doubts * bool(self._problems) + self._problems

    def leftovers_kept(self, damaged: bool) -> Iterator[Leftover]:
        """What is not part of the log; of a damaged log nothing that was begun may be overwritten."""
        for leftover, begun in self._leftovers:
            if damaged and begun and leftover.reason is None:
                yield Leftover(leftover.path, "behind a damaged log")
            else:
                yield leftover

    def _may_end_before(self, header: SegmentHeader) -> bool:
        """Whether a power cut may have ended the log here, with later files of it that do not count."""
        return header.incarnation.id == self._newest == self._id() and self.lsn >= self._vouched_here()

    def _known_end(self, index: int) -> _End | None:
        """Where the file ends by what the next one says of it; None when that has to be read."""
        file = self._files[index]
        after = self._files[index + 1] if index + 1 < len(self._files) else None
        if file.header is None or after is None or after.header is None or after.number != file.number + 1:
            return None
        there = after.header.incarnation
        if there.id == file.header.incarnation.id:
            return _End(after.header.first_lsn - 1, after.header.digest_before)
        if there.previous == file.header.incarnation.id:
            return _End(there.previous_last_lsn, there.previous_digest)
        return None

    def _scan(self, file: _File, header: SegmentHeader) -> None:
        end = self._ends.get(header.incarnation.id)
        fd = -1
        soft_from = 0 if header.first_lsn > self._durable_lsn else None
        torn = flags = 0
        stopped = "it ends too early"
        damage = None
        scan = None
        try:
            fd = open_segment(file.path)
            size = os.fstat(fd).st_size
            scan = SegmentScan(fd, header.chain(), header.first_lsn, where=str(file.path))
            while end != _End(scan.next_lsn - 1, scan.digest):
                before = scan.at
                try:
                    batch = scan.next()
                except CorruptRecord as error:
                    stopped = f"at byte {error.at}: {error.reason}"
                    break
                if batch is None:
                    break
                flags = batch.flags
                if soft_from is None and batch.last_lsn > self._durable_lsn:
                    soft_from = before
            else:
                stopped = ""
            if stopped and not scan.sealed:
                torn = torn_bytes(fd, scan.at, scan.next_lsn)
                if end or scan.next_lsn - 1 < self._vouched_here():
                    damage = stopped
        except OSError as error:
            damage = f"cannot be read: {error.strerror}"
        finally:
            if fd >= 0:
                os.close(fd)
        if damage or scan is None:
            self._problems.append(f"segment {file.number} {damage}")
            self._set_aside(file, damage)
            self._broken = True
            return
        self.torn, self.clean = torn, bool(flags & CLEAN)
        self._add(
            Segment(
                file.number,
                file.path,
                header,
                header.first_lsn,
                scan.next_lsn - 1,
                scan.digest,
                scan.at,
                scan.at if soft_from is None else soft_from,
                size,
                scan.sealed,
            )
        )

    def _add(self, segment: Segment) -> None:
        self.run.append(segment)
        self.lsn, self.digest = segment.last_lsn, segment.digest

    def _give_up_run(self, number: int) -> None:
        if not self._broken:
            before = self.run[-1].number if self.run else 0
            why = "; ".join(self._doubts) or "something is missing"
            self._problems.append(f"segment {number} does not go on from segment {before}: {why}")
        self._leftovers += [
            (Leftover(segment.path, "before a break in the log"), True) for segment in self.run
        ]
        self.run = []

    def _set_aside(self, file: _File, reason: str | None) -> None:
        self._leftovers.append((Leftover(file.path, reason), file.header is not None))

    def _id(self) -> bytes:
        return self.incarnation.id if self.incarnation else NO_INCARNATION

    def _vouched_here(self) -> int:
        return self._vouched.get(self._id(), 0)
