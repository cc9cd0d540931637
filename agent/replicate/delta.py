"""One volume's journal as frames of the stream: INCARNATION-START and DATA, and the cuts found on the way."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from agent.journal.reader import IncarnationStart
from agent.replicate.copyrule import CopyRule
from agent.replicate.ports import Item, Journal
from farshore.hrl.batch import MARK, Batch, Records
from farshore.hrl.cut import Cut, decode_cut
from farshore.units import MIB
from farshore.wire import messages as m

DATA_BYTES_MAX: Final = 4 * MIB
"""Records in one frame; a single batch may be a little longer (its table)."""


@dataclass(slots=True)
class Frame:
    """One frame to send and what it means for the books; ``raw`` is None for INCARNATION-START."""

    message: m.IncarnationStart | m.Data
    raw: bytes | None = None
    started: IncarnationStart | None = None
    batches: list[tuple[int, Records]] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)


class Delta:
    """The stream of one volume in one session.

    Attributes:
        incarnation: What the last frame belonged to; None before the first.
        sent: Last LSN sent of each incarnation in this session, the start included.
    """

    def __init__(self, volume: bytes, journal: Journal, rule: CopyRule) -> None:
        self.volume, self.rule = volume, rule
        self.incarnation: IncarnationStart | None = None
        self.sent: dict[bytes, int] = {}
        self.raw_bytes = self.records = 0
        self._journal = journal

    def at(self, incarnation: bytes, lsn: int) -> None:
        """The server has everything up to here."""
        self.sent[incarnation] = lsn

    def read(self, durable: tuple[bytes, int], resync: bytes) -> list[Frame]:
        """Return the next frames, none when nothing is durable that was not sent. Blocks on the journal.

        Args:
            durable: Incarnation and durable LSN of the state page.
            resync: The incarnation before which continuity is broken; empty for none.

        Raises:
            CorruptRecord, JournalGap: Only a resync helps.
        """
        items = self._journal.read(durable, DATA_BYTES_MAX) or self._journal.announce(durable)
        return list(frames(self.volume, items, resync))

    def was_sent(self, frame: Frame) -> bool:
        """Enter ``frame`` into the books, before anything later is sent.

        Returns:
            False when it must not be sent, see `CopyRule.jump`.
        """
        message = frame.message
        if frame.started is not None:
            self.incarnation = frame.started
            id = frame.started.incarnation.id
            if id not in self.sent:
                self.sent[id] = frame.started.first_lsn - 1
                return self.rule.jump(self.sent[id])
            return True
        assert isinstance(message, m.Data)
        assert self.incarnation is not None
        for first_lsn, records in frame.batches:
            self.rule.sent(first_lsn, records)
            self.records += len(records)
        self.sent[self.incarnation.incarnation.id] = message.last_lsn
        self.raw_bytes += len(frame.raw or b"")
        return True

    @property
    def place(self) -> tuple[bytes, int]:
        """Incarnation and LSN up to which everything was sent."""
        assert self.incarnation is not None
        id = self.incarnation.incarnation.id
        return id, self.sent[id]

    def reached(self, incarnation: bytes, lsn: int) -> bool:
        """Every record up to ``lsn`` of ``incarnation`` was sent."""
        return self.sent.get(incarnation, -1) >= lsn

    def passed(self, incarnation: bytes, lsn: int) -> bool:
        """``lsn`` of ``incarnation`` can not be reached any more: the stream is beyond it."""
        if self.reached(incarnation, lsn) or self.incarnation is None:
            return False
        here = self.incarnation.incarnation.id
        if incarnation in self.sent:
            return here != incarnation
        # LSNs only grow, from one incarnation to the next too.
        return lsn <= self.sent[here]


def frames(volume: bytes, items: Iterable[Item], resync: bytes = b"") -> Iterable[Frame]:
    """Group batches into DATA frames."""
    group: list[Batch] = []
    size = 0
    for item in items:
        if isinstance(item, IncarnationStart):
            if group:
                yield data_frame(volume, group)
                group, size = [], 0
            yield Frame(start_message(volume, item, item.incarnation.id == resync), started=item)
            continue
        if group and size + len(item.raw) > DATA_BYTES_MAX:
            yield data_frame(volume, group)
            group, size = [], 0
        group.append(item)
        size += len(item.raw)
    if group:
        yield data_frame(volume, group)


def data_frame(volume: bytes, batches: list[Batch]) -> Frame:
    """One DATA of whole batches, with the cuts that are in them."""
    message = m.Data(volume, batches[0].first_lsn, batches[-1].last_lsn)
    cuts = [cut for batch in batches for cut in cuts_in(batch)]
    records = [(batch.first_lsn, batch.records) for batch in batches]
    return Frame(message, b"".join([batch.raw for batch in batches]), None, records, cuts)


def cuts_in(batch: Batch) -> list[Cut]:
    """The cuts whose MARK records are in ``batch``. Raises CorruptRecord."""
    marks = np.flatnonzero(batch.records["type"] == MARK)
    if not len(marks):
        return []
    ends = batch.records["payload_length"].cumsum(dtype=np.int64)
    starts = ends - batch.records["payload_length"]
    return [decode_cut(batch.payload[int(starts[at]) : int(ends[at])]) for at in marks.tolist()]


def start_message(volume: bytes, started: IncarnationStart, resync: bool) -> m.IncarnationStart:
    """INCARNATION-START as the stream has it."""
    incarnation = started.incarnation
    return m.IncarnationStart(
        volume,
        incarnation.id,
        incarnation.ordinal,
        incarnation.previous,
        incarnation.previous_last_lsn,
        incarnation.previous_digest,
        started.first_lsn,
        resync,
    )
