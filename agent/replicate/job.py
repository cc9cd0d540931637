"""The books of one copy job: which extents are to do, under way, placed, vaulted. Pure."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from farshore.units import MIB

UNIT_BYTES: Final = 16 * MIB
"""What a copier is given at a time: with blocks of 128 KiB an OFFER of 128 hashes, 6 KiB."""

Kind = Literal["initial", "resync", "heal"]


@dataclass(frozen=True, slots=True)
class Unit:
    """An extent of the volume; ``index`` is its number in a job over the whole volume."""

    index: int
    offset: int
    length: int


def whole_volume(size_bytes: int, without: frozenset[int] | set[int] = frozenset()) -> list[Unit]:
    """The units of a volume, except those that are vaulted already."""
    return [
        Unit(index, offset, min(UNIT_BYTES, size_bytes - offset))
        for index, offset in enumerate(range(0, size_bytes, UNIT_BYTES))
        if index not in without
    ]


def dirty_units(regions: Iterable[int], region_bytes: int, chunk_bytes: int, size_bytes: int) -> list[Unit]:
    """The units that cover dirty regions (ascending), rounded out to whole chunks."""
    extents: list[list[int]] = []
    for region in regions:
        start = region * region_bytes // chunk_bytes * chunk_bytes
        stop = min(size_bytes, -(-(region + 1) * region_bytes // chunk_bytes) * chunk_bytes)
        if extents and start <= extents[-1][1]:
            extents[-1][1] = stop
        else:
            extents.append([start, stop])
    pieces = (
        (offset, min(UNIT_BYTES, stop - offset))
        for start, stop in extents
        for offset in range(start, stop, UNIT_BYTES)
    )
    return [Unit(index, offset, length) for index, (offset, length) in enumerate(pieces)]


class Job:
    """One pass of copying over one volume.

    A unit is *finished* when every block of it was accepted by the server or found the same there, *safe*
    when every COPY it needed is in a vaulted commit.

    Attributes:
        kind: Why it is done.
        compare: Offer hashes first.
        after: What `CopyRule.ready` is asked with.
        safe: Indexes of safe units.
    """

    def __init__(self, kind: Kind, units: list[Unit], *, compare: bool, after: int) -> None:
        self.kind: Kind = kind
        self.compare, self.after = compare, after
        self.total_bytes = sum(unit.length for unit in units)
        self.finished_bytes = 0
        self.safe: set[int] = set()
        self._todo = deque(units)
        self._busy: dict[int, Unit] = {}
        self._unfinished = len(units)
        self._finished: set[int] = set()
        self._tokens: dict[int, int] = {}
        self._unvaulted: Counter[int] = Counter()

    @property
    def waiting(self) -> bool:
        """There are units that nobody works on."""
        return bool(self._todo)

    @property
    def finished(self) -> bool:
        """Every unit is finished; what was accepted may still wait for its MARK."""
        return not self._unfinished

    @property
    def vaulted(self) -> bool:
        """Every unit is safe."""
        return self.finished and not self._tokens

    @property
    def remaining_bytes(self) -> int:
        return self.total_bytes - self.finished_bytes

    def take(self, work: int) -> Unit | None:
        """Give out the next unit as ``work``; None when there is none left."""
        if not self._todo:
            return None
        unit = self._busy[work] = self._todo.popleft()
        return unit

    def give_back(self, work: int) -> None:
        """Whoever worked on it is gone: it is to do again. COPYs already accepted stay right, and placed."""
        if (unit := self._busy.pop(work, None)) is not None:
            self._todo.appendleft(unit)

    def accepted(self, work: int, token: int) -> None:
        """A COPY of ``work`` was accepted."""
        index = self._busy[work].index
        self._tokens[token] = index
        self._unvaulted[index] += 1

    def done(self, work: int) -> Unit:
        """Nothing of ``work`` is missing on the server."""
        unit = self._busy.pop(work)
        self._unfinished -= 1
        self.finished_bytes += unit.length
        self._finished.add(unit.index)
        self._settle(unit.index)
        return unit

    def token_vaulted(self, token: int) -> None:
        """The commit that took ``token`` is vaulted."""
        index = self._tokens.pop(token, None)
        if index is not None:
            self._unvaulted[index] -= 1
            self._settle(index)

    def _settle(self, index: int) -> None:
        if index in self._finished and not self._unvaulted[index]:
            del self._unvaulted[index]
            self.safe.add(index)
