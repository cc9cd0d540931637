"""What happens before a volume is served: prove continuity, redo, open a new incarnation. Blocks.

Killed at any step, it can be repeated. Not one byte goes to the disk unless continuity is proved.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from agent.journal import mark as marks
from agent.journal.continuity import Boot, Continuity, read_boot
from agent.journal.dirty import FILE_NAME as DIRTY_FILE_NAME
from agent.journal.dirty import DirtyMap, region_bytes_for
from agent.journal.errors import JournalFailed, JournalFull, JournalGap
from agent.journal.mark import Mark, MarkFile
from agent.journal.recovery import Recovered
from agent.journal.state import BITMAP, DATA, StatePageWriter
from agent.journal.writer import JournalWriter
from agent.tap.disk import Disk
from agent.tap.lastrun import LastRun, Place, look
from agent.tap.redo import redo
from agent.volumes import VolumeConfig
from farshore.clock import Clock
from farshore.errors import CorruptRecord, Failed
from farshore.failpoints import failpoint
from farshore.hrl.segment import NO_INCARNATION
from farshore.ids import id_from_hex
from farshore.telemetry import get_logger
from farshore.units import SECTOR_BYTES


@dataclass(slots=True)
class Opened:
    """A volume that is ready to be served.

    Attributes:
        writer: The new incarnation; None when the journal cannot be written: serve in bitmap mode.
        why: Why there is no writer.
        room_only: Only room is missing.
        last_lsn: Highest LSN in use; everything up to it is on the disk, durably, or a resync is due.
        epoch: Of the dirty map.
        resync: Why the volume needs a full compare; empty when it does not.
        redone: Records written to the disk again.
        continuity: The decision.
    """

    disk: Disk
    writer: JournalWriter | None
    why: str
    room_only: bool
    last_lsn: int
    mark_file: MarkFile
    dirty: DirtyMap
    page: StatePageWriter
    boot: Boot
    epoch: int
    resync: str
    redone: int
    continuity: Continuity

    def close(self) -> None:
        """Let go of everything, as a kill would: nobody will serve it."""
        if self.writer is not None:
            self.writer.close()
        for held in (self.mark_file, self.dirty, self.page, self.disk):
            held.close()


def open_writer(
    place: Place,
    config: VolumeConfig,
    volume_bytes: int,
    recovered: Recovered,
    clock: Clock,
    *,
    above_lsn: int = 0,
    above_ordinal: int = 0,
) -> JournalWriter:
    """Open a new incarnation. Raises as `JournalWriter.open`."""
    return JournalWriter.open(
        place.folder,
        machine=place.machine,
        volume=id_from_hex(config.id),
        volume_bytes=volume_bytes,
        sector_bytes=SECTOR_BYTES,
        segment_bytes=config.segment_bytes,
        quota_bytes=config.quota_bytes,
        recovered=recovered,
        clock=clock,
        above_lsn=above_lsn,
        above_ordinal=above_ordinal,
        segment_seconds=config.segment_seconds,
    )


def open_volume(place: Place, config: VolumeConfig, held: int | None, clock: Clock) -> Opened:
    """Bring a volume to where it can be served.

    Args:
        held: Descriptor of the disk that the supervisor has held open since the last run, or None.

    Raises:
        NotFound, Conflict: The disk is not there or not ours.
        Failed: The journal's folder cannot be read or written.
    """
    disk = Disk.open(Path(config.disk), held)
    try:
        return _open(place, config, disk, clock, supervisor_held=held is not None)
    except OSError as error:
        disk.close()
        where = error.filename or place.folder
        why = error.strerror or str(error)
        raise Failed("cannot open the volume", where=str(where), why=why) from error
    except BaseException:
        disk.close()
        raise


def _open(place: Place, config: VolumeConfig, disk: Disk, clock: Clock, *, supervisor_held: bool) -> Opened:
    place.folder.mkdir(mode=0o700, exist_ok=True)
    last = look(place, id_from_hex(config.id), disk, read_boot(clock))
    verdict = last.judge(supervisor_held=supervisor_held)
    dirty, dirty_problem = _open_dirty(place.folder, disk.size_bytes)
    resync = last.why_resync(verdict, dirty_problem)
    mark_file = MarkFile.open(place.folder)
    if resync:
        # Before anything else changes: a later start need not see the reason again.
        mark_file.write(last.mark_of_resync(last.disk))
        failpoint("tap.open.resync_noted")
    page = _new_page(place.state_page, last)

    redone = 0
    if verdict.redo and not last.recovered.corrupt:
        try:
            redone = redo(last.recovered, last.stable_lsn, disk, dirty, lambda: _beat(page, last, clock))
        except (JournalGap, CorruptRecord) as error:
            resync = str(error)
            mark_file.write(last.mark_of_resync(disk.identity()))
        failpoint("tap.open.redone")
    if last.lost and resync:
        disk.withdraw_testimony()

    writer, why, room_only = _open_journal(place, config, disk.size_bytes, last.recovered, clock)
    failpoint("tap.open.journal_opened")
    # Where the journal cannot be written, what the last run said of it still holds.
    incarnation = writer.incarnation.id if writer else last.mark.incarnation if last.mark else NO_INCARNATION
    last_lsn = writer.next_lsn - 1 if writer else last.last_lsn
    mark = Mark(
        incarnation,
        writer.durable_lsn if writer else last.recovered.durable_lsn,
        last_lsn,
        (marks.RESYNC_REQUIRED if resync else 0) | (0 if writer else marks.BITMAP),
        last.epoch,
        disk.identity(),
        last.boot.id,
    )
    try:
        mark_file.write(mark)
    except BaseException:
        if writer:
            writer.close()
        raise
    failpoint("tap.open.marked")
    page.update(
        incarnation=writer.incarnation.id if writer else NO_INCARNATION,
        captured_lsn=last_lsn,
        durable_lsn=last_lsn,
        applied_lsn=last_lsn,
        stable_lsn=last_lsn,
        heartbeat_ns=clock.wall_ns(),
        heartbeat_monotonic_ns=time.monotonic_ns(),
        capture_mode=DATA if writer else BITMAP,
        dirty_epoch=last.epoch,
        dirty_regions=dirty.count,
    )
    get_logger(volume=config.name).info(
        "volume_opened",
        proved=verdict.proved,
        why=verdict.why,
        redone_records=redone,
        resync=resync,
        last_lsn=last_lsn,
        torn_tail_bytes=last.recovered.torn_tail_bytes,
        mode="data" if writer else "bitmap",
    )
    return Opened(
        disk,
        writer,
        why,
        room_only,
        last_lsn,
        mark_file,
        dirty,
        page,
        last.boot,
        last.epoch,
        resync,
        redone,
        verdict,
    )


def _open_journal(
    place: Place, config: VolumeConfig, volume_bytes: int, recovered: Recovered, clock: Clock
) -> tuple[JournalWriter | None, str, bool]:
    """Return a new incarnation; or None, why there is none, and whether only room is missing."""
    try:
        return open_writer(place, config, volume_bytes, recovered, clock), "", False
    except JournalFull as error:
        return None, str(error), True
    except JournalFailed as error:
        return None, str(error), False


def _new_page(path: Path, last: LastRun) -> StatePageWriter:
    incarnation = last.recovered.incarnation.id if last.recovered.incarnation else NO_INCARNATION
    return StatePageWriter.create(path, incarnation=incarnation, boot_id=last.boot.id)


def _beat(page: StatePageWriter, last: LastRun, clock: Clock) -> None:
    """While records are redone: the last run's counters, for should this one be killed, and that it lives."""
    page.update(
        captured_lsn=last.recovered.last_lsn,
        durable_lsn=last.vouched_lsn,
        applied_lsn=last.stable_lsn,
        stable_lsn=last.stable_lsn,
        heartbeat_ns=clock.wall_ns(),
        heartbeat_monotonic_ns=time.monotonic_ns(),
        capture_mode=DATA,
        flags=0,
    )


def _open_dirty(folder: Path, volume_bytes: int) -> tuple[DirtyMap, str]:
    path = folder / DIRTY_FILE_NAME
    problem = "there is no dirty map"
    with contextlib.suppress(FileNotFoundError):
        try:
            dirty = DirtyMap.open(path)
        except CorruptRecord as error:
            problem = str(error)
        else:
            if dirty.volume_bytes == volume_bytes and dirty.region_bytes == region_bytes_for(volume_bytes):
                return dirty, ""
            dirty.close()
            problem = "the dirty map is of a volume of another size"
    return DirtyMap.create(path, volume_bytes), problem
