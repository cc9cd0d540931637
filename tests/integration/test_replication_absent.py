"""Two volumes behind one fake tap, one of which it does not serve for a while; server and vault are real."""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from blake3 import blake3
from prometheus_client import CollectorRegistry

from agent.config import AgentConfig
from agent.metrics import Metrics
from agent.replicate import marks as marks_module
from agent.replicate.replica import Replica
from agent.replicate.replicator import Replicator
from farshore.units import MIB
from process_server.vault.commit import Commit
from tests.fakes.tap import FakeJournal, FakeTap, FakeTaps
from tests.harness.ingest import Site

pytestmark = pytest.mark.timeout(180)
SIZE = 6 * MIB + 1536
WHY = "there is no such disk: /dev/none"


class Machine:
    """Volumes ``data`` and ``more``, enrolled at a real site."""

    def __init__(self, root: Path, site: Site) -> None:
        self.root, self.site = root, site
        identity = root / "identity"
        identity.mkdir(parents=True)
        (identity / "ca.pem").write_bytes(site.authority.certificate)
        (identity / "cert.pem").write_bytes(site.certificate)
        (identity / "key.pem").write_bytes(site.key)
        rng = random.Random(5)
        self.data, self.more = (
            FakeTap(root / "volumes" / name, site.machine, SIZE, rng) for name in ("data", "more")
        )
        self.more.spec = dataclasses.replace(self.more.spec, name="more")
        self.taps = FakeTaps(self.data, self.more)

    @contextlib.asynccontextmanager
    async def running(
        self, address: tuple[str, int], begin: Callable[[Replica], object] = lambda replica: None
    ) -> AsyncIterator[tuple[Replicator, Replica, Replica]]:
        """An agent process; ``begin`` says what is known of ``more`` when it starts."""
        config = AgentConfig(
            "host-1", self.site.machine.hex(), self.site.keys.vault_id.hex(), (f"{address[0]}:{address[1]}",)
        )
        registry = CollectorRegistry()
        metrics = Metrics(registry, lambda: replicator.replicas.values())
        replicator = Replicator(self.root, config, self.taps, metrics, random.Random(1))
        data, more = (Replica(tap.spec, FakeJournal(tap)) for tap in (self.data, self.more))
        begin(more)
        for replica in (data, more):
            await replicator.add(replica)
        task = asyncio.create_task(replicator.run())
        try:
            yield replicator, data, more
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            internal = registry.get_sample_value("farshore_reconnects_total", {"reason": "internal"})
            assert internal == 0, "a session ended with an exception that nobody expected"

    def write(self, *taps: FakeTap) -> None:
        for tap in taps:
            tap.work(5)
            tap.settle()

    def newest(self) -> Commit:
        return self.site.commits()[-1]

    def is_whole(self) -> bool:
        """The newest point can be offered and has everything that was written."""
        return self.newest().head.consistency == "crash" and all(
            self.site.image(tap.spec.id) == bytes(tap.truth) for tap in self.taps.taps
        )

    def has(self, tap: FakeTap) -> bool:
        return self.site.image(tap.spec.id) == bytes(tap.truth)

    def check(self) -> None:
        """No point lacks a volume that one before had; what may be offered was so, in both at one cut."""
        known: set[bytes] = set()
        for commit in self.site.commits():
            here = {volume.id for volume in commit.head.volumes}
            assert known <= here, commit.name
            known = here
        for tap in self.taps.taps:
            for commit, image in self.site.images(tap.spec.id):
                if commit.head.consistency == "crash" and commit.head.cut_seq in tap.digests:
                    assert blake3(image).digest() == tap.digests[commit.head.cut_seq], commit.name


async def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def quiet(replicator: Replicator) -> bool:
    """No cut is wanted and none is on its way."""
    session = replicator._session
    return session is not None and not session.marks.unacked and not session.marks.needed()


async def both_copied(machine: Machine, address: tuple[str, int]) -> None:
    async with machine.running(address) as (_, data, more):
        await until(lambda: data.name_state() == more.name_state() == "protected", "both are protected")
        machine.write(machine.data, machine.more)
        await until(machine.is_whole, "everything is vaulted")


async def test_the_others_are_compared_and_go_on_while_a_volume_is_not_served(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    machine = Machine(tmp_path / "agent", site)
    async with site.server(workers=1, point_interval_s=0.1) as server:
        await both_copied(machine, server.address)
        where = machine.newest().volume(machine.more.spec.id)
        assert where is not None
        machine.taps.gone.add(machine.more.spec.id)
        await machine.data.resync_required(machine.data.spec.id, machine.data.captured, 0)
        async with machine.running(server.address, lambda more: more.lost(WHY)) as (replicator, data, more):
            await until(lambda: data.name_state() == "protected" and not data.resync, "it is compared")
            assert not machine.data.resync_flag
            machine.write(machine.data)
            await until(lambda: machine.has(machine.data), "points go on")
            await until(lambda: quiet(replicator), "no cut is taken that would bring nothing")
            count = len(site.commits())
            (told,) = (volume for volume in _status(server)["volumes"] if volume["name"] == "more")
            assert told["state"] == "failed"
            assert any(WHY in why for why in _status(server)["reasons"])
            kept = machine.newest().volume(machine.more.spec.id)
            assert kept is not None
            assert (kept.lsn, kept.digest, kept.fuzzy, kept.copied) == (where.lsn, where.digest, True, True)
            assert machine.newest().head.consistency == "fuzzy"
            assert len(site.commits()) == count
            # It is back, and nobody writes.
            machine.taps.gone.clear()
            more.found()
            await until(machine.is_whole, "a point is whole again")
            assert more.name_state() == "protected"
            machine.write(machine.more)
            await until(machine.is_whole, "it goes on")
        rows = [commit.rows_of(machine.more.spec.id) for commit in site.commits()[count:]]
        assert all((table["lsn"] > 0).all() for table in rows), "it was copied once more"
    machine.check()


async def test_a_volume_that_goes_and_comes_back_during_a_session_ends_neither(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    machine = Machine(tmp_path / "agent", site)
    async with (
        site.server(workers=1, point_interval_s=0.1) as server,
        machine.running(server.address) as (replicator, data, more),
    ):
        await until(lambda: data.name_state() == more.name_state() == "protected", "both are protected")
        await until(machine.is_whole, "everything is vaulted")
        session = replicator._session
        for _ in range(2):
            machine.taps.gone.add(machine.more.spec.id)
            assert more.lost(WHY)
            await replicator.add(more)
            machine.write(machine.data)
            await until(lambda: machine.has(machine.data), "points go on")
            assert machine.newest().head.consistency == "fuzzy"
            machine.taps.gone.clear()
            more.found()
            await until(machine.is_whole, "a point is whole again")
        assert replicator._session is session
    machine.check()


async def test_points_wait_for_a_volume_that_is_being_opened_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.make(tmp_path)
    machine = Machine(tmp_path / "agent", site)
    async with site.server(workers=1, point_interval_s=0.1) as server:
        await both_copied(machine, server.address)
        before = len(site.commits())
        monkeypatch.setattr(marks_module, "OPEN_S", 2.0)

        def expected(more: Replica) -> None:
            more.expect(time.monotonic() + 600)

        async with machine.running(server.address, expected) as (replicator, data, more):
            await until(lambda: replicator.connected and data.name_state() == "protected", "it is connected")
            machine.write(machine.data)
            await asyncio.sleep(3.0)  # longer than for one that is served and finds no place in its journal
            assert len(site.commits()) == before
            assert replicator._session is not None
            assert not replicator._session.marks.pending
            more.found()
            await until(machine.is_whole, "everything is vaulted")
            assert [commit.head.consistency for commit in site.commits()[before:]].count("fuzzy") == 0
        machine.taps.gone.add(machine.more.spec.id)
        async with machine.running(server.address, lambda more: more.expect(time.monotonic() + 0.5)) as (
            _,
            data,
            more,
        ):
            machine.write(machine.data)
            await until(lambda: machine.has(machine.data), "points go on")
            assert machine.newest().head.consistency == "fuzzy"
            assert more.name_state() == "degraded"
    machine.check()


def _status(server: object) -> dict[str, list[dict[str, object]]]:
    (machine,) = server.status()["machines"]  # type: ignore[attr-defined]
    assert isinstance(machine, dict)
    return machine
