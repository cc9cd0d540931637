"""The agent's replication against the real process server and vault; only the tap is a fake."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from agent.config import AgentConfig
from agent.metrics import Metrics
from agent.replicate.replica import Replica
from agent.replicate.replicator import Replicator
from farshore.units import MIB
from tests.fakes.tap import FakeJournal, FakeTap
from tests.harness.ingest import Site

pytestmark = pytest.mark.timeout(120)


class Machine:
    """A replicator with a fake tap, enrolled at a real site."""

    def __init__(self, root: Path, site: Site, size: int) -> None:
        self.root, self.site = root, site
        identity = root / "identity"
        identity.mkdir(parents=True)
        (identity / "ca.pem").write_bytes(site.authority.certificate)
        (identity / "cert.pem").write_bytes(site.certificate)
        (identity / "key.pem").write_bytes(site.key)
        self.tap = FakeTap(root / "volumes" / "data", site.machine, size, random.Random(7))
        self.replica = Replica(self.tap.spec, FakeJournal(self.tap))

    @contextlib.asynccontextmanager
    async def running(self, address: tuple[str, int]) -> AsyncIterator[Replicator]:
        servers = (f"{address[0]}:{address[1]}",)
        config = AgentConfig("host-1", self.site.machine.hex(), self.site.keys.vault_id.hex(), servers)
        registry = CollectorRegistry()
        replicator = Replicator(
            self.root,
            config,
            self.tap,
            Metrics(registry, lambda: replicator.replicas.values()),
            random.Random(1),
        )
        self.replica = Replica(self.tap.spec, FakeJournal(self.tap))
        await replicator.add(self.replica)
        task = asyncio.create_task(replicator.run())
        try:
            yield replicator
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert registry.get_sample_value("farshore_reconnects_total", {"reason": "internal"}) == 0

    async def vaulted(self, replicator: Replicator) -> None:
        self.tap.settle()
        for _ in range(1500):
            head = self.site.commits()[-1].head if self.site.commits() else None
            if (
                self.replica.name_state() == "protected"
                and self.replica.vaulted_lsn == self.tap.captured
                and head is not None
                and head.consistency == "crash"
            ):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"{self.replica.name_state()}, {replicator.reason}")
        assert self.site.image(self.tap.spec.id) == bytes(self.tap.truth)


async def test_everything_written_ends_up_in_the_vault(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    machine = Machine(tmp_path / "agent", site, 40 * MIB + 1536)
    async with site.server(workers=2) as server, machine.running(server.address) as replicator:
        for _ in range(40):
            machine.tap.work(10)
            await asyncio.sleep(0.02)
        await machine.vaulted(replicator)
        machine.tap.bypass()
        machine.tap.work(10)
        await machine.vaulted(replicator)
        assert not machine.tap.dirty_set
        await replicator.resync("data")
        machine.tap.work(10)
        await asyncio.sleep(0.3)
        await machine.vaulted(replicator)
    # Another agent process, another server process: they go on where the vault stands.
    async with site.server(workers=1) as server, machine.running(server.address) as replicator:
        machine.tap.work(10)
        await machine.vaulted(replicator)
        await machine.tap.resync_required(machine.tap.spec.id, machine.tap.captured, 0)
        machine.tap.work(10)
        await asyncio.sleep(0.3)
        await machine.vaulted(replicator)
        assert not machine.tap.resync_flag
