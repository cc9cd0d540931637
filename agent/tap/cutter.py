"""Cuts: one look at the LSNs of all volumes, between two requests."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from farshore.clock import Clock
from farshore.config import write_private
from farshore.hrl.cut import Cut, CutVolume

RESERVED: Final = 1 << 40
"""Sequence numbers are the time in ns where that has moved on; 18 minutes of them are set aside at once."""


class CutNumbers:
    """Hands out sequence numbers that never go back, not even when the clock does or the tap is killed.

    A bound is kept on disk and moved before it is reached, by a thread of its own: `next` never waits.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        """Reads and moves the bound; blocks. Raises CapacityError or Failed."""
        self._path, self._clock = path, clock
        try:
            self._last = int(path.read_text())
        except (OSError, ValueError):
            self._last = 0
        self._bound = 0
        self._moving = threading.Lock()
        self._move(max(self._last, clock.wall_ns()))

    def next(self) -> int:
        """Return the next number. Raises OSError when the bound could not be moved in a long time."""
        number = max(self._last + 1, self._clock.wall_ns())
        if number + RESERVED // 2 > self._bound and self._moving.acquire(blocking=False):
            threading.Thread(target=self._move_and_release, args=(number,), daemon=True).start()
        if number >= self._bound:
            raise OSError(os.EX_IOERR, "cannot keep the number of cuts", str(self._path))
        self._last = number
        return number

    def _move_and_release(self, number: int) -> None:
        try:
            self._move(number)
        finally:
            self._moving.release()

    def _move(self, number: int) -> None:
        bound = number + RESERVED
        write_private(self._path, b"%d" % bound)
        self._bound = bound


class Cuttable(Protocol):
    """What a cut asks of a volume."""

    @property
    def id(self) -> bytes: ...

    @property
    def incarnation(self) -> bytes: ...

    @property
    def lsn(self) -> int: ...

    @property
    def captured_lsn(self) -> int: ...

    @property
    def logs(self) -> bool: ...

    @property
    def changed(self) -> bool: ...

    @property
    def fuzzy(self) -> bool: ...


def plan_cut(volumes: Sequence[Cuttable], seq: int, time_ns: int, tag: str | None) -> tuple[Cut, list[int]]:
    """Return the cut, and the indexes of the volumes whose journals get its MARK.

    A MARK goes to each volume with records since the last cut, and is inside of the cut itself. Where nothing
    changed, only a tag makes one. Volumes below data mode cannot log it; their last captured LSN counts.
    """
    marked = [at for at, volume in enumerate(volumes) if volume.logs and volume.changed]
    if not marked and tag is not None:
        marked = [at for at, volume in enumerate(volumes) if volume.logs][:1]
    entries = []
    for at, volume in enumerate(volumes):
        lsn = volume.lsn + 1 if at in marked else volume.lsn if volume.logs else volume.captured_lsn
        entries.append(CutVolume(volume.id, volume.incarnation, lsn, volume.fuzzy))
    return Cut(seq, time_ns, tag, tuple(entries)), marked
