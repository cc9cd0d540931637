"""Which chunks the vault has: asked by workers before they pack, told by packs that were stored."""

import asyncio
from collections.abc import Iterable

import numpy as np

from farshore.clock import Clock
from farshore.telemetry import get_logger
from process_server.ingest import ipc
from process_server.ingest.maps import rebuild_index
from process_server.vault.dedup import DedupIndex
from process_server.vault.keys import VaultKeys
from process_server.vault.store import Store

log = get_logger()


class KnownChunks:
    """The dedup index while a server runs: a cache, filled from the vault beside the work.

    Args:
        index: What is known already; None: nothing, `rebuild` reads the vault.
    """

    def __init__(self, store: Store, keys: VaultKeys, clock: Clock, index: DedupIndex | None = None) -> None:
        self._store, self._keys, self._clock = store, keys, clock
        self._complete = index is not None
        self._index = index if index is not None else DedupIndex()
        # Packs stored while the index is rebuilt: added to the rebuilt one, too.
        self._meanwhile: list[tuple[bytes, list[bytes], bytes]] | None = None

    def locate(self, machine: bytes, ids: bytes, *, own: bool) -> bytes:
        """Return where chunks lie, as rows of ``FOUND_DTYPE``.

        Args:
            ids: Their ids, 32 bytes each.
            own: Only what this machine itself has sent: what a REFERENCE may name (I25).
        """
        chunks = split_ids(ids)
        rows = np.zeros(len(chunks), ipc.FOUND_DTYPE)
        found = self._index.lookup(chunks)
        if own:
            mine = self._index.have(machine, chunks)
            found = [locator if yes else None for locator, yes in zip(found, mine, strict=True)]
        else:
            sent = [chunk for chunk, locator in zip(chunks, found, strict=True) if locator is not None]
            self._index.note(machine, sent)
        for number, locator in enumerate(found):
            if locator is not None:
                rows[number] = (1, *locator)
        return rows.tobytes()

    def have(self, machine: bytes, ids: bytes) -> list[bool]:
        """Tell which chunks are in the vault **and** were sent by this machine itself."""
        return self._index.have(machine, split_ids(ids))

    def add(self, pack: bytes, ids: bytes, machine: bytes) -> None:
        """A pack of ``machine`` with these chunks was stored under a name of its own."""
        chunks = split_ids(ids)
        self._index.add(pack, chunks, machine)
        if self._meanwhile is not None:
            self._meanwhile.append((pack, chunks, machine))

    async def rebuild(self, machines: Iterable[bytes]) -> None:
        """Fill the index from the vault, beside the work: until then what is there is stored once more."""
        wanted = list(machines)
        if self._complete or not wanted:
            return
        self._meanwhile = []
        started = self._clock.monotonic()
        rebuilt = await asyncio.to_thread(rebuild_index, self._store, self._keys, wanted)
        for pack, ids, machine in self._meanwhile:
            rebuilt.add(pack, ids, machine)
        self._index, self._meanwhile, self._complete = rebuilt, None, True
        duration_s = round(self._clock.monotonic() - started, 3)
        log.info("index_rebuilt", chunks=len(rebuilt), duration_s=duration_s)


def split_ids(ids: bytes) -> list[bytes]:
    """Return chunk ids that stand one after another as a list."""
    return [ids[at : at + 32] for at in range(0, len(ids), 32)]
