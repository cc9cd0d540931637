"""The writing side: LSNs, rotation, quota, freeing, sync."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.journal.errors import JournalFailed, JournalFull
from agent.journal.segments import list_free, list_segments, segment_path
from agent.journal.writer import JournalWriter
from farshore.clock import SystemClock
from farshore.errors import Conflict
from farshore.hrl.batch import BATCH_PAYLOAD_BYTES_MAX
from farshore.units import KIB, MIB
from tests.fakes.clock import ManualClock
from tests.harness.journal import MACHINE, VOLUME, held, look, marked, opened, put


def fill(writer: JournalWriter, segments: int) -> None:
    """Append until ``segments`` further segments have begun."""
    for _ in range(segments):
        number = len(list_segments(writer._directory))
        while len(list_segments(writer._directory)) == number:
            put(writer, 8, 4096)


def test_lsns_start_at_one_and_never_skip(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j")
    assert [put(writer, 3), put(writer), put(writer, 2)] == [3, 4, 6]
    assert (writer.next_lsn, writer.appended_lsn, writer.durable_lsn) == (7, 6, 0)
    assert writer.sync() == writer.durable_lsn == 6


def test_sync_covers_what_was_appended_before_it_across_segments(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j")
    fill(writer, 3)
    last = writer.appended_lsn
    assert writer.sync() == last
    marked(tmp_path / "j", writer.incarnation.id, last)
    writer.close()
    assert held(look(tmp_path / "j")) == list(range(1, last + 1))


def test_segments_are_prepared_ahead_and_used_in_order(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j")
    assert writer.prepare()
    assert writer.prepare()
    assert [number for number, _ in list_segments(tmp_path / "j")] == [1, 2]
    fill(writer, 1)
    assert [number for number, _ in list_segments(tmp_path / "j")] == [1, 2, 3]


def test_rotation_after_a_time_needs_no_full_segment(tmp_path: Path) -> None:
    clock = ManualClock()
    writer = opened(tmp_path / "j", clock, segment_seconds=60)
    put(writer)
    clock.advance(59)
    put(writer)
    assert len(list_segments(tmp_path / "j")) == 1
    clock.advance(1)
    put(writer)
    assert len(list_segments(tmp_path / "j")) == 2


def test_full_quota_writes_nothing_and_goes_on_when_something_is_freed(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j", quota_bytes=192 * KIB)
    with pytest.raises(JournalFull):
        fill(writer, 9)
    last, digest = writer.appended_lsn, writer.digest
    assert not writer.prepare()
    with pytest.raises(JournalFull):
        put(writer, 8, 4096)
    assert (writer.appended_lsn, writer.digest) == (last, digest)
    writer.sync()
    assert writer.free(last, last) > 0
    assert put(writer, 8, 4096) == last + 8
    assert sum(path.stat().st_size for path in (tmp_path / "j").iterdir()) <= 192 * KIB


def test_a_segment_is_freed_when_it_is_vaulted_and_stable_and_durable(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j")
    fill(writer, 2)
    last = writer.appended_lsn
    before = writer.backlog_bytes
    assert writer.free(last, last) == 0, "not durable"
    writer.sync()
    assert writer.free(last, 0) == writer.free(0, last) == 0
    ends = look(tmp_path / "j", every_byte=True).segments[0].last_lsn
    assert writer.free(ends, last) == 0, "the server still needs its SEAL"
    freed = writer.free(ends + 1, ends)
    assert freed > 0
    assert before - writer.backlog_bytes == freed
    assert [number for number, _ in list_segments(tmp_path / "j")][:1] == [2]
    assert [number for number, _ in list_free(tmp_path / "j")] == [1]


def test_freed_files_are_recycled(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j")
    fill(writer, 2)
    inodes = {os.stat(path).st_ino for _, path in list_segments(tmp_path / "j")}
    writer.sync()
    writer.free(writer.durable_lsn, writer.durable_lsn)
    fill(writer, 2)
    assert os.stat(list_segments(tmp_path / "j")[-1][1]).st_ino in inodes


def test_a_hard_linked_segment_is_never_recycled(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j")
    fill(writer, 1)
    copy = tmp_path / "copy"
    os.link(segment_path(tmp_path / "j", 1), copy)
    content = copy.read_bytes()
    writer.sync()
    assert writer.free(writer.durable_lsn, writer.durable_lsn)
    assert list_free(tmp_path / "j") == []
    fill(writer, 3)
    assert copy.read_bytes() == content


def test_a_batch_larger_than_a_segment_gets_one_of_its_own(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j", quota_bytes=32 * MIB)
    put(writer)
    put(writer, 1, BATCH_PAYLOAD_BYTES_MAX)
    put(writer)
    writer.sync()
    marked(tmp_path / "j", writer.incarnation.id, 3)
    writer.close()
    assert held(look(tmp_path / "j")) == [1, 2, 3]


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    first = opened(tmp_path / "j")
    with pytest.raises(Conflict):
        opened(tmp_path / "j")
    first.close()
    opened(tmp_path / "j").close()


def test_a_new_incarnation_is_above_what_the_server_has(tmp_path: Path) -> None:
    first = opened(tmp_path / "j")
    put(first, 5)
    first.sync()
    marked(tmp_path / "j", first.incarnation.id, 5)
    first.close()
    second = opened(tmp_path / "j", above_lsn=70, above_ordinal=9)
    assert (second.next_lsn, second.incarnation.ordinal) == (71, 10)
    assert (second.incarnation.previous, second.incarnation.previous_last_lsn) == (first.incarnation.id, 5)
    put(second)
    second.sync()
    second.close()
    assert held(look(tmp_path / "j")) == [1, 2, 3, 4, 5, 71]


def test_sealed_means_closed(tmp_path: Path) -> None:
    writer = opened(tmp_path / "j")
    put(writer)
    writer.seal(clean=True)
    calls: list[Callable[[], object]] = [lambda: put(writer), writer.sync, writer.prepare]
    for call in calls:
        with pytest.raises(JournalFailed):
            call()
    writer.close()
    writer.close()
    marked(tmp_path / "j", writer.incarnation.id, 1)
    found = look(tmp_path / "j")
    assert (found.clean, found.last_lsn, found.digest) == (True, 1, writer.digest)


def test_an_error_of_the_disk_ends_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = opened(tmp_path / "j")
    put(writer)
    calls = []

    def failing(fd: int) -> None:
        calls.append(fd)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(JournalFailed):
        writer.sync()
    monkeypatch.undo()
    refused: list[Callable[[], object]] = [
        lambda: put(writer),
        lambda: writer.free(9, 9),
        writer.sync,
        writer.prepare,
    ]
    for call in refused:
        with pytest.raises(JournalFailed):
            call()
    assert len(calls) == 1
    assert writer.durable_lsn == 0
    writer.close()


def test_what_the_page_cache_held_is_written_again_before_it_is_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = opened(tmp_path / "j")
    put(writer, 2)
    writer.sync()
    marked(tmp_path / "j", writer.incarnation.id, 2)
    put(writer, 3)
    writer.close()
    written: list[tuple[int, int]] = []
    pwritev = os.pwritev

    def recorded(fd: int, buffers: list[bytes], at: int) -> int:
        written.append((at, sum(map(len, buffers))))
        return pwritev(fd, buffers, at)

    monkeypatch.setattr(os, "pwritev", recorded)
    found = look(tmp_path / "j")
    segment = found.segments[0]
    assert 4096 < segment.soft_from < segment.end
    opened(tmp_path / "j", recovered=found).close()
    assert (segment.soft_from, segment.end - segment.soft_from) in written


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for segment_bytes, quota_bytes in ((1000, MIB), (64 * KIB, 64 * KIB), (4096, MIB)):
        with pytest.raises(ValueError, match="segment"):
            opened(tmp_path / "j", segment_bytes=segment_bytes, quota_bytes=quota_bytes)


def test_no_room_for_the_first_segment_is_full_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(fd: int, at: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(JournalFull):
        opened(tmp_path / "j")
    monkeypatch.undo()
    assert list((tmp_path / "j").iterdir()) == []
    writer = JournalWriter.open(
        tmp_path / "j",
        machine=MACHINE,
        volume=VOLUME,
        volume_bytes=MIB,
        sector_bytes=512,
        segment_bytes=64 * KIB,
        quota_bytes=MIB,
        recovered=look(tmp_path / "j"),
        clock=SystemClock(),
    )
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert not writer.prepare()
    with pytest.raises(JournalFull):
        fill(writer, 1)
    monkeypatch.undo()
    assert writer.prepare()
    fill(writer, 1)
    writer.close()
