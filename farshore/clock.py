"""Time, as an argument: services take a `Clock`, so that tests decide what time it is."""

import time
from datetime import UTC, datetime
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


def format_time(time_ns: int) -> str:
    """Return a time (ns since 1970) as RFC 3339 in UTC, to the microsecond."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"
