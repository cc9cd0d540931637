"""What a session reads of the journal, and what it lets the tap free."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.capture.scan import ScanReplica
from agent.journal.reader import IncarnationStart
from agent.journal.state import DATA, StatePageWriter
from agent.link import Server
from agent.replicate.delta import Frame, start_message
from agent.replicate.job import Job, whole_volume
from agent.replicate.ports import Item, VolumeSpec
from agent.replicate.replica import Replica
from agent.replicate.session import Restart, Session
from farshore.clock import SystemClock
from farshore.errors import Unreachable
from farshore.hrl.cut import Cut, CutVolume
from farshore.hrl.segment import Incarnation
from farshore.wire import messages as m

VOLUME, INCARNATION = b"v" * 16, b"i" * 16


class NotingJournal:
    """Has nothing, and notes up to where it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, int]] = []

    def position(self, incarnation_id: bytes, lsn: int, digest: bytes) -> bool:
        return True

    def start_at_oldest(self) -> None:
        pass

    def start_at_newest(self) -> None:
        pass

    def read(self, durable: tuple[bytes, int], bytes_max: int) -> list[Item]:
        self.asked.append(durable)
        return []

    def announce(self, durable: tuple[bytes, int]) -> list[Item]:
        self.asked.append(durable)
        return []


class NotingTap:
    """Notes what it is told of as vaulted."""

    def __init__(self) -> None:
        self.vaulted_lsns: list[int] = []

    async def vaulted(self, volume: bytes, incarnation: bytes, lsn: int) -> None:
        self.vaulted_lsns.append(lsn)

    def __getattr__(self, name: str) -> Any:
        raise Unreachable(f"no {name} here")


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Session, Replica, NotingJournal, NotingTap]:
    journal, tap = NotingJournal(), NotingTap()
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    spec = VolumeSpec(VOLUME, "data", tmp_path / "disk", 1 << 20, 512, tmp_path, tmp_path / "state")
    page = StatePageWriter.create(spec.state_page, incarnation=INCARNATION, boot_id=bytes(16))
    page.update(captured_lsn=9, durable_lsn=5, applied_lsn=4, capture_mode=DATA, flags=0)
    replica = Replica(spec, journal)
    position = m.VolumePosition(VOLUME, INCARNATION, 1, 3, bytes(32), True, 0, False)
    welcome = m.Welcome(1, b"s" * 16, b"V" * 16, 1, 1, m.Policy(1.0, 65536, 1, 1 << 20), (position,))
    link: Any = SimpleNamespace(server=Server("localhost", 1, b"V" * 16, tmp_path))
    counters: Any = SimpleNamespace(sent=lambda *_: None, record=lambda *_: None)
    replicas = {VOLUME: replica}

    async def command(message: m.Command) -> m.Result:
        raise AssertionError

    return Session(link, welcome, replicas, tap, counters, command), replica, journal, tap


async def test_the_journal_is_read_as_far_as_it_is_durable(
    parts: tuple[Session, Replica, NotingJournal, NotingTap],
) -> None:
    session, replica, journal, _ = parts
    await session._open(replica)
    await asyncio.wait_for(session._send_records(session.streams[VOLUME], replica), 10)
    assert set(journal.asked) == {(INCARNATION, 5)}


async def test_the_tap_may_free_what_is_vaulted_and_nothing_else(
    parts: tuple[Session, Replica, NotingJournal, NotingTap],
) -> None:
    session, replica, _, tap = parts
    await session._open(replica)
    for level, lsn in (("received", 5), ("vaulted", 4)):
        here = m.Vaulted(VOLUME, INCARNATION, lsn, bytes(32))
        await session._acknowledged(m.Ack(level, lsn, 2, "p", "crash", (here,)))
    assert tap.vaulted_lsns == [4]
    assert replica.vaulted_lsn == 4


async def test_no_mark_is_sent_while_a_cut_over_scanned_volumes_is_taken(
    parts: tuple[Session, Replica, NotingJournal, NotingTap],
) -> None:
    session, replica, _, tap = parts
    await session._open(replica)
    sent: list[m.Message] = []
    asked, answer = asyncio.Event(), asyncio.Event()
    entry = CutVolume(VOLUME, INCARNATION, 3, False)
    whole = Cut(7, 0, None, (entry, CutVolume(b"w" * 16, INCARNATION, 1, False)))

    async def send(message: m.Message) -> None:
        sent.append(message)

    async def cut(tag: str | None) -> Cut:
        asked.set()
        await answer.wait()
        return whole

    session.link.send, tap.cut = send, cut  # type: ignore[method-assign,attr-defined]
    taking = asyncio.create_task(session.marks._cut(None))
    await asyncio.wait_for(asked.wait(), 10)
    # The journal tells of it already, without the volume that has no journal.
    session.marks.pending.add(Cut(7, 0, None, (entry,)))
    session.replicas[b"w" * 16] = SimpleNamespace(  # type: ignore[assignment]
        scanned=True, served=True, journal=None, fuzzy_anyway=lambda: False, awaited=lambda now_s: False
    )
    session._place(m.VolumePosition(b"w" * 16, INCARNATION, 1, 1, bytes(32), True, 0, False))
    session.streams[b"w" * 16].opened = True
    assert not await session.marks.send()
    answer.set()
    session.marks._took(await taking)
    assert session.marks.pending.first() == whole
    assert await session.marks.send()
    assert isinstance(sent[-1], m.Mark)


@pytest.mark.parametrize("given_up", [False, True])
async def test_who_asked_for_a_cut_is_told_also_when_the_journal_was_faster_than_the_tap(
    parts: tuple[Session, Replica, NotingJournal, NotingTap], given_up: bool
) -> None:
    """The MARK is durable, read and sent before the tap's answer is: nobody would send it once more."""
    session, replica, _, tap = parts
    await session._open(replica)
    sent: list[m.Message] = []
    asked, answer = asyncio.Event(), asyncio.Event()
    whole = Cut(7, 0, "t", (CutVolume(VOLUME, INCARNATION, 2 if given_up else 3, False),))

    async def send(message: m.Message) -> None:
        sent.append(message)

    async def cut(tag: str | None) -> Cut:
        asked.set()
        await answer.wait()
        return whole

    session.link.send, tap.cut = send, cut  # type: ignore[method-assign,attr-defined]
    taking = asyncio.create_task(session.marks.take("t"))
    await asyncio.wait_for(asked.wait(), 10)
    session.marks.pending.add(whole)
    assert await session.marks.send() != given_up
    answer.set()
    if given_up:
        with pytest.raises(Unreachable, match="given up"):
            await asyncio.wait_for(taking, 5)
    else:
        assert await asyncio.wait_for(taking, 5) == 7
        assert [type(message) for message in sent] == [m.Mark]


def test_a_tap_s_copy_goes_before_a_pass_over_a_scanned_disk(
    parts: tuple[Session, Replica, NotingJournal, NotingTap], tmp_path: Path
) -> None:
    session, replica, _, _ = parts
    root = ScanReplica(
        VolumeSpec(b"a" * 16, "root", tmp_path / "disk", 1 << 20, 512, tmp_path, tmp_path / "page"),
        900.0,
        True,
        SystemClock(),
    )
    position = m.VolumePosition(b"a" * 16, bytes(16), 0, 0, bytes(32), False, 0, True)
    root.open(position)
    begun = root.begin(root.look(), position)
    session.streams.clear()
    session.replicas[root.spec.id] = root
    for place in (position, session.welcome.volumes[0]):
        session._place(place)
        job = Job("resync", whole_volume(1 << 20), compare=True, after=0)
        session.works.begin(session.streams[place.id], job)
    assert list(session.streams) == [root.spec.id, VOLUME]
    works = [session.works.next_work(number) for number in (1, 2)]
    assert [(work.volume.id, work.volume.scan) for work in works if work is not None] == [
        (VOLUME, 0),
        (root.spec.id, begun.number),
    ]
    assert replica.spec.id == VOLUME
    # A copier that cannot read one of the disks says which: the other is not blamed.
    session.works.given_back([1, 2], "disk", "it is gone", root.spec.id)
    assert (replica.problem, root.problem) == ("", "the disk cannot be read: it is gone")
    assert session.streams[root.spec.id].job is None
    assert session.streams[VOLUME].job is not None
    root.close()


async def test_a_machine_of_disks_that_are_fuzzy_anyway_asks_for_no_better_cut(
    parts: tuple[Session, Replica, NotingJournal, NotingTap],
) -> None:
    session, replica, _, _ = parts
    await session._open(replica)
    session.marks.passed_over(VOLUME, 9)
    assert session.marks.needed()  # the last one was fuzzy, and the tap's would not be
    replica.fuzzy_anyway = lambda: True  # type: ignore[method-assign]
    assert not session.marks.needed()


async def test_a_resync_is_not_over_by_what_was_copied_before_it(
    parts: tuple[Session, Replica, NotingJournal, NotingTap],
) -> None:
    """MARKs from before it say that all is copied, and are acknowledged while it goes on, and after it."""
    session, replica, _, _ = parts
    await session._open(replica)
    stream = session.streams[VOLUME]
    seqs: list[int] = []

    async def send(message: m.Message) -> None:
        if isinstance(message, m.Mark):
            seqs.append(message.cut_seq)

    async def mark() -> None:
        await session.marks._send_mark(Cut(0, 0, None, (CutVolume(VOLUME, INCARNATION, 3, False),)))

    async def ack(seq: int) -> None:
        here = m.Vaulted(VOLUME, INCARNATION, 3, bytes(32))
        await session._acknowledged(m.Ack("vaulted", seq, 1, "p", "crash", (here,)))

    session.link.send = send  # type: ignore[method-assign]
    for _ in range(3):
        await mark()
    await session.resync(replica)
    session._start_full(stream, replica, replica.state())
    job = stream.job
    await ack(seqs[0])
    assert (stream.job, stream.resync, replica.resync) == (job, True, True)
    assert job is not None
    while job.take(1) is not None:
        job.done(1)
    await mark()
    assert stream.copied
    for seq in seqs[1:3]:
        await ack(seq)
        assert (stream.job, stream.resync, replica.resync) == (job, True, True)
    await ack(seqs[3])
    assert (stream.job, stream.resync, replica.resync) == (None, False, False)


@pytest.mark.parametrize("reading", [False, True])
async def test_a_gap_in_a_journal_ends_only_a_session_that_is_reading_the_disk(
    parts: tuple[Session, Replica, NotingJournal, NotingTap], reading: bool
) -> None:
    session, replica, _, _ = parts
    await session._open(replica)
    stream = session.streams[VOLUME]
    sent: list[m.Message] = []

    async def send(message: m.Message) -> None:
        sent.append(message)

    session.link.send = send  # type: ignore[method-assign]
    session.works.begin(stream, Job("resync", whole_volume(1 << 20), compare=True, after=0))
    assert not reading or session.works.next_work(1) is not None
    start = IncarnationStart(Incarnation(b"j" * 16, 2, INCARNATION, 3, bytes(32)), 21)
    frame = Frame(start_message(VOLUME, start, resync=True), started=start)
    if reading:
        with pytest.raises(Restart, match="gap"):
            await session._send_frame(stream, frame)
        assert sent == []
        return
    await session._send_frame(stream, frame)
    assert sent == [frame.message]
    # What is applied is told as LSN 4 still: by the state page of the journal before the gap.
    assert session.works.next_work(1) is None
