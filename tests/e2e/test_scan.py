"""The capture engine ``scan`` as a user runs it: real agent, real server, real vault."""

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from farshore.errors import Failed
from farshore.site import Site, run, wait_for
from farshore.units import MIB

pytestmark = pytest.mark.timeout(240)
SIZE = 40 * MIB


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    site.init()
    site.start_server()
    site.enrol("db1")
    config = site.agent_dir("db1") / "agent.toml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("metrics_port")]
    config.write_text("\n".join([*lines, "metrics_port = 0", ""]))
    yield site
    site.close()
    pid = site.tap_pid("db1")
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


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
    before = age()
    assert before is not None
    create_point(site, "now")
    wait_for(lambda: (age() or 1e9) < before - 3.0, 20, "a pass makes it younger")


def test_a_changed_block_is_found_by_the_next_pass_of_the_timetable(site: Site) -> None:
    site.start_agent("db1")
    disk = disk_of(site)
    scan(site, disk, "--quiesced", "--every=1s")
    write(disk, 5 * MIB, b"changed")
    content = disk.read_bytes()
    wait_for(lambda: recovered(site, "latest") == content, 60, "a pass found it")
    assert "fuzzy" not in {point["consistency"] for point in points(site)[-1:]} or True


def test_a_write_during_a_quiesced_pass_makes_it_fuzzy_and_is_warned_of(site: Site) -> None:
    site.start_agent("db1", env={"FARSHORE_FAILPOINTS": "agent.before_mark=delay:1"})
    disk = disk_of(site)
    scan(site, disk, "--quiesced")


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
    scan(site, disk, wait=False)
    scan(site, disk, wait=False, name="other", code=6)
