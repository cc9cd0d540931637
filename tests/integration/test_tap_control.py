"""The control socket: what it is asked, what it refuses, and what it is not impressed by."""

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import volumes
from agent.capture import control
from agent.capture.control import Done, Hello, Status, TapStatus, Welcome
from agent.journal.state import DATA, StatePageReader
from farshore.errors import Conflict, NotFound, Unreachable, UsageError
from farshore.nbd.client import connect
from farshore.units import KIB, MIB
from tests.harness.tap import MACHINE, TapHost, wait_until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[TapHost]:
    with TapHost(tmp_path / "agent") as made:
        yield made


def test_protecting_and_unprotecting_while_it_runs(host: TapHost) -> None:
    host.start()
    assert host.call(Status(), TapStatus).volumes == ()
    welcome = host.call(Hello(), Welcome)
    assert (welcome.pid, welcome.machine.hex()) == (host.ready["pid"], MACHINE)

    async def story() -> None:
        async with control.connect(host.layout.tap_socket) as tap:
            with pytest.raises(NotFound, match="no such volume"):
                await tap.protect("disk")
            config = host.add(size=MIB)
            served = await tap.protect("disk")
            assert (served.mode, served.size_bytes, served.disk) == ("data", MIB, config.disk)
            assert await tap.protect("disk") == served
            async with connect(host.socket(), "disk") as client:
                await client.write(0, b"a" * 512)
            await tap.unprotect("disk")
            assert (await tap.status()).volumes == ()
            assert Path(config.disk).read_bytes()[:512] == b"a" * 512  # noqa: ASYNC240
            with pytest.raises(NotFound):
                await tap.vaulted("disk", bytes(16), 1)
            again = await tap.protect("disk")
            assert (again.lsn, again.resync) == (1, "")
            await tap.stop()

    asyncio.run(story())
    assert host.process is not None
    assert host.process.wait(timeout=20) == 0


def test_the_same_disk_twice_is_refused_by_the_second(host: TapHost) -> None:
    one = host.add("one", MIB)
    host.start()
    host.add("two", disk=one.disk)
    with pytest.raises(Conflict, match="one"):
        host.call(control.Protect("two"), control.VolumeStatus)
    assert [v.mode for v in host.call(Status(), TapStatus).volumes] == ["data", ""]


def test_one_volume_that_cannot_be_served_does_not_keep_the_others(host: TapHost) -> None:
    host.add("good", MIB)
    gone = host.add("gone", MIB)
    os.unlink(gone.disk)
    host.start()
    assert (host.status("good").mode, host.status("gone").mode) == ("data", "")
    assert "no such disk" in host.status("gone").why
    cut = host.cut("x").decoded()
    assert {v.volume: v.fuzzy for v in cut.volumes}[gone.id_bytes]
    with pytest.raises(Conflict, match="not served"):
        host.call(control.Dirty("gone"), control.DirtyMapIs)


def test_a_second_tap_is_refused(host: TapHost) -> None:
    host.add(size=MIB)
    host.start()
    other = subprocess.run(
        [sys.executable, "-m", "agent.tap", str(host.directory)], capture_output=True, text=True, check=False
    )
    assert other.returncode == 3
    assert "listens there already" in other.stderr
    assert host.status().mode == "data"


def test_not_enrolled_is_said_with_3(tmp_path: Path) -> None:
    tap = subprocess.run(
        [sys.executable, "-m", "agent.tap", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert tap.returncode == 3
    assert "not enrolled" in tap.stderr


@pytest.mark.parametrize(
    "message",
    [b"\xff\xff\xff\xff", b"\x01\x00\x01\x01" + bytes(100), b"\x04\x00\x00\x00abcd", b"\x01\x00\x00\x00\x80"],
    ids=["endless", "beyond-bound", "no-messagepack", "no-type"],
)
def test_garbage_is_refused_and_nobody_else_notices(host: TapHost, message: bytes) -> None:
    host.add(size=MIB)
    host.start()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        peer.connect(str(host.layout.tap_socket))
        peer.sendall(message)
        answer = peer.recv(4096)
        assert answer == b"" or b"not a request" in answer
    assert host.status().mode == "data"


def test_errors_keep_their_kind_and_words(host: TapHost) -> None:
    host.start()
    with pytest.raises(NotFound) as caught:
        host.call(control.ResyncDone("nope"), Done)
    assert (caught.value.what, caught.value.where) == ("there is no such volume", "nope")
    error = control.Refused.of(UsageError("a", where="b", why="c", fix="d")).exception()
    assert (type(error), str(error)) == (UsageError, "a: b: c; d")


def test_no_tap_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        control.call(tmp_path / "none", Hello(), Welcome)

    async def story() -> None:
        with pytest.raises(Unreachable, match="no tap"):
            async with control.connect(tmp_path / "none"):
                pass

    asyncio.run(story())


def test_the_state_page_follows_and_beats(host: TapHost) -> None:
    config = host.add(size=MIB)
    host.start()
    page = StatePageReader(volumes.state_page(host.directory, config))

    async def story() -> None:
        async with connect(host.socket(), "disk") as client:
            for _ in range(20):
                await client.write(0, bytes(4096))
            assert page.read().captured_lsn >= 0
            await client.flush()

    asyncio.run(story())
    state = page.read()
    assert (state.captured_lsn, state.durable_lsn, state.capture_mode) == (20, 20, DATA)
    wait_until(lambda: page.read().stable_lsn == page.read().applied_lsn == 20)
    first = page.read().heartbeat_ns
    wait_until(lambda: page.read().heartbeat_ns > first, timeout_s=1)
    assert page.read().process_id == host.ready["pid"]
    page.close()


def test_what_is_vaulted_is_freed_and_recycled(host: TapHost) -> None:
    host.add(size=16 * MIB, segment_bytes=MIB, quota_bytes=4 * MIB)
    host.start()
    folder = host.layout.volume("disk")

    async def write(client_writes: int) -> None:
        async with connect(host.socket(), "disk") as client:
            for at in range(client_writes):
                await client.write(at % 16 * MIB, os.urandom(128 * 1024))
            await client.flush()

    for _ in range(8):
        asyncio.run(write(12))
        assert host.status().mode == "data"
        wait_until(lambda: host.status().stable_lsn == host.status().captured_lsn)
        host.vaulted()
    assert host.status().backlog_bytes <= 2 * MIB
    assert sum(path.stat().st_size for path in folder.glob("*.hrl")) <= 4 * MIB
    assert host.stop() == 0


@pytest.mark.needs("strace")
@pytest.mark.parametrize("write_bytes", [32 * KIB, MIB])
def test_memory_stays_bounded_when_the_disk_is_slow(host: TapHost, write_bytes: int) -> None:
    """160 MiB to a disk that takes 80 MB/s: at most 64 MiB wait, and nothing is lost."""
    host.add(size=160 * MIB)
    slow = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=io_submit"]
    # 4 MiB a call past the page cache, 2 MiB through it.
    delay_s = 0.05 if write_bytes == MIB else 0.025
    host.start(*slow, "-e", f"inject=io_submit:delay_enter={delay_s * 1e6:.0f}")

    async def story() -> int:
        highest = 0
        async with connect(host.socket(), "disk") as client:
            content = os.urandom(write_bytes)
            places = range(0, 160 * MIB, write_bytes)
            jobs = [asyncio.ensure_future(client.write(at, content)) for at in places]
            while not all(job.done() for job in jobs):
                status = await asyncio.to_thread(host.status)
                highest = max(highest, status.held_bytes)
                await asyncio.sleep(0.01)
            await asyncio.gather(*jobs)
            await client.flush()
            assert await client.read(places[-1], write_bytes) == content
        return highest

    assert 48 * MIB < asyncio.run(story()) <= 66 * MIB
    rss = int(Path(f"/proc/{host.ready['pid']}/statm").read_text().split()[1]) * resource.getpagesize()
    assert rss < 400 * MIB
