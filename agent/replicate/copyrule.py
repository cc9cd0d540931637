"""The copy rule: where a copied extent goes in the stream of records, and what must be left out of it.

A copied extent was read from the disk while *a* was the applied LSN. It is placed in the stream right after
the cut before the MARK that names it, so every record in (a, that cut] is already in the vault and newer than
what was read: the parts that those records touch are cut out. Records behind that cut are applied over the
copy. What the read may have seen too early lies at or below *E*, the captured LSN after the read: cuts below
the highest E are fuzzy.

Writes that went past the journal (bitmap mode, or while no tap ran) have no LSN. A copy that is to carry them
may be compared and placed only behind every record from before them, since a record behind the copy would be
laid over it: so healing and resync begin when all that was captured before is vaulted.

Where continuity was lost the stream goes on behind a gap. Which extents were written in it nobody knows, so
a copy from before it is no state of the disk that later records could lie over: copying begins again behind
the gap, when all that was sent before it is vaulted.

Pure: told what was sent, read and accepted, it says what the next MARK names. One object lives as long as one
session of one volume.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from farshore.hrl.batch import ZERO, Records

CUT_OUTS_MAX: Final = 100_000
"""Pairs in one MARK: 15 bytes each, well inside the 4 MiB of a frame's MessagePack part."""
COPIES_MAX: Final = 50_000
"""COPYs named by one MARK; the rest wait for the next."""

Pairs = tuple[tuple[int, int], ...]
_Lsns = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class AcceptedCopy:
    """One COPY that the server has accepted.

    Attributes:
        token: As sent; unique in the session.
        offset, length: The extent of the disk that it holds.
        applied_lsn: The applied LSN noted before the read.
    """

    token: int
    offset: int
    length: int
    applied_lsn: int


@dataclass(frozen=True, slots=True)
class PlacedCopy:
    """A COPY that a MARK names, with the (offset, length) pairs left out of it, sorted and disjoint."""

    copy: AcceptedCopy
    cut_outs: Pairs


class CopyRule:
    """What one volume's copies and records of one session have to do with one another.

    Attributes:
        previous_cut: LSN of the last cut in the stream: where copies named next are placed.
        copy_end: Highest captured LSN after any copied read so far.
        vaulted_lsn: LSN up to which everything is vaulted that ever will be: of the last vaulted cut, or the
            end of a gap behind it.
    """

    def __init__(self, previous_cut: int, copy_end: int = 0) -> None:
        self.previous_cut = previous_cut
        self.copy_end = copy_end
        self.vaulted_lsn = previous_cut
        self._sent = previous_cut
        self._gaps: deque[tuple[int, int]] = deque()
        self._tracked_from: int | None = None
        self._records: deque[tuple[_Lsns, _Lsns, _Lsns]] = deque()
        self._accepted: deque[AcceptedCopy] = deque()
        self._floors: dict[object, int] = {}

    # --- what happened ---

    def track(self) -> None:
        """Begin to remember records, before copying."""
        if self._tracked_from is None:
            self._tracked_from = self._sent

    def ready(self, applied_lsn: int, after: int) -> bool:
        """Tell whether reads may begin while ``applied_lsn`` is applied.

        Args:
            after: LSN captured when the last write went past the journal; 0 when none did. Records up to it
                must be vaulted, see above.
        """
        # Records sent before tracking were not remembered: no read may be older than the last of them.
        tracked_from = self._tracked_from
        return tracked_from is not None and applied_lsn >= tracked_from and self.vaulted_lsn >= after

    @property
    def tracking(self) -> bool:
        """Records are remembered: copies are under way or waiting, or `forget` was not called."""
        return self._tracked_from is not None

    def forget(self) -> None:
        """Stop remembering records, unless a copy is still under way or waiting."""
        if not self._floors and not self._accepted:
            self._tracked_from = None
            self._records.clear()

    def sent(self, first_lsn: int, records: Records) -> None:
        """The records of one batch were put into the stream; ``records`` is not kept."""
        self._sent = first_lsn + len(records) - 1
        if self._tracked_from is None:
            return
        ranged = np.flatnonzero(records["type"] <= ZERO)
        if not len(ranged):
            return
        rows = records[ranged]
        starts = rows["offset"].astype(np.uint64)
        self._records.append(
            (ranged.astype(np.uint64) + np.uint64(first_lsn), starts, starts + rows["length"])
        )

    def jump(self, lsn: int) -> bool:
        """The stream goes on behind ``lsn`` without the records up to it: a new incarnation begins there.

        Returns:
            False when copies from before the gap are under way or wait for their place. Nothing was changed
            then: the stream must not go on in this session.
        """
        if lsn <= self._sent:
            return True
        if self._floors or self._accepted:
            return False
        if self._tracked_from is not None:
            self._tracked_from = lsn
            self._records.clear()
        self._gaps.append((self._sent, lsn))
        self._sent = self.previous_cut = lsn
        self.vaulted(self.vaulted_lsn)
        return True

    def reading(self, work: object, applied_lsn: int) -> None:
        """From now on reads of ``work`` may happen, none older than ``applied_lsn``."""
        assert self._tracked_from is not None
        assert applied_lsn >= self._tracked_from
        self._floors[work] = applied_lsn

    def read(self, work: object) -> None:
        """No COPY of ``work`` will be accepted any more."""
        self._floors.pop(work, None)

    def vaulted(self, lsn: int) -> None:
        """A cut at ``lsn`` is vaulted."""
        self.vaulted_lsn = max(self.vaulted_lsn, lsn)
        # Of a gap nothing will come: once all before it is vaulted, so is all up to its end. Not earlier, or
        # what is sent and not yet vaulted would lie over copies that are newer.
        while self._gaps and self._gaps[0][0] <= self.vaulted_lsn:
            self.vaulted_lsn = max(self.vaulted_lsn, self._gaps.popleft()[1])

    def seen(self, captured_lsn: int) -> None:
        """A read that counts (sent as COPY, or found SAME) ended while this was the captured LSN."""
        self.copy_end = max(self.copy_end, captured_lsn)

    def accepted(self, copy: AcceptedCopy) -> None:
        """The server has the blocks of ``copy``; the next cut places it."""
        assert self._tracked_from is not None
        assert copy.applied_lsn >= self._tracked_from
        self._accepted.append(copy)

    @property
    def waiting(self) -> int:
        """COPYs accepted and not yet placed."""
        return len(self._accepted)

    @property
    def remembered(self) -> int:
        """Records remembered; a gauge."""
        return sum(len(lsns) for lsns, _, _ in self._records)

    # --- the cut ---

    def cut(
        self, lsn: int, *, copies_max: int = COPIES_MAX, cut_outs_max: int = CUT_OUTS_MAX
    ) -> list[PlacedCopy]:
        """Every record up to ``lsn`` was sent: return the copies that this cut's MARK names.

        Copies beyond the bounds wait for the next cut, with more cut out of them by then.
        """
        assert lsn >= self.previous_cut
        copies = [self._accepted.popleft() for _ in range(min(copies_max, len(self._accepted)))]
        placed: list[PlacedCopy] = []
        pairs = 0
        for copy, cut_outs in zip(copies, self._cut_outs(copies), strict=True):
            if placed and pairs + len(cut_outs) > cut_outs_max:
                self._accepted.extendleft(reversed(copies[len(placed) :]))
                break
            pairs += len(cut_outs)
            placed.append(PlacedCopy(copy, cut_outs))
        self.previous_cut = lsn
        self._prune()
        return placed

    def _prune(self) -> None:
        oldest = min([*self._floors.values(), *(copy.applied_lsn for copy in self._accepted)], default=None)
        if oldest is None:
            # Reads that begin later begin at an applied LSN that `reading` will hold against this.
            return
        while self._records and int(self._records[0][0][-1]) <= oldest:
            self._records.popleft()

    def _cut_outs(self, copies: Sequence[AcceptedCopy]) -> list[Pairs]:
        """For each copy, the parts that records in (its applied LSN, previous cut] touch."""
        if not copies:
            return []
        oldest = min(copy.applied_lsn for copy in copies)
        parts = [part for part in self._records if int(part[0][-1]) > oldest]
        if not parts:
            return [()] * len(copies)
        lsns, starts, ends = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        wanted = (lsns > np.uint64(oldest)) & (lsns <= np.uint64(self.previous_cut))
        lsns, starts, ends = lsns[wanted], starts[wanted], ends[wanted]
        order = np.argsort(starts, kind="stable")
        lsns, starts, ends = lsns[order], starts[order], ends[order]
        longest = int((ends - starts).max(initial=0))
        return [_cut_out(copy, lsns, starts, ends, longest) for copy in copies]


def _cut_out(copy: AcceptedCopy, lsns: _Lsns, starts: _Lsns, ends: _Lsns, longest: int) -> Pairs:
    """The merged parts of ``copy`` below records newer than it; ``starts`` is sorted."""
    begin, end = copy.offset, copy.offset + copy.length
    # A plain int would turn both sides into float64.
    first, last = np.searchsorted(
        starts, np.array([max(0, begin - longest), end], np.uint64), "left"
    ).tolist()
    touching = (lsns[first:last] > np.uint64(copy.applied_lsn)) & (ends[first:last] > np.uint64(begin))
    merged: list[list[int]] = []
    for start, stop in zip(
        starts[first:last][touching].tolist(), ends[first:last][touching].tolist(), strict=True
    ):
        start, stop = max(start, begin), min(stop, end)
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return tuple((start, stop - start) for start, stop in merged)
