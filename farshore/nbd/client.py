"""An NBD client on asyncio: many requests in flight over one connection."""

import asyncio
import contextlib
import socket
import urllib.parse
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from farshore.errors import Unreachable, UsageError
from farshore.nbd import codec, handshake
from farshore.nbd.codec import Extent, NbdError, Reply, RequestError
from farshore.units import KIB

CONNECT_TIMEOUT_S: Final = 30.0
_RECEIVE_BYTES: Final = 256 * KIB
_JOINED_BYTES: Final = 64 * KIB
REQUESTS_AT_ONCE: Final = 128


@dataclass(slots=True)
class _Waiting:
    done: "asyncio.Future[None]"
    offset: int
    content: bytearray | None = None
    extents: list[Extent] = field(default_factory=list)
    error: int = 0


class NbdClient:
    """One connection to one export. Made by `connect`; methods may be called concurrently.

    Cancelling a call is safe: its answer, when it comes, is dropped.

    Attributes:
        agreed: Size, flags and block sizes of the export, and what replies may look like.
    """

    def __init__(self, peer: socket.socket, agreed: handshake.Agreed) -> None:
        self._peer = peer
        self.agreed = agreed
        self._waiting: dict[int, _Waiting] = {}
        self._cookie = 0
        self._decoder = codec.ReplyDecoder()
        self._queue: list[bytes | bytearray | memoryview] = []
        self._queued, self._all_sent = asyncio.Event(), asyncio.Event()
        self._places = asyncio.Semaphore(REQUESTS_AT_ONCE)
        self._lost: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return self.agreed.info.size

    @property
    def read_only(self) -> bool:
        return bool(self.agreed.info.flags & codec.READ_ONLY)

    async def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes.

        Raises:
            RequestError: The server refused or failed this request.
            Unreachable: The connection is gone; true of every method.
        """
        waiting = await self._request(codec.READ, offset, length, content=bytearray(length))
        assert waiting.content is not None
        return bytes(waiting.content)

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write ``data``, which must not change until this returns. Raises as `read`."""
        flags = codec.FUA if fua else 0
        await self._request(codec.WRITE, offset, len(data), flags=flags, data=data)

    async def flush(self) -> None:
        """Return when all that was answered before is durable. Raises as `read`."""
        await self._request(codec.FLUSH, 0, 0)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell that the bytes are no longer needed. Raises as `read`."""
        await self._request(codec.TRIM, offset, length, flags=codec.FUA if fua else 0)

    async def zero(self, offset: int, length: int, *, may_punch: bool = True, fua: bool = False) -> None:
        """Make the bytes zero. Raises as `read`."""
        flags = (0 if may_punch else codec.NO_HOLE) | (codec.FUA if fua else 0)
        await self._request(codec.WRITE_ZEROES, offset, length, flags=flags)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """Return the allocation from ``offset`` on, at least one entry. Raises as `read`."""
        waiting = await self._request(codec.BLOCK_STATUS, offset, length)
        return waiting.extents

    async def _request(
        self,
        kind: int,
        offset: int,
        length: int,
        *,
        flags: int = 0,
        data: bytes | bytearray | memoryview = b"",
        content: bytearray | None = None,
    ) -> _Waiting:
        loop = asyncio.get_running_loop()
        async with self._places:
            if self._lost is not None:
                raise self._gone()
            self._cookie += 1
            cookie = self._cookie
            waiting = _Waiting(loop.create_future(), offset, content)
            self._waiting[cookie] = waiting
            if kind == codec.READ:
                self._decoder.expect_data(cookie, length)
            self._put(codec.encode_request(kind, cookie, offset, length, flags), data)
            try:
                await waiting.done
            except asyncio.CancelledError:
                # The caller may change its data now; half of a request must not be on the wire.
                await self._all_sent.wait()
                raise
        if waiting.error:
            raise RequestError(f"{_VERBS[kind]} of {length} bytes at {offset} failed", waiting.error)
        return waiting

    def _put(self, head: bytes, data: bytes | bytearray | memoryview) -> None:
        self._queue += [head, data] if data else [head]
        self._all_sent.clear()
        self._queued.set()

    async def send(self) -> None:
        """Send what is put until the connection ends; run by `connect`. What came together goes together."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._queued.wait()
                self._queued.clear()
                waiting, self._queue = self._queue, []
                small: list[bytes | bytearray | memoryview] = []
                for part in waiting:
                    if len(part) > _JOINED_BYTES:
                        await loop.sock_sendall(self._peer, b"".join(small))
                        await loop.sock_sendall(self._peer, part)
                        small = []
                    else:
                        small.append(part)
                await loop.sock_sendall(self._peer, b"".join(small))
                if not self._queue:
                    self._all_sent.set()
        except OSError as error:
            self._fail(error.strerror or str(error))
        finally:
            self._all_sent.set()

    def _gone(self) -> Unreachable:
        return Unreachable("the NBD server is gone", where=self.agreed.name, why=self._lost or "")

    async def receive(self, received: bytes) -> None:
        """Deliver replies until the connection ends; run by `connect`."""
        loop = asyncio.get_running_loop()
        why = "it closed the connection"
        try:
            while True:
                for reply in self._decoder.feed(received):
                    self._deliver(reply)
                received = await loop.sock_recv(self._peer, _RECEIVE_BYTES)
                if not received:
                    break
        except (NbdError, OSError) as error:
            why = str(error)
        finally:
            self._fail(why)

    def _deliver(self, reply: Reply) -> None:
        waiting = self._waiting.get(reply.cookie)
        if waiting is None:
            raise NbdError("a reply that nobody waits for", why=f"cookie {reply.cookie}")
        if reply.error:
            waiting.error = reply.error
        elif reply.data and waiting.content is not None:
            at = 0 if reply.offset is None else reply.offset - waiting.offset
            if at < 0 or at + len(reply.data) > len(waiting.content):
                raise NbdError("data that was not asked for", why=f"at {reply.offset}")
            waiting.content[at : at + len(reply.data)] = reply.data
        waiting.extents.extend(reply.extents)
        if reply.done:
            del self._waiting[reply.cookie]
            if not waiting.done.done():
                waiting.done.set_result(None)

    def _fail(self, why: str) -> None:
        if self._lost is None:
            self._lost = why
        for waiting in self._waiting.values():
            if not waiting.done.done():
                waiting.done.set_exception(self._gone())
                waiting.done.exception()  # a cancelled caller will not ask
        self._waiting.clear()

    async def disconnect(self) -> None:
        """Say goodbye; run by `connect`."""
        if self._lost is None:
            self._put(codec.encode_request(codec.DISC, 0, 0, 0), b"")
            await self._all_sent.wait()


_VERBS: Final = {
    codec.READ: "read",
    codec.WRITE: "write",
    codec.FLUSH: "flush",
    codec.TRIM: "trim",
    codec.WRITE_ZEROES: "write-zeroes",
    codec.BLOCK_STATUS: "block status",
}


@contextlib.asynccontextmanager
async def connect(address: Path | tuple[str, int], export: str) -> AsyncIterator[NbdClient]:
    """Connect to ``export`` of the server at a socket path or (host, port), for the length of the context.

    Raises:
        Unreachable: Nobody answers there.
        NotFound: The server has no such export.
        NbdError: It is no NBD server that we can talk to.
    """
    loop = asyncio.get_running_loop()
    unix = isinstance(address, Path)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            peer = await _open(loop, address)
            try:
                machine = handshake.ClientHandshake(export)
                while machine.agreed is None:
                    received = await loop.sock_recv(peer, _RECEIVE_BYTES)
                    if not received:
                        raise Unreachable("the NBD server closed the connection", where=str(address))
                    await loop.sock_sendall(peer, machine.feed(received))
            except BaseException:
                peer.close()
                raise
    except TimeoutError as error:
        raise Unreachable("no answer", where=str(address), why=f"within {CONNECT_TIMEOUT_S:g} s") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise Unreachable("cannot connect", where=str(address), why=why) from error
    with peer:
        if not unix:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = NbdClient(peer, machine.agreed)
        # No TaskGroup: what the caller raises inside of the context must leave it as it is, not in a group.
        sending = asyncio.ensure_future(client.send())
        receiving = asyncio.ensure_future(client.receive(machine.unread()))
        try:
            yield client
        finally:
            await client.disconnect()
            for task in (sending, receiving):
                task.cancel()
            for task in (sending, receiving):
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _open(loop: asyncio.AbstractEventLoop, address: Path | tuple[str, int]) -> socket.socket:
    if isinstance(address, Path):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        target: str | tuple[str, int] = str(address)
    else:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        peer = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        target = address
    peer.setblocking(False)
    try:
        await loop.sock_connect(peer, target)
    except BaseException:
        peer.close()
        raise
    return peer


def parse_uri(uri: str) -> tuple[Path | tuple[str, int], str]:
    """Return address and export of ``nbd+unix:///EXPORT?socket=PATH`` or ``nbd://HOST:PORT/EXPORT``.

    Raises:
        UsageError: Neither.
    """
    parts = urllib.parse.urlsplit(uri)
    export = urllib.parse.unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        sockets = urllib.parse.parse_qs(parts.query).get("socket", [])
        if len(sockets) == 1:
            return Path(sockets[0]), export
    elif parts.scheme == "nbd" and parts.hostname:
        return (parts.hostname, parts.port or 10809), export
    raise UsageError("not an NBD address", where=uri, fix="write nbd+unix:///NAME?socket=PATH")
