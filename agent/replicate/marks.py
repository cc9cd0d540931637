"""The cuts of one session: when one is taken, what it waits for, and the MARK that tells of it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

from agent.journal.state import BITMAP, DATA, RESYNC_REQUIRED
from agent.link import Link
from agent.replicate import cuts
from agent.replicate.ports import Tap
from agent.replicate.replica import Replica
from farshore.errors import Unreachable
from farshore.failpoints import failpoint
from farshore.hrl.cut import Cut
from farshore.telemetry import get_logger
from farshore.wire import messages as m

MARKS_UNACKED_MAX: Final = 64
"""Cuts on their way to the vault; with more, the next ones wait and one covers them all."""
OPEN_S: Final = 10.0
MARK_S: Final = 45.0

log = get_logger()


def scanned(replicas: Mapping[bytes, Replica]) -> set[bytes]:
    """Volumes that have no tap."""
    return {id for id, replica in replicas.items() if replica.scanned}


def unserved(replicas: Mapping[bytes, Replica]) -> set[bytes]:
    """Volumes that nobody captures now: a cut has them where they were."""
    return {id for id, replica in replicas.items() if not replica.served}


class Marks:
    """Cuts taken and not sent, and MARKs sent and not vaulted.

    Args:
        streams, replicas: The session's, as they are at any time.
        interval_s: From one cut to the next.
        send_now: Set when there is something to send.

    Attributes:
        pending: Cuts that were taken, or found in a journal, and not sent.
        unacked: By cut_seq.
    """

    def __init__(
        self,
        link: Link,
        tap: Tap,
        streams: Mapping[bytes, cuts.Stream],
        replicas: Mapping[bytes, Replica],
        interval_s: Callable[[], float],
        send_now: asyncio.Event,
    ) -> None:
        self._link, self._tap, self._streams, self._replicas = link, tap, streams, replicas
        self._interval_s, self._send_now = interval_s, send_now
        self.pending = cuts.PendingCuts()
        self.unacked: dict[int, m.Mark] = {}
        self._last_cut: dict[bytes, int] = {}
        self._last_fuzzy = True
        self._away: set[bytes] = set()  # volumes that a MARK had only where they were: nobody served them
        self._unopened: dict[bytes, float] = {}  # since when cuts wait for a volume; monotonic
        self._since_mark = (0, 0)
        self._cut_now = asyncio.Event()
        self._awaited: dict[int, asyncio.Future[int | None]] = {}
        # By the cut's seq: the cut_seq of its MARK, None when it was given up. The newest ones.
        self._sent_cuts: dict[int, int | None] = {}
        self._cutting = 0

    # --- when ---

    def want(self) -> None:
        """Take the next cut now, if there is anything that one would tell."""
        self._cut_now.set()

    def want_better(self) -> None:
        """What made the last points fuzzy may be over."""
        self._last_fuzzy = True
        self.want()

    def passed_over(self, volume: bytes, lsn: int) -> None:
        """Nothing came up to ``lsn`` that would be worth a cut."""
        self._last_cut[volume] = lsn

    def served(self, volume: bytes) -> None:
        """A volume is served, and its place in the journal is known."""
        if volume in self._away:
            # The last points were as good as they could be without it; the next one has it again.
            self._away.discard(volume)
            self.want_better()

    def forget(self, volume: bytes) -> None:
        """A volume is not protected any more."""
        self._away.discard(volume)
        self._unopened.pop(volume, None)
        # It may have been what made the last points fuzzy, also where only the server knew of it.
        self.want_better()

    async def run(self) -> None:
        """Take cuts, for as long as the session lasts."""
        while True:
            try:
                async with asyncio.timeout(max(0.05, self._interval_s())):
                    await self._cut_now.wait()
                    # What comes within a moment belongs to the same cut.
                    await asyncio.sleep(0.02)
            except TimeoutError:
                pass
            self._cut_now.clear()
            if len(self.unacked) >= MARKS_UNACKED_MAX or self._awaiting() or not self.needed():
                continue
            try:
                self._took(await self._cut(None))
            except Unreachable as error:
                log.warning("no_cut", error=str(error))

    def _awaiting(self) -> bool:
        """No MARK would be sent: the tap is still opening a volume, which would not be in a cut of now."""
        now_s = time.monotonic()
        return any(replica.awaited(now_s) for replica in self._replicas.values())

    async def _cut(self, tag: str | None) -> Cut:
        """Have a cut taken; with scanned volumes no MARK is sent meanwhile.

        The tap's journals tell of the same cut, perhaps before this returns, but without those volumes.
        """
        self._cutting += 1
        try:
            return await self._tap.cut(tag)
        finally:
            self._cutting -= 1

    def _took(self, cut: Cut) -> None:
        cut = cuts.served(cut)
        self.pending.add(cut)
        for entry in cut.volumes:
            self._last_cut[entry.volume] = entry.lsn
        self._send_now.set()

    def needed(self) -> bool:
        """Tell whether records came, copies wait, or a point would be better than the last."""
        better, counted = self._last_fuzzy, False
        for id, stream in self._streams.items():
            replica = self._replicas.get(id)
            state = replica.state_or_none() if replica is not None else None
            job = stream.job
            copied = job is not None and job.kind != "heal" and job.finished and not stream.copied
            wants = bool(stream.rule.waiting or copied)
            if replica is not None and replica.fuzzy_anyway() and not (wants and replica.served):
                continue
            counted = True
            if state is None or not stream.sending:
                better = False
                continue
            if wants or state.captured_lsn > self._last_cut.get(id, stream.mark[1]):
                return True
            flagged = state.flags & RESYNC_REQUIRED
            if state.dirty_regions or state.capture_mode == BITMAP or flagged or not stream.copied:
                better = False
            if state.captured_lsn < stream.rule.copy_end:
                better = False
        return better and counted and not self.unacked

    # --- on request ---

    async def take(self, tag: str | None) -> int:
        """Take a cut now and return the cut_seq of its MARK, which is on its way then.

        Raises:
            Unreachable: The tap is away, or the MARK could not be sent in time.
        """
        cut = await self._cut(tag)
        if cut.seq in self._sent_cuts:  # the journal told of it before the tap did
            return self._marked(self._sent_cuts[cut.seq])
        sent: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._awaited[cut.seq] = sent
        self._took(cut)
        try:
            async with asyncio.timeout(MARK_S):
                return self._marked(await sent)
        except TimeoutError as error:
            raise Unreachable("the cut could not be sent yet", why=f"not within {MARK_S:g} s") from error
        finally:
            self._awaited.pop(cut.seq, None)

    def _marked(self, seq: int | None) -> int:
        if seq is None:
            raise Unreachable("the cut was given up", why="a volume's journal was opened again meanwhile")
        return seq

    # --- sending ---

    def found(self, cut: Cut) -> None:
        """A journal tells of a cut."""
        self.pending.add(cuts.served(cut))

    def records_sent(self, records: int, size: int) -> None:
        """Records, and bytes of them, went out; the next MARK covers them."""
        before_records, before_size = self._since_mark
        self._since_mark = before_records + records, before_size + size

    def vaulted(self, cut_seq: int) -> m.Mark | None:
        """All MARKs up to this one are in the vault; return the newest of them that was not known to be."""
        mark: m.Mark | None = None
        for seq in [seq for seq in self.unacked if seq <= cut_seq]:
            mark = self.unacked.pop(seq)
        return mark

    async def send(self) -> bool:
        """Send the MARK of every cut whose records were sent; tell whether there was one. Raises LinkDown."""
        sent = False
        if self._cutting and scanned(self._replicas):
            return False
        all_open = self._all_open()
        while all_open and (cut := self.pending.first()) is not None:
            if cuts.lost(cut, self._streams):
                log.info("cut_skipped", seq=cut.seq, tag=cut.tag)
                self.pending.remove(cut)
                self._settle_cut(cut, None)
                continue
            if not cuts.ready(cut, self._streams):
                break
            self.pending.remove(cut)
            await self._send_mark(cut)
            sent = True
        records, size = self._since_mark
        if records > cuts.OWN_RECORDS or size > cuts.OWN_BYTES:
            dirty = not all_open or any(
                state is None or state.dirty_regions > 0 or state.capture_mode != DATA
                for state in (replica.state_or_none() for replica in self._replicas.values())
            )
            await self._send_mark(cuts.own_cut(self._streams, time.time_ns(), dirty=dirty))
            sent = True
        return sent

    async def _send_mark(self, cut: Cut) -> None:
        seq = self.pending.wire_seq(cut)
        mark = cuts.make_mark(cut, seq, self._streams)
        self._since_mark = (0, 0)
        self.unacked[seq] = mark
        anyway = {id for id, replica in self._replicas.items() if replica.fuzzy_anyway()}
        self._last_fuzzy = cuts.is_fuzzy(mark, without=anyway)
        self._away |= unserved(self._replicas)
        failpoint("agent.before_mark")
        await self._link.send(mark)
        failpoint("agent.after_mark")
        self._settle_cut(cut, seq)

    def _settle_cut(self, cut: Cut, seq: int | None) -> None:
        """A cut's MARK was sent as ``seq``, or never will be: tell whoever waits for it, or comes to."""
        if not cut.seq:
            return  # our own
        self._sent_cuts[cut.seq] = seq
        while len(self._sent_cuts) > MARKS_UNACKED_MAX:
            del self._sent_cuts[next(iter(self._sent_cuts))]
        awaited = self._awaited.get(cut.seq)
        if awaited is not None and not awaited.done():
            awaited.set_result(seq)

    def _all_open(self) -> bool:
        """Every volume found its place; one that cannot is not waited for longer than a moment."""
        now_s = time.monotonic()
        for id, replica in self._replicas.items():
            stream = self._streams.get(id)
            if replica.awaited(now_s):
                return False  # the tap is still opening it, for as long as the service says
            if stream is not None and (stream.opened or not replica.served):
                self._unopened.pop(id, None)
            elif now_s - self._unopened.setdefault(id, now_s) <= OPEN_S:
                return False
        return True
