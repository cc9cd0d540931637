"""The agent as a user runs it, and what happens when parts of it die. Real server, agent and tap."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from farshore.errors import Failed
from farshore.site import Daemon, Site, run, wait_for
from farshore.stamps import BLOCK_BYTES, Workload, check_prefix
from farshore.units import MIB
from farshore.workload import Ledger
from tests.harness.faults import Injected
from tests.harness.sites import enrolled_site

pytestmark = pytest.mark.timeout(240)
FAST = {"FARSHORE_LOG_LEVEL": "info"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with enrolled_site(tmp_path) as site:
        yield site


class Writing:
    """The stamped writer beside a test; `stop` returns how many writes were answered."""

    def __init__(self, site: Site, uri: str, blocks: int, rate: int = 400) -> None:
        self.workload = Workload(77, 0, blocks)
        self.ledger = Ledger(site.directory / "ledger", self.workload)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "farshore.workload", uri, "--ledger", str(site.directory / "ledger")),
                *("--seed", "77", "--block-count", str(blocks), "--rate", str(rate)),
                *("--flush-seconds", "0.5"),
            ]
        )

    def stop(self) -> int:
        self.process.terminate()
        self.process.wait(timeout=60)
        state = self.ledger.state()
        assert not state.errors
        return state.acked


def _disk(site: Site, size: int = 24 * MIB) -> Path:
    disk = site.directory / "disk.img"
    disk.write_bytes(os.urandom(size // 2) + bytes(size - size // 2))
    return disk


def _log(site: Site) -> list[dict[str, object]]:
    lines = (site.directory / "agent-db1.log").read_text().splitlines()
    return [json.loads(line[line.index("{") :]) for line in lines if "{" in line]


def _events(site: Site, name: str) -> list[dict[str, object]]:
    return [line for line in _log(site) if line.get("event") == name]


def _caught_up(site: Site, count: int) -> bool:
    """Tell whether the newest point holds all of the writes that were answered."""
    status = site.json("status")["machines"][0]["volumes"][0]
    return bool(status["vaulted_lsn"] and status["vaulted_lsn"] >= count and site.volume("db1", "data"))


def _recovered_is_exact(site: Site, writing: Writing, acked: int) -> None:
    """Recover the newest point: the writes 1 to n, nothing else, n at least what was answered."""
    wait_for(lambda: _state(site) == "protected" and _caught_up(site, acked), 60, "everything is vaulted")
    out = site.directory / "out.raw"
    out.unlink(missing_ok=True)
    site.recover("db1", "latest", out)
    with out.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        report = check_prefix(writing.workload, read)
    assert report.exact, report
    assert report.seq >= acked


def _state(site: Site) -> str:
    return str(site.volume("db1", "data")["state"])


def test_a_volume_is_protected_listed_paused_and_let_go(site: Site) -> None:
    agent = site.start_agent("db1")
    disk = _disk(site)
    folder = site.agent_dir("db1")
    assert site.json("volume", "list", "--agent", folder) == {"volumes": []}
    printed = json.loads(
        site.cli(
            *("volume", "protect", "data", "--agent", folder, "--disk", disk),
            *("--capture", "tap-nbd", "--wait", "protected", "--json"),
        )
    )
    (volume,) = printed["volumes"]
    assert list(volume) == ["name", "disk", "capture", "device", "uri", "state", "capture_mode"]
    assert (volume["state"], volume["capture_mode"], volume["device"]) == ("protected", "data", None)
    assert volume["uri"] == f"nbd+unix:///data?socket={folder}/run/data.sock"
    for verb, state in (("pause", "paused"), ("resume", "protected")):
        site.cli("volume", verb, "data", "--agent", folder)
        assert _state(site) == state
    site.cli("volume", "resync", "data", "--agent", folder)
    wait_for(lambda: _state(site) == "protected", 30, "the resync is over")
    site.cli("volume", "protect", "data", "--agent", folder, "--disk", disk, "--capture", "tap-nbd", code=6)
    site.cli("volume", "protect", "more", "--agent", folder, "--disk", disk, "--capture", "tap-nbd", code=6)
    site.cli("volume", "protect", "x", "--agent", folder, "--disk", "/none", "--capture", "tap-nbd", code=5)
    site.cli("volume", "protect", "A B", "--agent", folder, "--disk", disk, "--capture", "tap-nbd", code=2)
    site.cli("volume", "pause", "other", "--agent", folder, code=5)
    with urllib.request.urlopen(f"http://{agent.ready['metrics']}/metrics") as answer:
        metrics = answer.read().decode()
    assert 'farshore_replication_state{state="protected",volume="data"} 1.0' in metrics
    assert "farshore_agent_connected 1.0" in metrics
    with urllib.request.urlopen(f"http://{agent.ready['metrics']}/healthz") as answer:
        assert json.load(answer)["ok"]
    assert json.loads(site.cli("volume", "unprotect", "data", "--agent", folder, "--json")) == {"volumes": []}
    assert disk.stat().st_size == 24 * MIB
    assert agent.stop() == 0
    site.agents.clear()
    assert site.tap_pid("db1") is None


def test_only_one_agent_runs_in_a_directory(site: Site) -> None:
    site.start_agent("db1")
    error = run("agent", "run", site.agent_dir("db1"), code=6)
    assert error == ""


def test_a_volume_protected_without_an_agent_is_served_when_it_starts(site: Site) -> None:
    folder = site.agent_dir("db1")
    printed = site.cli(
        *("volume", "protect", "data", "--agent", folder, "--disk", _disk(site)),
        *("--capture", "tap-nbd", "--json"),
    )
    assert json.loads(printed)["volumes"][0]["state"] == "initial-replication"
    site.cli("volume", "pause", "data", "--agent", folder, code=9)
    site.start_agent("db1")
    wait_for(lambda: _state(site) == "protected", 60, "it is protected")


@pytest.mark.fault("F1")
def test_an_agent_killed_in_the_middle_of_copying_goes_on(site: Site, injected: Injected) -> None:
    env = {"FARSHORE_FAILPOINTS": "agent.before_ack_taken=kill:2"}
    site.start_agent("db1", env=env)
    folder = site.agent_dir("db1")
    disk = _disk(site, 64 * MIB)
    site.cli("volume", "protect", "data", "--agent", folder, "--disk", disk, "--capture", "tap-nbd")
    writing = Writing(site, site.volume("db1", "data")["uri"], 2000)
    wait_for(lambda: site.agents["db1"].process.poll() is not None, 60, "the agent died")
    injected("F1")
    tap = site.tap_pid("db1")
    assert tap is not None
    site.agents.pop("db1").kill()
    site.start_agent("db1")
    assert site.tap_pid("db1") == tap
    wait_for(lambda: _state(site) == "protected", 60, "it is protected")
    _recovered_is_exact(site, writing, writing.stop())
    assert not _events(site, "continuity_lost")


@pytest.mark.fault("F1")
@pytest.mark.parametrize("both", [False, True])
def test_a_killed_tap_comes_back_and_nothing_is_compared(site: Site, both: bool, injected: Injected) -> None:
    site.start_agent("db1")
    volume = site.protect("db1", "data", _disk(site))
    writing = Writing(site, volume["uri"], 2000)
    time.sleep(1)
    pid = site.tap_pid("db1")
    assert pid is not None
    if both:
        site.kill_agent("db1")
        site.start_agent("db1")
    else:
        os.kill(pid, signal.SIGKILL)
    injected("F1")
    wait_for(lambda: site.tap_pid("db1") not in (None, pid), 20, "another tap")
    wait_for(lambda: len(_events(site, "volume_opened")) > 1, 20, "it opened the volume")
    time.sleep(1)
    opened = _events(site, "volume_opened")
    assert [line["proved"] for line in opened] == [True, True], opened
    _recovered_is_exact(site, writing, writing.stop())
    assert not _events(site, "continuity_lost")


def test_an_agent_that_is_stopped_at_once_leaves_no_tap(site: Site) -> None:
    """The tap is started with the agent; told to stop, the agent may not have heard of it yet."""
    agent = site.start_agent("db1")
    site.protect("db1", "data", _disk(site))
    assert agent.stop() == 0
    for count in (2, 3, 4):
        environment = {**os.environ, "FARSHORE_LOG_LEVEL": "info"}
        arguments = [sys.executable, "-m", "farshore", "agent", "run", str(site.agent_dir("db1"))]
        with (site.directory / "agent-db1.log").open("ab") as log:
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        wait_for(lambda n=count: len(_events(site, "tap_started")) == n, 20, "a tap is started")  # type: ignore[misc]
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert not Path(f"/proc/{_events(site, 'tap_started')[-1]['pid']}").exists()
    assert not _events(site, "tap_not_stopped")


def test_a_tap_of_the_service_manager_is_neither_started_nor_stopped(site: Site) -> None:
    folder = site.agent_dir("db1")
    site.cli("volume", "protect", "data", "--agent", folder, "--disk", _disk(site), "--capture", "tap-nbd")
    tap = subprocess.Popen([sys.executable, "-m", "agent.tap", str(folder)], stdout=subprocess.DEVNULL)
    try:
        agent = site.start_agent("db1", env={"FARSHORE_TAP_UNIT": "1"})
        wait_for(lambda: _state(site) == "protected", 60, "it is protected")
        assert agent.stop() == 0
        site.agents.clear()
        assert tap.poll() is None
    finally:
        tap.terminate()
        assert tap.wait(timeout=60) == 0


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    "place",
    [
        "agent.after_protect",
        "agent.after_volume_saved",
        "agent.before_tap_start",
        "agent.before_data_sent",
        "agent.before_mark",
        "agent.after_mark",
        "agent.before_ack_taken",
    ],
)
def test_an_agent_killed_anywhere_loses_nothing(site: Site, place: str, injected: Injected) -> None:
    try:
        site.start_agent("db1", env={"FARSHORE_FAILPOINTS": f"{place}=kill"})
    except Failed:
        pytest.fail("killed before it was ready")
    folder = site.agent_dir("db1")
    arguments = (
        "volume",
        "protect",
        "data",
        "--agent",
        folder,
        "--disk",
        _disk(site),
        "--capture",
        "tap-nbd",
    )
    # Where the agent dies in the middle of protect, the command cannot know what became of it.
    dies_in_protect = place in ("agent.after_protect", "agent.after_volume_saved", "agent.before_tap_start")
    site.cli(*arguments, code=9 if dies_in_protect else 0)
    writing = None
    if not dies_in_protect:
        writing = Writing(site, site.volume("db1", "data")["uri"], 1000)
    wait_for(lambda: site.agents["db1"].process.poll() is not None, 60, f"{place} was reached")
    injected("F1")
    site.agents.pop("db1").kill()
    site.start_agent("db1")
    wait_for(lambda: _state(site) == "protected", 60, "it is protected")
    if writing is None:
        writing = Writing(site, site.volume("db1", "data")["uri"], 1000)
        time.sleep(1)
    _recovered_is_exact(site, writing, writing.stop())


def _dead(site: Site, place: str) -> None:
    """The agent dies at ``place``; the tap lives on."""
    wait_for(lambda: site.agents["db1"].process.poll() is not None, 60, f"{place} was reached")
    assert site.agents["db1"].process.returncode == -signal.SIGKILL
    site.agents.pop("db1").kill()


@pytest.mark.fault("F1")
def test_killed_before_what_was_healed_is_unmarked_it_is_healed_again(site: Site, injected: Injected) -> None:
    folder = site.agent_dir("db1")
    place = "agent.before_dirty_clear"
    site.cli("volume", "protect", "data", "--agent", folder, "--disk", _disk(site), "--capture", "tap-nbd")
    path = folder / "volumes" / "data" / "volume.toml"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(("segment_", "quota_"))]
    small = [f"segment_bytes = {MIB}", f"quota_bytes = {4 * MIB}"]
    path.write_text("\n".join([*small, *kept, ""]))
    site.start_agent("db1", env={"FARSHORE_FAILPOINTS": f"{place}=kill"})
    wait_for(lambda: _state(site) == "protected", 60, "it is protected")
    site.kill_server()
    writing = Writing(site, site.volume("db1", "data")["uri"], 5000, rate=2000)
    wait_for(lambda: site.volume("db1", "data")["capture_mode"] == "bitmap", 60, "the journal is full")
    time.sleep(0.5)  # and goes on being written past
    site.start_server()
    _dead(site, place)
    injected("F1")
    site.start_agent("db1")
    acked = writing.stop()
    wait_for(lambda: _state(site) == "protected", 60, "it is protected")
    site.cli("point", "create", "db1", "--tag", "healed", "--wait", "vaulted")
    assert site.json("point", "list", "db1")[-1]["consistency"] == "crash"
    out = site.directory / "healed.raw"
    site.recover("db1", "latest", out)
    assert out.read_bytes() == (site.directory / "disk.img").read_bytes()
    assert acked > 5000
    assert not _events(site, "continuity_lost")


@pytest.mark.fault("F1")
def test_killed_after_a_compare_was_required_it_is_compared(site: Site, injected: Injected) -> None:
    place = "agent.after_resync_required"
    site.start_agent("db1")
    site.protect("db1", "data", _disk(site))
    site.kill_agent("db1")
    for path in (site.agent_dir("db1") / "volumes" / "data").iterdir():
        if path.name != "volume.toml":
            path.unlink()  # what the vault has last is in no journal any more
    site.start_agent("db1", env={"FARSHORE_FAILPOINTS": f"{place}=kill"})
    _dead(site, place)
    injected("F1")
    site.start_agent("db1")
    writing = Writing(site, site.volume("db1", "data")["uri"], 1000)
    time.sleep(1)
    acked = writing.stop()
    wait_for(lambda: _state(site) == "protected", 60, "it is protected")
    _recovered_is_exact(site, writing, acked)
    assert [line["kind"] for line in _events(site, "copying_started")][-1] == "resync"


@pytest.mark.fault("F1")
def test_copiers_killed_before_a_copy_lose_nothing(site: Site, injected: Injected) -> None:
    site.start_agent("db1", env={"FARSHORE_FAILPOINTS": "agent.copier_before_copy=kill:2"})
    folder, disk = site.agent_dir("db1"), _disk(site)
    site.cli("volume", "protect", "data", "--agent", folder, "--disk", disk, "--capture", "tap-nbd")
    wait_for(lambda: len(_events(site, "copier_ended")) >= 3, 60, "three of them die")
    injected("F1", len(_events(site, "copier_ended")))
    assert _state(site) == "initial-replication"
    site.agents.pop("db1").kill()
    site.start_agent("db1")
    wait_for(lambda: _state(site) == "protected", 60, "it is protected")
    out = site.directory / "out.raw"
    site.recover("db1", "latest", out)
    assert out.read_bytes() == disk.read_bytes()


@pytest.mark.needs("loop", "fuse", "qemu-storage-daemon", "losetup", "blkid")
def test_a_loop_device_outlives_a_killed_tap_and_goes_when_let_go(site: Site) -> None:
    site.start_agent("db1")
    volume = site.protect("db1", "data", _disk(site), "--attach", "loop")
    device = volume["device"]
    assert device.startswith("/dev/loop")
    descriptor = os.open(device, os.O_RDWR)
    try:
        os.pwrite(descriptor, b"a" * BLOCK_BYTES, 0)
        os.fsync(descriptor)
        pid = site.tap_pid("db1")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        os.pwrite(descriptor, b"b" * BLOCK_BYTES, BLOCK_BYTES)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    assert site.volume("db1", "data")["device"] == device
    wait_for(lambda: _state(site) == "protected", 30, "it is protected")
    site.cli("volume", "unprotect", "data", "--agent", site.agent_dir("db1"))
    assert (site.directory / "disk.img").read_bytes()[
        : 2 * BLOCK_BYTES
    ] == b"a" * BLOCK_BYTES + b"b" * BLOCK_BYTES


def test_an_agent_that_is_not_enrolled_says_so(tmp_path: Path) -> None:
    run("agent", "run", tmp_path, code=3)
    run("volume", "list", "--agent", tmp_path, code=3)
    with pytest.raises(Failed):
        Daemon("agent", "run", tmp_path, log=tmp_path / "log")
