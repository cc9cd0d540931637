"""Replication over real TLS, with real copiers, against a process server in a page.

The oracle is the same everywhere: the tap keeps a digest of what the workload had written at each cut, and
every point that may be offered must have exactly that digest.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from agent.config import AgentConfig
from agent.metrics import Metrics
from agent.replicate.replica import Replica
from agent.replicate.replicator import Replicator
from farshore.ids import new_id
from farshore.units import MIB
from farshore.wire import messages as m
from tests.fakes.process_server import CuttingProxy, FakeServer, make_identity
from tests.fakes.tap import FakeJournal, FakeTap
from tests.harness.faults import Injected

SIZE = 20 * MIB + 5 * 512


@dataclass
class Site:
    """One machine with one volume and its server."""

    folder: Path
    server: FakeServer
    tap: FakeTap
    replicator: Replicator
    replica: Replica
    registry: CollectorRegistry
    task: asyncio.Task[None]

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
        for _ in range(int(seconds / 0.02)):
            if self.task.done():
                self.task.result()
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {what} ({self.replicator.reason})")

    async def protected(self) -> None:
        await self.until(lambda: self.replica.name_state() == "protected", "the volume is protected")

    async def vaulted(self) -> None:
        """Wait until everything written is in a point that may be offered."""
        self.tap.settle()
        await self.until(
            lambda: (
                self.replica.name_state() == "protected"
                and self.tap.vaulted_lsn == self.tap.captured
                and bool(self.server.points)
                and not self.server.points[-1].fuzzy
            ),
            "everything is vaulted",
        )
        assert bytes(self.server.volumes[self.tap.spec.id].content) == bytes(self.tap.truth)
        self.check_points()

    def check_points(self) -> int:
        """Hold every point that may be offered against what was written at its cut; return how many."""
        offered = [point for point in self.server.points if not point.fuzzy]
        for point in offered:
            assert point.digest == self.tap.digests[point.cut_seq], point
        return len(offered)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


Start = Callable[..., Awaitable[Site]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    async with contextlib.AsyncExitStack() as stack:

        async def begin(
            *,
            seed: int = 1,
            through: Callable[[int], Awaitable[int]] | None = None,
            epoch: int = 1,
            copy_level: int | None = 1,
        ) -> Site:
            vault, machine = new_id(), new_id()
            make_identity(tmp_path / "identity", vault, machine)
            server = FakeServer(tmp_path / "identity", vault, machine)
            server.epoch = epoch
            server.policy = msgspec.structs.replace(server.policy, copy_level=copy_level)
            await server.start()
            stack.push_async_callback(server.close)
            port = server.port if through is None else await through(server.port)
            tap = FakeTap(tmp_path / "volumes" / "data", machine, SIZE, random.Random(seed))
            stack.callback(tap.close)
            config = AgentConfig("db1", machine.hex(), vault.hex(), (f"127.0.0.1:{port}",))
            registry = CollectorRegistry()
            metrics = Metrics(registry, lambda: replicator.replicas.values())
            replicator = Replicator(tmp_path, config, tap, metrics, random.Random(seed))
            replica = Replica(tap.spec, FakeJournal(tap))
            await replicator.add(replica)
            task = asyncio.create_task(replicator.run())

            async def stop() -> None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                internal = registry.get_sample_value("farshore_reconnects_total", {"reason": "internal"})
                assert internal == 0, "a session ended with an exception that nobody expected"

            stack.push_async_callback(stop)
            return Site(tmp_path, server, tap, replicator, replica, registry, task)

        yield begin


async def test_a_volume_is_copied_while_it_is_written_to(start: Start) -> None:
    site = await start()
    for _ in range(60):
        site.tap.work(15)
        await asyncio.sleep(0.02)
    await site.vaulted()
    assert site.check_points() > 0
    assert not site.server.refusals
    assert site.metric("farshore_agent_connected") == 1
    assert site.metric("farshore_sent_bytes_total", stage="raw") == site.server.plain_bytes


@pytest.mark.parametrize("copy_level", [None, 1])
async def test_copies_come_in_the_form_that_the_server_asks_for(start: Start, copy_level: int | None) -> None:
    site = await start(copy_level=copy_level)
    await site.vaulted()
    assert site.check_points() > 0
    wanted = {m.COPY_ZSTD, m.COPY_DENSE} if copy_level else {m.COPY_DATA}
    came = site.server.copied_kinds - {m.COPY_ZEROS}
    assert came
    assert came <= wanted


async def test_an_unchanged_volume_is_only_compared(start: Start) -> None:
    site = await start()
    await site.vaulted()
    sent = site.server.plain_bytes
    await site.replicator.resync("data")
    await site.until(lambda: site.replica.resync, "the resync begins")
    await site.vaulted()
    tail = SIZE % 65536
    assert site.server.plain_bytes - sent <= tail
    assert site.metric("farshore_agent_copied_bytes_total", result="same") >= SIZE - tail


async def test_a_reference_that_does_not_hold_is_sent_as_bytes(start: Start) -> None:
    site = await start()
    await site.vaulted()
    # The vault lost the volume but remembers the hashes; REFERENCE is refused from now on.
    site.server.volumes[site.tap.spec.id].content[: 2 * MIB] = bytes(2 * MIB)
    site.server.forget_references = True
    await site.replicator.resync("data")
    await site.until(lambda: site.replica.resync, "the resync begins")
    await site.vaulted()
    assert site.metric("farshore_agent_copied_bytes_total", result="referenced") == 0


async def test_a_reference_spares_the_bytes(start: Start) -> None:
    site = await start()
    await site.vaulted()
    site.server.volumes[site.tap.spec.id].content[: 2 * MIB] = site.tap.truth[2 * MIB : 4 * MIB]
    sent = site.server.plain_bytes
    site.tap.settle()
    # Blocks that the vault has elsewhere are not sent again.
    site.server.volumes[site.tap.spec.id].content[6 * MIB : 7 * MIB] = bytes(MIB)
    content = site.server.volumes[site.tap.spec.id].content
    content[10 * MIB : 11 * MIB] = site.tap.truth[6 * MIB : 7 * MIB]
    content[12 * MIB : 14 * MIB] = site.tap.truth[: 2 * MIB]
    await site.replicator.resync("data")
    await site.until(lambda: site.replica.resync, "the resync begins")
    await site.vaulted()
    assert site.metric("farshore_agent_copied_bytes_total", result="referenced") >= 2 * MIB
    assert site.server.plain_bytes - sent < 2 * MIB


async def test_writes_past_the_journal_are_healed(start: Start) -> None:
    site = await start()
    await site.vaulted()
    for _ in range(5):
        site.tap.bypass()
        site.tap.work(20)
        await asyncio.sleep(0.05)
    assert site.replica.name_state() == "degraded"
    site.tap.settle()
    await site.vaulted()
    assert not site.tap.dirty_set


async def test_lost_continuity_ends_in_a_compare_and_keeps_what_was_vaulted(start: Start) -> None:
    site = await start()
    site.tap.work(50)
    await site.vaulted()
    before = len(site.server.points)
    site.server.volumes[site.tap.spec.id].digest = bytes(32)  # as after a restore of the agent's host
    site.server.drop()
    await site.until(lambda: site.tap.resync_flag, "the tap was told")
    await site.until(lambda: site.replica.name_state() == "resync", "state resync")
    site.tap.work(50)
    await site.vaulted()
    assert not site.tap.resync_flag
    assert len(site.server.points) > before


async def test_a_tag_becomes_a_point_at_once(start: Start) -> None:
    site = await start()
    await site.vaulted()
    site.server.send(m.Command(7, "point", None, "before upgrade"))
    await site.until(lambda: any(p.tag == "before upgrade" for p in site.server.points), "the point", 5)
    result = next(result for result in site.server.results if result.id == 7)
    assert result.ok
    assert any(point.cut_seq == result.cut_seq for point in site.server.points)
    site.server.send(m.Command(8, "fly"))
    await site.until(lambda: len(site.server.results) == 2, "the answer", 5)
    assert not site.server.results[-1].ok


async def test_ping_is_answered_from_the_state_page(start: Start) -> None:
    site = await start()
    await site.vaulted()
    site.tap.write(0, b"x" * 512)
    site.server.send(m.Ping(5))
    lsn = site.tap.captured
    await site.until(lambda: bool(site.server.pongs), "the answer", 5)
    (status,) = site.server.pongs[0].volumes
    assert status.captured_lsn in (lsn, lsn + 1)  # a cut may have come between
    assert status.state == "protected"


async def test_a_paused_volume_sends_nothing_and_catches_up(start: Start) -> None:
    site = await start()
    await site.vaulted()
    site.replicator.pause("data")
    await asyncio.sleep(0.3)
    lsn = site.server.volumes[site.tap.spec.id].here[2]
    site.tap.work(30)
    site.tap.settle()
    await asyncio.sleep(0.3)
    assert site.server.volumes[site.tap.spec.id].here[2] == lsn
    assert site.replica.name_state() == "paused"
    assert Replica(site.tap.spec, FakeJournal(site.tap)).paused
    site.replicator.resume("data")
    await site.vaulted()


async def test_an_owner_of_the_past_gets_nothing(start: Start, tmp_path: Path) -> None:
    (tmp_path / "epoch").write_text("5")
    site = await start(epoch=4)
    await site.until(lambda: "owner of the past" in site.replicator.reason, "the reason")
    assert not site.server.points


@pytest.mark.fault("F1")
async def test_a_killed_copier_is_replaced(start: Start, injected: Injected) -> None:
    site = await start()
    killed = 0
    for _ in range(200):
        for pid in site.replicator.copier_pids:
            if killed < 3:
                os.kill(pid, signal.SIGKILL)
                killed += 1
                injected("F1")
        site.tap.work(3)
        await asyncio.sleep(0.02)
        if site.replica.copied:
            break
    await site.vaulted()
    assert killed == 3


@pytest.mark.fault("F16")
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(4, 100))]
)
async def test_a_link_lost_at_any_byte_loses_and_doubles_nothing(
    start: Start, seed: int, injected: Injected
) -> None:
    rng = random.Random(seed)
    proxies: list[CuttingProxy] = []

    def cut_after() -> int | None:
        # The handshake alone takes 1.5 KiB; later cuts fall into DATA, COPY, OFFER and MARK frames.
        return (
            rng.choice([rng.randint(1, 4000), rng.randint(4000, 3 * MIB)]) if proxies[0].cuts < 12 else None
        )

    async def through(port: int) -> int:
        proxies.append(CuttingProxy(port, cut_after))
        await proxies[0].start()
        return proxies[0].port

    site = await start(seed=seed, through=through)
    site.replicator._backoff.next_s = lambda: 0.01  # type: ignore[method-assign]
    for _ in range(100):
        site.tap.work(8)
        if rng.random() < 0.03:
            site.tap.bypass()
        await asyncio.sleep(0.02)

    def cut_twelve_times() -> bool:
        if proxies[0].cuts < 12:
            site.tap.work(1)  # a cut comes after so many bytes: there must be some to send
        return proxies[0].cuts >= 12

    await site.until(cut_twelve_times, "the link was cut twelve times", 60)
    injected("F16", proxies[0].cuts)
    await site.vaulted()
    assert site.check_points() > 0
    assert not site.server.refusals
    await proxies[0].close()


async def test_a_tap_that_is_away_stops_points_but_not_the_session(start: Start) -> None:
    site = await start()
    await site.vaulted()
    sessions = site.server.sessions
    site.tap.down = True
    site.tap.work(10)
    site.tap.settle()
    await asyncio.sleep(0.5)
    points = len(site.server.points)
    await asyncio.sleep(0.3)
    assert len(site.server.points) == points
    site.tap.down = False
    await site.vaulted()
    assert site.server.sessions == sessions


async def test_a_server_of_another_vault_is_refused_before_a_frame(start: Start) -> None:
    site = await start()
    await site.protected()
    site.replicator._config = AgentConfig(
        "db1", site.tap.machine.hex(), new_id().hex(), site.replicator._config.servers
    )
    sessions = site.server.sessions
    site.server.drop()
    await site.until(lambda: "not our process server" in site.replicator.reason, "the reason")
    assert site.server.sessions == sessions
    assert site.metric("farshore_reconnects_total", reason="certificate") >= 1
