"""What the vault's newest state of a volume has in each aligned block, for the answer SAME. Pure.

One id per block: comparing an OFFER is then one comparison of columns. A block that is not one whole chunk
(small writes lie over it) has no id and is never SAME; the agent sends it, which is right and only costs.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from process_server.vault.commit import ZEROS, Rows

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
        self.block_bytes = block_bytes
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
