"""A clock that moves only when told to."""


class ManualClock:
    """A `farshore.clock.Clock` for tests: both clocks advance together, the wall clock can also jump."""

    def __init__(self, *, wall_ns: int = 1_700_000_000_000_000_000, monotonic: float = 1000.0) -> None:
        self._wall_ns, self._monotonic = wall_ns, monotonic

    def wall_ns(self) -> int:
        return self._wall_ns

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass on both clocks."""
        assert seconds >= 0, "time does not run backwards; a wall clock does: jump_wall"
        self._wall_ns += round(seconds * 1e9)
        self._monotonic += seconds

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as NTP or an operator does; monotonic time does not notice."""
        self._wall_ns += round(seconds * 1e9)
