"""The tap as clients see it: a disk, whatever they ask and however many ask at once."""

import asyncio
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.journal.recovery import recover, redo_records
from agent.volumes import VolumeConfig
from farshore.hrl.batch import WRITE, ZERO
from farshore.nbd import codec
from farshore.nbd.client import NbdClient, connect
from farshore.nbd.codec import RequestError
from farshore.units import KIB, MIB
from tests.harness.tap import MACHINE, TapHost

SIZE = 16 * MIB
SECTOR = 512


@pytest.fixture
def host(tmp_path: Path) -> Iterator[TapHost]:
    with TapHost(tmp_path / "agent") as made:
        yield made


def rebuilt(host: TapHost, config: VolumeConfig, initial: bytes) -> bytes:
    """The disk as the journal's records alone make it, over what was there at first."""
    image = bytearray(initial)
    folder = host.layout.volume(config.name)
    found = recover(folder, bytes.fromhex(MACHINE), config.id_bytes, every_byte=True)
    assert found.corrupt is None
    expected = 0
    for batch in redo_records(found, 0):
        assert batch.first_lsn == expected + 1
        expected = batch.last_lsn
        at = 0
        for record in batch.records:
            offset, length = int(record["offset"]), int(record["length"])
            if record["type"] == WRITE:
                image[offset : offset + length] = batch.payload[at : at + length]
            elif record["type"] == ZERO:
                image[offset : offset + length] = bytes(length)
            at += int(record["payload_length"])
    return bytes(image)


class Model:
    """What the disk must hold; ranges with writes in flight are not read."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data


operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "zero", "trim", "read", "read", "flush", "fua"]),
        st.integers(0, 255),  # sector
        st.integers(1, 64),  # sectors
        st.integers(0, 255),  # fill
        st.integers(0, 2),  # connection
    ),
    min_size=1,
    max_size=60,
)


def test_reads_see_every_answered_write_on_any_connection(tmp_path: Path) -> None:
    with TapHost(tmp_path / "agent") as host:
        config = host.add(size=SIZE, group_commit_ms=20.0)
        host.start()
        path = host.socket()
        model = Model(bytes(SIZE))

        async def run(steps: list[tuple[str, int, int, int, int]]) -> None:
            async with connect(path, "disk") as a, connect(path, "disk") as b, connect(path, "disk") as c:
                clients = (a, b, c)
                for kind, sector, count, fill, which in steps:
                    client = clients[which]
                    offset, length = sector * SECTOR, count * SECTOR
                    content = bytes([fill]) * (length - 1) + b"\1"
                    if kind in ("write", "fua"):
                        await client.write(offset, content, fua=kind == "fua")
                        model.write(offset, content)
                    elif kind in ("zero", "trim"):
                        await (client.zero if kind == "zero" else client.trim)(offset, length)
                        model.write(offset, bytes(length))
                    elif kind == "read":
                        assert await client.read(offset, length) == model.content[offset : offset + length]
                    else:
                        await client.flush()

        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        @given(operations)
        def examples(steps: list[tuple[str, int, int, int, int]]) -> None:
            asyncio.run(run(steps))

        examples()
        assert host.stop() == 0
        assert Path(config.disk).read_bytes() == bytes(model.content)
        assert rebuilt(host, config, bytes(SIZE)) == bytes(model.content)


async def test_many_writes_in_flight_from_several_clients(host: TapHost) -> None:
    config = host.add(size=64 * MIB)
    initial = os.urandom(1024) * (64 * KIB)
    Path(config.disk).write_bytes(initial)  # noqa: ASYNC240
    host.start()
    model = bytearray(initial)
    rng = random.Random(7)

    async def one(client: NbdClient, area: int) -> None:
        base = area * 16 * MIB
        for _ in range(30):
            jobs = []
            taken: set[int] = set()
            for _ in range(48):
                block = rng.randrange(16)
                if block in taken:
                    continue
                taken.add(block)
                size = rng.choice([512, 4096, 4096, 4096, 12 * KIB, 64 * KIB, 300 * KIB, MIB])
                data = rng.randbytes(16) * (size // 16)
                at = base + block * MIB
                model[at : at + size] = data
                jobs.append(client.write(at, data))
            await asyncio.gather(*jobs)
            at = base + rng.randrange(16) * MIB
            assert await client.read(at, MIB) == model[at : at + MIB]
            if rng.random() < 0.2:
                await client.flush()

    async with (
        connect(host.socket(), "disk") as a,
        connect(host.socket(), "disk") as b,
        connect(host.socket(), "disk") as c,
    ):
        await asyncio.gather(one(a, 0), one(b, 1), one(c, 2))
        assert await a.read(0, 32 * MIB) == model[: 32 * MIB]
    assert host.status().mode == "data"
    assert host.stop() == 0
    assert Path(config.disk).read_bytes() == bytes(model)  # noqa: ASYNC240
    assert rebuilt(host, config, initial) == bytes(model)


async def test_a_run_of_equal_writes_takes_the_short_way_and_arrives(host: TapHost) -> None:
    """Raw bytes: hundreds of requests in one send, as a client with a deep queue makes them."""
    config = host.add(size=SIZE)
    host.start()
    reader, writer = await asyncio.open_unix_connection(host.socket())
    await reader.readexactly(18)
    writer.write(
        (3).to_bytes(4, "big") + b"IHAVEOPT" + (1).to_bytes(4, "big") + (4).to_bytes(4, "big") + b"disk"
    )
    await reader.readexactly(10)
    model = bytearray(SIZE)
    rng = random.Random(3)
    stream, cookies = bytearray(), []
    for cookie in range(1500):
        offset = rng.randrange(SIZE // 4096) * 4096
        data = rng.randbytes(32) * 128
        if cookie % 400 == 399:  # in the middle of a run: beyond the end, refused, nothing else harmed
            offset = SIZE
        else:
            model[offset : offset + 4096] = data
        stream += codec.encode_request(codec.WRITE, cookie, offset, 4096) + data
        cookies.append((cookie, offset == SIZE))
    stream += codec.encode_request(codec.FLUSH, 77777, 0, 0)
    writer.write(bytes(stream))
    decoder = codec.ReplyDecoder()
    errors: dict[int, int] = {}
    while 77777 not in errors:
        for reply in decoder.feed(await reader.read(1 << 16)):
            errors[reply.cookie] = reply.error
    writer.close()
    assert {c: e for c, e in errors.items() if e} == {c: codec.ENOSPC for c, bad in cookies if bad}
    assert set(errors) == {77777, *(cookie for cookie, _ in cookies)}
    assert host.stop() == 0
    assert Path(config.disk).read_bytes() == bytes(model)  # noqa: ASYNC240


async def test_a_write_of_32_mib_becomes_records_of_4(host: TapHost) -> None:
    host.add(size=64 * MIB)
    host.start()
    content = os.urandom(MIB) * 32
    async with connect(host.socket(), "disk") as client:
        await client.write(512, content)
        assert await client.read(512, 32 * MIB) == content
        await client.flush()
    assert host.status().lsn == 8


async def test_what_a_client_may_not_ask_is_refused_by_number(host: TapHost) -> None:
    host.add(size=SIZE)
    host.start()
    async with connect(host.socket(), "disk") as client:
        for call, error in (
            (client.write(SIZE, bytes(512)), codec.ENOSPC),
            (client.write(100, bytes(512)), codec.EINVAL),
            (client.write(0, bytes(100)), codec.EINVAL),
            (client.read(SIZE - 512, 1024), codec.EINVAL),
            (client.zero(1 << 63, 512), codec.ENOSPC),
            (client.trim(1, 511), codec.EINVAL),
        ):
            with pytest.raises(RequestError) as caught:
                await call
            assert caught.value.error == error
        await client.write(0, bytes(512))
    assert host.status().lsn == 1


async def test_pending_writes_are_data_even_over_a_hole(host: TapHost) -> None:
    host.add(size=SIZE, group_commit_ms=500.0)
    host.start()
    async with connect(host.socket(), "disk") as client:
        before = await client.block_status(MIB, 64 * KIB)
        assert before == [codec.Extent(64 * KIB, codec.STATE_HOLE | codec.STATE_ZERO)]
        await client.write(MIB, b"x" * 4096)
        assert (await client.block_status(MIB, 64 * KIB))[0].state == 0


@pytest.mark.needs("nbdinfo", "qemu-img", "qemu-io", "nbdcopy", "fio")
def test_the_fields_own_clients(host: TapHost, tmp_path: Path) -> None:
    config = host.add(size=SIZE)
    host.start()
    uri = host.uri()

    def run(*words: str | Path) -> str:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    told = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
    assert told["export-size"] == SIZE
    assert told["can_multi_conn"]
    source = tmp_path / "source.raw"
    content = bytearray(SIZE)
    content[MIB : 3 * MIB] = os.urandom(2 * MIB)
    source.write_bytes(content)
    run("nbdcopy", "--flush", source, uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    run("qemu-io", "-f", "raw", "-c", "write -P 9 5M 1M", "-c", "discard 1M 64k", "-c", "flush", uri)
    content[5 * MIB : 6 * MIB] = b"\x09" * MIB
    content[MIB : MIB + 64 * KIB] = bytes(64 * KIB)
    back = tmp_path / "back.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, back)
    assert back.read_bytes() == bytes(content)
    verify = (
        "--verify=crc32c",
        "--verify_state_save=0",
        "--do_verify=1",
        "--verify_fatal=1",
        "--io_size=24M",
        "--size=16M",
    )
    mixed = ("--rw=randwrite", "--bsrange=4k-256k", "--bs_unaligned=0", "--iodepth=32")
    run("fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", *mixed, *verify)
    assert host.status().mode == "data"
    assert host.stop() == 0
    assert rebuilt(host, config, bytes(SIZE)) == Path(config.disk).read_bytes()


async def test_two_volumes_share_a_tap_and_a_cut(host: TapHost) -> None:
    one, two = host.add("one", SIZE), host.add("two", SIZE)
    host.start()
    first = host.cut().decoded()
    assert [volume.lsn for volume in first.volumes] == [1, 1]
    async with connect(host.socket("one"), "one") as a, connect(host.socket("two"), "two") as b:
        await a.write(0, b"1" * 512)
        second = host.cut()
        assert (second.marked, second.marks) == (True, 1)
        await b.write(0, b"2" * 512)
        third = host.cut("name")
    cut = third.decoded()
    assert (cut.tag, third.marks) == ("name", 1)
    assert {v.volume: (v.lsn, v.fuzzy) for v in cut.volumes} == {
        one.id_bytes: (3, False),
        two.id_bytes: (3, False),
    }
    idle = host.cut()
    assert (idle.marked, idle.marks) == (False, 0)
    tagged = host.cut("quiet")
    assert (tagged.marked, tagged.marks) == (True, 1)
    assert [c.decoded().seq for c in (second, third, idle, tagged)] == sorted(
        c.decoded().seq for c in (second, third, idle, tagged)
    )
    host.stop()
    host.start()
    assert host.cut().decoded().seq > tagged.decoded().seq
