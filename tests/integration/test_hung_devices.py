"""F13: a disk that answers no request at all, the journal's or a protected one; other volumes do not notice.

The block device really hangs: the process that serves it is stopped, and whoever waits for it is in
uninterruptible sleep. Nothing in the tap is traced or told.
"""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.capture import control
from agent.capture.control import Status, TapStatus, VolumeStatus
from agent.config import Layout
from farshore.errors import FarshoreError
from farshore.nbd.client import connect, parse_uri
from farshore.site import Site, wait_for
from farshore.stamps import Workload, check_prefix
from farshore.units import MIB
from tests.harness.faults import Injected
from tests.harness.latency import Latency
from tests.harness.ledger import begun, state_of
from tests.harness.qemu import HangingDevice, hanging_device
from tests.harness.tap import TapHost

pytestmark = [
    pytest.mark.alone,
    pytest.mark.fault("F13"),
    pytest.mark.needs("qemu-storage-daemon", "loop", "fuse", "root", "losetup", "mkfs.ext4"),
    pytest.mark.timeout(240),
]

STALL_MAX_S = 2.0
"""``journal_stall_max`` as it is by default."""
MARGIN_S = 1.0
"""The stall is looked for every 0.1 s, and up to 1 s is spent on leaving word of it on the disk."""
HANGS_S = 6.0
DISK_HANGS_S = 10.0
OTHERS_WAIT_S = DISK_HANGS_S / 2
"""Who depends on the disk that hangs waits until it answers again. A volume whose own disk and journal are
well waits for them only, with whatever else keeps the machine's disk busy: far from either end."""
PENDING_BYTES_MAX = 64 * MIB
FLIGHT_BYTES_MAX = 2 * MIB
"""What one read of the socket brings after the last look at that bound."""
MACHINE = "m1"


@contextmanager
def mounted_device(root: Path, folder: Path) -> Iterator[HangingDevice]:
    """A folder on a file system of its own, whose device can hang: an agent's directory, or disk images."""
    folder.mkdir(parents=True)
    with hanging_device(root / "device", 1024 * MIB) as device:
        subprocess.run(["mkfs.ext4", "-q", device.path], check=True)
        subprocess.run(["mount", device.path, folder], check=True)
        try:
            (folder / "lost+found").rmdir()
            yield device
        finally:
            wait_for(lambda: _unmounted(folder), 30, "the mount to be free")


def _unmounted(folder: Path) -> bool:
    """What was killed may take a moment to end."""
    return subprocess.run(["umount", folder], check=False, capture_output=True).returncode == 0


@contextmanager
def written(uri: str, workload: Workload, ledger: Path, rate: int = 500) -> Iterator[None]:
    """Stamped writes from a process of its own; every one of them is answered when this ends."""
    words = [sys.executable, "-m", "farshore.workload", uri, "--ledger", ledger, "--seed", workload.seed]
    words += ["--first-block", workload.first_block, "--block-count", workload.block_count, "--rate", rate]
    process = subprocess.Popen([*map(str, words), "--flush-seconds", "0.2"])
    try:
        wait_for(lambda: begun(ledger), 20, "the workload's first flush")
        yield
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def acked(ledger: Path) -> int:
    """How many writes were answered: all that were sent, none with an error, over one connection."""
    state = state_of(ledger)
    assert (state.errors, state.reconnects) == (0, 0)
    assert state.acked == state.sent > 0
    return state.acked


def tap_status(directory: Path, name: str) -> VolumeStatus:
    found = control.call(Layout(directory).tap_socket, Status(), TapStatus)
    return next(volume for volume in found.volumes if volume.name == name)


def check_image(content: bytes, workload: Workload, seq: int | None = None) -> int:
    """The image holds an exact prefix (all of ``seq`` writes, if given) of the workload; returns its end."""
    report = check_prefix(workload, lambda offset, length: content[offset : offset + length])
    assert report.exact, report
    assert seq is None or report.seq == seq
    return report.seq


def server_view(site: Site, volume: str) -> dict[str, Any]:
    found = site.json("status")["machines"][0]["volumes"]
    return next(entry for entry in found if entry["name"] == volume)


@contextmanager
def running(root: Path) -> Iterator[Site]:
    """A gateway with one enrolled agent, not started yet if its directory is to be prepared."""
    site = Site(root)
    try:
        site.init()
        site.start_server()
        yield site
    finally:
        site.close()


def points(site: Site) -> list[dict[str, Any]]:
    found = site.json("point", "list", MACHINE)
    assert isinstance(found, list)
    return found


def test_a_journal_whose_device_hangs_costs_the_workload_no_more_than_agreed(
    tmp_path: Path, injected: Injected
) -> None:
    """Down to the dirty map within ``journal_stall_max``, and by itself back to points that are whole."""
    workload = Workload(seed=13, first_block=16, block_count=32 * MIB // 4096 - 16)
    disk, ledger = tmp_path / "disk.img", tmp_path / "ledger"
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    folder = tmp_path / "agent-m1"
    with mounted_device(tmp_path, folder) as device, running(tmp_path) as site:
        site.enrol(MACHINE)
        site.start_agent(MACHINE)
        uri = site.protect(MACHINE, "v", disk)["uri"]
        with written(uri, workload, ledger), Latency(uri, flush=True) as latency:
            before = len(points(site))
            with device.hung() as hung:
                injected("F13")
                wait_for(lambda: server_view(site, "v")["state"] == "degraded", 30, "a word of trouble")
                assert server_view(site, "v")["capture_mode"] == "bitmap"
                answered = len(latency.flushes)
                time.sleep(max(0.0, hung + HANGS_S - time.monotonic()))  # the fault lasts that long
                wait_for(lambda: len(latency.flushes) > answered + 50, 60, "the workload to go on past it")
            wait_for(lambda: server_view(site, "v")["capture_mode"] == "data", 60, "the journal's return")
            wait_for(lambda: server_view(site, "v")["state"] == "protected", 60, "the copy that heals")
        # Mostly a FLUSH waits, since a write is answered when the journal's page cache has it.
        assert STALL_MAX_S / 2 < latency.longest(hung) < STALL_MAX_S + MARGIN_S
        last = acked(ledger)
        site.json("point", "create", MACHINE, "--tag", "whole again", "--wait", "vaulted")
        content = disk.read_bytes()
        check_image(content, workload, last)
        assert content[:4096] == latency.content
        listed = points(site)
        image = tmp_path / "image"
        site.recover(MACHINE, "latest", image, "--force")
        assert image.read_bytes() == content
        # What was offered while it hung, or is now, is the disk as it once was.
        offered = [point for point in listed[before:] if point["consistency"] != "fuzzy"]
        assert len(offered) < len(listed) - before, "no point said that it was fuzzy"
        assert offered[-1]["tag"] == "whole again"
        seqs = []
        for point in offered[:: max(1, len(offered) // 4)]:
            site.recover(MACHINE, point["id"], image, "--force")
            seqs.append(check_image(image.read_bytes(), workload))
        assert seqs == sorted(seqs)


def test_who_prefers_to_wait_for_a_hung_journal_loses_nothing(tmp_path: Path, injected: Injected) -> None:
    """``on_journal_lost = "wait"``: no write goes past the journal; all go on when it does."""
    workload = Workload(seed=14, first_block=16, block_count=32 * MIB // 4096 - 16)
    ledger = tmp_path / "ledger"
    folder = tmp_path / "agent"
    log = tmp_path / "tap.log"
    with mounted_device(tmp_path, folder) as device, TapHost(folder, log=log) as host:
        disk = tmp_path / "disk.img"
        with disk.open("wb") as file:
            file.truncate(32 * MIB)
        host.add("v", disk=disk, on_journal_lost="wait", journal_stall_max_s=STALL_MAX_S)
        host.start()
        uri = host.uri("v")
        with written(uri, workload, ledger), Latency(uri, flush=True) as latency:
            with device.hung() as hung:
                injected("F13")
                wait_for(
                    lambda: 0 < latency.under_way_since < time.monotonic() - STALL_MAX_S - MARGIN_S,
                    20,
                    "a request that waits longer than the others' bound",
                )
                assert "journal_in_trouble" in host.log_text(), "the operator is not told"
            wait_for(lambda: latency.under_way_since > hung + STALL_MAX_S, 30, "the answer")
        assert latency.longest(hung) > STALL_MAX_S + MARGIN_S
        status = host.status("v")
        assert (status.mode, status.lost, status.dirty_regions) == ("data", False, 0)
        assert not host.cut("all of it").decoded().volumes[0].fuzzy
        last = acked(ledger)
        assert host.stop() == 0
        check_image(disk.read_bytes(), workload, last)


def test_a_disk_that_hangs_holds_up_no_other_volume(tmp_path: Path, injected: Injected) -> None:
    """Its own writes wait within bounds, its FLUSHes for ever; cuts, and the other's points, go on."""
    hung_load = Workload(seed=15, first_block=16, block_count=16 * MIB // 4096)
    well_load = Workload(seed=16, first_block=16, block_count=16 * MIB // 4096)
    well_disk = tmp_path / "well.img"
    with well_disk.open("wb") as file:
        file.truncate(32 * MIB)
    flood_at, flood_count = 32 * MIB, 80
    flood_content = [bytes([1 + at]) * MIB for at in range(flood_count)]
    with hanging_device(tmp_path / "device", 128 * MIB) as device, running(tmp_path) as site:
        site.enrol(MACHINE)
        site.start_agent(MACHINE)
        directory = site.agent_dir(MACHINE)
        hung_uri = site.protect(MACHINE, "hung", device.path)["uri"]
        well_uri = site.protect(MACHINE, "well", well_disk)["uri"]
        with (
            written(hung_uri, hung_load, tmp_path / "hung.ledger"),
            written(well_uri, well_load, tmp_path / "well.ledger"),
            Latency(well_uri, flush=True) as well,
        ):
            device.forget_cached()
            with flooded(hung_uri, flood_at, flood_content) as flood, device.hung() as hung:
                injected("F13")
                flood.thread.start()
                highest = 0
                wait_for(
                    lambda: tap_status(directory, "hung").held_bytes > PENDING_BYTES_MAX / 2, 20, "a jam"
                )
                # One look at counters: the hung disk has no part in it, nor in the way to the vault.
                before = server_view(site, "well")["vaulted_lsn"]
                asked = time.monotonic()
                made = site.json(
                    "point", "create", MACHINE, "--tag", "meanwhile", "--wait", "vaulted", "--timeout", "20s"
                )["point"]
                cut_s = time.monotonic() - asked
                assert server_view(site, "well")["vaulted_lsn"] > before
                assert server_view(site, "well")["state"] == "protected"
                flushed = state_of(tmp_path / "hung.ledger").flushed
                while time.monotonic() < hung + DISK_HANGS_S:
                    highest = max(highest, tap_status(directory, "hung").held_bytes)
                    time.sleep(0.05)
                assert not flood.done, "writes are taken in without end"
                assert state_of(tmp_path / "hung.ledger").flushed == flushed, "a FLUSH was answered"
                assert well.longest(hung) < OTHERS_WAIT_S
                wait_for(
                    lambda: sum(at > hung for at, _ in well.flushes) > 20, 60, "the other volume to go on"
                )
                assert highest < PENDING_BYTES_MAX + FLIGHT_BYTES_MAX
                assert cut_s < OTHERS_WAIT_S
        device_content = device.path.read_bytes()
        check_image(device_content, hung_load, acked(tmp_path / "hung.ledger"))
        check_image(well_disk.read_bytes(), well_load, acked(tmp_path / "well.ledger"))
        for number, content in enumerate(flood_content):
            assert device_content[flood_at + number * MIB :][:MIB] == content
        site.json("point", "create", MACHINE, "--tag", "end", "--wait", "vaulted")
        images = tmp_path / "images"
        listed = {point["id"]: point for point in points(site)}
        assert listed[made]["consistency"] == "crash"
        for point in ("latest", made):
            site.recover(MACHINE, point, images, "--force")
            hung_image, well_image = (images / f"{name}.raw" for name in ("hung", "well"))
            check_image(hung_image.read_bytes(), hung_load)
            check_image(well_image.read_bytes(), well_load)
            if point == "latest":
                assert hung_image.read_bytes() == device_content
                assert well_image.read_bytes() == well_disk.read_bytes()


class Flood:
    """Large writes of one client, all sent at once."""

    def __init__(self, uri: str, offset: int, contents: list[bytes]) -> None:
        self._uri, self._offset, self._contents = uri, offset, contents
        self.done = False
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._write())
        except Exception as error:  # told by `flooded`, unless the test has failed before
            self.error = error

    async def _write(self) -> None:
        address, export = parse_uri(self._uri)
        async with connect(address, export) as client, asyncio.TaskGroup() as tasks:
            # Half a sector's page that nobody has read: the write needs the disk's answer first.
            await client.write(self._offset + len(self._contents) * MIB + 512, bytes(512))
            at = self._offset
            for content in self._contents:
                tasks.create_task(client.write(at, content))
                at += len(content)
        self.done = True


@contextmanager
def flooded(uri: str, offset: int, contents: list[bytes]) -> Iterator[Flood]:
    flood = Flood(uri, offset, contents)
    yield flood
    flood.thread.join(60)
    assert flood.error is None, flood.error
    assert flood.done, "a write was never answered"


def test_a_disk_that_hangs_when_the_tap_starts_keeps_only_its_own_volume(
    tmp_path: Path, injected: Injected
) -> None:
    """What a killed tap has to redo needs the disk, however long that takes; the others are served."""
    content = [bytes([1 + at]) * 4096 for at in range(200)]
    well_disk = tmp_path / "well.img"
    with well_disk.open("wb") as file:
        file.truncate(8 * MIB)
    folder = tmp_path / "disks"
    with mounted_device(tmp_path, folder) as device, running(tmp_path) as site:
        hung_disk = folder / "hung.img"
        hung_disk.write_bytes(bytes(8 * MIB))
        site.enrol(MACHINE)
        site.start_agent(MACHINE)
        uri = site.protect(MACHINE, "hung", hung_disk)["uri"]
        well_uri = site.protect(MACHINE, "well", well_disk)["uri"]

        async def write(uri: str) -> None:
            async with connect(*parse_uri(uri)) as client:
                for at, block in enumerate(content):
                    await client.write(at * 8192, block)
                # No FLUSH: the journal has it, the disk need not.

        asyncio.run(write(uri))
        site.kill_agent(MACHINE)
        with device.hung():
            injected("F13")
            site.start_agent(MACHINE)
            wait_for(lambda: server_view(site, "well")["state"] == "protected", 60, "the disk that is well")
            assert server_view(site, "hung")["state"] == "failed"
            assert "still being opened" in site.cli("status")
            asyncio.run(write(well_uri))
            with pytest.raises(FarshoreError):  # nobody listens yet
                asyncio.run(write(uri))
        wait_for(lambda: server_view(site, "hung")["state"] == "protected", 60, "the disk that answers again")
        asyncio.run(write(uri))
        site.json("point", "create", MACHINE, "--tag", "whole", "--wait", "vaulted")
        site.recover(MACHINE, "latest", tmp_path / "images", "--force")
        for name, disk in (("hung", hung_disk), ("well", well_disk)):
            image = (tmp_path / "images" / f"{name}.raw").read_bytes()
            assert image == disk.read_bytes()
            assert all(image[at * 8192 :][:4096] == block for at, block in enumerate(content))
