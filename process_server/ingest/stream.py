"""What has arrived of one volume since the last commit, and where its record stream stands. Pure.

Rows wait here in the order they will have in a commit. They are kept whole, in the blocks they came in, and
split only where a cut passes through, which is between batches.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from farshore.errors import FarshoreError
from farshore.hrl.batch import first_digest, incarnation_key
from farshore.hrl.segment import NO_DIGEST, NO_INCARNATION
from farshore.wire import messages as m
from process_server.vault.commit import NO_ROWS, ZEROS, Consistency, Rows

_START: Final = "start"


class Refused(FarshoreError):
    """The peer's frame cannot be applied; nothing of it was.

    Attributes:
        code: The code of the ERROR that says so (``docs/formats/wire.md``).
        volume: The volume concerned, or None.
    """

    def __init__(
        self, code: str, what: str, *, where: str = "", why: str = "", volume: bytes | None = None
    ) -> None:
        super().__init__(what, where=where, why=why)
        self.code, self.volume = code, volume


class PackTable:
    """Numbers for packs, so that rows of many frames can point into one table."""

    __slots__ = ("_numbers", "ids")

    def __init__(self) -> None:
        self.ids: list[bytes] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, pack: bytes) -> int:
        """Return the number of ``pack``, a new one when it is new."""
        number = self._numbers.get(pack)
        if number is None:
            number = self._numbers[pack] = len(self.ids)
            self.ids.append(pack)
        return number

    def adopt(self, rows: Rows, packs: Sequence[bytes]) -> None:
        """Change, in place, the pack column of ``rows`` from indexes into ``packs`` to numbers here."""
        if not packs:
            return
        numbers = np.array([self.number(pack) for pack in packs], "<u4")
        column = rows["pack"]
        stored = column != ZEROS
        column[stored] = numbers[column[stored]]


@dataclass(slots=True)
class Position:
    """A place in a volume's record stream: everything up to ``lsn`` is before it.

    Attributes:
        digest: Running digest of the batch that holds ``lsn``; before an incarnation's first, its first one.
        tail: Running digest after a SEAL that followed, or empty; the next incarnation may name either.
    """

    incarnation: bytes = NO_INCARNATION
    ordinal: int = 0
    lsn: int = 0
    digest: bytes = NO_DIGEST
    tail: bytes = b""


@dataclass(slots=True)
class CopiedRows:
    """A verified COPY that no cut has taken yet."""

    volume: bytes
    applied_lsn: int
    rows: Rows


@dataclass(slots=True)
class VolumeCut:
    """What one cut takes of a volume: the position, the agent's words, the rows in commit order."""

    volume: bytes
    name: str
    size_bytes: int
    position: Position
    fuzzy: bool
    copied: bool
    copy_end: int
    copies: list[Rows]
    records: list[Rows]
    record_bytes: int

    def rows(self) -> list[Rows]:
        return [*self.copies, *self.records]


@dataclass(slots=True)
class VolumeStream:
    """A volume in a session.

    Attributes:
        received: Position after the last record that arrived.
        cut: Position of the last cut; ``rows`` holds what lies between the two.
        copied, copy_end: As of the last cut.
        problem: Why it is ``failed``, in the agent's words; empty where it did not say.
    """

    id: bytes
    name: str
    size_bytes: int
    sector_bytes: int
    state: str
    capture_mode: str
    received: Position
    cut: Position
    copied: bool
    copy_end: int
    resync: bool = False
    rows: deque[tuple[int, Rows]] = field(default_factory=deque)
    ends: dict[tuple[bytes, int], tuple[int, bytes, int]] = field(default_factory=dict)
    problem: str = ""

    def start(self, machine: bytes, message: m.IncarnationStart) -> bytes:
        """Take INCARNATION-START; return the key that the incarnation's batches are chained under.

        Raises:
            Refused: It does not continue what is here (``gap``), or takes an ordinal or LSN twice.
        """
        here = self.received
        where = f"volume {self.name}"
        key = incarnation_key(machine, self.id, message.id)
        if message.id == here.incarnation:
            if message.ordinal != here.ordinal:
                raise Refused("conflict", "an incarnation changed its ordinal", where=where, volume=self.id)
            if message.resync:
                self.resync, self.copied = True, False
            return key
        if message.ordinal <= here.ordinal:
            raise Refused(
                "conflict",
                "an incarnation that is not new",
                where=where,
                why=f"ordinal {message.ordinal} after {here.ordinal}",
                volume=self.id,
            )
        if message.first_lsn <= here.lsn or message.first_lsn <= message.previous_lsn:
            raise Refused("conflict", "an incarnation that reuses LSNs", where=where, volume=self.id)
        continues = (
            (message.previous, message.previous_lsn) == (here.incarnation, here.lsn)
            and message.previous_digest in (here.digest, here.tail)
            and message.first_lsn == here.lsn + 1
        )
        if not continues and not message.resync:
            raise Refused(
                "gap",
                "an incarnation that does not continue what the vault has",
                where=where,
                why=f"it follows LSN {message.previous_lsn}, here is {here.lsn}",
                volume=self.id,
            )
        digest = first_digest(key, message.previous, message.previous_lsn, message.previous_digest)
        self.received = Position(message.id, message.ordinal, message.first_lsn - 1, digest)
        self.ends[message.id, message.first_lsn - 1] = (message.ordinal, digest, self.size_bytes)
        if message.resync:
            self.resync, self.copied = True, False
        return key

    def append(
        self,
        incarnation: bytes,
        first_lsn: int,
        rows: Rows,
        batches: Sequence[tuple[int, bytes, int]],
        tail: bytes,
    ) -> None:
        """Take verified records that follow directly on what is here."""
        here = self.received
        assert incarnation == here.incarnation
        if not batches:
            here.tail = tail
            return
        assert first_lsn == here.lsn + 1
        last_lsn, digest, _ = batches[-1]
        for lsn, batch_digest, size_bytes in batches:
            self.ends[incarnation, lsn] = (here.ordinal, batch_digest, size_bytes)
        self.received = Position(incarnation, here.ordinal, last_lsn, digest, tail)
        if len(rows):
            self.rows.append((last_lsn, rows))

    def take(self, mark: m.VolumeMark, copies: Iterable[tuple[CopiedRows, m.CopyInCut]]) -> VolumeCut:
        """Take what ``mark`` cuts off. Call `check` first: this changes the state and does not fail."""
        position, size_bytes = self._at(mark)
        records = []
        while self.rows and self.rows[0][0] <= mark.lsn:
            records.append(self.rows.popleft()[1])
        if self.rows:
            last_lsn, rows = self.rows[0]
            split = int(np.searchsorted(rows["lsn"], mark.lsn, side="right"))
            if split:
                records.append(rows[:split])
                self.rows[0] = (last_lsn, rows[split:])
        self.ends = {key: end for key, end in self.ends.items() if key[1] >= mark.lsn}
        self.cut, self.size_bytes = position, size_bytes
        self.copied, self.copy_end = mark.copied, mark.copy_end
        if mark.copied:
            self.resync = False
        return VolumeCut(
            self.id,
            self.name,
            size_bytes,
            position,
            mark.fuzzy,
            mark.copied,
            mark.copy_end,
            [cut_out(copy.rows, named.cut_outs) for copy, named in copies],
            records,
            sum(int(rows["length"].sum()) for rows in records),
        )

    def check(self, mark: m.VolumeMark) -> None:
        """Hold a MARK's words on this volume against what arrived.

        Raises:
            Refused: It names records that did not come (``gap``) or a place that is none (``protocol``).
        """
        where = f"volume {self.name}"
        if mark.lsn > self.received.lsn:
            raise Refused(
                "gap",
                "a mark beyond the records that came",
                where=where,
                why=f"LSN {mark.lsn}, received {self.received.lsn}",
            )
        if mark.lsn < self.cut.lsn or self._at(mark)[0].ordinal < self.cut.ordinal:
            raise Refused("protocol", "a mark before the mark before", where=where)

    def _at(self, mark: m.VolumeMark) -> tuple[Position, int]:
        if (mark.incarnation, mark.lsn) == (self.cut.incarnation, self.cut.lsn):
            return self.cut, self.size_bytes
        end = self.ends.get((mark.incarnation, mark.lsn))
        if end is None:
            raise Refused(
                "protocol",
                "a mark inside a batch or of another incarnation",
                where=f"volume {self.name}",
                why=f"LSN {mark.lsn}",
            )
        return Position(mark.incarnation, end[0], mark.lsn, end[1]), end[2]


def cut_out(rows: Rows, holes: Sequence[tuple[int, int]]) -> Rows:
    """Return ``rows`` without the bytes that any (offset, length) of ``holes`` covers, in the same order."""
    if not holes or not len(rows):
        return rows
    merged: list[list[int]] = []
    for offset, length in sorted(holes):
        if merged and offset <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], offset + length)
        else:
            merged.append([offset, offset + length])
    starts = np.array([hole[0] for hole in merged], "<u8")
    ends = np.array([hole[1] for hole in merged], "<u8")
    row_ends = rows["offset"] + rows["length"]
    # The first hole that ends behind a row's start; the row is touched when that one begins before its end.
    first = np.searchsorted(ends, rows["offset"], side="right")
    touched = (first < len(merged)) & (starts[np.minimum(first, len(merged) - 1)] < row_ends)
    if not touched.any():
        return rows
    left: list[Rows] = []
    done = 0
    for index in np.flatnonzero(touched).tolist():
        if done < index:
            left.append(rows[done:index])
        done = index + 1
        at, end = int(rows["offset"][index]), int(row_ends[index])
        hole = int(first[index])
        while hole < len(merged) and merged[hole][0] < end:
            if at < merged[hole][0]:
                left.append(piece(rows[index : index + 1], at, merged[hole][0]))
            at = merged[hole][1]
            hole += 1
        if at < end:
            left.append(piece(rows[index : index + 1], at, end))
    left.append(rows[done:])
    return np.concatenate(left)


def clip(rows: Rows, size_bytes: int) -> Rows:
    """Return what of ``rows`` lies within a volume of ``size_bytes``, in the same order."""
    ends = rows["offset"] + rows["length"]
    if not len(rows) or int(ends.max()) <= size_bytes:
        return rows
    rows = rows[rows["offset"] < size_bytes].copy()
    over = rows["offset"] + rows["length"] > size_bytes
    rows["length"][over] = np.uint64(size_bytes) - rows["offset"][over]
    return rows


def piece(row: Rows, start: int, end: int) -> Rows:
    """Return the part [start, end) of the one row ``row``, as a table of one row."""
    part = row.copy()
    if part["pack"][0] != ZEROS:
        part[_START] += np.uint32(start - int(row["offset"][0]))
    part["offset"] = start
    part["length"] = end - start
    return part


def consistency(cuts: Iterable[VolumeCut]) -> Consistency:
    """``crash``, or ``fuzzy``: at the cut one volume has a state that its disk never had."""
    fuzzy = any(is_fuzzy(cut) for cut in cuts)
    return "fuzzy" if fuzzy else "crash"


def is_fuzzy(cut: VolumeCut) -> bool:
    """Below data mode or dirty (the agent's word), not yet wholly copied, or before the last copied read."""
    return cut.fuzzy or not cut.copied or cut.position.lsn < cut.copy_end


def merge(earlier: Sequence[VolumeCut], later: Sequence[VolumeCut]) -> list[VolumeCut]:
    """Return one cut that has the effect of two that follow each other.

    The later copies go before the earlier records too. That is right: a copy read at *a* shows every record
    up to *a*, so applying those again changes nothing, and what records in (*a*, earlier cut] touch is cut
    out of it already.
    """
    before = {cut.volume: cut for cut in earlier}
    merged = []
    for cut in later:
        first = before.get(cut.volume)
        if first is not None:
            cut.copies = [*first.copies, *cut.copies]
            cut.records = [*first.records, *cut.records]
            cut.record_bytes += first.record_bytes
        merged.append(cut)
    return merged


def assemble(cuts: Sequence[VolumeCut], packs: Sequence[bytes]) -> tuple[dict[bytes, Rows], list[bytes]]:
    """Return each volume's rows of a commit, and the packs they point into, in the order of their numbers.

    Args:
        cuts: One per volume.
        packs: What the rows' pack column means so far (`PackTable.ids`).
    """
    tables = {}
    for cut in cuts:
        parts = cut.rows()
        # A volume that was cut down keeps no rows behind its end; should it grow, RESIZE brings zeros.
        tables[cut.volume] = clip(np.concatenate(parts) if parts else NO_ROWS.copy(), cut.size_bytes)
    columns = [rows["pack"] for rows in tables.values()]
    used = np.unique(np.concatenate(columns)) if columns else np.empty(0, "<u4")
    used = used[used != ZEROS]
    for column in columns:
        stored = column != ZEROS
        column[stored] = np.searchsorted(used, column[stored]).astype("<u4")
    return tables, [packs[number] for number in used.tolist()]
