"""Cuts: what is in one, and numbers that never go back."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.tap.cutter import RESERVED, CutNumbers, plan_cut
from farshore.hrl.cut import CutVolume
from tests.fakes.clock import ManualClock


@dataclass
class FakeVolume:
    id: bytes
    lsn: int
    captured_lsn: int
    changed: bool = True
    logs: bool = True
    fuzzy: bool = False
    incarnation: bytes = b"i" * 16


def test_a_mark_goes_where_there_is_something_new_and_counts_itself() -> None:
    volumes = [FakeVolume(b"a", 7, 5), FakeVolume(b"b", 3, 3, changed=False)]
    cut, marked = plan_cut(volumes, 9, 1000, None)
    assert marked == [0]
    assert cut.volumes == (CutVolume(b"a", b"i" * 16, 8, False), CutVolume(b"b", b"i" * 16, 3, False))
    assert (cut.seq, cut.time_ns, cut.tag) == (9, 1000, None)


def test_nothing_new_makes_no_mark_but_a_tag_does() -> None:
    volumes = [
        FakeVolume(b"a", 9, 4, changed=False, logs=False, fuzzy=True),
        FakeVolume(b"b", 3, 3, changed=False),
        FakeVolume(b"c", 3, 3, changed=False),
    ]
    assert plan_cut(volumes, 1, 0, None)[1] == []
    cut, marked = plan_cut(volumes, 1, 0, "before the upgrade")
    assert marked == [1]
    assert [volume.lsn for volume in cut.volumes] == [4, 4, 3]
    assert [volume.fuzzy for volume in cut.volumes] == [True, False, False]


def test_below_data_mode_only_captured_records_are_in_a_cut() -> None:
    cut, marked = plan_cut([FakeVolume(b"a", 9, 4, logs=False, fuzzy=True)], 1, 0, "tag")
    assert (marked, cut.volumes[0].lsn) == ([], 4)


def test_numbers_go_up_whatever_the_clock_does(tmp_path: Path) -> None:
    clock = ManualClock()
    numbers = CutNumbers(tmp_path / "cut", clock)
    seen = [numbers.next()]
    clock.advance(1)
    seen.append(numbers.next())
    clock.jump_wall(-3600)
    seen.append(numbers.next())
    again = CutNumbers(tmp_path / "cut", clock)
    seen.append(again.next())
    assert seen == sorted(set(seen))
    (tmp_path / "cut").write_text("not a number")
    assert CutNumbers(tmp_path / "cut", clock).next() > 0


def test_the_bound_is_moved_before_it_is_reached(tmp_path: Path) -> None:
    clock = ManualClock()
    numbers = CutNumbers(tmp_path / "cut", clock)
    for _ in range(5):
        clock.advance(RESERVED * 0.4 / 1e9)
        number = numbers.next()
        numbers._moving.acquire()  # until the thread has moved it
        numbers._moving.release()
        assert int((tmp_path / "cut").read_text()) > number


def test_a_clock_that_jumps_beyond_the_bound_gives_no_number_that_is_not_kept(tmp_path: Path) -> None:
    clock = ManualClock()
    numbers = CutNumbers(tmp_path / "cut", clock)
    clock.jump_wall(RESERVED * 2 / 1e9)
    with pytest.raises(OSError, match="number of cuts"):
        numbers.next()
    numbers._moving.acquire()
    numbers._moving.release()
    assert numbers.next() > 0
