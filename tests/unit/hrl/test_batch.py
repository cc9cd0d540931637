"""What a batch may and may not be, beyond what chance finds (tests/property/test_hrl_batch.py)."""

import pytest

from farshore.errors import CorruptRecord
from farshore.hrl.batch import (
    CLEAN,
    HEAD,
    MARK,
    RECORD,
    RESIZE,
    SEAL,
    WRITE,
    ZERO,
    RunningDigest,
    decode_batch,
    encode_head,
    iter_batches,
    padded,
)

KEY = bytes(32)


def encoded(rows: list[tuple[int, int, int, int, int, int]], payload: bytes, flags: int = 0) -> memoryview:
    """A batch with LSN 5 as it lies in the log; its digest holds whatever it says."""
    table = b"".join(RECORD.pack(*row) for row in rows)
    head = encode_head(RunningDigest(KEY, bytes(32)), 5, 77, len(rows), table, payload, flags)
    raw = head + table + payload
    return memoryview(raw.ljust(padded(len(raw)), b"\0"))


def chain() -> RunningDigest:
    return RunningDigest(KEY, bytes(32))


@pytest.mark.parametrize(
    ("row", "payload"),
    [
        ((0, 512, WRITE, 0, 0, 512), bytes(512)),
        ((4096, 1 << 40, ZERO, 0, 0, 0), b""),
        ((1 << 40, 0, RESIZE, 0, 0, 0), b""),
        ((0, 0, MARK, 0, 0, 5), b"a cut"),
    ],
)
def test_each_type(row: tuple[int, int, int, int, int, int], payload: bytes) -> None:
    batch = decode_batch(encoded([row], payload), 0, chain(), 5)
    assert batch
    assert batch.records.tolist() == [row]
    assert (bytes(batch.payload), batch.first_lsn, batch.last_lsn, batch.time_ns) == (payload, 5, 5, 77)


@pytest.mark.parametrize("flags", [SEAL, SEAL | CLEAN])
def test_a_seal_has_no_records(flags: int) -> None:
    batch = decode_batch(encoded([], b"", flags), 0, chain(), 5)
    assert batch
    assert (batch.count, batch.last_lsn, batch.flags, len(batch.raw)) == (0, 4, flags, HEAD.size)


@pytest.mark.parametrize(
    ("row", "payload", "flags"),
    [
        ((0, 512, 5, 0, 0, 512), bytes(512), 0),
        ((0, 512, 0, 0, 0, 512), bytes(512), 0),
        ((0, 512, WRITE, 1, 0, 512), bytes(512), 0),
        ((0, 512, WRITE, 0, 1, 512), bytes(512), 0),
        ((0, 1024, WRITE, 0, 0, 512), bytes(512), 0),
        ((0, 512, WRITE, 0, 0, 511), bytes(512), 0),
        ((0, 0, WRITE, 0, 0, 0), b"", 0),
        ((0, 0, ZERO, 0, 0, 0), b"", 0),
        ((0, 512, ZERO, 0, 0, 512), bytes(512), 0),
        ((0, 8, RESIZE, 0, 0, 0), b"", 0),
        ((0, 8, MARK, 0, 0, 1), b"x", 0),
        (((1 << 64) - 512, 1024, ZERO, 0, 0, 0), b"", 0),
        (((1 << 63) - 512, 1024, ZERO, 0, 0, 0), b"", 0),
        ((0, 512, WRITE, 0, 0, 512), bytes(512), SEAL),
        ((0, 512, WRITE, 0, 0, 512), bytes(512), CLEAN),
        ((0, 512, WRITE, 0, 0, 512), bytes(512), 4),
    ],
)
def test_what_no_writer_of_ours_makes_is_refused_although_the_digest_holds(
    row: tuple[int, int, int, int, int, int], payload: bytes, flags: int
) -> None:
    kept = chain()
    with pytest.raises(CorruptRecord):
        decode_batch(encoded([row], payload, flags), 0, kept, 5)
    assert kept.value == chain().value


def test_a_batch_elsewhere_in_the_log_is_refused() -> None:
    raw = encoded([(0, 512, WRITE, 0, 0, 512)], bytes(512))
    for wrong in (4, 6):
        with pytest.raises(CorruptRecord, match="LSN"):
            decode_batch(raw, 0, chain(), wrong)
    with pytest.raises(CorruptRecord, match="digest"):
        decode_batch(raw, 0, RunningDigest(KEY, b"\1" * 32), 5)
    with pytest.raises(CorruptRecord, match="digest"):
        decode_batch(raw, 0, RunningDigest(b"\1" * 32, bytes(32)), 5)


def test_claims_are_bounded_before_anything_is_waited_for() -> None:
    raw = bytearray(encoded([(0, 512, WRITE, 0, 0, 512)], bytes(512)))
    for at, size in ((4, 4), (28, 4), (32, 8)):
        huge = bytearray(raw)
        huge[at : at + size] = b"\xff" * size
        with pytest.raises(CorruptRecord, match="claimed"):
            decode_batch(memoryview(huge)[:64], 0, chain(), 5)


def test_a_frame_holds_whole_batches() -> None:
    raw = bytes(encoded([(0, 512, WRITE, 0, 0, 512)], bytes(512)))
    assert [batch.last_lsn for batch in iter_batches(memoryview(raw), chain(), 5)] == [5]
    for body in (raw[:-1], raw + raw[:70], raw + b"\0"):
        with pytest.raises(CorruptRecord):
            list(iter_batches(memoryview(body), chain(), 5))
