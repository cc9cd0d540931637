"""A commit comes after the packs it names, and the agent hears of it after both."""

import asyncio
from collections.abc import Callable

import numpy as np

from farshore.clock import SystemClock
from farshore.wire import messages as m
from process_server.ingest.machine import Head, InlinePack, Machine, PacksLost
from process_server.ingest.session import Cut, Session
from process_server.ingest.stream import Position, VolumeCut
from process_server.vault.chain import Chain
from process_server.vault.commit import ROW_DTYPE, CommitHead, Rows
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
