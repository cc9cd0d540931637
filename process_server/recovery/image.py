"""A volume as it was at a point: what lies where, and the bytes. Opened at once, whatever its size."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from farshore.errors import IntegrityError, NotFound
from farshore.units import MIB
from process_server.recovery.points import ChainReader, Cut, Point, missing
from process_server.vault.changes import (
    Change,
    PackRef,
    PackTable,
    Renumbering,
    check_link,
    read_change,
    read_changes,
)
from process_server.vault.commit import NO_ROWS, Rows, commit_name
from process_server.vault.keys import VaultKeys
from process_server.vault.map import newest_map
from process_server.vault.pack import PackReader, pack_name
from process_server.vault.rows import REGION_BYTES, by_region, clip, ends, joined, overlay, without_zeros
from process_server.vault.seal import Kind, SealedObject
from process_server.vault.store import Store

# Not structlog, as in `process_server.vault.map`.
_log: Final = logging.getLogger(__name__)

CHUNK_CACHE_BYTES: Final = 64 * MIB
INLINE_CACHE_BYTES: Final = 64 * MIB
REGION_ROWS_MAX: Final = 1_000_000
"""Rows of regions that stay loaded: 48 MB."""


class Piece(NamedTuple):
    """A run of one kind: ``is_data`` False reads as zeros and is stored nowhere."""

    offset: int
    length: int
    is_data: bool


class ChunkSource:
    """Gets chunks by where a map or commit says they lie: in a pack, or in one that a commit carries.

    May be used by several threads.

    Args:
        machine: Whose commits are meant by a holder.
    """

    def __init__(
        self, store: Store, keys: VaultKeys, machine: bytes, *, cache_bytes: int = CHUNK_CACHE_BYTES
    ) -> None:
        self._store, self._keys, self._machine = store, keys, machine
        self._packs = PackReader(store, keys, cache_bytes)
        self._lock = threading.Lock()
        self._inline: OrderedDict[PackRef, tuple[PackReader, int]] = OrderedDict()
        self._inline_bytes = 0

    def read(self, pack: PackRef, indexes: Sequence[int]) -> list[bytes]:
        """Return the plaintext of chunks of one pack, authenticated, in the order asked for.

        Raises:
            IntegrityError: The pack is missing, damaged or has no such chunk.
            WrongKey: It is not one of ours.
        """
        try:
            reader = self._packs if pack.holder is None else self._inline_reader(pack, pack.holder)
            return reader.read_chunks(pack.id, indexes)
        except NotFound as exc:
            where = pack_name(pack.id) if pack.holder is None else commit_name(self._machine, pack.holder)
            raise IntegrityError("an object of the vault is missing", where=where) from exc

    def _inline_reader(self, pack: PackRef, holder: int) -> PackReader:
        with self._lock:
            if found := self._inline.get(pack):
                self._inline.move_to_end(pack)
                return found[0]
        body = inline_pack(self._store, self._keys, self._machine, holder, pack.id)
        reader = PackReader.from_inline(self._keys, {pack.id: body}, 2 * len(body) + MIB)
        with self._lock:
            if pack not in self._inline:
                # The chunks it will keep count too: about what the pack holds, uncompressed.
                cost = 4 * len(body)
                self._inline[pack] = (reader, cost)
                self._inline_bytes += cost
                while self._inline_bytes > INLINE_CACHE_BYTES and len(self._inline) > 1:
                    self._inline_bytes -= self._inline.popitem(last=False)[1][1]
        return reader


def inline_pack(store: Store, keys: VaultKeys, machine: bytes, seq: int, pack: bytes) -> bytes:
    """Return the bytes of a pack that commit ``seq`` carries, without the others. Raises NotFound."""
    sealed = SealedObject.open(store, keys, Kind.COMMIT, commit_name(machine, seq))
    for entry in read_change(store, keys, machine, seq).head.packs:
        if entry.id == pack and entry.inline is not None:
            return sealed.section(entry.inline)
    raise NotFound("no such pack in this commit", where=sealed.name)


class VolumeImage:
    """A volume at a cut. `read` and `extents` may be called by several threads.

    Attributes:
        name, volume: The volume's name and id.
        size_bytes: Of the volume at the cut.
        lsn: The last record that is in it.
        packs: What the pack column of `rows` counts in; grows as regions are loaded.
    """

    def __init__(
        self,
        chain: ChainReader,
        cut: Cut,
        name: str,
        *,
        cache_bytes: int = CHUNK_CACHE_BYTES,
    ) -> None:
        """Read the newest map and the commits after it.

        Raises:
            NotFound: There is no such volume.
            WrongKey, IntegrityError: An object is not ours, damaged or missing, or the chain is broken.
        """
        entry = cut.point.volume(name)
        self.name, self.volume = name, entry.id
        self.size_bytes = entry.size_bytes
        self.lsn = entry.lsn if cut.lsn is None else cut.lsn
        self.cut = cut
        self._table = PackTable()
        self.packs = self._table.packs
        self.chunks = ChunkSource(chain.store, chain.keys, chain.machine, cache_bytes=cache_bytes)
        self._lock = threading.RLock()
        self._loaded: OrderedDict[int, Rows] = OrderedDict()
        self._loaded_rows = 0
        last = cut.point.seq
        self._map = newest_map(
            chain.store, chain.keys, chain.machine, entry.id, last if cut.lsn is None else last - 1
        )
        self._renumber = Renumbering(self._map.head.packs, self._table) if self._map is not None else None
        first = self._map.head.seq + 1 if self._map is not None else 1
        self._newer, header = self._rows_after(chain, first, last, cut.lsn)
        _check_place(chain, cut.point, header)
        self._by_region: dict[int, Rows] | None = None
        self._asked = False

    def _rows_after(
        self, chain: ChainReader, first: int, last: int, lsn: int | None
    ) -> tuple[Rows, bytes | None]:
        """Return what commits changed, and the header digest of the last one, None where it is not known."""
        parts: list[Rows] = []
        header = self._map.head.commit_header if self._map is not None else None
        size = self._map.head.size_bytes if self._map is not None else None
        for change in _all_changes(chain, first, last, header):
            header = change.header_digest
            found = change.over(self.volume, size)
            if found is None:
                continue
            entry, rows = found
            size = entry.size_bytes
            if not len(rows):
                continue
            if change.head.seq == last and lsn is not None:
                rows = rows[rows["lsn"] <= lsn]
            rows = rows.copy()
            Renumbering(change.packs, self._table).apply(rows)
            parts.append(rows)
        return np.concatenate(parts) if parts else NO_ROWS, header

    def regions(self) -> list[int]:
        """Return the regions in which data may lie, ascending."""
        with self._lock:
            mapped = self._map.head.regions if self._map is not None else ()
            end = -(-self.size_bytes // REGION_BYTES)
            return sorted(region for region in {*mapped, *self._newer_by_region()} if region < end)

    def rows(self, region: int) -> Rows:
        """Return what lies in a region: sorted, not overlapping, within the volume; no row where zeros are.

        Raises:
            IntegrityError: The map is damaged.
        """
        with self._lock:
            found = self._loaded.get(region)
            if found is not None:
                self._loaded.move_to_end(region)
                return found
            rows = self._load(region)
            self._loaded[region] = rows
            self._loaded_rows += len(rows)
            while self._loaded_rows > REGION_ROWS_MAX and len(self._loaded) > 1:
                self._loaded_rows -= len(self._loaded.popitem(last=False)[1])
            return rows

    def _load(self, region: int) -> Rows:
        parts = []
        if self._map is not None and self._renumber is not None:
            base = self._map.region(region).copy()
            self._renumber.apply(base)
            parts.append(base)
        parts.append(self._newer_in(region))
        start = region * REGION_BYTES
        flat = overlay(np.concatenate(parts))
        return joined(without_zeros(clip(flat, start, min(start + REGION_BYTES, self.size_bytes))))

    def _newer_in(self, region: int) -> Rows:
        # One pass over all rows is less than sorting them: the first block should not wait for the last.
        if self._by_region is None and not self._asked:
            self._asked = True
            start = region * REGION_BYTES
            return clip(self._newer, start, start + REGION_BYTES)
        return self._newer_by_region().get(region, NO_ROWS)

    def _newer_by_region(self) -> dict[int, Rows]:
        if self._by_region is None:
            self._by_region = dict(by_region(self._newer))
            self._newer = NO_ROWS
        return self._by_region

    def rows_in(self, offset: int, length: int) -> Rows:
        """Return the rows within a byte range, cut at its edges, sorted."""
        end = min(offset + length, self.size_bytes)
        parts = []
        for region in range(offset // REGION_BYTES, -(-end // REGION_BYTES)):
            rows = self.rows(region)
            low = int(np.searchsorted(ends(rows), offset, side="right"))
            high = int(np.searchsorted(rows["offset"], end, side="left"))
            parts.append(rows[low:high])
        if not parts:
            return NO_ROWS
        return clip(parts[0] if len(parts) == 1 else np.concatenate(parts), offset, end)

    def extents(self, offset: int, length: int) -> list[Piece]:
        """Return the runs of data and of zeros that make up a byte range, in order."""
        end = min(offset + length, self.size_bytes)
        rows = self.rows_in(offset, length)
        pieces: list[Piece] = []
        at = offset
        if len(rows):
            start, stop = rows["offset"].astype(np.int64), ends(rows)
            first = np.flatnonzero(np.concatenate(([True], start[1:] != stop[:-1])))
            last = np.concatenate((first[1:] - 1, [len(rows) - 1]))
            for run_start, run_end in zip(start[first].tolist(), stop[last].tolist(), strict=True):
                if run_start > at:
                    pieces.append(Piece(at, run_start - at, False))
                pieces.append(Piece(run_start, run_end - run_start, True))
                at = run_end
        if at < end:
            pieces.append(Piece(at, end - at, False))
        return pieces

    def read(self, offset: int, length: int) -> bytes:
        """Return a byte range of the volume.

        Raises:
            ValueError: It is not within the volume.
            WrongKey, IntegrityError: An object is not ours, damaged or missing.
        """
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"{length} bytes at {offset} are not within {self.size_bytes}")
        output = bytearray(length)
        for at, piece in read_rows(self.chunks, self.packs, self.rows_in(offset, length)):
            output[at - offset : at - offset + len(piece)] = piece
        return bytes(output)


def _all_changes(chain: ChainReader, first: int, last: int, before: bytes | None) -> Iterator[Change]:
    try:
        yield from read_changes(chain.store, chain.keys, chain.machine, first, last, before=before)
    except NotFound as exc:
        raise missing(exc.where) from exc


def _check_place(chain: ChainReader, point: Point, header: bytes | None) -> None:
    """Check that the commit of ``point`` is the one that was meant by what came before, and by what follows.

    Args:
        header: `Change.header_digest` as the map has it, or the commit when its rows were read.

    Raises:
        WrongKey, IntegrityError: It is another, or cannot be read.
    """
    own = chain.change(point.seq)
    if header is not None and header != own.header_digest:
        raise IntegrityError(
            "the chain is broken",
            where=commit_name(chain.machine, point.seq),
            why="it is not the commit that the map was made after",
        )
    if point.seq == chain.newest():
        return
    try:
        after = chain.change(point.seq + 1)
    except (IntegrityError, NotFound) as exc:
        # Damage further on takes away nothing of this point; who reads the newest one meets it.
        _log.warning("the commit after the point is not readable: %s", exc)
        return
    check_link(after, own.header_digest, own.head.epoch)


def read_rows(chunks: ChunkSource, packs: Sequence[PackRef], rows: Rows) -> "list[tuple[int, memoryview]]":
    """Return the bytes of ``rows`` as (offset in the volume, bytes), sorted by offset.

    The caller bounds the rows: everything they need is in memory at once.

    Raises:
        WrongKey, IntegrityError: As `ChunkSource.read`, or a chunk is shorter than a row says.
    """
    found: list[tuple[int, memoryview]] = []
    for number in np.unique(rows["pack"]).tolist():
        own = rows[rows["pack"] == number]
        indexes, place = np.unique(own["chunk"], return_inverse=True)
        plain = chunks.read(packs[number], indexes.tolist())
        columns = (own["offset"].tolist(), own["length"].tolist(), own["start"].tolist(), place.tolist())
        for offset, length, start, which in zip(*columns, strict=True):
            piece = memoryview(plain[which])[start : start + length]
            if len(piece) != length:
                raise IntegrityError(
                    "a chunk is shorter than the map says", where=pack_name(packs[number].id)
                )
            found.append((offset, piece))
    found.sort(key=lambda entry: entry[0])
    return found
