"""What recovery makes of a directory, cell by cell of the bad-input catalogue."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from agent.journal.errors import JournalGap
from agent.journal.recovery import recover, redo_records
from agent.journal.segments import list_segments, segment_path
from agent.journal.state import StatePageWriter
from farshore.clock import SystemClock
from farshore.ids import new_id
from farshore.units import KIB
from tests.harness.journal import BOOT, MACHINE, VOLUME, held, look, marked, opened, put


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Four segments of one incarnation, 1 to 4, all durable by the mark, none stable."""
    directory = tmp_path / "j"
    writer = opened(directory)
    while len(list_segments(directory)) < 4:
        put(writer, 4, 4096)
    last = writer.sync()
    marked(directory, writer.incarnation.id, last)
    writer.close()
    return directory


def last_of(journal: Path) -> int:
    return look(journal).last_lsn


def test_no_directory_is_an_empty_log(tmp_path: Path) -> None:
    found = look(tmp_path / "none")
    assert (found.incarnation, found.last_lsn, found.corrupt, found.segments) == (None, 0, None, ())


def test_looking_changes_nothing(journal: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in journal.iterdir()}
    assert look(journal) == look(journal)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in journal.iterdir()} == before


def test_a_whole_log_is_read_from_any_lsn(journal: Path) -> None:
    found = look(journal)
    assert found.corrupt is None
    assert held(found) == list(range(1, found.last_lsn + 1))
    assert held(found, found.last_lsn) == []
    after = found.last_lsn - 5
    assert set(range(after + 1, found.last_lsn + 1)) <= set(held(found, after))


def test_segments_at_or_below_the_stable_mark_are_not_read(journal: Path) -> None:
    found = look(journal)
    stable = found.segments[1].last_lsn
    assert found.incarnation
    marked(journal, found.incarnation.id, found.last_lsn, stable)
    flip(segment_path(journal, 1), 5000)
    assert look(journal).corrupt is None
    assert held(look(journal), stable)[0] <= stable + 1
    assert look(journal, every_byte=True).corrupt is not None


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def header_only(path: Path) -> None:
    os.truncate(path, 4096)


def foreign(path: Path) -> None:
    other = path.parent.parent / "other"
    writer = opened(other, volume=new_id(), recovered=look(other))
    put(writer)
    writer.close()
    for _, found in list_segments(other):
        path.write_bytes(found.read_bytes())


def duplicate(path: Path) -> None:
    path.write_bytes(segment_path(path.parent, 1).read_bytes())


def symlink(path: Path) -> None:
    away = path.parent.parent / "away"
    path.rename(away)
    path.symlink_to(away)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def newer(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[8] = 2
    raw[4064:4096] = blake3(bytes(raw[:4064])).digest()
    path.write_bytes(raw)


def batch_flip(path: Path) -> None:
    flip(path, 5000)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize(
    "damage",
    [remove, empty, zeros, header_only, foreign, duplicate, symlink, fifo, newer, batch_flip],
)
def test_damage_below_the_mark_is_told_kept_and_built_around(
    journal: Path, damage: Callable[[Path], None], number: int
) -> None:
    last = last_of(journal)
    damage(segment_path(journal, number))
    found = look(journal)
    assert found.corrupt
    assert found.floor_lsn == last
    names_before = set(journal.iterdir())
    held(found, found.segments[0].first_lsn - 1 if found.segments else found.last_lsn)  # none is wrong
    writer = opened(journal, recovered=found)
    assert writer.next_lsn > last, "an LSN that was durable is never given twice"
    assert len(list(journal.iterdir())) >= len(names_before), "nothing is deleted"
    put(writer, 2)
    durable = writer.sync()
    marked(journal, writer.incarnation.id, durable, last)
    writer.close()
    again = look(journal)
    assert again.corrupt is None
    assert held(again, last) == [writer.next_lsn - 2, writer.next_lsn - 1]


def test_garbage_behind_the_end_is_harmless(journal: Path) -> None:
    last = last_of(journal)
    with segment_path(journal, 4).open("ab") as file:
        file.write(os.urandom(5000))
    found = look(journal)
    assert (found.corrupt, found.last_lsn, found.torn_tail_bytes) == (None, last, 0)


def test_a_foreign_file_behind_the_end_is_kept_and_no_harm(journal: Path) -> None:
    foreign(segment_path(journal, 9))
    found = look(journal)
    assert found.corrupt is None
    opened(journal, recovered=found).close()
    assert [path.name[:25] for path in journal.glob("bad-*")] == ["bad-00000000000000000009-"]


def test_above_the_mark_the_log_ends_at_the_first_bad_batch_whatever_follows(journal: Path) -> None:
    found = look(journal)
    assert found.incarnation
    durable = found.segments[0].last_lsn
    marked(journal, found.incarnation.id, durable)
    flip(segment_path(journal, 2), 4200)
    cut = look(journal)
    assert cut.corrupt is None
    assert cut.last_lsn == durable
    assert cut.torn_tail_bytes > 0
    assert [leftover.reason for leftover in cut.leftovers] == [None, None]
    writer = opened(journal, recovered=cut)
    assert writer.next_lsn == durable + 1
    put(writer)
    writer.sync()
    writer.close()
    again = look(journal)
    assert (again.corrupt, again.last_lsn, again.torn_tail_bytes) == (None, durable + 1, 0)
    assert held(again) == list(range(1, durable + 2))


def test_a_state_page_of_this_boot_vouches_for_more_than_the_mark(journal: Path) -> None:
    found = look(journal)
    assert found.incarnation
    marked(journal, found.incarnation.id, 1)
    page = StatePageWriter.create(journal / "state", incarnation=found.incarnation.id, boot_id=BOOT)
    page.update(durable_lsn=found.last_lsn)
    page.close()
    flip(segment_path(journal, 2), 4200)
    assert look(journal).corrupt is None
    assert look(journal, boot_id=new_id()).corrupt is None
    assert look(journal, boot_id=BOOT).corrupt


def test_a_mark_without_a_valid_slot_is_corruption(journal: Path) -> None:
    (journal / "mark").write_bytes(bytes(8192))
    assert look(journal).corrupt
    (journal / "mark").unlink()
    assert look(journal).corrupt == "there are records and no mark"


def test_a_mark_whose_segments_are_gone_is_corruption(journal: Path) -> None:
    for _, path in list_segments(journal):
        path.unlink()
    assert look(journal).corrupt


def test_redo_from_before_the_log_is_a_gap(journal: Path) -> None:
    segment_path(journal, 1).unlink()
    found = look(journal)
    assert found.corrupt
    with pytest.raises(JournalGap):
        list(redo_records(found, 0))


def test_freed_segments_are_no_gap_once_the_stable_mark_covers_them(journal: Path) -> None:
    writer = opened(journal)
    put(writer)
    last = writer.sync()
    marked(journal, writer.incarnation.id, last, last)
    assert writer.free(last, last)
    writer.close()
    found = look(journal)
    assert found.corrupt is None
    assert found.last_lsn == last


def test_empty_incarnations_chain_and_cost_no_space(journal: Path) -> None:
    for _ in range(5):
        opened(journal).close()
    found = look(journal)
    assert found.corrupt is None
    assert found.ordinal == 6
    assert held(found) == list(range(1, found.last_lsn + 1))
    assert sum(segment.file_bytes for segment in found.segments[4:-1]) <= 5 * 8192
    assert found.segments[-1].file_bytes == 64 * KIB


def test_files_of_another_machine_never_count(journal: Path) -> None:
    found = recover(journal, VOLUME, MACHINE)
    assert found.segments == ()
    assert found.corrupt


def test_clock_is_only_a_note(tmp_path: Path) -> None:
    class Wild(SystemClock):
        def wall_ns(self) -> int:
            return 0

    writer = opened(tmp_path / "j", Wild())
    put(writer)
    marked(tmp_path / "j", writer.incarnation.id, writer.sync())
    writer.close()
    assert held(look(tmp_path / "j")) == [1]
