"""Scanned volumes, alone and beside a tap's, through lost sessions: what is offered was so."""

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3
from prometheus_client import CollectorRegistry

from agent.capture.engines import Engines
from agent.capture.scan import ScanReplica, fresh
from agent.config import AgentConfig
from agent.metrics import Metrics
from agent.replicate.ports import VolumeSpec
from agent.replicate.replica import Replica
from agent.replicate.replicator import Replicator
from farshore.clock import SystemClock
from farshore.errors import Failed
from farshore.ids import new_id
from farshore.units import MIB
from tests.fakes.tap import FakeJournal, FakeTap
from tests.harness.ingest import Site

pytestmark = pytest.mark.timeout(180)
SIZE = 24 * MIB + 1536


class Machine:
    """A scanned disk, and with ``tapped`` one behind a fake tap, enrolled at a real site."""

    def __init__(self, root: Path, site: Site, rng: random.Random, *, tapped: bool) -> None:
        self.root, self.site, self.rng = root, site, rng
        identity = root / "identity"
        identity.mkdir(parents=True)
        (identity / "ca.pem").write_bytes(site.authority.certificate)
        (identity / "cert.pem").write_bytes(site.certificate)
        (identity / "key.pem").write_bytes(site.key)
        self.tap = FakeTap(root / "volumes" / "data", site.machine, 4 * MIB, rng) if tapped else None
        folder = root / "volumes" / "root"
        folder.mkdir(parents=True)
        self.disk = folder / "disk.img"
        self.disk.write_bytes(rng.randbytes(SIZE // 2) + bytes(SIZE - SIZE // 2))
        self.spec = VolumeSpec(new_id(), "root", self.disk, SIZE, 512, folder, folder / "state")
        self.states = {blake3(self.disk.read_bytes()).digest()}

    @contextlib.asynccontextmanager
    async def running(self, address: tuple[str, int]) -> AsyncIterator[tuple[Replicator, ScanReplica]]:
        config = AgentConfig(
            "host-1", self.site.machine.hex(), self.site.keys.vault_id.hex(), (f"{address[0]}:{address[1]}",)
        )
        registry = CollectorRegistry()
        replicas: list[Replica] = []
        # Without a tap there is nobody whom a call could reach.
        tap = Engines(self.tap, lambda: replicas, SystemClock())  # type: ignore[arg-type]
        metrics = Metrics(registry, lambda: replicas)
        replicator = Replicator(self.root, config, tap, metrics, random.Random(1))
        scan = ScanReplica(self.spec, 1.0, True, SystemClock())
        if self.tap is not None:
            replicas.append(Replica(self.tap.spec, FakeJournal(self.tap)))
        replicas.append(scan)
        for replica in replicas:
            await replicator.add(replica)
        task = asyncio.create_task(replicator.run())
        try:
            yield replicator, scan
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            scan.close()
            assert registry.get_sample_value("farshore_reconnects_total", {"reason": "internal"}) == 0

    def write(self, blocks: int) -> None:
        """Somebody writes to the scanned disk."""
        with self.disk.open("r+b") as file:
            for _ in range(blocks):
                file.seek(self.rng.randrange(SIZE // 512 - 64) * 512)
                length = 512 * self.rng.randint(1, 64)
                file.write(self.rng.randbytes(length) if self.rng.random() < 0.7 else bytes(length))
        self.states.add(blake3(self.disk.read_bytes()).digest())

    def check(self) -> set[int]:
        """Hold every point that may be offered against what was there; return the passes they are of."""
        passes = set()
        for commit, image in self.site.images(self.spec.id):
            entry = commit.volume(self.spec.id)
            assert entry is not None
            if not entry.fuzzy:
                passes.add(entry.lsn)
                assert blake3(image).digest() in self.states, f"pass {entry.lsn}"
        if self.tap is not None:
            for commit, image in self.site.images(self.tap.spec.id):
                entry = commit.volume(self.tap.spec.id)
                assert entry is not None
                if not entry.fuzzy and commit.head.cut_seq in self.tap.digests:
                    assert blake3(image).digest() == self.tap.digests[commit.head.cut_seq]
        return passes


@pytest.mark.parametrize("tapped", [False, True])
async def test_through_lost_sessions_every_point_that_is_offered_was_so(tmp_path: Path, tapped: bool) -> None:
    site, rng = Site.make(tmp_path), random.Random(11)
    machine = Machine(tmp_path / "agent", site, rng, tapped=tapped)

    async def disturb(replicator: Replicator) -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.01, 1.0))
            if machine.tap is not None:
                machine.tap.work(3)
                machine.tap.settle()
            replicator.renew()

    async with site.server(workers=1, point_interval_s=0.1) as server:
        for _ in range(2):  # agent processes
            async with machine.running(server.address) as (replicator, scan):
                for _ in range(3):
                    machine.write(20)
                    disturbing = asyncio.create_task(disturb(replicator))
                    await asyncio.sleep(rng.uniform(0.5, 2.5))
                    disturbing.cancel()
                    machine.write(5)
                    async with fresh([scan]):
                        assert site.image(machine.spec.id) == machine.disk.read_bytes()
                if machine.tap is not None:
                    machine.tap.settle()
                for _ in range(400):
                    head = site.commits()[-1].head
                    if head.consistency == "crash":
                        break
                    await asyncio.sleep(0.05)
                assert head.consistency == "crash", (head, scan.problem, replicator.reason)
                assert scan.name_state() == "protected"
    passes = machine.check()
    assert len(passes) >= 3


async def test_a_disk_that_cannot_be_read_to_its_end_fails_and_never_becomes_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.make(tmp_path)
    machine = Machine(tmp_path / "agent", site, random.Random(3), tapped=False)
    async with (
        site.server(workers=1, point_interval_s=0.1) as server,
        machine.running(server.address) as (_, scan),
    ):
        async with fresh([scan]):
            whole = site.image(machine.spec.id)
        assert whole == machine.disk.read_bytes()
        look = scan.look
        # The copiers meet an error in the middle of the pass: there is less than its beginning showed.
        monkeypatch.setattr(scan, "look", lambda: dataclasses.replace(look(), size_bytes=SIZE + MIB + 1024))
        machine.write(50)
        with pytest.raises(Failed, match="the disk ends at byte"):
            async with fresh([scan]):
                pass
        assert scan.name_state() == "failed"
        assert scan.running is None
        monkeypatch.undo()
        async with fresh([scan]):
            assert scan.name_state() == "protected"
            assert site.image(machine.spec.id) == machine.disk.read_bytes()
    assert len(machine.check()) >= 2
