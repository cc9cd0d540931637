"""The machines of the vault that this server has to do with, each with its chain loaded."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from farshore.clock import Clock
from farshore.errors import NotFound
from process_server.catalog import CatalogKeeper
from process_server.ingest.machine import Machine, Packs, Sessions, read_head
from process_server.vault.chain import Chain
from process_server.vault.commit import CommitHead, Rows
from process_server.vault.keys import VaultKeys
from process_server.vault.store import Store


class Machines:
    """By id. A machine stays for as long as the server runs, connected or not.

    Args:
        catalog: Follows each chain from when it is loaded.
        committed: See `Machine`.
        pace_s: See `Machine`.
        spawn: Runs what goes on for as long as the server does.
    """

    def __init__(
        self,
        store: Store,
        keys: VaultKeys,
        clock: Clock,
        packs: Packs,
        sessions: Sessions,
        *,
        catalog: CatalogKeeper | None,
        committed: Callable[[Machine, CommitHead, dict[bytes, Rows]], Awaitable[None]],
        pace_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._store, self._keys, self._clock = store, keys, clock
        self._packs, self._sessions, self._catalog = packs, sessions, catalog
        self._committed, self._pace_s, self._spawn = committed, pace_s, spawn
        self._machines: dict[bytes, Machine] = {}
        self._loading: dict[bytes, asyncio.Lock] = {}
        self._writer, self._generation = b"", 0

    def write_as(self, writer: bytes, generation: int) -> None:
        """Commits of machines loaded from now on are of this server, with keys of this generation."""
        self._writer, self._generation = writer, generation

    def loaded(self) -> list[Machine]:
        """Those loaded so far, by name. Any thread."""
        return sorted(list(self._machines.values()), key=lambda machine: machine.name)

    def get(self, id: bytes) -> Machine | None:
        return self._machines.get(id)

    def named(self, name: str) -> Machine:
        """A machine by name, or by its id in hexadecimal. Raises NotFound."""
        for machine in self._machines.values():
            if name in (machine.name, machine.id.hex()):
                return machine
        raise NotFound("no such machine", where=name, fix="`farshore status` lists them")

    async def load(self, id: bytes, name: str = "") -> Machine:
        """Return a machine; the first time this reads its chain. Raises FarshoreError, of the store."""
        lock = self._loading.setdefault(id, asyncio.Lock())
        async with lock:
            machine = self._machines.get(id)
            if machine is None:
                machine = self._machines[id] = await self._read(id, name)
                self._spawn(machine.run())
            return machine

    async def _read(self, id: bytes, name: str) -> Machine:
        chain = Chain(self._store, self._keys, id, self._writer)
        await asyncio.to_thread(chain.load_head)
        head = await asyncio.to_thread(read_head, chain)
        if self._catalog is not None:
            self._catalog.follow(chain, id)
        return Machine(
            id,
            name or (chain.head.machine_name if chain.head is not None else id.hex()),
            chain,
            head,
            self._packs,
            self._sessions,
            self._clock,
            pace_s=self._pace_s,
            committed=self._committed,
            generation=self._generation,
        )
