"""Replication as a whole: sessions one after another, and what happens between them."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from agent.capture.scan import ScanReplica, fresh
from agent.config import AgentConfig, Layout, parse_address
from agent.link import Backoff, Link, LinkDown, Server, hello
from agent.metrics import Metrics
from agent.replicate.ports import Tap
from agent.replicate.replica import Replica
from agent.replicate.session import Restart, Session
from farshore import __version__
from farshore.config import write_private
from farshore.errors import AuthError, ConfigError, Conflict, FarshoreError, NotFound, Unreachable
from farshore.telemetry import get_logger
from farshore.wire import messages as m

STEADY_S: Final = 10.0
"""A session that lasted this long ends the backing off."""
CUT_ALONE_S: Final = 10.0
"""Cuts are taken without a server too, so that a backlog brings points of its own time."""
RESTARTS_PER_S: Final = 1.0

log = get_logger()


class Replicator:
    """Keeps a session with one of the servers and follows what the user asks of volumes.

    Args:
        protected: Ids of all protected volumes, of those too that nobody can replicate yet; None: there are
            no others.

    Attributes:
        replicas: The protected volumes by id.
        reason: Why there is no session, one line; empty while there is one.
    """

    def __init__(
        self,
        directory: Path,
        config: AgentConfig,
        tap: Tap,
        metrics: Metrics,
        rng: random.Random,
        *,
        protected: Callable[[], Iterable[bytes]] | None = None,
    ) -> None:
        self.replicas: dict[bytes, Replica] = {}
        self.reason = "not yet tried"
        self.connected_at: float | None = None
        self._directory, self._config, self._tap, self._metrics = directory, config, tap, metrics
        self._rng = rng
        self._protected = protected if protected is not None else self.replicas.keys
        self._backoff = Backoff(rng)
        self._session: Session | None = None
        self._epoch_file = directory / "epoch"
        self._turn = 0

    @property
    def connected(self) -> bool:
        return self._session is not None

    @property
    def copier_pids(self) -> list[int]:
        return self._session.pool.pids if self._session is not None else []

    async def run(self) -> None:
        """Replicate until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._connect_for_ever(), name="sessions")
            tasks.create_task(self._cut_alone(), name="cuts-alone")

    # --- volumes, as the user wants them ---

    async def add(self, replica: Replica) -> None:
        """Replicate one more volume, or tell the server what is new of one: its size, why it failed."""
        self.replicas[replica.spec.id] = replica
        # A session that just ended: HELLO of the next one names the volumes as they are then.
        with contextlib.suppress(LinkDown):
            if self._session is not None:
                await self._session.add(replica)

    async def remove(self, id: bytes) -> None:
        """Stop with a volume, also one that was never taken on; what is vaulted of it stays there."""
        replica = self.replicas.pop(id, None)
        with contextlib.suppress(LinkDown):
            if self._session is not None:
                await self._session.remove(id)
        if replica is not None:
            replica.close()

    def named(self, name: str) -> Replica:
        """Return the volume called ``name``. Raises NotFound."""
        for replica in self.replicas.values():
            if replica.spec.name == name:
                return replica
        raise NotFound("no such volume", where=name, fix="see 'farshore volume list'")

    def pause(self, name: str) -> None:
        """Send nothing of a volume until `resume`; its journal goes on. Raises NotFound."""
        self.named(name).paused = True

    def resume(self, name: str) -> None:
        """End a pause. Raises NotFound."""
        self.named(name).paused = False

    async def expect_copying(self) -> None:
        """A volume is about to be protected: have the copiers start meanwhile."""
        if self._session is not None:
            await self._session.pool.expect_work()

    async def resync(self, name: str) -> None:
        """Compare the whole volume with the vault again. Raises NotFound, Unreachable, Conflict."""
        replica = self.named(name)
        if not replica.served:
            raise Conflict("the volume is not served", where=name, why=replica.absent)
        if isinstance(replica, ScanReplica):
            replica.compare_again()
            return
        replica.safe.clear()
        if self._session is None:
            # Kept by the tap, so that it happens with the next session, after a crash too.
            await self._tap.resync_required(replica.spec.id, replica.state().captured_lsn, 0)
        else:
            await self._session.resync(replica)

    async def command(self, command: m.Command) -> m.Result:
        """Do what the server asks on behalf of an operator."""
        session = self._session
        try:
            match command.verb:
                case "point":
                    if session is None:
                        raise Unreachable("no session")
                    async with fresh(list(self.replicas.values())):
                        return m.Result(command.id, True, "", await session.marks.take(command.tag))
                case "pause":
                    self.pause(command.volume or "")
                case "resume":
                    self.resume(command.volume or "")
                case "resync":
                    await self.resync(command.volume or "")
                case _:
                    return m.Result(command.id, False, f"this agent does not know {command.verb!r}")
        except FarshoreError as error:
            return m.Result(command.id, False, str(error))
        return m.Result(command.id, True)

    def renew(self) -> None:
        """There is a new certificate: show it to the server at the next convenient moment."""
        if self._session is not None:
            self._session.restart()

    # --- sessions ---

    async def _connect_for_ever(self) -> None:
        while True:
            began = time.monotonic()
            pause_s = 0.0
            try:
                await self._one_session()
            except Restart as restart:
                self._down("retry", str(restart))
                pause_s = RESTARTS_PER_S * self._rng.random()
            except LinkDown as error:
                self._down(error.reason, str(error))
                pause_s = -1
            except (AuthError, ConfigError) as error:
                self._down("auth", str(error))
                pause_s = -1
            except Exception as error:
                # A mistake of ours must not end replication of the other volumes for good.
                log.exception("session_failed", error=f"{type(error).__name__}: {error}")
                self._down("internal", f"internal error: {type(error).__name__}: {error}")
                pause_s = -1
            if pause_s < 0:
                if time.monotonic() - began > STEADY_S:
                    self._backoff.reset()
                pause_s = self._backoff.next_s()
                log.info("reconnecting", pause_s=round(pause_s, 2), failures=self._backoff.failures)
            await asyncio.sleep(pause_s)

    def _down(self, reason: str, text: str) -> None:
        was_connected, self._session, self.connected_at = self.connected_at is not None, None, None
        self.reason = text
        self._metrics.disconnected(reason)
        log.warning("link_down", reason=reason, error=text, was_connected=was_connected)

    async def _one_session(self) -> None:
        """Try the next server; with a session, stay until it ends. Raises LinkDown, Restart, ConfigError."""
        servers = self._config.servers
        host, port = parse_address(servers[self._turn % len(servers)])
        self._turn += 1
        identity = Layout(self._directory).identity
        server = Server(host, port, self._config.vault_bytes, identity)
        link = await Link.connect(server)
        session: Session | None = None
        try:
            message = m.Hello(
                m.PROTOCOL,
                self._config.machine_bytes,
                self._config.machine,
                __version__,
                self._epoch_seen(),
                tuple(replica.hello() for replica in self.replicas.values()),
                tuple(self._protected()),
            )
            welcome = await hello(link, message)
            self._check_epoch(welcome.epoch)
            self._turn -= 1  # this one is good: the same again
            session = Session(link, welcome, self.replicas, self._tap, self._metrics, self.command)
            self._session, self.reason, self.connected_at = session, "", time.time()
            self._metrics.connected()
            log.info("connected", server=server.address, epoch=welcome.epoch, head_seq=welcome.head_seq)
            for replica in list(self.replicas.values()):
                # Protected, or found to be missing, between HELLO and now.
                if replica.hello() not in message.volumes:
                    await session.add(replica)
            await session.run()
        except asyncio.CancelledError:
            await link.close("the agent stops")
            raise
        finally:
            self._session = None
            link.abort()
            self._metrics.sent("wire", link.wire_bytes)
            if session is not None and session.acked:
                self._backoff.reset()

    def _epoch_seen(self) -> int:
        try:
            return int(self._epoch_file.read_text())
        except (OSError, ValueError):
            return 0

    def _check_epoch(self, epoch: int) -> None:
        """An owner of the past may still answer: it must not get this machine's records."""
        seen = self._epoch_seen()
        if epoch < seen:
            raise LinkDown(
                "superseded",
                "the server is an owner of the past",
                why=f"its epoch is {epoch}, this machine has seen {seen}",
            )
        if epoch > seen:
            write_private(self._epoch_file, str(epoch).encode())

    async def _cut_alone(self) -> None:
        taken: dict[bytes, int] = {}
        while True:
            await asyncio.sleep(CUT_ALONE_S)
            if self._session is not None:
                continue
            captured = {
                id: state.captured_lsn
                for id, replica in self.replicas.items()
                if (state := replica.state_or_none()) is not None
            }
            if all(taken.get(id) == lsn for id, lsn in captured.items()):
                continue
            try:
                cut = await self._tap.cut(None)
            except Unreachable:
                continue
            taken = {entry.volume: entry.lsn for entry in cut.volumes}
