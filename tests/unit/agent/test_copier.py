"""Reads that count and reads that do not, and how extents become frames."""

import os
import random
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from agent.journal.state import StatePageWriter
from agent.replicate import copier, disk, ipc
from agent.replicate.disk import READ_BYTES, Position, Reader
from farshore.wire import messages as m


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


class NotingLink:
    """Takes what is sent, and reads nothing."""

    wire_bytes = 0

    def __init__(self) -> None:
        self.sent: list[m.Message] = []

    def send(self, message: m.Message, raw: Sequence[bytes | memoryview] = ()) -> None:
        self.sent.append(message)


@pytest.fixture
def scanning(tmp_path: Path) -> Iterator[tuple[copier.Copier, NotingLink, Path]]:
    page = StatePageWriter.create(tmp_path / "state", incarnation=bytes(16), boot_id=bytes(16))
    page.update(captured_lsn=9, applied_lsn=9)
    setup = ipc.Setup("localhost", 1, bytes(16), "", bytes(16), 1 << 24, 65536, 0, None)
    ours, theirs = socket.socketpair()
    link = NotingLink()
    with ours, theirs:
        yield copier.Copier(setup, ours, link, bytearray()), link, tmp_path  # type: ignore[arg-type]
    page.close()


def offer(made: copier.Copier, folder: Path, number: int, *, scan: int) -> None:
    """Have a work read and offered."""
    volume = ipc.Volume(b"v" * 16, str(folder / "disk"), str(folder / "state"), scan)
    made.take(ipc.Work(number, volume, 0, 65536, True, 0))
    while made._step():
        pass


def offered(link: NotingLink) -> tuple[int, bytes]:
    message = link.sent[-1]
    assert isinstance(message, m.Offer)
    return message.token, message.chunks[0].hash


def test_every_pass_opens_the_disk_anew_and_lets_go_of_it(
    scanning: tuple[copier.Copier, NotingLink, Path],
) -> None:
    made, link, folder = scanning
    before = set(os.listdir("/proc/self/fd"))
    for scan in (1, 2):
        # A snapshot of the same name, made anew.
        (folder / "disk").unlink(missing_ok=True)
        (folder / "disk").write_bytes(bytes([scan]) * 65536)
        offer(made, folder, scan, scan=scan)
        token, digest = offered(link)
        assert digest == blake3(bytes([scan]) * 65536).digest()
        assert set(os.listdir("/proc/self/fd")) > before
        made._heard(m.Have(token, bytes([m.HAVE_SAME])))
        while made._step():
            pass
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_changes_between_works_of_two_passes_is_not_read_by_its_old_name(
    scanning: tuple[copier.Copier, NotingLink, Path],
) -> None:
    made, link, folder = scanning
    for scan in (1, 2):
        (folder / "disk").unlink(missing_ok=True)
        (folder / "disk").write_bytes(bytes([scan]) * 65536)
        offer(made, folder, scan, scan=scan)
        assert offered(link)[1] == blake3(bytes([scan]) * 65536).digest()


def test_a_disk_that_cannot_be_read_is_named(scanning: tuple[copier.Copier, NotingLink, Path]) -> None:
    made, _, folder = scanning
    with pytest.raises(copier.DiskFault) as missing:
        offer(made, folder, 1, scan=1)
    assert missing.value.volume == b"v" * 16
    (folder / "disk").write_bytes(bytes(512))
    with pytest.raises(copier.DiskFault, match="ends at byte 512") as short:
        offer(made, folder, 2, scan=1)
    assert short.value.volume == b"v" * 16
