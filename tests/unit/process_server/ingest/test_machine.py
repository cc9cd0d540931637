"""A commit comes after the packs it names, and the agent hears of it after both."""

import asyncio
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from farshore.clock import SystemClock
from farshore.wire import messages as m
from process_server.ingest.machine import Head, InlinePack, Machine, PacksLost, read_head
from process_server.ingest.session import Cut, Session
from process_server.ingest.stream import Position, VolumeCut
from process_server.vault.chain import Chain
from process_server.vault.commit import ROW_DTYPE, CommitHead, CommitVolume, Rows
from process_server.vault.keys import VaultKeys
from process_server.vault.store.memory import MemoryStore
from process_server.vault.store.protocol import Body

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
MACHINE, VOLUME, PACK = b"M" * 16, b"V" * 16, b"p" * 16


class Events:
    """Store, link and workers that note what happens in which order; a pack stays on its way until told."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.packs_stored = asyncio.Event()
        self.lost = False
        self.ended = ""

    # --- link ---

    def send(self, message: m.Message) -> None:
        self.happened.append(type(message).__name__)

    def position(self, volume: bytes, key: bytes, incarnation: bytes, position: Position) -> None:
        raise AssertionError

    # --- packs ---

    def forget(self, session: Session) -> None:
        pass

    def end_session(self, session: Session, code: str, text: str) -> None:
        session.ended = self.ended = code

    async def flush(self, session: Session, inline_bytes: int) -> list[InlinePack]:
        return []

    async def store(self, session: Session, pack: InlinePack) -> None:
        raise AssertionError

    async def stored(self, session: Session, packs: set[bytes]) -> None:
        assert packs == {PACK}
        await self.packs_stored.wait()
        if self.lost:
            raise PacksLost("a pack was not stored")
        session.unstored -= packs
        self.happened.append("pack")


class NotingStore(MemoryStore):
    def __init__(self, happened: list[str]) -> None:
        super().__init__()
        self.happened = happened

    def put_new(self, name: str, body: Body) -> None:
        super().put_new(name, body)
        self.happened.append("commit")


def cut(session: Session) -> Cut:
    """One record, in a pack that is still on its way."""
    rows = np.zeros(1, ROW_DTYPE)
    rows["length"], rows["lsn"] = 512, 1
    session.packs.number(PACK)
    session.unstored.add(PACK)
    volume = VolumeCut(
        VOLUME,
        "data",
        1 << 20,
        Position(b"i" * 16, 1, 1),
        False,
        True,
        0,
        copies=[],
        records=[rows],
        record_bytes=512,
    )
    return Cut(session, 1, "now", 0, 0.0, [volume], False)


async def committing(events: Events, step: Callable[[NotingStore], None]) -> NotingStore:
    """Commit one cut; ``step`` is called when the commit has had every chance to come too early."""
    store = NotingStore(events.happened)
    chain = Chain(store, KEYS, MACHINE, b"w" * 16)

    async def committed(machine: Machine, head: CommitHead, tables: dict[bytes, Rows]) -> None:
        pass

    machine = Machine(
        MACHINE, "db1", chain, Head(), events, events, SystemClock(), pace_s=0.0, committed=committed
    )
    await machine.own(0)
    events.happened.clear()
    task = asyncio.create_task(machine.run())
    machine.add(cut(Session(MACHINE, "db1", "1", events, 1)))
    await asyncio.sleep(0.2)
    step(store)
    async with asyncio.timeout(5):
        await machine.settled()
    task.cancel()
    return store


async def test_no_commit_before_its_packs_and_no_answer_before_the_commit() -> None:
    events = Events()

    def step(store: NotingStore) -> None:
        assert events.happened == []
        events.packs_stored.set()

    await committing(events, step)
    assert events.happened == ["pack", "commit", "Ack"]


async def test_a_pack_that_is_lost_is_never_named() -> None:
    events = Events()

    def step(store: NotingStore) -> None:
        events.lost = True
        events.packs_stored.set()

    store = await committing(events, step)
    assert events.happened == []
    assert events.ended == "retry"
    heads = [commit.head for commit in Chain(store, KEYS, MACHINE).iterate()]
    assert [head.kind for head in heads] == ["fence"]


OTHER = b"O" * 16


def second(lsn: int) -> CommitVolume:
    """Where the vault stands with another volume of the machine."""
    return CommitVolume(
        id=OTHER,
        name="more",
        size_bytes=1 << 20,
        incarnation=b"k" * 16,
        ordinal=3,
        lsn=lsn,
        digest=b"d" * 32,
        fuzzy=False,
        copied=True,
        copy_end=7,
    )


class Chained:
    """A machine with two volumes in the vault, whose agent sends cuts over one of them."""

    def __init__(self) -> None:
        self.events = Events()
        self.events.packs_stored.set()
        self.chain = Chain(MemoryStore(), KEYS, MACHINE, b"w" * 16)
        self.session = Session(MACHINE, "db1", "1", self.events, 1)
        self.cut_seq = 0
        self.volume = VOLUME

    async def begin(self) -> None:
        async def committed(machine: Machine, head: CommitHead, tables: dict[bytes, Rows]) -> None:
            pass

        self.chain.fence(machine_name="db1", time_ns=0, generation=0)
        both = [second(9), msgspec.structs.replace(second(3), id=VOLUME, name="data", copy_end=0)]
        self.chain.append(
            machine_name="db1",
            time_ns=0,
            cut_seq=1,
            tag=None,
            consistency="crash",
            volumes=both,
            rows_by_volume={},
        )
        self.machine = Machine(
            MACHINE,
            "db1",
            self.chain,
            read_head(self.chain),
            self.events,
            self.events,
            SystemClock(),
            pace_s=0.0,
            committed=committed,
        )
        self.machine.session = self.session

    async def commit(self, *, name: str = "data") -> CommitHead:
        """Commit one more cut that lists the first volume alone; return the newest commit's head."""
        self.cut_seq += 1
        cut_now = cut(self.session)
        cut_now.cut_seq, cut_now.volumes[0].name = self.cut_seq, name
        cut_now.volumes[0].volume = self.volume
        task = asyncio.create_task(self.machine.run())
        self.machine.add(cut_now)
        async with asyncio.timeout(20):
            await self.machine.settled()
        task.cancel()
        assert self.chain.head is not None
        return self.chain.head


async def test_a_volume_that_a_cut_leaves_out_stays_where_it_was_and_the_point_is_fuzzy() -> None:
    here = Chained()
    await here.begin()
    for _ in range(2):
        head = await here.commit()
        kept = {volume.name: volume for volume in head.volumes}["more"]
        assert kept == msgspec.structs.replace(second(9), fuzzy=True)
        assert head.consistency == "fuzzy"
        assert not {volume.name: volume for volume in head.volumes}["data"].fuzzy
    # When it comes back it goes on from there: nothing has to be compared.
    position = here.machine.position(OTHER)
    assert position is not None
    assert (position.lsn, position.copied, position.digest) == (9, True, b"d" * 32)
    status = here.machine.status(0.0, 5.0)
    assert any("volume more is protected and the agent does not send it" in why for why in _reasons(status))


async def test_a_volume_that_was_removed_is_left_out_and_the_point_is_whole() -> None:
    for removed in ("told", "not protected", "its name is given to another"):
        here = Chained()
        await here.begin()
        match removed:
            case "told":
                here.machine.remove_volume(OTHER)
                here.machine.protects([VOLUME], None)  # an agent that says nothing gives nothing back
            case "not protected":
                here.machine.protects([VOLUME], [VOLUME])
        head = await here.commit(name="more" if "name" in removed else "data")
        assert [volume.id for volume in head.volumes] == [VOLUME], removed
        assert head.consistency == "crash", removed


async def test_a_volume_that_is_protected_and_not_introduced_yet_is_not_given_up() -> None:
    here = Chained()
    await here.begin()
    here.machine.remove_volume(OTHER)
    here.machine.add_volume(OTHER)
    here.machine.protects([VOLUME], [VOLUME, OTHER])
    head = await here.commit()
    assert {volume.id for volume in head.volumes} == {VOLUME, OTHER}


async def test_what_is_not_there_is_not_remembered_as_removed() -> None:
    here = Chained()
    await here.begin()
    for number in range(100, 200):
        here.machine.remove_volume(bytes([number]) * 16)
    assert not here.machine._removed


async def test_volumes_that_are_never_removed_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("process_server.ingest.machine.VOLUMES_MAX", 2)
    here = Chained()
    await here.begin()
    for number in range(4):
        here.volume, name = bytes([number]) * 16, f"disk-{number}"
        head = await here.commit(name=name)
        assert head.volumes[0].name == name
        assert len(head.volumes) == 2


def _reasons(status: dict[str, object]) -> list[str]:
    reasons = status["reasons"]
    assert isinstance(reasons, list)
    return reasons
