"""An NBD server on asyncio over anything that can be read and, perhaps, written.

Serves exports whose own work is the larger cost (``farshore export``, tools, tests). The tap has a server of
its own, built on the same codec, because it answers from threads.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final, Protocol

from farshore.errors import CapacityError, ConfigError, FarshoreError
from farshore.nbd import codec, handshake
from farshore.nbd.codec import NbdError, Request
from farshore.units import KIB, MIB

# Not structlog: it takes 0.1 s to import, of the second that an export has; daemons lead this to it.
_log: Final = logging.getLogger(__name__)

REQUESTS_AT_ONCE: Final = 64
"""Requests of one connection being worked on; further ones wait in the socket."""
BYTES_AT_ONCE: Final = 64 * MIB
"""Data of those requests; one request of any size is always let in."""
CONNECTIONS_MAX: Final = 64
HANDSHAKE_TIMEOUT_S: Final = 30.0
SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of unix(7) less its NUL."""
_RECEIVE_BYTES: Final = 256 * KIB


class Export(Protocol):
    """What is served. Offsets and lengths were checked against ``size`` and ``block_bytes``.

    Methods are called concurrently; an ``OSError`` is answered with its errno, a ``FarshoreError`` with EIO.
    """

    @property
    def size(self) -> int:
        """Bytes; fixed while it is served."""
        ...

    @property
    def read_only(self) -> bool: ...

    @property
    def block_bytes(self) -> int:
        """Offsets and lengths are multiples of it; 1 to 64 KiB, a power of two."""
        ...

    async def read(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Return exactly ``length`` bytes; the buffer must not change until it was sent."""
        ...

    async def write(self, offset: int, data: bytes, *, fua: bool) -> None: ...

    async def flush(self) -> None:
        """Return when every write answered before is durable."""
        ...

    async def trim(self, offset: int, length: int, *, fua: bool) -> None: ...

    async def zero(self, offset: int, length: int, *, may_punch: bool, fua: bool) -> None: ...

    async def extents(self, offset: int, length: int) -> list[codec.Extent]:
        """Allocation from ``offset`` on: at least one entry, together at most ``length`` bytes."""
        ...


class NbdServer:
    """Serves exports to any number of clients until closed."""

    def __init__(self, exports: Mapping[str, Export]) -> None:
        """``exports`` may change while serving; a client keeps what it has chosen."""
        self._exports = exports

    @contextlib.asynccontextmanager
    async def listen_unix(self, path: Path) -> AsyncIterator[None]:
        """Serve on a Unix socket (mode 0600) within the context; a stale socket file is replaced.

        Raises:
            ConfigError: The path is too long or cannot be bound.
        """
        listener = bind_unix(path)
        try:
            async with self._serving(listener):
                yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    @contextlib.asynccontextmanager
    async def listen_tcp(self, host: str, port: int) -> AsyncIterator[tuple[str, int]]:
        """Serve on TCP within the context; yields the address bound (``port`` 0 lets the kernel choose).

        The caller decides who may reach it: there is no authentication here.

        Raises:
            ConfigError: The address cannot be bound.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(64)
        except (OSError, OverflowError) as error:
            listener.close()
            raise ConfigError("cannot listen", where=f"{host}:{port}", why=str(error)) from error
        address = listener.getsockname()
        async with self._serving(listener):
            yield str(address[0]), int(address[1])

    @contextlib.asynccontextmanager
    async def _serving(self, listener: socket.socket) -> AsyncIterator[None]:
        listener.setblocking(False)
        # A task of its own around the TaskGroup: what the caller raises inside of the context must leave it
        # as it is, not in a group.
        accepting = asyncio.ensure_future(self._accept(listener))
        try:
            yield
        finally:
            accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await accepting
            listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connections = 0

        async def serve(peer: socket.socket) -> None:
            nonlocal connections
            try:
                await self._connection(peer)
            finally:
                connections -= 1

        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    peer, _ = await loop.sock_accept(listener)
                except OSError as error:
                    _log.warning("nbd: cannot accept: %s", error)
                    await asyncio.sleep(0.1)
                    continue
                if connections >= CONNECTIONS_MAX:
                    peer.close()
                    continue
                connections += 1
                tasks.create_task(serve(peer), name="nbd-connection")

    async def _connection(self, peer: socket.socket) -> None:
        with peer:
            peer.setblocking(False)
            if peer.family != socket.AF_UNIX:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    chosen = await self._negotiate(peer)
                if chosen is not None:
                    await _Session(peer, *chosen).run()
            except TimeoutError:
                _log.info("nbd: a handshake took too long")
            except NbdError as error:
                _log.warning("nbd: a client was refused: %s", error)
            except (ConnectionError, OSError) as error:
                _log.info("nbd: a connection was lost: %s", error)

    async def _negotiate(self, peer: socket.socket) -> "tuple[Export, handshake.Agreed, bytes] | None":
        loop = asyncio.get_running_loop()
        # The export that is described is the one that is served, whatever becomes of the mapping meanwhile.
        seen: dict[str, Export] = {}

        def find(name: str) -> handshake.ExportInfo | None:
            export = self._exports.get(name)
            if export is None:
                return None
            seen[name] = export
            return describe(export)

        machine = handshake.ServerHandshake(find, lambda: list(self._exports))
        await loop.sock_sendall(peer, machine.greeting())
        while machine.agreed is None:
            received = await loop.sock_recv(peer, _RECEIVE_BYTES)
            if not received:
                return None
            await loop.sock_sendall(peer, machine.feed(received))
            if machine.closed:
                return None
        return seen[machine.agreed.name], machine.agreed, machine.unread()


def describe(export: Export) -> handshake.ExportInfo:
    """What a client is told about ``export``."""
    flags = codec.HAS_FLAGS | codec.SEND_FLUSH | codec.CAN_MULTI_CONN | codec.SEND_DF
    if export.read_only:
        flags |= codec.READ_ONLY
    else:
        flags |= codec.SEND_FUA | codec.SEND_TRIM | codec.SEND_WRITE_ZEROES
    return handshake.ExportInfo(export.size, flags, export.block_bytes, max(4 * KIB, export.block_bytes))


def bind_unix(path: Path) -> socket.socket:
    """Return a socket that listens on ``path``, mode 0600. A socket file nobody listens on is replaced.

    Raises:
        ConfigError: The path is too long for a socket, in use, or cannot be made.
    """
    check_socket_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except FileNotFoundError:
                pass
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            else:
                raise ConfigError("cannot listen", where=str(path), why="somebody listens there already")
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(64)
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        raise ConfigError("cannot listen", where=str(path), why=why) from error
    except BaseException:
        listener.close()
        raise
    return listener


def check_socket_path(path: Path) -> None:
    """Raises ConfigError when ``path`` does not fit into a socket address."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        why = f"the path has {length} bytes, a Unix socket's has at most {SOCKET_PATH_BYTES_MAX}"
        raise ConfigError("cannot listen", where=str(path), why=why, fix="choose a shorter path")


class _Budget:
    """Bounds what is worked on at once, by count and by bytes."""

    def __init__(self) -> None:
        self._requests = self._bytes = 0
        self._changed = asyncio.Event()

    async def take(self, length: int) -> None:
        while self._requests >= REQUESTS_AT_ONCE or (self._requests and self._bytes + length > BYTES_AT_ONCE):
            self._changed.clear()
            await self._changed.wait()
        self._requests += 1
        self._bytes += length

    def give(self, length: int) -> None:
        self._requests -= 1
        self._bytes -= length
        self._changed.set()

    async def drained(self) -> None:
        while self._requests:
            self._changed.clear()
            await self._changed.wait()


class _Session:
    """One connection after its handshake."""

    def __init__(self, peer: socket.socket, export: Export, agreed: handshake.Agreed, unread: bytes) -> None:
        self._peer, self._export, self._agreed = peer, export, agreed
        self._unread = unread
        self._budget = _Budget()
        self._sending = asyncio.Lock()
        self._name = agreed.name

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        decoder = codec.RequestDecoder()
        received = self._unread
        broken: Exception | None = None
        async with asyncio.TaskGroup() as tasks:
            try:
                while True:
                    for request in decoder.feed(received):
                        if request.type == codec.DISC:
                            await self._budget.drained()
                            return
                        length = self._held_bytes(request)
                        await self._budget.take(length)
                        tasks.create_task(self._handle(request, length))
                    received = await loop.sock_recv(self._peer, _RECEIVE_BYTES)
                    if not received:
                        return
            except (NbdError, OSError) as error:
                broken = error
        if broken is not None:
            raise broken

    @staticmethod
    def _held_bytes(request: Request) -> int:
        """Memory that the request pins; a trim or a block status of the whole disk holds none."""
        if request.type in (codec.READ, codec.WRITE):
            return min(request.length, codec.DATA_BYTES_MAX)
        return 0

    async def _handle(self, request: Request, length: int) -> None:
        try:
            try:
                await self._answer(request)
            except OSError as error:
                await self._refuse(request, error.errno or codec.EIO)
            except FarshoreError as error:
                _log.error("nbd: %s: a request of type %d failed: %s", self._name, request.type, error)
                code = codec.ENOSPC if isinstance(error, CapacityError) else codec.EIO
                await self._refuse(request, code)
        except OSError:
            # The client is gone; shutting down wakes the reader, which ends the session.
            with contextlib.suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)
        finally:
            self._budget.give(length)

    async def _answer(self, request: Request) -> None:
        export = self._export
        error = self._check(request)
        if error:
            await self._refuse(request, error)
            return
        offset, length, fua = request.offset, request.length, bool(request.flags & codec.FUA)
        match request.type:
            case codec.READ:
                content = await export.read(offset, length)
                assert len(content) == length
                if self._agreed.structured:
                    await self._send(codec.data_chunk(request.cookie, offset, length), content)
                else:
                    await self._send(codec.simple_reply(request.cookie), content)
                return
            case codec.BLOCK_STATUS:
                extents = await export.extents(offset, length)
                if request.flags & codec.REQ_ONE:
                    extents = extents[:1]
                await self._send(codec.block_status_chunk(request.cookie, handshake.ALLOCATION_ID, extents))
                return
            case codec.WRITE:
                await export.write(offset, request.data, fua=fua)
            case codec.FLUSH:
                await export.flush()
            case codec.TRIM:
                await export.trim(offset, length, fua=fua)
            case codec.WRITE_ZEROES:
                may_punch = not request.flags & codec.NO_HOLE
                await export.zero(offset, length, may_punch=may_punch, fua=fua)
        await self._send(codec.simple_reply(request.cookie))

    def _check(self, request: Request) -> int:
        if request.type not in _ALLOWED_FLAGS or request.flags & ~_ALLOWED_FLAGS[request.type]:
            return codec.EINVAL
        if request.type == codec.BLOCK_STATUS and not self._agreed.allocation:
            return codec.EINVAL
        if self._export.read_only and request.type in _WRITING:
            return codec.EPERM
        if request.type == codec.READ and request.length > codec.DATA_BYTES_MAX:
            return codec.EOVERFLOW
        return codec.range_error(request, self._export.size, self._export.block_bytes)

    async def _refuse(self, request: Request, error: int) -> None:
        if self._agreed.structured and request.type in (codec.READ, codec.BLOCK_STATUS):
            await self._send(codec.error_chunk(request.cookie, error))
        else:
            await self._send(codec.simple_reply(request.cookie, error))

    async def _send(self, head: bytes, content: bytes | bytearray | memoryview = b"") -> None:
        loop = asyncio.get_running_loop()
        async with self._sending:
            if len(content) <= 64 * KIB:
                await loop.sock_sendall(self._peer, head + bytes(content) if content else head)
            else:
                await loop.sock_sendall(self._peer, head)
                await loop.sock_sendall(self._peer, content)


_WRITING: Final = frozenset({codec.WRITE, codec.TRIM, codec.WRITE_ZEROES})
_ALLOWED_FLAGS: Final[Mapping[int, int]] = {
    codec.READ: codec.DF | codec.FUA,
    codec.WRITE: codec.FUA,
    codec.FLUSH: codec.FUA,
    codec.TRIM: codec.FUA,
    codec.WRITE_ZEROES: codec.FUA | codec.NO_HOLE,
    codec.BLOCK_STATUS: codec.REQ_ONE | codec.FUA,
}
