"""Batches under chance: round trip, any flipped bit, any truncation, any other chain."""

from hypothesis import given
from hypothesis import strategies as st

from farshore.errors import CorruptRecord
from farshore.hrl.batch import (
    MARK,
    RECORD,
    RESIZE,
    WRITE,
    ZERO,
    RunningDigest,
    decode_batch,
    encode_head,
    padded,
)

KEY = bytes(range(32))
Row = tuple[int, int, int, bytes]


def rows() -> st.SearchStrategy[list[Row]]:
    sector = st.integers(0, 1 << 40).map(lambda n: n * 512)
    write = st.tuples(st.just(WRITE), sector, st.just(0), st.binary(min_size=1, max_size=64))
    zero = st.tuples(st.just(ZERO), sector, st.integers(1, 1 << 50), st.just(b""))
    resize = st.tuples(st.just(RESIZE), sector, st.just(0), st.just(b""))
    mark = st.tuples(st.just(MARK), st.just(0), st.just(0), st.binary(max_size=40))
    return st.lists(st.one_of(write, zero, resize, mark), min_size=1, max_size=6)


def encoded(batches: list[list[Row]], first_lsn: int) -> tuple[bytes, list[int]]:
    """The batches as they lie in a log, and where each ends."""
    chain = RunningDigest(KEY, bytes(32))
    log, ends, lsn = b"", [], first_lsn
    for batch in batches:
        table = b"".join(
            RECORD.pack(offset, length or (len(data) if kind == WRITE else 0), kind, 0, 0, len(data))
            for kind, offset, length, data in batch
        )
        payload = b"".join(data for *_, data in batch)
        raw = encode_head(chain, lsn, 7, len(batch), table, payload) + table + payload
        log += raw.ljust(padded(len(raw)), b"\0")
        ends.append(len(log))
        lsn += len(batch)
    return log, ends


def read(log: bytes, first_lsn: int) -> list[list[tuple[int, int, bytes]]]:
    """Everything up to the first batch that does not check."""
    chain = RunningDigest(KEY, bytes(32))
    found: list[list[tuple[int, int, bytes]]] = []
    at, lsn = 0, first_lsn
    view = memoryview(log)
    while True:
        try:
            batch = decode_batch(view, at, chain, lsn)
        except CorruptRecord:
            return found
        if batch is None:
            return found
        records, start = [], 0
        for row in batch.records:
            end = start + int(row["payload_length"])
            records.append((int(row["type"]), int(row["offset"]), bytes(batch.payload[start:end])))
            start = end
        found.append(records)
        at += len(batch.raw)
        lsn += batch.count


def plain(batches: list[list[Row]]) -> list[list[tuple[int, int, bytes]]]:
    return [[(kind, offset, data) for kind, offset, _, data in batch] for batch in batches]


logs = st.lists(rows(), min_size=1, max_size=4)
first_lsns = st.integers(1, 1 << 48)


@given(logs, first_lsns)
def test_round_trip(batches: list[list[Row]], first_lsn: int) -> None:
    log, _ = encoded(batches, first_lsn)
    assert read(log, first_lsn) == plain(batches)


@given(logs, first_lsns, st.data())
def test_any_flipped_bit_ends_the_log_before_it_or_changes_nothing(
    batches: list[list[Row]], first_lsn: int, data: st.DataObject
) -> None:
    log, ends = encoded(batches, first_lsn)
    bit = data.draw(st.integers(0, len(log) * 8 - 1))
    changed = bytearray(log)
    changed[bit // 8] ^= 1 << bit % 8
    found = read(bytes(changed), first_lsn)
    whole = plain(batches)
    damaged = next(index for index, end in enumerate(ends) if bit // 8 < end)
    assert found in (whole[:damaged], whole)  # whole: the bit was in the padding


@given(logs, first_lsns, st.data())
def test_any_truncation_keeps_exactly_the_whole_batches(
    batches: list[list[Row]], first_lsn: int, data: st.DataObject
) -> None:
    log, ends = encoded(batches, first_lsn)
    kept = data.draw(st.integers(0, len(log)))
    assert read(log[:kept], first_lsn) == plain(batches)[: sum(end <= kept for end in ends)]


@given(logs, logs, first_lsns)
def test_a_batch_of_another_log_never_continues_this_one(
    mine: list[list[Row]], other: list[list[Row]], first_lsn: int
) -> None:
    log, _ = encoded(mine, first_lsn)
    next_lsn = first_lsn + sum(map(len, mine))
    stale, _ = encoded(other, next_lsn)  # the LSN fits, the chain does not
    assert read(log + stale, first_lsn) == plain(mine)
