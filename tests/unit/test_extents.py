from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.extents import Extent, intersect, merge, subtract, total_bytes
from farshore.units import SECTOR_BYTES

SECTORS = 40


def extent(first: int, count: int) -> Extent:
    return Extent(first * SECTOR_BYTES, count * SECTOR_BYTES)


def covered(extents: list[Extent]) -> set[int]:
    return {at // SECTOR_BYTES for e in extents for at in range(e.offset, e.end, SECTOR_BYTES)}


def is_canonical(extents: list[Extent]) -> bool:
    return all(before.end < after.offset for before, after in pairwise(extents))


some_extent = st.builds(extent, st.integers(0, SECTORS), st.integers(1, SECTORS))
some_extents = st.lists(some_extent, max_size=8)


@pytest.mark.parametrize(("offset", "length"), [(-512, 512), (0, 0), (0, -512), (1, 512), (512, 100)])
def test_an_extent_that_is_no_range_of_sectors_is_our_mistake(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="no extent"):
        Extent(offset, length)


def test_neighbours_do_not_overlap_but_merge() -> None:
    left, right = extent(0, 2), extent(2, 1)
    assert left.end == right.offset
    assert not left.overlaps(right)
    assert left.intersect(right) is None
    assert merge([right, left]) == [extent(0, 3)]


@given(some_extent, some_extent)
def test_two_extents_behave_as_sets(one: Extent, other: Extent) -> None:
    both = one.intersect(other)
    assert covered([both] if both else []) == covered([one]) & covered([other])
    assert covered(one.subtract(other)) == covered([one]) - covered([other])
    assert one.overlaps(other) == bool(both)
    assert one.contains(other) == (covered([one]) >= covered([other]))


@given(some_extents)
def test_merge_covers_the_same_with_the_fewest(extents: list[Extent]) -> None:
    merged = merge(extents)
    assert covered(merged) == covered(extents)
    assert is_canonical(merged)
    assert total_bytes(merged) == len(covered(extents)) * SECTOR_BYTES


@given(some_extents, some_extents)
def test_lists_behave_as_sets(extents: list[Extent], others: list[Extent]) -> None:
    left, shared = subtract(extents, others), intersect(extents, others)
    assert covered(left) == covered(extents) - covered(others)
    assert covered(shared) == covered(extents) & covered(others)
    assert is_canonical(left)
    assert is_canonical(shared)
