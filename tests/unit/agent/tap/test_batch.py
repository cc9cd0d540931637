"""Reads over pending writes, held against a disk that has them all."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.tap.batch import Batch, Pending, mark_batch, overlaps, patch, write_batch, zero_batch
from farshore.hrl.batch import MARK, RECORD_DTYPE, WRITE, ZERO

rows = st.tuples(st.integers(0, 60), st.integers(1, 16))
batches = st.lists(
    st.one_of(
        st.lists(rows, min_size=1, max_size=5).map(lambda table: ("write", table)),
        rows.map(lambda row: ("zero", [row])),
        st.just(("mark", [])),
    ),
    max_size=8,
)


def made(plan: list[tuple[str, list[tuple[int, int]]]]) -> list[Batch]:
    result = []
    for number, (kind, table) in enumerate(plan, 1):
        if kind == "mark":
            result.append(mark_batch(0, b"cut"))
        elif kind == "zero":
            result.append(zero_batch(0, *table[0], client=None, reply=b""))
        else:
            offsets, lengths = (np.array(column, np.int64) for column in zip(*table, strict=True))
            payload = np.full(int(lengths.sum()), number, np.uint8)
            result.append(write_batch(0, offsets, lengths, payload, None, b""))
    return result


def apply(disk: bytearray, pending: list[Batch]) -> None:
    for batch in pending:
        for offset, length, start in zip(
            batch.offsets.tolist(), batch.lengths.tolist(), [*batch.starts.tolist(), 0], strict=False
        ):
            if batch.kind == WRITE:
                disk[offset : offset + length] = batch.payload[start : start + length].tobytes()
            elif batch.kind == ZERO:
                disk[offset : offset + length] = bytes(length)


@given(batches, st.integers(0, 70), st.integers(1, 40), st.integers(0, 8))
def test_a_read_sees_pending_writes_in_order_however_many_the_disk_already_has(
    plan: list[tuple[str, list[tuple[int, int]]]], offset: int, length: int, applied: int
) -> None:
    pending = made(plan)
    whole, partly = bytearray(b"\xff" * 120), bytearray(b"\xff" * 120)
    apply(whole, pending)
    apply(partly, pending[:applied])
    content = partly[offset : offset + length]
    patch(memoryview(content), offset, pending)
    assert content == whole[offset : offset + length]
    touched = any(
        first < offset + length and first + size > offset for kind, table in plan for first, size in table
    )
    assert overlaps(offset, length, pending) == touched


def test_tables_are_the_journals_rows() -> None:
    write, zero, mark = made([("write", [(512, 3), (0, 2)]), ("zero", [(8, 4)]), ("mark", [])])
    decoded = np.frombuffer(write.table() + zero.table() + mark.table(), RECORD_DTYPE)
    assert decoded["type"].tolist() == [WRITE, WRITE, ZERO, MARK]
    assert decoded["offset"].tolist() == [512, 0, 8, 0]
    assert decoded["length"].tolist() == [3, 2, 4, 0]
    assert decoded["payload_length"].tolist() == [3, 2, 0, 3]
    assert [batch.count for batch in (write, zero, mark)] == [2, 1, 1]


def test_pending_counts_what_it_holds() -> None:
    pending = Pending()
    all_of_them = made([("write", [(0, 10)]), ("zero", [(0, 5)]), ("write", [(3, 1)])])
    for batch in all_of_them:
        pending.add(batch)
    assert pending.snapshot() == tuple(all_of_them)
    assert pending.held_bytes == sum(batch.held_bytes for batch in all_of_them)
    before = pending.snapshot()
    pending.take_off(all_of_them[:2])
    assert pending.snapshot() == (all_of_them[2],)
    assert len(before) == 3
    pending.take_off(all_of_them[2:])
    assert pending.held_bytes == 0
