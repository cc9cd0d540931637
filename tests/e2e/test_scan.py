"""The capture engine ``scan`` as a user runs it: real agent, real server, real vault."""

import asyncio
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farshore.nbd.client import connect, parse_uri
from farshore.site import Site, run, wait_for
from farshore.units import MIB
from tests.harness.sites import enrolled_site

pytestmark = pytest.mark.timeout(240)
SIZE = 40 * MIB


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    # Small steps, so that a pass is many of them.
    small = "point_interval_s = 0.1\ncopy_connections = 1\ncredit_bytes = 8388608\n"
    with enrolled_site(tmp_path, small) as site:
        yield site


def disk_of(site: Site, name: str = "disk.img", size: int = SIZE) -> Path:
    disk = site.directory / name
    disk.write_bytes(os.urandom(size // 2) + bytes(size - size // 2))
    return disk


def scan(site: Site, disk: Path, *options: str, name: str = "root", wait: bool = True, code: int = 0) -> Any:
    """Protect ``disk`` by scan; a pass comes by itself only after an hour."""
    if not any(option.startswith("--every") for option in options):
        options = (*options, "--every=1h")
    waiting = ("--wait", "protected") if wait else ()
    printed = site.cli(
        *("volume", "protect", name, "--agent", site.agent_dir("db1"), "--disk", disk),
        *("--capture", "scan", "--json", *options, *waiting),
        code=code,
    )
    return json.loads(printed)["volumes"][0] if code == 0 else None


def write(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def points(site: Site) -> list[dict[str, Any]]:
    found = site.json("point", "list", "db1")
    assert isinstance(found, list)
    return found


def points_without_server(site: Site) -> list[dict[str, Any]]:
    vault = ("--vault", site.vault, "--recovery-key-file", str(site.key))
    found = site.json("point", "list", "db1", *vault)
    assert isinstance(found, list)
    return found


def point_of(site: Site, id: str) -> dict[str, Any]:
    return next(point for point in points(site) if point["id"] == id)


def events(site: Site, name: str) -> list[dict[str, Any]]:
    lines = (site.directory / "agent-db1.log").read_text().splitlines()
    found = [json.loads(line[line.index("{") :]) for line in lines if "{" in line]
    return [line for line in found if line.get("event") == name]


def recovered(site: Site, point: str, *options: str) -> bytes:
    out = site.directory / "out.raw"
    out.unlink(missing_ok=True)
    site.recover("db1", point, out, *options)
    return out.read_bytes()


def create_point(site: Site, tag: str) -> str:
    return str(site.json("point", "create", "db1", "--tag", tag, "--wait", "vaulted")["point"])


def state(site: Site, name: str = "root") -> str:
    return str(site.volume("db1", name)["state"])


def test_a_quiesced_disk_is_protected_and_every_point_is_its_exact_bytes(site: Site) -> None:
    agent = site.start_agent("db1")
    disk = disk_of(site)
    disk.chmod(0o444)
    volume = scan(site, disk, "--quiesced")
    assert list(volume) == ["name", "disk", "capture", "device", "uri", "state", "capture_mode"]
    assert (volume["capture"], volume["device"], volume["uri"]) == ("scan", None, None)
    assert (volume["state"], volume["capture_mode"]) == ("protected", "scan")
    assert site.tap_pid("db1") is None
    first = disk.read_bytes()
    assert recovered(site, "latest") == first
    assert recovered(site, "lsn:1", "--volume", "root") == first

    disk.chmod(0o644)
    write(disk, 3 * MIB + 512, b"changed" * 1000)
    write(disk, SIZE - 4096, b"end")
    second = disk.read_bytes()
    point = create_point(site, "second")
    assert point_of(site, point)["consistency"] == "crash"
    assert recovered(site, point) == second
    assert recovered(site, "latest") == second
    assert recovered(site, "lsn:1", "--volume", "root") == first
    assert recovered(site, "lsn:2", "--volume", "root") == second

    # Only what differs was sent: two blocks of 128 KiB each time one was touched.
    metrics = _metrics(agent.ready["metrics"])
    assert metrics["farshore_agent_copied_bytes_total", "same"] >= SIZE - 2 * 128 * 1024
    assert metrics["farshore_agent_copied_bytes_total", "sent"] <= SIZE // 2 + 3 * 128 * 1024
    assert agent.stop() == 0
    site.agents.clear()
    listed = site.json("volume", "list", "--agent", site.agent_dir("db1"))["volumes"][0]
    assert (listed["state"], listed["capture_mode"], listed["uri"]) == ("protected", "scan", None)


def _metrics(address: str) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("farshore_agent_copied_bytes_total"):
            head, value = line.rsplit(" ", 1)
            found["farshore_agent_copied_bytes_total", head.split('"')[1]] = float(value)
    return found


def test_a_disk_in_use_gives_fuzzy_points_which_nobody_is_offered(site: Site) -> None:
    site.start_agent("db1")
    disk = disk_of(site)
    assert scan(site, disk)["state"] == "protected"
    content = disk.read_bytes()
    assert {point["consistency"] for point in points(site)} == {"fuzzy"}
    out = site.directory / "no.raw"
    vault = ("--vault", site.vault, "--recovery-key-file", str(site.key))
    for point in ("latest", "lsn:1", points(site)[-1]["id"]):
        run("recover", "db1", "--point", point, "--volume", "root", "--to", out, *vault, code=6)
    assert recovered(site, "latest", "--allow-fuzzy") == content
    site.cli("point", "create", "db1", "--tag", "x", "--wait", "vaulted", code=6)
    made = site.json("point", "create", "db1", "--tag", "y", "--wait", "vaulted", "--allow-fuzzy")
    found = point_of(site, made["point"])
    assert (found["tag"], found["consistency"]) == ("y", "fuzzy")

    def told() -> bool:
        (machine,) = site.json("status")["machines"]
        (volume,) = machine["volumes"]
        return (
            (machine["state"], machine["health"], machine["rpo_seconds"]) == ("protected", "warning", None)
            and (volume["capture_mode"], volume["rpo_seconds"]) == ("scan", None)
            and any("volume root is scanned" in reason for reason in machine["reasons"])
        )

    wait_for(told, 20, "status says so")


def test_the_age_of_a_scanned_disk_counts_from_the_beginning_of_its_last_pass(site: Site) -> None:
    site.start_agent("db1")
    scan(site, disk_of(site), "--quiesced")

    def age() -> float | None:
        value = site.json("status")["machines"][0]["rpo_seconds"]
        return None if value is None else float(value)

    wait_for(lambda: age() is not None, 20, "the age is known")
    # Nothing is written and every PING is answered: a tap's volume would stay at a second or two.
    wait_for(lambda: (age() or 0.0) > 6.0, 30, "the age grows")
    status = site.json("status")["machines"][0]
    assert (status["health"], status["reasons"]) == ("ok", [])
    asked = time.monotonic()
    create_point(site, "now")
    # The pass began after it was asked for; by the one before, the age is six seconds more than that.
    wait_for(lambda: (age() or 1e9) < time.monotonic() - asked + 1.0, 20, "a pass makes it younger")


def test_a_changed_block_is_found_by_the_next_pass_of_the_timetable(site: Site) -> None:
    site.start_agent("db1")
    disk = disk_of(site)
    scan(site, disk, "--quiesced", "--every=1s")
    write(disk, 5 * MIB, b"changed")
    content = disk.read_bytes()
    wait_for(lambda: recovered(site, "latest") == content, 60, "a pass found it")


def test_a_write_during_a_quiesced_pass_makes_it_fuzzy_and_is_warned_of(site: Site) -> None:
    site.start_agent("db1")
    disk = disk_of(site)
    scan(site, disk, "--quiesced")
    with Busy(disk):
        site.cli("point", "create", "db1", "--tag", "busy", "--wait", "vaulted", code=6)
    assert [line["lsn"] for line in events(site, "scanned_disk_changed")] == [2]
    busy = next(point for point in points(site) if point["tag"] == "busy")
    assert (busy["consistency"], busy["volumes"]["root"]["lsn"]) == ("fuzzy", 2)
    content = disk.read_bytes()
    assert recovered(site, create_point(site, "quiet")) == content


class Busy:
    """Somebody who writes to a disk all the time."""

    def __init__(self, disk: Path) -> None:
        self._disk, self._over = disk, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self._disk.open("r+b", buffering=0) as file:
            number = 0
            while not self._over.wait(0.002):
                number += 1
                os.pwrite(file.fileno(), number.to_bytes(8, "little") * 64, number * 7919 % 1000 * 4096)

    def __enter__(self) -> "Busy":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


def test_an_agent_killed_in_the_middle_of_a_pass_begins_another(site: Site) -> None:
    site.start_agent("db1")
    disk = disk_of(site)
    scan(site, disk, "--quiesced")
    first = disk.read_bytes()
    assert site.agents.pop("db1").stop() == 0
    second = os.urandom(4 * SIZE)
    disk.write_bytes(second)
    # The second acknowledgement is that of a part of the pass.
    site.start_agent("db1", env={"FARSHORE_FAILPOINTS": "agent.before_ack_taken=kill:2"})
    wait_for(lambda: site.agents["db1"].process.poll() is not None, 60, "the agent died")
    site.agents.pop("db1").kill()
    before = points(site)[-1]
    assert (before["consistency"], before["volumes"]["root"]["lsn"]) == ("fuzzy", 2)
    assert recovered(site, "latest") == first
    site.start_agent("db1")
    wait_for(lambda: points(site)[-1]["consistency"] == "crash", 60, "another pass is vaulted")
    assert points(site)[-1]["volumes"]["root"]["lsn"] == 3
    assert recovered(site, "latest") == second
    assert recovered(site, "lsn:1", "--volume", "root") == first
    assert not events(site, "volume_refused")


@pytest.mark.parametrize("adopted", [False, True])
def test_a_server_killed_in_the_middle_of_a_pass_goes_on_with_it(site: Site, adopted: bool) -> None:
    site.start_agent("db1")
    disk = disk_of(site)
    scan(site, disk, "--quiesced")
    assert site.server is not None
    listen = str(site.server.ready["listen"])
    site.server.stop()
    content = os.urandom(4 * SIZE)
    disk.write_bytes(content)
    site.cli("volume", "resync", "root", "--agent", site.agent_dir("db1"))
    assert state(site) == "resync"
    server = site.start_server(env={"FARSHORE_FAILPOINTS": "ingest.after_commit=kill:2"})
    wait_for(lambda: server.process.poll() is not None, 60, "the server died")
    server.kill()
    assert points_without_server(site)[-1]["consistency"] == "fuzzy"
    if adopted:
        shutil.rmtree(site.server_dir)
        site.cli(
            *("server", "adopt", site.server_dir, "--vault", site.vault, "--listen", listen),
            *("--api", "127.0.0.1:0", "--recovery-key-file", site.key),
        )
    site.start_server()
    wait_for(lambda: state(site) == "protected", 60, "the pass is vaulted")
    assert recovered(site, "latest") == content
    # It is the same pass, over two servers.
    assert points(site)[-1]["volumes"]["root"]["lsn"] == 2
    assert not events(site, "volume_refused")


def test_beside_a_tap_a_quiesced_scan_is_part_of_one_cut(site: Site) -> None:
    site.start_agent("db1")
    data = disk_of(site, "data.img", 8 * MIB)
    uri = site.protect("db1", "data", data)["uri"]
    disk = disk_of(site)
    scan(site, disk, "--quiesced")
    wait_for(lambda: points(site)[-1]["consistency"] == "crash", 20, "both are whole")
    assert set(points(site)[-1]["volumes"]) == {"data", "root"}
    nbd_write(uri, MIB, b"a" * 4096)
    wait_for(lambda: _last(site, "data") > 1 and points(site)[-1]["consistency"] == "crash", 20, "a cut")

    # Written between two passes: what is vaulted of it was not there when the next cuts were taken.
    write(disk, 0, b"b" * 4096)
    nbd_write(uri, 2 * MIB, b"b" * 4096)
    wait_for(lambda: points(site)[-1]["consistency"] == "fuzzy", 20, "the cut is fuzzy")
    lsn = _last(site, "data")
    out = site.directory / "both"
    out.mkdir()
    latest = site.recover("db1", "latest", out)
    assert {volume["name"]: volume["lsn"] < lsn for volume in latest["volumes"]}["data"]
    alone = recovered(site, "latest", "--volume", "data")
    assert alone[2 * MIB : 2 * MIB + 4096] == b"b" * 4096

    tagged = point_of(site, create_point(site, "both"))
    assert tagged["consistency"] == "crash"
    site.recover("db1", tagged["id"], out, "--force")
    assert (out / "root.raw").read_bytes() == disk.read_bytes()
    assert (out / "data.raw").read_bytes() == alone


def test_beside_a_tap_a_disk_in_use_keeps_no_other_volume_from_being_recovered(site: Site) -> None:
    site.start_agent("db1")
    scan(site, disk_of(site), "--every=1s")
    data = disk_of(site, "data.img", 8 * MIB)
    volume = site.protect("db1", "data", data)
    nbd_write(volume["uri"], MIB, b"c" * 4096)
    wait_for(
        lambda: recovered(site, "latest", "--volume", "data")[MIB : MIB + 4096] == b"c" * 4096, 30, "a cut"
    )
    vault = ("--vault", site.vault, "--recovery-key-file", str(site.key))
    run("recover", "db1", "--point", "latest", "--to", site.directory / "no", *vault, code=6)

    def ages() -> dict[str, float | None]:
        volumes = site.json("status")["machines"][0]["volumes"]
        return {entry["name"]: entry["rpo_seconds"] for entry in volumes}

    wait_for(lambda: (ages()["data"] or 1e9) < 5 and ages()["root"] is None, 20, "the ages are told apart")
    assert {state(site, "data"), state(site)} == {"protected"}
    # After a restart the tap's volumes come first, and no point is without the scanned one.
    site.kill_agent("db1")
    site.start_agent("db1")
    wait_for(lambda: state(site, "data") == "protected", 30, "it is back")
    site.cli("point", "create", "db1", "--tag", "again", "--wait", "vaulted", code=6)
    assert all("root" in point["volumes"] for point in points(site))


def _last(site: Site, volume: str) -> int:
    return int(points(site)[-1]["volumes"][volume]["lsn"])


def nbd_write(uri: str, offset: int, data: bytes) -> None:
    """One write through a tap, flushed."""

    async def go() -> None:
        async with connect(*parse_uri(uri)) as client:
            await client.write(offset, data)
            await client.flush()

    asyncio.run(go())


def test_a_disk_that_is_gone_fails_is_told_and_comes_back(site: Site) -> None:
    site.start_agent("db1")
    disk = disk_of(site)
    scan(site, disk, "--quiesced", "--every=1s")
    content = disk.read_bytes()
    away = disk.with_name("away.img")
    disk.rename(away)
    wait_for(lambda: state(site) == "failed", 30, "it is noticed")
    site.cli("point", "create", "db1", "--tag", "none", "--wait", "vaulted", code=6)
    assert recovered(site, "latest") == content
    # Also over a restart: the volume stays what it was, and in every point.
    assert site.agents.pop("db1").stop() == 0
    site.start_agent("db1")
    wait_for(lambda: state(site) == "failed", 30, "it is noticed again")
    wait_for(lambda: site.json("status")["machines"][0]["health"] == "critical", 20, "status says so")
    away.rename(disk)
    wait_for(lambda: state(site) == "protected", 30, "the next pass found it")
    assert recovered(site, "latest") == content


def test_a_disk_that_grows_and_shrinks_is_the_size_it_is(site: Site) -> None:
    site.start_agent("db1")
    disk = disk_of(site, size=4 * MIB)
    scan(site, disk, "--quiesced")
    full = os.urandom(6 * MIB)
    for number, size in enumerate((6 * MIB, 3 * MIB + 512, 5 * MIB, 6 * MIB), 2):
        disk.write_bytes(full[:size])
        point = create_point(site, f"size {size}")
        assert point_of(site, point)["volumes"]["root"] == {"lsn": number, "size_bytes": size}
        assert recovered(site, point) == full[:size]


def test_pause_resume_resync_and_unprotect(site: Site) -> None:
    site.start_agent("db1")
    folder = site.agent_dir("db1")
    disk = disk_of(site)
    scan(site, disk, "--quiesced", "--every=1s")
    site.cli("volume", "pause", "root", "--agent", folder)
    assert state(site) == "paused"
    wait_for(lambda: bool(events(site, "scan_vaulted")), 10, "a pass was vaulted")
    write(disk, 0, b"paused")
    site.cli("volume", "resync", "root", "--agent", folder)
    site.cli("volume", "resume", "root", "--agent", folder)
    content = disk.read_bytes()
    wait_for(lambda: state(site) == "protected" and recovered(site, "latest") == content, 60, "it goes on")
    assert json.loads(site.cli("volume", "unprotect", "root", "--agent", folder, "--json")) == {"volumes": []}
    assert disk.read_bytes() == content
    assert recovered(site, "latest") == content
    scan(site, disk, "--quiesced")
    assert state(site) == "protected"


@pytest.mark.needs("loop", "root", "mkfs.ext4", "losetup", "mount")
def test_a_mounted_block_device_is_scanned_past_its_page_cache(site: Site) -> None:
    backing, mount = site.directory / "ext4.img", site.directory / "mnt"
    mount.mkdir()
    backing.touch()
    os.truncate(backing, 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(backing)], check=True)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], check=True, capture_output=True, text=True
    )
    device = made.stdout.strip()
    try:
        subprocess.run(["mount", device, str(mount)], check=True)
        try:
            (mount / "file").write_bytes(b"1" * MIB)
            os.sync()
            # Somebody reads the whole device through its page cache, where it stays.
            assert b"1" * MIB in Path(device).read_bytes()
            site.start_agent("db1")
            scan(site, Path(device))
            with (mount / "file").open("r+b") as file:
                file.write(b"2" * MIB)
                file.flush()
                os.fsync(file.fileno())
            site.cli("volume", "resync", "root", "--agent", site.agent_dir("db1"))
            wait_for(lambda: state(site) == "protected", 60, "the resync is over")
            content = recovered(site, "latest", "--allow-fuzzy")
            assert b"2" * MIB in content
            assert b"1" * 4096 not in content
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_verbs_that_make_no_sense_are_refused(site: Site) -> None:
    disk = disk_of(site, size=MIB)
    for option in ("--listen=unix:/tmp/x.sock", "--attach=loop", "--every=soon", "--every=1ms"):
        scan(site, disk, option, wait=False, code=2)
    folder = site.agent_dir("db1")
    tap = ("volume", "protect", "x", "--agent", folder, "--disk", disk, "--capture", "tap-nbd")
    for more in (("--quiesced",), ("--every", "15m")):
        site.cli(*tap, *more, code=2)
    odd = site.directory / "odd.img"
    odd.write_bytes(bytes(1000))
    scan(site, odd, wait=False, code=2)
    odd.write_bytes(b"")
    scan(site, odd, wait=False, code=2)
    scan(site, site.directory / "none", wait=False, code=5)
    # Without an agent the settings are written, and it begins when one starts.
    assert scan(site, disk, wait=False)["state"] == "initial-replication"
    scan(site, disk, wait=False, name="other", code=6)
    agent = site.start_agent("db1")
    wait_for(lambda: state(site) == "protected", 60, "it is protected")
    with urllib.request.urlopen(f"http://{agent.ready['metrics']}/metrics") as answer:
        assert b'farshore_agent_scan_age_seconds{volume="root"}' in answer.read()
    assert "scan (scan)" in site.cli("volume", "list", "--agent", folder)
