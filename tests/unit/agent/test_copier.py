"""Reads that count and reads that do not, and how extents become frames."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.replicate import copier, disk, ipc
from agent.replicate.disk import READ_BYTES, Position, Reader


class ScriptedDisk:
    """A disk whose tap is where a test says, look by look."""

    def __init__(self, looks: list[Position], *, dead_at: frozenset[int] = frozenset()) -> None:
        self.looks, self.dead_at = list(looks), dead_at
        self.reads = 0

    def read(self, target: memoryview, offset: int) -> int:
        self.reads += 1
        size = min(len(target), 300)  # short reads
        target[:size] = bytes([self.reads % 256]) * size
        return size

    def position(self) -> Position:
        return self.looks.pop(0)

    def served(self) -> bool:
        return self.reads not in self.dead_at


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "TAP_WAIT_S", 0.0)


OLD, NEW = (7, b"a" * 16), (8, b"a" * 16)


def test_the_lsns_are_from_before_and_after_the_read() -> None:
    block = Reader(ScriptedDisk([Position(OLD, 5, 6), Position(OLD, 8, 9)])).read(0, 1000, 5)
    assert (block.applied_lsn, block.captured_lsn, len(block.view)) == (5, 9, 1000)


def test_a_read_across_a_new_tap_does_not_count() -> None:
    disk = ScriptedDisk([Position(OLD, 9, 9), Position(NEW, 9, 9), Position(NEW, 9, 9), Position(NEW, 9, 10)])
    block = Reader(disk).read(0, 300, 9)
    assert disk.reads == 2
    assert (block.applied_lsn, block.captured_lsn) == (9, 10)


def test_a_read_after_which_the_tap_is_gone_does_not_count() -> None:
    disk = ScriptedDisk([Position(OLD, 9, 9)] * 4, dead_at=frozenset({1}))
    Reader(disk).read(0, 300, 9)
    assert disk.reads == 2


def test_nothing_is_read_while_a_tap_redoes() -> None:
    redoing = Position(NEW, 3, 9)
    disk = ScriptedDisk([redoing, redoing, Position(NEW, 9, 9), Position(NEW, 9, 9)])
    assert Reader(disk).read(0, 300, 8).applied_lsn == 9
    assert disk.reads == 1


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), max_size=12), st.randoms())
def test_frames_keep_every_byte_in_order(spans: list[tuple[int, int]], rng: random.Random) -> None:
    unit = 65536
    extents, at = [], 0
    for gap, length in spans:
        at += gap * unit
        extents.append((at, length * unit))
        at += length * unit
    frames = list(copier._frames(extents))
    assert all(sum(length for _, length in frame) <= READ_BYTES for frame in frames)
    flat = [(offset, length) for frame in frames for offset, length in frame]
    pieces = [block for offset, length in flat for block in range(offset, offset + length, unit)]
    assert pieces == [block for offset, length in extents for block in range(offset, offset + length, unit)]
    assert len(frames) <= sum(length for _, length in extents) // READ_BYTES + 1


def test_messages_between_agent_and_copier_survive_any_split() -> None:
    volume = ipc.Volume(b"v" * 16, "/disk", "/page")
    messages: list[ipc.ToCopier] = [ipc.Work(n, volume, n * 512, 512, bool(n % 2), n) for n in range(9)]
    stream = b"".join(ipc.encode(message) for message in messages)
    received, got = bytearray(), []
    for value in stream:
        received.append(value)
        got += ipc.split(received, ipc.to_copier)
    assert got == messages
    assert not received
