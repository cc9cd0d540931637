"""What follows from the traces of the tap's last run, each alone and where they contradict each other."""

from dataclasses import replace
from pathlib import Path

import pytest

from agent.journal import mark as marks
from agent.journal.continuity import IMAGE, Boot, DiskIdentity
from agent.journal.mark import Mark
from agent.journal.recovery import Recovered
from agent.tap.lastrun import LastRun
from farshore.hrl.segment import NO_INCARNATION, Incarnation
from farshore.units import GIB

BOOT = Boot(b"h" * 16, 0)
FILE = DiskIdentity(IMAGE, 8, 77, GIB, 990, 0)
ELSEWHERE = replace(FILE, inode=78)
NEWEST = Incarnation(b"n" * 16, 3)
CLEAN = Mark(NEWEST.id, 70, 60, marks.CLEAN, 5, FILE, BOOT.id)


def last_run(mark: Mark | None, *, corrupt: str | None = None, disk: DiskIdentity = FILE) -> LastRun:
    recovered = Recovered(
        directory=Path("/journal"),
        machine=b"m" * 16,
        volume=b"v" * 16,
        incarnation=NEWEST,
        last_lsn=80,
        digest=b"",
        mark=mark,
        segments=(),
        torn_tail_bytes=0,
        corrupt=corrupt,
        clean=False,
        leftovers=(),
        floor_lsn=90,
        ordinal=3,
    )
    return LastRun(recovered, None, False, disk, BOOT)


def why_resync(last: LastRun, dirty_problem: str = "") -> str:
    return last.why_resync(last.judge(supervisor_held=False), dirty_problem)


def test_a_volume_that_never_ran_owes_no_compare() -> None:
    last = last_run(None)
    assert why_resync(last, "there is no dirty map") == ""
    assert not last.judge(supervisor_held=False).redo
    assert (last.stable_lsn, last.epoch) == (0, 1)


def test_an_orderly_stop_owes_no_compare() -> None:
    assert why_resync(last_run(CLEAN)) == ""


@pytest.mark.parametrize(
    ("last", "dirty_problem", "why"),
    [
        (last_run(CLEAN, corrupt="a batch is damaged"), "", "a batch is damaged"),
        (last_run(replace(CLEAN, flags=marks.CLEAN | marks.RESYNC_REQUIRED)), "", "required before"),
        (last_run(CLEAN, disk=ELSEWHERE), "", "another disk"),
        (last_run(CLEAN), "the dirty map is damaged", "the dirty map is damaged"),
        (last_run(replace(CLEAN, flags=marks.JOURNAL_LOST)), "", "the journal was lost"),
    ],
)
def test_each_doubt_owes_a_compare(last: LastRun, dirty_problem: str, why: str) -> None:
    assert why in why_resync(last, dirty_problem)


def test_the_mark_of_a_compare_keeps_what_holds_and_is_not_clean() -> None:
    bitmap = replace(CLEAN, flags=marks.CLEAN | marks.BITMAP)
    found = last_run(bitmap).mark_of_resync(ELSEWHERE)
    assert found.flags == marks.RESYNC_REQUIRED | marks.BITMAP
    assert (found.durable_lsn, found.stable_lsn, found.dirty_epoch) == (70, 60, 6)
    assert found.disk == ELSEWHERE


def test_what_was_durable_in_an_older_incarnation_says_nothing_of_the_newest() -> None:
    older = replace(CLEAN, incarnation=b"o" * 16)
    found = last_run(older).mark_of_resync(FILE)
    assert (found.incarnation, found.durable_lsn) == (NEWEST.id, 0)


def test_a_journal_without_a_mark_can_be_marked() -> None:
    found = replace(last_run(None), recovered=replace(last_run(None).recovered, incarnation=None))
    mark = found.mark_of_resync(FILE)
    assert (mark.incarnation, mark.flags) == (NO_INCARNATION, marks.RESYNC_REQUIRED)
