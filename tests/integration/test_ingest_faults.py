"""Sessions that break off, repeat, reorder, lose or corrupt frames: the vault stays at a cut, the next heals.

F15 to F17 of the fault matrix. Sampled with a fixed seed; ``--nightly`` takes every byte boundary.
"""

import asyncio
import random
import socket
import time
from pathlib import Path

import pytest

from farshore.wire import frames
from farshore.wire import messages as m
from tests.harness.faults import Injected
from tests.harness.ingest import Agent, Ended, Site, Wire, close_all, reset_on_close

pytestmark = pytest.mark.timeout(600)

Frame = tuple[m.Message, bytes]


def script(agent: Agent, rng: random.Random) -> tuple[list[Frame], dict[int, bytes]]:
    """Return the frames of a session after WELCOME, and the disk at each LSN that a cut passes through."""
    images = {0: bytes(agent.size_bytes)}
    said: list[Frame] = [(agent.start(), b"")]
    for _ in range(3):
        for _ in range(2):
            agent.write([(rng.randrange(60) * 512, rng.randbytes(512)) for _ in range(3)])
            said.append(agent.data())
        said.append((agent.mark(), b""))
        images[agent.lsn] = bytes(agent.disk)
    return said, images


def encode(said: list[Frame]) -> bytes:
    return b"".join(frames.encode(message, len(raw)) + raw for message, raw in said)


async def heal(site: Site, agent: Agent, address: tuple[str, int], images: dict[int, bytes]) -> None:
    """Check that the vault is at a cut; then send what is missing and check that nothing is."""
    wire, welcome = await agent.connect(address)
    position = welcome.volumes[0]
    assert position.lsn in images
    if position.lsn:
        assert site.image(agent.volume) == images[position.lsn]
    await wire.send(agent.start())
    for index, (first, _, _, _) in enumerate(agent.batches):
        if first > position.lsn:
            await wire.send(*agent.data(index))
    await agent.vaulted(wire, agent.mark(tag="healed"))
    assert site.image(agent.volume) == agent.disk
    wire.close()


@pytest.mark.fault("F16")
async def test_a_connection_cut_at_any_byte_leaves_a_cut_and_is_resumed(
    tmp_path: Path, request: pytest.FixtureRequest, injected: Injected
) -> None:
    site = Site.make(tmp_path)
    rng = random.Random(16)
    length = len(encode(script(Agent(site, size_bytes=65536), rng)[0]))
    nightly = request.config.getoption("--nightly")
    cuts = range(length + 1) if nightly else sorted(rng.sample(range(length + 1), 24))
    async with site.server(workers=1) as server:
        for cut in cuts:
            agent = Agent(site, size_bytes=65536)
            said, images = script(agent, rng)
            wire, _ = await agent.connect(server.address)
            wire.writer.write(encode(said)[:cut])
            await wire.writer.drain()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.05)
            reset_on_close(wire)
            injected("F16")
            await heal(site, agent, server.address, images)


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(20, 400))]
)
async def test_mutated_frames_are_ignored_or_refused(tmp_path: Path, seed: int, injected: Injected) -> None:
    site = Site.make(tmp_path)
    rng = random.Random(seed)
    async with site.server(workers=1) as server:
        for _ in range(3):
            agent = Agent(site, size_bytes=65536)
            said, images = script(agent, rng)
            mutated = list(said)
            match rng.choice(["duplicate", "reorder", "replay", "drop", "corrupt"]):
                case "duplicate":
                    at = rng.randrange(len(mutated))
                    mutated.insert(at, mutated[at])
                case "reorder":
                    at = rng.randrange(len(mutated) - 1)
                    mutated[at], mutated[at + 1] = mutated[at + 1], mutated[at]
                case "replay":
                    mutated += mutated[: rng.randrange(1, len(mutated))]
                case "drop":
                    del mutated[rng.randrange(len(mutated))]
            stream = bytearray(encode(mutated))
            if len(mutated) == len(said) and mutated == said:
                at = rng.randrange(len(stream))
                stream[at] ^= 1 << rng.randrange(8)
            wire, _ = await agent.connect(server.address)
            wire.writer.write(bytes(stream))
            try:
                async with asyncio.timeout(1.5):
                    while not (isinstance(ack := await wire.receive(), m.Ack) and ack.cut_seq == 3):
                        pass
            except (Ended, TimeoutError):
                pass
            reset_on_close(wire)
            injected("F17")
            agent.cut_seq = 100
            await heal(site, agent, server.address, images)


@pytest.mark.fault("F17")
async def test_a_recorded_session_replayed_by_another_connection_changes_nothing(
    tmp_path: Path, injected: Injected
) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site, size_bytes=65536)
    said, images = script(agent, random.Random(17))
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        wire.writer.write(encode(said))
        while (await wire.expect(m.Ack)).cut_seq < 3:
            pass
        commits = len(site.commits())
        again, _ = await agent.connect(server.address)
        error = await wire.ended()
        assert error is not None
        assert error.code == "superseded"
        again.writer.write(encode(said))
        error = await again.ended()
        assert error is not None
        injected("F17")
        assert len(site.commits()) == commits
        assert site.image(agent.volume) == images[agent.lsn]


@pytest.mark.fault("F35")
async def test_slow_and_silent_peers_are_cut_and_others_do_not_notice(
    tmp_path: Path, injected: Injected
) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        idle = [socket.create_connection(server.address) for _ in range(50)]
        trickle = await Wire.connect(server.address, site.context(certificate=False))
        trickle.writer.write(frames.encode(m.Enrol(1, b"t", b"s", "host-1", b"c"))[:7])
        huge = await Wire.connect(server.address, site.context(certificate=False))
        huge.writer.write(frames.HEADER.pack(2**32 - 1, 0, 1, 1, 0))
        error = await huge.ended()
        assert error is not None
        assert error.code == "bounds"
        wire, _ = await agent.connect(server.address)
        await wire.send(agent.start())
        started = time.monotonic()
        agent.write([(0, b"x" * 4096)])
        await wire.send(*agent.data())
        await agent.vaulted(wire, agent.mark(tag="now"))
        assert time.monotonic() - started < 5
        error = await trickle.ended(timeout_s=20)
        for sock in idle:
            sock.settimeout(15)
            assert sock.recv(1) == b""
            injected("F35")
            sock.close()
    await close_all()
