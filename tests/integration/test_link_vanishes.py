"""F15: the network swallows everything, and nobody closes a connection; then a whole host is gone.

Agent and server each in a network namespace of their own, with a router between them; everything else is what
a user runs.
"""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import admin
from farshore.site import Site, wait_for
from farshore.stamps import Workload, check_prefix
from farshore.units import MIB
from tests.harness.faults import Injected
from tests.harness.ledger import state_of
from tests.harness.netns import Network, established, inside, network
from tests.harness.patience import protect_and_start

pytestmark = [pytest.mark.fault("F15"), pytest.mark.needs("root", "ip"), pytest.mark.timeout(240)]

DETECT_S = 30.0
"""Within this a peer that does not answer any more is given up, on both sides."""
RESUME_S = 20.0
"""An attempt that is under way when the network is back ends within 10 s; the next comes soon after."""
PORT = 9443
MACHINE = "m1"
WORKLOAD = Workload(seed=77, first_block=0, block_count=32 * MIB // 4096)


class FarSite(Site):
    """A site whose server and agent are hosts of their own."""

    def __init__(self, directory: Path, hosts: Network) -> None:
        super().__init__(directory)
        self.hosts = hosts

    def begin(self) -> None:
        with inside(self.hosts.right):
            self.cli(
                *("server", "init", self.server_dir, "--vault", self.vault, "--recovery-key-file", self.key),
                *("--listen", f"{self.hosts.right_address}:{PORT}", "--api", "127.0.0.1:9444"),
            )
            self.start_server()
            token = self.directory / "token"
            token.write_text(self.cli("token", "create", "--machine", MACHINE))
        with inside(self.hosts.left):
            address = f"{self.hosts.right_address}:{PORT}"
            self.cli("agent", "enrol", self.agent_dir(MACHINE), "--server", address, "--token-file", token)

    def machine(self) -> dict[str, Any]:
        """As the server sees it."""
        with inside(self.hosts.right):
            found = self.json("status")["machines"]
        return next(dict(entry) for entry in found if entry["name"] == MACHINE)

    def agent_connected(self) -> bool:
        return bool(admin.ask(self.agent_dir(MACHINE), "status")["connected"])

    def events(self, event: str) -> int:
        """How often the agent has logged ``event``."""
        return (self.directory / f"agent-{MACHINE}.log").read_text().count(f'"event": "{event}"')

    def copied_bytes(self) -> float:
        """Bytes of the disk that copiers ever dealt with."""
        url = f"http://{self.agents[MACHINE].ready['metrics']}/metrics"
        with inside(self.hosts.left), urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        name = "farshore_agent_copied_bytes_total"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def seconds_until(condition: Callable[[], bool], since: float, limit_s: float, what: str) -> float:
    """Wait for ``condition``, which must come within ``limit_s`` of ``since``; returns when it did."""
    wait_for(condition, since + limit_s - time.monotonic(), what)
    return time.monotonic() - since


def test_a_swallowed_link_is_noticed_and_resumed_and_a_vanished_host_is_forgotten(
    tmp_path: Path, injected: Injected
) -> None:
    disk, ledger = tmp_path / "disk.img", tmp_path / "ledger"
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    with network() as hosts:
        site = FarSite(tmp_path, hosts)
        writer: subprocess.Popen[bytes] | None = None
        try:
            site.begin()
            with inside(hosts.left):
                uri = protect_and_start(site, MACHINE, "v", disk)["uri"]
            words = [sys.executable, "-m", "farshore.workload", uri, "--ledger", ledger, "--seed", "77"]
            words += ["--block-count", str(WORKLOAD.block_count), "--rate", "800"]
            writer = subprocess.Popen([*map(str, words)])
            first = site.machine()["volumes"][0]["vaulted_lsn"]
            wait_for(lambda: site.machine()["volumes"][0]["vaulted_lsn"] > first + 1000, 30, "replication")
            assert (site.events("connected"), site.events("copying_started")) == (1, 1)
            copied = site.copied_bytes()

            hosts.swallow()
            injected("F15")
            lost = time.monotonic()
            on_agent = seconds_until(
                lambda: not site.agent_connected(), lost, DETECT_S, "the agent to notice"
            )
            on_server = seconds_until(
                lambda: site.machine()["state"] == "disconnected", lost, DETECT_S, "the server to notice"
            )
            assert min(on_agent, on_server) > 5, "a slow link is not a dead one"
            seconds_until(lambda: not established(hosts.right, PORT), lost, DETECT_S + 5, "its sockets to go")
            hosts.let_through()
            back = time.monotonic()
            seconds_until(site.agent_connected, back, RESUME_S, "the agent to come back by itself")
            where = site.machine()["volumes"][0]["vaulted_lsn"]
            wait_for(lambda: site.machine()["volumes"][0]["vaulted_lsn"] > where + 1000, 30, "replication")
            assert site.machine()["state"] == "protected"
            # It went on behind the last vaulted record: nothing was compared, copied or missing.
            assert site.copied_bytes() == copied
            for event in ("continuity_lost", "volume_refused", "journal_not_readable", "session_failed"):
                assert site.events(event) == 0
            writer.terminate()
            assert writer.wait(timeout=60) == 0
            with inside(hosts.right):
                site.json("point", "create", MACHINE, "--tag", "end", "--wait", "vaulted")

            hosts.unplug_left()
            injected("F15")
            gone = time.monotonic()
            site.kill_agent(MACHINE)
            hosts.remove_left()
            seconds_until(
                lambda: site.machine()["state"] == "disconnected", gone, DETECT_S, "the server to free it"
            )
            seconds_until(lambda: not established(hosts.right, PORT), gone, DETECT_S + 5, "its sockets to go")
        finally:
            if writer is not None:
                writer.kill()
                writer.wait()
            site.close()
    state = state_of(ledger)
    assert (state.errors, state.reconnects) == (0, 0)
    assert state.acked == state.sent > 3000
    image = tmp_path / "image"
    site.recover(MACHINE, "latest", image)
    content = image.read_bytes()
    assert content == disk.read_bytes()
    report = check_prefix(WORKLOAD, lambda offset, length: content[offset : offset + length])
    assert report.exact
    assert report.seq == state.acked
