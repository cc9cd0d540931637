"""One protected volume in the tap: where each request goes, and what happens when the journal gives way.

What the clients ask comes from their threads; everything else here runs in the thread of the event loop,
except where a method says otherwise. LSNs, and the way a write takes, are given under one lock for all
volumes, the gate: a cut holds it while it looks at them. Nobody touches a file under it, and the loop's
thread touches none at all: that is what `agent.tap.lanes` is for.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from agent.journal import mark as marks
from agent.journal import state as states
from agent.journal.dirty import DirtyMap
from agent.journal.errors import JournalFailed, JournalFull
from agent.journal.mark import Mark, MarkFile
from agent.journal.recovery import Recovered, recover
from agent.journal.writer import JournalWriter
from agent.tap import ladder as rungs
from agent.tap.batch import Answering, Batch, Bytes, Pending, mark_batch, write_batch, zero_batch
from agent.tap.ladder import Action, Ladder, Mode
from agent.tap.lanes import Barrier, DiskLane, JournalLane, Worker, answer_extents, answer_read, failed_reply
from agent.tap.opening import Opened, Place, open_writer
from agent.tap.vectored import Ints
from agent.volumes import VolumeConfig
from farshore.clock import Clock
from farshore.errors import Conflict, FarshoreError
from farshore.failpoints import failpoint
from farshore.hrl.batch import BATCH_PAYLOAD_BYTES_MAX
from farshore.ids import id_from_hex
from farshore.nbd import codec
from farshore.telemetry import get_logger
from farshore.units import MIB

PENDING_BYTES_MAX: Final = 64 * MIB
"""Writes that the disk does not have yet; reading from the clients stops above it."""
PENDING_BYTES_LOW: Final = 48 * MIB
STABLE_BYTES: Final = 64 * MIB
STABLE_S: Final = 5.0
ROOM_SHARE: Final = 0.75
"""Climb back when at most this part of the quota is in use, so as not to fall again at once."""
TICK_S: Final = 0.1
_POLL_S: Final = 0.002
_ROUND_BITS: Final = 32
"""A round is named by the epoch and its number in it, so that no other run of the tap has the same."""

T = TypeVar("T")


def _resolve(future: "asyncio.Future[bool]", value: bool) -> None:
    if not future.done():
        future.set_result(value)


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for what threads do and tell nobody: rare steps, and not worth a way to tell."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)


class Volume:
    """A volume that is being served. Made by `agent.tap.service` out of what `open_volume` returns.

    Attributes:
        lsn: Highest LSN given.
        cut_lsn: LSN at the last cut.
        ladder: In which mode it captures.
        resync: Why it needs a full compare; empty when it does not.
    """

    def __init__(
        self,
        place: Place,
        config: VolumeConfig,
        opened: Opened,
        clock: Clock,
        gate: threading.Lock,
        relieved: Callable[[], None],
    ) -> None:
        """``gate`` is the machine's. ``relieved`` is called, in any thread, when there is room for writes."""
        self.config, self.id = config, id_from_hex(config.id)
        self.disk, self.size_bytes = opened.disk, opened.disk.size_bytes
        self.opened = opened
        self.resync = opened.resync
        self.lsn = self.cut_lsn = opened.last_lsn
        self.epoch = opened.epoch
        self.stable_lsn = opened.last_lsn
        self.vaulted_lsn = 0
        self._above_ordinal = 0
        self.pending = Pending()
        self._place, self._clock, self._gate, self._relieved = place, clock, gate, relieved
        self._loop = asyncio.get_running_loop()
        self._log = get_logger(volume=config.name)
        self._page, self._mark_file, self.dirty = opened.page, opened.mark_file, opened.dirty
        self._boot_id = opened.boot.id
        self._captured_lsn = self._durable_lsn = opened.last_lsn
        self._incarnation = bytes(16)
        self._ticket = self._passed_ticket = 0
        self._bitmap_marked = opened.writer is None
        self._marking = self._closed = self._refusing = False
        self._full_relief = False
        self._extra: set[int] = set()  # dirty regions that the map's file does not have
        self._extra_lock = threading.Lock()
        self._stable_at, self._stable_bytes = time.monotonic(), 0
        self._next_climb = 0.0
        self._tasks: set[asyncio.Future[None]] = set()
        self._leaving = 0
        self._durable_waiters: list[tuple[int, JournalLane, asyncio.Future[bool]]] = []
        self.side = Worker(f"{config.name}-side")
        self._writer: JournalWriter | None = opened.writer
        self._journal_lane: JournalLane | None = None
        self._old_journal_lane: JournalLane | None = None
        self.ladder = Ladder(wait=config.on_journal_lost == "wait")
        self._logging = self._holding = False
        self.disk_lane = DiskLane(
            opened.disk,
            self.pending,
            config.name,
            applied_lsn=opened.last_lsn,
            before=self.publish,
            applied=self._on_applied,
            flushed=self._on_flushed,
            passing=self._mark_dirty,
            passed_durable=self._sync_dirty,
            changed=self._on_disk_changed,
        )
        if opened.writer is not None:
            self._use(opened.writer)
        else:
            retry_s = 0.0 if opened.room_only else rungs.RETRY_MIN_S
            self.ladder = Ladder(Mode.BITMAP, self.ladder.wait, why=opened.why, retry_s=retry_s)
            self._log.error("volume_below_data_mode", why=opened.why)
        self.publish()

    # -- what the clients ask ----------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """``data`` or ``bitmap``, as users are told."""
        return "data" if self.ladder.mode is Mode.DATA else "bitmap"

    @property
    def full(self) -> bool:
        """No more writes can be taken in before some are on the disk."""
        return self.pending.held_bytes >= PENDING_BYTES_MAX

    @property
    def failed(self) -> bool:
        """The disk refuses writes."""
        return bool(self.disk_lane.failed)

    def write(
        self,
        offsets: Ints,
        lengths: Ints,
        payload: Bytes,
        client: Answering,
        reply: bytes,
        *,
        fua: bool = False,
    ) -> None:
        """Take writes in; ``payload`` is ours from here on. ``reply`` is sent when they are captured."""
        if self.disk_lane.failed:
            client.send(failed_reply(reply, codec.EIO))
            return
        now = self._clock.wall_ns()
        if len(payload) <= BATCH_PAYLOAD_BYTES_MAX:
            batches = [write_batch(now, offsets, lengths, payload, client, b"" if fua else reply)]
        else:
            # One long write, or many: a record per row and 4 MiB, the reply with the last.
            batches, start = [], 0
            for row_offset, row_length in zip(offsets.tolist(), lengths.tolist(), strict=True):
                for at in range(0, row_length, BATCH_PAYLOAD_BYTES_MAX):
                    length = min(BATCH_PAYLOAD_BYTES_MAX, row_length - at)
                    one, size = np.array([row_offset + at], np.int64), np.array([length], np.int64)
                    part = payload[start : start + length]
                    start += length
                    batches.append(write_batch(now, one, size, part, client, b""))
            batches[-1].reply = b"" if fua else reply
        self._submit(batches, client, reply if fua else b"")

    def zero(self, offset: int, length: int, client: Answering, reply: bytes, *, fua: bool = False) -> None:
        """Make a range zeros."""
        if self.disk_lane.failed:
            client.send(failed_reply(reply, codec.EIO))
            return
        batch = zero_batch(self._clock.wall_ns(), offset, length, client, b"" if fua else reply)
        self._submit([batch], client, reply if fua else b"")

    def trim(self, offset: int, length: int, client: Answering, reply: bytes, *, fua: bool = False) -> None:
        """Make a range zeros where that gives space back; elsewhere nothing is done, and nothing logged."""
        if self.disk.punches:
            self.zero(offset, length, client, reply, fua=fua)
        else:
            client.send(reply)

    def flush(self, client: Answering, reply: bytes) -> None:
        """Send ``reply`` when everything taken in so far is durable, in the journal and on the disk."""
        self._submit([], client, reply)

    def read(self, client: Answering, cookie: int, offset: int, length: int, *, structured: bool) -> None:
        """Send what the range holds, pending writes included."""
        pending, disk = self.pending.snapshot(), self.disk
        self.disk_lane.read(
            lambda: answer_read(disk, client, cookie, offset, length, pending, structured=structured)
        )

    def extents(self, client: Answering, cookie: int, offset: int, length: int, context: int) -> None:
        """Send the allocation of the range."""
        pending, disk = self.pending.snapshot(), self.disk
        self.disk_lane.read(lambda: answer_extents(disk, client, cookie, offset, length, pending, context))

    def _submit(self, batches: list[Batch], client: Answering, flush_reply: bytes) -> None:
        """Take ``batches`` in, and append them if nobody else is appending, as long as that takes.

        Args:
            batches: Of one request, or none.
            client: Who asks.
            flush_reply: For ``client`` when these and all before them are durable everywhere; may be empty.
        """
        with self._gate:
            if self._refusing:
                return  # the client is about to lose its connection
            lane = self._journal_lane if self._logging else None
            for batch in batches:
                self._take_in(batch)
            ticket = self._ticket
        if flush_reply:
            error = failed_reply(flush_reply, codec.EIO)
            if self.disk_lane.failed:
                client.send(error)
            else:
                self.disk_lane.flush(Barrier(ticket, client, flush_reply, error))
        if lane is not None:
            if batches:
                lane.append(batches[-1])
            if flush_reply:
                lane.hurry()

    def _take_in(self, batch: Batch) -> None:
        """Under the gate: give a batch its place in the order of all, and its LSNs."""
        self._ticket += 1
        batch.ticket = self._ticket
        self.pending.add(batch)
        if self._logging:
            assert self._journal_lane is not None
            batch.first_lsn = self.lsn + 1
            self.lsn += batch.count
            self._journal_lane.put(batch)
        elif not self._holding:
            self._pass([batch])

    def _pass(self, batches: list[Batch]) -> None:
        """Under the gate: past the journal."""
        for batch in batches:
            batch.passed = batch.durable = True
            batch.first_lsn = 0
        if batches:
            self._passed_ticket = batches[-1].ticket
            self.disk_lane.put(batches)

    # -- cuts --------------------------------------------------------------------------------------------

    @property
    def fuzzy(self) -> bool:
        """A cut taken now would not be the whole truth about this volume."""
        return self.ladder.mode is not Mode.DATA or bool(self.dirty_count) or bool(self.resync)

    @property
    def incarnation(self) -> bytes:
        """Of the journal being written, or the last one that was."""
        return self._incarnation

    @property
    def changed(self) -> bool:
        """There are records since the last cut."""
        return self.lsn != self.cut_lsn

    @property
    def logs(self) -> bool:
        """A record can be appended."""
        return self._logging

    def put_mark(self, payload: bytes) -> "asyncio.Future[bool]":
        """Under the gate: log a MARK; the future tells whether it became durable."""
        lane = self._journal_lane
        assert lane is not None
        self._take_in(mark_batch(self._clock.wall_ns(), payload))
        self.cut_lsn = self.lsn
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._durable_waiters.append((self.lsn, lane, waiter))
        lane.append_soon()
        lane.hurry()
        return waiter

    # -- counters ----------------------------------------------------------------------------------------

    @property
    def captured_lsn(self) -> int:
        return self._captured_lsn

    @property
    def durable_lsn(self) -> int:
        return self._durable_lsn

    @property
    def backlog_bytes(self) -> int:
        """Bytes of log not freed."""
        return self._writer.backlog_bytes if self._writer else 0

    @property
    def dirty_count(self) -> int:
        """Regions marked dirty, in the file or in memory."""
        return self.dirty.count + len(self._extra)

    @property
    def busy(self) -> bool:
        """Writes are under way, so the heartbeat matters."""
        return self.pending.held_bytes > 0

    def state_flags(self) -> int:
        """Flags of the state page."""
        return (
            (states.FAILED if self.disk_lane.failed else 0)
            | (states.JOURNAL_LOST if self.ladder.lost else 0)
            | (states.RESYNC_REQUIRED if self.resync else 0)
        )

    def publish(self) -> None:
        """Write the state page. Any thread; the apply thread does it before each write to the disk."""
        # In this order: nobody may see a record applied that was not captured before.
        applied_lsn = self.disk_lane.applied_lsn
        writer = self._writer
        if writer is not None:
            self._durable_lsn = max(self._durable_lsn, writer.durable_lsn)
            self._captured_lsn = max(self._captured_lsn, writer.appended_lsn)
        self._page.update(
            incarnation=self._incarnation,
            captured_lsn=self._captured_lsn,
            durable_lsn=self._durable_lsn,
            applied_lsn=applied_lsn,
            stable_lsn=self.stable_lsn,
            heartbeat_ns=self._clock.wall_ns(),
            heartbeat_monotonic_ns=time.monotonic_ns(),
            capture_mode=states.DATA if self.ladder.mode is Mode.DATA else states.BITMAP,
            flags=self.state_flags(),
            dirty_epoch=self.epoch,
            dirty_regions=self.dirty_count,
        )

    def tick(self) -> None:
        """Look after what nobody else wakes up for; called every ``TICK_S``."""
        now = time.monotonic()
        self._watch(now)
        applied, flushed = self.disk_lane.applied_ticket, self.disk_lane.flushed_ticket
        if applied > flushed and not self.disk_lane.failed:
            due = now - self._stable_at >= STABLE_S
            if due or self.disk_lane.applied_bytes - self._stable_bytes >= STABLE_BYTES:
                self._advance()
        if applied == flushed:
            self._stable_at, self._stable_bytes = now, self.disk_lane.applied_bytes
        if self.ladder.mode is Mode.BITMAP and now >= self._next_climb and self._may_climb():
            self._next_climb = now + 1.0
            self._event(rungs.ClimbDue())

    def _advance(self) -> None:
        self._stable_at, self._stable_bytes = time.monotonic(), self.disk_lane.applied_bytes
        self.disk_lane.flush(Barrier(self.disk_lane.applied_ticket))

    def _watch(self, now: float) -> None:
        """Notice a journal that does not answer."""
        lane = self._journal_lane
        begun = [self.side.since, lane.append_since if lane else 0.0, lane.sync_since if lane else 0.0]
        since = min((at for at in begun if at), default=0.0)
        if since and now - since >= self.config.journal_stall_max_s:
            if self.ladder.mode in (Mode.DATA, Mode.LEAVING):
                self._event(rungs.Stalled(f"the journal has not answered for {now - since:.1f} s"))
        elif self.ladder.stalled:
            self._log.warning("journal_answers_again")
            self._event(rungs.Answered())

    def _may_climb(self) -> bool:
        if self._old_journal_lane is not None and not self._old_journal_lane.ended:
            return False
        if self.side.since or self.disk_lane.failed:
            return False
        if self.ladder.retry_s:
            return True
        return self._writer is None or self.backlog_bytes <= self.config.quota_bytes * ROOM_SHARE

    # -- the ladder --------------------------------------------------------------------------------------

    def _event(self, event: rungs.Event) -> None:
        before = self.ladder
        self.ladder, actions = rungs.step(self.ladder, event)
        if self.ladder.retry_s != before.retry_s:
            self._next_climb = time.monotonic() + self.ladder.retry_s
        if Action.ALARM in actions:
            self._log.error(
                "journal_in_trouble", why=self.ladder.why or str(event), mode=self.ladder.mode.value
            )
        if Action.HOLD in actions:
            with self._gate:
                self._logging, self._holding = False, True
        if Action.ABANDON in actions and self._journal_lane is not None:
            self._journal_lane.abandon()
            self._old_journal_lane, self._journal_lane = self._journal_lane, None
        if Action.HOLD in actions or Action.ABANDON in actions:
            self._settle_waiters()
        if Action.LEAVE in actions:
            self._leaving += 1
            self._start(self._leave(self._leaving))
        if Action.LOSE in actions:
            self._start(self._lose(Action.PASS in actions))
        elif Action.PASS in actions:
            self._pass_held()
        if Action.OPEN in actions:
            self._start(self._climb())
        self.publish()

    def _post(self, event: rungs.Event) -> None:
        """As `_event`, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing matters any more
            self._loop.call_soon_threadsafe(self._event, event)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _use(self, writer: JournalWriter) -> None:
        """Log into a new incarnation from here on."""
        lane: JournalLane

        def stopped(event: rungs.Event) -> None:
            self._loop.call_soon_threadsafe(self._lane_stopped, lane, event)

        def durable(batches: list[Batch]) -> None:
            self.publish()
            self.disk_lane.put(batches)
            if self._durable_waiters:
                self._loop.call_soon_threadsafe(self._settle_waiters)

        lane = JournalLane(
            writer,
            self.config.name,
            group_commit_s=self.config.group_commit_ms / 1000,
            durable=durable,
            stopped=stopped,
        )
        with self._gate:
            self._writer, self._incarnation = writer, writer.incarnation.id
            self.lsn = writer.next_lsn - 1
            self._captured_lsn = self._durable_lsn = self.lsn
            self.cut_lsn = self.lsn - 1  # what the last incarnation had after its last cut is in no cut yet
            self._journal_lane = lane
            self._logging, self._holding = True, False

    def _lane_stopped(self, lane: JournalLane, event: rungs.Event) -> None:
        if lane is self._journal_lane:
            self._event(event)

    def _settle_waiters(self) -> None:
        """Tell those who wait for a MARK what became of it."""
        left = []
        for lsn, lane, waiter in self._durable_waiters:
            if lane.writer.durable_lsn >= lsn:
                good: bool | None = True
            elif lane is not self._journal_lane or not self._logging:
                good = False
            else:
                good = None
            if good is None:
                left.append((lsn, lane, waiter))
            elif not waiter.done():
                waiter.set_result(good)
        self._durable_waiters = left

    async def _leave(self, number: int) -> None:
        """Leave data mode in order: journal, disk, stable mark. Then, and only then, let a write past it."""
        lane = self._journal_lane
        if lane is not None:
            lane.hurry()
            while lane.undurable or lane.append_since:
                await asyncio.sleep(_POLL_S)
                if (
                    self._leaving != number
                    or self.ladder.mode is not Mode.LEAVING
                    or self._journal_lane is not lane
                ):
                    return
        failpoint("tap.leave.synced")
        logged = [batch.ticket for batch in self.pending.snapshot() if batch.durable]
        if not await self._flushed(max(logged, default=self.disk_lane.applied_ticket)):
            return
        failpoint("tap.leave.flushed")
        self._bitmap_marked = True
        self.epoch += 1
        try:
            await self._aside(self._write_mark)
        except (JournalFailed, OSError) as error:
            event: rungs.Event = rungs.Broken(str(error))
            if self.ladder.wait:
                await asyncio.sleep(rungs.RETRY_MIN_S)
                with contextlib.suppress(OSError):
                    await self._aside(self._renew_mark_file)
        else:
            event = rungs.Left()
        if self._leaving == number and self.ladder.mode is Mode.LEAVING:
            self._event(event)

    async def _flushed(self, ticket: int) -> bool:
        """Wait until the disk itself is durable up to a ticket; False when the tap stops meanwhile."""
        while not self._closed:
            done: asyncio.Future[bool] = self._loop.create_future()

            def tell(good: bool, done: "asyncio.Future[bool]" = done) -> None:
                self._loop.call_soon_threadsafe(_resolve, done, good)

            self.disk_lane.flush(Barrier(ticket, done=tell))
            if await done:
                return True
            await asyncio.sleep(TICK_S)
        return False

    async def _lose(self, then_pass: bool) -> None:
        """Dirty bits will be in memory only: leave word of it wherever a word can still be left."""
        if not self._bitmap_marked:
            self._bitmap_marked = True
            self.epoch += 1
        self.publish()
        witness = Worker(f"{self.config.name}-witness")
        future = witness.submit(self.disk.testify_loss)
        witness.stop()
        try:
            async with asyncio.timeout(1.0):
                told = await asyncio.wrap_future(future)
        except TimeoutError:
            told = False
        self._log.error("journal_lost", told_on_disk=told)
        if then_pass:
            self._pass_held()

    def _pass_held(self) -> None:
        if self._journal_lane is not None:
            self._journal_lane.close()
            self._old_journal_lane, self._journal_lane = self._journal_lane, None
        failpoint("tap.pass.first")
        with self._gate:
            self._holding = False
            self._pass([batch for batch in self.pending.snapshot() if not batch.durable])

    async def _climb(self) -> None:
        """Open a new incarnation above everything that was ever given out."""
        above = max(self.lsn, self.ladder.above_lsn)
        # Not in the side thread: dirty bits are written there meanwhile, and wait no longer than agreed.
        worker = Worker(f"{self.config.name}-climb")
        old, self._writer = self._writer, None
        try:
            recovered = await asyncio.wrap_future(worker.submit(lambda: self._look_again(old)))
            await self._aside(lambda: self._tidy(recovered.corrupt or ""))
            opening = worker.submit(
                lambda: open_writer(
                    self._place,
                    self.config,
                    self.size_bytes,
                    recovered,
                    self._clock,
                    above_lsn=above,
                    above_ordinal=self._above_ordinal,
                )
            )
            writer = await asyncio.wrap_future(opening)
        except JournalFull as error:
            self._event(rungs.OpenFailed(str(error), room_only=True))
            return
        except (OSError, FarshoreError) as error:
            self._log.warning("journal_not_reopened", error=str(error))
            self._event(rungs.OpenFailed(str(error), room_only=False))
            return
        finally:
            worker.stop()
        if self._closed:
            writer.close()
            return
        self._old_journal_lane = None
        self.epoch += 1
        self._use(writer)
        self._event(rungs.Opened())
        self._log.info("volume_back_in_data_mode", first_lsn=writer.next_lsn)
        if self.ladder.lost:
            self._event(rungs.BitsKept())
            self._start(self._withdraw())
        self.disk_lane.flush(Barrier(self._ticket))

    async def _withdraw(self) -> None:
        """The dirty map is whole again; once the mark says so, the word on the disk is out of date."""
        if await self._flushed(self._ticket):
            await self._aside(self._write_mark)
            worker = Worker(f"{self.config.name}-witness")
            await asyncio.wrap_future(worker.submit(self.disk.withdraw_testimony))
            worker.stop()

    def _look_again(self, old: JournalWriter | None) -> Recovered:
        """In a thread of its own: close the old incarnation and see what the journal holds."""
        if old is not None:
            old.close()
        recovered = recover(
            self._place.folder,
            self._place.machine,
            self.id,
            state_page=self._place.state_page,
            boot_id=self._boot_id,
        )
        failpoint("tap.climb.recovered")
        return recovered

    def _tidy(self, corrupt: str) -> None:
        """In the side thread: the dirty map and the mark, before a new incarnation goes by them."""
        self._renew_mark_file()
        self._keep_bits()
        if corrupt:
            self.resync = corrupt
            self._write_mark()

    def _renew_mark_file(self) -> None:
        """In the side thread: a mark file that failed once is not written again by the same object."""
        fresh = MarkFile.open(self._place.folder)
        self._mark_file.close()
        self._mark_file = fresh

    # -- below data mode: other threads ------------------------------------------------------------------

    def _mark_dirty(self, batches: list[Batch]) -> None:
        """In the apply thread: these go to the disk next and no record has them."""
        rows = [
            (offset, length)
            for batch in batches
            for offset, length in zip(batch.offsets.tolist(), batch.lengths.tolist(), strict=True)
        ]
        if not rows:
            return
        if self.ladder.lost:
            self._remember_in_memory(rows)
            return
        future = self.side.submit(lambda: self._set_bits(rows))
        try:
            future.result(None if self.ladder.wait else self.config.journal_stall_max_s)
        except (concurrent.futures.TimeoutError, JournalFailed) as error:
            self._remember_in_memory(rows)
            why = str(error) or f"no answer for {self.config.journal_stall_max_s:g} s"
            self._post(rungs.BitsLost(f"dirty map: {why}"))
        failpoint("tap.dirty.set")

    def _remember_in_memory(self, rows: list[tuple[int, int]]) -> None:
        region = self.dirty.region_bytes
        with self._extra_lock:
            for offset, length in rows:
                self._extra.update(range(offset // region, (offset + length - 1) // region + 1))

    def _set_bits(self, rows: list[tuple[int, int]]) -> None:
        """In the side thread."""
        for offset, length in rows:
            self.dirty.set(offset, length, write=False)
        self.dirty.write_bits()

    def _keep_bits(self) -> None:
        """In the side thread: bring the bits that are only in memory into the file, durably."""
        with self._extra_lock:
            extra = sorted(self._extra)
        region = self.dirty.region_bytes
        try:
            self._set_bits([(at * region, self._region_length(at)) for at in extra])
            self.dirty.sync()
        except JournalFailed:
            # The file is not trusted any more; one made anew gets every bit before it takes its place in use.
            known = [*self.dirty.regions().tolist(), *extra]
            fresh = DirtyMap.create(Path(self._place.folder) / "dirty", self.size_bytes)
            for at in known:
                fresh.set(at * region, self._region_length(at), write=False)
            fresh.sync()
            self.dirty.close()
            self.dirty = fresh
        with self._extra_lock:
            self._extra.difference_update(extra)

    def _region_length(self, index: int) -> int:
        region = self.dirty.region_bytes
        return min(region, self.size_bytes - index * region)

    def _sync_dirty(self) -> None:
        """In the flush thread: bits of writes that a FLUSH covers are durable before it is answered."""
        if not self._bitmap_marked or self.ladder.lost:
            return
        future = self.side.submit(self.dirty.sync)
        try:
            future.result(None if self.ladder.wait else self.config.journal_stall_max_s)
        except (concurrent.futures.TimeoutError, JournalFailed) as error:
            why = str(error) or f"no answer for {self.config.journal_stall_max_s:g} s"
            self._post(rungs.BitsLost(f"dirty map: {why}"))

    # -- called by the disk's threads --------------------------------------------------------------------

    def _on_applied(self) -> None:
        if self._full_relief and self.pending.held_bytes <= PENDING_BYTES_LOW:
            self._full_relief = False
            self._relieved()

    def want_relief(self) -> None:
        """Call ``relieved`` when there is room again. Any thread."""
        self._full_relief = True
        if self.pending.held_bytes <= PENDING_BYTES_LOW:  # it was made before anybody could be told
            self._full_relief = False
            self._relieved()

    def _on_flushed(self) -> None:
        if not self._marking and not self._closed:
            self._marking = True
            self.side.submit(self._mark_stable)

    def _on_disk_changed(self) -> None:
        self._loop.call_soon_threadsafe(self._disk_changed, self.disk_lane.failed)

    def _disk_changed(self, why: str) -> None:
        if why:
            self._log.error("disk_failed", disk=self.config.disk, why=why)
        else:
            self._log.info("disk_works_again", disk=self.config.disk)
        self.publish()

    # -- in the side thread ------------------------------------------------------------------------------

    def _mark_stable(self) -> None:
        self._marking = False
        try:
            self._write_mark()
            self._free()
        except (JournalFailed, OSError) as error:
            self._post(rungs.Broken(str(error)))

    def _write_mark(self, clean: bool = False) -> None:
        """Make the stable mark durable, with what else the file says."""
        lsn, ticket = self.disk_lane.flushed_lsn, self.disk_lane.flushed_ticket
        data = self.ladder.mode is Mode.DATA
        if data and self._bitmap_marked and ticket >= self._passed_ticket and not self.ladder.lost:
            self.dirty.sync()
            self._bitmap_marked = False
        flags = (
            (marks.RESYNC_REQUIRED if self.resync else 0)
            | (marks.BITMAP if self._bitmap_marked else 0)
            | (marks.JOURNAL_LOST if self.ladder.lost else 0)
            | (marks.CLEAN if clean else 0)
        )
        writer = self._writer
        durable_lsn = writer.durable_lsn if writer else self._durable_lsn
        mark = Mark(
            self._incarnation,
            durable_lsn,
            lsn,
            flags,
            self.epoch,
            self.disk.identity(),
            self._boot_id,
        )
        failpoint("tap.mark.before")
        self._mark_file.write(mark)
        self.stable_lsn = max(self.stable_lsn, lsn)

    def _free(self) -> None:
        if self._writer is not None and not self._writer.failed:
            self._writer.free(self.vaulted_lsn, self.stable_lsn)

    # -- what the agent asks -----------------------------------------------------------------------------

    async def _aside(self, call: Callable[[], T]) -> T:
        """Run ``call`` in the side thread."""
        return await asyncio.wrap_future(self.side.submit(call))

    async def vaulted(self, incarnation: bytes, lsn: int) -> None:
        """Everything up to ``lsn`` is in the vault: free what the stable mark allows."""
        del incarnation  # LSNs grow over incarnations, and an older one's last is below ours
        self.vaulted_lsn = max(self.vaulted_lsn, min(lsn, self._captured_lsn))
        await self._aside(self._free_quietly)

    def _free_quietly(self) -> None:
        try:
            self._free()
        except JournalFailed as error:
            self._post(rungs.Broken(str(error)))

    async def dirty_regions(self) -> tuple[int, bytes, int]:
        """Begin a round of copying: its name for `clear_dirty`, the regions as a bitmap, bytes of one."""
        return await self._aside(self._begin_round)

    def _begin_round(self) -> tuple[int, bytes, int]:
        epoch, number = self.epoch, self.dirty.begin_round()
        bits = np.zeros(self.dirty.region_count, np.bool_)
        bits[self.dirty.regions()] = True
        with self._extra_lock:
            bits[sorted(self._extra)] = True
        name = epoch << _ROUND_BITS | number
        return name, np.packbits(bits, bitorder="little").tobytes(), self.dirty.region_bytes

    async def clear_dirty(self, name: int, regions: list[int]) -> int:
        """Unmark regions whose copy is vaulted; returns how many.

        Raises:
            Conflict: The epoch is another, or the volume is below data mode: they may be dirty again.
        """
        epoch, number = name >> _ROUND_BITS, name & (1 << _ROUND_BITS) - 1
        self._check_epoch(epoch)
        # The copy was read from the page cache: what was copied has to be on the disk as well before nobody
        # remembers that it may not be.
        if not await self._flushed(self.disk_lane.applied_ticket):
            raise Conflict("the tap is stopping", where=self.config.name)
        self._check_epoch(epoch)
        cleared = await self._aside(lambda: self._clear(number, regions))
        self.publish()
        return cleared

    def _check_epoch(self, epoch: int) -> None:
        if self.ladder.mode is not Mode.DATA or epoch != self.epoch:
            raise Conflict("the dirty map has changed since", where=self.config.name, fix="copy again")

    def _clear(self, number: int, regions: list[int]) -> int:
        cleared = self.dirty.clear(regions, copy_round=number)
        self.dirty.write_bits()
        return cleared

    async def require_resync(self, why: str, above_lsn: int, above_ordinal: int) -> None:
        """Keep in mind, durably, that a full compare is due, and open an incarnation above the LSN."""
        if not self.resync:
            self.resync = why or "it was asked for"
        self._above_ordinal = max(self._above_ordinal, above_ordinal)
        await self._aside(self._write_mark)
        before = self._incarnation
        self._next_climb = 0.0
        self._event(rungs.Reopen(above_lsn))
        deadline = time.monotonic() + 30
        while self._incarnation == before and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
            if self.ladder.mode is Mode.BITMAP and self._may_climb():
                self._event(rungs.ClimbDue())
        self.publish()

    async def resync_done(self) -> None:
        """The compare is done and vaulted."""
        self.resync = ""
        await self._aside(self._write_mark)
        self.publish()

    async def stop(self, *, timeout_s: float = 60.0) -> bool:
        """Stop in order; what the clients still ask is not answered. Returns whether the stop is clean.

        Everything taken in is applied and durable, the journal sealed, the mark written last of all with the
        disk's identity as it then is.
        """
        with self._gate:
            self._refusing = True
        clean = False
        try:
            async with asyncio.timeout(timeout_s):
                clean = await self._stop()
        except TimeoutError:
            self._log.error("volume_not_stopped_cleanly", why=f"not done within {timeout_s:g} s")
        self._closed = True
        self.publish()
        self.side.stop()
        if clean:
            self._page.close()
            self.disk.close()
        self._log.info("volume_stopped", clean=clean, lsn=self.lsn)
        return clean

    async def _stop(self) -> bool:
        await _until(lambda: self.ladder.mode not in (Mode.LEAVING, Mode.CLIMBING))
        with self._gate:
            lane, self._journal_lane = self._journal_lane, None
            logging, self._logging = self._logging, False
        if lane is not None:
            lane.close()
            ending = lane
            await _until(lambda: ending.ended)
        if self.pending.held_bytes and self.disk_lane.failed:
            return False
        if not await self._flushed(self._ticket):
            return False
        self._closed = True
        self.disk_lane.stop()
        await _until(lambda: self.disk_lane.ended)

        def seal() -> bool:
            writer = self._writer
            try:
                self._keep_bits()
                if writer is not None and logging:
                    writer.seal(clean=True)
                failpoint("tap.stop.sealed")
                if self.ladder.lost:
                    self.disk.withdraw_testimony()
                self._write_mark(clean=True)
            except (JournalFailed, OSError) as error:
                self._log.error("journal_not_sealed", error=str(error))
                return False
            finally:
                if writer is not None:
                    writer.close()
            return True

        return await self._aside(seal)
