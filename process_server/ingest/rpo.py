"""How old the newest recoverable state of a machine is, by the server's clock alone. Pure.

When PING goes out the time is noted; the PONG says which LSNs were captured when it was answered, so every
write answered before the PING is at or below them. Once those LSNs are vaulted in a cut that may be offered,
the state at the time of the PING can be recovered. No agent clock is in this; where nothing is known, nothing
is claimed.

A volume that is scanned has no records: what is on its disk when it answers is carried by the pass that
begins next. So its age counts from the last answer before the newest vaulted pass began, never from a later
one.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from farshore.wire import messages as m

WAITING_MAX: Final = 1024
"""PONGs not yet vaulted; with more some are forgotten, which can only make the figure larger, and by no more
than a few thousandths of the time they span."""
PINGS_MAX: Final = 64

Positions = Mapping[bytes, tuple[bytes, int, int]]
"""Per volume: incarnation, ordinal, LSN of the newest cut."""
_ANY: Final = b""


class RpoTracker:
    """Of one machine, or of one of its volumes; lives as long as the server, across sessions."""

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
        captured = {}
        for volume in volumes:
            if (needed := _needed(volume)) is None:
                return
            captured[volume.id] = needed
        if self._waiting and self._waiting[-1][1] == captured:
            self._waiting.pop()  # as much is proved by this one, of a later moment
        self._waiting.append((sent_at, captured))
        if len(self._waiting) > WAITING_MAX:
            self._thin_out()
        self._settle()

    def _thin_out(self) -> None:
        """Keep about half of the answers, evenly over the time: an old one may be the next to be covered."""
        apart_s = (self._waiting[-1][0] - self._waiting[0][0]) * 2 / WAITING_MAX
        kept: deque[tuple[float, dict[bytes, tuple[bytes, int]]]] = deque()
        for item in self._waiting:
            if not kept or item[0] - kept[-1][0] >= apart_s:
                kept.append(item)
        self._waiting = kept if len(kept) <= WAITING_MAX else deque(list(kept)[::2])

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
        # From the newest on: what is covered makes all answers before it superfluous, also those of an
        # incarnation that ended and is nowhere in the vault by that name any more.
        for at in range(len(self._waiting) - 1, -1, -1):
            if self._covered(self._waiting[at][1]):
                self._recoverable_at = self._waiting[at][0]
                for _ in range(at + 1):
                    self._waiting.popleft()
                return

    def _covered(self, captured: dict[bytes, tuple[bytes, int]]) -> bool:
        for volume, (incarnation, lsn) in captured.items():
            vaulted = self._vaulted.get(volume)
            if vaulted is None or incarnation not in (_ANY, vaulted[0]) or vaulted[2] < lsn:
                return False
        return True


class MachineRpo:
    """The age of a machine as a whole, and of each volume alone: one that is fuzzy hides only the former."""

    def __init__(self) -> None:
        self._whole = RpoTracker()
        self._each: dict[bytes, RpoTracker] = {}
        self._vaulted: Positions = {}
        self._fuzzy: Collection[bytes] = ()

    def rpo_s(self, now: float) -> float | None:
        """As `RpoTracker.rpo_s`, of a state of all volumes."""
        return self._whole.rpo_s(now)

    def volume_rpo_s(self, volume: bytes, now: float) -> float | None:
        """As `RpoTracker.rpo_s`, of one volume by itself."""
        tracker = self._each.get(volume)
        return tracker.rpo_s(now) if tracker is not None else None

    def ping(self, id: int, now: float) -> None:
        """A PING went out at ``now`` (monotonic)."""
        self._whole.ping(id, now)
        for tracker in self._each.values():
            tracker.ping(id, now)

    def pong(self, id: int, volumes: Sequence[m.VolumeStatus], expected: set[bytes]) -> None:
        """The answer to PING ``id``; ``expected`` are the volumes of the session."""
        self._whole.pong(id, volumes, expected)
        for volume in volumes:
            if volume.id in self._each:
                self._each[volume.id].pong(id, (volume,), {volume.id})
            elif volume.id in expected:
                tracker = self._each[volume.id] = RpoTracker()
                tracker.vaulted(self._vaulted, offerable=volume.id not in self._fuzzy)
        for gone in self._each.keys() - expected:
            del self._each[gone]

    def vaulted(self, positions: Positions, *, offerable: bool, fuzzy: Collection[bytes]) -> None:
        """The newest cut of the machine, as loaded or just committed; ``fuzzy`` volumes of it."""
        self._vaulted, self._fuzzy = positions, fuzzy
        self._whole.vaulted(positions, offerable=offerable)
        for id, tracker in self._each.items():
            tracker.vaulted(positions, offerable=id not in fuzzy)

    def disconnected(self) -> None:
        """Answers of the old connection will not come."""
        for tracker in (self._whole, *self._each.values()):
            tracker.disconnected()


def _needed(volume: m.VolumeStatus) -> tuple[bytes, int] | None:
    """Incarnation and LSN that must be vaulted for what an answer speaks of; None: it proves nothing."""
    if volume.capture_mode == "scan":
        # Passes are numbered on and on, whatever their incarnations are called.
        return (_ANY, volume.next_pass) if volume.next_pass else None
    # Below data mode writes happen that take no LSN.
    if volume.capture_mode != "data" or volume.state != "protected":
        return None
    return volume.incarnation, volume.captured_lsn
