"""What the copiers of one session have in hand: whose it is, and what becomes of it."""

from collections.abc import Callable, Mapping

from agent.capture.scan import ScanReplica
from agent.journal.state import BITMAP
from agent.replicate import ipc
from agent.replicate.copyrule import AcceptedCopy
from agent.replicate.cuts import Stream
from agent.replicate.job import Job
from agent.replicate.ports import Counters
from agent.replicate.replica import Replica


class Works:
    """Units of the volumes' jobs, handed out where the copy rule allows reading. See `copiers.Source`.

    Args:
        streams, replicas: The session's, as they are at any time.
        counters: Where what was copied is counted.
        finished: Called when the last unit of a volume's job is copied.
        failed: Called when a scanned disk cannot be read: stream, replica, why.
    """

    def __init__(
        self,
        streams: Mapping[bytes, Stream],
        replicas: Mapping[bytes, Replica],
        counters: Counters,
        *,
        finished: Callable[[], None],
        failed: Callable[[Stream, ScanReplica, str], None],
    ) -> None:
        self._streams, self._replicas, self._counters = streams, replicas, counters
        self._finished, self._failed = finished, failed
        self._works: dict[int, tuple[Stream, Job]] = {}

    def begin(self, stream: Stream, job: Job) -> None:
        """Hand out the units of ``job`` to the copiers from now on."""
        stream.rule.track()
        stream.job = job
        if job.finished:
            self._finished()

    def end(self, stream: Stream) -> None:
        """A job is over; what it read is placed."""
        stream.job = None
        stream.rule.forget()
        self._replicas[stream.id].remaining_bytes = None

    def drop(self, stream: Stream) -> None:
        """Its work under way goes on and is placed; nobody counts it."""
        stream.job = None

    def next_work(self, number: int) -> ipc.Work | None:
        """For the copiers: the next unit of any volume whose copy rule allows reading now."""
        # What is scanned comes last: a pass may take hours, and a tap's volume is fuzzy until it is whole.
        for stream in sorted(self._streams.values(), key=self._is_scanned):
            job = stream.job
            replica = self._replicas.get(stream.id)
            if job is None or not job.waiting or stream.paused or replica is None:
                continue
            state = replica.state_or_none()
            if state is None or not stream.rule.ready(state.applied_lsn, job.after):
                continue
            if job.kind == "heal" and state.capture_mode == BITMAP:
                continue
            unit = job.take(number)
            if unit is None:
                continue
            stream.rule.reading(number, state.applied_lsn)
            self._works[number] = (stream, job)
            scan = state.captured_lsn if replica.scanned else 0
            volume = ipc.Volume(stream.id, str(replica.spec.disk), str(replica.spec.state_page), scan)
            return ipc.Work(number, volume, unit.offset, unit.length, job.compare, state.applied_lsn)
        return None

    def _is_scanned(self, stream: Stream) -> bool:
        replica = self._replicas.get(stream.id)
        return replica is not None and replica.scanned

    def taken(self, message: ipc.Taken) -> None:
        """For the copiers: the server has a COPY."""
        found = self._works.get(message.work)
        if found is None:
            return
        stream, job = found
        stream.rule.seen(message.captured_lsn)
        stream.rule.accepted(AcceptedCopy(message.token, message.offset, message.length, message.applied_lsn))
        job.accepted(message.work, message.token)

    def done(self, message: ipc.Done) -> None:
        """For the copiers: a unit is finished."""
        found = self._works.pop(message.work, None)
        if found is None:
            return
        stream, job = found
        stream.rule.seen(message.captured_lsn)
        stream.rule.read(message.work)
        job.done(message.work)
        self._counters.sent("raw", message.sent_bytes)
        self._counters.sent("wire", message.wire_bytes)
        for what in ("sent_bytes", "referenced_bytes", "zero_bytes", "same_bytes"):
            self._counters.record(what, getattr(message, what))
        if job.finished and stream.job is job:
            self._finished()

    def given_back(self, numbers: list[int], reason: str, text: str, volume: bytes) -> None:
        """For the copiers: one of them is gone."""
        for number in numbers:
            found = self._works.pop(number, None)
            if found is None:
                continue
            stream, job = found
            stream.rule.read(number)
            job.give_back(number)
            replica = self._replicas.get(stream.id)
            if reason != "disk" or replica is None or stream.id != volume:
                continue
            why = f"the disk cannot be read: {text}"
            if not isinstance(replica, ScanReplica):
                replica.problem = why
            elif stream.job is job:
                self._failed(stream, replica, why)
