"""Byte ranges of a volume and the set operations on them. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from farshore.units import SECTOR_BYTES


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Half-open byte range ``[offset, offset + length)`` of one volume.

    Attributes:
        offset: First byte from the start of the volume; a multiple of ``SECTOR_BYTES``.
        length: Bytes covered, more than zero; a multiple of ``SECTOR_BYTES``.

    Raises:
        ValueError: Our own code broke a rule above (peer data is refused earlier, in the codec).
    """

    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length <= 0 or (self.offset | self.length) % SECTOR_BYTES:
            raise ValueError(f"no extent: offset {self.offset}, length {self.length}")

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.length

    def overlaps(self, other: "Extent") -> bool:
        """Tell whether the two share at least one byte."""
        return self.offset < other.end and other.offset < self.end

    def contains(self, other: "Extent") -> bool:
        """Tell whether every byte of ``other`` is in this extent."""
        return self.offset <= other.offset and other.end <= self.end

    def intersect(self, other: "Extent") -> "Extent | None":
        """Return the bytes that both cover, or None when there are none."""
        start, end = max(self.offset, other.offset), min(self.end, other.end)
        return Extent(start, end - start) if start < end else None

    def subtract(self, other: "Extent") -> "list[Extent]":
        """Return what is left of this extent without ``other``: none, one or two extents, in order."""
        if not self.overlaps(other):
            return [self]
        left = []
        if self.offset < other.offset:
            left.append(Extent(self.offset, other.offset - self.offset))
        if other.end < self.end:
            left.append(Extent(other.end, self.end - other.end))
        return left


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Return the fewest extents that cover the same bytes, sorted. The input may overlap, in any order."""
    merged: list[Extent] = []
    start = end = -1
    for extent in sorted(extents):
        if extent.offset > end:
            if end > 0:
                merged.append(Extent(start, end - start))
            start, end = extent.offset, extent.end
        else:
            end = max(end, extent.end)
    if end > 0:
        merged.append(Extent(start, end - start))
    return merged


def subtract(extents: Iterable[Extent], cuts: Iterable[Extent]) -> list[Extent]:
    """Return what of ``extents`` no cut covers, merged and sorted. Both may overlap and be in any order.

    One pass over both after sorting: O((n + m) log(n + m)), where cutting them one by one would be O(n * m).
    """
    left: list[Extent] = []
    holes = merge(cuts)
    first = 0
    for extent in merge(extents):
        while first < len(holes) and holes[first].end <= extent.offset:
            first += 1
        at, index = extent.offset, first
        while index < len(holes) and holes[index].offset < extent.end:
            if at < holes[index].offset:
                left.append(Extent(at, holes[index].offset - at))
            at = holes[index].end
            index += 1
        if at < extent.end:
            left.append(Extent(at, extent.end - at))
    return left


def intersect(extents: Iterable[Extent], others: Iterable[Extent]) -> list[Extent]:
    """Return the bytes that both sides cover, merged and sorted. Both may overlap and be in any order."""
    wanted = merge(extents)
    return subtract(wanted, subtract(wanted, others))


def total_bytes(extents: Iterable[Extent]) -> int:
    """Return the sum of the lengths; bytes covered twice count twice, so `merge` first where that matters."""
    return sum(extent.length for extent in extents)
