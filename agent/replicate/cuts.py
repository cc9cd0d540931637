"""Which cut is next in the stream, and what its MARK says of each volume. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.replicate.copyrule import COPIES_MAX, CUT_OUTS_MAX, CopyRule
from agent.replicate.delta import Delta
from agent.replicate.job import Job
from farshore.hrl.cut import Cut, CutVolume
from farshore.units import MIB
from farshore.wire import messages as m

OWN_RECORDS: Final = 250_000
OWN_BYTES: Final = 256 * MIB
"""Records, and bytes of them, that go into one commit at most when a backlog holds no cuts: the server keeps
48 bytes per record until the commit, and bounds them."""
PENDING_MAX: Final = 4096
"""Cuts known and not sent: marks found in a backlog. Older ones are dropped, a later one covers them."""


@dataclass(slots=True)
class Stream:
    """One volume in one session.

    Attributes:
        resync: The vault is behind by more than the journal knows; points are fuzzy until all is compared.
        copied: A MARK said, or the server did, that every extent is in the vault.
        copied_seq: The cut_seq of the first MARK that said so of the newest copying; 0 when the server did.
        paused: Nothing is sent; points without this volume's newest state are fuzzy.
        opened: Its place in the journal was found.
        resync_at: Incarnation of the journal when it was.
        job: The copying under way.
        mark: Incarnation and LSN that the last MARK named, or where the vault stood.
        tokens: COPYs by the cut_seq of the MARK that named them, until that is vaulted.
    """

    id: bytes
    delta: Delta
    rule: CopyRule
    resync: bool
    copied: bool
    copied_seq: int = 0
    paused: bool = False
    opened: bool = False
    job: Job | None = None
    mark: tuple[bytes, int] = (bytes(16), 0)
    resync_at: bytes = b""
    tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def sending(self) -> bool:
        return self.opened and not self.paused


class PendingCuts:
    """Cuts that were taken and not yet sent as MARK, by seq. The same cut may be told more than once."""

    def __init__(self) -> None:
        self._cuts: dict[int, Cut] = {}
        self.last_seq = 0
        self._wire_seq = 0

    def add(self, cut: Cut) -> None:
        """A cut was taken now, or found in a journal."""
        known = self._cuts.get(cut.seq)
        if known is not None and len(known.volumes) > len(cut.volumes):
            return  # the journals know of fewer volumes than whoever took it
        if cut.seq > self.last_seq:
            self._cuts[cut.seq] = cut
            if len(self._cuts) > PENDING_MAX:
                untagged = [seq for seq, kept in sorted(self._cuts.items()) if kept.tag is None]
                del self._cuts[untagged[0] if untagged else min(self._cuts)]

    def first(self) -> Cut | None:
        """The oldest."""
        return self._cuts[min(self._cuts)] if self._cuts else None

    def remove(self, cut: Cut) -> None:
        """It was sent or given up."""
        self.last_seq = max(self.last_seq, cut.seq)
        self._cuts.pop(cut.seq, None)

    def wire_seq(self, cut: Cut) -> int:
        """Return the cut_seq of a cut's MARK: its seq, but above that of the MARK before.

        The tap's numbers are nanoseconds, so cuts of our own (seq 0) in between find room; should a clock
        have gone back they push the next ones on.
        """
        self._wire_seq = max(cut.seq, self._wire_seq + 1, self.last_seq)
        return self._wire_seq

    def __len__(self) -> int:
        return len(self._cuts)


def served(cut: Cut) -> Cut:
    """Leave out volumes that had no journal at the cut: they stay where their last MARK was."""
    return Cut(cut.seq, cut.time_ns, cut.tag, tuple(v for v in cut.volumes if any(v.incarnation)))


def ready(cut: Cut, streams: Mapping[bytes, Stream]) -> bool:
    """Every record up to ``cut`` of every volume that sends was sent."""
    return all(
        stream.delta.reached(entry.incarnation, entry.lsn)
        for entry in cut.volumes
        if (stream := streams.get(entry.volume)) is not None and stream.sending
    )


def lost(cut: Cut, streams: Mapping[bytes, Stream]) -> bool:
    """Some volume's stream is beyond ``cut``, so it can not be a point any more; a later cut covers it."""
    return any(
        stream.delta.passed(entry.incarnation, entry.lsn) or entry.lsn < stream.mark[1]
        for entry in cut.volumes
        if (stream := streams.get(entry.volume)) is not None and stream.sending
    )


def own_cut(streams: Mapping[bytes, Stream], time_ns: int, *, dirty: bool) -> Cut:
    """A cut at what was sent so far, for a backlog without cuts.

    One volume's log is a prefix wherever it is cut. Several volumes were at no instant where their streams
    happen to be, so the point is fuzzy.
    """
    active = [stream for stream in streams.values() if stream.sending and stream.delta.incarnation]
    fuzzy = dirty or len(streams) > 1
    entries = [CutVolume(stream.id, *stream.delta.place, fuzzy) for stream in active]
    return Cut(0, time_ns, None, tuple(entries))


def make_mark(cut: Cut, cut_seq: int, streams: Mapping[bytes, Stream]) -> m.Mark:
    """Return the MARK of ``cut`` and enter what it places into each stream's books."""
    entries = {entry.volume: entry for entry in cut.volumes}
    copies_left, cut_outs_left = COPIES_MAX, CUT_OUTS_MAX
    marks = []
    for stream in streams.values():
        mark = _volume_mark(cut_seq, entries.get(stream.id), stream, copies_left, cut_outs_left)
        copies_left = max(1, copies_left - len(mark.copies))
        cut_outs_left = max(1, cut_outs_left - sum(len(copy.cut_outs) for copy in mark.copies))
        marks.append(mark)
    return m.Mark(cut_seq, cut.time_ns, cut.tag, tuple(marks))


def _volume_mark(
    seq: int, entry: CutVolume | None, stream: Stream, copies_max: int, cut_outs_max: int
) -> m.VolumeMark:
    if entry is None or not stream.sending or entry.lsn < stream.rule.previous_cut:
        # It stays where it was, or is elsewhere by now (the next pass over a scanned disk has begun); beside
        # newer states of the others that was never the case at any instant.
        incarnation, lsn = stream.mark
        return m.VolumeMark(stream.id, incarnation, lsn, True, stream.copied, stream.rule.copy_end, ())
    placed = stream.rule.cut(entry.lsn, copies_max=copies_max, cut_outs_max=cut_outs_max)
    if placed:
        stream.tokens[seq] = [copy.copy.token for copy in placed]
    job = stream.job
    if job is not None and job.kind != "heal" and job.finished and not stream.rule.waiting:
        stream.copied, stream.copied_seq = True, seq
    stream.mark = (entry.incarnation, entry.lsn)
    return m.VolumeMark(
        stream.id,
        entry.incarnation,
        entry.lsn,
        entry.fuzzy or (stream.resync and not stream.copied),
        stream.copied,
        stream.rule.copy_end,
        tuple(m.CopyInCut(copy.copy.token, copy.cut_outs) for copy in placed),
    )


def is_fuzzy(mark: m.Mark, *, without: Collection[bytes] = ()) -> bool:
    """As the server decides it: a point of this cut is not offered by default; ``without`` some volumes."""
    return any(
        volume.fuzzy or not volume.copied or volume.lsn < volume.copy_end
        for volume in mark.volumes
        if volume.volume not in without
    )


def vaulted_tokens(stream: Stream, seq: int) -> list[int]:
    """Take the tokens of every MARK up to ``seq`` out of the books: they are vaulted."""
    done = [cut for cut in stream.tokens if cut <= seq]
    return [token for cut in done for token in stream.tokens.pop(cut)]
