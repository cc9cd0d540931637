"""What the last run of the tap left behind for a volume, and what follows from it for this one."""

from dataclasses import dataclass, replace
from pathlib import Path

from agent.journal import mark as marks
from agent.journal.continuity import Boot, Continuity, DiskIdentity, Stopped, decide
from agent.journal.mark import Mark
from agent.journal.recovery import Recovered, recover
from agent.journal.state import JOURNAL_LOST, State, load_state
from agent.tap.disk import Disk
from farshore.hrl.segment import NO_INCARNATION


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


@dataclass(frozen=True, slots=True)
class LastRun:
    """The traces, and the disk as it was found.

    Attributes:
        recovered: What the journal holds.
        state: The state page; None when the machine was started since.
        lost: Page or disk bear witness that the journal was lost.
        disk: Taken before anything was written to it.
        boot: The start of the machine that this run belongs to.
    """

    recovered: Recovered
    state: State | None
    lost: bool
    disk: DiskIdentity
    boot: Boot

    @property
    def mark(self) -> Mark | None:
        """The last stable mark; None: there was no run before."""
        return self.recovered.mark

    @property
    def stable_lsn(self) -> int:
        """Up to here the disk has everything."""
        return self.mark.stable_lsn if self.mark else 0

    @property
    def last_lsn(self) -> int:
        """Highest LSN that must not be given again."""
        return max(self.recovered.last_lsn, self.recovered.floor_lsn)

    @property
    def vouched_lsn(self) -> int:
        """Up to here the journal is known to be durable."""
        durable, incarnation = self.recovered.durable_lsn, self.recovered.incarnation
        if self.state is not None and incarnation and self.state.incarnation == incarnation.id:
            durable = max(durable, self.state.durable_lsn)
        return min(durable, self.recovered.last_lsn)

    @property
    def epoch(self) -> int:
        """Of the dirty map, from now on."""
        return (self.mark.dirty_epoch if self.mark else 0) + 1

    def judge(self, *, supervisor_held: bool) -> Continuity:
        """Decide whether what was not applied yet may be redone."""
        if self.mark is None:
            why = "the journal has records and no mark" if self.recovered.segments else "a new journal"
            return Continuity(redo=False, proved=not self.recovered.segments, why=why)
        stopped = Stopped(
            self.mark.disk,
            self.mark.boot_id,
            clean=bool(self.mark.flags & marks.CLEAN),
            journal_lost=self.lost or bool(self.mark.flags & marks.JOURNAL_LOST),
            bitmap=bool(self.mark.flags & marks.BITMAP),
            heartbeat_ns=self.state.heartbeat_ns if self.state else None,
        )
        return decide(stopped, self.disk, self.boot, supervisor_held=supervisor_held)

    def why_resync(self, verdict: Continuity, dirty_problem: str) -> str:
        """Return why everything has to be compared; empty when nothing has."""
        if self.recovered.corrupt:
            return self.recovered.corrupt
        if self.mark and self.mark.flags & marks.RESYNC_REQUIRED:
            return "it was required before"
        if not verdict.proved:
            return verdict.why
        return dirty_problem if self.mark else ""

    def mark_of_resync(self, disk: DiskIdentity) -> Mark:
        """The last mark, as far as it still holds, saying that everything has to be compared."""
        base = self.mark or Mark(NO_INCARNATION, 0, 0, 0, self.epoch, disk, self.boot.id)
        incarnation = self.recovered.incarnation.id if self.recovered.incarnation else base.incarnation
        return replace(
            base,
            incarnation=incarnation,
            durable_lsn=base.durable_lsn if incarnation == base.incarnation else 0,
            flags=(base.flags | marks.RESYNC_REQUIRED) & ~marks.CLEAN,
            dirty_epoch=self.epoch,
            disk=disk,
            boot_id=self.boot.id,
        )


def look(place: Place, volume: bytes, disk: Disk, boot: Boot) -> LastRun:
    """Read what is there. Raises OSError."""
    found = disk.identity()
    state = load_state(place.state_page)
    if state is not None and state.boot_id != boot.id:
        state = None
    recovered = recover(place.folder, place.machine, volume, state_page=place.state_page, boot_id=boot.id)
    lost = disk.testimony() or bool(state and state.flags & JOURNAL_LOST)
    return LastRun(recovered, state, lost, found, boot)
