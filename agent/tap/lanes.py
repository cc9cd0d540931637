"""The threads of one volume: two for its journal, four for its disk, one for the journal's slow affairs.

A thread that can hang hangs alone: what it was given is still in `Pending`, and whoever supervises it can see
since when it has been waiting.
"""

import errno
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

import numpy as np

from agent.journal.errors import JournalFailed, JournalFull
from agent.journal.writer import JournalWriter
from agent.tap.batch import Answering, Batch, Pending, overlaps, patch
from agent.tap.disk import Disk
from agent.tap.ladder import Broken, Event, Full
from agent.tap.vectored import VectoredWriter
from farshore.failpoints import failpoint
from farshore.hrl.batch import MARK, ZERO
from farshore.nbd import codec
from farshore.units import MIB

GROUP_BYTES: Final = MIB
"""The journal is synced at once when this much waits."""
APPLY_BYTES: Final = 4 * MIB
"""Durable batches that are written to the disk in one go."""
RETRY_S: Final = 1.0
READ_THREADS: Final = 2

T = TypeVar("T")


class Worker:
    """A thread that runs what it is given, one after another.

    Attributes:
        since: Monotonic time at which the running call began; 0 when idle.
    """

    def __init__(self, name: str) -> None:
        self.since = 0.0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

        self._queue.put(run)
        return future

    def stop(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            self.since = time.monotonic()
            call()
            self.since = 0.0


class JournalLane:
    """Appends batches to one incarnation of the journal, answers them, and makes them durable.

    Whoever put a batch appends it: nothing is handed over on the way from a client to its reply. One thread
    appends at a time; what comes meanwhile is left to the lane's own thread.

    Attributes:
        append_since: Monotonic time at which the append under way began; 0 when there is none.
        sync_since: The same of the sync.
    """

    def __init__(
        self,
        writer: JournalWriter,
        name: str,
        *,
        group_commit_s: float,
        durable: Callable[[list[Batch]], None],
        stopped: Callable[[Event], None],
    ) -> None:
        """``durable`` and ``stopped`` are called from this lane's threads, ``stopped`` also from `append`."""
        self.writer = writer
        self.append_since = self.sync_since = 0.0
        self._group_commit_s = group_commit_s
        self._durable, self._stopped = durable, stopped
        self._put: deque[Batch] = deque()
        self._appending = False
        self._turn: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._appended: deque[Batch] = deque()
        self._appended_bytes = 0
        self._armed = self._urgent = False
        self._full = self._abandoned = self._closing = self._append_ended = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._append_loop, name=f"{name}-append", daemon=True),
            threading.Thread(target=self._sync_loop, name=f"{name}-sync", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        """Append this next; `append` or `append_soon` follows. Called in the order of LSNs."""
        self._put.append(batch)

    def append(self, last: Batch) -> None:
        """Append what was put, up to ``last``, unless somebody is doing so; as long as the journal takes."""
        self._append_up_to(last)

    def append_soon(self) -> None:
        """Have the lane's thread append what was put."""
        self._turn.put(None)

    def hurry(self) -> None:
        """Somebody waits for what was put so far to be durable."""
        self._urgent = True
        self._wake.put(True)

    @property
    def undurable(self) -> bool:
        """Batches were put, or appended, that are not durable yet."""
        return bool(self._put or self._appended)

    def abandon(self) -> None:
        """Nothing that the threads still do counts from here on: nothing is answered or becomes durable."""
        with self._lock:
            self._abandoned = True
        self.close()

    def close(self) -> None:
        """Let the threads end when they have done what they were given."""
        with self._lock:
            self._closing = True
        self._turn.put(None)

    @property
    def ended(self) -> bool:
        """No thread uses the writer any more."""
        return not self._appending and not any(thread.is_alive() for thread in self._threads)

    def _given_up(self) -> bool:
        return self._abandoned

    def _append_loop(self) -> None:
        while not self._append_ended:
            self._turn.get()
            self._append_up_to(None)
            with self._lock:
                self._append_ended = self._closing and not self._appending and not self._put
        self._wake.put(True)

    def _append_up_to(self, last: Batch | None) -> None:
        with self._lock:
            if self._appending or not self._put:
                return
            self._appending = True
            batch = self._put.popleft()
        while True:
            self._append(batch)
            with self._lock:
                if batch is last or not self._put:
                    self._appending = False
                    left = self._closing or bool(self._put)
                    break
                batch = self._put.popleft()
        if left:
            self._turn.put(None)

    def _append(self, batch: Batch) -> None:
        if self._full or self._given_up():
            return  # whoever stopped us takes it from Pending
        failpoint("tap.append.before")
        self.append_since = time.monotonic()
        try:
            self.writer.append(batch.time_ns, batch.count, batch.table(), batch.payload.data)
        except JournalFull as error:
            self._full = True
            self._stopped(Full(str(error)))
            return
        except JournalFailed as error:
            self._full = True
            self._stopped(Broken(str(error)))
            return
        finally:
            self.append_since = 0.0
        failpoint("tap.append.after")
        with self._lock:
            if self._abandoned:
                return
            batch.answered = True
            self._appended.append(batch)
            self._appended_bytes += batch.held_bytes
        if batch.client is not None and batch.reply:
            batch.client.send(batch.reply)
        if not self._armed:
            self._armed = True
            self._wake.put(False)
        elif self._appended_bytes >= GROUP_BYTES and not self._urgent:
            self._urgent = True
            self._wake.put(True)

    def _sync_loop(self) -> None:
        while True:
            self._wait()
            ending = self._append_ended
            self._armed = self._urgent = False
            self._appended_bytes = 0
            if self._abandoned or (ending and not self._appended):
                return
            if not self._appended:
                continue
            if ending:
                self._wake.put(True)
            self.sync_since = time.monotonic()
            try:
                durable_lsn = self.writer.sync()
                failpoint("tap.sync.after")
                self._hand_over(durable_lsn)
                self.writer.prepare()
            except JournalFailed as error:
                self._full = True
                self._stopped(Broken(str(error)))
                return
            finally:
                self.sync_since = 0.0

    def _wait(self) -> None:
        """Until something was appended, and then a little longer for company."""
        if self._wake.get():
            return
        deadline = time.monotonic() + self._group_commit_s
        while not self._urgent and (left := deadline - time.monotonic()) > 0:
            try:
                self._wake.get(timeout=left)
            except queue.Empty:
                return

    def _hand_over(self, durable_lsn: int) -> None:
        done: list[Batch] = []
        with self._lock:
            if self._abandoned:
                return
            while self._appended and self._appended[0].last_lsn <= durable_lsn:
                batch = self._appended.popleft()
                batch.durable = True
                done.append(batch)
            if done:  # under the lock: what is taken back after an abandon() must not overtake it
                self._durable(done)


class Barrier:
    """Somebody who waits until everything up to a ticket is on the disk, durably."""

    __slots__ = ("client", "done", "error", "reply", "ticket")

    def __init__(
        self,
        ticket: int,
        client: Answering | None = None,
        reply: bytes = b"",
        error: bytes = b"",
        done: Callable[[bool], None] | None = None,
    ) -> None:
        self.ticket, self.client, self.reply, self.error, self.done = ticket, client, reply, error, done

    def answer(self, good: bool) -> None:
        if self.client is not None:
            self.client.send(self.reply if good else self.error)
        if self.done is not None:
            self.done(good)


class DiskLane:
    """Writes durable and passed batches to the disk in order, flushes it, and reads from it.

    Attributes:
        applied_ticket: Everything up to this ticket is on the disk (page cache).
        applied_lsn: The same by LSN.
        flushed_lsn: Up to here the disk itself is durable.
        flushed_ticket: The same by ticket.
        applied_bytes: Ever written.
        failed: Why the disk refuses; empty while it does not.
    """

    def __init__(
        self,
        disk: Disk,
        pending: Pending,
        name: str,
        *,
        applied_lsn: int,
        before: Callable[[], None],
        applied: Callable[[], None],
        flushed: Callable[[], None],
        passing: Callable[[list[Batch]], None],
        passed_durable: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        """Callbacks come from this lane's threads.

        Args:
            before: Publish the counters; called before, between and after writes.
            applied: Batches were taken off ``pending``.
            flushed: ``flushed_lsn`` grew.
            passing: Mark the regions of these dirty; they go to the disk next.
            passed_durable: Make the dirty bits durable, as far as that is possible.
            changed: ``failed`` is another.
        """
        self.applied_ticket = self.flushed_ticket = 0
        self.applied_lsn = self.flushed_lsn = applied_lsn
        self.applied_bytes = 0
        self.failed = ""
        self._disk, self._pending = disk, pending
        self._before, self._applied, self._flushed = before, applied, flushed
        self._passing, self._passed_durable, self._changed = passing, passed_durable, changed
        self._sync_failed = False
        self._stopping = threading.Event()
        self._queue: queue.SimpleQueue[list[Batch] | None] = queue.SimpleQueue()
        self._barriers: deque[Barrier] = deque()
        self._lock = threading.Lock()
        self._flush_wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writer = VectoredWriter()
        loops = [self._apply_loop, self._flush_loop, *[self._read_loop] * READ_THREADS]
        names = ["apply", "flush", *(f"read{n}" for n in range(READ_THREADS))]
        self._threads = [
            threading.Thread(target=loop, name=f"{name}-{word}", daemon=True)
            for loop, word in zip(loops, names, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, batches: list[Batch]) -> None:
        """Write these next, in order; all durable in the journal, or passed."""
        self._queue.put(batches)

    def flush(self, barrier: Barrier) -> None:
        """Answer ``barrier`` when it is met."""
        with self._lock:
            self._barriers.append(barrier)
        self._flush_wake.put(True)

    def read(self, call: Callable[[], None]) -> None:
        """Run a read of the disk in a thread for that."""
        self._reads.put(call)

    def stop(self) -> None:
        """Let the threads end; what was put before is done first, unless the disk fails."""
        self._stopping.set()
        self._queue.put(None)
        for _ in range(READ_THREADS):
            self._reads.put(None)

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _apply_loop(self) -> None:
        running = True
        while running:
            taken = self._queue.get()
            if taken is None:
                break
            group = list(taken)
            size = sum(batch.held_bytes for batch in group)
            while size < APPLY_BYTES:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    running = False
                    break
                group += more
                size += sum(batch.held_bytes for batch in more)
            self._apply(group)
        self._writer.close()
        self._flush_wake.put(False)

    def _apply(self, group: list[Batch]) -> None:
        passed = [batch for batch in group if batch.passed]
        if passed:
            self._passing(passed)
        failpoint("tap.apply.before")
        try:
            self._write(group)
        except OSError:
            for batch in group:
                if not self._insist(batch):
                    return
        failpoint("tap.apply.after")
        self._pending.take_off(group)
        self.applied_bytes += sum(batch.held_bytes for batch in group)
        self.applied_lsn = max(self.applied_lsn, *(b.last_lsn for b in group if b.first_lsn), 0)
        self.applied_ticket = group[-1].ticket
        for batch in passed:
            if not batch.answered and batch.client is not None and batch.reply:
                batch.answered = True
                batch.client.send(failed_reply(batch.reply, batch.error) if batch.error else batch.reply)
        if self._barriers:
            self._flush_wake.put(True)
        self._applied()

    def _insist(self, batch: Batch) -> bool:
        """Write one batch, as often as it takes; False when the tap stops before it lands."""
        while True:
            try:
                self._write([batch])
            except OSError as error:
                if batch.passed and not batch.answered:
                    # Nobody was promised anything: the writer hears of it, as from any disk.
                    batch.error = error.errno if error.errno in codec.ERRORS else codec.EIO
                    return True
                self._fail(f"write: {error.strerror or error}")
                if self._stopping.wait(RETRY_S):
                    return False
            else:
                if self.failed and not self._sync_failed:
                    self._fail("")
                return True

    def _write(self, group: list[Batch]) -> None:
        run: list[Batch] = []
        for batch in group:
            if batch.kind == ZERO:
                self._write_run(run)
                run = []
                self._before()
                self._disk.zero(int(batch.offsets[0]), int(batch.lengths[0]))
                self._before()
            elif batch.kind != MARK:
                run.append(batch)
        self._write_run(run)

    def _write_run(self, run: list[Batch]) -> None:
        if not run:
            return
        if len(run) == 1:
            offsets, lengths, addresses = run[0].offsets, run[0].lengths, run[0].addresses()
        else:
            offsets = np.concatenate([batch.offsets for batch in run])
            lengths = np.concatenate([batch.lengths for batch in run])
            addresses = np.concatenate([batch.addresses() for batch in run])
        direct_fd = self._disk.direct_fd
        self._writer.write(self._disk.fd, offsets, lengths, addresses, self._before, direct_fd=direct_fd)

    def _fail(self, why: str) -> None:
        if why == self.failed:
            return
        self.failed = why
        self._changed()
        self._flush_wake.put(True)

    def _flush_loop(self) -> None:
        while self._flush_wake.get():
            while (ready := self._take_ready()) is not None:
                self._flush(ready)
        for barrier in self._take_all():
            barrier.answer(False)

    def _take_ready(self) -> list[Barrier] | None:
        if self.failed:
            for barrier in self._take_all():
                barrier.answer(False)
            return None
        with self._lock:
            ready = [barrier for barrier in self._barriers if barrier.ticket <= self.applied_ticket]
            for barrier in ready:
                self._barriers.remove(barrier)
        return ready or None

    def _take_all(self) -> list[Barrier]:
        with self._lock:
            barriers = list(self._barriers)
            self._barriers.clear()
        return barriers

    def _flush(self, ready: list[Barrier]) -> None:
        lsn, ticket = self.applied_lsn, self.applied_ticket
        failpoint("tap.flush.before")
        try:
            self._disk.sync()
        except OSError as error:
            # The pages that could not be written may be marked clean now: a second fdatasync would return 0
            # over a hole. The records are in the journal, above the stable mark; a new start redoes them.
            self._sync_failed = True
            self._fail(f"fdatasync: {error.strerror or error}; restart the tap to write it again")
            for barrier in ready:
                barrier.answer(False)
            return
        self._passed_durable()
        failpoint("tap.flush.after")
        self.flushed_lsn, self.flushed_ticket = lsn, ticket
        for barrier in ready:
            barrier.answer(True)
        self._flushed()

    def _read_loop(self) -> None:
        while (call := self._reads.get()) is not None:
            call()


def failed_reply(reply: bytes, error: int) -> bytes:
    """The replies in ``reply``, each with ``error`` instead of 0."""
    size = codec.SIMPLE_REPLY.size
    cookies = (codec.SIMPLE_REPLY.unpack_from(reply, at)[2] for at in range(0, len(reply), size))
    return b"".join(codec.simple_reply(cookie, error) for cookie in cookies)


def answer_read(
    disk: Disk,
    client: Answering,
    cookie: int,
    offset: int,
    length: int,
    pending: tuple[Batch, ...],
    *,
    structured: bool,
) -> None:
    """Read the disk, lay over it what it does not have yet, and send that. Runs in a read thread."""
    content = np.empty(length, np.uint8).data
    try:
        disk.read_into(content, offset)
    except OSError as error:
        code = error.errno or errno.EIO
        client.send(codec.error_chunk(cookie, code) if structured else codec.simple_reply(cookie, code))
        return
    patch(content, offset, pending)
    head = codec.data_chunk(cookie, offset, length) if structured else codec.simple_reply(cookie)
    client.send(head, content)


def answer_extents(
    disk: Disk,
    client: Answering,
    cookie: int,
    offset: int,
    length: int,
    pending: tuple[Batch, ...],
    context: int,
) -> None:
    """Send the allocation of a range; all data where writes are pending. Runs in a read thread."""
    try:
        extents = disk.extents(offset, length)
    except OSError:
        extents = [codec.Extent(length, 0)]
    if overlaps(offset, length, pending):
        extents = [codec.Extent(length, 0)]
    client.send(codec.block_status_chunk(cookie, context, extents))
