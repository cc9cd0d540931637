"""Which chunks the vault has, and where: a cache in memory, dropped at every stop and rebuilt from the vault.

It never names a pack whose PUT was not acknowledged, so a hit can go into a commit as it is. Packs that
travel inside commits are not in it: only their own commit may point into them.
"""

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from farshore.errors import IntegrityError, NotFound
from farshore.ids import ID_BYTES
from process_server.vault.pack import PackReader

ENTRIES_MAX: Final = 64_000_000
"""With 64 KiB chunks 4 TiB of distinct data, in about 3 GB."""
ID_PREFIX_BYTES: Final = 16
"""Of the 32 bytes of a chunk id: ids are keyed, so nobody can search for two that agree in 128 bits."""

_SLOTS: Final = 8
_LOAD_MAX: Final = 0.8
_GROWTH: Final = 1.5
_BUCKETS_MIN: Final = 1024
_PLACED_AT_ONCE: Final = 2**18

Location: TypeAlias = tuple[bytes, int]
"""Pack id and index of the chunk in it."""

_U64: TypeAlias = npt.NDArray[np.uint64]
_U32: TypeAlias = npt.NDArray[np.uint32]


class DedupIndex:
    """Chunk id to location, and which machine has sent what. One thread at a time.

    Measured with a million entries of one machine, on one core: 40 to 60 bytes each, the machine's share (a
    quarter) included; to look up 16 ids takes 25 µs, 44 when none is there, 4,096 ids 0.4 µs each; to add a
    pack 3.6 µs per chunk. Growing by half stops everything for 0.2 s per million entries, at
    a peak of 80 bytes each (resident, with 4 million).

    Args:
        entries_max: Beyond it new chunks are stored, but not remembered.
    """

    def __init__(self, entries_max: int = ENTRIES_MAX) -> None:
        self._entries_max = entries_max
        self._table = _Table()
        self._sent: dict[bytes, _Table] = {}
        self._packs: list[bytes] = [b""]  # number 0 marks an empty slot
        self._pack_numbers: dict[bytes, int] = {}
        self.refused_total = 0
        """Chunks not remembered because the index was full."""

    def __len__(self) -> int:
        return self._table.count

    @property
    def memory_bytes(self) -> int:
        """Bytes held by the tables."""
        return self._table.memory_bytes + sum(table.memory_bytes for table in self._sent.values())

    def lookup(self, ids: Sequence[bytes]) -> list[Location | None]:
        """Return where each chunk (ids of 32 bytes) lies, None where that is not known."""
        if not ids:
            return []
        packs, indexes = self._table.find(_keys(ids))
        names = self._packs
        return [
            (names[pack], index) if pack else None
            for pack, index in zip(packs.tolist(), indexes.tolist(), strict=True)
        ]

    def add(self, pack_id: bytes, ids: Sequence[bytes], machine_id: bytes | None = None) -> None:
        """Remember a pack whose PUT was acknowledged.

        A chunk that is known already keeps its first place.

        Args:
            pack_id: The pack, under a name of its own: not one inside a commit.
            ids: All its chunk ids, in order.
            machine_id: Who sent them; None if that is not known.
        """
        if not ids:
            return
        room = self._entries_max - self._table.count
        self.refused_total += max(0, len(ids) - room)
        if room > 0:
            self._table.insert(
                _keys(ids[:room]), self._pack_number(pack_id), np.arange(len(ids[:room]), dtype=np.uint32)
            )
        if machine_id is not None:
            self.note(machine_id, ids)

    def note(self, machine_id: bytes, ids: Sequence[bytes]) -> None:
        """Remember that a machine has sent these chunks: `have` says so to it, and to no other."""
        if not ids:
            return
        sent = self._sent.setdefault(machine_id, _Table(values=False))
        if sent.count < self._entries_max:
            sent.insert(_keys(ids), 1, None)

    def have(self, machine_id: bytes, ids: Sequence[bytes]) -> list[bool]:
        """Tell which chunks are in the vault **and** were sent by this machine itself."""
        sent = self._sent.get(machine_id)
        if sent is None or not ids:
            return [False] * len(ids)
        keys = _keys(ids)
        both = (sent.find(keys)[0] > 0) & (self._table.find(keys)[0] > 0)
        return [bool(answer) for answer in both]

    def has_sent(self, machine_id: bytes) -> bool:
        """Tell whether any chunk of this machine is known: if not, asking it to offer hashes is a waste."""
        return machine_id in self._sent

    def drop_packs(self, pack_ids: Iterable[bytes]) -> None:
        """Forget packs that garbage collection has condemned. Costs a pass over everything."""
        numbers = [number for id in pack_ids if (number := self._pack_numbers.pop(id, None)) is not None]
        if numbers:
            self._table.drop(np.array(numbers, np.uint32))
            for number in numbers:
                self._packs[number] = b""

    def rebuild(
        self, machine_id: bytes, pack_ids: Iterable[bytes], reader: PackReader
    ) -> list[tuple[bytes, Exception]]:
        """Remember the chunks of a machine's packs, as its map and commits name them (not inline ones).

        Reads the index of each pack, one ranged read.

        Returns:
            Packs that are missing or damaged, with the error; their chunks are stored again when they come.

        Raises:
            FarshoreError: Of the store.
        """
        bad: list[tuple[bytes, Exception]] = []
        for pack_id in pack_ids:
            if len(self) >= self._entries_max:
                break
            try:
                ids = reader.index(pack_id).ids
            except (IntegrityError, NotFound) as exc:
                bad.append((pack_id, exc))
                continue
            self.add(pack_id, ids, machine_id)
        return bad

    def _pack_number(self, pack_id: bytes) -> int:
        number = self._pack_numbers.get(pack_id)
        if number is None:
            assert len(pack_id) == ID_BYTES, "a pack id has 16 bytes"
            number = self._pack_numbers[pack_id] = len(self._packs)
            self._packs.append(pack_id)
        return number


class _Table:
    """Open addressing in buckets of 8 slots, a batch at once: numpy is slow by the call, not by the item.

    Nothing is removed but by rebuilding, so the used slots of a bucket come first, and a bucket with a free
    slot ends every search.
    """

    def __init__(self, *, values: bool = True, buckets: int = _BUCKETS_MIN) -> None:
        self._values = values
        self.count = 0
        self._allocate(buckets)

    def _allocate(self, buckets: int) -> None:
        shape = (buckets, _SLOTS)
        self._low = np.zeros(shape, np.uint64)
        # A set of what was sent needs no location, and 64 bits are enough for a hint.
        self._high = np.zeros(shape if self._values else (1, 1), np.uint64)
        self._pack = np.zeros(shape if self._values else (1, 1), np.uint32)
        self._index = np.zeros(shape if self._values else (1, 1), np.uint32)

    @property
    def memory_bytes(self) -> int:
        return sum(column.nbytes for column in (self._low, self._high, self._pack, self._index))

    def find(self, keys: _U64) -> tuple[_U32, _U32]:
        """Return pack number (0: not there) and index for each key (n, 2)."""
        packs, indexes = np.zeros(len(keys), np.uint32), np.zeros(len(keys), np.uint32)
        waiting = np.arange(len(keys))
        buckets = self._bucket(keys)
        while len(waiting):
            wanted = keys[waiting]
            low = self._low[buckets]
            match = low == wanted[:, :1]
            if self._values:
                match &= self._high[buckets] == wanted[:, 1:]
            slot = match.argmax(1)
            rows = np.arange(len(waiting))
            hit = match[rows, slot]
            if self._values:
                packs[waiting[hit]] = self._pack[buckets[hit], slot[hit]]
                indexes[waiting[hit]] = self._index[buckets[hit], slot[hit]]
            else:
                packs[waiting[hit]] = 1
            # Slots fill from the first: the last is free unless the bucket is full.
            on = ~hit & (low[:, -1] != 0)
            waiting, buckets = waiting[on], self._next(buckets[on])
        return packs, indexes

    def insert(self, keys: _U64, pack: int | _U32, indexes: _U32 | None) -> None:
        """Add the keys that are not there; of equal ones in a batch the first."""
        _, first = np.unique(keys[:, 0] if not self._values else _pairs(keys), return_index=True)
        first.sort()
        first = first[self.find(keys[first])[0] == 0]
        keys = keys[first]
        needed = self.count + len(keys)
        if needed > _LOAD_MAX * self._low.size:
            self._grow(needed)
        packs = np.full(len(keys), pack, np.uint32) if isinstance(pack, int) else pack[first]
        self._place(keys, packs, indexes[first] if indexes is not None else None)

    def drop(self, numbers: _U32) -> None:
        """Rebuild without the entries of these packs."""
        self._rebuild(len(self._low), ~np.isin(self._pack, numbers))

    def _grow(self, needed: int) -> None:
        buckets = max(int(len(self._low) * _GROWTH), int(needed / (_LOAD_MAX * _SLOTS)) + 1)
        self._rebuild(buckets, None)

    def _rebuild(self, buckets: int, keep: npt.NDArray[np.bool_] | None) -> None:
        used = self._low != 0
        if keep is not None:
            used &= keep
        low = self._low[used]
        high, packs, indexes = low, low[:0], low[:0]
        if self._values:
            high, packs, indexes = self._high[used], self._pack[used], self._index[used]
        # The old table goes before the new one comes, and what is placed at once is bounded: half the peak.
        del used
        self._allocate(0)
        self.count = 0
        self._allocate(buckets)
        for at in range(0, len(low), _PLACED_AT_ONCE):
            part = slice(at, at + _PLACED_AT_ONCE)
            self._place(np.stack((low[part], high[part]), axis=1), packs[part], indexes[part])

    def _place(self, keys: _U64, packs: _U32, indexes: _U32 | None) -> None:
        """Write keys that are known not to be there."""
        self.count += len(keys)
        waiting = np.arange(len(keys))
        buckets = self._bucket(keys)
        while len(waiting):
            order = np.argsort(buckets, kind="stable")
            waiting, buckets = waiting[order], buckets[order]
            # Several that want one bucket take its free slots one after another.
            starts = np.searchsorted(buckets, buckets, side="left")
            slot = (self._low[buckets] != 0).sum(1) + np.arange(len(buckets)) - starts
            fits = slot < _SLOTS
            at, into, chosen = buckets[fits], slot[fits], waiting[fits]
            self._low[at, into] = keys[chosen, 0]
            if self._values:
                self._high[at, into] = keys[chosen, 1]
                self._pack[at, into] = packs[chosen]
                if indexes is not None:
                    self._index[at, into] = indexes[chosen]
            waiting, buckets = waiting[~fits], self._next(buckets[~fits])

    def _bucket(self, keys: _U64) -> npt.NDArray[np.int64]:
        # No hash: ids are as good as random already.
        return (keys[:, 0] % np.uint64(len(self._low))).astype(np.int64)

    def _next(self, buckets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (buckets + 1) % len(self._low)


def _keys(ids: Sequence[bytes]) -> _U64:
    """Return the first 16 bytes of each id as two numbers, (n, 2); the first never 0: a free slot."""
    keys = np.frombuffer(b"".join(ids), np.uint64).reshape(len(ids), 4)[:, : ID_PREFIX_BYTES // 8].copy()
    keys[keys[:, 0] == 0, 0] = 1
    return keys


def _pairs(keys: _U64) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(keys).view("V16").reshape(len(keys))
