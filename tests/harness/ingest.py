"""A process server on a vault in a directory, and an agent that says exactly what a test wants."""

import asyncio
import os
import socket
import ssl
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import uvloop
from prometheus_client import CollectorRegistry

from farshore.clock import SystemClock
from farshore.hrl.batch import (
    RECORD,
    WRITE,
    RunningDigest,
    encode_head,
    first_digest,
    incarnation_key,
    padded,
)
from farshore.ids import new_id
from farshore.pki import Authority, client_context, key_to_pem, new_key, public_key_of
from farshore.telemetry import configure
from farshore.units import KIB
from farshore.wire import frames
from farshore.wire import messages as m
from process_server.config import IngestConfig, KeysConfig, ServerConfig
from process_server.service import ProcessServer
from process_server.vault.chain import Chain
from process_server.vault.commit import ZEROS, Commit
from process_server.vault.control import ControlStore, Machine, ServerIdentity
from process_server.vault.keys import VaultKeys, create_vault, open_vault
from process_server.vault.pack import PackReader
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store import Store, open_store
from tests.harness.copies import copied

SLOT = bytes(range(32))
BLOCK = 64 * KIB
NO_ID, NO_DIGEST = bytes(16), bytes(32)

_Message = TypeVar("_Message", bound=m.Message)


class AllowAll:
    """An identity that knows everybody but whom a test denied."""

    def __init__(self) -> None:
        self.denied: set[bytes] = set()
        self.aged = False

    async def enrol(self, message: m.Enrol) -> m.Enrolled:
        return m.Enrolled(new_id(), NO_ID, b"certificate", b"ca")

    async def renew(self, message: m.Renew) -> m.Enrolled:
        return m.Enrolled(message.machine_id, NO_ID, b"certificate", b"ca")

    def allowed(self, machine_id: bytes, certificate: bytes) -> bool:
        return machine_id not in self.denied and not self.aged

    def expired(self, certificate: bytes) -> bool:
        return self.aged

    def name_of(self, machine_id: bytes) -> str | None:
        return "host-1"


@dataclass
class Site:
    """A vault with a server identity and one enrolled machine; the server itself comes and goes."""

    root: Path
    keys: VaultKeys
    authority: Authority
    machine: bytes
    certificate: bytes
    key: bytes
    identity: AllowAll = field(default_factory=AllowAll)

    @property
    def url(self) -> str:
        return f"file://{self.root}/vault"

    @classmethod
    def make(cls, root: Path) -> "Site":
        store = open_store(f"file://{root}/vault", owner=True, create=True)
        keys = create_vault(store, RecoveryKey.generate(), SLOT)
        now_ns = time.time_ns()
        authority = Authority.create(keys.vault_id, now_ns)
        issued = authority.issue_server(keys.vault_id, now_ns)
        machine, key = new_id(), new_key()
        public = public_key_of(key)
        certificate = authority.issue_agent(keys.vault_id, machine, "host-1", public, now_ns)

        def change(control: object) -> object:
            import msgspec

            return msgspec.structs.replace(
                control,  # type: ignore[type-var]
                ca_certificate=authority.certificate,
                ca_key=authority.private_key,
                server=ServerIdentity(id=new_id(), certificate=issued.certificate, key=issued.private_key),
                machines=(Machine(id=machine, name="host-1", public_key=public, created_ns=now_ns),),
            )

        ControlStore(store, keys).update(change)  # type: ignore[arg-type]
        store.close()
        return cls(root, keys, authority, machine, certificate, key_to_pem(key))

    def config(self, **ingest: object) -> ServerConfig:
        return ServerConfig(
            self.url,
            self.keys.vault_id.hex(),
            KeysConfig("file:slot.key"),
            (),
            listen="127.0.0.1:0",
            ingest=IngestConfig(**{"chunk_bytes": BLOCK, **ingest}),  # type: ignore[arg-type]
        )

    @asynccontextmanager
    async def server(self, **ingest: object) -> AsyncIterator[ProcessServer]:
        """Run a process server in this loop, as its vault's owner, until the block ends."""
        store = open_store(self.url, owner=True)
        keys = open_vault(store, SLOT)
        server = ProcessServer(
            self.config(**ingest),
            store,
            keys,
            ControlStore(store, keys),
            SystemClock(),
            CollectorRegistry(),
            identity=self.identity,
        )
        task = asyncio.create_task(server.run())
        ready = asyncio.create_task(server.ready.wait())
        try:
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
            if task.done():
                await task
            assert server.ready.is_set()
            yield server
        finally:
            await close_all()
            ready.cancel()
            task.cancel()
            await asyncio.wait({task}, timeout=30)
            store.close()

    def context(self, *, certificate: bool = True) -> ssl.SSLContext:
        return client_context(
            self.authority.certificate,
            self.keys.vault_id,
            certificate=self.certificate if certificate else None,
            private_key=self.key if certificate else None,
        )

    def commits(self) -> list[Commit]:
        store = open_store(self.url)
        return list(Chain(store, self.keys, self.machine).iterate())

    def image(self, volume: bytes) -> bytes:
        """Return the volume as the chain's newest commit leaves it, by nothing but commits and packs."""
        return next(reversed(list(self.images(volume))), (None, b""))[1]

    def images(self, volume: bytes) -> Iterator[tuple[Commit, bytes]]:
        """Yield each commit that lists the volume, and the volume as it leaves it."""
        store = open_store(self.url)
        reader = PackReader(store, self.keys)
        image = bytearray()
        for commit in Chain(store, self.keys, self.machine).iterate():
            entry = commit.volume(volume)
            if entry is None:
                continue
            image += bytes(max(0, entry.size_bytes - len(image)))
            inside = commit.inline_reader()
            for offset, length, _, _, pack, chunk, start, _ in commit.rows_of(volume).tolist():
                if pack == ZEROS:
                    image[offset : offset + length] = bytes(length)
                    continue
                ref = commit.head.packs[pack]
                source = reader if ref.inline is None else inside
                data = source.read_chunk(ref.id, chunk)[start : start + length]
                assert len(data) == length
                image[offset : offset + length] = data
            del image[entry.size_bytes :]
            yield commit, bytes(image)


class Ended(Exception):
    """The server closed the connection; ``error`` is what it said before, if anything."""

    def __init__(self, error: m.Error | None) -> None:
        super().__init__(error)
        self.error = error


_open: "list[Wire]" = []


async def close_all() -> None:
    """Close what tests left open, before warnings about it become errors."""
    while _open:
        _open.pop().close()
    await asyncio.sleep(0.01)


class Wire:
    """One connection to the server, frame by frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.error: m.Error | None = None
        self.seen: list[m.Message] = []
        _open.append(self)

    @classmethod
    async def connect(cls, address: tuple[str, int], context: ssl.SSLContext) -> "Wire":
        return cls(*await asyncio.open_connection(*address, ssl=context, server_hostname=""))

    async def send(self, message: m.Message, raw: bytes = b"") -> None:
        self.writer.write(frames.encode(message, len(raw)) + raw)
        await self.writer.drain()

    async def receive(self) -> m.Message:
        """Return the next frame; PING is answered by nobody. Raises Ended."""
        try:
            head = await self.reader.readexactly(frames.HEADER.size)
            header = frames.decode_header(head)
            message = frames.decode_message(header, await self.reader.readexactly(header.meta_bytes))
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            raise Ended(self.error) from None
        if isinstance(message, m.Error):
            self.error = message
        return message

    async def expect(self, kind: type[_Message], timeout_s: float = 20.0) -> _Message:
        """Return the next frame of ``kind``; CREDIT, PING and the like before it are passed over."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.receive()
                if isinstance(message, kind):
                    return message
                self.seen.append(message)

    async def ended(self, timeout_s: float = 20.0) -> m.Error | None:
        """Wait until the server closes; return its ERROR."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    await self.receive()
                except Ended as exc:
                    return exc.error

    def close(self) -> None:
        self.writer.transport.abort()


@dataclass
class Agent:
    """A volume with its journal, and how far it was sent."""

    site: Site
    size_bytes: int = 4 * 1024 * 1024
    volume: bytes = field(default_factory=new_id)
    incarnation: bytes = field(default_factory=new_id)
    ordinal: int = 1
    lsn: int = 0
    cut_seq: int = 0
    token: int = 0
    disk: bytearray = field(default_factory=bytearray)
    batches: list[tuple[int, int, bytes, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk = self.disk or bytearray(self.size_bytes)
        self.key = incarnation_key(self.site.machine, self.volume, self.incarnation)
        self.chain = RunningDigest(self.key, first_digest(self.key, NO_ID, 0, NO_DIGEST))

    def hello(self) -> m.Hello:
        volume = m.VolumeHello(self.volume, "disk", self.size_bytes, 512, "protected", "data")
        return m.Hello(1, self.site.machine, "host-1", "test", 0, (volume,))

    def start(self, *, resync: bool = False) -> m.IncarnationStart:
        return m.IncarnationStart(self.volume, self.incarnation, self.ordinal, NO_ID, 0, NO_DIGEST, 1, resync)

    def write(self, writes: Sequence[tuple[int, bytes]]) -> bytes:
        """Log and apply one batch of writes; return its bytes."""
        first = self.lsn + 1
        table = b"".join(RECORD.pack(at, len(data), WRITE, 0, 0, len(data)) for at, data in writes)
        payload = b"".join(data for _, data in writes)
        head = encode_head(self.chain, first, time.time_ns(), len(writes), table, payload)
        whole = head + table + payload
        raw = whole.ljust(padded(len(whole)), b"\0")
        self.lsn += len(writes)
        for at, data in writes:
            self.disk[at : at + len(data)] = data
        self.batches.append((first, self.lsn, raw, self.chain.value))
        return raw

    def data(self, index: int = -1) -> tuple[m.Data, bytes]:
        first, last, raw, _ = self.batches[index]
        return m.Data(self.volume, first, last), raw

    def copy(self, offset: int, length: int) -> tuple[m.Copy, bytes]:
        """Return a COPY of the disk as it is now."""
        self.token += 1
        data = bytes(self.disk[offset : offset + length])
        # Every form in one frame, by turns.
        parts = [
            copied(offset + at, data[at : at + BLOCK], compress=bool(at // BLOCK % 2))
            for at in range(0, length, BLOCK)
        ]
        chunks = tuple(chunk for chunk, _ in parts)
        return m.Copy(self.token, self.volume, self.lsn, chunks), b"".join(body for _, body in parts)

    def mark(
        self,
        tokens: Sequence[int] = (),
        *,
        tag: str | None = None,
        copied: bool = True,
        copy_end: int = 0,
        fuzzy: bool = False,
    ) -> m.Mark:
        self.cut_seq += 1
        copies = tuple(m.CopyInCut(token, ()) for token in tokens)
        volume = m.VolumeMark(self.volume, self.incarnation, self.lsn, fuzzy, copied, copy_end, copies)
        return m.Mark(self.cut_seq, time.time_ns(), tag, (volume,))

    async def connect(self, address: tuple[str, int]) -> tuple[Wire, m.Welcome]:
        wire = await Wire.connect(address, self.site.context())
        await wire.send(self.hello())
        return wire, await wire.expect(m.Welcome)

    async def attach(self, address: tuple[str, int], welcome: m.Welcome) -> Wire:
        wire = await Wire.connect(address, self.site.context())
        await wire.send(m.Attach(welcome.session))
        await wire.expect(m.Attached)
        return wire

    async def vaulted(self, wire: Wire, mark: m.Mark) -> m.Ack:
        """Send ``mark`` and wait for the acknowledgement that covers it."""
        await wire.send(mark)
        while (ack := await wire.expect(m.Ack)).cut_seq < mark.cut_seq:
            pass
        return ack

    async def copy_all(self, wire: Wire) -> list[int]:
        """Send the whole disk on ``wire``; return the tokens, all ACCEPTED."""
        tokens = []
        for at in range(0, self.size_bytes, 1024 * KIB):
            copy, raw = self.copy(at, min(1024 * KIB, self.size_bytes - at))
            await wire.send(copy, raw)
            tokens.append(copy.token)
        waiting = set(tokens)
        while waiting:
            accepted = await wire.expect(m.Accepted)
            assert not accepted.missing
            waiting.discard(accepted.token)
        return tokens


def reset_on_close(wire: Wire) -> None:
    """Close with RST, as a peer that died does."""
    sock = wire.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.writer.transport.abort()


def serve(root: str, workers: int) -> None:
    """Be a process server in a process of its own: prints its port, serves until killed."""
    configure("process-server")

    async def run() -> None:
        site_root = Path(root)
        store: Store = open_store(f"file://{site_root}/vault", owner=True)
        keys = open_vault(store, SLOT)
        config = ServerConfig(
            f"file://{site_root}/vault",
            keys.vault_id.hex(),
            KeysConfig("file:slot.key"),
            (),
            listen="127.0.0.1:0",
            ingest=IngestConfig(workers=workers, chunk_bytes=BLOCK),
        )
        server = ProcessServer(
            config,
            store,
            keys,
            ControlStore(store, keys),
            SystemClock(),
            CollectorRegistry(),
            identity=AllowAll(),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(server.run())
            await server.ready.wait()
            os.write(1, f"{server.address[1]}\n".encode())

    uvloop.run(run())


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
