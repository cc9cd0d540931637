"""Killed at each failpoint of ingest, server or worker: what was acknowledged is there, and at a cut (F1)."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.failpoints import known_failpoints
from tests.harness.faults import Injected
from tests.harness.ingest import Agent, Ended, Site, close_all

pytestmark = pytest.mark.timeout(120)

BATCHES_MAX = 30
POINTS = sorted(name for name in known_failpoints() if name.startswith(("ingest.", "vault.chain.")))
OFTEN = [(point, hit) for point in POINTS for hit in (1, 3) if hit == 1 or point != "ingest.before_fence"]
MORE_OFTEN = [(point, hit) for point in POINTS for hit in (2, 4, 5, 6) if point != "ingest.before_fence"]
"""A server puts up its fence once."""


@pytest.mark.fault("F1")
@pytest.mark.parametrize(
    ("point", "hit"), [*OFTEN, *(pytest.param(*at, marks=pytest.mark.nightly) for at in MORE_OFTEN)]
)
async def test_nothing_acknowledged_is_lost(tmp_path: Path, point: str, hit: int, injected: Injected) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site, size_bytes=4 * 1024 * 1024)
    rng = random.Random(hit)
    images = {0: bytes(agent.size_bytes)}
    acknowledged = 0

    async def serve(failpoints: str) -> "tuple[subprocess.Popen[bytes], int]":
        server = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "tests.harness.ingest", str(tmp_path), "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "FARSHORE_FAILPOINTS": failpoints},
        )
        assert server.stdout is not None
        with server.stdout as output:
            return server, int(await asyncio.to_thread(output.readline))

    async def work(port: int) -> None:
        nonlocal acknowledged
        wire, welcome = await agent.connect(("127.0.0.1", port))
        assert welcome.volumes[0].lsn >= acknowledged
        await wire.send(agent.start())
        for index, (first, _, _, _) in enumerate(agent.batches):
            if first > welcome.volumes[0].lsn:
                await wire.send(*agent.data(index))
        agent.cut_seq = max(agent.cut_seq, welcome.head_seq)
        for _ in range(3):
            # More than goes into a commit object, so that packs are stored, too.
            agent.write([(n * 65536, rng.randbytes(65536)) for n in rng.sample(range(64), 24)])
            images[agent.lsn] = bytes(agent.disk)
            await wire.send(*agent.data())
            ack = await agent.vaulted(wire, agent.mark(tag="now"))
            acknowledged = max(acknowledged, ack.volumes[0].lsn)
        wire.close()

    server, port = await serve(f"{point}=kill:{hit}")
    died = True
    with contextlib.suppress(Ended, OSError, TimeoutError):
        while len(agent.batches) < BATCHES_MAX:
            await work(port)
        died = False
    assert died, f"{point} is not reached {hit} times"
    injected("F1")
    server.kill()
    await asyncio.to_thread(server.wait)
    commits = [commit for commit in site.commits() if commit.head.kind == "data"]
    newest = commits[-1].head.volumes[0].lsn if commits else 0
    assert newest >= acknowledged
    assert not commits or site.image(agent.volume) == images[newest]
    server, port = await serve("")
    await work(port)
    assert site.image(agent.volume) == agent.disk
    server.kill()
    await asyncio.to_thread(server.wait)
    await close_all()


def test_there_are_failpoints_between_the_durable_steps() -> None:
    assert {"ingest.before_pack_put", "ingest.before_commit", "ingest.after_commit"} <= set(POINTS)
