"""A process server in a page: real TLS and frames, a vault that is one byte array per volume.

It checks what the real one checks of the stream, keeps a digest of every point, and can be told to misbehave.
"""

import asyncio
import contextlib
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from farshore import pki
from farshore.hrl.batch import WRITE, ZERO, RunningDigest, first_digest, incarnation_key, iter_batches
from farshore.ids import new_id
from farshore.wire import frames
from farshore.wire import messages as m
from tests.harness.copies import held_in, sent_bytes


@dataclass
class Point:
    """One commit: which cut, whether it may be offered, and the digest of the volume then."""

    cut_seq: int
    tag: str | None
    fuzzy: bool
    digest: bytes


@dataclass
class Volume:
    """What the vault and the session hold of a volume."""

    hello: m.VolumeHello
    content: bytearray
    incarnation: bytes = bytes(16)
    ordinal: int = 0
    lsn: int = 0
    digest: bytes = bytes(32)
    copied: bool = False
    copy_end: int = 0
    known: set[bytes] = field(default_factory=set)
    # of the session
    chain: RunningDigest | None = None
    here: tuple[bytes, int, int] = (bytes(16), 0, 0)
    records: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)

    def forget_session(self) -> None:
        self.chain, self.here = None, (self.incarnation, self.ordinal, self.lsn)
        self.records.clear()
        self.digests.clear()


class FakeServer:
    """Listens on a port of the loopback until closed."""

    def __init__(self, identity: Path, vault: bytes, machine: bytes) -> None:
        self.identity, self.vault_id, self.machine = identity, vault, machine
        self.policy = m.Policy(0.05, 65536, 2, 4 * 1024 * 1024, copy_level=1)
        self.volumes: dict[bytes, Volume] = {}
        self.points: list[Point] = []
        self.tokens: dict[int, tuple[m.Copy, list[bytes]]] = {}
        self.session = b""
        self.sessions = 0
        self.repeats = 0
        self.refusals: list[str] = []
        self.results: list[m.Result] = []
        self.pongs: list[m.Pong] = []
        self.forget_references = False
        self.hold_acks = False
        self.epoch = 1
        self.copied_kinds: set[int] = set()
        self.plain_bytes = 0  # of records and copied blocks, however they came
        self.port = 0
        self._server: asyncio.Server | None = None
        self._control: asyncio.StreamWriter | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.identity / "server.pem", self.identity / "server-key.pem")
        context.load_verify_locations(self.identity / "ca.pem")
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0
        context.set_alpn_protocols(["hrl/1"])
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context, limit=1 << 23)
        self.port = self._server.sockets[0].getsockname()[1]
        self._pinging = asyncio.create_task(self._ping())

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(5)
            if self._control is not None:
                self.send(m.Ping(1))

    async def close(self) -> None:
        assert self._server is not None
        self._pinging.cancel()
        self._server.close()
        self.drop()
        await self._server.wait_closed()

    def drop(self) -> None:
        """Lose every connection at once."""
        for writer in list(self._writers):
            writer.transport.abort()

    def send(self, message: m.Message) -> None:
        """To the agent, on its control connection."""
        assert self._control is not None
        self._control.write(frames.encode(message))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._frames(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._writers.discard(writer)
            if writer is self._control:
                self._control = None
                self.session = b""
                self.tokens.clear()
                for volume in self.volumes.values():
                    volume.forget_session()
                self.drop()
            writer.transport.abort()

    async def _frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        attached = False
        while True:
            header = frames.decode_header(await reader.readexactly(frames.HEADER.size))
            message = frames.decode_message(header, await reader.readexactly(header.meta_bytes))
            raw = await reader.readexactly(header.raw_bytes)
            self.plain_bytes += len(raw) if isinstance(message, m.Data) else 0
            error: str | None = None
            if isinstance(message, m.Hello):
                self._hello(message, writer)
            elif isinstance(message, m.Attach):
                attached = message.session == self.session
                writer.write(frames.encode(m.Attached(1) if attached else m.Error("retry", "no session")))
            elif isinstance(message, m.Bye):
                return
            else:
                error = self._take(message, raw, writer)
            if raw:
                writer.write(frames.encode(m.Credit(len(raw))))
            if error:
                self.refusals.append(error)
                writer.write(frames.encode(m.Error(error.partition(":")[0], error)))
                await writer.drain()
                return
            await writer.drain()

    def _hello(self, hello: m.Hello, writer: asyncio.StreamWriter) -> None:
        self._control, self.session = writer, new_id()
        self.sessions += 1
        positions = tuple(self._position(volume) for volume in hello.volumes)
        head_seq = len(self.points)
        welcome = m.Welcome(1, self.session, self.vault_id, self.epoch, head_seq, self.policy, positions)
        writer.write(frames.encode(welcome))

    def _position(self, hello: m.VolumeHello) -> m.VolumePosition:
        here = self.volumes.setdefault(hello.id, Volume(hello, bytearray(hello.size_bytes)))
        here.forget_session()
        return m.VolumePosition(
            hello.id, here.incarnation, here.ordinal, here.lsn, here.digest, here.copied, here.copy_end,
            not here.known,
        )  # fmt: skip

    def _take(self, message: m.Message, raw: bytes, writer: asyncio.StreamWriter) -> str | None:
        match message:
            case m.IncarnationStart():
                return self._start(message)
            case m.Data():
                return self._data(message, raw)
            case m.Copy():
                return self._copy(message, raw, writer)
            case m.Offer():
                answers = bytes(self._answer(self.volumes[message.volume], chunk) for chunk in message.chunks)
                writer.write(frames.encode(m.Have(message.token, answers)))
            case m.Mark():
                return self._mark(message, writer)
            case m.VolumeAdd(volume=hello):
                writer.write(frames.encode(m.VolumeAdded(self._position(hello))))
            case m.VolumeRemove(id=id):
                del self.volumes[id]
            case m.Result():
                self.results.append(message)
            case m.Pong():
                self.pongs.append(message)
            case _:
                return f"protocol: {type(message).__name__}"
        return None

    def _start(self, start: m.IncarnationStart) -> str | None:
        volume = self.volumes[start.volume]
        incarnation, ordinal, lsn = volume.here
        key = incarnation_key(self.machine, start.volume, start.id)
        if start.resync:
            volume.copied = False
        if start.id == incarnation:
            if volume.chain is None:
                volume.chain = RunningDigest(key, volume.digest)
            return None
        if start.ordinal <= ordinal or start.first_lsn <= lsn:
            return "conflict: not a new incarnation"
        if not start.resync and (start.previous, start.previous_lsn) != (incarnation, lsn):
            return "gap: it does not continue"
        volume.here = (start.id, start.ordinal, start.first_lsn - 1)
        volume.chain = RunningDigest(
            key, first_digest(key, start.previous, start.previous_lsn, start.previous_digest)
        )
        volume.digests[start.first_lsn - 1] = volume.chain.value
        return None

    def _data(self, data: m.Data, raw: bytes) -> str | None:
        volume = self.volumes[data.volume]
        incarnation, ordinal, lsn = volume.here
        if volume.chain is None:
            return "protocol: records before INCARNATION-START"
        if data.first_lsn != lsn + 1:
            return f"gap: {data.first_lsn} after {lsn}"
        for batch in iter_batches(memoryview(raw), volume.chain, lsn + 1):
            at = 0
            for index, row in enumerate(batch.records.tolist()):
                offset, length, kind, _, _, payload = row
                content = bytes(batch.payload[at : at + payload])
                at += payload
                if kind in (WRITE, ZERO):
                    volume.records.append((batch.first_lsn + index, offset, length, content or bytes(length)))
            lsn = batch.last_lsn
            volume.digests[lsn] = batch.digest
        volume.here = (incarnation, ordinal, lsn)
        return None

    def _copy(self, copy: m.Copy, raw: bytes, writer: asyncio.StreamWriter) -> str | None:
        volume = self.volumes[copy.volume]
        if copy.token in self.tokens:
            return "protocol: token in use"
        pieces, missing, at = [], [], 0
        for index, chunk in enumerate(copy.chunks):
            self.copied_kinds.add(chunk.kind)
            if chunk.kind in (m.COPY_DATA, m.COPY_ZSTD, m.COPY_DENSE):
                piece = held_in(chunk, raw[at : at + sent_bytes(chunk)])
                self.plain_bytes += len(piece)
                at += sent_bytes(chunk)
                if blake3(piece).digest() != chunk.hash:
                    return "corrupt: a block is not what its hash says"
                volume.known.add(chunk.hash)
            elif chunk.kind == m.COPY_ZEROS:
                piece = bytes(chunk.length)
            else:
                piece = self._known_block(volume, chunk)
                if not piece:
                    missing.append(index)
            pieces.append(piece)
        if at != len(raw):
            return "protocol: bytes left over"
        if not missing:
            self.tokens[copy.token] = (copy, pieces)
        writer.write(frames.encode(m.Accepted(copy.token, tuple(missing))))
        return None

    def _known_block(self, volume: Volume, chunk: m.CopyChunk) -> bytes:
        if self.forget_references:
            return b""
        for other in self.volumes.values():
            for offset in range(0, len(other.content), chunk.length):
                piece = bytes(other.content[offset : offset + chunk.length])
                if blake3(piece).digest() == chunk.hash:
                    return piece
        return b""

    def _answer(self, volume: Volume, chunk: m.OfferChunk) -> int:
        here = volume.content[chunk.offset : chunk.offset + chunk.length]
        if (not chunk.hash and not any(here)) or (chunk.hash and blake3(here).digest() == chunk.hash):
            return m.HAVE_SAME
        return m.HAVE_CHUNK if chunk.hash in volume.known else m.HAVE_NEED

    def _mark(self, mark: m.Mark, writer: asyncio.StreamWriter) -> str | None:
        for entry in mark.volumes:
            volume = self.volumes[entry.volume]
            if entry.lsn > volume.here[2] or entry.lsn < volume.lsn:
                return f"protocol: a mark at {entry.lsn}, vaulted {volume.lsn}, received {volume.here[2]}"
            if any(copy.token not in self.tokens for copy in entry.copies):
                return "protocol: a copy that is not there"
        fuzzy = False
        vaulted = []
        digest = b""
        for entry in mark.volumes:
            volume = self.volumes[entry.volume]
            self._apply(volume, entry)
            fuzzy = fuzzy or entry.fuzzy or not entry.copied or entry.lsn < entry.copy_end
            vaulted.append(m.Vaulted(entry.volume, volume.incarnation, volume.lsn, volume.digest))
            digest = b"" if fuzzy else blake3(volume.content).digest()
        self.points.append(Point(mark.cut_seq, mark.tag, fuzzy, digest))
        if not self.hold_acks:
            consistency = "fuzzy" if fuzzy else "crash"
            seq = len(self.points)
            ack = m.Ack("vaulted", mark.cut_seq, seq, f"rp-{seq}", consistency, tuple(vaulted))
            writer.write(frames.encode(ack))
        return None

    def _apply(self, volume: Volume, entry: m.VolumeMark) -> None:
        for named in entry.copies:
            copy, pieces = self.tokens.pop(named.token)
            for chunk, piece in zip(copy.chunks, pieces, strict=True):
                holes = [(o, o + n) for o, n in named.cut_outs if o < chunk.offset + chunk.length]
                at = chunk.offset
                for start, end in [*holes, (chunk.offset + chunk.length,) * 2]:
                    if start > at:
                        volume.content[at:start] = piece[at - chunk.offset : start - chunk.offset]
                    at = max(at, end)
        while volume.records and volume.records[0][0] <= entry.lsn:
            _, offset, length, content = volume.records.pop(0)
            volume.content[offset : offset + length] = content
        if entry.lsn in volume.digests:
            volume.digest = volume.digests[entry.lsn]
        volume.incarnation, volume.lsn = entry.incarnation, entry.lsn
        if entry.incarnation == volume.here[0]:
            volume.ordinal = volume.here[1]
        volume.copied, volume.copy_end = entry.copied, entry.copy_end


class CuttingProxy:
    """TCP between agent and server that breaks each connection after a number of bytes from the agent."""

    def __init__(self, port: int, cut_after: Any) -> None:
        self._to, self._cut_after = port, cut_after
        self.cuts = 0
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self._cut_after()
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return

        async def down() -> None:
            with contextlib.suppress(OSError):
                while data := await up_reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.transport.abort()

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(down())
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    if left is not None:
                        data, left = data[:left], left - len(data)
                    up_writer.write(data)
                    await up_writer.drain()
                    if left is not None and left <= 0:
                        self.cuts += 1
                        break
            up_writer.transport.abort()
            writer.transport.abort()
            task.cancel()


def make_identity(folder: Path, vault: bytes, machine: bytes) -> None:
    """Files of a CA, a server and one agent, as enrolment leaves them (and the server's beside them)."""

    folder.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()
    authority = pki.Authority.create(vault, now)
    server = authority.issue_server(vault, now)
    key = pki.new_key()
    request = pki.read_request(pki.make_request(key, "db1"))
    (folder / "ca.pem").write_bytes(authority.certificate)
    (folder / "server.pem").write_bytes(server.certificate)
    (folder / "server-key.pem").write_bytes(server.private_key)
    (folder / "cert.pem").write_bytes(authority.issue_agent(vault, machine, "db1", request, now))
    (folder / "key.pem").write_bytes(pki.key_to_pem(key))


__all__ = ["CuttingProxy", "FakeServer", "Point", "make_identity"]
