"""Answers to OFFER: which blocks an agent need not send, by the vault's newest state of its volume."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from farshore.errors import FarshoreError
from farshore.telemetry import get_logger
from farshore.wire import messages as m
from process_server.ingest import ipc
from process_server.ingest.known import KnownChunks
from process_server.ingest.machine import Machine
from process_server.ingest.resync import BlockTable, build_table, extend_table
from process_server.vault.commit import CommitHead, Rows
from process_server.vault.keys import VaultKeys
from process_server.vault.store import Store

log = get_logger()


class Offers:
    """Block tables of the volumes that are compared, made by their first OFFER and kept up to date.

    Args:
        block_bytes: As the agents offer (`Policy.chunk_bytes`).
        spawn: Begins a task of the server.
    """

    def __init__(
        self,
        store: Store,
        keys: VaultKeys,
        known: KnownChunks,
        block_bytes: int,
        spawn: Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"],
    ) -> None:
        self._store, self._keys, self._known = store, keys, known
        self._block_bytes, self._spawn = block_bytes, spawn

    def answer(self, machine: Machine, volume: bytes, raw: bytes, told: Callable[[bytes], None]) -> None:
        """Call ``told`` with the bytes of HAVE, now or when the volume's table is there.

        Args:
            raw: What is offered, rows of ``OFFER_DTYPE``.
        """
        offers = np.frombuffer(raw, ipc.OFFER_DTYPE)
        building = self._table(machine, volume)
        if building is None or building.done():
            table = building.result() if building is not None else None
            told(self._answers(machine, offers, table))
            return

        async def later() -> None:
            await asyncio.wait({building})
            # A commit outside a resync cancels the table. Unanswered, the agent would wait for ever.
            table = None if building.cancelled() else building.result()
            told(self._answers(machine, offers, table))

        self._spawn(later())

    async def committed(self, machine: Machine, head: CommitHead) -> None:
        """Lay a new commit over the machine's tables; drop those that nobody compares with any more."""
        session = machine.session
        for volume, building in list(machine.tables.items()):
            stream = session.volumes.get(volume) if session is not None else None
            if stream is None or not stream.resync:
                # Compared to the end, or the agent is gone: what a later resync needs is built anew.
                del machine.tables[volume]
                building.cancel()
            elif building.done() and (table := building.result()) is not None:
                try:
                    await self._extend(table, machine, volume, head.seq, head.seq)
                except FarshoreError as exc:
                    log.warning("resync_table_failed", machine=machine.name, error=str(exc))
                    del machine.tables[volume]

    def _answers(self, machine: Machine, offers: Rows, table: BlockTable | None) -> bytes:
        have = self._known.have(machine.id, offers["id"].tobytes())
        answers = np.where(np.array(have, np.bool_), m.HAVE_CHUNK, m.HAVE_NEED).astype(np.uint8)
        if table is not None:
            answers[table.same(offers)] = m.HAVE_SAME
        return answers.tobytes()

    def _table(self, machine: Machine, volume: bytes) -> "asyncio.Task[BlockTable | None] | None":
        """Return the task that yields the volume's block table; it is started by the first OFFER."""
        stream = machine.session.volumes.get(volume) if machine.session is not None else None
        if stream is None or volume not in machine.head.volumes:
            return None
        building = machine.tables.get(volume)
        if building is None:
            building = machine.tables[volume] = self._spawn(self._build(machine, volume, stream.size_bytes))
        return building

    async def _build(self, machine: Machine, volume: bytes, size_bytes: int) -> BlockTable | None:
        try:
            seq = machine.chain.seq
            table = await asyncio.to_thread(
                build_table,
                self._store,
                self._keys,
                machine.id,
                volume,
                seq,
                self._block_bytes,
                size_bytes,
            )
            # Commits came meanwhile. Records may have written what a block had: lay them over it.
            while seq != machine.chain.seq:
                first, seq = seq + 1, machine.chain.seq
                await self._extend(table, machine, volume, first, seq)
            return table
        except FarshoreError as exc:
            log.warning("resync_table_failed", machine=machine.name, error=str(exc))
            return None

    async def _extend(
        self, table: BlockTable, machine: Machine, volume: bytes, first: int, last: int
    ) -> None:
        await asyncio.to_thread(extend_table, table, self._store, self._keys, machine.id, volume, first, last)
