"""Writes on their way to the disk, and reads that have to see them. Pure."""

import threading
from collections.abc import Iterable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from agent.tap.vectored import Ints, address_of
from farshore.hrl.batch import MARK, RECORD, RECORD_DTYPE, WRITE, ZERO

Bytes = npt.NDArray[np.uint8]
ROW_BYTES: Final = 64
"""What a row costs in memory beside its payload, rounded up: three numbers, its reply, part of a batch."""
_NO_ROWS: Final = np.zeros(0, np.int64)
_NO_BYTES: Final = np.zeros(0, np.uint8)


class Answering(Protocol):
    """Where replies go. Called from any thread, never waits."""

    def send(self, *buffers: bytes | bytearray | memoryview) -> None: ...


class Batch:
    """Writes that arrived together: the unit of the journal, and of what is kept until the disk has it.

    All rows are WRITE, or there is one ZERO, or it is a MARK.

    Attributes:
        kind: ``WRITE``, ``ZERO`` or ``MARK``.
        time_ns: When they arrived.
        offsets: First byte of each row on the volume.
        lengths: Bytes of each row.
        starts: Where each row's bytes begin in ``payload``.
        payload: Contiguous; not changed by anybody until the disk has it and no read holds it.
        held_bytes: Memory that it pins.
        ticket: Order among all batches of the volume, logged or not.
        first_lsn: LSN of the first row; 0 when it was not given any.
        reply: What the client gets when it is captured; empty when somebody else answers (FUA).
        durable: The journal has it for good, or it went past the journal.
        answered: ``reply`` was sent.
        passed: It was sent past the journal, so the dirty map stands for it.
        error: NBD error that a client waiting for it gets instead; 0 for none.
    """

    __slots__ = (
        "answered",
        "client",
        "durable",
        "error",
        "first_lsn",
        "held_bytes",
        "kind",
        "lengths",
        "offsets",
        "passed",
        "payload",
        "reply",
        "starts",
        "ticket",
        "time_ns",
    )

    def __init__(
        self,
        kind: int,
        time_ns: int,
        offsets: Ints,
        lengths: Ints,
        starts: Ints,
        payload: Bytes,
        client: Answering | None,
        reply: bytes,
    ) -> None:
        self.kind, self.time_ns = kind, time_ns
        self.offsets, self.lengths, self.starts, self.payload = offsets, lengths, starts, payload
        self.client, self.reply = client, reply
        self.held_bytes = len(payload) + ROW_BYTES * max(1, len(offsets))
        self.ticket = self.first_lsn = self.error = 0
        self.durable = self.answered = self.passed = False

    @property
    def count(self) -> int:
        """Records; a MARK is one although it has no rows."""
        return 1 if self.kind == MARK else len(self.offsets)

    @property
    def last_lsn(self) -> int:
        return self.first_lsn + self.count - 1

    def table(self) -> bytes:
        """The record table as the journal has it."""
        if self.kind == MARK:
            return RECORD.pack(0, 0, MARK, 0, 0, len(self.payload))
        rows = np.zeros(len(self.offsets), RECORD_DTYPE)
        rows["offset"], rows["length"], rows["type"] = self.offsets, self.lengths, self.kind
        if self.kind == WRITE:
            rows["payload_length"] = self.lengths
        return rows.tobytes()

    def addresses(self) -> Ints:
        """Where each row's bytes lie in memory, while ``payload`` lives."""
        return self.starts + address_of(self.payload)


def write_batch(
    time_ns: int, offsets: Ints, lengths: Ints, payload: Bytes, client: Answering | None, reply: bytes
) -> Batch:
    """Writes whose bytes follow each other in ``payload``."""
    starts = np.cumsum(lengths) - lengths
    return Batch(WRITE, time_ns, offsets, lengths, starts, payload, client, reply)


def zero_batch(time_ns: int, offset: int, length: int, client: Answering | None, reply: bytes) -> Batch:
    """One range that becomes zeros."""
    one = np.array([offset], np.int64)
    return Batch(ZERO, time_ns, one, np.array([length], np.int64), _NO_ROWS, _NO_BYTES, client, reply)


def mark_batch(time_ns: int, payload: bytes) -> Batch:
    """A cut."""
    return Batch(
        MARK, time_ns, _NO_ROWS, _NO_ROWS, _NO_ROWS, np.frombuffer(payload, np.uint8), client=None, reply=b""
    )


def patch(content: memoryview, offset: int, pending: Iterable[Batch]) -> None:
    """Lay what ``pending`` writes over ``content``, the disk's bytes from ``offset`` on, in order."""
    end = offset + len(content)
    target = np.frombuffer(content, np.uint8)
    for batch in pending:
        ends = batch.offsets + batch.lengths
        for row in np.flatnonzero((batch.offsets < end) & (ends > offset)).tolist():
            row_offset = int(batch.offsets[row])
            first, last = max(row_offset, offset), min(int(ends[row]), end)
            if batch.kind == ZERO:
                target[first - offset : last - offset] = 0
            else:
                start = int(batch.starts[row]) - row_offset
                target[first - offset : last - offset] = batch.payload[start + first : start + last]


def overlaps(offset: int, length: int, pending: Iterable[Batch]) -> bool:
    """Tell whether any of ``pending`` touches the range."""
    end = offset + length
    return any(((batch.offsets < end) & (batch.offsets + batch.lengths > offset)).any() for batch in pending)


class Pending:
    """The batches that the disk does not have yet, in order. Added by one thread, taken off by another."""

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._snapshot: tuple[Batch, ...] | None = ()
        self._lock = threading.Lock()
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Memory pinned by all of them."""
        return self._bytes

    def add(self, batch: Batch) -> None:
        with self._lock:
            self._batches.append(batch)
            self._bytes += batch.held_bytes
            self._snapshot = None

    def take_off(self, batches: list[Batch]) -> None:
        """Forget the oldest ones, which are ``batches``: the disk has them."""
        with self._lock:
            count = len(batches)
            assert self._batches[:count] == batches
            del self._batches[:count]
            self._bytes -= sum(batch.held_bytes for batch in batches)
            self._snapshot = None

    def snapshot(self) -> tuple[Batch, ...]:
        """All of them, oldest first, as they are now."""
        with self._lock:
            if self._snapshot is None:
                self._snapshot = tuple(self._batches)
            return self._snapshot
