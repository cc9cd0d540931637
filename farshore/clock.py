"""Time, as an argument: services take a `Clock`, so that tests decide what time it is."""

import time
from typing import Protocol


class Clock(Protocol):
    """The two clocks a service may ask. They are never mixed: a difference is taken on one of them only."""

    def wall_ns(self) -> int:
        """Return nanoseconds since 1970 UTC. May jump either way; for people and between hosts."""
        ...

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start, never going back; for timeouts, ages and rates."""
        ...


class SystemClock:
    """The clocks of this host."""

    __slots__ = ()

    def wall_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()
