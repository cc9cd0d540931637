"""What happens before a volume is served: prove continuity, redo, open a new incarnation. Blocks.

Killed at any step, it can be repeated. Not one byte goes to the disk unless continuity is proved.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.journal import mark as marks
from agent.journal.continuity import Boot, Continuity, Stopped, decide, read_boot
from agent.journal.dirty import FILE_NAME as DIRTY_FILE_NAME
from agent.journal.dirty import DirtyMap, region_bytes_for
from agent.journal.errors import JournalFailed, JournalFull, JournalGap
from agent.journal.mark import Mark, MarkFile
from agent.journal.recovery import Recovered, recover, redo_records
from agent.journal.state import BITMAP, DATA, JOURNAL_LOST, StatePageWriter, load_state
from agent.journal.writer import JournalWriter
from agent.tap.disk import Disk
from agent.tap.vectored import VectoredWriter
from agent.volumes import VolumeConfig
from farshore.clock import Clock
from farshore.errors import CorruptRecord, Failed
from farshore.failpoints import failpoint
from farshore.hrl.batch import WRITE, ZERO, Batch
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
    had_data: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a volume's files are, and whose they are.

    Attributes:
        folder: Holds the journal.
        state_page: On a tmpfs, see `agent.volumes.state_page`.
    """

    folder: Path
    state_page: Path
    machine: bytes


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
    log = get_logger(volume=config.name)
    place.folder.mkdir(mode=0o700, exist_ok=True)
    boot = read_boot(clock)
    now = disk.identity()
    state = load_state(place.state_page)
    if state is not None and state.boot_id != boot.id:
        state = None
    recovered = recover(
        place.folder,
        place.machine,
        id_from_hex(config.id),
        state_page=place.state_page,
        boot_id=boot.id,
    )
    before = recovered.mark
    had_data = before is not None or bool(recovered.segments)
    resync = "it was required before" if before and before.flags & marks.RESYNC_REQUIRED else ""
    lost = disk.testimony()
    if before is None:
        verdict = Continuity(redo=False, proved=not had_data, why="a new journal")
    else:
        lost = lost or bool(state and state.flags & JOURNAL_LOST)
        stopped = Stopped(
            before.disk,
            before.boot_id,
            clean=bool(before.flags & marks.CLEAN),
            journal_lost=lost or bool(before.flags & marks.JOURNAL_LOST),
            bitmap=bool(before.flags & marks.BITMAP),
            heartbeat_ns=state.heartbeat_ns if state else None,
        )
        verdict = decide(stopped, now, boot, supervisor_held=supervisor_held)
    if recovered.corrupt:
        resync = recovered.corrupt
    elif not verdict.proved:
        resync = resync or verdict.why
    dirty, dirty_problem = _open_dirty(place.folder, disk.size_bytes)
    if dirty_problem and had_data:
        resync = resync or dirty_problem
    epoch = (before.dirty_epoch if before else 0) + 1
    mark_file = MarkFile.open(place.folder)
    if resync:
        # Before anything else changes: a later start need not see the reason again.
        base = before or Mark(NO_INCARNATION, 0, 0, 0, epoch, now, boot.id)
        flags = (base.flags | marks.RESYNC_REQUIRED) & ~marks.CLEAN
        incarnation = recovered.incarnation.id if recovered.incarnation else base.incarnation
        durable = base.durable_lsn if incarnation == base.incarnation else 0
        mark_file.write(Mark(incarnation, durable, base.stable_lsn, flags, epoch, now, boot.id))
        failpoint("tap.open.resync_noted")
    page = StatePageWriter.create(
        place.state_page,
        incarnation=recovered.incarnation.id if recovered.incarnation else NO_INCARNATION,
        boot_id=boot.id,
    )
    stable = before.stable_lsn if before else 0
    same_log = state is not None and recovered.incarnation and state.incarnation == recovered.incarnation.id
    vouched = max(state.durable_lsn if state and same_log else 0, recovered.durable_lsn)

    def beat() -> None:
        page.update(
            captured_lsn=recovered.last_lsn,
            durable_lsn=min(vouched, recovered.last_lsn),
            applied_lsn=stable,
            stable_lsn=stable,
            heartbeat_ns=clock.wall_ns(),
            heartbeat_monotonic_ns=time.monotonic_ns(),
            capture_mode=DATA,
            flags=0,
        )

    redone = 0
    if verdict.redo and not recovered.corrupt:
        try:
            redone = redo(recovered, stable, disk, dirty, beat)
        except (JournalGap, CorruptRecord) as error:
            resync = str(error)
            mark_file.write(
                Mark(
                    before.incarnation if before else NO_INCARNATION,
                    before.durable_lsn if before else 0,
                    stable,
                    marks.RESYNC_REQUIRED,
                    epoch,
                    disk.identity(),
                    boot.id,
                )
            )
        failpoint("tap.open.redone")
    if lost and resync:
        disk.withdraw_testimony()
    last_lsn = max(recovered.last_lsn, recovered.floor_lsn)
    writer: JournalWriter | None = None
    why, room_only = "", False
    try:
        writer = open_writer(place, config, disk.size_bytes, recovered, clock)
        last_lsn = writer.next_lsn - 1
    except JournalFull as error:
        why, room_only = str(error), True
    except JournalFailed as error:
        why = str(error)
    failpoint("tap.open.journal_opened")
    flags = (marks.RESYNC_REQUIRED if resync else 0) | (0 if writer else marks.BITMAP)
    try:
        mark_file.write(
            Mark(
                writer.incarnation.id if writer else (before.incarnation if before else NO_INCARNATION),
                writer.durable_lsn if writer else recovered.durable_lsn,
                last_lsn,
                flags,
                epoch,
                disk.identity(),
                boot.id,
            )
        )
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
        dirty_epoch=epoch,
        dirty_regions=dirty.count,
    )
    log.info(
        "volume_opened",
        proved=verdict.proved,
        why=verdict.why,
        redone_records=redone,
        resync=resync,
        last_lsn=last_lsn,
        torn_tail_bytes=recovered.torn_tail_bytes,
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
        boot,
        epoch,
        resync,
        redone,
        verdict,
        had_data,
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


def redo(recovered: Recovered, stable_lsn: int, disk: Disk, dirty: DirtyMap, beat: Callable[[], None]) -> int:
    """Write every record above the stable mark to the disk again, but not into dirty regions.

    A dirty region holds writes that no record has, perhaps younger than the record: it is copied as it is.

    Returns:
        How many records were written, wholly or in part; they are durable on the disk.

    Raises:
        JournalGap, CorruptRecord: Records are missing; what was written so far is harmless.
        OSError: The disk refuses.
    """
    writer = VectoredWriter()
    count = 0
    beat()
    try:
        for batch in redo_records(recovered, stable_lsn):
            count += _redo_batch(batch, stable_lsn, disk, dirty, writer, beat)
            beat()
    finally:
        writer.close()
    if count:
        failpoint("tap.open.redo_written")
        disk.sync()
        beat()
    return count


def _redo_batch(
    batch: Batch,
    stable_lsn: int,
    disk: Disk,
    dirty: DirtyMap,
    writer: VectoredWriter,
    beat: Callable[[], None],
) -> int:
    payload = np.frombuffer(batch.payload, np.uint8)
    base = int(payload.__array_interface__["data"][0])
    starts = np.cumsum(batch.records["payload_length"], dtype=np.int64) - batch.records["payload_length"]
    count = 0
    for row in range(max(0, stable_lsn + 1 - batch.first_lsn), batch.count):
        record = batch.records[row]
        kind, offset, length = int(record["type"]), int(record["offset"]), int(record["length"])
        if kind not in (WRITE, ZERO):
            continue
        if offset + length > disk.size_bytes:
            raise CorruptRecord(0, f"record {batch.first_lsn + row} lies beyond the disk")
        pieces = _clean_pieces(dirty, offset, length)
        count += bool(pieces)
        for at, size in pieces:
            if kind == ZERO:
                disk.zero(at, size)
            else:
                address = base + int(starts[row]) + at - offset
                offsets, lengths, addresses = np.array([[at], [size], [address]], np.int64)
                writer.write(disk.fd, offsets, lengths, addresses, beat)
    return count


def _clean_pieces(dirty: DirtyMap, offset: int, length: int) -> list[tuple[int, int]]:
    """The parts of a range that no dirty region covers."""
    if not dirty.count or not dirty.is_dirty(offset, length):
        return [(offset, length)]
    pieces = []
    at, end = offset, offset + length
    while at < end:
        size = min(end, (at // dirty.region_bytes + 1) * dirty.region_bytes) - at
        if not dirty.is_dirty(at, size):
            pieces.append((at, size))
        at += size
    return pieces
