"""Reading beside a writer: order, durability, position, and segments that go away."""

from pathlib import Path

import pytest

from agent.journal.errors import JournalGap
from agent.journal.reader import IncarnationStart, JournalReader
from agent.journal.segments import list_segments, segment_path
from agent.journal.writer import JournalWriter
from farshore.errors import CorruptRecord
from farshore.hrl.batch import SEAL, Batch, RunningDigest, first_digest, incarnation_key, iter_batches
from tests.harness.journal import MACHINE, VOLUME, lsns, marked, opened, put

ALL = 1 << 40


def durable(writer: JournalWriter) -> tuple[bytes, int]:
    return writer.incarnation.id, writer.durable_lsn


def batches(items: list[IncarnationStart | Batch]) -> list[Batch]:
    return [item for item in items if isinstance(item, Batch)]


def records(items: list[IncarnationStart | Batch]) -> list[int]:
    return [lsn for batch in batches(items) for lsn in lsns(batch)]


def test_only_durable_records_are_returned_each_once(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    reader = JournalReader(tmp_path)
    reader.start_at_oldest()
    put(writer, 3)
    assert reader.read(durable(writer), ALL) == []
    writer.sync()
    put(writer, 2)
    items = reader.read(durable(writer), ALL)
    assert items[0] == IncarnationStart(writer.incarnation, 1)
    assert records(items) == [1, 2, 3]
    writer.sync()
    assert records(reader.read(durable(writer), ALL)) == [4, 5]
    assert reader.last_digest == writer.digest
    assert reader.read(durable(writer), ALL) == []


def test_a_server_can_follow_the_chain_over_segments_and_incarnations(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path)
    items: list[IncarnationStart | Batch] = []
    for round_number in range(4):
        writer = opened(tmp_path)
        if round_number != 1:  # one incarnation without a record
            while len(list_segments(tmp_path)) < 3 * (round_number + 1):
                put(writer, 4, 4096)
        last = writer.sync()
        marked(tmp_path, writer.incarnation.id, last)
        if not round_number:
            reader.start_at_oldest()
        items += reader.read(durable(writer), ALL)
        if round_number == 2:
            writer.seal(clean=True)
        writer.close()
    assert records(items) == list(range(1, last + 1))
    chain, lsn = RunningDigest(b"", bytes(32)), 0
    for item in items:
        if isinstance(item, IncarnationStart):
            there = item.incarnation
            assert (there.previous_last_lsn, there.previous_digest) == (lsn, chain.value)
            key = incarnation_key(MACHINE, VOLUME, there.id)
            digest = first_digest(key, there.previous, there.previous_last_lsn, there.previous_digest)
            chain = RunningDigest(key, digest)
        else:
            assert next(iter_batches(item.raw, chain, lsn + 1)).digest == item.digest
            lsn = item.last_lsn
    assert len([item for item in items if isinstance(item, IncarnationStart)]) == 4


def test_a_seal_comes_only_with_a_record_behind_it(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    reader = JournalReader(tmp_path)
    reader.start_at_oldest()
    put(writer)
    writer.seal(clean=True)
    assert [batch.flags for batch in batches(reader.read(durable(writer), ALL))] == [0]
    assert reader.read(durable(writer), ALL) == []
    before_seal = reader.last_digest
    assert before_seal != writer.digest
    writer.close()
    marked(tmp_path, writer.incarnation.id, 1)
    second = opened(tmp_path)
    assert reader.read(durable(second), ALL) == []
    put(second)
    second.sync()
    items = reader.read(durable(second), ALL)
    assert [item.flags & SEAL if isinstance(item, Batch) else None for item in items] == [SEAL, None, 0]
    assert JournalReader(tmp_path).position(writer.incarnation.id, 1, before_seal)
    assert JournalReader(tmp_path).position(writer.incarnation.id, 1, writer.digest)


def test_bytes_max_bounds_an_answer_but_never_blocks(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    for _ in range(20):
        put(writer, 1, 4096)
    writer.sync()
    reader = JournalReader(tmp_path)
    reader.start_at_oldest()
    got: list[int] = []
    while items := reader.read(durable(writer), 10_000):
        assert sum(len(batch.raw) for batch in batches(items)) <= 10_000
        got += records(items)
        assert reader.last_digest == batches(items)[-1].digest
    assert got == list(range(1, 21))
    reader.start_at_oldest()
    assert records(reader.read(durable(writer), 1)) == [1]


def test_position_finds_exactly_the_record_with_exactly_the_digest(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    digests = {}
    while len(list_segments(tmp_path)) < 4:
        lsn = put(writer, 3, 2048)
        digests[lsn] = writer.digest
    last = writer.sync()
    reader = JournalReader(tmp_path)
    for lsn, digest in digests.items():
        assert reader.position(writer.incarnation.id, lsn, digest)
        assert reader.last_digest == digest
        items = reader.read(durable(writer), ALL)
        assert records(items) == list(range(lsn + 1, last + 1))
        if items:
            assert items[0] == IncarnationStart(writer.incarnation, lsn + 1)
        assert not reader.position(writer.incarnation.id, lsn, bytes(32))
        assert not reader.position(writer.incarnation.id, lsn - 1, digest), "inside a batch"
        assert not reader.position(bytes(16), lsn, digest)
    with pytest.raises(JournalGap):
        reader.read(durable(writer), ALL)


def test_position_behind_records_that_were_cut_is_refused(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    put(writer)
    marked(tmp_path, writer.incarnation.id, writer.sync())
    kept = writer.digest
    put(writer)
    lost = writer.digest
    writer.close()
    path = segment_path(tmp_path, 1)
    raw = bytearray(path.read_bytes())
    raw[4096 + 700] ^= 1  # the second batch, as if its page had not reached the disk
    whole = path.read_bytes()
    path.write_bytes(raw)
    opened(tmp_path).close()
    path.write_bytes(whole)  # even if the bytes come back
    reader = JournalReader(tmp_path)
    assert reader.position(writer.incarnation.id, 1, kept)
    assert not reader.position(writer.incarnation.id, 2, lost)


def test_position_is_known_after_its_segment_was_freed(tmp_path: Path) -> None:
    first = opened(tmp_path)
    put(first)
    first.seal(clean=True)
    marked(tmp_path, first.incarnation.id, 1, 1)
    first.close()
    second = opened(tmp_path)
    put(second)
    second.sync()
    assert second.free(2, 2)
    assert [number for number, _ in list_segments(tmp_path)] == [2]
    reader = JournalReader(tmp_path)
    assert reader.position(first.incarnation.id, 1, first.digest)
    assert records(reader.read(durable(second), ALL)) == [2]


def test_every_vaulted_position_survives_freeing_up_to_it(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    digests = {}
    while len(list_segments(tmp_path)) < 6:
        lsn = put(writer, 3, 2048)
        digests[lsn] = writer.digest
    writer.sync()
    for lsn, digest in digests.items():
        writer.free(lsn, lsn)
        assert JournalReader(tmp_path).position(writer.incarnation.id, lsn, digest), lsn


def test_a_segment_freed_and_recycled_under_the_reader_is_a_gap_not_other_records(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    while len(list_segments(tmp_path)) < 4:
        put(writer, 4, 4096)
    writer.sync()
    reader = JournalReader(tmp_path)
    reader.start_at_oldest()
    assert records(reader.read(durable(writer), 20_000)) == [1, 2, 3, 4]
    writer.free(writer.durable_lsn, writer.durable_lsn)
    while len(list_segments(tmp_path)) < 4:
        put(writer, 4, 4096)
        writer.sync()
    assert records(reader.read(durable(writer), 20_000)) == [5, 6, 7, 8], "read before, and checked then"
    with pytest.raises(JournalGap):
        reader.read(durable(writer), ALL)
    with pytest.raises(JournalGap):
        reader.start_at_newest()


def test_damage_ends_reading_behind_what_was_sound(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    for _ in range(3):
        put(writer, 1, 4096)
    writer.sync()
    path = segment_path(tmp_path, 1)
    raw = bytearray(path.read_bytes())
    raw[4096 + 4184 * 2 + 2000] ^= 1
    path.write_bytes(raw)
    reader = JournalReader(tmp_path)
    reader.start_at_newest()
    assert records(reader.read(durable(writer), ALL)) == [1, 2]
    for _ in range(2):
        with pytest.raises(CorruptRecord):
            reader.read(durable(writer), ALL)


def test_nothing_is_read_for_an_incarnation_not_known_yet(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    put(writer)
    writer.sync()
    reader = JournalReader(tmp_path)
    reader.start_at_newest()
    assert reader.read((bytes(16), 99), ALL) == []
    assert records(reader.read(durable(writer), ALL)) == [1]


def test_an_empty_directory_is_a_gap(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path / "none")
    with pytest.raises(JournalGap):
        reader.start_at_oldest()
    assert not reader.position(bytes(16), 1, bytes(32))
    reader.close()


def test_an_incarnation_without_records_is_announced_when_the_tap_writes_it(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    reader = JournalReader(tmp_path)
    reader.start_at_oldest()
    assert reader.read(durable(writer), ALL) == []
    (start,) = reader.announce(durable(writer))
    assert isinstance(start, IncarnationStart)
    assert (start.incarnation.id, start.first_lsn) == (writer.incarnation.id, 1)
    assert reader.announce(durable(writer)) == []
    put(writer)
    writer.seal(clean=True)
    assert len(batches(reader.read(durable(writer), ALL))) == 1
    writer.close()
    marked(tmp_path, writer.incarnation.id, 1)
    second = opened(tmp_path)
    assert reader.read(durable(second), ALL) == []
    seal, start = reader.announce(durable(second))
    assert isinstance(start, IncarnationStart)
    assert not isinstance(seal, IncarnationStart)
    assert (seal.count, start.incarnation.previous_digest) == (0, seal.digest)
    assert reader.last_digest == second.digest
    second.close()
