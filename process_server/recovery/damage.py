"""Which recovery points damaged objects take away, exactly: the chain is walked as recovery walks it."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from farshore.errors import IntegrityError, NotFound
from farshore.ids import id_to_hex
from process_server.recovery.points import ChainReader
from process_server.vault.changes import Change, PackRef, PackTable, Renumbering
from process_server.vault.commit import NO_ROWS, ZEROS, CommitVolume, Rows, point_id
from process_server.vault.map import MapReader
from process_server.vault.rows import clip, ends, overlay


class BadChunks:
    """Chunks that cannot be read, by the pack that holds them."""

    def __init__(self) -> None:
        self._bad: dict[PackRef, frozenset[int] | None] = {}
        self._holders: set[int] = set()

    def add(self, pack: PackRef, chunks: Set[int] | None) -> None:
        """None: nothing of the pack can be read."""
        known = self._bad.get(pack, frozenset())
        self._bad[pack] = None if chunks is None or known is None else known | frozenset(chunks)

    def add_commit(self, seq: int) -> None:
        """Nothing that travels inside of this commit can be read; maps may need it still."""
        self._holders.add(seq)

    def __bool__(self) -> bool:
        return bool(self._bad or self._holders)

    def among(self, rows: Rows, packs: Sequence[PackRef]) -> npt.NDArray[np.bool_]:
        """Which of ``rows``, whose pack column counts in ``packs``, need one of these chunks."""
        found = np.zeros(len(rows), np.bool_)
        for number in np.unique(rows["pack"][rows["pack"] != ZEROS]).tolist():
            pack, own = packs[number], rows["pack"] == number
            chunks = None if pack.holder in self._holders else self._bad.get(pack, frozenset())
            found |= own if chunks is None else own & np.isin(rows["chunk"], sorted(chunks))
        return found


@dataclass(frozen=True, slots=True)
class Affected:
    """Points at which a volume cannot be recovered.

    Attributes:
        spans: First and last point of each unbroken run of them, by number.
        extents: What is lost at the newest of them, as (offset, length); None: all of it, for nobody knows.
    """

    machine: bytes
    machine_name: str
    volume: str
    points: int
    spans: tuple[tuple[int, int], ...]
    extents: tuple[tuple[int, int], ...] | None

    def as_dict(self) -> dict[str, object]:
        """As ``vault check --json`` prints it."""
        return {
            "machine": self.machine_name,
            "volume": self.volume,
            "points": self.points,
            "spans": self.spans_as_ids(),
            "extents": self.extents,
        }

    def spans_as_ids(self) -> list[dict[str, str]]:
        """The spans by the points' ids."""
        return [
            {"first": point_id(self.machine, first), "last": point_id(self.machine, last)}
            for first, last in self.spans
        ]


@dataclass(slots=True)
class _Volume:
    """A volume on the way through the chain.

    Attributes:
        bad: What it holds now that cannot be read.
        cut_off: A commit since its newest usable map cannot be read: nobody knows what it holds.
        points: Numbers of the points affected.
        lost: What could not be read at the newest of them; None: nobody knows.
    """

    id: bytes
    name: str
    bad: Rows = field(default_factory=lambda: NO_ROWS)
    cut_off: bool = False
    points: list[int] = field(default_factory=list)
    lost: Rows | None = None


def affected_points(
    chain: ChainReader,
    unreadable: Set[int],
    bad: BadChunks,
    good_maps: Mapping[bytes, Sequence[int]],
    wrong_maps: Mapping[bytes, Sequence[int]],
) -> list[Affected]:
    """Return for each volume of a machine the points at which it cannot be recovered whole.

    Args:
        unreadable: Numbers of commits that recovery cannot use.
        bad: Chunks that cannot be read.
        good_maps: Volume id to the numbers of maps that can be used in place of the commits up to there.
        wrong_maps: The same of maps that recovery would use, and should not.
    """
    walk = _Walk(chain, bad, good_maps, wrong_maps)
    for seq in range(1, chain.newest() + 1):
        walk.step(seq, _readable(chain, seq) if seq not in unreadable else None)
    return walk.result()


class _Walk:
    def __init__(
        self,
        chain: ChainReader,
        bad: BadChunks,
        good_maps: Mapping[bytes, Sequence[int]],
        wrong_maps: Mapping[bytes, Sequence[int]],
    ) -> None:
        self._chain, self._bad, self._good_maps, self._wrong_maps = chain, bad, good_maps, wrong_maps
        self._table = PackTable()
        self._positions: dict[int, int] = {}
        self._machine_name = id_to_hex(chain.machine)
        self._volumes: dict[bytes, _Volume] = {}
        self._last_unreadable = 0
        self._run: list[int] = []

    def step(self, seq: int, change: Change | None) -> None:
        """Go on to commit ``seq``; None: it cannot be read."""
        if change is None:
            self._last_unreadable = seq
            self._run.append(seq)
            for volume in self._volumes.values():
                volume.cut_off = True
        else:
            self._machine_name = change.head.machine_name
            for entry in change.head.volumes:
                if entry.id not in self._volumes:
                    self._volumes[entry.id] = self._first_seen(seq, entry)
                self._apply(self._volumes[entry.id], change)
            self._run = []
        for volume in self._volumes.values():
            self._pass_map(volume, seq)
        if change is None or change.head.kind == "data":
            self._point(seq, change)

    def _first_seen(self, seq: int, entry: CommitVolume) -> _Volume:
        """Nobody can say that a volume did not begin in a commit that cannot be read; only a map can."""
        volume = _Volume(entry.id, entry.name, cut_off=self._last_unreadable > 0, points=list(self._run))
        maps = [*self._good_maps.get(entry.id, ()), *self._wrong_maps.get(entry.id, ())]
        newest = max((number for number in maps if number < seq), default=0)
        if newest >= self._last_unreadable:
            self._pass_map(volume, newest)
        return volume

    def _apply(self, volume: _Volume, change: Change) -> None:
        found = change.of(volume.id)
        assert found is not None
        entry, rows = found
        volume.name = entry.name
        volume.bad = self._lay_over(volume.bad, rows, change.packs, entry.size_bytes)

    def _pass_map(self, volume: _Volume, seq: int) -> None:
        """A usable map takes the place of all commits up to ``seq``; one that lies, too."""
        if seq in self._wrong_maps.get(volume.id, ()):
            volume.cut_off = True
        elif volume.cut_off and seq in self._good_maps.get(volume.id, ()):
            volume.bad, volume.cut_off = self._bad_in_map(volume.id, seq), False

    def _lay_over(self, bad: Rows, rows: Rows, packs: Sequence[PackRef], size_bytes: int) -> Rows:
        if not len(bad) and not self._bad.among(rows, packs).any():
            return NO_ROWS
        newer = rows.copy()
        Renumbering(packs, self._table).apply(newer)
        left = clip(overlay(np.concatenate((clip(bad, 0, size_bytes), newer))), 0, size_bytes)
        kept: Rows = left[self._bad.among(left, self._table.packs)]
        return kept

    def _bad_in_map(self, volume: bytes, seq: int) -> Rows:
        reader = MapReader.open(self._chain.store, self._chain.keys, self._chain.machine, volume, seq)
        renumber = Renumbering(reader.head.packs, self._table)
        parts = [NO_ROWS]
        for region in reader.head.regions:
            rows = reader.region(region).copy()
            renumber.apply(rows)
            parts.append(rows[self._bad.among(rows, self._table.packs)])
        return np.concatenate(parts)

    def _point(self, seq: int, change: Change | None) -> None:
        self._positions[seq] = len(self._positions)
        listed = [entry.id for entry in change.head.volumes] if change is not None else self._volumes
        for id in listed:
            volume = self._volumes[id]
            if change is None or volume.cut_off or len(volume.bad):
                volume.points.append(seq)
                volume.lost = None if change is None or volume.cut_off else volume.bad

    def result(self) -> list[Affected]:
        return [
            Affected(
                self._chain.machine,
                self._machine_name,
                volume.name,
                len(volume.points),
                tuple(self._spans(volume.points)),
                _extents(volume.lost),
            )
            for volume in sorted(self._volumes.values(), key=lambda volume: volume.name)
            if volume.points
        ]

    def _spans(self, points: list[int]) -> list[tuple[int, int]]:
        """Join points that have no other between them."""
        spans: list[tuple[int, int]] = []
        for seq in points:
            if spans and self._positions[seq] == self._positions[spans[-1][1]] + 1:
                spans[-1] = spans[-1][0], seq
            else:
                spans.append((seq, seq))
        return spans


def _extents(rows: Rows | None) -> tuple[tuple[int, int], ...] | None:
    """Offset and length of each unbroken run of sorted ``rows``."""
    if rows is None:
        return None
    start, end = rows["offset"].astype(np.int64), ends(rows)
    first = np.flatnonzero(np.concatenate(([True], start[1:] != end[:-1])))
    last = np.concatenate((first[1:] - 1, [len(rows) - 1]))
    return tuple(zip(start[first].tolist(), (end[last] - start[first]).tolist(), strict=True))


def _readable(chain: ChainReader, seq: int) -> Change | None:
    try:
        return chain.change(seq)
    except (IntegrityError, NotFound):
        return None
