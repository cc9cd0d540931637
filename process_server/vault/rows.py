"""Rows of extents: how they are laid over one another, cut and joined. Pure.

A row says that bytes of a volume are bytes of a chunk (docs/formats/vault.md).
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from farshore.units import MIB
from process_server.vault.commit import ZEROS, Rows

REGION_BYTES: Final = 256 * MIB
"""A map is cut into regions of this size."""
_Numbers = npt.NDArray[np.int64]
_DENSE_CELLS_PER_ROW: Final = 8
"""Up to this many cells per row a plain grid is faster than sorting the edges (1 million rows over 2 GiB:
0.18 s against 1.6 s)."""


def ends(rows: Rows) -> _Numbers:
    """Return the first byte after each row."""
    total: _Numbers = rows["offset"].astype(np.int64) + rows["length"].astype(np.int64)
    return total


def overlay(rows: Rows) -> Rows:
    """Return what ``rows``, applied one after another, leave: sorted, not overlapping, the later row wins.

    Rows of zeros stay, since they hide what lies below them; see `without_zeros`. A row that was cut keeps
    its LSN and time, and its first byte inside the chunk moves with its offset. The input is not changed.

    Cost: the last writer of every cell between two edges is a maximum over the rows that cover it. A row
    covers its cells by two blocks of a power of two, the largest blocks are handed down to the next smaller
    ones: log2 of the longest row passes over the cells, none of them in Python.
    """
    count = len(rows)
    if count == 0:
        return rows
    start, end = rows["offset"].astype(np.int64), ends(rows)
    if bool((start[1:] >= end[:-1]).all()):
        return rows
    base, top = int(start.min()), int(end.max())
    bits = int(np.bitwise_or.reduce((start - base) | (end - base)))
    shift = (bits & -bits).bit_length() - 1
    edges: _Numbers | None = None
    if (top - base) >> shift <= _DENSE_CELLS_PER_ROW * count:
        low, high, cells = (start - base) >> shift, (end - base) >> shift, (top - base) >> shift
    else:
        edges, places = np.unique(np.concatenate((start, end)), return_inverse=True)
        low, high, cells = places[:count], places[count:], len(edges) - 1
    won = _last_writer(low, high, cells)
    first = np.flatnonzero(np.concatenate(([True], won[1:] != won[:-1])))
    last = np.concatenate((first[1:], [cells]))
    covered = won[first] >= 0
    first, last = first[covered], last[covered]
    if edges is None:
        return _pieces(rows[won[first]], base + (first << shift), base + (last << shift))
    return _pieces(rows[won[first]], edges[first], edges[last])


def _last_writer(low: _Numbers, high: _Numbers, cells: int) -> npt.NDArray[np.int32]:
    """Return per cell the highest number of a row that covers it, -1 where none does."""
    # frexp is exact below 2**53 cells: the exponent of a length is its number of bits.
    level = np.frexp((high - low).astype(np.float64))[1] - 1
    levels = set(np.unique(level).tolist())
    top = max(levels)
    won = np.full(cells, -1, np.int32)
    for power in range(top, -1, -1):
        if power < top:
            half = 1 << power
            down = won.copy()
            np.maximum(down[half:], won[:-half], out=down[half:])
            won = down
        if power in levels:
            at = np.flatnonzero(level == power)
            numbers = at.astype(np.int32)
            np.maximum.at(won, low[at], numbers)
            np.maximum.at(won, high[at] - (1 << power), numbers)
    return won


def _pieces(rows: Rows, start: _Numbers, end: _Numbers) -> Rows:
    """Cut each row (which the caller gives away) to ``[start, end)``."""
    moved = start - rows["offset"].astype(np.int64)
    rows["start"] = np.where(rows["pack"] == ZEROS, 0, rows["start"] + moved)
    rows["offset"] = start
    rows["length"] = end - start
    return rows


def clip(rows: Rows, start: int, end: int) -> Rows:
    """Return the parts of ``rows`` within ``[start, end)``, in the same order. The input is not changed."""
    if not len(rows):
        return rows
    below, above = rows["offset"].astype(np.int64), ends(rows)
    inside = (below < end) & (above > start)
    if bool(inside.all()) and int(below.min()) >= start and int(above.max()) <= end:
        return rows
    return _pieces(rows[inside], np.maximum(below[inside], start), np.minimum(above[inside], end))


def without_zeros(rows: Rows) -> Rows:
    """Return ``rows`` without those of zeros: where nothing lies, zeros are read."""
    kept: Rows = rows[rows["pack"] != ZEROS]
    return kept


def by_region(rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Yield ``(region, rows)`` for each region that is touched, rows cut at its edges, in their order."""
    if not len(rows):
        return
    start, end = rows["offset"].astype(np.int64), ends(rows)
    first, last = start // REGION_BYTES, (end - 1) // REGION_BYTES
    spread = last - first + 1
    if int(spread.max()) > 1:
        source = np.repeat(np.arange(len(rows)), spread)
        region = first[source] + (np.arange(len(source)) - np.repeat(np.cumsum(spread) - spread, spread))
        edge = region * REGION_BYTES
        rows = _pieces(
            rows[source], np.maximum(start[source], edge), np.minimum(end[source], edge + REGION_BYTES)
        )
    else:
        region = first
    order = np.argsort(region, kind="stable")
    region, rows = region[order], rows[order]
    cuts = np.flatnonzero(region[1:] != region[:-1]) + 1
    for begin, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
        yield int(region[begin]), rows[begin:stop]


def joined(rows: Rows) -> Rows:
    """Return sorted ``rows`` with neighbours that continue one another in the same chunk made one."""
    if len(rows) < 2:
        return rows
    left, right = rows[:-1], rows[1:]
    follows = (
        (left["pack"] == right["pack"])
        & (left["chunk"] == right["chunk"])
        & (ends(left) == right["offset"].astype(np.int64))
        & ((left["start"].astype(np.int64) + left["length"].astype(np.int64)) == right["start"])
        & (right["pack"] != ZEROS)
    )
    if not bool(follows.any()):
        return rows
    starts = np.flatnonzero(np.concatenate(([True], ~follows)))
    out = rows[starts]
    lasts = np.concatenate((starts[1:] - 1, [len(rows) - 1]))
    out["length"] = ends(rows)[lasts] - out["offset"].astype(np.int64)
    return out
