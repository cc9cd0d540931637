"""The oracle is itself checked: an exact prefix passes, and each way of not being one is named."""

import pytest

from farshore.stamps import BLOCK_BYTES, Workload, check_prefix, read_stamp

RUN = Workload(seed=77, first_block=3, block_count=64)


def disk_after(writes: list[int], size_blocks: int = 80) -> bytearray:
    disk = bytearray(size_blocks * BLOCK_BYTES)
    for seq in writes:
        disk[RUN.offset(seq) : RUN.offset(seq) + BLOCK_BYTES] = RUN.block(seq)
    return disk


def report(disk: bytearray):  # type: ignore[no-untyped-def]  # the report's type is the function's own
    return check_prefix(RUN, lambda offset, length: bytes(disk[offset : offset + length]))


@pytest.mark.parametrize("count", [0, 1, 2, 50, 300])
def test_the_first_n_writes_are_an_exact_prefix(count: int) -> None:
    seen = report(disk_after(list(range(1, count + 1))))
    assert seen.exact
    assert seen.seq == count


def test_a_lost_write_before_the_last_is_a_violation() -> None:
    visible = next(seq for seq in range(90, 0, -1) if seq not in _overwritten(100))
    seen = report(disk_after([seq for seq in range(1, 101) if seq != visible]))
    assert not seen.exact
    assert seen.wrong[0][2] == visible


def test_two_writes_in_the_wrong_order_are_a_violation() -> None:
    later = next(seq for seq in range(2, 200) if RUN.offset(seq) in {RUN.offset(s) for s in range(1, seq)})
    earlier = max(s for s in range(1, later) if RUN.offset(s) == RUN.offset(later))
    order = [*range(1, later + 6)]
    order.remove(earlier)
    assert not report(disk_after([*order, earlier])).exact


def test_a_torn_block_is_damaged_not_absent() -> None:
    disk = disk_after([1, 2, 3])
    at = RUN.offset(2)
    disk[at + 512 : at + 1024] = bytes(512)
    assert report(disk).damaged == (at // BLOCK_BYTES,)


def test_a_block_in_the_wrong_place_is_damaged() -> None:
    assert read_stamp(RUN, RUN.offset(1) // BLOCK_BYTES + 1, RUN.block(1)) is None


def test_another_runs_stamp_counts_as_no_stamp() -> None:
    other = Workload(seed=78, first_block=3, block_count=64)
    assert read_stamp(RUN, other.offset(1) // BLOCK_BYTES, other.block(1)) == 0


def test_blocks_that_must_be_untouched_are_asked_about() -> None:
    disk = disk_after([1])
    untouched = next(b for b in range(3, 67) if b != RUN.offset(1) // BLOCK_BYTES)
    seen = check_prefix(RUN, lambda o, n: bytes(disk[o : o + n]), before=lambda block: block != untouched)
    assert seen.damaged == (untouched,)


def test_one_write_goes_where_the_array_of_all_writes_says() -> None:
    offsets = [RUN.offset(seq) for seq in range(1, 500)]
    assert offsets == [int(block) * BLOCK_BYTES for block in RUN.blocks(1, 499)]


def _overwritten(count: int) -> set[int]:
    newest = {RUN.offset(seq): seq for seq in range(1, count + 1)}
    return set(range(1, count + 1)) - set(newest.values())
