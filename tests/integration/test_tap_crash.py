"""A tap that is killed: what was answered is there afterwards, and nobody else's write is overwritten."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3

from agent.capture import control
from agent.volumes import VolumeConfig
from farshore.errors import Conflict
from farshore.failpoints import known_failpoints
from farshore.nbd.client import connect as connect_nbd
from farshore.nbd.codec import RequestError
from farshore.stamps import Workload, check_prefix
from farshore.units import MIB
from farshore.workload import Ledger
from tests.harness.faults import Injected
from tests.harness.ledger import made
from tests.harness.tap import TapHost, wait_until
from tests.integration.test_tap_io import rebuilt

SIZE = 64 * MIB
WORKLOAD = Workload(seed=4711, first_block=16, block_count=4096)


@contextmanager
def load(host: TapHost, tmp_path: Path, rate: int = 4000) -> Iterator[Ledger]:
    """Stamped writes from a process of its own; its ledger outlives everything under test."""
    path = tmp_path / "ledger"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "farshore.workload", host.uri(), "--ledger", str(path)),
            *("--seed", str(WORKLOAD.seed), "--first-block", str(WORKLOAD.first_block)),
            *("--block-count", str(WORKLOAD.block_count), "--rate", str(rate), "--flush-seconds", "0.1"),
        ]
    )
    try:
        wait_until(lambda: made(path))
        time.sleep(0.3)
        ledger = Ledger(path)
        yield ledger
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        ledger.close()
    finally:
        process.kill()
        process.wait()


def check_disk(host: TapHost, config: VolumeConfig, ledger_path: Path) -> None:
    """The disk holds exactly the writes 1 to the last, as the journal does."""
    ledger = Ledger(ledger_path)
    state = ledger.state()
    ledger.close()
    assert state.acked == state.sent > 0
    assert state.errors == 0
    disk = Path(config.disk).read_bytes()
    report = check_prefix(WORKLOAD, lambda offset, length: disk[offset : offset + length])
    assert report.exact, report
    assert report.seq == state.acked
    assert rebuilt(host, config, bytes(SIZE)) == disk


def restart(host: TapHost) -> None:
    host.start()
    status = host.status()
    assert (status.mode, status.resync, status.why) == ("data", "", "")


@pytest.mark.fault("F1")
@pytest.mark.timeout(3600)
def test_kill_nine_at_random_under_load_loses_nothing(
    tmp_path: Path, injected: Injected, request: pytest.FixtureRequest
) -> None:
    kills = 500 if request.config.getoption("--nightly") else 6
    rng = random.Random(20)
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        host.start()
        redone = 0
        with load(host, tmp_path):
            for _ in range(kills):
                time.sleep(rng.uniform(0.1, 0.6))
                host.kill()
                injected("F1")
                restart(host)
                redone += max(0, host.status().redone)
        assert host.stop() == 0
        assert redone > 0
        check_disk(host, config, tmp_path / "ledger")


RUNNING = [
    "tap.append.before",
    "tap.append.after",
    "tap.sync.after",
    "tap.apply.before",
    "tap.apply.after",
    "tap.flush.before",
    "tap.flush.after",
    "tap.mark.before",
]
STARTING = ["tap.open.redone", "tap.open.redo_written", "tap.open.journal_opened", "tap.open.marked"]


@pytest.mark.fault("F1")
@pytest.mark.parametrize("hit", [12, *(pytest.param(hit, marks=pytest.mark.nightly) for hit in (1, 2, 60))])
@pytest.mark.parametrize("name", RUNNING)
def test_killed_between_two_steps_of_a_write(tmp_path: Path, name: str, hit: int, injected: Injected) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        host.start(env={"FARSHORE_FAILPOINTS": f"{name}=kill:{hit}"})
        with load(host, tmp_path):
            assert host.process is not None
            assert host.process.wait(timeout=60) == -signal.SIGKILL
            injected("F1")
            restart(host)
            time.sleep(0.3)
        assert host.stop() == 0
        check_disk(host, config, tmp_path / "ledger")


@pytest.mark.fault("F3")
@pytest.mark.parametrize("name", STARTING)
def test_killed_while_starting_again(tmp_path: Path, name: str, injected: Injected) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        host.start()
        with load(host, tmp_path):
            host.kill()
            for _ in range(2):
                with pytest.raises(AssertionError, match="not ready"):
                    host.start(env={"FARSHORE_FAILPOINTS": f"{name}=kill"})
                injected("F3")
            restart(host)
            time.sleep(0.3)
        assert host.stop() == 0
        check_disk(host, config, tmp_path / "ledger")


def test_every_failpoint_of_the_tap_is_used_by_a_test() -> None:
    ours = {name for name in known_failpoints() if name.startswith("tap.")}
    folder = Path(__file__).parent
    texts = "".join(path.read_text() for path in folder.glob("test_tap_*.py"))
    assert {name for name in ours if f'"{name}' not in texts} == set()


def hash_of(path: str) -> bytes:
    return blake3(Path(path).read_bytes()).digest()


@pytest.mark.fault("F38")
@pytest.mark.parametrize("stop", ["clean", "killed"])
def test_a_disk_written_behind_our_back_is_compared_not_redone(
    tmp_path: Path, stop: str, injected: Injected
) -> None:
    with TapHost(tmp_path / "agent") as host:
        # Nothing reaches the disk for a second: there is something to redo when the tap is killed.
        config = host.add(size=SIZE, group_commit_ms=1000.0)
        host.start()

        async def write() -> None:
            async with connect_nbd(host.socket(), "disk") as client:
                await client.write(0, b"logged" + bytes(4090))

        asyncio.run(write())
        if stop == "clean":
            assert host.stop() == 0
        else:
            host.kill()
        time.sleep(0.1)
        with open(config.disk, "r+b") as disk:
            disk.seek(MIB)
            disk.write(b"not through the tap")
        injected("F38")
        before = hash_of(config.disk)
        host.start()
        status = host.status()
        assert status.mode == "data"
        assert "changed" in status.resync
        assert status.redone == -1
        assert hash_of(config.disk) == before
        assert host.cut("t").decoded().volumes[0].fuzzy
        # It stays required through any stop, until the compare is done.
        assert host.stop() == 0
        host.start()
        assert host.status().resync
        host.call(control.ResyncDone("disk"), control.Done)
        assert not host.status().resync
        host.kill()
        host.start()
        assert not host.status().resync


@pytest.mark.fault("F3")
def test_killed_after_noting_that_a_compare_is_due(tmp_path: Path, injected: Injected) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        host.start()
        assert host.stop() == 0
        time.sleep(0.05)
        os.utime(config.disk)  # what a write by somebody else does to ctime
        with pytest.raises(AssertionError, match="not ready"):
            host.start(env={"FARSHORE_FAILPOINTS": "tap.open.resync_noted=kill"})
        injected("F3")
        host.start()
        assert host.status().resync


@pytest.mark.fault("F1")
def test_killed_at_the_end_of_an_orderly_stop(tmp_path: Path, injected: Injected) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        host.start(env={"FARSHORE_FAILPOINTS": "tap.stop.sealed=kill"})
        with load(host, tmp_path):
            time.sleep(0.2)
        assert host.stop() == -signal.SIGKILL
        injected("F1")
        restart(host)
        assert host.stop() == 0
        check_disk(host, config, tmp_path / "ledger")


def test_a_thread_that_fails_ends_the_tap_and_the_next_one_redoes(tmp_path: Path) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        host.start(env={"FARSHORE_FAILPOINTS": "tap.apply.before=raise:5"})
        with load(host, tmp_path):
            assert host.process is not None
            assert host.process.wait(timeout=30) == 70
            assert "tap_thread_failed" in host.log_text()
            restart(host)
        assert host.stop() == 0
        check_disk(host, config, tmp_path / "ledger")


@pytest.mark.fault("F11")
@pytest.mark.needs("strace")
def test_a_disk_whose_fdatasync_failed_is_written_again_by_the_next_start(
    tmp_path: Path, injected: Injected
) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        trace = ("strace", "-f", "-qq", "-o", "/dev/null", "-P", config.disk)
        host.start(*trace, "-e", "inject=fdatasync:error=EIO:when=1")

        async def write() -> None:
            async with connect_nbd(host.socket(), "disk") as client:
                await client.write(0, b"k" * 4096)
                for _ in range(2):  # the second fdatasync would return 0: it is not asked
                    with pytest.raises(RequestError):
                        await client.flush()
                with pytest.raises(RequestError):
                    await client.write(4096, b"l" * 4096)
                assert await client.read(0, 4096) == b"k" * 4096

        asyncio.run(write())
        status = host.status()
        assert "fdatasync" in status.failed
        injected("F11")
        assert status.stable_lsn == 0
        host.kill()
        host.start()
        assert host.status().redone == 1
        assert host.status().failed == ""


@pytest.mark.fault("F1")
def test_a_killed_tap_redoes_what_the_disk_does_not_have(tmp_path: Path, injected: Injected) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE, group_commit_ms=1000.0)
        host.start()
        content = os.urandom(4096)

        async def write() -> None:
            async with connect_nbd(host.socket(), "disk") as client:
                await client.write(4096, content)
                await client.zero(0, 4096)

        asyncio.run(write())
        host.kill()
        injected("F1")
        assert Path(config.disk).read_bytes()[4096:8192] == bytes(4096)
        host.start()
        assert host.status().redone == 2
        assert Path(config.disk).read_bytes()[4096:8192] == content


def test_the_supervisor_keeps_the_disk_from_others_while_the_tap_is_dead(tmp_path: Path) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE)
        host.start()

        async def hold() -> int:
            async with control.connect(host.layout.tap_socket) as tap:
                return await tap.hold("disk")

        held = asyncio.run(hold())
        try:
            host.kill()
            host.start()
            status = host.status()
            assert (status.mode, "locked" in status.why) == ("", True)

            async def give_back() -> control.VolumeStatus:
                async with control.connect(host.layout.tap_socket) as tap:
                    return await tap.protect("disk", held=held)

            served = asyncio.run(give_back())
            assert (served.mode, served.resync) == ("data", "")
        finally:
            os.close(held)
        other = tmp_path / "other.img"
        other.touch()
        os.truncate(other, SIZE)

        async def wrong() -> None:
            fd = os.open(other, os.O_RDWR)
            try:
                async with control.connect(host.layout.tap_socket) as tap:
                    await tap.unprotect("disk")
                    await tap.protect("disk", held=fd)
            finally:
                os.close(fd)

        with pytest.raises(Conflict, match="another one"):
            asyncio.run(wrong())
        assert Path(config.disk).exists()
