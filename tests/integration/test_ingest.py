"""The process server over real TLS: what is acknowledged can be read back, what is wrong changes nothing."""

import random
from pathlib import Path

import pytest

from farshore.wire import messages as m
from tests.harness.ingest import BLOCK, Agent, Site

pytestmark = pytest.mark.timeout(120)


async def test_copy_then_writes_then_a_new_session_goes_on_where_it_was(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    rng = random.Random(1)
    for at in range(0, agent.size_bytes, BLOCK):
        if rng.random() < 0.7:
            agent.disk[at : at + BLOCK] = rng.randbytes(BLOCK)
    async with site.server(workers=2) as server:
        wire, welcome = await agent.connect(server.address)
        assert welcome.volumes[0].empty
        await wire.send(agent.start())
        bulk = await agent.attach(server.address, welcome)
        tokens = await agent.copy_all(bulk)
        ack = await agent.vaulted(wire, agent.mark(tokens))
        assert ack.consistency == "crash"
        assert site.image(agent.volume) == agent.disk
        for _ in range(5):
            agent.write([(rng.randrange(1000) * 4096, rng.randbytes(4096)) for _ in range(20)])
            await wire.send(*agent.data())
            ack = await agent.vaulted(wire, agent.mark())
            assert ack.volumes[0].lsn == agent.lsn
            assert ack.volumes[0].digest == agent.chain.value
        assert site.image(agent.volume) == agent.disk
        assert ack.point == f"rp-{site.machine.hex()[:8]}-{ack.seq}"
        wire.close()
        wire, welcome = await agent.connect(server.address)
        position = welcome.volumes[0]
        assert (position.lsn, position.digest, position.copied) == (agent.lsn, agent.chain.value, True)
        await wire.send(agent.start())
        agent.write([(0, b"again" + bytes(507))])
        await wire.send(*agent.data())
        await agent.vaulted(wire, agent.mark(tag="after"))
        wire.close()
    commits = site.commits()
    assert commits[-1].head.tag == "after"
    assert [commit.head.kind for commit in commits[:2]] == ["fence", "data"]
    async with site.server(workers=1) as server:
        wire, welcome = await agent.connect(server.address)
        assert welcome.epoch == 2
        assert welcome.volumes[0].lsn == agent.lsn
    assert site.image(agent.volume) == agent.disk


async def test_an_idle_mark_is_acknowledged_without_a_commit(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        await wire.send(agent.start())
        first = await agent.vaulted(wire, agent.mark())
        second = await agent.vaulted(wire, agent.mark())
        assert (second.seq, second.cut_seq) == (first.seq, 2)
        agent.write([(4096, b"x" * 4096)])
        await wire.send(*agent.data())
        third = await agent.vaulted(wire, agent.mark())
        assert third.seq == first.seq + 1
    assert site.commits()[-1].head.idle_since_ns is not None


@pytest.mark.parametrize("fault", ["gap", "other", "cut", "hash", "beyond", "volume", "mark"])
async def test_a_bad_frame_is_refused_and_changes_nothing(tmp_path: Path, fault: str) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        await wire.send(agent.start())
        agent.write([(0, b"a" * 4096)])
        await wire.send(*agent.data())
        await agent.vaulted(wire, agent.mark())
        before = site.image(agent.volume)
        match fault:
            case "gap":
                agent.write([(0, b"b" * 4096)])
                agent.write([(0, b"c" * 4096)])
                await wire.send(*agent.data())
                code = "gap"
            case "other":
                other = Agent(site, volume=agent.volume, incarnation=agent.incarnation)
                other.write([(0, b"z" * 4096)])
                await wire.send(*other.data())
                code = "conflict"
            case "cut":
                agent.write([(0, b"b" * 4096)])
                data, raw = agent.data()
                await wire.send(data, raw[:-512])
                code = "corrupt"
            case "hash":
                agent.disk[0:BLOCK] = b"q" * BLOCK
                copy, raw = agent.copy(0, BLOCK)
                await wire.send(copy, b"r" + raw[1:])
                code = "corrupt"
            case "beyond":
                agent.disk += bytearray(4096)
                agent.write([(agent.size_bytes - 512, b"b" * 4096)])
                await wire.send(*agent.data())
                code = "bounds"
            case "volume":
                await wire.send(m.Data(bytes(16), 2, 2), agent.batches[0][2])
                code = "protocol"
            case "mark":
                agent.lsn += 5
                await wire.send(agent.mark())
                code = "gap"
        error = await wire.ended()
        assert error is not None
        assert error.code == code
        assert site.image(agent.volume) == before
    assert len(site.commits()) == 2
