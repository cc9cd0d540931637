"""An ingest worker: a process that terminates TLS and does the CPU work of bulk frames.

It owns nothing that must survive: connections, one open pack per session, packs being stored. What it knows
of the vault it asks the main process for. It ends when the main process does (PR_SET_PDEATHSIG, and end of
file on the socketpair for the moment before that was set).
"""

import asyncio
import ctypes
import gc
import os
import signal
import socket
import ssl
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import uvloop

from farshore import heap
from farshore.errors import FarshoreError
from farshore.failpoints import failpoint
from farshore.pki import server_context
from farshore.units import KIB, MIB
from farshore.wire import frames
from farshore.wire import messages as m
from process_server.ingest import ipc
from process_server.ingest.pipeline import Checked, SessionPipeline
from process_server.ingest.stream import Refused
from process_server.ingest.tls import RECEIVE_BYTES, Buffer, Connection
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import SealedPack
from process_server.vault.store import Store, open_store
from process_server.vault.store.metered import Meter

HELD_BYTES_MAX: Final = 40 * MIB
"""Raw parts of whole frames in this worker; beyond it no connection is read."""
OPEN_PACK_BYTES_MAX: Final = 48 * MIB
"""Compressed bytes in open packs of all sessions; beyond it the largest is sealed early."""
PACKS_STORING_MAX: Final = 2
"""Sealed packs on their way; beyond it no frame is finished, so connections fill up and stop."""
CREDIT_STEP_BYTES: Final = MIB
COUNTS_EVERY_S: Final = 0.5
_PR_SET_PDEATHSIG: Final = 1
QUEUED_FRAMES_MAX: Final = 1024
"""Frames of one connection that wait: small ones (marks, offers, pongs) have no credit."""
USER_TIMEOUT_MS: Final = 20_000
INCARNATION_START: Final = 20
_BULK: Final = frozenset({21, 22, 24})
_POOLED_BYTES: Final = MIB + 64 * KIB
_POOL_MAX: Final = 24


class BufferPool:
    """Memory for raw parts. Fresh pages cost as much as hashing them: the usual size is used again."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, size: int) -> Buffer:
        if 256 * KIB < size <= _POOLED_BYTES:
            return self._free.pop() if self._free else bytearray(_POOLED_BYTES)
        return bytearray(size)

    def give(self, buffer: Buffer) -> None:
        if len(buffer) == _POOLED_BYTES and len(self._free) < _POOL_MAX:
            self._free.append(cast(bytearray, buffer))


@dataclass(slots=True)
class Work:
    """One frame in a connection's queue; ``checked`` and ``found`` appear on the way."""

    header: frames.Header
    meta: bytearray
    raw: Buffer
    checked: Checked | None = None
    found: asyncio.Future[bytes] | None = None
    offer: m.Offer | None = None


class Line:
    """A connection with its frames in order.

    Two tasks: one verifies a frame and asks the main process, the other finishes it when the answer is
    there, so that the round trip of one frame is hidden behind the hashing of the next.
    """

    def __init__(self, worker: "Worker", connection: Connection) -> None:
        self.worker, self.connection = worker, connection
        self.session: SessionPipeline | None = None
        self.session_id = b""
        self.credit_bytes = 0
        self.held_bytes = 0
        self.queued = 0
        self._credit = 0
        self.waiting_position = asyncio.Event()
        self.waiting_position.set()
        self._incoming: asyncio.Queue[Work | None] = asyncio.Queue()
        self._verified: asyncio.Queue[Work | None] = asyncio.Queue()

    def put(self, work: Work) -> None:
        self.queued += 1
        self.held_bytes += work.header.raw_bytes
        self.worker.held_bytes += work.header.raw_bytes
        self._incoming.put_nowait(work)

    def end(self) -> None:
        self._incoming.put_nowait(None)
        self.waiting_position.set()

    def over_bound(self) -> bool:
        return self.held_bytes > self.credit_bytes or self.queued > QUEUED_FRAMES_MAX

    def well_below_bound(self) -> bool:
        return self.held_bytes * 2 <= self.credit_bytes and self.queued * 2 <= QUEUED_FRAMES_MAX

    async def verify(self) -> None:
        while (work := await self._incoming.get()) is not None:
            await self.waiting_position.wait()
            if self.connection.code:
                self._release(work)
                continue
            self._verify(work)
            self._verified.put_nowait(work)
            if work.header.type == INCARNATION_START:
                # What follows is checked from where the main process says.
                self.waiting_position.clear()
        self._verified.put_nowait(None)

    async def finish(self) -> None:
        worker = self.worker
        while (work := await self._verified.get()) is not None:
            answer = b""
            if work.found is not None:
                answer = await work.found
            if work.checked is not None:
                await worker.storing_room()
            if not self.connection.code and (not self.session_id or self.session_id in worker.sessions):
                self._finish(work, answer)
            self._release(work)
            # A turn for the others after each frame: 1 MiB is some 3 ms of work.
            await asyncio.sleep(0)

    def refuse(self, exc: FarshoreError) -> None:
        if isinstance(exc, Refused):
            self.connection.refuse(exc.code, str(exc), exc.volume)
        else:
            self.connection.refuse("protocol", str(exc))

    def _verify(self, work: Work) -> None:
        kind = work.header.type
        if kind not in _BULK:
            return
        session = self.session
        if session is None:
            raise Refused("protocol", "a bulk frame before HELLO or ATTACH was answered")
        message = frames.decode_message(work.header, work.meta)
        raw = memoryview(work.raw)[: work.header.raw_bytes]
        worker = self.worker
        if isinstance(message, m.Offer):
            work.offer = message
            rows = session.check_offer(message)
            work.found = worker.ask(
                lambda request: ipc.OfferQuery(request, self.session_id, message.volume), rows.tobytes()
            )
            return
        if isinstance(message, m.Copy):
            checked = session.check_copy(message, raw)
        else:
            assert isinstance(message, m.Data)
            checked = session.check_data(message, raw)
        work.checked = checked
        if checked.ask:
            ids = b"".join([checked.ids[number] for number in checked.ask])
            work.found = worker.ask(lambda request: ipc.Query(request, self.session_id, checked.own), ids)

    def _finish(self, work: Work, answer: bytes) -> None:
        worker, session = self.worker, self.session
        if work.offer is not None:
            self.connection.send(frames.encode(m.Have(work.offer.token, answer)))
            return
        if work.checked is None:
            worker.channel.send(ipc.Frame(self.connection.id, work.header.type), work.meta)
            return
        assert session is not None
        checked = work.checked
        rows = np.frombuffer(answer, ipc.FOUND_DTYPE)
        found = [
            (pack, chunk) if there else None
            for there, pack, chunk in zip(
                rows["found"].tolist(), rows["pack"].tolist(), rows["chunk"].tolist(), strict=True
            )
        ]
        finished = session.finish(checked, found)
        if finished.missing:
            self.connection.send(frames.encode(m.Accepted(checked.token, finished.missing)))
        elif checked.batches or checked.incarnation:
            worker.counts_repeats += checked.repeats
            worker.channel.send(
                ipc.DataRows(
                    self.session_id,
                    checked.volume,
                    checked.incarnation,
                    checked.first_lsn,
                    finished.packs,
                    finished.fresh,
                    checked.batches,
                    checked.tail,
                ),
                finished.rows.tobytes(),
            )
        else:
            # To the main process first: whoever is told ACCEPTED may name the token at once.
            worker.channel.send(
                ipc.CopyRows(
                    self.session_id,
                    checked.token,
                    checked.volume,
                    checked.applied_lsn,
                    finished.packs,
                    finished.fresh,
                ),
                finished.rows.tobytes(),
            )
            self.connection.send(frames.encode(m.Accepted(checked.token, ())))
        worker.store_sealed(self.session_id, session)

    def _release(self, work: Work) -> None:
        self.queued -= 1
        size = work.header.raw_bytes
        if not size:
            return
        # Views of the buffer end here, before another frame may fill it.
        work.checked = None
        self.worker.pool.give(work.raw)
        work.raw = b""  # type: ignore[assignment]
        self.held_bytes -= size
        self.worker.held_bytes -= size
        self._credit += size
        if self._credit >= min(CREDIT_STEP_BYTES, self.credit_bytes // 4) or not self.held_bytes:
            self.connection.send(frames.encode(m.Credit(self._credit)))
            self._credit = 0
        self.worker.resume_lines()


class Worker:
    """Everything of one worker process. One event loop, one thread per pack being stored."""

    def __init__(self, accepted: socket.socket) -> None:
        self.channel = ipc.Channel(self._receive, self._ended, worker=True)
        self.pool = BufferPool()
        self.sessions: dict[bytes, SessionPipeline] = {}
        self.lines: dict[int, Line] = {}
        self.held_bytes = 0
        self.counts_repeats = 0
        self._wire_bytes = 0
        self._accepted = accepted
        self._paused: set[Line] = set()
        self._receive_buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._context: ssl.SSLContext | None = None
        self._setup: ipc.Setup | None = None
        self._store: Store | None = None
        self._meter = Meter()
        self._keys: VaultKeys | None = None
        self._requests: dict[int, asyncio.Future[bytes]] = {}
        self._request = 0
        self._storing = 0
        self._room: deque[asyncio.Future[None]] = deque()
        self._threads = ThreadPoolExecutor(PACKS_STORING_MAX, thread_name_prefix="pack")
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._serving: set[asyncio.Task[None]] = set()

    async def run(self, control: socket.socket) -> None:
        await self._loop.create_unix_connection(lambda: self.channel, sock=control)
        self._loop.add_reader(self._accepted.fileno(), self._accept)
        async with asyncio.TaskGroup() as group:
            self._group = group
            ticker = group.create_task(self._tick(), name="tick")
            await self._over.wait()
            ticker.cancel()
            for line in list(self.lines.values()):
                line.connection.abort()
            for task in self._serving:
                task.cancel()
        self._threads.shutdown(wait=True)

    # --- packs ---

    async def storing_room(self) -> None:
        """Wait until fewer than PACKS_STORING_MAX packs are on their way."""
        while self._storing >= PACKS_STORING_MAX:
            waiter = self._loop.create_future()
            self._room.append(waiter)
            await waiter

    def store_sealed(self, session_id: bytes, session: SessionPipeline) -> None:
        """Start storing what became full; keep open packs within their bound."""
        while session.sealed:
            self._put(session_id, session, session.sealed.pop())
        if sum(other.open_bytes for other in self.sessions.values()) > OPEN_PACK_BYTES_MAX:
            largest = max(self.sessions, key=lambda id: self.sessions[id].open_bytes)
            self.sessions[largest].seal()
            while self.sessions[largest].sealed:
                self._put(largest, self.sessions[largest], self.sessions[largest].sealed.pop())

    def _put(self, session_id: bytes, session: SessionPipeline, pack: SealedPack) -> None:
        self._storing += 1
        store = self._store
        assert store is not None

        def put() -> float:
            started = time.monotonic()
            failpoint("ingest.before_pack_put")
            pack.put(store)
            failpoint("ingest.after_pack_put")
            return time.monotonic() - started

        def done(future: "asyncio.Future[float]") -> None:
            self._storing -= 1
            while self._room and self._storing < PACKS_STORING_MAX:
                waiter = self._room.popleft()
                if not waiter.done():
                    waiter.set_result(None)
                    break
            if future.cancelled():
                return
            exc = future.exception()
            if exc is None:
                session.stored(pack.id)
            error = f"{exc}"[:500] or type(exc).__name__ if exc is not None else ""
            duration_s = future.result() if exc is None else 0.0
            stored = ipc.PackStored(session_id, pack.id, len(pack.body), pack.plain_bytes, duration_s, error)
            self.channel.send(stored, b"".join(pack.ids))
            pack.release()

        self._loop.run_in_executor(self._threads, put).add_done_callback(done)

    # --- to and from the main process ---

    def ask(self, make: Callable[[int], ipc.Message], raw: bytes) -> asyncio.Future[bytes]:
        self._request += 1
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._requests[self._request] = future
        self.channel.send(make(self._request), raw)
        return future

    def _ended(self) -> None:
        self._over.set()

    def _receive(self, message: ipc.Message, raw: bytes) -> None:
        match message:
            case ipc.Found(request=request) | ipc.Answers(request=request):
                future = self._requests.pop(request, None)
                if future is not None and not future.done():
                    future.set_result(raw)
            case ipc.Send(connection=id):
                if (line := self.lines.get(id)) is not None:
                    line.connection.send(raw)
            case ipc.Position():
                self._position(message)
            case ipc.Flush():
                self._flush(message)
            case ipc.Admit():
                self._admit(message)
            case ipc.Volume(session=session_id, volume=volume, size_bytes=size_bytes):
                if (session := self.sessions.get(session_id)) is not None:
                    session.sizes[volume] = size_bytes
                    if not size_bytes:
                        session.streams.pop(volume, None)
            case ipc.Close(connection=id, code=code, text=text, volume=volume):
                if (line := self.lines.get(id)) is not None:
                    if code:
                        line.connection.refuse(code, text, volume or None)
                    else:
                        line.connection.close()
            case ipc.Forget(session=session_id):
                self.sessions.pop(session_id, None)
            case ipc.Setup():
                self._set_up(message)
            case ipc.Renewed(certificate=certificate, private_key=private_key, ca=ca):
                self._context = server_context(certificate, private_key, ca)
            case ipc.Stop():
                self._over.set()

    def _set_up(self, setup: ipc.Setup) -> None:
        self._setup = setup
        self._keys = VaultKeys.from_bytes(setup.keys)
        self._store = open_store(setup.vault_url, meter=self._meter)
        self._context = server_context(setup.certificate, setup.private_key, setup.ca)
        self.channel.send(ipc.Ready())

    def _admit(self, admit: ipc.Admit) -> None:
        line = self.lines.get(admit.connection)
        if line is None:
            return
        setup, keys = self._setup, self._keys
        assert setup is not None
        assert keys is not None
        session = self.sessions.get(admit.session)
        if session is None:
            session = self.sessions[admit.session] = SessionPipeline(
                admit.machine,
                keys,
                chunk_bytes=setup.chunk_bytes,
                pack_bytes=setup.pack_bytes,
                level=setup.compression_level,
            )
        session.sizes.update(admit.volumes)
        line.session, line.session_id = session, admit.session
        line.credit_bytes = admit.credit_bytes
        line.connection.authenticated, line.connection.quiet = True, not admit.control

    def _position(self, position: ipc.Position) -> None:
        line = self.lines.get(position.connection)
        if line is None or line.session is None:
            return
        if position.key:
            line.session.start(
                position.volume, position.incarnation, position.key, position.lsn, position.digest
            )
        line.waiting_position.set()

    def _flush(self, flush: ipc.Flush) -> None:
        session = self.sessions.get(flush.session)
        if session is not None:
            session.seal()
            # A pack that filled up in the same turn is stored as it is; only the last can be small.
            while len(session.sealed) > 1:
                self._put(flush.session, session, session.sealed.pop(0))
            if session.sealed:
                pack = session.sealed.pop()
                if len(pack.body) <= flush.inline_bytes:
                    session.handed(pack.id)
                    flushed = ipc.Flushed(flush.request, pack.id, b"".join(pack.ids), pack.plain_bytes)
                    self.channel.send(flushed, bytes(pack.body))
                    pack.release()
                    return
                self._put(flush.session, session, pack)
        self.channel.send(ipc.Flushed(flush.request, b"", b"", 0))

    # --- connections ---

    def _accept(self) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._accepted, 64, 1)
            except (BlockingIOError, InterruptedError):
                return
            if not data:
                self._over.set()
                return
            if not descriptors:
                continue
            accepted = socket.socket(fileno=descriptors[0])
            accepted.setblocking(False)
            task = self._group.create_task(self._serve(int.from_bytes(data, "little"), accepted))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(self, id: int, accepted: socket.socket) -> None:
        context = self._context
        assert context is not None, "no socket is handed over before Ready"
        connection = Connection(id, context, self._receive_buffer, self, self.pool.take)
        line = self.lines[id] = Line(self, connection)
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(line.verify(), name=f"verify-{id}")
                tasks.create_task(line.finish(), name=f"finish-{id}")
        except* (Refused, frames.ProtocolError) as group:
            line.refuse(cast(FarshoreError, group.exceptions[0]))
        except* OSError:
            accepted.close()
        except* Exception as group:
            # One connection's fault ends that connection and no other.
            self.channel.send(ipc.Fault("".join(traceback.format_exception(group))[-8000:]))
            connection.refuse("internal", "the server failed on this frame")
        finally:
            connection.close()
            self.lines.pop(id, None)
            self._paused.discard(line)
            self.held_bytes -= line.held_bytes
            self.channel.send(ipc.Closed(id, connection.code, connection.text))

    def opened(self, connection: Connection, certificate: bytes) -> None:
        self.channel.send(ipc.Opened(connection.id), certificate)

    def frame(self, connection: Connection, header: frames.Header, meta: bytearray, raw: Buffer) -> None:
        line = self.lines.get(connection.id)
        if line is None:
            return
        self._wire_bytes += frames.HEADER.size + len(meta) + header.raw_bytes
        line.put(Work(header, meta, raw))
        if line.over_bound() or self.held_bytes > HELD_BYTES_MAX:
            self._paused.add(line)
            connection.pause()

    def resume_lines(self) -> None:
        """Read again from whoever is below its own bound, while all of them together are below theirs."""
        for line in list(self._paused):
            if self.held_bytes > HELD_BYTES_MAX:
                return
            if line.well_below_bound():
                self._paused.discard(line)
                line.connection.resume()

    def closed(self, connection: Connection) -> None:
        if (line := self.lines.get(connection.id)) is not None:
            line.end()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(COUNTS_EVERY_S)
            now = time.monotonic()
            for line in list(self.lines.values()):
                if line.connection.overdue(now):
                    line.connection.text = line.connection.text or "silent for too long"
                    line.connection.abort()
            sessions = self.sessions.values()
            counts = (
                sum(session.chunks_new for session in sessions),
                sum(session.chunks_found for session in sessions),
                sum(session.chunks_zero for session in sessions),
                sum(session.plain_bytes for session in sessions),
            )
            for session in sessions:
                session.chunks_new = session.chunks_found = session.chunks_zero = session.plain_bytes = 0
            if self._wire_bytes or any(counts) or self.counts_repeats:
                self.channel.send(ipc.Counts(self._wire_bytes, *counts, self.counts_repeats))
                self._wire_bytes = self.counts_repeats = 0
            if used := self._meter.take():
                self.channel.send(ipc.StoreUse(used))


def main(control_fd: int, accepted_fd: int, parent: int) -> None:
    """Run until the main process ends or says so."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # No cycles are made per frame; a full collection in the middle of a burst would only cost.
    gc.freeze()
    heap.keep()
    control = socket.socket(fileno=control_fd)
    accepted = socket.socket(fileno=accepted_fd)
    control.setblocking(False)
    accepted.setblocking(False)

    async def run() -> None:
        await Worker(accepted).run(control)

    uvloop.run(run())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
