"""How old the newest recoverable state of a machine is, by the server's clock alone. Pure.

When PING goes out the time is noted; the PONG says which LSNs were captured when it was answered, so every
write answered before the PING is at or below them. Once those LSNs are vaulted in a cut that may be offered,
the state at the time of the PING can be recovered. No agent clock is in this; where nothing is known, nothing
is claimed.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from farshore.wire import messages as m

WAITING_MAX: Final = 1024
"""PONGs not yet vaulted; with more every second one is forgotten, which can only make the figure larger."""
PINGS_MAX: Final = 64

Positions = Mapping[bytes, tuple[bytes, int, int]]
"""Per volume: incarnation, ordinal, LSN of the newest cut."""


class RpoTracker:
    """Of one machine; lives as long as the server, across sessions."""

    def __init__(self) -> None:
        self._pings: dict[int, float] = {}
        self._waiting: deque[tuple[float, dict[bytes, tuple[bytes, int]]]] = deque()
        self._recoverable_at: float | None = None
        self._vaulted: Positions = {}
        self._offerable = False

    def rpo_s(self, now: float) -> float | None:
        """Return the age of the newest state that could be recovered, or None when that is not known."""
        return None if self._recoverable_at is None else max(0.0, now - self._recoverable_at)

    def ping(self, id: int, now: float) -> None:
        """A PING went out at ``now`` (monotonic)."""
        self._pings[id] = now
        while len(self._pings) > PINGS_MAX:
            del self._pings[next(iter(self._pings))]

    def pong(self, id: int, volumes: Sequence[m.VolumeStatus], expected: set[bytes]) -> None:
        """The answer to PING ``id``; ``expected`` are the volumes of the session."""
        sent_at = self._pings.pop(id, None)
        if sent_at is None or not expected or {volume.id for volume in volumes} != expected:
            return
        # Below data mode writes happen that take no LSN: such an answer proves nothing.
        if any(volume.capture_mode != "data" or volume.state != "protected" for volume in volumes):
            return
        captured = {volume.id: (volume.incarnation, volume.captured_lsn) for volume in volumes}
        self._waiting.append((sent_at, captured))
        if len(self._waiting) > WAITING_MAX:
            self._waiting = deque(
                item for n, item in enumerate(self._waiting) if n % 2 or n > WAITING_MAX - 8
            )
        self._settle()

    def vaulted(self, positions: Positions, *, offerable: bool) -> None:
        """The newest cut of the machine, as loaded or just committed."""
        self._vaulted, self._offerable = positions, offerable
        self._settle()

    def disconnected(self) -> None:
        """Answers of the old connection will not come."""
        self._pings.clear()

    def _settle(self) -> None:
        if not self._offerable:
            return
        while self._waiting and self._covered(self._waiting[0][1]):
            self._recoverable_at = self._waiting.popleft()[0]

    def _covered(self, captured: dict[bytes, tuple[bytes, int]]) -> bool:
        for volume, (incarnation, lsn) in captured.items():
            vaulted = self._vaulted.get(volume)
            if vaulted is None or vaulted[0] != incarnation or vaulted[2] < lsn:
                return False
        return True
