"""The sessions under way: whose each is, which connections belong to it, and what its end takes along."""

from dataclasses import dataclass
from typing import Final

from farshore.telemetry import get_logger
from process_server.ingest import ipc
from process_server.ingest.commands import Commands
from process_server.ingest.machine import Machine
from process_server.ingest.packs import PacksUnderWay
from process_server.ingest.peer import Peer
from process_server.ingest.pool import WorkerPool
from process_server.ingest.session import Session
from process_server.ingest.stream import Refused

CHANNELS_MAX: Final = 16

log = get_logger()


@dataclass(slots=True)
class _Open:
    session: Session
    machine: Machine
    peers: set[Peer]


class Sessions:
    """All sessions of this server. Everything is called in the loop's thread and waits for nothing."""

    def __init__(self, packs: PacksUnderWay, commands: Commands, pool: WorkerPool, credit_bytes: int) -> None:
        self._packs, self._commands, self._pool = packs, commands, pool
        self._credit_bytes = credit_bytes
        self._open: dict[bytes, _Open] = {}
        self._ended: dict[bytes, Session] = {}

    def begin(self, session: Session, machine: Machine, peer: Peer) -> None:
        """A HELLO was taken: ``peer`` is the control connection from now on."""
        self._open[session.id] = _Open(session, machine, {peer})
        machine.session = session
        peer.session, peer.control = session, True
        self._admit(peer, session)

    def attach(self, peer: Peer, id: bytes) -> int:
        """Take ``peer`` as one more data connection; returns its number. Raises Refused."""
        found = self._open.get(id)
        if found is None or found.session.machine != peer.machine:
            raise Refused("retry", "no such session of this machine")
        if len(found.peers) > CHANNELS_MAX:
            raise Refused("capacity", f"more than {CHANNELS_MAX} data connections")
        found.session.channels += 1
        found.peers.add(peer)
        peer.session = found.session
        self._admit(peer, found.session)
        return found.session.channels

    def _admit(self, peer: Peer, session: Session) -> None:
        sizes = tuple((stream.id, stream.size_bytes) for stream in session.volumes.values())
        peer.worker.channel.send(
            ipc.Admit(peer.id, session.id, session.machine, peer.control, self._credit_bytes, sizes)
        )

    def get(self, id: bytes) -> Session | None:
        """A session under way."""
        found = self._open.get(id)
        return found.session if found is not None else None

    def get_anyway(self, id: bytes) -> Session | None:
        """As `get`, also one that ended while its last cuts still wait."""
        return self.get(id) or self._ended.get(id)

    def all(self) -> list[tuple[Session, Machine]]:
        """Those under way, each with its machine."""
        return [(found.session, found.machine) for found in self._open.values()]

    def tell_workers(self, session: Session, message: ipc.Message) -> None:
        """Send ``message`` to every worker that has a connection of ``session``."""
        found = self._open.get(session.id)
        for worker in {peer.worker for peer in found.peers} if found is not None else ():
            worker.channel.send(message)

    def peer_ended(self, peer: Peer) -> None:
        """A connection is gone; with the control connection its session ends."""
        if peer.session is None:
            return
        if (found := self._open.get(peer.session.id)) is not None:
            found.peers.discard(peer)
        if peer.control:
            self.end_session(peer.session, "", "the control connection ended")

    def end_session(self, session: Session, code: str, text: str) -> None:
        """End a session: its connections close, what no MARK covered is forgotten."""
        if session.ended:
            return
        session.ended = text
        log.info("session_ended", machine=session.name, reason=text, code=code)
        found = self._open.pop(session.id, None)
        self._ended[session.id] = session
        if found is not None:
            for peer in list(found.peers):
                peer.close(code, text)
            if found.machine.session is session:
                found.machine.session = None
                found.machine.rpo.disconnected()
            found.machine.forget(session)
        self._commands.session_ended(session)

    def lose(self, session: Session, text: str, why: str = "") -> None:
        """End a session some of whose data is gone on its way: it begins again from what is vaulted."""
        session.lost = why or text
        self.end_session(session, "retry", text)

    def forget(self, session: Session) -> None:
        """No cut of an ended session waits any more: the workers drop what they hold of it."""
        self._ended.pop(session.id, None)
        self._packs.forget(session)
        for worker in self._pool.workers:
            worker.channel.send(ipc.Forget(session.id))
