"""Write what a killed tap may not have brought to the disk once more, out of the journal."""

from collections.abc import Callable

import numpy as np

from agent.journal.dirty import DirtyMap
from agent.journal.recovery import Recovered, redo_records
from agent.tap.disk import Disk
from agent.tap.vectored import VectoredWriter
from farshore.errors import CorruptRecord
from farshore.failpoints import failpoint
from farshore.hrl.batch import WRITE, ZERO, Batch


def redo(recovered: Recovered, stable_lsn: int, disk: Disk, dirty: DirtyMap, beat: Callable[[], None]) -> int:
    """Write every record above the stable mark to the disk again, but not into dirty regions.

    A dirty region holds writes that no record has, perhaps younger than the record: it is copied as it is.

    Returns:
        How many records were written, wholly or in part; they are durable on the disk.

    Raises:
        JournalGap, CorruptRecord: Records are missing; what was written so far is harmless.
        OSError: The disk refuses.
    """
    writer = VectoredWriter()
    count = 0
    beat()
    try:
        for batch in redo_records(recovered, stable_lsn):
            count += _redo_batch(batch, stable_lsn, disk, dirty, writer, beat)
            beat()
    finally:
        writer.close()
    if count:
        failpoint("tap.open.redo_written")
        disk.sync()
        beat()
    return count


def _redo_batch(
    batch: Batch,
    stable_lsn: int,
    disk: Disk,
    dirty: DirtyMap,
    writer: VectoredWriter,
    beat: Callable[[], None],
) -> int:
    payload = np.frombuffer(batch.payload, np.uint8)
    base = int(payload.__array_interface__["data"][0])
    starts = np.cumsum(batch.records["payload_length"], dtype=np.int64) - batch.records["payload_length"]
    count = 0
    for row in range(max(0, stable_lsn + 1 - batch.first_lsn), batch.count):
        record = batch.records[row]
        kind, offset, length = int(record["type"]), int(record["offset"]), int(record["length"])
        if kind not in (WRITE, ZERO):
            continue
        if offset + length > disk.size_bytes:
            raise CorruptRecord(0, f"record {batch.first_lsn + row} lies beyond the disk")
        pieces = _clean_pieces(dirty, offset, length)
        count += bool(pieces)
        for at, size in pieces:
            if kind == ZERO:
                disk.zero(at, size)
            else:
                address = base + int(starts[row]) + at - offset
                offsets, lengths, addresses = np.array([[at], [size], [address]], np.int64)
                writer.write(disk.fd, offsets, lengths, addresses, beat)
    return count


def _clean_pieces(dirty: DirtyMap, offset: int, length: int) -> list[tuple[int, int]]:
    """The parts of a range that no dirty region covers."""
    if not dirty.count or not dirty.is_dirty(offset, length):
        return [(offset, length)]
    pieces = []
    at, end = offset, offset + length
    while at < end:
        size = min(end, (at // dirty.region_bytes + 1) * dirty.region_bytes) - at
        if not dirty.is_dirty(at, size):
            pieces.append((at, size))
        at += size
    return pieces
