"""Below data mode and back: a journal that is full, fails or hangs is not the workload's trouble."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent import volumes
from agent.capture import control
from agent.capture.control import Cleared, DirtyClear
from agent.journal.recovery import recover, redo_records
from agent.volumes import VolumeConfig
from farshore.errors import Conflict, Unreachable
from farshore.hrl.batch import WRITE, ZERO
from farshore.nbd.client import connect
from farshore.nbd.codec import RequestError
from farshore.stamps import check_prefix
from farshore.units import KIB, MIB
from farshore.workload import Ledger
from tests.harness.faults import Injected
from tests.harness.tap import MACHINE, TapHost, wait_until
from tests.integration.test_tap_crash import SIZE, WORKLOAD, load

SMALL: dict[str, Any] = {"segment_bytes": MIB, "quota_bytes": 4 * MIB}


class Vault:
    """What the records sent so far make of the volume, and what the copies of dirty regions add."""

    def __init__(self, host: TapHost, config: VolumeConfig) -> None:
        self._host, self._config = host, config
        self.image = bytearray(config_bytes(config))
        self.lsn = 0

    def take_in(self) -> None:
        """All records there are."""
        folder = self._host.layout.volume(self._config.name)
        found = recover(folder, bytes.fromhex(MACHINE), self._config.id_bytes, every_byte=True)
        for batch in redo_records(found, self.lsn):
            at = 0
            for index, record in enumerate(batch.records):
                offset, length = int(record["offset"]), int(record["length"])
                if batch.first_lsn + index > self.lsn:
                    if record["type"] == WRITE:
                        self.image[offset : offset + length] = batch.payload[at : at + length]
                    elif record["type"] == ZERO:
                        self.image[offset : offset + length] = bytes(length)
                at += int(record["payload_length"])
            self.lsn = batch.last_lsn

    def copy(self, regions: list[int], region_bytes: int) -> None:
        disk = config_bytes(self._config)
        for region in regions:
            part = slice(region * region_bytes, (region + 1) * region_bytes)
            self.image[part] = disk[part]


def config_bytes(config: VolumeConfig) -> bytes:
    return Path(config.disk).read_bytes()


@contextmanager
def made(tmp_path: Path, **settings: Any) -> Iterator[tuple[TapHost, VolumeConfig]]:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE, **settings)
        yield host, config


def check_disk(config: VolumeConfig, ledger_path: Path) -> None:
    ledger = Ledger(ledger_path)
    state = ledger.state()
    ledger.close()
    assert state.errors == 0
    assert state.acked == state.sent > 0
    disk = config_bytes(config)
    report = check_prefix(WORKLOAD, lambda offset, length: disk[offset : offset + length])
    assert report.exact
    assert report.seq == state.acked


@pytest.mark.fault("F10")
def test_a_full_quota_leads_to_the_dirty_map_and_room_leads_back(tmp_path: Path, injected: Injected) -> None:
    with made(tmp_path, **SMALL) as (host, config):
        vault = Vault(host, config)
        host.start()
        with load(host, tmp_path, 2000):
            wait_until(lambda: host.status().mode == "bitmap", what="the quota is never full")
            status = host.status()
            assert "quota" in status.why
            injected("F10")
            assert not status.lost
            first = status.incarnation
            wait_until(lambda: host.status().dirty_regions > 0)
            assert host.cut("in bitmap mode").decoded().volumes[0].fuzzy
            with pytest.raises(Conflict):
                host.call(DirtyClear("disk", host.dirty().round, (0,)), Cleared)
            vault.take_in()
            host.vaulted(lsn=vault.lsn)
            wait_until(lambda: host.status().mode == "data", what="it does not climb back")
            status = host.status()
            assert status.incarnation != first
            assert status.dirty_regions > 0
            assert host.cut("not yet").decoded().volumes[0].fuzzy
        wait_until(lambda: host.status().held_bytes == 0)
        assert host.status().mode == "data"
        dirty = host.dirty()
        regions = dirty.regions()
        vault.take_in()
        vault.copy(regions, dirty.region_bytes)
        cleared = host.call(DirtyClear("disk", dirty.round, tuple(regions)), Cleared)
        assert cleared.count == len(regions) > 0
        assert not host.cut("sound again").decoded().volumes[0].fuzzy
        assert host.stop() == 0
        check_disk(config, tmp_path / "ledger")
        assert bytes(vault.image) == config_bytes(config)


def test_a_round_of_copying_from_before_a_fall_clears_nothing(tmp_path: Path) -> None:
    with made(tmp_path, **SMALL) as (host, config):
        vault = Vault(host, config)
        host.start()
        with load(host, tmp_path, 2000):
            wait_until(lambda: host.status().dirty_regions > 0)
            old = host.dirty()
            vault.take_in()
            host.vaulted(lsn=vault.lsn)
            wait_until(lambda: host.status().mode == "data")
            with pytest.raises(Conflict, match="changed"):
                host.call(DirtyClear("disk", old.round, tuple(old.regions())), Cleared)


LEAVING = ["tap.leave.synced", "tap.leave.flushed", "tap.pass.first", "tap.dirty.set"]


@pytest.mark.fault("F1")
@pytest.mark.parametrize("name", LEAVING)
def test_killed_on_the_way_down(tmp_path: Path, name: str, injected: Injected) -> None:
    """Records, and copies of what the dirty map names, make the disk: no write is in neither."""
    with made(tmp_path, **SMALL) as (host, config):
        vault = Vault(host, config)
        host.start(env={"FARSHORE_FAILPOINTS": f"{name}=kill:1"})
        with load(host, tmp_path, 2000):
            assert host.process is not None
            assert host.process.wait(timeout=60) == -signal.SIGKILL
            injected("F1")
            vault.take_in()
            host.start()
            assert host.status().resync == ""
            wait_until(lambda: host.status().mode == "bitmap" and host.status().dirty_regions > 0)
        wait_until(lambda: host.status().held_bytes == 0)
        dirty = host.dirty()
        assert host.stop() == 0
        check_disk(config, tmp_path / "ledger")
        vault.take_in()
        vault.copy(dirty.regions(), dirty.region_bytes)
        assert bytes(vault.image) == config_bytes(config)


@pytest.mark.fault("F1")
def test_killed_on_the_way_up(tmp_path: Path, injected: Injected) -> None:
    with made(tmp_path, **SMALL) as (host, config):
        vault = Vault(host, config)
        host.start(env={"FARSHORE_FAILPOINTS": "tap.climb.recovered=kill"})
        with load(host, tmp_path, 2000):
            wait_until(lambda: host.status().dirty_regions > 0)
            vault.take_in()
            with suppress(Unreachable):
                host.vaulted(lsn=vault.lsn)
            assert host.process is not None
            assert host.process.wait(timeout=30) == -signal.SIGKILL
            injected("F1")
            host.start()
            assert host.status().resync == ""
            wait_until(lambda: host.status().held_bytes == 0 or host.status().mode == "bitmap")
        dirty = host.dirty()
        vault.take_in()
        assert host.stop() == 0
        check_disk(config, tmp_path / "ledger")
        vault.copy(dirty.regions(), dirty.region_bytes)
        assert bytes(vault.image) == config_bytes(config)


def strace(host: TapHost, *inject: str) -> list[str]:
    """Wrap the tap so that a call on the first segment's file is tampered with."""
    segment = host.layout.volume("disk") / "seg-00000000000000000001.hrl"
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(segment), *inject]


@pytest.mark.fault("F11")
@pytest.mark.needs("strace")
def test_a_journal_that_cannot_be_synced_is_left_without_an_error_to_the_workload(
    tmp_path: Path, injected: Injected
) -> None:
    with made(tmp_path) as (host, config):
        host.start(*strace(host, "-e", "inject=fdatasync:error=EIO:when=20"))
        with load(host, tmp_path, 1000):
            wait_until(lambda: "journal_in_trouble" in host.log_text(), what="nobody noticed")
            injected("F11")
            wait_until(lambda: host.status().dirty_regions > 0)
            # It is no longer trusted; a new incarnation is opened by itself after a while.
            wait_until(lambda: host.status().mode == "data", what="it does not climb back")
            status = host.status()
            assert not status.lost
            assert host.cut("t").decoded().volumes[0].fuzzy
        assert host.stop() == 0
        check_disk(config, tmp_path / "ledger")


@pytest.mark.alone
@pytest.mark.fault("F13")
@pytest.mark.needs("strace")
def test_a_journal_that_hangs_delays_the_workload_no_longer_than_agreed(
    tmp_path: Path, injected: Injected
) -> None:
    with made(tmp_path, journal_stall_max_s=1.0) as (host, config):
        host.start(*strace(host, "-e", "inject=pwritev,pwritev2:delay_enter=6000000:when=40"))
        longest = Longest()
        with load(host, tmp_path, 500):
            asyncio.run(longest.watch(host, 5.0))
            status = host.status()
            assert (status.mode, status.lost) == ("bitmap", True)
            injected("F13")
            assert status.dirty_regions > 0
            wait_until(lambda: host.status().mode == "data", what="it does not climb back")
            wait_until(lambda: not host.status().lost, what="its dirty bits are not kept")
        assert 0.5 < longest.seconds < 1.0 + 0.8
        assert host.stop() == 0
        check_disk(config, tmp_path / "ledger")
        host.start()
        assert host.status().resync == ""


@pytest.mark.needs("strace")
def test_a_tap_killed_while_its_journal_is_lost_needs_a_compare(tmp_path: Path) -> None:
    with made(tmp_path, journal_stall_max_s=0.5) as (host, _config):
        host.start(*strace(host, "-e", "inject=pwritev,pwritev2:delay_enter=60000000:when=40"))
        with load_for_ever(host):
            wait_until(lambda: host.status().lost)
            wait_until(lambda: '"told_on_disk": true' in host.log_text())
            host.kill()
        # Not even the state page tells, as after a power cut: the disk does.
        Path(host_state_page(host)).unlink()
        host.start()
        assert "journal was lost" in host.status().resync


@pytest.mark.alone
@pytest.mark.needs("strace")
def test_who_prefers_to_wait_waits(tmp_path: Path) -> None:
    with made(tmp_path, journal_stall_max_s=0.5, on_journal_lost="wait") as (host, config):
        host.start(*strace(host, "-e", "inject=pwritev,pwritev2:delay_enter=3000000:when=40"))
        longest = Longest()
        with load(host, tmp_path, 500):
            asyncio.run(longest.watch(host, 4.5))
            status = host.status()
            assert (status.mode, status.lost, status.dirty_regions) == ("data", False, 0)
        assert longest.seconds > 2
        assert host.stop() == 0
        check_disk(config, tmp_path / "ledger")


@pytest.mark.alone
@pytest.mark.needs("strace")
def test_a_client_is_served_on_while_the_journal_keeps_its_write(tmp_path: Path) -> None:
    """The thread that serves a connection is the one that appends: it is left to the hung journal."""
    hang_s = 3.0
    with made(tmp_path, journal_stall_max_s=10.0) as (host, config):
        host.start(*strace(host, "-e", f"inject=pwritev,pwritev2:delay_enter={hang_s * 1e6:.0f}:when=20"))

        async def run() -> tuple[float, float]:
            slowest_read = slowest_write = 0.0
            async with connect(host.socket(), "disk") as client:
                for n in range(30):
                    begun = time.monotonic()
                    writing = asyncio.ensure_future(client.write(4 * KIB * n, bytes([n]) * 4 * KIB))
                    await asyncio.sleep(0)
                    # Behind the write on the same connection, and to see it.
                    assert await client.read(4 * KIB * n, 4 * KIB) == bytes([n]) * 4 * KIB
                    slowest_read = max(slowest_read, time.monotonic() - begun)
                    await writing
                    slowest_write = max(slowest_write, time.monotonic() - begun)
                await client.flush()
            return slowest_read, slowest_write

        slowest_read, slowest_write = asyncio.run(run())
        assert slowest_write > hang_s - 0.5
        assert slowest_read < hang_s / 2
        assert host.status().mode == "data"
        assert host.stop() == 0
        assert config_bytes(config)[: 120 * KIB] == b"".join(bytes([n]) * 4 * KIB for n in range(30))


@pytest.mark.needs("strace")
def test_a_slow_flush_holds_up_no_write(tmp_path: Path) -> None:
    with made(tmp_path) as (host, config):
        slow = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", config.disk]
        host.start(*slow, "-e", "inject=fdatasync:delay_enter=1500000")

        async def run() -> tuple[int, float]:
            async with connect(host.socket(), "disk") as a, connect(host.socket(), "disk") as b:
                await a.write(0, bytes(4096))
                started = time.monotonic()
                flushing = asyncio.ensure_future(a.flush())
                await asyncio.sleep(0.1)
                wrote = 0
                while not flushing.done():
                    await b.write(4096 * (wrote % 64), bytes(4096))
                    wrote += 1
                await flushing
                return wrote, time.monotonic() - started

        wrote, flushed = asyncio.run(run())
        assert flushed >= 1.4
        # One that waits for the flush would be the only one.
        assert wrote > 10


@pytest.mark.fault("F10")
@pytest.mark.needs("root")
def test_a_disk_without_room_is_written_as_soon_as_there_is_some(tmp_path: Path, injected: Injected) -> None:
    """A sparse image on a full file system: EIO until the answered write has landed, then all is well."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], check=True)
    try:
        with TapHost(tmp_path / "agent") as host:
            disk = small / "disk.img"
            disk.touch()
            os.truncate(disk, 16 * MIB)
            host.add(disk=disk)
            host.start()
            filler = small / "filler"
            filler.write_bytes(bytes(3 * MIB))

            async def run() -> None:
                async with connect(host.socket(), "disk") as client:
                    content = os.urandom(2 * MIB)
                    await client.write(0, content)  # captured: answered
                    await until(lambda: bool(host.status().failed))
                    assert "No space" in host.status().failed
                    injected("F10")
                    late = (
                        client.flush(),
                        client.write(0, bytes(512)),
                        client.write(0, bytes(512), fua=True),
                    )
                    for call in late:
                        with pytest.raises(RequestError):
                            await call
                    assert await client.read(0, 2 * MIB) == content
                    filler.unlink()
                    await until(lambda: not host.status().failed)
                    await client.write(2 * MIB, bytes(512))
                    await client.flush()
                    assert await client.read(0, 2 * MIB) == content

            asyncio.run(run())
            assert host.stop() == 0
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_new_incarnation_above_what_the_server_knows(tmp_path: Path) -> None:
    with made(tmp_path) as (host, config):
        host.start()
        before = host.status()
        request = control.ResyncRequired("disk", "the server has more", 5000, 9)
        host.call(request, control.Done)
        status = host.status()
        assert status.incarnation != before.incarnation
        assert status.lsn >= 5000
        assert status.resync == "the server has more"
        assert status.mode == "data"
        found = recover(host.layout.volume("disk"), bytes.fromhex(MACHINE), config.id_bytes)
        assert found.incarnation is not None
        assert found.incarnation.ordinal > 9
        host.kill()
        host.start()
        assert host.status().resync
        assert host.status().lsn >= 5000


def host_state_page(host: TapHost) -> str:
    return str(volumes.state_page(host.directory, volumes.load_volume(host.directory, "disk")))


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


@contextmanager
def load_for_ever(host: TapHost) -> Iterator[None]:
    """Writes that end with the tap."""
    stopping = threading.Event()

    async def write() -> None:
        async with connect(host.socket(), "disk") as client:
            at = 0
            while not stopping.is_set():
                at = (at + 4096) % SIZE
                await client.write(at, bytes(4096))

    def run() -> None:
        with suppress(Unreachable):
            asyncio.run(write())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


class Longest:
    """The longest time that one write, in a place that the load does not touch, had to wait."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def watch(self, host: TapHost, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with connect(host.socket(), "disk") as client:
            while (begun := time.monotonic()) < end:
                await client.write(0, bytes(4 * KIB))
                self.seconds = max(self.seconds, time.monotonic() - begun)
                await asyncio.sleep(0.005)
