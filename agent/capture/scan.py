"""The engine ``scan``: a disk that nobody watches is compared with the vault as a whole, pass after pass.

It needs nothing of the disk but to be read: mounted, read-only and in use are all the same to it. What a pass
reads is the copy rule's matter (`agent.replicate.copyrule`) and goes through the same jobs and copiers as a
resync; there are no records. A pass has a number, which is the volume's LSN from its beginning on, and an
incarnation of its own, begun with ``resync``: whatever happened since the pass before has no record.

What a cut says of such a volume (docs/decisions/0040-scan-capture.md): fuzzy, unless the user promised that
nobody writes during a pass (``quiesced``), the pass is complete, and the disk's identity did not change from
before its first read to after the cut.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from agent.journal.continuity import CTIME_SLACK_NS, IMAGE, DiskIdentity, read_boot, read_disk
from agent.journal.reader import IncarnationStart
from agent.journal.state import SCAN, State, StatePageWriter
from agent.replicate.job import Job
from agent.replicate.ports import Item, VolumeSpec
from agent.replicate.replica import Replica
from farshore.clock import Clock
from farshore.errors import Failed, Unreachable
from farshore.hrl.cut import CutVolume
from farshore.hrl.segment import NO_INCARNATION, Incarnation
from farshore.ids import new_id
from farshore.telemetry import get_logger
from farshore.wire import messages as m

CAPTURE_MODE: Final = "scan"
LOOK_S: Final = 2.0
"""What is not known of a disk after this time is taken for changed."""

log = get_logger()


@dataclass(slots=True)
class Pass:
    """One compare of the whole disk with the vault.

    Attributes:
        number: The volume's LSN from its beginning on; grows from pass to pass, over restarts too.
        incarnation: Its own; the stream has no record of it.
        disk: Identity of the disk before the first read.
        began_s: Monotonic clock.
        job: The copying, once the server knows of the pass.
        changed: The disk's identity changed while it was read; None until that was looked at.
        ended: It is vaulted as a whole, or was given up.
        whole: It is vaulted as a whole.
    """

    number: int
    incarnation: Incarnation
    disk: DiskIdentity
    began_s: float
    job: Job | None = None
    changed: bool | None = None
    ended: bool = False
    whole: bool = False

    @property
    def read(self) -> bool:
        """All of the disk was read, and the server has what differed."""
        return self.whole or (not self.ended and self.job is not None and self.job.finished)


@dataclass(eq=False, slots=True)
class Ticket:
    """Somebody waits for a pass that begins from now on: one with at least the number ``target``.

    Once there is one, no further pass begins until the ticket is given back: a cut is to be taken behind it.
    """

    target: int
    failures: int


class ScanJournal:
    """`agent.replicate.ports.Journal` of a volume without records: nothing but the start of the pass."""

    def __init__(self) -> None:
        self.started: IncarnationStart | None = None

    def position(self, incarnation_id: bytes, lsn: int, digest: bytes) -> bool:
        return False

    def start_at_oldest(self) -> None:
        """There is nothing to go back to."""

    def start_at_newest(self) -> None:
        """There is nothing to go past."""

    def read(self, durable: tuple[bytes, int], bytes_max: int) -> list[Item]:
        return []

    def announce(self, durable: tuple[bytes, int]) -> list[Item]:
        started = self.started
        here = started is not None and started.incarnation.id == durable[0]
        return [started] if started is not None and here else []


class ScanReplica(Replica):
    """A volume that is scanned. Its counters are published like a tap's, for the copiers.

    Args:
        every_s: From the beginning of one pass to that of the next, unless a pass takes longer.
        quiesced: The user's promise that nobody writes during a pass.

    Attributes:
        last_pass: The newest pass of this process; None before the first, and when the vault has another.
        every_s, quiesced: As given.
    """

    def __init__(self, spec: VolumeSpec, every_s: float, quiesced: bool, clock: Clock) -> None:
        self._scan_journal = ScanJournal()
        super().__init__(spec, self._scan_journal)
        self.every_s, self.quiesced = every_s, quiesced
        self.last_pass: Pass | None = None
        self._clock = clock
        self._writer: StatePageWriter | None = None
        self._number: int | None = None  # of the newest pass that anybody knows of; None: nobody was asked
        self._told: int | None = None  # what the server last heard of the next one, in this session
        self._ordinal = 0
        self._due_s = clock.monotonic()
        self._cycle_s = every_s
        self._wanted = False
        self._failures = 0
        self._whole_number = 0
        self._whole_began_s: float | None = None
        self._fuzzy = True  # at the last cut
        self._tickets: set[Ticket] = set()
        self._moved = asyncio.Event()
        self._turn = asyncio.Lock()
        self._looking: threading.Thread | None = None

    # --- what others ask of a replica ---

    @property
    def scanned(self) -> bool:
        return True

    @property
    def running(self) -> Pass | None:
        """The pass that is under way."""
        last = self.last_pass
        return last if last is not None and not last.ended else None

    def state(self) -> State:
        """As published. Raises Unreachable before the first pass of this process."""
        if self.last_pass is None:
            raise Unreachable("the disk was not scanned yet", where=self.spec.name)
        return super().state()

    def name_state(self) -> str:
        """One of the volume states. While a pass of the timetable runs, the volume stays ``protected``."""
        if self.problem:
            return "failed"
        if self.paused:
            return "paused"
        if self.resync:
            return "resync"
        return "protected" if self.copied else "initial-replication"

    def capture_mode(self) -> str:
        """``scan``: between two passes nobody knows what is written."""
        return CAPTURE_MODE

    def backlog_bytes(self) -> int:
        """There is no journal."""
        return 0

    def fuzzy_anyway(self) -> bool:
        last = self.last_pass
        if not self.quiesced or last is None or not last.read:
            return True
        return last.changed is not None and self._fuzzy

    def scan_age_s(self) -> float | None:
        """What a disk scanned in use has in place of an age that `status` could show."""
        return None if self._whole_began_s is None else self._clock.monotonic() - self._whole_began_s

    def volume_status(self) -> m.VolumeStatus:
        """What PONG says: the pass that is under way or was last, and the one that is still to begin."""
        last = self.last_pass
        number = last.number if last is not None else self._number or 0
        self._told = self._number + 1 if self._number is not None else 0
        return m.VolumeStatus(
            self.spec.id,
            last.incarnation.id if last is not None else NO_INCARNATION,
            number,
            number,
            self.backlog_bytes(),
            self.capture_mode(),
            self.name_state(),
            next_pass=self._told,
            cycle_s=self._cycle_s,
        )

    def close(self) -> None:
        """Let go of the page, and take it away."""
        super().close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self.spec.state_page.unlink(missing_ok=True)

    # --- when a pass begins ---

    def want(self, *, asked: bool = False) -> Ticket:
        """Have a pass begin as soon as can be; give the ticket back with `release`.

        Args:
            asked: A user wants all of it compared: the volume shows ``resync`` until that is done.
        """
        self._wanted = True
        self.resync = self.resync or asked
        ticket = Ticket((self._number or 0) + 1, self._failures)
        self._tickets.add(ticket)
        return ticket

    def compare_again(self) -> None:
        """A user wants all of it compared now; not waited for."""
        self.release(self.want(asked=True))

    def release(self, ticket: Ticket) -> None:
        """Nobody needs the state of that pass any more."""
        self._tickets.discard(ticket)

    async def passed(self, ticket: Ticket) -> None:
        """Wait until the pass of ``ticket`` is vaulted. Cancelling is safe.

        Raises:
            Failed: The disk cannot be read.
        """
        while self._whole_number < ticket.target:
            if self._failures > ticket.failures:
                raise Failed("the disk could not be scanned", where=self.spec.name, why=self.problem)
            await self._moved.wait()

    def due(self) -> bool:
        """Tell whether the next pass begins now.

        Not before a PING was answered since the last one began: from that moment of its own clock the server
        counts the age of what this pass will bring.
        """
        if self.running is not None or self._number is None or self._told != self._number + 1:
            return False
        if any(ticket.target <= self._whole_number for ticket in self._tickets):
            return False
        return self._wanted or self._clock.monotonic() >= self._due_s

    # --- what becomes of it ---

    def open(self, position: m.VolumePosition) -> None:
        """A session begins, and this is where the vault stands: go on with the pass under way, or anew."""
        last = self.last_pass
        here = (position.incarnation, position.lsn)
        if last is not None:
            before = (last.incarnation.previous, last.incarnation.previous_last_lsn)
            if here == (last.incarnation.id, last.number):
                if position.copied and not last.ended:
                    self.vaulted(last)
            elif here == before and not last.ended:
                self.safe.clear()  # the vault has not heard of this pass, so it has nothing of it
            elif here == before and not last.whole:
                self.last_pass = None  # given up, and nobody heard of it
            else:
                self.forget()
        if (running := self.running) is not None:
            # What is not safe is read again, so what was found out about the reads does not count any more.
            running.job = None
            running.changed = running.changed or None
        self._told = None
        self._number = max(self._number or 0, position.lsn)
        self._ordinal = max(self._ordinal, position.ordinal)

    def forget(self) -> None:
        """What this process knows of passes is worth nothing: the next one begins at once."""
        self.last_pass = None
        self.safe.clear()
        self._due_s = self._clock.monotonic()

    def look(self) -> DiskIdentity:
        """Take the disk's identity. Blocks, for as long as the disk does. Raises OSError."""
        return read_disk(self.spec.disk)

    async def looked(self) -> DiskIdentity:
        """As `look`, but no longer than ``LOOK_S``: a disk that hangs holds up no other volume.

        Raises:
            OSError: As `look`; TimeoutError: it hangs, or an earlier look still does.
        """
        async with asyncio.timeout(LOOK_S), self._turn:
            if self._looking is not None:
                raise TimeoutError("it does not answer")
            loop = asyncio.get_running_loop()
            found: asyncio.Future[DiskIdentity] = loop.create_future()
            # A daemon: one that hangs does not keep the agent from ending.
            self._looking = threading.Thread(target=self._look_for, args=(loop, found), daemon=True)
            self._looking.start()
            return await found

    def _look_for(self, loop: asyncio.AbstractEventLoop, found: asyncio.Future[DiskIdentity]) -> None:
        outcome: DiskIdentity | OSError
        try:
            outcome = self.look()
        except OSError as error:
            outcome = error

        def tell() -> None:
            self._looking = None
            if found.done():
                return
            if isinstance(outcome, OSError):
                found.set_exception(outcome)
            else:
                found.set_result(outcome)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell)

    def begin(self, disk: DiskIdentity, position: m.VolumePosition) -> Pass:
        """Begin a pass over ``disk``, looked at just now.

        Args:
            position: Where the vault stands.

        Raises:
            OSError: The counters cannot be published.
            CapacityError, Failed: The size cannot be remembered.
        """
        assert self._number is not None
        now_s = self._clock.monotonic()
        last = self.last_pass
        if last is not None and last.number == self._number:
            previous, previous_lsn = last.incarnation.id, last.number
        else:
            previous, previous_lsn = position.incarnation, position.lsn
        digest = position.digest if previous == position.incarnation else bytes(32)
        incarnation = Incarnation(new_id(), self._ordinal + 1, previous, previous_lsn, digest)
        begun = Pass(self._number + 1, incarnation, disk, now_s)
        if self._writer is None:
            boot = read_boot(self._clock)
            self._writer = StatePageWriter.create(
                self.spec.state_page, incarnation=incarnation.id, boot_id=boot.id
            )
        self.remember_size()
        self._number, self._ordinal = begun.number, incarnation.ordinal
        self._due_s = now_s + self.every_s
        self._wanted, self._fuzzy = False, True
        self.safe.clear()
        self._scan_journal.started = IncarnationStart(incarnation, begun.number + 1)
        self._writer.update(
            incarnation=incarnation.id,
            captured_lsn=begun.number,
            durable_lsn=begun.number,
            applied_lsn=begun.number,
            capture_mode=SCAN,
        )
        self.last_pass = begun
        if self.quiesced and self.just_written(disk):
            self._was_written(begun)
        return begun

    def _was_written(self, found: Pass) -> None:
        found.changed = True
        log.warning(
            "scanned_disk_changed",
            volume=self.spec.name,
            disk=str(self.spec.disk),
            lsn=found.number,
            error="it was written to during the pass, in spite of --quiesced: the point is fuzzy",
        )

    def just_written(self, disk: DiskIdentity) -> bool:
        """An image written so short a time ago that the next write may get the very same ctime."""
        age_ns = self._clock.wall_ns() - disk.ctime_ns
        return disk.kind == IMAGE and 0 <= age_ns < CTIME_SLACK_NS

    def vaulted(self, done: Pass) -> None:
        """All of the pass is in the vault."""
        if done.ended:
            return
        done.ended = done.whole = True
        self._cycle_s = max(self.every_s, self._clock.monotonic() - done.began_s)
        self._whole_number, self._whole_began_s = done.number, done.began_s
        self.problem = ""
        self.copied = True
        # Asked for again while it ran: that is for the next one.
        self.resync = self.resync and self._wanted
        self._notify()

    def fail(self, why: str) -> None:
        """The disk cannot be scanned now; the next pass tries again. What was read of it stays as it is."""
        running = self.running
        if running is not None:
            running.ended = True
        if self.problem != why:
            log.error("scan_failed", volume=self.spec.name, error=why)
        self.problem = why
        self.resync = self._wanted = False
        self._failures += 1
        self._due_s = self._clock.monotonic() + self.every_s
        self._notify()

    def _notify(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    # --- the cut ---

    def cut(self, found: DiskIdentity | None, *, alone: bool) -> CutVolume | None:
        """Say where a cut passes through this volume; None when it is nowhere yet.

        Args:
            found: The disk's identity, taken after the cut of the other volumes; None: it cannot be had.
            alone: The machine has no other volume, so that it does not matter when exactly the disk was so.
        """
        last = self.last_pass
        if last is None:
            return None
        if last.read:
            same = found == last.disk
            if last.changed is None:
                last.changed = not same
                if not same and self.quiesced:
                    self._was_written(last)
            # Written to after the pass: what the vault has was there, but not at the moment of this cut.
            self._fuzzy = not self.quiesced or last.changed or not (same or alone)
        else:
            self._fuzzy = True
        return CutVolume(self.spec.id, last.incarnation.id, last.number, self._fuzzy)


@asynccontextmanager
async def fresh(replicas: Iterable[Replica]) -> AsyncIterator[None]:
    """Wait for a pass over every scanned volume that begins from now on; hold the next ones back meanwhile.

    A paused volume is not waited for: its points are fuzzy.

    Raises:
        Failed: A disk cannot be read.
    """
    scans = [replica for replica in replicas if isinstance(replica, ScanReplica) and not replica.paused]
    tickets = [(scan, scan.want()) for scan in scans]
    try:
        for scan, ticket in tickets:
            await scan.passed(ticket)
        yield
    finally:
        for scan, ticket in tickets:
            scan.release(ticket)


def explain(error: OSError) -> str:
    """One clause on why a disk cannot be scanned."""
    return f"the disk cannot be read: {error.strerror or str(error) or 'it does not answer'}"
