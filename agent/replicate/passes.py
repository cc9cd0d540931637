"""What a session does about volumes that are scanned: when a pass begins, is copied, ends or fails."""

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Final

from agent.capture.scan import ScanReplica, explain
from agent.replicate.cuts import Stream
from agent.replicate.job import Job, whole_volume
from agent.volumes import why_no_volume
from farshore.errors import FarshoreError
from farshore.telemetry import get_logger
from farshore.wire import messages as m

if TYPE_CHECKING:
    from agent.replicate.session import Session

QUIET_LOOKS: Final = 5
QUIET_S: Final = 0.02
"""A disk that was written a moment ago is looked at again so often before a pass over it begins."""

log = get_logger()


class Passes:
    """The passes of one session."""

    def __init__(self, session: "Session") -> None:
        self._session = session

    async def plan(self, stream: Stream, replica: ScanReplica, position: m.VolumePosition) -> None:
        """Do what is next for one volume; called again and again. Raises LinkDown."""
        if not stream.opened:
            replica.open(position)
            running = replica.running is not None
            stream.resync = running
            stream.copied = position.copied and not running
            stream.opened = True
        stream.paused = replica.paused
        job = stream.job
        if job is not None:
            replica.remaining_bytes, replica.total_bytes = job.remaining_bytes, job.total_bytes
        elif not stream.paused and replica.running is not None:
            self._copy(stream, replica, position)
        elif not stream.paused and replica.due():
            await self._begin(stream, replica)

    async def _begin(self, stream: Stream, replica: ScanReplica) -> None:
        stream.rule.forget()
        if stream.rule.tracking:
            return  # what a pass that failed has read is still to be placed
        try:
            disk = await replica.looked()
            for _ in range(QUIET_LOOKS):
                if replica.quiesced and replica.just_written(disk):
                    await asyncio.sleep(QUIET_S)
                    disk = await replica.looked()
            if why := why_no_volume(disk.size_bytes):
                replica.fail(why)
                return
            if disk.size_bytes != replica.spec.size_bytes:
                replica.spec = dataclasses.replace(replica.spec, size_bytes=disk.size_bytes)
                # Before the pass: its place in the stream is one of a volume of the new size.
                await self._session.link.send(m.VolumeAdd(replica.hello()))
            if self._session.streams.get(stream.id) is not stream:
                return
        except OSError as error:
            replica.fail(explain(error))
            return
        try:
            begun = replica.begin(disk, self._session.position(stream.id))
        except (FarshoreError, OSError) as error:
            replica.fail(f"the pass cannot begin: {error}")
            return
        stream.resync, stream.copied, stream.resync_at = True, False, begun.incarnation.id
        self._session.marks.passed_over(stream.id, begun.number)
        log.info("scan_began", volume=replica.spec.name, lsn=begun.number, bytes=disk.size_bytes)

    def _copy(self, stream: Stream, replica: ScanReplica, position: m.VolumePosition) -> None:
        """Begin to read, once the server was told of the pass: it compares with what it has at that place."""
        running, started = replica.running, stream.delta.incarnation
        assert running is not None
        if started is None or started.incarnation.id != running.incarnation.id:
            return
        units = whole_volume(replica.spec.size_bytes, replica.safe)
        # Records from before it there are none, so nothing has to be vaulted first.
        job = Job("resync" if replica.copied else "initial", units, compare=not position.empty, after=0)
        running.job = job
        self._session.works.begin(stream, job)
        log.info("copying_started", volume=replica.spec.name, kind=job.kind, bytes=job.total_bytes)

    def concerns(self, replica: ScanReplica, mark: m.VolumeMark) -> bool:
        """Tell whether a MARK that says all of the volume is copied speaks of the pass that is under way."""
        running = replica.running
        return running is not None and mark.incarnation == running.incarnation.id

    def vaulted(self, stream: Stream, replica: ScanReplica) -> None:
        """The vault has all that the pass read."""
        running = replica.running
        if running is None:
            return  # given up while the acknowledgement was on its way
        log.info("scan_vaulted", volume=replica.spec.name, lsn=running.number, changed=running.changed)
        stream.resync = False
        replica.vaulted(running)

    def failed(self, stream: Stream, replica: ScanReplica, why: str) -> None:
        """A copier could not read the disk: this pass is over, and the vault has a part of it."""
        stream.job = None
        replica.remaining_bytes = None
        replica.fail(why)
