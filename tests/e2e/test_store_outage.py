"""The store goes away, or answers badly, under a server with work: what goes on, and what is told."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from farshore.site import Site, wait_for
from farshore.stamps import BLOCK_BYTES, Workload, check_prefix
from farshore.units import MIB
from tests.harness.fault_proxy import FaultProxy, Storm, Trouble
from tests.harness.faults import Injected
from tests.harness.object_stores import Peer
from tests.harness.writing import writing

pytestmark = [pytest.mark.timeout(500), pytest.mark.needs("weed")]

MACHINE = "db1"
DISK_BYTES = 32 * MIB
WORKLOAD = Workload(seed=60, first_block=0, block_count=DISK_BYTES // BLOCK_BYTES)
BACK_S = 120.0
"""Longer than the longest pause between two tries of a commit, and of an agent that connects again."""


class FarVault(Site):
    """A site whose vault is reached through a proxy, and may be looked at past it."""

    def __init__(self, directory: Path, store: Peer, proxy: FaultProxy) -> None:
        super().__init__(directory)
        self.vault = store.url(proxy.port)
        self.direct = self.vault.replace(f":{proxy.port}", f":{store.port}")

    def volume_status(self) -> dict[str, Any]:
        """As the server tells it."""
        return dict(self.json("status")["machines"][0]["volumes"][0])

    def vaulted(self) -> int:
        return int(self.volume_status()["vaulted_lsn"])

    def there(self) -> int:
        """LSN of the newest point that lies in the bucket, whatever the server says."""
        words = ("--vault", self.direct, "--recovery-key-file", self.key)
        points = self.json("point", "list", MACHINE, *words)
        return int(points[-1]["volumes"]["data"]["lsn"])


@pytest.fixture
def proxy(seaweedfs: Peer) -> Iterator[FaultProxy]:
    with FaultProxy(seaweedfs.port) as proxy:
        yield proxy


@pytest.fixture
def site(tmp_path: Path, seaweedfs: Peer, proxy: FaultProxy) -> Iterator[FarVault]:
    site = FarVault(tmp_path, seaweedfs, proxy)
    site.init()
    site.start_server()
    site.enrol(MACHINE)
    site.start_agent(MACHINE)
    yield site
    site.close()


def protect(site: Site) -> str:
    disk = site.directory / "disk.img"
    disk.touch()
    os.truncate(disk, DISK_BYTES)
    return str(site.protect(MACHINE, "data", disk)["uri"])


def reached(site: FarVault, lsn: int) -> bool:
    machine = site.json("status")["machines"][0]
    return machine["state"] != "disconnected" and site.vaulted() >= lsn


def recovered(site: FarVault, point: str) -> bytes:
    image = site.directory / "recovered.img"
    site.vault = site.direct
    site.recover(MACHINE, point, image)
    return image.read_bytes()


@pytest.mark.fault("F18")
def test_while_the_store_is_away_writes_go_on_and_nothing_is_called_vaulted(
    site: FarVault, proxy: FaultProxy, injected: Injected
) -> None:
    outage(site, proxy, injected, seconds=6, rate=500)


@pytest.mark.nightly
@pytest.mark.fault("F18")
def test_a_store_that_is_away_for_longer_than_anybody_asks_again_is_used_when_it_is_back(
    site: FarVault, proxy: FaultProxy, injected: Injected
) -> None:
    outage(site, proxy, injected, seconds=75, rate=2000)


def outage(site: FarVault, proxy: FaultProxy, injected: Injected, *, seconds: float, rate: int) -> None:
    uri = protect(site)
    server = site.server
    assert server is not None
    with writing(uri, WORKLOAD, site.directory / "ledger", rate=rate) as ledger:
        first = site.vaulted()
        wait_for(lambda: site.vaulted() > first + rate, 60, "replication")
        proxy.go_away()
        injected("F18")
        gone = time.monotonic()
        answered = ledger.state().acked
        frozen = site.there()
        while time.monotonic() < gone + seconds:
            told = site.vaulted()
            assert told <= site.there()
            time.sleep(0.5)
        assert site.there() == frozen
        wait_for(lambda: ledger.state().acked > answered + rate, 60, "the workload to go on")
        wait_for(lambda: site.volume_status()["captured_lsn"] > frozen + rate, 60, "the journal to grow")
        owed = site.volume_status()["captured_lsn"]
        assert server.process.poll() is None
        proxy.come_back()
        wait_for(lambda: site.vaulted() >= owed, BACK_S, "what was written meanwhile")
        assert site.vaulted() <= site.there()
        acked = ledger.state()
    assert acked.errors == 0
    point = site.json("point", "create", MACHINE, "--tag", "end", "--wait", "vaulted")["point"]
    points = site.json("point", "list", MACHINE)
    states = [point["consistency"] for point in points]
    assert "fuzzy" not in states[states.index("crash") :], "the journal carried everything: no new copy"
    expected = (site.directory / "disk.img").read_bytes()
    site.kill_agent(MACHINE)
    assert server.process.poll() is None
    content = recovered(site, point)
    assert content == expected
    report = check_prefix(WORKLOAD, lambda at, length: content[at : at + length])
    assert report.exact
    assert report.seq >= acked.acked


@pytest.mark.fault("F22")
def test_while_the_credentials_are_refused_the_server_says_so_and_goes_on_when_they_are_good_again(
    site: FarVault, proxy: FaultProxy, injected: Injected
) -> None:
    uri = protect(site)
    server = site.server
    assert server is not None
    with writing(uri, WORKLOAD, site.directory / "ledger", rate=2000) as ledger:
        goal = site.vaulted() + 2000
        wait_for(partial(reached, site, goal), 60, "replication")
        refused = Trouble("403", count=2**31)
        proxy.plan(refused)
        frozen = site.there()
        wait_for(lambda: refused.happened >= 8, BACK_S, "the server to ask again")
        wait_for(lambda: ledger.state().acked > frozen + 8000, BACK_S, "the workload to go on")
        assert site.there() - frozen <= 4000, "what was on its way may have arrived, no more"
        assert server.process.poll() is None
        injected("F22", refused.happened)
        proxy.clear()
        goal = ledger.state().acked
        wait_for(partial(reached, site, goal), BACK_S, "what was written meanwhile")
        acked = ledger.state()
    assert acked.errors == 0
    assert "the store refuses the credentials" in (site.directory / "server.log").read_text()
    point = site.json("point", "create", MACHINE, "--tag", "end", "--wait", "vaulted")["point"]
    expected = (site.directory / "disk.img").read_bytes()
    site.kill_agent(MACHINE)
    assert recovered(site, point) == expected


@pytest.mark.fault("F18", "F19", "F20")
def test_in_a_storm_nothing_is_told_that_is_not_so_and_nothing_is_lost(
    site: FarVault, proxy: FaultProxy, injected: Injected
) -> None:
    uri = protect(site)
    with writing(uri, WORKLOAD, site.directory / "ledger", rate=500) as ledger:
        proxy.plan(Storm(8, 0.2, "reset", "lost", "503", "cut", "slow"))
        for _ in range(2):
            goal = site.vaulted() + 1000
            wait_for(partial(reached, site, goal), BACK_S, "replication in a storm")
            assert site.vaulted() <= site.there()
            site.kill_server()
            site.start_server()
            wait_for(partial(reached, site, goal + 1000), BACK_S, "replication to go on in the storm")
        struck = proxy.clear()
        acked = ledger.state().acked
    for fault in ("F18", "F19", "F20"):
        injected(fault, struck)
    point = site.json("point", "create", MACHINE, "--tag", "end", "--wait", "vaulted")["point"]
    expected = (site.directory / "disk.img").read_bytes()
    log = (site.directory / "server.log").read_text()
    assert "machine_superseded" not in log, "it was fenced by its own commits"
    site.kill_agent(MACHINE)
    content = recovered(site, point)
    assert content == expected
    assert check_prefix(WORKLOAD, lambda at, length: content[at : at + length]).seq >= acked
