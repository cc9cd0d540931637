"""Batches of write records and the running digest that ties them together.

Byte by byte in ``docs/formats/hrl.md``. Pure: no file, clock or task. The tap encodes with this module;
the journal reader, wire and process server decode with it: a batch travels as the bytes it was captured in.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from farshore.errors import CorruptRecord

WRITE: Final = 1
ZERO: Final = 2
RESIZE: Final = 3
MARK: Final = 4

SEAL: Final = 1
"""Batch flag: last batch of its segment; holds no records."""
CLEAN: Final = 2
"""Batch flag, with SEAL: the tap stopped in order."""

BATCH_RECORDS_MAX: Final = 8192
BATCH_PAYLOAD_BYTES_MAX: Final = 4 * 1024 * 1024
BATCH_ALIGN_BYTES: Final = 8
DIGEST_BYTES: Final = 32

HEAD: Final = struct.Struct("<4sIQQIIQ16s8s")
_CHAINED_BYTES: Final = 56
_MAGIC: Final = b"HRLB"

RECORD_DTYPE: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u8"),
        ("type", "u1"),
        ("flags", "u1"),
        ("zero", "<u2"),
        ("payload_length", "<u4"),
    ]
)
"""One row of a batch's table, 24 bytes."""

RECORD: Final = struct.Struct("<QQBBHI")
"""The same row for encoding one record at a time."""

Records = npt.NDArray[np.void]


class RunningDigest:
    """The digest over every batch of one incarnation so far.

    Attributes:
        value: 32 bytes; the digest including the last batch that went through ``extend``.
    """

    __slots__ = ("_key", "value")

    def __init__(self, key: bytes, value: bytes) -> None:
        self._key = key
        self.value = value

    def extend(self, chained_head: bytes | memoryview, table: bytes | memoryview) -> bytes:
        """Return the digest that ``value`` would become; the caller decides to keep it."""
        hasher = blake3(self.value, key=self._key)
        hasher.update(chained_head)
        hasher.update(table)
        return hasher.digest()

    def copy(self) -> "RunningDigest":
        return RunningDigest(self._key, self.value)


def incarnation_key(machine: bytes, volume: bytes, incarnation: bytes) -> bytes:
    """Key under which one incarnation's batches are chained (32 bytes from three ids of 16)."""
    return blake3(machine + volume + incarnation, derive_key_context="farshore hrl 1 incarnation").digest()


def first_digest(key: bytes, previous: bytes, previous_last_lsn: int, previous_digest: bytes) -> bytes:
    """Running digest before an incarnation's first batch: it names what the incarnation continues."""
    return blake3(previous + struct.pack("<Q", previous_last_lsn) + previous_digest, key=key).digest()


@dataclass(frozen=True, slots=True)
class Batch:
    """One whole, checked batch.

    Attributes:
        first_lsn: LSN of the first record; record ``i`` has ``first_lsn + i``.
        time_ns: Capture time by the agent's clock; informative only.
        flags: ``SEAL``, ``CLEAN``.
        records: Structured array of ``RECORD_DTYPE``, a view of the buffer that was decoded.
        payload: The records' payloads one after another, a view of the same buffer.
        digest: Running digest including this batch, 32 bytes.
        raw: The batch as it lies in the log, padding included; a view.
    """

    first_lsn: int
    time_ns: int
    flags: int
    records: Records
    payload: memoryview
    digest: bytes
    raw: memoryview

    @property
    def count(self) -> int:
        return len(self.records)

    @property
    def last_lsn(self) -> int:
        """LSN of the last record; ``first_lsn - 1`` in a SEAL."""
        return self.first_lsn + len(self.records) - 1


def padded(size: int) -> int:
    """``size`` rounded up to the alignment of batches."""
    return (size + BATCH_ALIGN_BYTES - 1) & -BATCH_ALIGN_BYTES


def encode_head(
    chain: RunningDigest,
    first_lsn: int,
    time_ns: int,
    count: int,
    table: bytes,
    payload: bytes | memoryview,
    flags: int = 0,
) -> bytes:
    """Return the 64-byte header of a batch and advance ``chain`` past it.

    The batch on disk is this header, ``table``, ``payload`` and zeros up to ``padded``.
    """
    assert len(table) == count * RECORD.size
    assert count <= BATCH_RECORDS_MAX
    assert len(payload) <= BATCH_PAYLOAD_BYTES_MAX
    assert count or flags & SEAL
    payload_digest = blake3(payload).digest(16)
    head = HEAD.pack(_MAGIC, count, first_lsn, time_ns, flags, len(table), len(payload), payload_digest, b"")
    chain.value = chain.extend(head[:_CHAINED_BYTES], table)
    return head[:_CHAINED_BYTES] + chain.value[:8]


def decode_batch(buffer: memoryview, at: int, chain: RunningDigest, next_lsn: int) -> Batch | None:
    """Decode the batch that starts at byte ``at`` of ``buffer`` and advance ``chain`` past it.

    Args:
        buffer: Bytes of a log or of a DATA frame; the result holds views of it.
        at: Where the batch starts.
        chain: Digest of all batches before it; unchanged unless a batch is returned.
        next_lsn: The LSN that its first record must have.

    Returns:
        The batch, or None when ``buffer`` ends before it does.

    Raises:
        CorruptRecord: It does not check. In a log above the durable mark this is where the log ends.
    """
    if len(buffer) - at < HEAD.size:
        return None
    magic, count, first_lsn, time_ns, flags, table_bytes, payload_bytes, payload_digest, check = (
        HEAD.unpack_from(buffer, at)
    )
    if magic != _MAGIC:
        raise CorruptRecord(at, "no batch here")
    if (
        count > BATCH_RECORDS_MAX
        or table_bytes != count * RECORD.size
        or payload_bytes > BATCH_PAYLOAD_BYTES_MAX
    ):
        raise CorruptRecord(at, f"{count} records, {table_bytes} + {payload_bytes} bytes claimed")
    if flags not in (0, SEAL, SEAL | CLEAN) or (count == 0) != bool(flags & SEAL):
        raise CorruptRecord(at, f"flags {flags} with {count} records")
    if first_lsn != next_lsn:
        raise CorruptRecord(at, f"LSN {first_lsn} where {next_lsn} is due")
    table_at = at + HEAD.size
    payload_at = table_at + table_bytes
    end = at + padded(HEAD.size + table_bytes + payload_bytes)
    if len(buffer) < end:
        return None
    digest = chain.extend(buffer[at : at + _CHAINED_BYTES], buffer[table_at:payload_at])
    if digest[:8] != check:
        raise CorruptRecord(at, "the running digest does not continue")
    payload = buffer[payload_at : payload_at + payload_bytes]
    if blake3(payload).digest(16) != payload_digest:
        raise CorruptRecord(at, "the payload does not match its digest")
    records = np.frombuffer(buffer, RECORD_DTYPE, count, table_at)
    _check_records(records, payload_bytes, at)
    chain.value = digest
    return Batch(first_lsn, time_ns, flags, records, payload, digest, buffer[at:end])


def _check_records(records: Records, payload_bytes: int, at: int) -> None:
    """Refuse a table whose rows do not add up, although its digest holds: the writer was wrong or hostile."""
    types = records["type"]
    lengths = records["length"]
    payload_lengths = records["payload_length"]
    if int(payload_lengths.sum(dtype=np.uint64)) != payload_bytes:
        raise CorruptRecord(at, "record payloads do not add up to the batch's")
    if records["flags"].any() or records["zero"].any() or (types < WRITE).any() or (types > MARK).any():
        raise CorruptRecord(at, "a record of unknown type or flags")
    writes = types == WRITE
    if (lengths[writes] != payload_lengths[writes]).any():
        raise CorruptRecord(at, "a write whose payload is not its length")
    if payload_lengths[(types == ZERO) | (types == RESIZE)].any() or lengths[types >= RESIZE].any():
        raise CorruptRecord(at, "a record with lengths its type does not have")
    ranged = types <= ZERO
    offsets = records["offset"]
    ends = offsets + lengths
    if (
        (lengths[ranged] == 0).any()
        or (ends[ranged] < offsets[ranged]).any()
        or (ends[ranged] > 1 << 63).any()
    ):
        raise CorruptRecord(at, "a record of no bytes or beyond any volume")


def iter_batches(buffer: memoryview, chain: RunningDigest, next_lsn: int) -> Iterator[Batch]:
    """Yield the batches that fill ``buffer`` exactly (a DATA frame's body).

    Raises:
        CorruptRecord: A batch does not check, or bytes are left over.
    """
    at = 0
    while at < len(buffer):
        batch = decode_batch(buffer, at, chain, next_lsn)
        if batch is None:
            raise CorruptRecord(at, "cut short")
        yield batch
        at += len(batch.raw)
        next_lsn = batch.first_lsn + batch.count
