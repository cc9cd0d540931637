"""Packs between a worker and the store: who has them, who waits for them, what is lost with a worker."""

import asyncio
import itertools

from farshore.telemetry import get_logger
from process_server.ingest import ipc
from process_server.ingest.known import KnownChunks
from process_server.ingest.machine import InlinePack, PacksLost
from process_server.ingest.pool import WorkerProcess
from process_server.ingest.session import Session
from process_server.vault.pack import pack_name
from process_server.vault.store import Store
from process_server.vault.store.settle import put_same

log = get_logger()


class PacksUnderWay:
    """Which worker holds or stores which pack of which session, and the machines that wait for them."""

    def __init__(self, store: Store, known: KnownChunks) -> None:
        self._store, self._known = store, known
        self._owners: dict[bytes, tuple[bytes, WorkerProcess]] = {}
        self._flushes: dict[int, tuple[WorkerProcess, asyncio.Future[list[InlinePack]]]] = {}
        self._requests = itertools.count(1)
        self._changed = asyncio.Condition()

    # --- what a machine asks ---

    async def flush(self, session: Session, inline_bytes: int) -> list[InlinePack]:
        """Have every worker seal its open pack of ``session``; return those of up to ``inline_bytes``.

        Raises:
            PacksLost: A worker died meanwhile.
        """
        futures = []
        for worker in {worker for id, worker in self._owners.values() if id == session.id}:
            request = next(self._requests)
            future: asyncio.Future[list[InlinePack]] = asyncio.get_running_loop().create_future()
            self._flushes[request] = worker, future
            worker.channel.send(ipc.Flush(request, session.id, inline_bytes))
            futures.append(future)
        packs = []
        for future in futures:
            packs += await future
        for pack in packs:
            self._owners.pop(pack.id, None)
        return packs

    async def store(self, session: Session, pack: InlinePack) -> None:
        """Store a pack that was handed over. Raises FarshoreError."""
        await asyncio.to_thread(put_same, self._store, pack_name(pack.id), pack.body)
        self._known.add(pack.id, pack.ids, session.machine)
        session.unstored.discard(pack.id)

    async def stored(self, session: Session, packs: set[bytes]) -> None:
        """Wait until none of ``packs`` is on its way any more. Raises PacksLost."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(session.lost) or not packs & session.unstored)
        if packs & session.unstored:
            raise PacksLost("a pack was not stored", why=session.lost)

    # --- what the workers say ---

    def begun(self, packs: tuple[bytes, ...], session: Session, worker: WorkerProcess) -> None:
        """Rows of ``session`` point into packs that ``worker`` has not stored yet."""
        for pack in packs:
            self._owners[pack] = session.id, worker

    def flushed(self, message: ipc.Flushed, body: bytes) -> None:
        """A worker answered `flush`."""
        _, future = self._flushes.pop(message.request, (None, None))
        if future is not None and not future.done():
            future.set_result([InlinePack(message.pack, body, message.ids)] if message.pack else [])

    def ended(self, message: ipc.PackStored) -> bytes:
        """A pack was stored, or was not: it is no longer under way. Return the id of its session."""
        session_id, _ = self._owners.pop(message.pack, (message.session, None))
        return session_id

    def forget(self, session: Session) -> None:
        """Nothing of ``session`` waits any more."""
        self._owners = {pack: owner for pack, owner in self._owners.items() if owner[0] != session.id}

    def worker_died(self, worker: WorkerProcess) -> set[bytes]:
        """Fail what waits for ``worker``; return the ids of the sessions that lost packs with it."""
        for request, (asked, future) in list(self._flushes.items()):
            if asked is worker:
                del self._flushes[request]
                if not future.done():
                    future.set_exception(PacksLost("an ingest worker died"))
        return {session for session, owner in self._owners.values() if owner is worker}

    async def wake(self) -> None:
        """Let everybody look again who waits in `stored`."""
        async with self._changed:
            self._changed.notify_all()
