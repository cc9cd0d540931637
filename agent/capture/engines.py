"""All capture engines of a machine as one: a cut goes through every volume, whoever captures it."""

import asyncio
from collections.abc import Callable, Iterable

from agent.capture.scan import ScanReplica
from agent.journal.continuity import DiskIdentity
from agent.replicate.ports import DirtyRegions, Tap
from agent.replicate.replica import Replica
from farshore.clock import Clock
from farshore.errors import Unreachable
from farshore.hrl.cut import Cut


class Engines:
    """`agent.replicate.ports.Tap` of a machine some of whose volumes are scanned.

    Args:
        tap: Of the others; not asked anything as long as there are none.
        replicas: All volumes that are replicated.
    """

    def __init__(self, tap: Tap, replicas: Callable[[], Iterable[Replica]], clock: Clock) -> None:
        self._tap, self._replicas, self._clock = tap, replicas, clock
        self._seq = 0

    async def cut(self, tag: str | None) -> Cut:
        """Take a cut: the tap's, and after it a look at the disks that are scanned.

        Raises:
            Unreachable: There is no tap, and a volume that it serves.
        """
        replicas = list(self._replicas())
        scans = [replica for replica in replicas if isinstance(replica, ScanReplica)]
        if len(scans) < len(replicas) or not replicas:
            try:
                cut = await self._tap.cut(tag)
            except Unreachable:
                if not scans or any(replica.served and not replica.scanned for replica in replicas):
                    raise
                # Nothing of the tap's could be in it: those volumes stay where they were.
                cut = self._own(tag)
        else:
            cut = self._own(tag)
        self._seq = max(self._seq, cut.seq)
        if not scans:
            return cut
        # Unchanged after the cut is unchanged at the cut.
        async with asyncio.TaskGroup() as tasks:
            looks = [tasks.create_task(_look(scan)) for scan in scans]
        found = [look.result() for look in looks]
        alone = len(replicas) == 1
        entries = [scan.cut(disk, alone=alone) for scan, disk in zip(scans, found, strict=True)]
        placed = tuple(entry for entry in entries if entry is not None)
        return Cut(cut.seq, cut.time_ns, cut.tag, (*cut.volumes, *placed))

    def _own(self, tag: str | None) -> Cut:
        now_ns = self._clock.wall_ns()
        return Cut(max(self._seq + 1, now_ns), now_ns, tag, ())

    async def vaulted(self, volume: bytes, incarnation: bytes, lsn: int) -> None:
        """Tell the tap what it may free; nothing is kept of what was scanned."""
        if self._scan(volume) is None:
            await self._tap.vaulted(volume, incarnation, lsn)

    async def dirty(self, volume: bytes) -> DirtyRegions:
        """As the tap has it."""
        return await self._tap.dirty(volume)

    async def dirty_clear(self, volume: bytes, round: int, regions: tuple[int, ...]) -> None:
        """As the tap does it."""
        await self._tap.dirty_clear(volume, round, regions)

    async def resync_required(self, volume: bytes, above_lsn: int, above_ordinal: int) -> None:
        """The vault stands elsewhere than was thought; a volume that is scanned begins a pass anew."""
        scan = self._scan(volume)
        if scan is None:
            await self._tap.resync_required(volume, above_lsn, above_ordinal)
        else:
            scan.forget()

    async def resync_done(self, volume: bytes) -> None:
        """Tell the tap; a pass needs no telling."""
        if self._scan(volume) is None:
            await self._tap.resync_done(volume)

    def _scan(self, volume: bytes) -> ScanReplica | None:
        for replica in self._replicas():
            if isinstance(replica, ScanReplica) and replica.spec.id == volume:
                return replica
        return None


async def _look(scan: ScanReplica) -> DiskIdentity | None:
    try:
        return await scan.looked()
    except OSError:
        return None
