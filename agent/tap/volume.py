"""One protected volume in the tap: what happens when the journal gives way, and what the agent asks.

Everything here runs in the thread of the event loop, except where a method says otherwise. It never touches a
file: that is what the lanes and workers are for. What the clients ask goes to `agent.tap.frontend`.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from agent.journal import mark as marks
from agent.journal import state as states
from agent.journal.errors import JournalFailed, JournalFull
from agent.journal.mark import Mark, MarkFile
from agent.journal.recovery import Recovered, recover
from agent.journal.writer import JournalWriter
from agent.tap import ladder as rungs
from agent.tap.batch import Batch, Pending
from agent.tap.dirty_book import DirtyBook
from agent.tap.disk_lane import Barrier, DiskLane
from agent.tap.frontend import Frontend
from agent.tap.journal_lane import JournalLane
from agent.tap.ladder import Action, Ladder, Mode
from agent.tap.lastrun import Place
from agent.tap.opening import Opened, open_writer
from agent.tap.worker import Worker
from agent.volumes import VolumeConfig
from farshore.clock import Clock
from farshore.errors import Conflict, FarshoreError
from farshore.failpoints import failpoint
from farshore.ids import id_from_hex
from farshore.telemetry import get_logger
from farshore.units import MIB

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
        frontend: What its clients talk to, with the LSNs.
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
        self.epoch = opened.epoch
        self.stable_lsn = opened.last_lsn
        self.vaulted_lsn = 0
        self._above_ordinal = 0
        self._place, self._clock = place, clock
        self._loop = asyncio.get_running_loop()
        self._log = get_logger(volume=config.name)
        self._page, self._mark_file = opened.page, opened.mark_file
        self.dirty = DirtyBook(place.folder, opened.dirty, self.size_bytes)
        self._boot_id = opened.boot.id
        self._captured_lsn = self._durable_lsn = opened.last_lsn
        self._incarnation = bytes(16)
        self._bitmap_marked = opened.writer is None
        self._marking = self._closed = False
        self._early_round = 0
        self._stable_at, self._stable_bytes = time.monotonic(), 0
        self._next_climb = 0.0
        self._tasks: set[asyncio.Future[None]] = set()
        self._leaving = 0
        self._durable_waiters: list[tuple[int, JournalLane, asyncio.Future[bool]]] = []
        self.side = Worker(f"{config.name}-side")
        self._writer: JournalWriter | None = opened.writer
        self._old_lane: JournalLane | None = None
        self.ladder = Ladder(wait=config.on_journal_lost == "wait")
        pending = Pending()
        self.disk_lane = DiskLane(
            opened.disk,
            pending,
            config.name,
            applied_lsn=opened.last_lsn,
            before=self.publish,
            applied=lambda: self.frontend.applied(),
            flushed=self._on_flushed,
            passing=self._mark_dirty,
            passed_durable=self._sync_dirty,
            changed=self._on_disk_changed,
        )
        self.frontend = Frontend(gate, opened.disk, self.disk_lane, pending, clock, opened.last_lsn, relieved)
        if opened.writer is not None:
            self._use(opened.writer)
        else:
            retry_s = 0.0 if opened.room_only else rungs.RETRY_MIN_S
            self.ladder = Ladder(Mode.BITMAP, self.ladder.wait, why=opened.why, retry_s=retry_s)
            self._log.error("volume_below_data_mode", why=opened.why)
        self.publish()

    # -- how it is -----------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """``data`` or ``bitmap``, as users are told."""
        return "data" if self.ladder.mode is Mode.DATA else "bitmap"

    @property
    def failed(self) -> bool:
        """The disk refuses writes."""
        return bool(self.disk_lane.failed)

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
        return self.frontend.lsn != self.frontend.cut_lsn

    @property
    def logs(self) -> bool:
        """A record can be appended."""
        return self.frontend.logs

    @property
    def lsn(self) -> int:
        """Highest LSN given."""
        return self.frontend.lsn

    def put_mark(self, payload: bytes) -> "asyncio.Future[bool]":
        """Under the gate: log a MARK; the future tells whether it became durable."""
        lsn, lane = self.frontend.put_mark(payload)
        waiter: asyncio.Future[bool] = self._loop.create_future()
        self._durable_waiters.append((lsn, lane, waiter))
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
        return self.dirty.count

    @property
    def busy(self) -> bool:
        """Writes are under way, so the heartbeat matters."""
        return self.frontend.pending.held_bytes > 0

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
        lane = self.frontend.lane
        begun = [self.side.since, lane.append_since if lane else 0.0, lane.sync_since if lane else 0.0]
        since = min((at for at in begun if at), default=0.0)
        if since and now - since >= self.config.journal_stall_max_s:
            if self.ladder.mode in (Mode.DATA, Mode.LEAVING):
                self._event(rungs.Stalled(f"the journal has not answered for {now - since:.1f} s"))
        elif self.ladder.stalled:
            self._log.warning("journal_answers_again")
            self._event(rungs.Answered())

    def _may_climb(self) -> bool:
        if self._old_lane is not None and not self._old_lane.ended:
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
            self.frontend.hold()
        if Action.ABANDON in actions and (lane := self.frontend.take_lane()) is not None:
            lane.abandon()
            self._old_lane = lane
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
        self._writer, self._incarnation = writer, writer.incarnation.id
        self._captured_lsn = self._durable_lsn = writer.next_lsn - 1
        self.frontend.log(lane)

    def _lane_stopped(self, lane: JournalLane, event: rungs.Event) -> None:
        if lane is self.frontend.lane:
            self._event(event)

    def _settle_waiters(self) -> None:
        """Tell those who wait for a MARK what became of it."""
        left = []
        for lsn, lane, waiter in self._durable_waiters:
            if lane.writer.durable_lsn >= lsn:
                good: bool | None = True
            elif lane is not self.frontend.lane or not self.frontend.logs:
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
        lane = self.frontend.lane
        if lane is not None:
            lane.hurry()
            while lane.undurable or lane.append_since:
                await asyncio.sleep(_POLL_S)
                if (
                    self._leaving != number
                    or self.ladder.mode is not Mode.LEAVING
                    or self.frontend.lane is not lane
                ):
                    return
        failpoint("tap.leave.synced")
        logged = [batch.ticket for batch in self.frontend.pending.snapshot() if batch.durable]
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
        if (lane := self.frontend.take_lane()) is not None:
            lane.close()
            self._old_lane = lane
        failpoint("tap.pass.first")
        self.frontend.pass_by()

    async def _climb(self) -> None:
        """Open a new incarnation right behind everything that was ever captured.

        Numbers given to writes that then went past the journal are no record's, nobody was told of them, and
        they are given again: the server refuses an incarnation that leaves a gap.
        """
        # Not in the side thread: dirty bits are written there meanwhile, and wait no longer than agreed.
        worker = Worker(f"{self.config.name}-climb")
        old, self._writer = self._writer, None
        above = max(self._captured_lsn, old.appended_lsn if old else 0, self.ladder.above_lsn)
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
        self._old_lane = None
        self.epoch += 1
        self._use(writer)
        self._event(rungs.Opened())
        self._log.info("volume_back_in_data_mode", first_lsn=writer.next_lsn)
        if self.ladder.lost:
            self._start(self._withdraw(writer))
        self.disk_lane.flush(Barrier(self.frontend.ticket))

    async def _withdraw(self, writer: JournalWriter) -> None:
        """Take back that the journal was lost, once nothing is in memory only.

        Writes went past the journal until ``writer`` was open, and their regions are marked by the apply
        thread when it comes to them: only when the last one is on the disk are all bits known.
        """
        if not await self._flushed(self.frontend.passed_ticket):
            return
        try:
            await self._aside(self.dirty.keep)
            if self._writer is not writer or self.ladder.mode is not Mode.DATA:
                return  # lost again; whoever climbs next does this anew
            self._event(rungs.BitsKept())
            await self._aside(self._write_mark)
        except (JournalFailed, OSError) as error:
            self._event(rungs.Broken(str(error)))
            return
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
        self.dirty.keep()
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
            self.dirty.note(rows)
            return
        future = self.side.submit(lambda: self.dirty.write(rows))
        try:
            future.result(None if self.ladder.wait else self.config.journal_stall_max_s)
        except (concurrent.futures.TimeoutError, JournalFailed) as error:
            self.dirty.note(rows)
            why = str(error) or f"no answer for {self.config.journal_stall_max_s:g} s"
            self._post(rungs.BitsLost(f"dirty map: {why}"))
        failpoint("tap.dirty.set")

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
        if data and self._bitmap_marked and ticket >= self.frontend.passed_ticket and not self.ladder.lost:
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
        landed = self.disk_lane.applied_ticket >= self.frontend.passed_ticket
        epoch = self.epoch
        number, bitmap = self.dirty.begin_round()
        if not landed:
            # A write that went past the journal is marked, perhaps, but not on the disk: what is copied now
            # may be without it.
            self._early_round = number
        return epoch << _ROUND_BITS | number, bitmap, self.dirty.region_bytes

    async def clear_dirty(self, name: int, regions: list[int]) -> int:
        """Unmark regions whose copy is vaulted; returns how many.

        Raises:
            Conflict: The epoch is another, or the volume is below data mode: they may be dirty again. Or the
                round began before every write that went past the journal was on the disk.
        """
        epoch, number = name >> _ROUND_BITS, name & (1 << _ROUND_BITS) - 1
        self._check_epoch(epoch)
        if number == self._early_round:
            raise Conflict("the copy began too early", where=self.config.name, fix="copy again")
        # The copy was read from the page cache: what was copied has to be on the disk as well before nobody
        # remembers that it may not be.
        if not await self._flushed(self.disk_lane.applied_ticket):
            raise Conflict("the tap is stopping", where=self.config.name)
        self._check_epoch(epoch)
        cleared = await self._aside(lambda: self.dirty.clear(regions, number))
        self.publish()
        return cleared

    def _check_epoch(self, epoch: int) -> None:
        if self.ladder.mode is not Mode.DATA or epoch != self.epoch:
            raise Conflict("the dirty map has changed since", where=self.config.name, fix="copy again")

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
        self.frontend.refuse()
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
        self._log.info("volume_stopped", clean=clean, lsn=self.frontend.lsn)
        return clean

    async def _stop(self) -> bool:
        await _until(lambda: self.ladder.mode not in (Mode.LEAVING, Mode.CLIMBING))
        logged = self.frontend.logs
        lane = self.frontend.end_logging()
        if lane is not None:
            lane.close()
            ending = lane
            await _until(lambda: ending.ended)
        if self.frontend.pending.held_bytes and self.disk_lane.failed:
            return False
        if not await self._flushed(self.frontend.ticket):
            return False
        self._closed = True
        self.disk_lane.stop()
        await _until(lambda: self.disk_lane.ended)

        def seal() -> bool:
            writer = self._writer
            try:
                self.dirty.keep()
                if writer is not None and logged:
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
