"""What is written, and read, beside the commits: maps of volumes, and the dedup index after a start."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from farshore.clock import Clock
from farshore.errors import FarshoreError, NotFound
from farshore.telemetry import get_logger
from process_server.vault.chain import Chain
from process_server.vault.changes import read_change
from process_server.vault.commit import CommitHead, Rows
from process_server.vault.dedup import DedupIndex
from process_server.vault.keys import VaultKeys
from process_server.vault.map import MapReader, SinceMap, map_due, newest_map, write_map
from process_server.vault.pack import PackReader
from process_server.vault.store import Store

TICK_S: Final = 30.0

log = get_logger()


@dataclass(slots=True)
class _Volume:
    """What came since the newest map of one volume; ``seq`` is the newest commit that lists it."""

    seq: int
    commits: int
    rows: int
    data_bytes: int
    since: float
    map: MapReader | None
    map_bytes: int


class MapKeeper:
    """Writes maps when they are due, one at a time and in a thread: a commit never waits for one."""

    def __init__(self, store: Store, keys: VaultKeys, clock: Clock) -> None:
        self._store, self._keys, self._clock = store, keys, clock
        self._volumes: dict[tuple[bytes, bytes], _Volume] = {}
        self._wake = asyncio.Event()

    async def note(self, machine: bytes, head: CommitHead, tables: dict[bytes, Rows]) -> None:
        """A commit was vaulted."""
        for entry in head.volumes:
            key = (machine, entry.id)
            volume = self._volumes.get(key)
            if volume is None:
                volume = self._volumes[key] = await asyncio.to_thread(self._load, machine, entry.id, head.seq)
            rows = tables.get(entry.id)
            volume.seq = head.seq
            volume.commits += 1
            volume.rows += len(rows) if rows is not None else 0
            volume.data_bytes += int(rows["length"].sum()) if rows is not None else 0
            if self._due(volume):
                self._wake.set()

    def _load(self, machine: bytes, volume: bytes, seq: int) -> _Volume:
        found = newest_map(self._store, self._keys, machine, volume, seq)
        before = found.head.seq if found is not None else 0
        return _Volume(seq, max(0, seq - before - 1), 0, 0, self._clock.monotonic(), found, 0)

    def _due(self, volume: _Volume) -> bool:
        seconds = self._clock.monotonic() - volume.since
        return map_due(SinceMap(volume.commits, volume.rows, volume.data_bytes, seconds, volume.map_bytes))

    async def run(self) -> None:
        """Write what is due, until cancelled; a map half written is none."""
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            for (machine, id), volume in list(self._volumes.items()):
                if not self._due(volume):
                    continue
                seq, started = volume.seq, self._clock.monotonic()
                volume.commits = volume.rows = volume.data_bytes = 0
                volume.since = started
                try:
                    volume.map = await asyncio.to_thread(
                        write_map, self._store, self._keys, machine, id, seq, volume.map
                    )
                except FarshoreError as exc:
                    # The commits say the same; the next one that is due covers this span too.
                    log.warning("map_not_written", machine=machine.hex(), volume=id.hex(), error=str(exc))
                    continue
                log.info(
                    "map_written",
                    machine=machine.hex(),
                    volume=id.hex(),
                    seq=seq,
                    duration_s=round(self._clock.monotonic() - started, 3),
                )


def rebuild_index(store: Store, keys: VaultKeys, machines: list[bytes]) -> DedupIndex:
    """Return an index of what the vault has of ``machines``. Blocking: a ranged read per pack.

    What cannot be read is left out and stored again when it comes: the index is a cache.
    """
    index = DedupIndex()
    reader = PackReader(store, keys)
    for machine in machines:
        try:
            bad = index.rebuild(machine, _packs(store, keys, machine), reader)
        except FarshoreError as exc:
            log.warning("index_not_rebuilt", machine=machine.hex(), error=str(exc))
            continue
        if bad:
            log.error("packs_damaged", machine=machine.hex(), packs=len(bad), error=str(bad[0][1]))
    return index


def _packs(store: Store, keys: VaultKeys, machine: bytes) -> Iterator[bytes]:
    """Yield the packs that a machine's newest maps, and the commits after the oldest of them, point into."""
    chain = Chain(store, keys, machine)
    newest = chain.load_head()
    if newest is None:
        return
    seen: set[bytes] = set()
    after = newest.head.seq
    for volume in newest.head.volumes:
        found = newest_map(store, keys, machine, volume.id, newest.head.seq)
        after = min(after, found.head.seq if found is not None else 0)
        for ref in found.head.packs if found is not None else ():
            if ref.holder is None and ref.id not in seen:
                seen.add(ref.id)
                yield ref.id
    for seq in range(after + 1, newest.head.seq + 1):
        try:
            change = read_change(store, keys, machine, seq)
        except NotFound:
            continue
        for pack in change.head.packs:
            if pack.inline is None and pack.id not in seen:
                seen.add(pack.id)
                yield pack.id
