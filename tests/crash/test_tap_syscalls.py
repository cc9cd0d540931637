"""F2: the tap is killed at the n-th system call of a kind, whichever step that is; nothing answered is lost.

Segments are small, so that files are made and renamed all the time. ``--nightly`` takes many more numbers.
"""

import random
import signal
import time
from pathlib import Path

import pytest

from farshore.units import KIB
from tests.harness.faults import Injected
from tests.harness.tap import TapHost
from tests.integration.test_tap_crash import SIZE, check_disk, load, restart

CALLS = {
    # One trace for both names: which of the two Python uses depends on its version.
    "pwritev,pwritev2": 400,
    "recvfrom": 400,
    "io_submit": 120,
    "fdatasync": 120,
    "fsync": 30,
    "rename": 20,
    "fallocate": 8,
    "sendmsg": 400,
}
"""Kinds of calls, and the last one in a thread that is tried: it comes within the first seconds of load."""
SAMPLES = 2
SAMPLES_NIGHTLY = 40
REACHED_S = 120.0


def numbers(call: str, samples: int) -> list[int]:
    most = CALLS[call]
    return sorted(random.Random(call).sample(range(1, most + 1), min(samples, most)))


@pytest.mark.fault("F2")
@pytest.mark.needs("strace")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("call", list(CALLS))
def test_killed_at_any_system_call_nothing_answered_is_lost(
    tmp_path: Path, call: str, request: pytest.FixtureRequest, injected: Injected
) -> None:
    samples = SAMPLES_NIGHTLY if request.config.getoption("--nightly") else SAMPLES
    for number in numbers(call, samples):
        folder = tmp_path / str(number)
        folder.mkdir()
        with TapHost(folder / "agent") as host:
            config = host.add(size=SIZE, segment_bytes=256 * KIB)
            inject = ("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
            started = True
            try:
                host.start("strace", "-f", "-qq", "-o", "/dev/null", *inject)
            except AssertionError:
                started = False
                host.start()
            with load(host, folder):
                if started:
                    wait_for_death(host, f"{call} number {number}")
                    restart(host)
                injected("F2")
                time.sleep(0.2)
            assert host.stop() == 0
            check_disk(host, config, folder / "ledger")


def wait_for_death(host: TapHost, what: str) -> None:
    assert host.process is not None
    deadline = time.monotonic() + REACHED_S
    while host.process.poll() is None:
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)
    assert host.process.returncode == -signal.SIGKILL
