"""The map of a volume: where every extent of it lies, at one LSN, and how rows are laid over one another.

A commit says what changed; a map says what is. Reading a volume at a point is one map and the few commits
after it, whatever the age of the chain. A map is cut into regions of 256 MiB, each a section of its own, so
that the first block of a volume of any size costs one head and one region.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from farshore.compression import LEVEL, codec
from farshore.errors import IntegrityError, NotFound, WrongKey
from farshore.ids import ID_BYTES, id_to_hex
from farshore.units import KIB, MIB
from process_server.vault.commit import (
    NO_ROWS,
    ROW_DTYPE,
    SEQ_MAX,
    ZEROS,
    CommitHead,
    CommitVolume,
    Rows,
    commit_name,
)
from process_server.vault.keys import VaultKeys
from process_server.vault.root import check_format
from process_server.vault.seal import (
    HEADER_BYTES,
    SECTION_BYTES_MAX,
    TABLE_DTYPE,
    TAG_BYTES,
    Kind,
    SealedObject,
    Sealer,
    first_section,
)
from process_server.vault.store.protocol import AlreadyExists, Buffer, Store

REGION_BYTES: Final = 256 * MIB

_Numbers = npt.NDArray[np.int64]
# Not structlog: it takes 0.17 s to import, of the second that an export has; daemons lead this to it.
_log: Final = logging.getLogger(__name__)

FOLD_ROWS: Final = 1_000_000
"""Rows newer than the map that are gathered before they are laid over one another: 48 MB."""
MAP_COMMITS_MIN: Final = 1024
MAP_COMMITS_MAX: Final = 4096
MAP_SECONDS_MAX: Final = 900.0
MAP_ROWS_MAX: Final = 2_000_000
MAP_SHARE: Final = 0.25
"""When a map is due: see `map_due` and docs/decisions."""
FIRST_READ_BYTES: Final = 64 * KIB
"""Read of a commit at once: holds the head and the extent table of all but the largest."""
READ_THREADS: Final = 16
BATCH: Final = 16
AHEAD: Final = 32
_NO_ID: Final = bytes(32)

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


_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)]


class MapPoint(msgspec.Struct, frozen=True, array_like=True):
    """A point that a map remembers, so that a list of points need not read its commit.

    Attributes:
        seq: Of the commit.
        time_ns: The server's clock when the cut arrived.
        cut_seq: The agent's number of the cut.
        tag: What the operator called it.
        consistency: ``crash`` or ``fuzzy``.
        lsn: Where the cut passes through this volume.
    """

    seq: _Count
    time_ns: int
    cut_seq: int | None
    tag: str | None
    consistency: str
    lsn: _Count


class PackRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A pack that rows point into.

    Attributes:
        id: The pack's id.
        holder: The commit whose inline section holds it, or None for an object of its own.
    """

    id: _Id
    holder: _Count | None


class MapHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a map object (docs/formats/vault.md, "Map")."""

    format: int = 1
    machine: _Id
    volume: _Id
    seq: _Count
    lsn: _Count
    size_bytes: _Count
    region_bytes: int = REGION_BYTES
    packs: tuple[PackRef, ...]
    regions: tuple[_Count, ...]
    points: tuple[MapPoint, ...] = ()


def map_prefix(machine: bytes, volume: bytes) -> str:
    """Return what the names of a volume's maps begin with."""
    return f"m/{id_to_hex(machine)}/{id_to_hex(volume)}/"


def map_name(machine: bytes, volume: bytes, seq: int) -> str:
    """Return the name of a volume's map after commit ``seq``."""
    return f"{map_prefix(machine, volume)}{seq:020}"


class PackTable:
    """Numbers packs in the order in which rows first need them, so that no pack stays that no row names."""

    def __init__(self) -> None:
        self.packs: list[PackRef] = []
        self._number_of: dict[PackRef, int] = {}

    def number(self, pack: PackRef) -> int:
        """Return the number of ``pack``, a new one if it has none."""
        found = self._number_of.get(pack)
        if found is None:
            found = self._number_of[pack] = len(self.packs)
            self.packs.append(pack)
        return found


class Renumbering:
    """Translates the pack column from a list of packs, which may grow, to a `PackTable`, as they are met."""

    def __init__(self, packs: Sequence[PackRef], table: PackTable) -> None:
        self._packs, self._table = packs, table
        self._new = np.full(len(packs), ZEROS, np.uint32)

    def apply(self, rows: Rows) -> None:
        """Change the pack column of ``rows`` in place. Raises IntegrityError on a pack not in the list."""
        stored = rows["pack"] != ZEROS
        old = rows["pack"][stored]
        if not len(old):
            return
        if int(old.max()) >= len(self._packs):
            raise IntegrityError("a row names a pack that is not listed", why=f"number {int(old.max())}")
        if len(self._new) < len(self._packs):
            more = np.full(len(self._packs) - len(self._new), ZEROS, np.uint32)
            self._new = np.concatenate((self._new, more))
        needed = np.unique(old)
        for number in needed[self._new[needed] == ZEROS].tolist():
            self._new[number] = self._table.number(self._packs[number])
        rows["pack"][stored] = self._new[old]


@dataclass(frozen=True, slots=True)
class Change:
    """What one commit does, without the packs that travel inside of it.

    Attributes:
        head: Of the commit.
        rows: Of all volumes, in the order in which they apply.
    """

    head: CommitHead
    rows: Rows

    @property
    def packs(self) -> list[PackRef]:
        """What the pack column of the rows counts in."""
        seq = self.head.seq
        return [PackRef(pack.id, None if pack.inline is None else seq) for pack in self.head.packs]

    def of(self, volume: bytes) -> tuple[CommitVolume, Rows] | None:
        """Return the entry and the rows of one volume; None when the commit does not list it."""
        at = 0
        for entry in self.head.volumes:
            if entry.id == volume:
                return entry, self.rows[at : at + entry.extents]
            at += entry.extents
        return None


def read_change(store: Store, keys: VaultKeys, machine: bytes, seq: int) -> Change:
    """Return what commit ``seq`` did, by its head and extent table alone.

    The link to the commit before is not checked, since it takes the whole object: the name is part of what
    the seal authenticates, so this is the commit of that number that somebody with our keys wrote.

    Raises:
        NotFound: There is no such commit.
        WrongKey, IntegrityError: It is not ours, damaged, or breaks a rule of the format.
    """
    name = commit_name(machine, seq)
    return _change_in(store, keys, machine, seq, store.get_range(name, 0, FIRST_READ_BYTES))


def read_changes(store: Store, keys: VaultKeys, machine: bytes, first: int, last: int) -> Iterator[Change]:
    """Yield what the commits ``first`` to ``last`` did, in order, reading ahead in several threads.

    A store is waited for far longer than it is computed on what it gives: on a cold disk 16 threads read
    1,023 commits in 0.14 s, where one needed 1.5 s. With an object store it is all there is to gain.
    Memory: `AHEAD` batches of the first 64 KiB of `BATCH` commits.

    Raises:
        NotFound: One of them is missing; its name is in the error.
        WrongKey, IntegrityError: As `read_change`.
    """
    if last - first < BATCH:
        for seq in range(first, last + 1):
            yield read_change(store, keys, machine, seq)
        return

    def fetch(begin: int) -> list[bytes]:
        seqs = range(begin, min(begin + BATCH, last + 1))
        return [store.get_range(commit_name(machine, seq), 0, FIRST_READ_BYTES) for seq in seqs]

    begins = iter(range(first, last + 1, BATCH))
    pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read-commits")
    try:
        waiting = deque(pool.submit(fetch, begin) for begin in islice(begins, AHEAD))
        seq = first
        while waiting:
            starts = waiting.popleft().result()
            for begin in islice(begins, 1):
                waiting.append(pool.submit(fetch, begin))
            for start in starts:
                yield _change_in(store, keys, machine, seq, start)
                seq += 1
    finally:
        pool.shutdown(cancel_futures=True)


def _change_in(store: Store, keys: VaultKeys, machine: bytes, seq: int, start: bytes) -> Change:
    name = commit_name(machine, seq)
    first = memoryview(start)

    def fetch(at: int, length: int) -> Buffer:
        return first[at : at + length] if at + length <= len(first) else store.get_range(name, at, length)

    sealed = SealedObject(keys, Kind.COMMIT, name, fetch, first)
    check_format(sealed.head, name)
    try:
        head = msgspec.msgpack.decode(sealed.head, type=CommitHead)
    except msgspec.MsgspecError as exc:
        raise IntegrityError("cannot read the commit", where=name, why=str(exc)) from exc
    table = sealed.section(1)
    rows = np.frombuffer(table, ROW_DTYPE) if len(table) % ROW_DTYPE.itemsize == 0 else NO_ROWS
    sound = (
        (head.machine, head.seq) == (machine, seq)
        and len(rows) * ROW_DTYPE.itemsize == len(table)
        and sum(entry.extents for entry in head.volumes) == len(rows)
        and bool(rows["length"].all())
    )
    if not sound:
        raise IntegrityError("cannot read the commit", where=name, why="its head and its extent table differ")
    return Change(head, rows)


class Overlay:
    """Rows newer than a map, gathered commit by commit and folded now and then; memory stays bounded by
    what is different, not by how often it was written.

    Attributes:
        table: What the pack columns of the rows count in.
    """

    def __init__(self, table: PackTable) -> None:
        self.table = table
        self._pending: list[Rows] = []
        self._pending_rows = 0
        self._fold_at = FOLD_ROWS

    def add(self, rows: Rows, packs: Sequence[PackRef]) -> None:
        """Take the next rows, whose pack column counts in ``packs``; they are copied.

        Raises:
            IntegrityError: A row names a pack that is not listed.
        """
        if not len(rows):
            return
        rows = rows.copy()
        Renumbering(packs, self.table).apply(rows)
        self._pending.append(rows)
        self._pending_rows += len(rows)
        if self._pending_rows > self._fold_at:
            folded = self.rows()
            # What does not shrink is not folded again until as much has come on top of it.
            self._fold_at = len(folded) + FOLD_ROWS

    def rows(self) -> Rows:
        """Return the rows that are left, sorted, not overlapping; rows of zeros among them."""
        if len(self._pending) > 1 or self._pending_rows:
            folded = overlay(np.concatenate(self._pending))
            self._pending, self._pending_rows = [folded], len(folded)
        return self._pending[0] if self._pending else NO_ROWS


class MapReader:
    """A stored map: its head at once, its regions one by one. May be used by several threads.

    Attributes:
        head: What it is a map of, and which packs and regions it has.
        bytes_total: Length of the object.
    """

    def __init__(self, sealed: SealedObject) -> None:
        self._sealed = sealed
        self.name = sealed.name
        self.bytes_total = sealed.bytes_total
        check_format(sealed.head, sealed.name)
        try:
            self.head = msgspec.msgpack.decode(sealed.head, type=MapHead)
        except msgspec.MsgspecError as exc:
            raise self._damaged(str(exc)) from exc
        if self.head.region_bytes != REGION_BYTES or len(self.head.regions) != len(sealed):
            raise self._damaged(f"{len(self.head.regions)} regions in {len(sealed)} sections")
        self._section_of = {region: index for index, region in enumerate(self.head.regions, start=1)}
        if len(self._section_of) != len(sealed):
            raise self._damaged("a region twice")

    @classmethod
    def open(cls, store: Store, keys: VaultKeys, machine: bytes, volume: bytes, seq: int) -> "MapReader":
        """Read the head of a map: one request, or two when it is long.

        Raises:
            NotFound: There is no such map.
            WrongKey, IntegrityError: It is not ours, damaged, or not the map that its name says.
        """
        reader = cls(SealedObject.open(store, keys, Kind.MAP, map_name(machine, volume, seq)))
        reader._check_is(machine, volume, seq)
        return reader

    @classmethod
    def parse(cls, keys: VaultKeys, machine: bytes, volume: bytes, seq: int, body: bytes) -> "MapReader":
        """Take the whole object from ``body``. Raises WrongKey, IntegrityError."""
        reader = cls(SealedObject.parse(keys, Kind.MAP, map_name(machine, volume, seq), body))
        reader._check_is(machine, volume, seq)
        return reader

    def region(self, index: int) -> Rows:
        """Return the rows of region ``index``: one ranged read, none when nothing lies there.

        Raises:
            IntegrityError: Damaged, or not what a map may hold.
        """
        section = self._section_of.get(index)
        if section is None:
            return NO_ROWS
        plain = self._sealed.section(section)
        if len(plain) % ROW_DTYPE.itemsize:
            raise self._damaged(f"region {index} is not of whole rows")
        rows = np.frombuffer(plain, ROW_DTYPE)
        start, end = rows["offset"], rows["offset"] + rows["length"]
        edge = index * REGION_BYTES
        sound = (
            len(rows) > 0
            and int(start[0]) >= edge
            and int(end[-1]) <= edge + REGION_BYTES
            and bool((rows["length"] > 0).all())
            and bool((rows["length"] <= REGION_BYTES).all())
            and bool((start[1:] >= end[:-1]).all())
            and int(rows["pack"].max()) < len(self.head.packs)
        )
        if not sound:
            raise self._damaged(f"region {index} has rows that overlap, lie outside of it or name no pack")
        return rows

    def _check_is(self, machine: bytes, volume: bytes, seq: int) -> None:
        if (self.head.machine, self.head.volume, self.head.seq) != (machine, volume, seq):
            raise self._damaged("it is another volume's map")

    def _damaged(self, why: str) -> IntegrityError:
        return IntegrityError("cannot read the map", where=self.name, why=why)


def encode_map(
    keys: VaultKeys,
    *,
    machine: bytes,
    volume: bytes,
    seq: int,
    lsn: int,
    size_bytes: int,
    regions: Iterable[tuple[int, Rows]],
    packs: Sequence[PackRef],
    points: Iterable[MapPoint] = (),
) -> bytes:
    """Return a sealed map.

    Args:
        regions: Region and rows, ascending; taken one by one, each compressed before the next is asked for.
        packs: What the rows' pack columns count in; may grow while ``regions`` is consumed. The map lists
            only those that its rows name.
        points: Since the map before.

    Memory: the compressed map twice, and one region.
    """
    name = map_name(machine, volume, seq)
    numbers: list[int] = []
    bodies: list[bytes] = []
    shapes: list[tuple[int, int, int]] = []
    squeeze = codec().compress
    table = PackTable()
    renumber = Renumbering(packs, table)
    for index, rows in regions:
        if not len(rows):
            continue
        rows = rows.copy()
        renumber.apply(rows)
        rows["lsn"] = 0
        rows["time_ns"] = 0
        plain = rows.tobytes()
        if len(plain) > SECTION_BYTES_MAX:
            raise ValueError(f"region {index} has {len(rows)} rows")
        stored, flag = squeeze(plain)
        numbers.append(index)
        bodies.append(bytes(stored))
        shapes.append((len(stored) + TAG_BYTES, len(plain), flag))
    head = MapHead(
        machine=machine,
        volume=volume,
        seq=seq,
        lsn=lsn,
        size_bytes=size_bytes,
        packs=tuple(table.packs),
        regions=tuple(numbers),
        points=tuple(points),
    )
    entries = np.zeros(len(bodies), TABLE_DTYPE)
    if shapes:
        columns = np.array(shapes, np.uint32)
        entries["stored"], entries["plain"], entries["flag"] = columns[:, 0], columns[:, 1], columns[:, 2]
    first = first_section(entries, msgspec.msgpack.encode(head))
    # What the other sections hold is part of the digest that keys the object, as in every sealed object.
    hasher = blake3(first)
    for body in bodies:
        hasher.update(body)
    sealer = Sealer.new(keys, Kind.MAP, name, hasher.digest(), len(bodies) + 1, len(first), LEVEL)
    output = bytearray(HEADER_BYTES + sum(len(body) + TAG_BYTES for body in (first, *bodies)))
    output[:HEADER_BYTES] = sealer.header
    at = HEADER_BYTES
    with memoryview(output) as view:
        for section, body in enumerate((first, *bodies)):
            plain_bytes = shapes[section - 1][1] if section else len(first)
            with view[at : at + len(body) + TAG_BYTES] as target:
                sealer.seal_into(section, body, plain_bytes, _NO_ID, target)
            at += len(body) + TAG_BYTES
    return bytes(output)


def merged_regions(
    base: MapReader | None, newer: Rows, size_bytes: int, table: PackTable
) -> Iterator[tuple[int, Rows]]:
    """Yield region by region what the volume holds: ``base`` under ``newer``, cut at the volume's end.

    Args:
        base: The map before, or None for an empty volume.
        newer: Sorted, not overlapping; its pack column counts in ``table``.
        size_bytes: Of the volume now; what lies beyond is dropped.
        table: What the rows given count in; takes the packs of ``base`` that are met.
    """
    renumber = Renumbering(base.head.packs, table) if base is not None else None
    changed = iter(by_region(newer))
    waiting = next(changed, None)
    for index in sorted({*(base.head.regions if base is not None else ()), *_touched(newer)}):
        rows = NO_ROWS
        if base is not None and renumber is not None:
            rows = base.region(index).copy()
            renumber.apply(rows)
        if waiting is not None and waiting[0] == index:
            rows = overlay(np.concatenate((rows, waiting[1])))
            waiting = next(changed, None)
        rows = joined(without_zeros(clip(rows, 0, size_bytes)))
        if len(rows):
            yield index, rows


def _touched(rows: Rows) -> Iterable[int]:
    if not len(rows):
        return ()
    first = rows["offset"].astype(np.int64) // REGION_BYTES
    last = (ends(rows) - 1) // REGION_BYTES
    touched = set(np.unique(first).tolist())
    for begin, end in zip(first[last > first].tolist(), last[last > first].tolist(), strict=True):
        touched.update(range(begin, end + 1))
    return touched


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


@dataclass(frozen=True, slots=True)
class SinceMap:
    """What has come since the newest map of a volume, or since its first commit.

    Attributes:
        commits: Commits of the chain.
        rows: Rows of this volume in them.
        data_bytes: Stored bytes of packs and commits in them.
        seconds: Age of that map.
        map_bytes: Its length, 0 when there is none.
    """

    commits: int
    rows: int
    data_bytes: int
    seconds: float
    map_bytes: int


def map_due(since: SinceMap) -> bool:
    """Tell whether to write a map now.

    At the latest where the format says, after 4,096 commits or 15 minutes; after 1,024 commits when the map
    stays a quarter of what was stored meanwhile, since every commit behind the map is one that an export must
    read before its first block; after 2 million rows, which bounds the memory it takes to make the map.
    """
    if since.commits == 0:
        return False
    if since.commits >= MAP_COMMITS_MAX or since.seconds >= MAP_SECONDS_MAX or since.rows >= MAP_ROWS_MAX:
        return True
    return since.commits >= MAP_COMMITS_MIN and since.map_bytes <= MAP_SHARE * since.data_bytes


def newest_map(
    store: Store, keys: VaultKeys, machine: bytes, volume: bytes, at_or_below_seq: int
) -> MapReader | None:
    """Return the newest map of a volume that is no later than a commit; None when there is none.

    A damaged map is passed over for the one before: it only repeats what the commits say.

    Raises:
        WrongKey: The maps are sealed for another key.
    """
    prefix = map_prefix(machine, volume)
    seqs = [int(tail) for name in store.list(prefix) if (tail := name[len(prefix) :]).isdigit()]
    for seq in sorted((seq for seq in seqs if seq <= at_or_below_seq), reverse=True):
        try:
            return MapReader.open(store, keys, machine, volume, seq)
        except WrongKey:
            raise
        except (IntegrityError, NotFound) as exc:
            _log.warning("map passed over: %s", exc)
    return None


def build_map(
    store: Store,
    keys: VaultKeys,
    machine: bytes,
    volume: bytes,
    up_to_seq: int,
    previous_map: MapReader | None,
) -> bytes:
    """Return the sealed map of a volume after commit ``up_to_seq``, to be stored by `write_map`.

    Args:
        previous_map: The newest map before, or None to start from the first commit.

    Memory: rows newer than the previous map, folded; the compressed map twice; one region.

    Raises:
        NotFound: A commit in between is missing, or none of them lists the volume.
        WrongKey, IntegrityError: An object is not ours or damaged.
    """
    table = PackTable()
    newer = Overlay(table)
    points: list[MapPoint] = []
    first = previous_map.head.seq + 1 if previous_map is not None else 1
    at = (previous_map.head.lsn, previous_map.head.size_bytes) if previous_map is not None else None
    for change in read_changes(store, keys, machine, first, up_to_seq):
        found = change.of(volume)
        if found is None:
            continue
        entry, rows = found
        newer.add(rows, change.packs)
        at = (entry.lsn, entry.size_bytes)
        head = change.head
        if head.kind == "data":
            points.append(
                MapPoint(head.seq, head.time_ns, head.cut_seq, head.tag, head.consistency, entry.lsn)
            )
    if at is None:
        raise NotFound("no such volume in the chain", where=id_to_hex(volume))
    return encode_map(
        keys,
        machine=machine,
        volume=volume,
        seq=up_to_seq,
        lsn=at[0],
        size_bytes=at[1],
        regions=merged_regions(previous_map, newer.rows(), at[1], table),
        packs=table.packs,
        points=points,
    )


def write_map(
    store: Store,
    keys: VaultKeys,
    machine: bytes,
    volume: bytes,
    up_to_seq: int,
    previous_map: MapReader | None,
) -> MapReader:
    """Make and store the map of a volume after commit ``up_to_seq``; one that is there already is kept.

    Raises:
        As `build_map` and `Store.put_new`; Unreachable: trying again is safe.
    """
    body = build_map(store, keys, machine, volume, up_to_seq, previous_map)
    try:
        store.put_new(map_name(machine, volume, up_to_seq), body)
    except AlreadyExists:
        # An earlier try of ours, or of whom we took over from: all say the same of the same commits.
        return MapReader.open(store, keys, machine, volume, up_to_seq)
    return MapReader.parse(keys, machine, volume, up_to_seq, body)
