"""The process server: agents' connections in, commits out, and what can be said about both.

The main process decides and the workers compute. Here are sessions, chains, the dedup index, the deny-list
and every clock; TLS, hashing, compression and packs are in the workers (`process_server.ingest.worker`).
"""

import asyncio
import itertools
import socket
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry

from farshore.clock import Clock
from farshore.errors import AuthError, Failed, FarshoreError, Fenced
from farshore.ids import valid_name
from farshore.pki import machine_of_certificate
from farshore.telemetry import get_logger
from farshore.wire import frames
from farshore.wire import messages as m
from process_server.catalog import CatalogKeeper
from process_server.config import ServerConfig, parse_listen
from process_server.ingest import ipc
from process_server.ingest.commands import Commands
from process_server.ingest.known import KnownChunks
from process_server.ingest.machine import CUTS_MAX, Machine
from process_server.ingest.machines import Machines
from process_server.ingest.maps import MapKeeper
from process_server.ingest.metrics import IngestMetrics
from process_server.ingest.offers import Offers
from process_server.ingest.packs import PacksUnderWay
from process_server.ingest.peer import Peer
from process_server.ingest.pool import WorkerPool, WorkerProcess
from process_server.ingest.session import Session
from process_server.ingest.sessions import Sessions
from process_server.ingest.stream import Position, Refused
from process_server.vault.commit import CommitHead, Rows
from process_server.vault.control import ControlStore
from process_server.vault.dedup import DedupIndex
from process_server.vault.keys import VaultKeys
from process_server.vault.store import Store
from process_server.vault.store.metered import Meter

PACE_MIN_S: Final = 0.5
PING_S: Final = 1.0
ALLOWED_S: Final = 30.0
TOKENS_S: Final = 20.0
SETTLE_S: Final = 30.0
TROUBLE_LINES_PER_S: Final = 5
BACKLOG: Final = 512

log = get_logger()


@dataclass(frozen=True, slots=True)
class Tls:
    """What the server shows: PEM of certificate chain and key, and the CA that agents' certificates need."""

    certificate: bytes
    private_key: bytes
    ca: bytes


class Identity(Protocol):
    """Who may speak; `process_server.identity` answers."""

    async def enrol(self, message: m.Enrol) -> m.Enrolled: ...

    async def renew(self, message: m.Renew) -> m.Enrolled: ...

    def allowed(self, machine_id: bytes, certificate: bytes) -> bool: ...

    def expired(self, certificate: bytes) -> bool: ...

    def name_of(self, machine_id: bytes) -> str | None: ...


class ProcessServer:
    """One process server on one vault.

    Args:
        config: Where to listen, how the pipeline is sized, the vault's address for the workers.
        store, keys: The open vault.
        control: The vault's control objects: machines and the deny-list.
        identity: Enrolment and who is allowed.
        index: Which chunks the vault has; a cache, an empty one by default.
        catalog: Follows the chains, behind the acknowledgements; may be absent.
        meter: Counts what ``store`` is asked; what the workers ask is added to it.
    """

    def __init__(
        self,
        config: ServerConfig,
        store: Store,
        keys: VaultKeys,
        control: ControlStore,
        clock: Clock,
        registry: CollectorRegistry,
        *,
        identity: Identity,
        index: DedupIndex | None = None,
        catalog: CatalogKeeper | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._config, self._store, self._keys, self._control = config, store, keys, control
        self._clock, self._identity = clock, identity
        self._chunks = KnownChunks(store, keys, clock, index)
        self._packs = PacksUnderWay(store, self._chunks)
        self._offers = Offers(store, keys, self._chunks, config.ingest.chunk_bytes, self._spawn)
        self._commands = Commands()
        self._maps = MapKeeper(store, keys, clock)
        self._tls = Tls(b"", b"", b"")
        self._known: dict[bytes, str] = {}
        self._catalog = catalog
        self.metrics = IngestMetrics(registry, self, meter or Meter())
        self.ready = asyncio.Event()
        self.address: tuple[str, int] = ("", 0)
        self._pool = WorkerPool(config.ingest.workers, self._setup, self._receive, self._worker_died)
        self._sessions = Sessions(self._packs, self._commands, self._pool, config.ingest.credit_bytes)
        self._machines = Machines(
            store,
            keys,
            clock,
            self._packs,
            self._sessions,
            catalog=catalog,
            committed=self._committed,
            pace_s=max(PACE_MIN_S, config.ingest.point_interval_s / 2),
            spawn=self._spawn,
        )
        self._peers: dict[int, Peer] = {}
        self._pings = itertools.count(1)
        self._tokens_changed = asyncio.Condition()
        self._marks_waiting = 0
        self._trouble: list[float] = []
        self._group: asyncio.TaskGroup | None = None

    # --- life ---

    async def run(self) -> None:
        """Serve until cancelled. ``ready`` is set, and ``address`` known, once agents can connect.

        Raises:
            Failed: A worker did not start.
            OSError: The address cannot be listened on.
        """
        await asyncio.to_thread(self._load_control)
        listener = _listen(*parse_listen(self._config.listen))
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                workers = group.create_task(self._pool.run(), name="ingest-workers")
                for machine_id, name in self._known.items():
                    await self._machines.load(machine_id, name)
                await self._pool.wait_ready()
                self.address = listener.getsockname()[:2]
                loop = asyncio.get_running_loop()
                loop.add_reader(listener.fileno(), self._accept, listener)
                group.create_task(self._ping(), name="ping")
                group.create_task(self._recheck(), name="recheck")
                group.create_task(self._maps.run(), name="maps")
                group.create_task(self._chunks.rebuild(self._known), name="rebuild-index")
                self.ready.set()
                try:
                    await workers
                finally:
                    loop.remove_reader(listener.fileno())
        finally:
            listener.close()

    async def renew_tls(self) -> None:
        """Use the server's new certificate, as the control object has it, for connections from now on."""
        await asyncio.to_thread(self._load_control)
        tls = self._tls
        for worker in self._pool.workers:
            worker.channel.send(ipc.Renewed(tls.certificate, tls.private_key, tls.ca))

    def _setup(self) -> ipc.Setup:
        tls, ingest = self._tls, self._config.ingest
        return ipc.Setup(
            tls.certificate,
            tls.private_key,
            tls.ca,
            self._config.vault,
            self._keys.to_bytes(),
            ingest.pack_bytes,
            ingest.chunk_bytes,
            ingest.compression_level,
        )

    # --- what others ask ---

    def status(self) -> dict[str, object]:
        """Return what ``farshore status --json`` prints (DESIGN, section 11)."""
        now = self._clock.monotonic()
        interval_s = self._config.ingest.point_interval_s
        return {"machines": [machine.status(now, interval_s) for machine in self._machines.loaded()]}

    def deny(self, machine_id: bytes) -> None:
        """The machine was put on the deny-list: end everything it has open, now."""
        for peer in list(self._peers.values()):
            if peer.machine == machine_id:
                self.metrics.auth_failures.labels("denied").inc()
                peer.close("denied", "this machine is denied")
        machine = self._machines.get(machine_id)
        if machine is not None:
            machine.denied = True
        if machine is not None and machine.session is not None:
            self._sessions.end_session(machine.session, "denied", "this machine is denied")

    async def create_point(
        self, machine: str, tag: str, timeout_s: float, *, allow_fuzzy: bool = False
    ) -> str:
        """Have the machine's agent cut a point. Raises NotFound, and as `Commands.create_point`."""
        found = self._machines.named(machine)
        return await self._commands.create_point(found, tag, timeout_s, allow_fuzzy=allow_fuzzy)

    # --- connections ---

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            try:
                accepted, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                log.error("accept_failed", error=str(exc))
                return
            with accepted:
                handed = self._pool.hand_over(accepted)
            if handed is None:
                self._complain("connection_refused", str(address[0]), "no worker has room")
                continue
            worker, id = handed
            peer = self._peers[id] = Peer(id, worker, str(address[0]))
            assert self._group is not None
            self._group.create_task(self._serve(peer), name=f"peer-{id}")

    async def _serve(self, peer: Peer) -> None:
        """Take the frames of one connection in order. Its fault ends it and nothing else."""
        try:
            while (item := await peer.frames.get()) is not None:
                if peer.closing:
                    continue
                kind, meta = item
                message = frames.decode_message(frames.Header(kind, len(meta), 0), meta)
                if peer.session is None:
                    await self._first(peer, message)
                else:
                    await self._next(peer, peer.session, message)
        except Refused as exc:
            self._refuse(peer, exc.code, str(exc), exc.volume)
        except frames.ProtocolError as exc:
            self._refuse(peer, "protocol", str(exc))
        except AuthError as exc:
            self.metrics.auth_failures.labels("refused").inc()
            self._refuse(peer, "auth", str(exc))
        except Fenced as exc:
            self._refuse(peer, "superseded", str(exc))
        except FarshoreError as exc:
            log.error("session_failed", peer=peer.address, error=str(exc))
            self._refuse(peer, "retry" if exc.retryable else "internal", exc.what)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("session_failed", peer=peer.address)
            self._refuse(peer, "internal", "the server failed on this frame")
        finally:
            self._peers.pop(peer.id, None)
            self._sessions.peer_ended(peer)

    def _refuse(self, peer: Peer, code: str, text: str, volume: bytes | None = None) -> None:
        self.metrics.refused_frames.labels(code).inc()
        self._complain("peer_refused", peer.address, f"{code}: {text}")
        peer.close(code, text, volume)

    async def _first(self, peer: Peer, message: m.Message) -> None:
        match message:
            case m.Enrol():
                peer.send(await self._identity.enrol(message))
                peer.close()
            case m.Renew():
                peer.send(await self._identity.renew(message))
                peer.close()
            case m.Hello() if peer.machine:
                await self._hello(peer, message)
            case m.Attach() if peer.machine:
                peer.send(m.Attached(self._sessions.attach(peer, message.session)))
            case m.Hello() | m.Attach():
                raise AuthError("a client certificate is needed", fix="enrol the machine first")
            case _:
                raise Refused("protocol", "the first frame is HELLO, ATTACH, ENROL or RENEW")

    async def _next(self, peer: Peer, session: Session, message: m.Message) -> None:
        match message:
            case m.Bye():
                peer.close()
            case m.Error():
                log.warning("agent_error", machine=session.name, code=message.code, error=message.text[:500])
                peer.close()
            case _ if not peer.control:
                raise Refused("protocol", "only OFFER and COPY belong on a data connection")
            case m.Pong():
                self._pong(session, message)
            case m.Mark():
                await self._mark(session, message)
            case m.IncarnationStart():
                session.start(message)
            case m.VolumeAdd():
                await self._volume_add(peer, session, message)
            case m.VolumeRemove():
                self._machine(session).remove_volume(message.id)
                if session.volumes.pop(message.id, None) is not None:
                    self._sessions.tell_workers(session, ipc.Volume(session.id, message.id, 0))
            case m.Result():
                self._commands.answered(session, message)
            case _:
                raise Refused("protocol", "a frame that has no place here", why=type(message).__name__)

    async def _hello(self, peer: Peer, hello: m.Hello) -> None:
        if hello.protocol != m.PROTOCOL:
            raise Refused("protocol", "another version of the protocol", why=str(hello.protocol))
        if hello.machine_id != peer.machine:
            raise AuthError("the certificate is another machine's", where=hello.machine[:64])
        if not valid_name(hello.machine):
            raise Refused("protocol", "a machine without a proper name")
        if hello.machine != self._identity.name_of(peer.machine):
            raise AuthError("the machine is enrolled under another name", where=hello.machine)
        machine = await self._machines.load(peer.machine, hello.machine)
        if machine.session is not None:
            self._sessions.end_session(machine.session, "superseded", "a newer session of this machine")
        try:
            async with asyncio.timeout(SETTLE_S):
                await machine.settled()
        except TimeoutError:
            raise Refused("retry", "earlier cuts are still being vaulted") from None
        await machine.own(hello.epoch_seen)
        if machine.session is not None:
            raise Refused("superseded", "a newer session of this machine")
        session = Session(peer.machine, hello.machine, hello.agent_version, peer, peer.id)
        session.cut_seq = 0
        for volume in hello.volumes:
            session.add_volume(volume, machine.position(volume.id))
        machine.protects(session.volumes, hello.protected)
        machine.name, machine.denied = hello.machine, False
        machine.connected_at = self._clock.monotonic()
        self._sessions.begin(session, machine, peer)
        ingest = self._config.ingest
        policy = m.Policy(
            ingest.point_interval_s,
            ingest.chunk_bytes,
            ingest.copy_connections,
            ingest.credit_bytes,
            ingest.compression_level if ingest.copies_compressed_by == "agent" else None,
        )
        positions = tuple(
            machine.position(volume) or empty_position(volume, empty=not machine.head.seq)
            for volume in session.volumes
        )
        peer.send(
            m.Welcome(
                m.PROTOCOL,
                session.id,
                self._keys.vault_id,
                machine.chain.epoch,
                machine.head.seq,
                policy,
                positions,
            )
        )
        log.info("agent_connected", machine=machine.name, peer=peer.address, volumes=len(session.volumes))

    async def _volume_add(self, peer: Peer, session: Session, message: m.VolumeAdd) -> None:
        machine = self._machine(session)
        stream = session.add_volume(message.volume, machine.position(message.volume.id))
        machine.add_volume(stream.id)
        self._sessions.tell_workers(session, ipc.Volume(session.id, stream.id, stream.size_bytes))
        position = machine.position(stream.id) or empty_position(stream.id, empty=not machine.head.seq)
        peer.send(m.VolumeAdded(position))

    async def _mark(self, session: Session, mark: m.Mark) -> None:
        machine = self._machine(session)
        time_ns, arrived = self._clock.wall_ns(), self._clock.monotonic()
        if session.unknown_tokens(mark):
            # The agent was told ACCEPTED by a worker whose report may still be on its way to us.
            self._marks_waiting += 1
            try:
                async with asyncio.timeout(TOKENS_S), self._tokens_changed:
                    await self._tokens_changed.wait_for(
                        lambda: not session.unknown_tokens(mark) or bool(session.ended)
                    )
            except TimeoutError:
                raise Refused("protocol", "a mark that names a copy that was not accepted") from None
            finally:
                self._marks_waiting -= 1
        if session.ended:
            return
        if len(machine.cuts) >= CUTS_MAX:
            raise Refused("capacity", "too many marks wait for their commit")
        machine.add(session.mark(mark, time_ns, arrived))

    def _pong(self, session: Session, pong: m.Pong) -> None:
        machine = self._machine(session)
        machine.rpo.pong(pong.id, pong.volumes, set(session.volumes))
        for volume in pong.volumes:
            stream = session.volumes.get(volume.id)
            if stream is not None:
                session.status[volume.id] = volume
                stream.state, stream.capture_mode = volume.state[:32], volume.capture_mode[:32]
                if stream.state != "failed":
                    stream.problem = ""

    def _machine(self, session: Session) -> Machine:
        machine = self._machines.get(session.machine)
        assert machine is not None, "HELLO loads it"
        return machine

    # --- from the workers ---

    def _receive(self, worker: WorkerProcess, message: ipc.Message, raw: bytes) -> None:
        match message:
            case ipc.Query(request=request, session=id, own=own):
                session = self._sessions.get(id)
                if session is not None:
                    found = self._chunks.locate(session.machine, raw, own=own)
                else:
                    found = bytes(len(raw) // 32 * ipc.FOUND_DTYPE.itemsize)
                worker.channel.send(ipc.Found(request), found)
            case ipc.CopyRows():
                self._rows(worker, message, raw)
            case ipc.DataRows():
                self._rows(worker, message, raw)
            case ipc.Frame(connection=connection, kind=kind):
                self._frame(connection, kind, raw)
            case ipc.OfferQuery():
                self._offer(worker, message, raw)
            case ipc.PackStored():
                self._pack_stored(message, raw)
            case ipc.Flushed():
                self._packs.flushed(message, raw)
            case ipc.Opened(connection=connection):
                self._opened(connection, raw)
            case ipc.Closed(connection=connection, code=code, text=text):
                self._closed(connection, code, text)
            case ipc.Counts():
                self.metrics.count(message)
            case ipc.StoreUse(rows=rows):
                self.metrics.store.add(rows)
            case ipc.Fault(text=text):
                log.error("ingest_frame_failed", error=text)

    def _opened(self, connection: int, certificate: bytes) -> None:
        peer = self._peers.get(connection)
        if peer is None:
            return
        peer.certificate = certificate
        if not certificate:
            return
        try:
            peer.machine = machine_of_certificate(certificate, self._keys.vault_id)
        except FarshoreError as exc:
            self.metrics.auth_failures.labels("certificate").inc()
            self._refuse(peer, "auth", str(exc))
            return
        if not self._identity.allowed(peer.machine, certificate):
            self.metrics.auth_failures.labels("denied").inc()
            self._refuse(peer, "denied", "this machine is denied, or not known")

    def _frame(self, connection: int, kind: int, meta: bytes) -> None:
        peer = self._peers.get(connection)
        if peer is None or peer.closing:
            return
        try:
            peer.frames.put_nowait((kind, meta))
        except asyncio.QueueFull:
            self._refuse(peer, "capacity", "too many frames wait")

    def _closed(self, connection: int, code: str, text: str) -> None:
        peer = self._peers.get(connection)
        if peer is None:
            return
        if code or text:
            self.metrics.refused_frames.labels(code or "silent").inc()
            self._complain("connection_closed", peer.address, f"{code or 'closed'}: {text}")
        peer.closing = peer.closing or bool(code)
        peer.ended()

    def _rows(self, worker: WorkerProcess, message: ipc.CopyRows | ipc.DataRows, raw: bytes) -> None:
        session = self._sessions.get(message.session)
        if session is None:
            return
        self._packs.begun(message.fresh, session, worker)
        try:
            if isinstance(message, ipc.CopyRows):
                session.copy_rows(message, raw)
                if self._marks_waiting:
                    self._spawn(self._wake_marks())
            else:
                session.data_rows(message, raw)
        except Refused as exc:
            self.metrics.refused_frames.labels(exc.code).inc()
            self._sessions.end_session(session, exc.code, str(exc))

    async def _wake_marks(self) -> None:
        async with self._tokens_changed:
            self._tokens_changed.notify_all()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        assert self._group is not None, "before run()"
        return self._group.create_task(work)

    def _offer(self, worker: WorkerProcess, message: ipc.OfferQuery, raw: bytes) -> None:
        def told(answers: bytes) -> None:
            worker.channel.send(ipc.Answers(message.request), answers)

        session = self._sessions.get(message.session)
        if session is None:
            told(bytes(len(raw) // ipc.OFFER_DTYPE.itemsize))
        else:
            self._offers.answer(self._machine(session), message.volume, raw, told)

    def _pack_stored(self, message: ipc.PackStored, ids: bytes) -> None:
        session = self._sessions.get_anyway(self._packs.ended(message))
        self.metrics.pack_stored(message)
        if message.error:
            log.error("pack_not_stored", pack=message.pack.hex(), error=message.error)
            if session is not None:
                self._sessions.lose(session, "a pack could not be stored", message.error)
        elif session is not None:
            self._chunks.add(message.pack, ids, session.machine)
            session.unstored.discard(message.pack)
        self._spawn(self._packs.wake())

    def _worker_died(self, worker: WorkerProcess) -> None:
        self.metrics.worker_deaths.inc()
        # Sessions with a connection or an open pack there begin again from what is vaulted.
        lost = self._packs.worker_died(worker)
        for peer in [peer for peer in self._peers.values() if peer.worker is worker]:
            if peer.session is not None:
                lost.add(peer.session.id)
            peer.closing = True
            peer.ended()
        for id in lost:
            if (session := self._sessions.get_anyway(id)) is not None:
                self._sessions.lose(session, "an ingest worker died")
        self._spawn(self._packs.wake())

    # --- machines ---

    def _load_control(self) -> None:
        """Read what the vault says of this server and its machines."""
        control = self._control.load()
        if control.server is None:
            raise Failed("this vault has no server identity", fix="run `farshore server init` or `adopt`")
        self._machines.write_as(control.server.id, self._control.root().generation)
        self._tls = Tls(control.server.certificate, control.server.key, control.ca_certificate)
        self._known = {machine.id: machine.name for machine in control.machines}

    async def _committed(self, machine: Machine, head: CommitHead, tables: dict[bytes, Rows]) -> None:
        """A commit is vaulted and its agent told: what follows may fail without harm."""
        self.metrics.commits.inc()
        if self._catalog is not None:
            self._catalog.note(head, machine.chain.digest, machine.chain)
        await self._offers.committed(machine, head)
        try:
            await self._maps.note(machine.id, head, tables)
        except FarshoreError as exc:
            log.warning("map_not_noted", machine=machine.name, error=str(exc))

    # --- clocks ---

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            now = self._clock.monotonic()
            for session, machine in self._sessions.all():
                ping = next(self._pings)
                machine.rpo.ping(ping, now)
                session.link.send(m.Ping(ping))

    async def _recheck(self) -> None:
        """Ask the deny-list again for every live connection: a revocation needs no reconnect to be felt."""
        while True:
            await asyncio.sleep(ALLOWED_S)
            for peer in list(self._peers.values()):
                if not peer.machine or self._identity.allowed(peer.machine, peer.certificate):
                    continue
                if self._identity.expired(peer.certificate):
                    self.metrics.auth_failures.labels("expired").inc()
                    self._refuse(peer, "auth", "the certificate has expired; renew it")
                else:
                    self.deny(peer.machine)

    def _complain(self, event: str, address: str, reason: str) -> None:
        """One line of trouble per peer, and no more of them than a disk can bear."""
        now = time.monotonic()
        self._trouble = [at for at in self._trouble if now - at < 1.0]
        if len(self._trouble) < TROUBLE_LINES_PER_S:
            self._trouble.append(now)
            log.warning(event, peer=address, reason=reason)


def empty_position(volume: bytes, *, empty: bool) -> m.VolumePosition:
    """What WELCOME says of a volume of which the vault has nothing."""
    start = Position()
    return m.VolumePosition(
        volume,
        start.incarnation,
        start.ordinal,
        start.lsn,
        start.digest,
        copied=False,
        copy_end=0,
        empty=empty,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener
