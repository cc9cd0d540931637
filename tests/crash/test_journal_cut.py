"""A journal cut or changed anywhere: never a wrong record, damage below the mark is told (F7, F8, I4)."""

import os
import random
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.journal.segments import segment_path
from farshore.units import KIB, MIB
from tests.harness.faults import Injected
from tests.harness.journal import held, look, marked, opened, put


@dataclass(slots=True)
class Log:
    """One open segment: where each batch ends, and the last LSN there."""

    directory: Path
    path: Path
    ends: list[int]
    last_lsns: list[int]
    incarnation: bytes

    def whole_at(self, kept: int) -> int:
        """Last LSN whose batch is wholly in the first ``kept`` bytes."""
        index = bisect_right(self.ends, kept)
        return self.last_lsns[index - 1] if index else 0

    def mark(self, durable_lsn: int) -> None:
        (self.directory / "mark").unlink(missing_ok=True)
        marked(self.directory, self.incarnation, durable_lsn)


def written(directory: Path, batches: int, count: int, size: int, segment_bytes: int) -> Log:
    writer = opened(directory, segment_bytes=segment_bytes, quota_bytes=4 * segment_bytes)
    ends, last_lsns = [], []
    for _ in range(batches):
        last_lsns.append(put(writer, count, size))
        ends.append(writer.backlog_bytes)
    writer.sync()
    log = Log(directory, segment_path(directory, 1), ends, last_lsns, writer.incarnation.id)
    writer.close()
    return log


def check(log: Log, kept: int, durable_lsn: int) -> None:
    """The log was cut to ``kept`` bytes."""
    found = look(log.directory, every_byte=True)
    whole = log.whole_at(kept)
    if whole < durable_lsn or kept < 4096:
        assert found.corrupt
        assert found.floor_lsn >= durable_lsn
        return
    assert found.corrupt is None
    assert found.last_lsn == whole
    assert held(found) == list(range(1, whole + 1))
    last_end = max((end for end in log.ends if end <= kept), default=4096)
    assert (found.torn_tail_bytes > 0) == (kept > last_end and log.path.read_bytes()[last_end:] != b"")


@pytest.mark.fault("F7")
def test_cut_at_every_byte_of_the_last_records(tmp_path: Path, injected: Injected) -> None:
    log = written(tmp_path / "j", 12, 1, 300, 64 * KIB)
    for durable_lsn in (0, 10):
        whole = log.path.read_bytes()
        log.mark(durable_lsn)
        for kept in range(log.ends[-1], log.ends[-4] - 1, -1):
            os.truncate(log.path, kept)
            injected("F7")
            found = look(log.directory)
            assert found.last_lsn == (log.whole_at(kept) if found.corrupt is None else 0)
            assert (found.corrupt is not None) == (log.whole_at(kept) < durable_lsn)
            assert found.torn_tail_bytes == (0 if found.corrupt else kept - log.ends[log.whole_at(kept) - 1])
            if found.corrupt is None:
                assert held(found) == list(range(1, log.whole_at(kept) + 1))
        log.path.write_bytes(whole)


@pytest.mark.fault("F7")
@pytest.mark.timeout(3600)
def test_cut_at_sampled_bytes_of_a_mebibyte(
    tmp_path: Path, injected: Injected, request: pytest.FixtureRequest
) -> None:
    samples = 20_000 if request.config.getoption("--nightly") else 150
    rng = random.Random(7)
    log = written(tmp_path / "j", 60, 4, 4096, 2 * MIB)
    assert log.ends[-1] > MIB * 0.9
    durable_lsn = 100
    log.mark(durable_lsn)
    for kept in sorted(rng.sample(range(log.ends[-1]), samples), reverse=True):
        os.truncate(log.path, kept)
        injected("F7")
        check(log, kept, durable_lsn)


@pytest.mark.fault("F8")
def test_every_bit_of_the_batches_and_of_the_header(tmp_path: Path, injected: Injected) -> None:
    """With all of it vouched for: told, or without effect. With nothing: a shorter log, never a wrong one."""
    log = written(tmp_path / "j", 3, 1, 20, 64 * KIB)
    raw = log.path.read_bytes()
    in_header = [*range(208 * 8), *range(208 * 8, 4064 * 8, 211), *range(4064 * 8, 4096 * 8)]
    bits = [*in_header, *range(4096 * 8, (log.ends[-1] + 64) * 8)]
    for durable_lsn in (3, 0):
        log.mark(durable_lsn)
        harmless = 0
        with log.path.open("r+b", buffering=0) as file:
            for bit in bits:
                at = bit // 8
                os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << bit % 8]), at)
                injected("F8")
                found = look(log.directory)
                records = held(found) if found.segments else []
                assert records == list(range(1, len(records) + 1))
                if durable_lsn:
                    harmless += found.corrupt is None
                    assert found.corrupt or records == [1, 2, 3]
                os.pwrite(file.fileno(), raw[at : at + 1], at)
        padding = 3 * (-(64 + 24 + 20) % 8) * 8  # behind each batch; the digest does not cover it
        assert harmless <= (padding + 64 * 8) * bool(durable_lsn)


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3, 60))]
)
def test_flipped_bits_of_a_log_of_several_segments(tmp_path: Path, seed: int, injected: Injected) -> None:
    """Below the mark: told, whichever segment it is. Between the batches' bytes nothing else is there."""
    rng = random.Random(seed)
    directory = tmp_path / "j"
    writer = opened(directory)
    for _ in range(40):
        put(writer, 2, 4096)
    last = writer.sync()
    marked(directory, writer.incarnation.id, last)
    writer.close()
    segments = look(directory).segments
    assert len(segments) > 4
    for _ in range(150):
        segment = rng.choice(segments)
        at = rng.choice([rng.randrange(208), rng.randrange(4096, segment.end)])
        raw = segment.path.read_bytes()[at]
        with segment.path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes([raw ^ 1 << rng.randrange(8)]), at)
            injected("F8")
            found = look(directory)
            first = found.segments[0].first_lsn - 1 if found.segments else found.last_lsn
            records = held(found, first)
            assert found.corrupt
            assert records == list(range(first + 1, first + 1 + len(records)))
            os.pwrite(file.fileno(), bytes([raw]), at)
    assert look(directory).corrupt is None


def test_a_stale_tail_of_the_same_incarnation_does_not_come_back(tmp_path: Path) -> None:
    """The second crash is the dangerous one: what the first cut off lies behind what is written next."""
    directory = tmp_path / "j"
    log = written(directory, 8, 1, 300, 64 * KIB)
    log.mark(4)
    tail = log.path.read_bytes()
    with log.path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"\0" * 16, log.ends[4])  # the sixth batch did not reach the disk
    writer = opened(directory)
    assert writer.next_lsn == 6
    put(writer, 1, 300)
    writer.sync()
    writer.close()
    log.path.write_bytes(tail)  # and now its page does
    found = look(directory)
    assert found.corrupt is None
    assert found.last_lsn == 6
    assert held(found) == [1, 2, 3, 4, 5, 6]
    assert found.segments[0].last_lsn == 5
