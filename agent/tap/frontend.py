"""What the NBD clients of a volume can ask, and the way each write takes from there.

LSNs, and the way (into the journal, held back, past the journal), are given under one lock for all volumes of
the machine, the gate: a cut holds it while it looks at the counters. Nobody touches a file under it.
"""

import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from agent.tap.answers import answer_extents, answer_read, failed_reply
from agent.tap.batch import Answering, Batch, Bytes, Pending, mark_batch, write_batch, zero_batch
from agent.tap.disk import Disk
from agent.tap.disk_lane import Barrier, DiskLane
from agent.tap.journal_lane import JournalLane
from agent.tap.vectored import Ints
from farshore.clock import Clock
from farshore.hrl.batch import BATCH_PAYLOAD_BYTES_MAX
from farshore.nbd import codec
from farshore.units import MIB

PENDING_BYTES_MAX: Final = 64 * MIB
"""Writes that the disk does not have yet; reading from the clients stops above it."""
PENDING_BYTES_LOW: Final = 48 * MIB


class Frontend:
    """One volume as its clients see it. Any thread, except where a method says otherwise.

    Attributes:
        pending: The writes that the disk does not have yet.
        lsn: Highest LSN given.
        cut_lsn: LSN at the last cut.
        ticket: Place of the newest batch in the order of all.
        passed_ticket: The same of the newest that went past the journal.
        lane: Where writes are logged, and until they are passed, were; None without a journal.
        logs: Writes are logged.
    """

    def __init__(
        self,
        gate: threading.Lock,
        disk: Disk,
        disk_lane: DiskLane,
        pending: Pending,
        clock: Clock,
        last_lsn: int,
        relieved: Callable[[], None],
    ) -> None:
        """``gate`` is the machine's. ``relieved`` is called, in any thread, when there is room for writes."""
        self.pending = pending
        self.lsn = self.cut_lsn = last_lsn
        self.ticket = self.passed_ticket = 0
        self.lane: JournalLane | None = None
        self.logs = False
        self._gate, self._disk, self._disk_lane = gate, disk, disk_lane
        self._clock, self._relieved = clock, relieved
        self._holding = self._refusing = self._relief_wanted = False

    # -- what the clients ask ------------------------------------------------------------------------------

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
        """Take writes in; ``payload`` is ours from here on. ``reply`` is sent when they are captured.

        Returns only when the journal has them, unless another thread is appending.
        """
        if self._disk_lane.failed:
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
        """Make a range zeros; as `write`."""
        if self._disk_lane.failed:
            client.send(failed_reply(reply, codec.EIO))
            return
        batch = zero_batch(self._clock.wall_ns(), offset, length, client, b"" if fua else reply)
        self._submit([batch], client, reply if fua else b"")

    def trim(self, offset: int, length: int, client: Answering, reply: bytes, *, fua: bool = False) -> None:
        """Make a range zeros where that gives space back; elsewhere nothing is done, and nothing logged."""
        if self._disk.punches:
            self.zero(offset, length, client, reply, fua=fua)
        else:
            client.send(reply)

    def flush(self, client: Answering, reply: bytes) -> None:
        """Send ``reply`` when everything taken in so far is durable, in the journal and on the disk."""
        self._submit([], client, reply)

    def read(self, client: Answering, cookie: int, offset: int, length: int, *, structured: bool) -> None:
        """Send what the range holds, pending writes included."""
        pending, disk = self.pending.snapshot(), self._disk
        self._disk_lane.read(
            lambda: answer_read(disk, client, cookie, offset, length, pending, structured=structured)
        )

    def extents(self, client: Answering, cookie: int, offset: int, length: int, context: int) -> None:
        """Send the allocation of the range."""
        pending, disk = self.pending.snapshot(), self._disk
        self._disk_lane.read(lambda: answer_extents(disk, client, cookie, offset, length, pending, context))

    @property
    def size_bytes(self) -> int:
        return self._disk.size_bytes

    @property
    def full(self) -> bool:
        """No more writes can be taken in before some are on the disk."""
        return self.pending.held_bytes >= PENDING_BYTES_MAX

    def want_relief(self) -> None:
        """Call ``relieved`` when there is room again."""
        self._relief_wanted = True
        self.applied()  # room may have been made before anybody could be told

    def applied(self) -> None:
        """The disk has some of ``pending``."""
        if self._relief_wanted and self.pending.held_bytes <= PENDING_BYTES_LOW:
            self._relief_wanted = False
            self._relieved()

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
            lane = self.lane if self.logs else None
            for batch in batches:
                self._take_in(batch)
            ticket = self.ticket
        if flush_reply:
            error = failed_reply(flush_reply, codec.EIO)
            if self._disk_lane.failed:
                client.send(error)
            else:
                self._disk_lane.flush(Barrier(ticket, client, flush_reply, error))
        if lane is not None:
            if batches:
                lane.append(batches[-1])
            if flush_reply:
                lane.hurry()

    def _take_in(self, batch: Batch) -> None:
        """Under the gate: give a batch its place in the order of all, and its LSNs."""
        self.ticket += 1
        batch.ticket = self.ticket
        self.pending.add(batch)
        if self.logs:
            assert self.lane is not None
            batch.first_lsn = self.lsn + 1
            self.lsn += batch.count
            self.lane.put(batch)
        elif not self._holding:
            self._pass([batch])

    def _pass(self, batches: list[Batch]) -> None:
        """Under the gate: past the journal."""
        for batch in batches:
            batch.passed = batch.durable = True
            batch.first_lsn = 0
        if batches:
            self.passed_ticket = batches[-1].ticket
            self._disk_lane.put(batches)

    # -- which way the writes take: the loop's thread ------------------------------------------------------

    def put_mark(self, payload: bytes) -> tuple[int, JournalLane]:
        """Under the gate, held by the caller: log a MARK, soon; returns its LSN and where it is logged."""
        assert self.lane is not None
        self._take_in(mark_batch(self._clock.wall_ns(), payload))
        self.cut_lsn = self.lsn
        self.lane.append_soon()
        self.lane.hurry()
        return self.lsn, self.lane

    def log(self, lane: JournalLane) -> None:
        """Log what follows, in a new incarnation."""
        with self._gate:
            self.lane = lane
            self.lsn = lane.writer.next_lsn - 1
            self.cut_lsn = self.lsn - 1  # what the last incarnation had after its last cut is in no cut yet
            self.logs, self._holding = True, False

    def hold(self) -> None:
        """Keep what follows until it is passed."""
        with self._gate:
            self.logs, self._holding = False, True

    def pass_by(self) -> None:
        """Let what is held, and all that follows, past the journal."""
        with self._gate:
            self._holding = False
            self._pass([batch for batch in self.pending.snapshot() if not batch.durable])

    def refuse(self) -> None:
        """Neither take in nor answer anything any more."""
        with self._gate:
            self._refusing = True

    def end_logging(self) -> JournalLane | None:
        """Log nothing any more; returns where it was, None if nothing was logged lately. After `refuse`."""
        with self._gate:
            lane, self.lane = self.lane, None
            self.logs = False
        return lane

    def take_lane(self) -> JournalLane | None:
        """Return the lane that is not logged to any more, and forget it."""
        lane, self.lane = self.lane, None
        return lane
