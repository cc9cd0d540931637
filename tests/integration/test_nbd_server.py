"""The generic NBD server and client against each other and against the field's own programs."""

import asyncio
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farshore.errors import ConfigError, NotFound, Unreachable
from farshore.nbd import codec
from farshore.nbd.client import NbdClient, connect, parse_uri
from farshore.nbd.codec import Extent, RequestError
from farshore.nbd.server import NbdServer
from farshore.units import KIB, MIB

SIZE = 16 * MIB


class MemoryDisk:
    """An export in memory, with what is asked of it on record."""

    def __init__(self, size: int = SIZE, *, read_only: bool = False) -> None:
        self.content = bytearray(size)
        self.read_only = read_only
        self.block_bytes = 512
        self.flushes = 0
        self.slow = asyncio.Event()
        self.slow.set()
        self.fail: int = 0

    @property
    def size(self) -> int:
        return len(self.content)

    async def read(self, offset: int, length: int) -> bytes:
        if self.fail:
            raise OSError(self.fail, os.strerror(self.fail))
        return bytes(self.content[offset : offset + length])

    async def write(self, offset: int, data: bytes, *, fua: bool) -> None:
        del fua
        await self.slow.wait()
        self.content[offset : offset + len(data)] = data

    async def flush(self) -> None:
        self.flushes += 1

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        await self.zero(offset, length, may_punch=True, fua=fua)

    async def zero(self, offset: int, length: int, *, may_punch: bool, fua: bool) -> None:
        del may_punch, fua
        self.content[offset : offset + length] = bytes(length)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        found = []
        while length:
            step = min(length, 64 * KIB - offset % (64 * KIB))
            data = self.content[offset : offset + step].count(0) != step
            found.append(Extent(step, 0 if data else codec.STATE_HOLE | codec.STATE_ZERO))
            offset, length = offset + step, length - step
        return found


async def run(*command: str | Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (command, out, err)
    return out.decode()


@contextmanager
def peer(listens: Path, *command: str | Path) -> Iterator[None]:
    process = subprocess.Popen([str(word) for word in command])
    try:
        for _ in range(500):
            if listens.exists():
                break
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


def uri(path: Path, name: str = "disk") -> str:
    return f"nbd+unix:///{name}?socket={path}"


async def test_client_and_server_hold_what_is_written(tmp_path: Path) -> None:
    disk, path = MemoryDisk(), tmp_path / "s"
    async with NbdServer({"disk": disk}).listen_unix(path), connect(path, "disk") as client:
        rng = random.Random(1)
        model = bytearray(SIZE)
        for _ in range(20):
            jobs, taken = [], set[int]()
            for _ in range(16):
                block = rng.randrange(SIZE // (256 * KIB))
                if block in taken:
                    continue
                taken.add(block)
                content = rng.randbytes(rng.choice([512, 4096, 256 * KIB]))
                model[block * 256 * KIB : block * 256 * KIB + len(content)] = content
                jobs.append(client.write(block * 256 * KIB, content))
            await asyncio.gather(*jobs)
        await client.zero(0, 8192)
        await client.trim(MIB, 4096)
        model[:8192] = bytes(8192)
        model[MIB : MIB + 4096] = bytes(4096)
        await client.flush()
        assert disk.flushes == 1
        assert await client.read(0, SIZE) == bytes(model)
        assert sum(e.length for e in await client.block_status(0, SIZE)) == SIZE


async def test_a_slow_write_does_not_hold_up_a_read(tmp_path: Path) -> None:
    disk, path = MemoryDisk(), tmp_path / "s"
    async with NbdServer({"disk": disk}).listen_unix(path), connect(path, "disk") as client:
        disk.slow.clear()
        writing = asyncio.ensure_future(client.write(0, bytes(512)))
        assert await client.read(512, 512) == bytes(512)
        assert not writing.done()
        disk.slow.set()
        await writing


async def test_requests_that_cannot_be_served_are_answered_with_the_protocols_errors(tmp_path: Path) -> None:
    disk, path = MemoryDisk(), tmp_path / "s"
    async with NbdServer({"disk": disk}).listen_unix(path), connect(path, "disk") as client:

        async def error_of(call: object) -> int:
            with pytest.raises(RequestError) as caught:
                await call  # type: ignore[misc]
            return caught.value.error

        assert await error_of(client.read(SIZE, 512)) == codec.EINVAL
        assert await error_of(client.write(SIZE - 512, bytes(1024))) == codec.ENOSPC
        assert await error_of(client.write(1, bytes(512))) == codec.EINVAL
        assert await error_of(client.read(0, 0)) == codec.EINVAL
        assert await error_of(client.zero(1 << 63, 512)) == codec.ENOSPC
        disk.fail = 5
        assert await error_of(client.read(0, 512)) == codec.EIO
        disk.fail = 116
        assert await error_of(client.read(0, 512)) == codec.EIO
        disk.fail = 0
        assert await client.read(0, 512) == bytes(512)


async def test_read_only_exports_refuse_every_way_to_write(tmp_path: Path) -> None:
    disk, path = MemoryDisk(read_only=True), tmp_path / "s"
    async with NbdServer({"disk": disk}).listen_unix(path), connect(path, "disk") as client:
        assert client.read_only
        for call in (client.write(0, bytes(512)), client.trim(0, 512), client.zero(0, 512)):
            with pytest.raises(RequestError):
                await call


async def test_connecting_fails_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(Unreachable, match="cannot connect"):
        async with connect(path, "disk"):
            pass
    async with NbdServer({"disk": MemoryDisk()}).listen_unix(path):
        with pytest.raises(NotFound, match="nope"):
            async with connect(path, "nope"):
                pass
        with pytest.raises(ConfigError, match="somebody listens"):
            async with NbdServer({}).listen_unix(path):
                pass
    assert not path.exists()
    with pytest.raises(ConfigError, match="107"):
        async with NbdServer({}).listen_unix(tmp_path / ("x" * 120)):
            pass


async def test_a_server_that_goes_away_fails_every_call(tmp_path: Path) -> None:
    disk, path = MemoryDisk(), tmp_path / "s"
    disk.slow.clear()
    serving = NbdServer({"disk": disk}).listen_unix(path)
    await serving.__aenter__()
    async with connect(path, "disk") as client:
        writing = asyncio.ensure_future(client.write(0, bytes(512)))
        await asyncio.sleep(0.05)
        await serving.__aexit__(None, None, None)
        with pytest.raises(Unreachable):
            await writing
        with pytest.raises(Unreachable):
            await client.flush()


async def test_a_cancelled_call_leaves_the_connection_in_step(tmp_path: Path) -> None:
    disk, path = MemoryDisk(), tmp_path / "s"
    async with NbdServer({"disk": disk}).listen_unix(path), connect(path, "disk") as client:
        content = os.urandom(8 * MIB)
        for delay in (0, 0.0005, 0.002, 0.01):
            writing = asyncio.ensure_future(client.write(0, content))
            await asyncio.sleep(delay)
            writing.cancel()
            await asyncio.wait([writing])
            await client.write(8 * MIB, b"x" * 512)
            assert await client.read(8 * MIB, 512) == b"x" * 512


async def test_tcp_and_uris(tmp_path: Path) -> None:
    async with NbdServer({"disk": MemoryDisk()}).listen_tcp("127.0.0.1", 0) as address:
        parsed, export = parse_uri(f"nbd://{address[0]}:{address[1]}/disk")
        assert parsed == address
        async with connect(parsed, export) as client:
            await client.write(512, b"y" * 512)
            assert await client.read(512, 512) == b"y" * 512
    assert parse_uri(uri(tmp_path / "s")) == (tmp_path / "s", "disk")


@pytest.mark.needs("nbdinfo", "qemu-img", "qemu-io", "nbdcopy")
async def test_the_fields_own_clients_work_with_it(tmp_path: Path) -> None:
    disk, path = MemoryDisk(), tmp_path / "s"
    source = tmp_path / "source.raw"
    content = bytearray(SIZE)
    content[MIB : 3 * MIB] = os.urandom(2 * MIB)
    content[SIZE - 512 :] = os.urandom(512)
    source.write_bytes(content)
    async with NbdServer({"disk": disk}).listen_unix(path):
        told = json.loads(await run("nbdinfo", "--json", uri(path)))["exports"][0]
        assert told["export-size"] == SIZE
        assert told["can_multi_conn"]
        assert told["can_fua"]
        assert "base:allocation" in told["contexts"]
        assert '"disk"' in await run("nbdinfo", "--list", f"nbd+unix://?socket={path}")
        await run("nbdcopy", "--flush", source, uri(path))
        assert disk.content == content
        compared = await run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri(path))
        assert "identical" in compared
        mapped = json.loads(await run("qemu-img", "map", "-f", "raw", "--output=json", uri(path)))
        assert [(e["start"], e["data"]) for e in mapped][:2] == [(0, False), (MIB, True)]
        io = ["write -P 7 512 1k", "write -z 4M 64k", "discard 1M 64k", "read -P 7 512 1k", "flush"]
        commands = [part for command in io for part in ("-c", command)]
        assert "error" not in await run("qemu-io", "-f", "raw", *commands, uri(path))
        back = tmp_path / "back.raw"
        await run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(path), back)
        assert back.read_bytes() == bytes(disk.content)


@pytest.mark.needs("nbdkit")
async def test_our_client_works_with_nbdkit(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with peer(path, "nbdkit", "-f", "-U", path, "memory", "16M"):
        async with connect(path, "") as client:
            await use_everything(client)


@pytest.mark.needs("qemu-nbd")
async def test_our_client_works_with_qemu_nbd(tmp_path: Path) -> None:
    path, image = tmp_path / "s", tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    with peer(path, "qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-k", path, "--discard=unmap", image):
        async with connect(path, "disk") as client:
            await use_everything(client)


async def use_everything(client: NbdClient) -> None:
    assert client.size == SIZE
    content = os.urandom(MIB)
    await asyncio.gather(*(client.write(at * MIB, content) for at in range(8)))
    await client.write(4096, b"z" * 4096, fua=True)
    await client.zero(8192, 4096)
    await client.flush()
    read = await client.read(0, MIB)
    assert read == content[:4096] + b"z" * 4096 + bytes(4096) + content[12288:]
    status = await client.block_status(0, SIZE)
    assert status[0].state == 0
    await client.trim(MIB, MIB)
    with pytest.raises(RequestError):
        await client.read(SIZE, 512)
