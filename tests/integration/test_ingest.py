"""The process server over real TLS: what is acknowledged can be read back, what is wrong changes nothing."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3

from farshore.errors import Conflict, Failed
from farshore.ids import new_id
from farshore.wire import messages as m
from process_server import service
from tests.harness.faults import Injected
from tests.harness.ingest import BLOCK, Agent, Site, Wire, close_all

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


async def test_a_volume_that_an_agent_does_not_introduce_stays_in_every_point_until_it_is_removed(
    tmp_path: Path,
) -> None:
    """As an agent that cannot open a disk does: left out, the volume would be missing in a recovery."""
    site = Site.make(tmp_path)
    data, more = Agent(site), Agent(site)

    async def session(*protected: bytes) -> Wire:
        wire = await Wire.connect(server.address, site.context())
        volume = msgspec.structs.replace(more.hello().volumes[0], name="more")
        hello = msgspec.structs.replace(more.hello(), volumes=(volume,), protected=protected or None)
        await wire.send(hello)
        await wire.expect(m.Welcome)
        await wire.send(more.start())
        return wire

    async def written(wire: Wire, text: bytes) -> m.Ack:
        more.write([(4096, text * 4096)])
        await wire.send(*more.data())
        return await more.vaulted(wire, more.mark())

    async with site.server(workers=1) as server:
        wire, _ = await data.connect(server.address)
        await wire.send(data.start())
        data.write([(0, b"d" * 4096)])
        await wire.send(*data.data())
        assert (await data.vaulted(wire, data.mark())).consistency == "crash"
        for protected in ((), (more.volume, data.volume)):
            wire, more.cut_seq = await session(*protected), 0
            assert (await written(wire, b"m")).consistency == "fuzzy"
            kept = site.commits()[-1].volume(data.volume)
            assert kept is not None
            assert (kept.lsn, kept.fuzzy, kept.copied) == (data.lsn, True, True)
        wire, welcome = await data.connect(server.address)
        assert (welcome.volumes[0].lsn, welcome.volumes[0].copied) == (data.lsn, True)
        wire, more.cut_seq = await session(), 0
        await wire.send(m.VolumeRemove(data.volume))
        assert (await written(wire, b"n")).consistency == "crash"
        assert site.commits()[-1].volume(data.volume) is None
    assert site.image(data.volume) == data.disk


@pytest.mark.parametrize(("changes", "code"), [({"first_lsn": 7}, "gap"), ({"ordinal": 1}, "conflict")])
async def test_an_incarnation_that_does_not_continue_is_refused_with_the_volume_that_needs_a_resync(
    tmp_path: Path, changes: dict[str, int], code: str
) -> None:
    """Without its name the agent would only connect again, and be refused again, for ever."""
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        await wire.send(agent.start())
        agent.write([(0, b"a" * 4096)])
        _, last_lsn, _, digest = agent.batches[-1]
        await wire.send(*agent.data())
        next_one = m.IncarnationStart(
            agent.volume,
            new_id(),
            agent.ordinal + 1,
            agent.incarnation,
            last_lsn,
            digest,
            last_lsn + 1,
            False,
        )
        await wire.send(msgspec.structs.replace(next_one, **changes))
        error = await wire.ended()
        assert error is not None
        assert (error.code, error.volume) == (code, agent.volume)


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


async def test_a_repeat_is_ignored_and_counted(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        await wire.send(agent.start())
        for value in b"abc":
            agent.write([(0, bytes([value]) * 4096)])
            await wire.send(*agent.data())
        for index in (0, 1, 2):
            await wire.send(*agent.data(index))
        ack = await agent.vaulted(wire, agent.mark())
        assert ack.volumes[0].lsn == 3
    rows = site.commits()[-1].rows
    assert rows["lsn"].tolist() == [1, 2, 3]
    assert site.image(agent.volume) == agent.disk


async def test_a_mark_is_fuzzy_until_everything_copied_is_below_it(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        await wire.send(agent.start())
        agent.write([(0, b"a" * 4096)])
        await wire.send(*agent.data())
        assert (await agent.vaulted(wire, agent.mark(copied=False))).consistency == "fuzzy"
        assert (await agent.vaulted(wire, agent.mark(copy_end=2))).consistency == "fuzzy"
        assert (await agent.vaulted(wire, agent.mark(fuzzy=True, copy_end=1))).consistency == "fuzzy"
        assert (await agent.vaulted(wire, agent.mark(copy_end=1))).consistency == "crash"


async def test_an_unchanged_volume_is_the_same_and_its_chunks_are_known(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site, size_bytes=8 * 1024 * 1024)
    agent.disk[: 4 * BLOCK] = random.Random(3).randbytes(4 * BLOCK)
    agent.disk[20 * BLOCK : 60 * BLOCK] = random.Random(4).randbytes(40 * BLOCK)

    def offer(token: int) -> m.Offer:
        blocks = [bytes(agent.disk[at : at + BLOCK]) for at in range(0, agent.size_bytes, BLOCK)]
        return m.Offer(
            token,
            agent.volume,
            tuple(
                m.OfferChunk(n * BLOCK, BLOCK, blake3(block).digest() if any(block) else b"")
                for n, block in enumerate(blocks)
            ),
        )

    async with site.server(workers=1) as server:
        wire, welcome = await agent.connect(server.address)
        await wire.send(agent.start())
        tokens = await agent.copy_all(await agent.attach(server.address, welcome))
        await agent.vaulted(wire, agent.mark(tokens))
        wire.close()
        agent.incarnation, agent.ordinal, first = bytes(range(16)), 2, agent.lsn + 1
        wire, welcome = await agent.connect(server.address)
        await wire.send(
            m.IncarnationStart(agent.volume, agent.incarnation, 2, bytes(16), 0, bytes(32), first, True)
        )
        bulk = await agent.attach(server.address, welcome)
        await bulk.send(offer(1))
        have = await bulk.expect(m.Have)
        assert set(have.answers) == {m.HAVE_SAME}
        # One block moved, one is new: a reference will do for the first, the second is needed.
        agent.disk[BLOCK : 2 * BLOCK] = agent.disk[0:BLOCK]
        agent.disk[30 * BLOCK : 31 * BLOCK] = random.Random(5).randbytes(BLOCK)
        await bulk.send(offer(2))
        have = await bulk.expect(m.Have)
        assert have.answers[1] == m.HAVE_CHUNK
        assert have.answers[30] == m.HAVE_NEED
        assert have.answers.count(m.HAVE_SAME) == len(have.answers) - 2
        hashes = [blake3(agent.disk[n * BLOCK : (n + 1) * BLOCK]).digest() for n in (1, 30)]
        wrong = m.Copy(
            90, agent.volume, agent.lsn, (m.CopyChunk(30 * BLOCK, BLOCK, m.COPY_REFERENCE, hashes[1]),)
        )
        await bulk.send(wrong)
        assert (await bulk.expect(m.Accepted)).missing == (0,)
        right = m.Copy(
            91,
            agent.volume,
            agent.lsn,
            (
                m.CopyChunk(BLOCK, BLOCK, m.COPY_REFERENCE, hashes[0]),
                m.CopyChunk(30 * BLOCK, BLOCK, m.COPY_DATA, hashes[1]),
            ),
        )
        await bulk.send(right, bytes(agent.disk[30 * BLOCK : 31 * BLOCK]))
        assert (await bulk.expect(m.Accepted)).missing == ()
        ack = await agent.vaulted(wire, agent.mark([91]))
        assert ack.consistency == "crash"
    assert site.image(agent.volume) == agent.disk


async def test_http_and_a_peer_without_a_certificate_get_nowhere(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    async with site.server(workers=1) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(10):
            assert b"HTTP" not in await reader.read()
        writer.close()
        agent = Agent(site)
        wire = await Wire.connect(server.address, site.context(certificate=False))
        await wire.send(agent.hello())
        error = await wire.ended()
        assert error is not None
        assert error.code == "auth"
        wire = await Wire.connect(server.address, site.context(certificate=False))
        await wire.send(m.Enrol(1, b"token", b"secret", "host-1", b"x" * 70_000))
        error = await wire.ended()
        assert error is not None
        assert error.code == "bounds"
        wire = await Wire.connect(server.address, site.context(certificate=False))
        await wire.send(m.Enrol(1, b"token", b"secret", "host-1", b"csr"))
        assert (await wire.expect(m.Enrolled)).certificate == b"certificate"


@pytest.mark.parametrize(("by", "level"), [("agent", 1), ("server", None)])
async def test_agents_are_told_who_compresses(tmp_path: Path, by: str, level: int | None) -> None:
    site = Site.make(tmp_path)
    async with site.server(workers=1, copies_compressed_by=by) as server:
        _, welcome = await Agent(site).connect(server.address)
        assert welcome.policy.copy_level == level


async def test_a_certificate_that_expires_meanwhile_is_no_denial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ALLOWED_S", 0.05)
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        site.identity.aged = True
        error = await wire.ended()
        assert error is not None
        assert (error.code, "expired" in error.text) == ("auth", True)
        machine = server.status()["machines"][0]  # type: ignore[index]
        assert "the machine is on the deny-list" not in machine["reasons"]


async def test_a_denied_machine_is_cut_off_at_once(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        site.identity.denied.add(site.machine)
        server.deny(site.machine)
        error = await wire.ended()
        assert error is not None
        assert error.code == "denied"
        machine = server.status()["machines"][0]  # type: ignore[index]
        assert "the machine is on the deny-list" in machine["reasons"]
        wire = await Wire.connect(server.address, site.context())
        await wire.send(agent.hello())
        error = await wire.ended()
        assert error is not None
        assert error.code == "denied"


async def test_a_point_is_made_on_request_and_status_tells_the_age(tmp_path: Path) -> None:
    began = time.monotonic()
    site = Site.make(tmp_path)
    agent = Agent(site)
    async with site.server(workers=1) as server:
        wire, _ = await agent.connect(server.address)
        await wire.send(agent.start())
        await agent.vaulted(wire, agent.mark())

        async def answer(*, fuzzy: bool) -> None:
            command = await wire.expect(m.Command)
            mark = agent.mark(tag=command.tag, fuzzy=fuzzy)
            await wire.send(mark)
            await wire.send(m.Result(command.id, True, "", mark.cut_seq))

        async with asyncio.TaskGroup() as group:
            group.create_task(answer(fuzzy=False))
            point = await server.create_point("host-1", "before-upgrade", 20)
        assert site.commits()[-1].head.tag == "before-upgrade"
        assert point.endswith(f"-{site.commits()[-1].head.seq}")
        async with asyncio.TaskGroup() as group:
            group.create_task(answer(fuzzy=True))
            with pytest.raises(Conflict):
                await server.create_point("host-1", "half", 20)
        async with asyncio.TaskGroup() as group:
            group.create_task(answer(fuzzy=True))
            point = await server.create_point("host-1", "content with half", 20, allow_fuzzy=True)
        assert point.endswith(f"-{site.commits()[-1].head.seq}")
        assert (site.commits()[-1].head.tag, site.commits()[-1].head.consistency) == (
            "content with half",
            "fuzzy",
        )
        with pytest.raises(Failed):
            await server.create_point("host-1", "never", 0.2)
        machine = server.status()["machines"][0]  # type: ignore[index]
        assert machine["rpo_seconds"] is None
        await agent.vaulted(wire, agent.mark())
        ping = await wire.expect(m.Ping)
        status = m.VolumeStatus(agent.volume, agent.incarnation, agent.lsn, agent.lsn, 0, "data", "protected")
        await wire.send(m.Pong(ping.id, (status,)))

        def machine_now() -> dict[str, Any]:
            return server.status()["machines"][0]  # type: ignore[index, no-any-return]

        await until(lambda: machine_now()["rpo_seconds"] is not None)
        await asyncio.sleep(0.3)
        aged = machine_now()
        assert 0.2 < aged["rpo_seconds"] < time.monotonic() - began
        assert aged["health"] == "ok", aged["reasons"]
        wire.close()
        await until(lambda: machine_now()["health"] == "critical")


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.fault("F1")
async def test_a_killed_worker_costs_a_reconnect_and_nothing_that_was_acknowledged(
    tmp_path: Path, injected: Injected
) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    rng = random.Random(9)
    async with site.server(workers=1) as server:
        for round_number in range(3):
            wire, welcome = await agent.connect(server.address)
            position = welcome.volumes[0]
            assert position.lsn <= agent.lsn
            await wire.send(agent.start())
            for index, (first, _, _, _) in enumerate(agent.batches):
                if first > position.lsn:
                    await wire.send(*agent.data(index))
            acked = await agent.vaulted(wire, agent.mark())
            assert acked.volumes[0].lsn == agent.lsn
            agent.write([(rng.randrange(900) * 4096, rng.randbytes(4096)) for _ in range(50)])
            await wire.send(*agent.data())
            pid = server._pool.workers[0].process.pid
            await wire.send(agent.mark())
            os.kill(pid, signal.SIGKILL)
            injected("F1")
            await wire.ended()
            async with asyncio.timeout(30):  # the connection may end before the pool hears of it
                while pid in {worker.process.pid for worker in server._pool.workers}:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await server._pool.wait_ready()
            assert round_number < 3
        wire, welcome = await agent.connect(server.address)
        await wire.send(agent.start())
        for index, (first, _, _, _) in enumerate(agent.batches):
            if first > welcome.volumes[0].lsn:
                await wire.send(*agent.data(index))
        await agent.vaulted(wire, agent.mark())
        assert site.image(agent.volume) == agent.disk


@pytest.mark.fault("F1")
async def test_a_killed_server_has_everything_it_acknowledged(tmp_path: Path, injected: Injected) -> None:
    site = Site.make(tmp_path)
    agent = Agent(site)
    rng = random.Random(11)
    images: dict[int, bytes] = {0: bytes(agent.size_bytes)}
    for _ in range(2):
        server = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "tests.harness.ingest", str(tmp_path), "2"],
            stdout=subprocess.PIPE,
        )
        assert server.stdout is not None
        with server.stdout as output:
            port = int(await asyncio.to_thread(output.readline))
        wire, welcome = await agent.connect(("127.0.0.1", port))
        await wire.send(agent.start())
        for index, (first, _, _, _) in enumerate(agent.batches):
            if first > welcome.volumes[0].lsn:
                await wire.send(*agent.data(index))
        acked = await agent.vaulted(wire, agent.mark())
        assert acked.volumes[0].lsn == agent.lsn
        for _ in range(10):
            agent.write([(rng.randrange(900) * 4096, rng.randbytes(4096)) for _ in range(20)])
            images[agent.lsn] = bytes(agent.disk)
            await wire.send(*agent.data())
            await wire.send(agent.mark())
        acked = await wire.expect(m.Ack)
        server.kill()
        injected("F1")
        await asyncio.to_thread(server.wait)
        wire.close()
        newest = site.commits()[-1].head.volumes[0]
        assert newest.lsn >= acked.volumes[0].lsn
        assert site.image(agent.volume) == images[newest.lsn]
    await close_all()
