"""Several machines on one server at once: one is killed while it is copied, one floods, one only works."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import admin
from farshore.site import Site, wait_for
from farshore.stamps import Workload, check_prefix
from farshore.units import MIB
from tests.harness.faults import Injected
from tests.harness.ledger import begun, state_of

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]

OTHERS_WAIT_S = 5.0
"""From asking for a point to its commit, for a machine beside others that copy and flood. Its cut comes at
once, its commit follows the one before it after half a second, and its frames wait behind what the workers
hold of the others: 40 MiB and two packs each, a second or two of work on one slow core."""
WORKS_PER_S = 60
"""Far less than what a slow disk lets the flood write."""
FLOOD_PER_S = 1_000_000
MACHINES = {"killed": 192 * MIB, "floods": 64 * MIB, "works": 32 * MIB}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        site.init()
        site.start_server()
        for machine in MACHINES:
            site.enrol(machine)
            config = site.agent_dir(machine) / "agent.toml"
            lines = [line for line in config.read_text().splitlines() if not line.startswith("metrics_port")]
            config.write_text("\n".join([*lines, "metrics_port = 0", ""]))
            site.start_agent(machine)
        yield site
    finally:
        site.close()


class Load:
    """Stamped writes to the first half of a machine's volume, from a process of its own."""

    def __init__(self, site: Site, machine: str, rate: int, size: int) -> None:
        self.workload = Workload(len(machine), 0, size // 2 // 4096)
        self.path = site.directory / f"{machine}.ledger"
        words = [sys.executable, "-m", "farshore.workload", site.volume(machine, "v")["uri"]]
        words += ["--ledger", str(self.path), "--seed", str(self.workload.seed), "--rate", str(rate)]
        self.process = subprocess.Popen([*words, "--block-count", str(self.workload.block_count)])

    def stop(self) -> int:
        """End it; returns how many writes were answered, all of them."""
        wait_for(lambda: begun(self.path), 30, "it to begin")
        self.process.terminate()
        assert self.process.wait(timeout=60) == 0
        state = state_of(self.path)
        assert state.errors == 0
        assert state.acked == state.sent > 0
        return state.acked

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def state(site: Site, machine: str) -> str:
    return str(site.volume(machine, "v")["state"])


def copied(site: Site, machine: str) -> int:
    """How far the first copy is; 0 before it began and when it has ended."""
    told = admin.ask(site.agent_dir(machine), "progress", name="v")
    return int(told["done_bytes"]) if told["state"] == "initial-replication" else 0


def disk_of(site: Site, machine: str) -> Path:
    return site.directory / f"{machine}.img"


@pytest.mark.fault("F1")
def test_machines_on_one_server_do_not_stand_in_each_others_way(site: Site, injected: Injected) -> None:
    for machine, size in MACHINES.items():
        disk_of(site, machine).write_bytes(os.urandom(size // 2) + bytes(size - size // 2))
    loads: dict[str, Load] = {}
    try:
        for machine, rate in (("works", WORKS_PER_S), ("floods", FLOOD_PER_S)):
            site.protect(machine, "v", disk_of(site, machine))
            loads[machine] = Load(site, machine, rate, MACHINES[machine])
        folder = site.agent_dir("killed")
        words = ("--agent", folder, "--disk", disk_of(site, "killed"), "--capture", "tap-nbd")
        site.cli("volume", "protect", "v", *words)
        wait_for(lambda: copied(site, "killed") > 16 * MIB, 60, "some of the copy")
        site.kill_agent("killed")
        injected("F1")
        site.start_agent("killed")
        waits: list[float] = []
        while state(site, "killed") != "protected" or len(waits) < 3:
            asked = time.monotonic()
            site.cli("point", "create", "works", "--tag", f"t{len(waits)}", "--wait", "vaulted")
            waits.append(time.monotonic() - asked)
            assert len(waits) < 100, "the copy does not end"
        assert max(waits) < OTHERS_WAIT_S, waits
        loads["killed"] = Load(site, "killed", 300, MACHINES["killed"])
        acked = {machine: load.stop() for machine, load in sorted(loads.items())}
    finally:
        for load in loads.values():
            load.close()
    assert acked["floods"] > 10 * acked["works"], "that was no flood"
    sessions = {entry["name"]: entry["state"] for entry in site.json("status")["machines"]}
    assert set(sessions) == set(MACHINES)
    log = (site.directory / "server.log").read_text()
    assert log.count('"event": "session_ended"') == 1, "another session ended than that of the killed agent"
    for machine in MACHINES:
        check_recovered(site, machine, loads[machine].workload, acked[machine])


def check_recovered(site: Site, machine: str, workload: Workload, acked: int) -> None:
    """The newest point is the disk, byte for byte, and the disk holds every write that was answered."""
    wait_for(lambda: state(site, machine) == "protected", 90, f"{machine} is protected")
    site.cli("point", "create", machine, "--tag", "end", "--wait", "vaulted")
    image = site.directory / "image"
    site.recover(machine, "latest", image, "--force")
    content = image.read_bytes()
    assert content == disk_of(site, machine).read_bytes()
    report = check_prefix(workload, lambda offset, length: content[offset : offset + length])
    assert (report.exact, report.seq) == (True, acked)
