"""Which bytes of a DATA frame become which chunk. Pure.

A record that covers whole aligned blocks has each of them as a chunk of its own, so that the same block
written twice, or copied, is stored once. What is smaller lies in groups: one hash, one zstd frame and one
AEAD call for 32 random writes of 4 KiB instead of 32 (2.5 of 20 us a record; PERFORMANCE, section 6).
No record is dropped for a later one over the same bytes: any LSN can be recovered.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from farshore.errors import CorruptRecord
from farshore.hrl.batch import MARK, RESIZE, WRITE, ZERO, Batch
from farshore.units import KIB, SECTOR_BYTES
from process_server.vault.commit import NO_ROWS, ROW_DTYPE, ZEROS, Rows

Numbers = npt.NDArray[Any]

GROUP_BYTES_MAX: Final = 128 * KIB


class Splitter:
    """Turns the batches of one frame into units, each to be one chunk, and rows that point into them.

    Attributes:
        units: Per unit the views that make up its plaintext, in order; views of the frame.
        size_bytes: The volume's size after the batches so far.
    """

    def __init__(self, chunk_bytes: int, size_bytes: int) -> None:
        self.units: list[list[memoryview]] = []
        self.size_bytes = size_bytes
        self._chunk_bytes = chunk_bytes
        self._parts: list[Rows] = []
        self._group = -1
        self._group_bytes = 0

    def rows(self) -> Rows:
        """Return the rows by LSN: chunk column = number of a unit, pack column = 0, or ZEROS."""
        return np.concatenate(self._parts) if self._parts else NO_ROWS.copy()

    def add(self, batch: Batch) -> None:
        """Take one checked batch.

        Raises:
            CorruptRecord: A record beyond the volume, or not of whole sectors.
        """
        if not batch.count:
            return
        records = batch.records
        types = records["type"]
        offsets, lengths = records["offset"], records["length"]
        lsns = np.arange(batch.first_lsn, batch.first_lsn + batch.count, dtype="<u8")
        lasts = np.cumsum(records["payload_length"], dtype=np.int64)
        chunk_bytes = self._chunk_bytes
        # A whole aligned block inside: the first boundary at or after the start, plus a block, is within.
        boundary = (offsets + np.uint64(chunk_bytes - 1)) // np.uint64(chunk_bytes) * np.uint64(chunk_bytes)
        plain = (types == WRITE) & (boundary + np.uint64(chunk_bytes) > offsets + lengths)
        plain &= lengths <= GROUP_BYTES_MAX
        if not (types == RESIZE).any():
            self._check(offsets, lengths, types, batch.first_lsn)
        special = np.flatnonzero(~plain).tolist()
        at = 0
        for index in [*special, batch.count]:
            if at < index:
                self._small(batch, at, index, offsets, lengths, lsns, lasts)
            at = index + 1
            if index < batch.count:
                end = int(lasts[index])
                start = end - int(records["payload_length"][index])
                self._one(
                    int(types[index]),
                    int(offsets[index]),
                    int(lengths[index]),
                    int(lsns[index]),
                    batch.time_ns,
                    batch.payload[start:end],
                )

    def _check(self, offsets: Numbers, lengths: Numbers, types: Numbers, lsn: int) -> None:
        ranged = types <= ZERO
        if not ranged.any():
            return
        ends = (offsets + lengths)[ranged]
        if int(ends.max()) > self.size_bytes:
            raise CorruptRecord(0, f"a record beyond the volume's {self.size_bytes} bytes, from LSN {lsn} on")
        starts = offsets[ranged]
        loose = ((ends % SECTOR_BYTES != 0) & (ends != self.size_bytes)) | (starts % SECTOR_BYTES != 0)
        if loose.any():
            raise CorruptRecord(0, f"a record that is not of whole sectors, from LSN {lsn} on")

    def _small(
        self,
        batch: Batch,
        first: int,
        end: int,
        offsets: Numbers,
        lengths: Numbers,
        lsns: Numbers,
        lasts: Numbers,
    ) -> None:
        """Put records ``first`` to ``end``, whose payloads lie one after another, into groups."""
        self._check_resized(offsets, lengths, first, end)
        while first < end:
            base = int(lasts[first - 1]) if first else 0
            room = GROUP_BYTES_MAX - self._group_bytes if self._group >= 0 else 0
            count = int(np.searchsorted(lasts[first:end], base + room, side="right"))
            if count == 0:
                self.units.append([])
                self._group, self._group_bytes = len(self.units) - 1, 0
                continue
            upto = first + count
            size = int(lasts[upto - 1]) - base
            rows = np.zeros(count, ROW_DTYPE)
            rows["offset"] = offsets[first:upto]
            rows["length"] = lengths[first:upto]
            rows["lsn"] = lsns[first:upto]
            rows["time_ns"] = batch.time_ns
            rows["chunk"] = self._group
            rows["start"] = (
                lasts[first:upto] - lengths[first:upto].astype(np.int64) - base + self._group_bytes
            )
            self._parts.append(rows)
            self.units[self._group].append(batch.payload[base : base + size])
            self._group_bytes += size
            first = upto

    def _check_resized(self, offsets: Numbers, lengths: Numbers, first: int, end: int) -> None:
        # Only batches with a RESIZE were not checked as a whole; the size may have changed between records.
        if int((offsets[first:end] + lengths[first:end]).max()) > self.size_bytes:
            raise CorruptRecord(0, f"a record beyond the volume's {self.size_bytes} bytes")

    def _one(self, kind: int, offset: int, length: int, lsn: int, time_ns: int, payload: memoryview) -> None:
        if kind == MARK:
            return
        if kind == RESIZE:
            if offset > self.size_bytes:
                # Whatever lay there before the volume was ever cut down, now it reads as zeros.
                self._row(self.size_bytes, offset - self.size_bytes, lsn, time_ns, None)
            self.size_bytes = offset
            return
        if offset + length > self.size_bytes:
            raise CorruptRecord(0, f"LSN {lsn} lies beyond the volume's {self.size_bytes} bytes")
        if kind == ZERO:
            self._row(offset, length, lsn, time_ns, None)
            return
        end = offset + length
        at = offset
        while at < end:
            # Up to the next boundary, whole blocks as they are, and no piece longer than a group.
            stop = min((at // self._chunk_bytes + 1) * self._chunk_bytes, end)
            if stop - at < self._chunk_bytes:
                stop = min(stop, at + GROUP_BYTES_MAX)
            self._row(at, stop - at, lsn, time_ns, payload[at - offset : stop - offset])
            at = stop

    def _row(self, offset: int, length: int, lsn: int, time_ns: int, unit: memoryview | None) -> None:
        row = np.zeros(1, ROW_DTYPE)
        if unit is None:
            row[0] = (offset, length, lsn, time_ns, ZEROS, 0, 0, 0)
        else:
            whole = length == self._chunk_bytes
            if whole or self._group < 0 or self._group_bytes + length > GROUP_BYTES_MAX:
                self.units.append([])
                number, first = len(self.units) - 1, 0
                if not whole:
                    self._group, self._group_bytes = number, length
            else:
                number, first = self._group, self._group_bytes
                self._group_bytes += length
            self.units[number].append(unit)
            row[0] = (offset, length, lsn, time_ns, 0, number, first, 0)
        self._parts.append(row)


def place(rows: Rows, packs: list[int], chunks: list[int]) -> None:
    """Change, in place, unit numbers into (pack, chunk); ``packs`` per unit, ZEROS for a unit of zeros."""
    stored = rows["pack"] != ZEROS
    units = rows["chunk"][stored]
    if not len(units):
        return
    pack_of = np.array(packs, "<u4")[units]
    chunk_of = np.array(chunks, "<u4")[units]
    rows["pack"][stored] = pack_of
    zero = np.flatnonzero(stored)[pack_of == ZEROS]
    rows["chunk"][stored] = chunk_of
    if len(zero):
        rows["chunk"][zero] = 0
        rows["start"][zero] = 0
