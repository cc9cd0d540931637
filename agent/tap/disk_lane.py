"""The way of a volume's writes to its disk, in four threads: one writes, one flushes, two read."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from agent.tap.answers import failed_reply
from agent.tap.batch import Answering, Batch, Pending
from agent.tap.disk import Disk
from agent.tap.vectored import VectoredWriter
from farshore.failpoints import failpoint
from farshore.hrl.batch import MARK, ZERO
from farshore.nbd import codec
from farshore.units import MIB

APPLY_BYTES: Final = 4 * MIB
"""Durable batches that are written to the disk in one go."""
RETRY_S: Final = 1.0
READ_THREADS: Final = 2


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
