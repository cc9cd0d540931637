"""A disk that is gone when the agent starts: what is said of it, what points have, and how it goes on."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farshore.nbd.client import connect, parse_uri
from farshore.site import Site, wait_for
from farshore.units import KIB, MIB
from tests.harness.sites import enrolled_site

pytestmark = pytest.mark.timeout(240)
SIZE = 8 * MIB


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with enrolled_site(tmp_path) as site:
        yield site


@pytest.fixture
def disks(site: Site) -> dict[str, Path]:
    """Two protected volumes, the disk of each in a folder of its own."""
    site.start_agent("db1")
    found = {}
    for name in ("data", "more"):
        folder = site.directory / f"of-{name}"
        folder.mkdir()
        found[name] = folder / "disk.img"
        found[name].write_bytes(os.urandom(SIZE // 2) + bytes(SIZE - SIZE // 2))
        site.protect("db1", name, found[name])
    return found


def events(site: Site, name: str) -> list[dict[str, Any]]:
    lines = (site.directory / "agent-db1.log").read_text().splitlines()
    found = [json.loads(line[line.index("{") :]) for line in lines if "{" in line]
    return [line for line in found if line.get("event") == name]


def point(site: Site, tag: str, *, code: int = 0) -> dict[str, Any]:
    """Make a point of now and return how it is listed."""
    site.cli("point", "create", "db1", "--tag", tag, code=code)
    (made,) = (point for point in points(site) if point["tag"] == tag)
    return made


def points(site: Site) -> list[dict[str, Any]]:
    found = site.json("point", "list", "db1")
    assert isinstance(found, list)
    return found


def write(site: Site, name: str) -> None:
    """Have a workload write to a volume, and wait until that is on its disk."""

    async def go() -> None:
        async with connect(*parse_uri(site.volume("db1", name)["uri"])) as client:
            for block in range(20):
                await client.write(block * 64 * KIB, os.urandom(4 * KIB))
            await client.flush()

    asyncio.run(go())


def recovered(site: Site, wanted: str, *options: str) -> dict[str, bytes]:
    out = site.directory / f"out-{len(list(site.directory.glob('out-*')))}"
    site.recover("db1", wanted, out, *options)
    return {path.stem: path.read_bytes() for path in out.iterdir()}


def content(disks: dict[str, Path]) -> dict[str, bytes]:
    return {name: disk.read_bytes() for name, disk in disks.items()}


def status(site: Site) -> dict[str, Any]:
    (machine,) = site.json("status")["machines"]
    assert isinstance(machine, dict)
    return machine


def state(site: Site, name: str) -> str:
    return str(site.volume("db1", name)["state"])


@pytest.mark.parametrize("proved", [True, False], ids=["by-deltas", "compared"])
def test_a_disk_that_is_gone_stays_in_every_point_and_goes_on_when_it_is_back(
    site: Site, disks: dict[str, Path], proved: bool
) -> None:
    whole = point(site, "whole")
    before = content(disks)
    assert site.agents.pop("db1").stop() == 0
    # A file that is renamed gets another ctime, so nobody knows what else became of it; not so its folder.
    here = disks["more"].parent if proved else disks["more"]
    away = here.with_name("away")
    here.rename(away)
    site.start_agent("db1")

    # It is named, with the reason, and holds up nobody.
    wait_for(lambda: state(site, "data") == "protected", 60, "the other volume is protected")
    assert state(site, "more") == "failed"
    wait_for(lambda: "failed" in [volume["state"] for volume in status(site)["volumes"]], 30, "it is told")
    machine = status(site)
    assert any(why.startswith("volume more failed: there is no such disk") for why in machine["reasons"])
    assert (machine["state"], machine["health"]) == ("failed", "critical")
    write(site, "data")
    made = point(site, "without", code=6)

    # No point lacks it, and none is offered as if it were whole.
    since = [found for found in points(site) if found["time"] > whole["time"]]
    assert made in since
    for found in since:
        assert set(found["volumes"]) == {"data", "more"}, found
    assert made["consistency"] == "fuzzy"
    assert made["volumes"]["data"]["lsn"] > whole["volumes"]["data"]["lsn"]
    assert made["volumes"]["more"]["size_bytes"] == SIZE
    assert recovered(site, "latest") == before
    site.cli("recover", "db1", "--point", made["id"], "--to", site.directory / "no", code=6)
    assert recovered(site, made["id"], "--allow-fuzzy") == {**before, "data": disks["data"].read_bytes()}

    # It comes back, and nobody has to write for a point to be whole again.
    away.rename(here)
    wait_for(lambda: state(site, "more") == "protected", 60, "it is protected again")
    wait_for(lambda: points(site)[-1]["consistency"] == "crash", 60, "a point is whole again")
    copied = [line["kind"] for line in events(site, "copying_started") if line["volume"] == "more"]
    assert copied == (["initial"] if proved else ["initial", "resync"])
    write(site, "more")
    assert point(site, "again")["consistency"] == "crash"
    assert recovered(site, "latest") == content(disks)
    wait_for(lambda: status(site)["health"] == "ok", 60, "all is well")
    for bad in ("continuity_lost", "session_failed"):
        assert not events(site, bad)


def test_a_volume_unprotected_while_its_disk_is_gone_is_in_no_later_point(
    site: Site, disks: dict[str, Path]
) -> None:
    assert site.agents.pop("db1").stop() == 0
    disks["more"].unlink()
    site.start_agent("db1")
    wait_for(lambda: state(site, "data") == "protected", 60, "the other volume is protected")
    assert set(point(site, "without", code=6)["volumes"]) == {"data", "more"}
    site.cli("volume", "unprotect", "more", "--agent", site.agent_dir("db1"))
    wait_for(lambda: points(site)[-1]["consistency"] == "crash", 60, "a point is whole without it")
    assert set(points(site)[-1]["volumes"]) == {"data"}


def test_a_volume_unprotected_while_no_agent_runs_is_in_no_later_point(
    site: Site, disks: dict[str, Path]
) -> None:
    assert site.agents.pop("db1").stop() == 0
    site.cli("volume", "unprotect", "more", "--agent", site.agent_dir("db1"))
    site.start_agent("db1")
    wait_for(lambda: state(site, "data") == "protected", 60, "the other volume is protected")
    wait_for(lambda: set(points(site)[-1]["volumes"]) == {"data"}, 60, "a point is whole without it")
    assert points(site)[-1]["consistency"] == "crash"


def test_a_disk_that_goes_while_no_tap_runs_is_failed_and_goes_on_when_it_is_back(
    site: Site, disks: dict[str, Path]
) -> None:
    """The agent lives and holds the disk; the tap that starts anew does not find it under its name."""
    away = disks["more"].parent.with_name("away")
    disks["more"].parent.rename(away)
    pid = site.tap_pid("db1")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: state(site, "more") == "failed", 60, "it is called failed")
    wait_for(lambda: state(site, "data") == "protected", 60, "the other volume is protected")
    write(site, "data")
    made = point(site, "without", code=6)
    assert (set(made["volumes"]), made["consistency"]) == ({"data", "more"}, "fuzzy")
    wait_for(lambda: status(site)["state"] == "failed", 30, "the server knows")
    away.rename(disks["more"].parent)
    wait_for(lambda: state(site, "more") == "protected", 60, "it is protected again")
    write(site, "more")
    wait_for(lambda: points(site)[-1]["consistency"] == "crash", 60, "a point is whole again")
    assert point(site, "again")["consistency"] == "crash"
    assert recovered(site, "latest") == content(disks)
    for bad in ("continuity_lost", "session_failed"):
        assert not events(site, bad)


def test_a_volume_that_the_agent_cannot_introduce_stays_in_every_point(
    site: Site, disks: dict[str, Path]
) -> None:
    """Its folder says nothing, as that of an agent from before sizes were kept; the server remembers."""
    assert site.agents.pop("db1").stop() == 0
    (site.agent_dir("db1") / "volumes" / "more" / "replica").write_text('{"paused": false, "copied": true}')
    away = disks["more"].parent.with_name("away")
    disks["more"].parent.rename(away)
    site.start_agent("db1")
    wait_for(lambda: state(site, "data") == "protected", 60, "the other volume is protected")
    assert state(site, "more") == "failed"
    write(site, "data")
    made = point(site, "without", code=6)
    assert (set(made["volumes"]), made["consistency"]) == ({"data", "more"}, "fuzzy")
    assert any(
        "volume more is protected and the agent does not send it" in why for why in status(site)["reasons"]
    )
    away.rename(disks["more"].parent)
    wait_for(lambda: state(site, "more") == "protected", 60, "it is protected again")
    write(site, "more")
    assert point(site, "again")["consistency"] == "crash"
    assert recovered(site, "latest") == content(disks)
    assert [line["kind"] for line in events(site, "copying_started") if line["volume"] == "more"] == [
        "initial"
    ]


def test_disks_of_another_size_than_when_they_were_last_replicated_are_replicated_with_it(
    site: Site, disks: dict[str, Path]
) -> None:
    assert site.agents.pop("db1").stop() == 0
    sizes = {"data": SIZE + MIB, "more": SIZE - MIB}
    for name, size in sizes.items():
        os.truncate(disks[name], size)
    site.start_agent("db1")
    for name in disks:
        wait_for(lambda name=name: state(site, name) == "protected", 60, "they are protected")  # type: ignore[misc]
        write(site, name)
    made = point(site, "sizes")
    assert {name: volume["size_bytes"] for name, volume in made["volumes"].items()} == sizes
    assert made["consistency"] == "crash"
    assert recovered(site, "latest") == content(disks)
