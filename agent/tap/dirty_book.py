"""The regions of a served volume that no record has."""

import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from agent.journal.dirty import DirtyMap
from agent.journal.errors import JournalFailed


class DirtyBook:
    """The dirty map's file, and the bits that it could not be given yet.

    What touches the file runs in one thread, the volume's side thread; `note` and the counters in any.
    """

    def __init__(self, folder: Path, dirty_map: DirtyMap, size_bytes: int) -> None:
        self._path, self._map, self._size_bytes = folder / "dirty", dirty_map, size_bytes
        self._extra: set[int] = set()  # regions that the file does not have
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Regions marked, in the file or in memory."""
        return self._map.count + len(self._extra)

    @property
    def region_bytes(self) -> int:
        return self._map.region_bytes

    def note(self, rows: Iterable[tuple[int, int]]) -> None:
        """Mark the regions of these extents (offset, length) in memory only."""
        region = self.region_bytes
        with self._lock:
            for offset, length in rows:
                self._extra.update(range(offset // region, (offset + length - 1) // region + 1))

    def write(self, rows: Iterable[tuple[int, int]]) -> None:
        """Mark them in the file; not durable before `sync`. Raises JournalFailed."""
        for offset, length in rows:
            self._map.set(offset, length, write=False)
        self._map.write_bits()

    def sync(self) -> None:
        """Make what the file has durable. Raises JournalFailed."""
        self._map.sync()

    def keep(self) -> None:
        """Bring the bits that are only in memory into the file, durably. Raises JournalFailed."""
        with self._lock:
            extra = sorted(self._extra)
        region = self.region_bytes
        try:
            self.write([(at * region, self._length(at)) for at in extra])
            self.sync()
        except JournalFailed:
            # The file is not trusted any more; one made anew gets every bit before it takes its place in use.
            known = [*self._map.regions().tolist(), *extra]
            fresh = DirtyMap.create(self._path, self._size_bytes)
            for at in known:
                fresh.set(at * region, self._length(at), write=False)
            fresh.sync()
            self._map.close()
            self._map = fresh
        with self._lock:
            self._extra.difference_update(extra)

    def begin_round(self) -> tuple[int, bytes]:
        """Begin a round of copying: its number, and the regions as a bitmap, least significant bit first."""
        number = self._map.begin_round()
        bits = np.zeros(self._map.region_count, np.bool_)
        bits[self._map.regions()] = True
        with self._lock:
            bits[sorted(self._extra)] = True
        return number, np.packbits(bits, bitorder="little").tobytes()

    def clear(self, regions: list[int], number: int) -> int:
        """Unmark what was copied in round ``number`` and not marked since; returns how many."""
        cleared = self._map.clear(regions, copy_round=number)
        self._map.write_bits()
        return cleared

    def _length(self, index: int) -> int:
        return min(self.region_bytes, self._size_bytes - index * self.region_bytes)
