"""One session with the process server, from WELCOME to the end of the control connection.

Receives, sends journals and MARKs in order, plans the copying. What each decides is in the pure
modules beside this one; what a session leaves behind for the next is in `Replica`.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Final

from agent.capture.scan import ScanReplica
from agent.journal.errors import JournalGap
from agent.journal.state import DATA, FAILED, RESYNC_REQUIRED, State
from agent.link import Link, LinkDown
from agent.replicate import cuts
from agent.replicate.copiers import CopierPool, setup_for
from agent.replicate.copyrule import CopyRule
from agent.replicate.delta import Delta, Frame, start_message
from agent.replicate.job import Job, dirty_units, whole_volume
from agent.replicate.marks import Marks, scanned, unserved
from agent.replicate.passes import Passes
from agent.replicate.ports import Counters, DirtyRegions, Journal, Tap
from agent.replicate.replica import Replica
from agent.replicate.works import Works
from farshore.errors import Conflict, CorruptRecord, FarshoreError, NotFound, Unreachable
from farshore.failpoints import failpoint
from farshore.telemetry import get_logger
from farshore.wire import messages as m

POLL_S: Final = 0.02
"""How often the state pages are looked at for new durable records."""
PLAN_S: Final = 0.1
COMMANDS_MAX: Final = 32

log = get_logger()


class Restart(Exception):
    """The session must begin again at once; the text says why."""


class Session:
    """State of one session; `run` returns only by raising LinkDown or Restart, or cancelled."""

    def __init__(
        self,
        link: Link,
        welcome: m.Welcome,
        replicas: dict[bytes, Replica],
        tap: Tap,
        counters: Counters,
        command: Callable[[m.Command], Awaitable[m.Result]],
    ) -> None:
        self.link, self.welcome, self.policy = link, welcome, welcome.policy
        self.replicas, self.tap, self.counters = replicas, tap, counters
        self._command = command
        self.streams: dict[bytes, cuts.Stream] = {}
        self._positions: dict[bytes, m.VolumePosition] = {}
        self._heals: dict[bytes, DirtyRegions] = {}
        self._send_now = asyncio.Event()
        self._commands: asyncio.Queue[m.Command] = asyncio.Queue(COMMANDS_MAX)
        self._passes = Passes(self)
        self.marks = Marks(
            link, tap, self.streams, replicas, lambda: self.policy.point_interval_s, self._send_now
        )
        self.works = Works(
            self.streams, replicas, counters, finished=self.marks.want, failed=self._passes.failed
        )
        self._restart = asyncio.Event()
        self.acked = False
        for position in welcome.volumes:
            self._place(position)
        self.pool = CopierPool(
            self.works,
            setup_for(link.server, welcome.session, self.policy),
            count=max(1, min(8, self.policy.copy_connections)),
            numbers=itertools.count(1),
        )

    async def run(self) -> None:
        """Replicate until the link or the session ends.

        Raises:
            LinkDown: The connection ended, with the reason.
            Restart: Connect again now.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for task in (
                    self._receive,
                    self._send,
                    self.marks.run,
                    self._plan,
                    self._run_commands,
                    self.pool.run,
                    self._until_restart,
                ):
                    tasks.create_task(task(), name=f"session-{task.__qualname__}")
        except* Exception as group:
            first = _first(group)
            raise first from first.__cause__
        finally:
            for replica in self.replicas.values():
                replica.remaining_bytes = None

    def restart(self) -> None:
        """Begin again: there is a new certificate to show."""
        self._restart.set()

    async def _until_restart(self) -> None:
        await self._restart.wait()
        raise Restart("the certificate was renewed")

    # --- volumes ---

    async def add(self, replica: Replica) -> None:
        """Tell the server of a volume protected while connected, or of what is new of one."""
        await self.link.send(m.VolumeAdd(replica.hello()))

    async def remove(self, id: bytes) -> None:
        """A volume is not protected any more."""
        self.streams.pop(id, None)
        self._positions.pop(id, None)
        await self.link.send(m.VolumeRemove(id))
        self.marks.forget(id)

    def position(self, volume: bytes) -> m.VolumePosition:
        """Where the vault stands with a volume of this session."""
        return self._positions[volume]

    async def resync(self, replica: Replica) -> None:
        """Compare a whole volume again, at somebody's wish."""
        stream = self.streams.get(replica.spec.id)
        if stream is not None:
            self.works.drop(stream)
            stream.copied, stream.resync = False, True
            stream.resync_at = replica.state().incarnation
            replica.resync = True
            if (here := stream.delta.incarnation) is not None:
                # The same incarnation again, with the news that it is to be compared.
                await self.link.send(start_message(stream.id, here, resync=True))

    def _place(self, position: m.VolumePosition) -> None:
        """A volume is in the session from here on, and so in every MARK; it sends when it is opened."""
        if position.id not in self.replicas:
            return
        self._positions[position.id] = position
        rule = CopyRule(position.lsn, position.copy_end)
        journal = self.replicas[position.id].journal
        stream = cuts.Stream(position.id, Delta(position.id, journal, rule), rule, False, position.copied)
        stream.mark = (position.incarnation, position.lsn)
        stream.delta.at(position.incarnation, position.lsn)
        self.streams[position.id] = stream

    async def _open(self, replica: Replica) -> None:
        """Find where the journal goes on behind what the vault has; without that, begin a resync.

        Raises:
            Unreachable: The tap is not there; tried again later.
        """
        id = replica.spec.id
        position = self._positions[id]
        state = replica.state()
        journal = replica.journal
        stream = self.streams[id]
        copied, resync = position.copied, bool(state.flags & RESYNC_REQUIRED)
        try:
            if not position.lsn and not any(position.incarnation):
                await asyncio.to_thread(_start_at_first, journal)
            elif not await asyncio.to_thread(
                journal.position, position.incarnation, position.lsn, position.digest
            ):
                log.warning("continuity_lost", volume=replica.spec.name, vaulted_lsn=position.lsn)
                await self.tap.resync_required(id, position.lsn, position.ordinal)
                failpoint("agent.after_resync_required")
                replica.safe.clear()
                await asyncio.to_thread(journal.start_at_newest)
                resync = True
        except (CorruptRecord, JournalGap) as error:
            log.error("journal_not_readable", volume=replica.spec.name, error=str(error))
            await self.tap.resync_required(id, position.lsn, position.ordinal)
            raise Restart("a journal could not be read on") from error
        stream.resync_at = replica.state().incarnation
        stream.resync = replica.resync = resync
        stream.copied = replica.copied = copied and not resync
        stream.paused = replica.paused
        try:
            # It is in every cut from here on, so a later agent must be able to introduce it without its disk.
            replica.remember_size()
        except FarshoreError as error:
            # Where the journal's disk is full, only replicating makes room. The server keeps it in too.
            log.warning("size_not_remembered", volume=replica.spec.name, error=str(error))
        stream.opened = True

    # --- receiving ---

    async def _receive(self) -> None:
        while True:
            message = await self.link.receive()
            match message:
                case m.Ping(id=id):
                    await self.link.send(m.Pong(id, tuple(self._statuses())))
                case m.Credit(bytes=count):
                    self.link.add_credit(count)
                case m.Ack():
                    await self._acknowledged(message)
                case m.Policy():
                    self.policy = message
                case m.Command():
                    try:
                        self._commands.put_nowait(message)
                    except asyncio.QueueFull:
                        await self.link.send(m.Result(message.id, False, "too many commands at once"))
                case m.VolumeAdded(position=position):
                    if position.id not in self.streams:
                        self._place(position)
                case m.Error(volume=volume, code=code, text=text):
                    await self._volume_refused(volume, code, text)
                case _:
                    raise LinkDown("protocol", "an unexpected frame", why=type(message).__name__)

    def _statuses(self) -> list[m.VolumeStatus]:
        return [
            status for replica in self.replicas.values() if (status := replica.volume_status()) is not None
        ]

    async def _volume_refused(self, volume: bytes | None, code: str, text: str) -> None:
        """The server cannot take a volume's records: it has others under that name, or some are missing."""
        replica = self.replicas.get(volume or b"")
        log.error("volume_refused", volume=replica.spec.name if replica else "", code=code, error=text)
        if isinstance(replica, ScanReplica):
            replica.forget()
        elif replica is not None and replica.served and code in ("gap", "conflict"):
            state = replica.state()
            position = self._positions[replica.spec.id]
            await self.tap.resync_required(
                replica.spec.id, max(state.captured_lsn, position.lsn), position.ordinal
            )
            replica.safe.clear()
        raise LinkDown(code, "the server refused a volume", why=text)

    async def _acknowledged(self, ack: m.Ack) -> None:
        if ack.level != "vaulted":
            return
        failpoint("agent.before_ack_taken")
        self.acked = True
        mark = self.marks.vaulted(ack.cut_seq)
        copied = self._copied_in(mark) if mark is not None else set()
        # What is scanned may be fuzzy for ever, and so may what is not served: neither keeps another volume
        # from being protected.
        apart = scanned(self.replicas) | unserved(self.replicas)
        for vaulted in ack.volumes:
            stream, replica = self.streams.get(vaulted.id), self.replicas.get(vaulted.id)
            if stream is None or replica is None:
                continue
            stream.rule.vaulted(vaulted.lsn)
            replica.vaulted_lsn = vaulted.lsn
            self._positions[vaulted.id] = _moved(self._positions[vaulted.id], vaulted, stream)
            for token in cuts.vaulted_tokens(stream, ack.cut_seq):
                if stream.job is not None:
                    stream.job.token_vaulted(token)
            if stream.job is not None and stream.job.kind != "heal":
                replica.safe |= stream.job.safe
            if not replica.served:
                continue
            await self._quietly(self.tap.vaulted(vaulted.id, vaulted.incarnation, vaulted.lsn))
            if vaulted.id in copied and replica.served:
                fuzzy = ack.consistency == "fuzzy"
                if fuzzy and apart and mark is not None:
                    fuzzy = cuts.is_fuzzy(mark, without=apart)
                await self._copied(stream, replica, offerable=not fuzzy)
        self.counters.record("points", 1)
        self._send_now.set()

    def _copied_in(self, mark: m.Mark) -> set[bytes]:
        """The volumes of which ``mark`` says that the vault has all, and that is still so.

        A MARK from before a resync or a pass began says it of the copying before.
        """
        found = set()
        for volume in mark.volumes:
            stream, replica = self.streams.get(volume.volume), self.replicas.get(volume.volume)
            if not volume.copied or stream is None:
                continue
            if not stream.copied or mark.cut_seq < stream.copied_seq:
                continue
            if isinstance(replica, ScanReplica) and not self._passes.concerns(replica, volume):
                continue
            found.add(volume.volume)
        return found

    async def _copied(self, stream: cuts.Stream, replica: Replica, *, offerable: bool) -> None:
        """The vault has all of the volume."""
        if stream.job is not None and stream.job.kind != "heal":
            self.works.end(stream)
        if isinstance(replica, ScanReplica):
            self._passes.vaulted(stream, replica)
            return
        state = replica.state()
        if state.flags & RESYNC_REQUIRED and state.incarnation == stream.resync_at:
            # The tap calls every cut fuzzy until it hears this. What was vaulted holds from here on: a cut
            # at or above the end of the reads is a prefix, whatever happens to agent or tap meanwhile.
            await self._quietly(self.tap.resync_done(stream.id))
            self.marks.want()
        if not offerable:
            return
        stream.resync = replica.resync = False
        replica.safe.clear()
        if not replica.copied:
            log.info("volume_protected", volume=replica.spec.name)
        replica.copied = True

    async def _quietly(self, call: Awaitable[None]) -> None:
        """What the tap misses now it is told again with the next ACK."""
        try:
            await call
        except (Unreachable, Conflict, NotFound) as error:  # no tap, or one that does not serve the volume
            log.warning("tap_not_reached", error=str(error))

    async def _run_commands(self) -> None:
        # Each on its own: a point may wait for a pass over a scanned disk, a pause must not wait for that.
        room = asyncio.Semaphore(COMMANDS_MAX)

        async def run(command: m.Command) -> None:
            try:
                await self.link.send(await self._command(command))
            finally:
                room.release()

        async with asyncio.TaskGroup() as tasks:
            while True:
                await room.acquire()
                tasks.create_task(run(await self._commands.get()), name="command")

    # --- sending ---

    async def _send(self) -> None:
        while True:
            self._send_now.clear()
            busy = False
            for id, replica in list(self.replicas.items()):
                stream = self.streams.get(id)
                if stream is not None and stream.sending:
                    busy |= await self._send_records(stream, replica)
            busy |= await self.marks.send()
            if not busy:
                try:
                    async with asyncio.timeout(POLL_S):
                        await self._send_now.wait()
                except TimeoutError:
                    pass

    async def _send_records(self, stream: cuts.Stream, replica: Replica) -> bool:
        """Send about one frame of a volume; tell whether there was anything."""
        state = replica.state_or_none()
        if state is None:
            return False
        here = stream.delta.incarnation
        if here is not None and stream.delta.place == (state.incarnation, state.durable_lsn):
            return False
        try:
            durable = (state.incarnation, state.durable_lsn)
            resync = state.incarnation if stream.resync else b""
            frames = await asyncio.to_thread(stream.delta.read, durable, resync)
        except (CorruptRecord, JournalGap) as error:
            log.error("journal_not_readable", volume=replica.spec.name, error=str(error))
            position = self._positions[stream.id]
            await self.tap.resync_required(stream.id, max(position.lsn, state.captured_lsn), position.ordinal)
            replica.safe.clear()
            raise Restart("a journal could not be read on") from error
        for frame in frames:
            if self.streams.get(stream.id) is not stream:
                return True
            await self._send_frame(stream, frame)
        return bool(frames)

    async def _send_frame(self, stream: cuts.Stream, frame: Frame) -> None:
        if not stream.delta.was_sent(frame):
            log.info("copying_overtaken", volume=self.replicas[stream.id].spec.name)
            self.replicas[stream.id].safe.clear()
            raise Restart("a gap in a journal met copies under way")
        for cut in frame.cuts:
            self.marks.found(cut)
        if frame.raw is None:
            await self.link.send(frame.message)
            return
        assert isinstance(frame.message, m.Data)
        await self.link.send_raw(frame.message, frame.raw)
        self.counters.sent("raw", len(frame.raw))
        self.marks.records_sent(sum(len(rows) for _, rows in frame.batches), len(frame.raw))

    # --- copying ---

    async def _plan(self) -> None:
        while True:
            for id, replica in list(self.replicas.items()):
                if id not in self.streams:
                    continue
                try:
                    await self._plan_volume(replica)
                except Unreachable as error:
                    log.debug("tap_not_there", volume=replica.spec.name, error=str(error))
                except FarshoreError as error:
                    log.error("copy_not_planned", volume=replica.spec.name, error=str(error))
            await self.pool.work_arrived()
            await asyncio.sleep(PLAN_S)

    async def _plan_volume(self, replica: Replica) -> None:
        stream = self.streams[replica.spec.id]
        if isinstance(replica, ScanReplica):
            await self._passes.plan(stream, replica, self._positions[stream.id])
            return
        if not replica.served:
            return
        if not stream.opened:
            await self._open(replica)
            return
        self.marks.served(stream.id)
        state = replica.state()
        if state.flags & RESYNC_REQUIRED and not (stream.resync and state.incarnation == stream.resync_at):
            # The tap found out, or was told, that writes may have passed it by: once more, or for the first
            # time in this session.
            replica.safe.clear()
            raise Restart("a volume's continuity changed")
        stream.paused = replica.paused
        if stream.paused or stream.delta.incarnation is None or state.flags & FAILED:
            return
        if stream.job is not None:
            replica.remaining_bytes = stream.job.remaining_bytes
            replica.total_bytes = stream.job.total_bytes
            if stream.job.kind == "heal" and stream.job.vaulted and not stream.rule.waiting:
                await self._healed(stream)
            return
        if not stream.copied:
            self._start_full(stream, replica, state)
        elif state.dirty_regions and state.capture_mode == DATA:
            dirty = await self.tap.dirty(stream.id)
            units = dirty_units(
                dirty.regions, dirty.region_bytes, self.policy.chunk_bytes, replica.spec.size_bytes
            )
            # Taken after the round began: no write of the round's regions went past the journal later.
            # Not compared: what is dirty was written, and asking costs the server a table of the volume.
            job = Job("heal", units, compare=False, after=replica.state().captured_lsn)
            self._heals[stream.id] = dirty
            self.works.begin(stream, job)
            log.info("healing_started", volume=replica.spec.name, bytes=job.total_bytes)

    def _start_full(self, stream: cuts.Stream, replica: Replica, state: State) -> None:
        empty = self._positions[stream.id].empty
        units = whole_volume(replica.spec.size_bytes, replica.safe)
        # Whatever the vault has was perhaps made before writes that went past the journal.
        after = 0 if empty and not stream.resync else state.captured_lsn
        job = Job("resync" if stream.resync else "initial", units, compare=not empty, after=after)
        self.works.begin(stream, job)
        log.info(
            "copying_started",
            volume=replica.spec.name,
            kind=job.kind,
            bytes=job.total_bytes,
            compare=job.compare,
        )

    async def _healed(self, stream: cuts.Stream) -> None:
        dirty = self._heals.pop(stream.id)
        failpoint("agent.before_dirty_clear")
        try:
            await self.tap.dirty_clear(stream.id, dirty.round, dirty.regions)
        except Conflict as error:
            # Writes went past the journal again: another round.
            log.info("healing_overtaken", volume=self.replicas[stream.id].spec.name, error=str(error))
            self.works.end(stream)
            return
        self.works.end(stream)
        self.marks.want()
        log.info("healed", volume=self.replicas[stream.id].spec.name, regions=len(dirty.regions))


def _start_at_first(journal: Journal) -> None:
    """The vault has nothing, so any beginning will do: a compare follows in any case. Raises JournalGap."""
    try:
        journal.start_at_oldest()
    except JournalGap:
        journal.start_at_newest()


def _moved(position: m.VolumePosition, vaulted: m.Vaulted, stream: cuts.Stream) -> m.VolumePosition:
    here = stream.delta.incarnation
    ordinal = here.incarnation.ordinal if here is not None else position.ordinal
    return m.VolumePosition(
        position.id,
        vaulted.incarnation,
        max(position.ordinal, ordinal),
        vaulted.lsn,
        vaulted.digest,
        stream.copied,
        stream.rule.copy_end,
        False,
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One exception stands for all that a dying session raised: what nobody expected, else the first."""
    leaves = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in group.exceptions]
    return next((leaf for leaf in leaves if not isinstance(leaf, LinkDown | Restart)), leaves[0])
