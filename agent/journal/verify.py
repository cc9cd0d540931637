"""One segment's file looked at from outside: what is in it, and whether it is what it should be.

For people and their scripts (``farshore hrl``); `agent.journal.recovery` decides for the tap.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.journal.mark import Mark, load_mark
from agent.journal.scan import SegmentScan, decode_header, read_header, torn_bytes
from agent.journal.segments import list_segments, open_segment, segment_number
from farshore.errors import CorruptRecord
from farshore.hrl.batch import CLEAN, MARK, RESIZE, WRITE, ZERO, Batch
from farshore.hrl.segment import SegmentHeader, decode_segment_header

TYPE_NAMES: Final = {WRITE: "write", ZERO: "zero", RESIZE: "resize", MARK: "mark"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a segment's file holds and whether that is all it should.

    Attributes:
        header: None when the segment has not begun, or its header does not check.
        last_lsn: Of the last record that checks; ``first_lsn - 1`` without any.
        durable_lsn: Up to here its records were durable, by the ``mark`` beside it or by the incarnation that
            goes on from it; 0 when nothing beside it says so.
        records: Count by type.
        payload_bytes: Of all records.
        end: Byte offset behind the last batch.
        sealed: The last batch is the SEAL; ``clean``: of an orderly stop.
        torn_tail_bytes: Of a batch behind ``end`` that does not check and was never durable: no harm.
        stopped: Why reading ended at ``end``; empty at a clean end.
        problem: None, or why durable records are lost, in one clause.
    """

    path: Path
    header: SegmentHeader | None
    last_lsn: int
    durable_lsn: int
    batches: int
    records: dict[str, int]
    payload_bytes: int
    end: int
    sealed: bool
    clean: bool
    torn_tail_bytes: int
    stopped: str
    problem: str | None


def verify_segment(path: Path, on_batch: Callable[[Batch], None] = lambda batch: None) -> Verdict:
    """Read a segment's file to its end; ``on_batch`` gets each batch that checks. Damage is no exception."""
    try:
        fd = open_segment(path)
    except OSError as error:
        return _nothing(path, f"cannot be read: {error.strerror}")
    try:
        header = _header(fd, path)
        if header is None:
            return _nothing(path, None)
        mark = load_mark(path.parent)
        return _scan(fd, path, header, *_durable(path, header, mark), on_batch)
    except CorruptRecord as error:
        return _nothing(path, error.reason)
    except OSError as error:
        return _nothing(path, f"cannot be read: {error.strerror}")
    finally:
        os.close(fd)


def verify_together(verdicts: list[Verdict]) -> list[str]:
    """Return what is wrong between files that each check: one clause per break in the chain."""
    problems = []
    ordered = sorted((v for v in verdicts if v.header), key=lambda v: v.header.number if v.header else 0)
    for first, second in itertools.pairwise(ordered):
        here, there = first.header, second.header
        assert here is not None
        assert there is not None
        if here.volume != there.volume or here.incarnation.id != there.incarnation.id or not first.sealed:
            continue
        if there.number > here.number + 1 and (first.path.parent / _next_name(first.path)).exists():
            continue  # not asked for
        if there.number == here.number:
            problems.append(f"{first.path.name} and {second.path.name} are both segment {here.number}")
        elif there.first_lsn != first.last_lsn + 1:
            lost = f"LSN {first.last_lsn + 1} to {there.first_lsn - 1}"
            problems.append(f"{lost} are missing between {first.path.name} and {second.path.name}")
    return problems


def _next_name(path: Path) -> str:
    return f"seg-{(segment_number(path) or 0) + 1:020}.hrl"


def _nothing(path: Path, problem: str | None) -> Verdict:
    return Verdict(path, None, 0, 0, 0, {}, 0, 0, False, False, 0, problem or "", problem)


def _header(fd: int, path: Path) -> SegmentHeader | None:
    raw = read_header(fd)
    number = segment_number(path)
    if number is None:  # a copy, under any name
        return decode_segment_header(raw) if any(raw) or not raw else None
    return decode_header(raw, number, path)


def _durable(path: Path, header: SegmentHeader, mark: Mark | None) -> tuple[int, tuple[int, bytes] | None]:
    """Up to where the segment's incarnation was durable, and where it ended if another one followed."""
    id = header.incarnation.id
    for number, other in list_segments(path.parent):
        if number <= header.number:
            continue
        try:
            fd = open_segment(other)
            try:
                later = decode_header(read_header(fd), number, other)
            finally:
                os.close(fd)
        except (OSError, CorruptRecord):
            continue
        if later and later.incarnation.previous == id:
            there = later.incarnation
            return there.previous_last_lsn, (there.previous_last_lsn, there.previous_digest)
    return (mark.durable_lsn if mark and mark.incarnation == id else 0), None


def _scan(
    fd: int,
    path: Path,
    header: SegmentHeader,
    durable_lsn: int,
    end: tuple[int, bytes] | None,
    on_batch: Callable[[Batch], None],
) -> Verdict:
    scan = SegmentScan(fd, header.chain(), header.first_lsn, where=str(path))
    records: Counter[str] = Counter()
    batches = payload_bytes = flags = 0
    stopped = ""
    reached = False
    while (scan.next_lsn - 1, scan.digest) != end:
        try:
            batch = scan.next()
        except CorruptRecord as error:
            stopped = f"{error.reason} (byte {error.at})"
            break
        if batch is None:
            break
        on_batch(batch)
        batches += 1
        flags = batch.flags
        payload_bytes += len(batch.payload)
        for kind, name in TYPE_NAMES.items():
            records[name] += int((batch.records["type"] == kind).sum())
    else:
        reached = True  # nothing behind it counts
    last = scan.next_lsn - 1
    problem = None
    if not scan.sealed and not reached and last < durable_lsn:
        problem = (
            f"{stopped or 'the log ends'}: LSN {last + 1} to {durable_lsn} were durable and are not here"
        )
    whole = scan.sealed or reached or problem
    torn = 0 if whole else torn_bytes(fd, scan.at, scan.next_lsn)
    return Verdict(
        path,
        header,
        last,
        durable_lsn,
        batches,
        {name: count for name, count in records.items() if count},
        payload_bytes,
        scan.at,
        scan.sealed,
        bool(flags & CLEAN),
        torn,
        stopped,
        problem,
    )
