"""What the vault's newest state of a volume has in each aligned block, for the answer SAME.

One id per block: comparing an OFFER is then one comparison of columns. A block that is not one whole chunk
(small writes lie over it) has no id and is never SAME; the agent sends it, which is right and only costs.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from process_server.vault.changes import PackRef, read_changes
from process_server.vault.commit import ZEROS, Rows
from process_server.vault.keys import VaultKeys
from process_server.vault.map import newest_map
from process_server.vault.pack import PackReader
from process_server.vault.store import Store

UNKNOWN: Final = b"\xff" * 32
"""No chunk id: those are BLAKE3 outputs, and this one is not among them but for one chance in 2**256."""
_ZERO: Final = bytes(32)

Lookup = Callable[[int, npt.NDArray[np.uint32]], npt.NDArray[np.void]]
"""Pack number and chunk indexes to rows of (id, plain length)."""

PACK_ROW: Final = np.dtype([("id", "V32"), ("length", "<u4")])


class BlockTable:
    """Chunk ids of a volume's aligned blocks.

    Args:
        block_bytes: As the agent offers them (`Policy.chunk_bytes`).
        size_bytes: Of the volume; 32 bytes of memory per block.
    """

    def __init__(self, block_bytes: int, size_bytes: int) -> None:
        self.block_bytes, self.size_bytes = block_bytes, size_bytes
        count = -(-size_bytes // block_bytes)
        self._ids: npt.NDArray[np.void] = np.zeros(count, "V32")

    def apply(self, rows: Rows, lookup: Lookup) -> None:
        """Lay rows (of a map or a commit, in order) over the table; ``lookup`` reads pack indexes."""
        if not len(rows):
            return
        block = np.uint64(self.block_bytes)
        starts, ends = rows["offset"], rows["offset"] + rows["length"]
        end_bytes = np.uint64(len(self._ids)) * block
        ends = np.minimum(ends, end_bytes)
        zeros = rows["pack"] == ZEROS
        whole = (starts % block == 0) & (rows["length"] == block) & ~zeros & (rows["start"] == 0)
        ids = np.full(len(rows), np.void(UNKNOWN), "V32")
        packs = rows["pack"]
        for pack in np.unique(packs[whole]).tolist():
            chosen = np.flatnonzero(whole & (packs == pack))
            found = lookup(pack, rows["chunk"][chosen])
            exact = found["length"] == block
            ids[chosen[exact]] = found["id"][exact]
        # Rows lie over each other in order, so runs of whole blocks are laid at once, the others one by one.
        at = 0
        for index in [*np.flatnonzero(~whole).tolist(), len(rows)]:
            if at < index:
                # Assigning to a repeated index keeps the last value, which is the newest row.
                inside = starts[at:index] < end_bytes
                self._ids[(starts[at:index] // block)[inside].astype(np.int64)] = ids[at:index][inside]
            if index < len(rows) and starts[index] < ends[index]:
                self._lay(int(starts[index]), int(ends[index]), zero=bool(zeros[index]))
            at = index + 1

    def cut_down(self, size_bytes: int) -> None:
        """The volume had this size: nothing is known of what lies beyond, whatever was there before."""
        self._ids[size_bytes // self.block_bytes :] = np.void(UNKNOWN)

    def _lay(self, start: int, end: int, *, zero: bool) -> None:
        first, last = start // self.block_bytes, -(-end // self.block_bytes)
        unknown = np.void(UNKNOWN)
        if not zero:
            self._ids[first:last] = unknown
            return
        whole_first = -(-start // self.block_bytes)
        whole_last = end // self.block_bytes
        if first < whole_first and bytes(self._ids[first]) != _ZERO:
            self._ids[first] = unknown
        if whole_last < last and whole_last >= whole_first and bytes(self._ids[whole_last]) != _ZERO:
            self._ids[whole_last] = unknown
        if whole_first < whole_last:
            self._ids[whole_first:whole_last] = np.void(_ZERO)

    def same(self, offers: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Tell for each row of ``OFFER_DTYPE`` whether the vault has exactly that block there."""
        block = np.uint64(self.block_bytes)
        index = (offers["offset"] // block).astype(np.int64)
        fits = (offers["offset"] % block == 0) & (offers["length"] == block) & (index < len(self._ids))
        answer = np.zeros(len(offers), np.bool_)
        answer[fits] = self._ids[index[fits]] == offers["id"][fits]
        for number in np.flatnonzero(~fits & (offers["id"] == np.void(_ZERO))).tolist():
            # A run of zeros longer than a block, or the last one of the volume.
            start, length = int(offers["offset"][number]), int(offers["length"][number])
            first, last = start // self.block_bytes, -(-(start + length) // self.block_bytes)
            if start % self.block_bytes == 0 and last <= len(self._ids):
                answer[number] = bool((self._ids[first:last] == np.void(_ZERO)).all())
        return answer


def build_table(
    store: Store, keys: VaultKeys, machine: bytes, volume: bytes, seq: int, block_bytes: int, size_bytes: int
) -> BlockTable:
    """Return the table of ``volume`` after commit ``seq``: newest map, then the commits after it. Blocking.

    Raises:
        FarshoreError: Of the store, or what it holds is damaged; nothing is the same then.
    """
    table = BlockTable(block_bytes, size_bytes)
    reader = PackReader(store, keys)
    found = newest_map(store, keys, machine, volume, seq)
    after, before = 0, None
    if found is not None:
        after, before = found.head.seq, found.head.commit_header
        if found.head.size_bytes < size_bytes:
            table.cut_down(found.head.size_bytes)
        for index in found.head.regions:
            table.apply(found.region(index), pack_lookup(reader, found.head.packs))
    extend_table(table, store, keys, machine, volume, after + 1, seq, reader, before)
    return table


def extend_table(
    table: BlockTable,
    store: Store,
    keys: VaultKeys,
    machine: bytes,
    volume: bytes,
    first_seq: int,
    last_seq: int,
    reader: PackReader | None = None,
    before: bytes | None = None,
) -> None:
    """Lay the commits ``first_seq`` to ``last_seq`` over ``table``. Blocking; raises as `build_table`.

    Args:
        before: As in `read_changes`.
    """
    reader = reader or PackReader(store, keys)
    for change in read_changes(store, keys, machine, first_seq, last_seq, before=before):
        part = change.of(volume)
        if part is not None:
            if part[0].size_bytes < table.size_bytes:
                table.cut_down(part[0].size_bytes)
            table.apply(part[1], pack_lookup(reader, change.packs))


def pack_lookup(reader: PackReader, packs: Sequence[PackRef]) -> Lookup:
    """Return how rows whose pack column counts in ``packs`` find chunk ids."""

    def lookup(number: int, chunks: npt.NDArray[np.uint32]) -> npt.NDArray[np.void]:
        found = np.zeros(len(chunks), PACK_ROW)
        ref = packs[number]
        # Inside a commit lie small packs only; to read those back costs more than to copy their blocks again.
        if ref.holder is None:
            index = reader.index(ref.id)
            ids = np.frombuffer(b"".join(index.ids), "V32")
            found["id"] = ids[chunks]
            found["length"] = np.array(index.plain_bytes, "<u4")[chunks]
        return found

    return lookup
