"""Rows laid over one another, held against a volume that is an array of bytes."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from process_server.vault.commit import ROW_DTYPE, ZEROS, Rows
from process_server.vault.rows import REGION_BYTES, by_region, clip, ends, overlay, without_zeros

UNIT = 512
UNITS_MAX = 96

# (offset, length, zeros?), in units; one unit is a sector, so any grid the code may choose is met.
_ROW = st.tuples(st.integers(0, UNITS_MAX - 1), st.integers(1, UNITS_MAX), st.booleans())


def rows_of(drawn: list[tuple[int, int, bool]], unit: int = UNIT) -> Rows:
    rows = np.zeros(len(drawn), ROW_DTYPE)
    for number, (offset, length, zeros) in enumerate(drawn):
        rows[number] = (
            offset * unit,
            length * unit,
            number + 1,
            number,
            ZEROS if zeros else number % 7,
            0 if zeros else number,
            0 if zeros else number * unit,
            0,
        )
    return rows


def painted(rows: Rows, units: int, unit: int = UNIT) -> npt.NDArray[np.int64]:
    """Per unit of the volume what is there: -1 nothing, -2 zeros, else a number for (pack, chunk, byte)."""
    model = np.full(units, -1, np.int64)
    for row in rows:
        at, count = int(row["offset"]) // unit, int(row["length"]) // unit
        if row["pack"] == ZEROS:
            model[at : at + count] = -2
        else:
            first = int(row["start"]) // unit
            place = (int(row["pack"]) * 1000 + int(row["chunk"])) * 10_000
            model[at : at + count] = place + np.arange(first, first + count)
    return model


@given(st.lists(_ROW, max_size=60))
def test_the_later_row_wins_everywhere(drawn: list[tuple[int, int, bool]]) -> None:
    rows = rows_of(drawn)
    before = rows.copy()
    flat = overlay(rows)
    assert (rows == before).all()
    assert (painted(flat, 2 * UNITS_MAX) == painted(rows, 2 * UNITS_MAX)).all()
    assert (flat["offset"][1:] >= ends(flat)[:-1]).all()
    assert (flat["length"] > 0).all()
    assert (flat["start"][flat["pack"] == ZEROS] == 0).all()


@given(st.lists(_ROW, max_size=30), st.integers(1, 2**40))
def test_a_sparse_volume_gives_what_a_dense_one_gives(drawn: list[tuple[int, int, bool]], far: int) -> None:
    rows = rows_of(drawn)
    lone = np.zeros(1, ROW_DTYPE)
    lone[0] = (far * UNIT + 4 * UNITS_MAX * UNIT, UNIT, 99, 0, 3, 3, 0, 0)
    apart = overlay(np.concatenate((rows, lone)))
    assert (apart[:-1] == overlay(rows)).all()
    assert apart[-1] == lone[0]


@given(st.lists(_ROW, max_size=40), st.integers(0, 2 * UNITS_MAX), st.integers(0, 2 * UNITS_MAX))
def test_clip_keeps_exactly_the_bytes_inside(
    drawn: list[tuple[int, int, bool]], one: int, other: int
) -> None:
    start, end = min(one, other), max(one, other)
    flat = overlay(rows_of(drawn))
    expected = painted(flat, 2 * UNITS_MAX)
    expected[:start] = -1
    expected[end:] = -1
    assert (painted(clip(flat, start * UNIT, end * UNIT), 2 * UNITS_MAX) == expected).all()


@given(st.lists(_ROW, max_size=40))
def test_base_and_newer_rows_in_steps_give_what_all_at_once_gives(
    drawn: list[tuple[int, int, bool]],
) -> None:
    rows = rows_of(drawn)
    half = len(rows) // 2
    stepwise = overlay(np.concatenate((overlay(rows[:half]), rows[half:])))
    assert (painted(stepwise, 2 * UNITS_MAX) == painted(overlay(rows), 2 * UNITS_MAX)).all()


@given(st.lists(_ROW, max_size=40))
def test_regions_hold_the_rows_in_order_and_within_their_edges(drawn: list[tuple[int, int, bool]]) -> None:
    unit = REGION_BYTES // 8
    rows = rows_of(drawn)
    rows["offset"] *= unit // UNIT
    rows["length"] *= unit // UNIT
    rows["pack"] = ZEROS  # lengths beyond what a chunk can hold, so only cover counts here
    seen = []
    for region, part in by_region(rows):
        assert (part["offset"] >= region * REGION_BYTES).all()
        assert (ends(part) <= (region + 1) * REGION_BYTES).all()
        assert (part["lsn"][1:] >= part["lsn"][:-1]).all()
        seen.append(region)
    assert seen == sorted(set(seen))
    assert sum(int(part["length"].sum()) for _, part in by_region(rows)) == int(rows["length"].sum())


def test_rows_of_zeros_can_be_left_out() -> None:
    rows = rows_of([(0, 4, False), (4, 4, True), (8, 1, False)])
    assert without_zeros(rows)["offset"].tolist() == [0, 8 * UNIT]


def test_nothing_is_laid_over_nothing() -> None:
    assert len(overlay(np.zeros(0, ROW_DTYPE))) == 0
    assert list(by_region(np.zeros(0, ROW_DTYPE))) == []
