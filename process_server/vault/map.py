"""The map of a volume: where every extent of it lies, at one LSN, and how rows are laid over one another.

A commit says what changed; a map says what is. Reading a volume at a point is one map and the few commits
after it, whatever the age of the chain. A map is cut into regions of 256 MiB, each a section of its own, so
that the first block of a volume of any size costs one head and one region.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
from blake3 import blake3

from farshore.compression import LEVEL, codec
from farshore.errors import Conflict, IntegrityError, NotFound, WrongKey
from farshore.ids import ID_BYTES, id_to_hex
from process_server.vault.changes import Overlay, PackRef, PackTable, Renumbering, read_changes
from process_server.vault.commit import NO_ROWS, ROW_DTYPE, SEQ_MAX, Rows, commit_name
from process_server.vault.keys import VaultKeys
from process_server.vault.root import check_format
from process_server.vault.rows import REGION_BYTES, by_region, clip, ends, joined, overlay, without_zeros
from process_server.vault.seal import (
    HEADER_BYTES,
    SECTION_BYTES_MAX,
    TABLE_DTYPE,
    TAG_BYTES,
    Kind,
    SealedObject,
    Sealer,
    first_section,
    header_digest,
)
from process_server.vault.store.protocol import AlreadyExists, Store

# Not structlog: it takes 0.17 s to import, of the second that an export has; daemons lead this to it.
_log: Final = logging.getLogger(__name__)

MAP_COMMITS_MIN: Final = 1024
MAP_COMMITS_MAX: Final = 4096
MAP_SECONDS_MAX: Final = 900.0
MAP_ROWS_MAX: Final = 2_000_000
MAP_SHARE: Final = 0.25
"""When a map is due: see `map_due` and docs/decisions."""
_NO_ID: Final = bytes(32)

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
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


class MapHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a map object (docs/formats/vault.md, "Map").

    Attributes:
        commit_header: `header_digest` of commit ``seq``: the history that this is a map of. None in old maps.
    """

    format: int = 1
    machine: _Id
    volume: _Id
    seq: _Count
    commit_header: _Digest | None = None
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
    commit_header: bytes | None,
    lsn: int,
    size_bytes: int,
    regions: Iterable[tuple[int, Rows]],
    packs: Sequence[PackRef],
    points: Iterable[MapPoint] = (),
) -> bytes:
    """Return a sealed map.

    Args:
        commit_header: As in `MapHead`.
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
        commit_header=commit_header,
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

    A damaged map is passed over for the one before: it only repeats what the commits say. So is the map of
    another history, left where a chain was rolled back and went on differently.

    Raises:
        WrongKey: The maps are sealed for another key.
    """
    prefix = map_prefix(machine, volume)
    seqs = [int(tail) for name in store.list(prefix) if (tail := name[len(prefix) :]).isdigit()]
    for seq in sorted((seq for seq in seqs if seq <= at_or_below_seq), reverse=True):
        try:
            found = MapReader.open(store, keys, machine, volume, seq)
        except WrongKey:
            raise
        except (IntegrityError, NotFound) as exc:
            _log.warning("map passed over: %s", exc)
            continue
        if not _is_of_another_history(store, keys, found):
            return found
        _log.warning("map passed over: %s is of another commit than the one there", found.name)
    return None


def _is_of_another_history(store: Store, keys: VaultKeys, found: MapReader) -> bool:
    """Tell whether the commit that ``found`` was made after lies there no more, but another one."""
    head = found.head
    if head.commit_header is None:
        return False
    name = commit_name(head.machine, head.seq)
    try:
        if header_digest(store.get_range(name, 0, HEADER_BYTES)) == head.commit_header:
            return False
        SealedObject.open(store, keys, Kind.COMMIT, name)
    except (IntegrityError, NotFound):
        # Retired or damaged: a map is there to do without it. The commit after it names it, too.
        return False
    return True


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
        WrongKey, IntegrityError: An object is not ours or damaged, or the chain is broken.
    """
    table = PackTable()
    newer = Overlay(table)
    points: list[MapPoint] = []
    first = previous_map.head.seq + 1 if previous_map is not None else 1
    at = (previous_map.head.lsn, previous_map.head.size_bytes) if previous_map is not None else None
    header = previous_map.head.commit_header if previous_map is not None else None
    for change in read_changes(store, keys, machine, first, up_to_seq, before=header):
        header = change.header_digest
        found = change.over(volume, at[1] if at is not None else None)
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
        commit_header=header,
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
        Conflict: One is there already, of another history: nobody reads it, a later commit gets the next.
        As `build_map` and `Store.put_new`; Unreachable: trying again is safe.
    """
    body = build_map(store, keys, machine, volume, up_to_seq, previous_map)
    try:
        store.put_new(map_name(machine, volume, up_to_seq), body)
    except AlreadyExists:
        # An earlier try of ours, or of whom we took over from: all say the same of the same commits.
        found = MapReader.open(store, keys, machine, volume, up_to_seq)
        if not _is_of_another_history(store, keys, found):
            return found
        raise Conflict(
            "cannot store the map", where=found.name, why="one of another history has its name"
        ) from None
    return MapReader.parse(keys, machine, volume, up_to_seq, body)
