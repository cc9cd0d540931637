"""What the process server takes in: COPY frames from several sender processes, into a vault in a directory.

The senders read, hash and send an image of real files over TLS, as an agent's copy does; the server verifies,
deduplicates, compresses, compares, seals, stores and commits. Prints MB/s (logical, zeros included), CPU and
memory of every process of the server.

    python3 -m bench.ingest [--image FILE] [--gib 3] [--connections 3] [--workers 3]
"""

import argparse
import asyncio
import multiprocessing
import os
import platform
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from blake3 import blake3

from farshore.pki import client_context
from farshore.wire import frames
from farshore.wire import messages as m
from process_server.config import IngestConfig
from tests.harness.ingest import Agent, Site, Wire

BLOCK = IngestConfig().chunk_bytes
FRAME = 1024 * 1024
WINDOW = 16
ZEROS = bytes(BLOCK)


def make_image(path: Path, size: int) -> None:
    """Fill ``path`` with the programs and libraries of this host, then a sixth of zeros."""
    with open(path, "wb", buffering=0) as out:
        left = size - size // 6
        while left > 0:
            before = left
            for folder in ("/usr/lib", "/usr/bin", "/usr/share", sys.prefix):
                for found in sorted(Path(folder).rglob("*")):
                    if left <= 0:
                        break
                    if not found.is_file() or found.is_symlink() or found.stat().st_size < 65536:
                        continue
                    with open(found, "rb") as source:
                        data = source.read(min(left, 64 * 1024 * 1024))
                    # Copies of this pass differ from the last one's, so that dedup finds what is alike only.
                    if before != size - size // 6:
                        data = bytes([len(data) & 255]) + data[:-1]
                    left -= out.write(data)
        out.truncate(size)


class Sender:
    """Blocking TLS over memory buffers, as the agent's copy processes do it."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, session: bytes) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing)
        self.buffer = bytearray(256 * 1024)
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.flush()
                self.fill()
        self.flush()
        self.send(frames.encode(m.Attach(session)))
        assert isinstance(self.receive(), m.Attached)

    def flush(self) -> None:
        if self.outgoing.pending:
            self.socket.sendall(self.outgoing.read())

    def fill(self) -> None:
        count = self.socket.recv_into(self.buffer)
        assert count, "the server closed"
        self.incoming.write(memoryview(self.buffer)[:count])

    def send(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self.tls.write(part)
        self.flush()

    def exactly(self, size: int) -> bytes:
        out = b""
        while len(out) < size:
            try:
                out += self.tls.read(size - len(out))
            except ssl.SSLWantReadError:
                self.fill()
        return out

    def receive(self) -> m.Message:
        header = frames.decode_header(self.exactly(frames.HEADER.size))
        return frames.decode_message(header, self.exactly(header.meta_bytes))


def send_stripe(
    path: str,
    number: int,
    count: int,
    address: tuple[str, int],
    pems: tuple[bytes, bytes, bytes, bytes],
    session: bytes,
    volume: bytes,
    pipe: Connection,
) -> None:
    ca, vault_id, certificate, key = pems
    context = client_context(ca, vault_id, certificate=certificate, private_key=key)
    sender = Sender(address, context, session)
    source = os.open(path, os.O_RDONLY)
    size = os.fstat(source).st_size
    buffer = bytearray(FRAME)
    view = memoryview(buffer)
    waiting, tokens = 0, []
    pipe.send("ready")
    pipe.recv()
    for at in range(number * FRAME, size, count * FRAME):
        length = os.preadv(source, [buffer], at)
        chunks, parts = [], []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            if buffer.startswith(ZEROS[: end - start], start):
                chunks.append(m.CopyChunk(at + start, end - start, m.COPY_ZEROS, b""))
            else:
                piece = view[start:end]
                chunks.append(m.CopyChunk(at + start, end - start, m.COPY_DATA, blake3(piece).digest()))
                parts.append(piece)
        token = at // FRAME + 1
        message = m.Copy(token, volume, 0, tuple(chunks))
        sender.send(frames.encode(message, sum(map(len, parts))), *parts)
        tokens.append(token)
        waiting += 1
        while waiting >= WINDOW:
            answer = sender.receive()
            assert not isinstance(answer, m.Error), answer
            waiting -= isinstance(answer, m.Accepted)
    while waiting:
        answer = sender.receive()
        assert not isinstance(answer, m.Error), answer
        waiting -= isinstance(answer, m.Accepted)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pipe.send((tokens, usage.ru_utime + usage.ru_stime))


def tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in children for grandchild in tree(int(child)))]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def run(options: argparse.Namespace, root: Path) -> None:
    image = Path(options.image) if options.image else root / "image"
    if not image.exists():
        make_image(image, int(options.gib * 2**30))
    size = image.stat().st_size
    site = Site.make(root)
    server = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "tests.harness.ingest", str(root), str(options.workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    address = ("127.0.0.1", port)
    agent = Agent(site, size_bytes=size, disk=bytearray(1))
    spawn = multiprocessing.get_context("spawn")
    try:
        wire, welcome = await agent.connect(address)
        await wire.send(agent.start())
        pems = (site.authority.certificate, site.keys.vault_id, site.certificate, site.key)
        pipes = []
        for number in range(options.connections):
            ours, theirs = spawn.Pipe()
            spawn.Process(
                target=send_stripe,
                args=(
                    str(image),
                    number,
                    options.connections,
                    address,
                    pems,
                    welcome.session,
                    agent.volume,
                    theirs,
                ),
                daemon=True,
            ).start()
            pipes.append(ours)
        for pipe in pipes:
            await asyncio.to_thread(pipe.recv)
        before = {pid: cpu_s(pid) for pid in tree(server.pid)}
        peak = 0.0
        started = time.monotonic()
        for pipe in pipes:
            pipe.send("go")

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, sum(map(pss_mib, tree(server.pid))))
                await asyncio.sleep(0.5)

        async def listen() -> None:
            while True:
                message = await wire.receive()
                if isinstance(message, m.Ping):
                    await wire.send(m.Pong(message.id, ()))

        watching = asyncio.create_task(watch())
        listening = asyncio.create_task(listen())
        results = [await asyncio.to_thread(pipe.recv) for pipe in pipes]
        accepted = time.monotonic() - started
        listening.cancel()
        await asyncio.wait([listening])
        tokens = [token for found, _ in results for token in found]
        await agent.vaulted(wire, agent.mark(tokens))
        elapsed = time.monotonic() - started
        watching.cancel()
        server_cpu = {pid: cpu_s(pid) - before.get(pid, 0.0) for pid in tree(server.pid)}
        agent_cpu = sum(cpu for _, cpu in results)
        stored = sum(found.stat().st_size for found in (root / "vault" / "p").rglob("*") if found.is_file())
        print(f"{size / 1e9:.2f} GB, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(
            f"vaulted in {elapsed:.2f} s, {size / 1e6 / elapsed:.0f} MB/s; last ACCEPTED at {accepted:.2f} s"
        )
        each = " ".join(f"{value:.1f}" for value in server_cpu.values())
        print(f"server CPU {sum(server_cpu.values()):.1f} s ({each}), senders {agent_cpu:.1f} s")
        print(f"stored {stored / 1e9:.2f} GB; server PSS at most {peak:.0f} MiB")
        if options.verify:
            left = blake3(site.image(agent.volume)).digest() == blake3(image.read_bytes()).digest()
            print("image read back equal" if left else "IMAGE DIFFERS")
        Wire.close(wire)
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", help="source image; made from this host's files by default")
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--dir", help="where the vault goes; a temporary directory by default")
    parser.add_argument("--verify", action="store_true", help="read the image back from the vault")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        asyncio.run(run(options, root))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
