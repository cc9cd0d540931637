import time

from farshore.clock import Clock, SystemClock
from tests.fakes.clock import ManualClock


def test_the_system_clock_is_the_time() -> None:
    clock: Clock = SystemClock()
    assert abs(clock.wall_ns() - time.time_ns()) < 5_000_000_000
    assert abs(clock.monotonic() - time.monotonic()) < 5


def test_the_manual_clock_moves_only_when_told() -> None:
    manual = ManualClock()
    clock: Clock = manual
    wall, monotonic = clock.wall_ns(), clock.monotonic()
    manual.advance(1.5)
    assert (clock.wall_ns() - wall, clock.monotonic() - monotonic) == (1_500_000_000, 1.5)
    manual.jump_wall(-3600)
    assert clock.wall_ns() < wall
    assert clock.monotonic() - monotonic == 1.5
