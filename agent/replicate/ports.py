"""What replication needs from the rest of the agent, so that it can be tested without a tap or a disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.journal.reader import IncarnationStart
from farshore.hrl.batch import Batch
from farshore.hrl.cut import Cut


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """A protected volume as replication sees it.

    Attributes:
        disk: What copiers read.
        folder: The volume's folder; holds the journal.
        state_page: Where the tap publishes its counters.
    """

    id: bytes
    name: str
    disk: Path
    size_bytes: int
    sector_bytes: int
    folder: Path
    state_page: Path


Item = IncarnationStart | Batch


class Journal(Protocol):
    """The durable records of one volume, in order; `agent.journal.reader.JournalReader` is one.

    Calls block on the disk; one thread at a time.
    """

    def position(self, incarnation_id: bytes, lsn: int, digest: bytes) -> bool:
        """Go behind the record ``lsn`` of an incarnation; False when it is not here with that digest."""
        ...

    def start_at_oldest(self) -> None:
        """Go before the first record of the oldest whole incarnation. Raises JournalGap."""
        ...

    def start_at_newest(self) -> None:
        """Go before the first record of the newest incarnation. Raises JournalGap."""
        ...

    def read(self, durable: tuple[bytes, int], bytes_max: int) -> list[Item]:
        """Return what is durable and not yet read, about ``bytes_max`` at most; empty: nothing now.

        Raises:
            CorruptRecord, JournalGap: Only a resync helps.
        """
        ...

    def announce(self, durable: tuple[bytes, int]) -> list[Item]:
        """After `read` returned nothing: the start of an incarnation that has no record yet."""
        ...


@dataclass(frozen=True, slots=True)
class DirtyRegions:
    """What the dirty map holds, and the round that a later `Tap.dirty_clear` belongs to."""

    round: int
    region_bytes: int
    regions: tuple[int, ...]


class Tap(Protocol):
    """The tap's control socket. Every call may raise Unreachable: the tap is being started again."""

    async def cut(self, tag: str | None) -> Cut:
        """Take a cut over all volumes; its MARK is durable in the journals when this returns."""
        ...

    async def vaulted(self, volume: bytes, incarnation: bytes, lsn: int) -> None: ...

    async def dirty(self, volume: bytes) -> DirtyRegions: ...

    async def dirty_clear(self, volume: bytes, round: int, regions: tuple[int, ...]) -> None: ...

    async def resync_required(self, volume: bytes, above_lsn: int, above_ordinal: int) -> None:
        """Open a new incarnation above both, and keep in mind that the vault needs a full compare."""
        ...

    async def resync_done(self, volume: bytes) -> None: ...


class Counters(Protocol):
    """Where a session counts; `agent.metrics` implements it."""

    def sent(self, stage: str, count: int) -> None: ...

    def record(self, what: str, count: int) -> None: ...
