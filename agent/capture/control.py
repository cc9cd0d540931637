"""The tap's control socket: ``DIR/run/tap.sock``, its messages and its clients.

Each request and each reply is a u32 (little-endian) of bytes and so much MessagePack: a map with ``type`` in
a request, a map with ``error`` in the reply to one that failed. One reply per request, in order, per
connection. Open files travel beside them (SCM_RIGHTS): a disk that the supervisor holds, so that its lock
outlives a tap that is killed.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar, Final, TypeAlias, TypeVar

import msgspec

from farshore.errors import (
    CapacityError,
    ConfigError,
    Conflict,
    Failed,
    FarshoreError,
    NotFound,
    Unreachable,
    UsageError,
)
from farshore.hrl.cut import Cut, decode_cut
from farshore.units import MIB

MESSAGE_BYTES_MAX: Final = 16 * MIB
LENGTH: Final = struct.Struct("<I")
TIMEOUT_S: Final = 60.0
VERSION: Final = 1


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Who is there? → `Welcome`."""


class Status(msgspec.Struct, frozen=True, tag="status"):
    """How is everything? → `TapStatus`."""


class Protect(msgspec.Struct, frozen=True, tag="protect"):
    """Read ``volume.toml`` of a volume and serve it → `VolumeStatus`.

    Attributes:
        held: A descriptor of the disk comes with this message: the supervisor has held it since the last run.
    """

    name: str
    held: bool = False


class Unprotect(msgspec.Struct, frozen=True, tag="unprotect"):
    """Stop a volume in order and forget it → `Done`."""

    name: str


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """Hand out the open disk of a volume → `Done`, with its descriptor: whoever has it holds the lock too."""

    name: str


class TakeCut(msgspec.Struct, frozen=True, tag="cut"):
    """Take a cut over all volumes → `CutTaken`."""

    label: str | None = None


class Vaulted(msgspec.Struct, frozen=True, tag="vaulted"):
    """Everything up to ``lsn`` is in the vault → `Done`."""

    name: str
    incarnation: bytes
    lsn: int


class Dirty(msgspec.Struct, frozen=True, tag="dirty"):
    """Begin a round of copying dirty regions → `DirtyMapIs`."""

    name: str


class DirtyClear(msgspec.Struct, frozen=True, tag="dirty_clear"):
    """The copies of these regions are vaulted → `Cleared`; Conflict when they may be dirty again."""

    name: str
    round: int
    regions: tuple[int, ...]


class ResyncRequired(msgspec.Struct, frozen=True, tag="resync_required"):
    """Keep in mind that a full compare is due; open an incarnation above LSN and ordinal → `Done`."""

    name: str
    why: str
    above_lsn: int = 0
    above_ordinal: int = 0


class ResyncDone(msgspec.Struct, frozen=True, tag="resync_done"):
    """The compare is vaulted → `Done`."""

    name: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Stop the tap in order → `Done`, then the end."""


Request: TypeAlias = (
    Hello
    | Status
    | Protect
    | Unprotect
    | Hold
    | TakeCut
    | Vaulted
    | Dirty
    | DirtyClear
    | ResyncRequired
    | ResyncDone
    | Stop
)


class Welcome(msgspec.Struct, frozen=True):
    version: int
    pid: int
    machine: bytes


class Done(msgspec.Struct, frozen=True):
    pass


class VolumeStatus(msgspec.Struct, frozen=True):
    """One volume.

    Attributes:
        uri: How NBD clients reach it.
        mode: ``data``, ``bitmap``, or ``""`` while it is not served.
        failed, lost, resync: The disk refuses; bits are in memory only; why a full compare is due.
        why: What took it out of data mode, or keeps it from being served.
        held_bytes: Pending writes.
        dirty_regions: Regions in the dirty map.
        redone: Records written again at the start; -1 when nothing needed to be.
    """

    name: str
    id: bytes
    uri: str
    disk: str
    size_bytes: int
    mode: str
    failed: str
    lost: bool
    resync: str
    why: str
    incarnation: bytes
    lsn: int
    captured_lsn: int
    durable_lsn: int
    applied_lsn: int
    stable_lsn: int
    vaulted_lsn: int
    backlog_bytes: int
    held_bytes: int
    dirty_regions: int
    dirty_epoch: int
    region_bytes: int
    connections: int
    state_page: str
    redone: int


class TapStatus(msgspec.Struct, frozen=True):
    pid: int
    volumes: tuple[VolumeStatus, ...]


class CutTaken(msgspec.Struct, frozen=True):
    """A cut.

    Attributes:
        cut: As in the MARK records (`farshore.hrl.cut`).
        marked: MARK records with it are durable in the journals of all volumes with records since the last.
        marks: How many were written.
    """

    cut: bytes
    marked: bool
    marks: int

    def decoded(self) -> Cut:
        return decode_cut(self.cut)


class DirtyMapIs(msgspec.Struct, frozen=True):
    """The dirty map.

    Attributes:
        round: For `DirtyClear`.
        bitmap: One bit per region, least significant first.
    """

    round: int
    region_bytes: int
    bitmap: bytes

    def regions(self) -> list[int]:
        """Indexes of the dirty regions, ascending."""
        return [
            at * 8 + bit for at, byte in enumerate(self.bitmap) if byte for bit in range(8) if byte >> bit & 1
        ]


class Cleared(msgspec.Struct, frozen=True):
    count: int


class Refused(msgspec.Struct, frozen=True):
    """What a request that failed is answered with: the parts of a `FarshoreError`."""

    error: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    KINDS: ClassVar[dict[str, type[FarshoreError]]] = {
        kind.__name__: kind
        for kind in (CapacityError, ConfigError, Conflict, Failed, NotFound, Unreachable, UsageError)
    }

    @classmethod
    def of(cls, error: FarshoreError) -> "Refused":
        kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in cls.KINDS), "Failed")
        return cls(kind, error.what, error.where, error.why, error.fix)

    def exception(self) -> FarshoreError:
        return self.KINDS.get(self.error, Failed)(self.what, where=self.where, why=self.why, fix=self.fix)


Reply = TypeVar("Reply", bound=msgspec.Struct)
_encoder: Final = msgspec.msgpack.Encoder()
request_decoder: Final = msgspec.msgpack.Decoder(Request)


def encode(message: msgspec.Struct) -> bytes:
    """One message with its length before it."""
    body = _encoder.encode(message)
    assert len(body) <= MESSAGE_BYTES_MAX
    return LENGTH.pack(len(body)) + body


def _decode(body: bytes, kind: type[Reply]) -> Reply:
    try:
        with contextlib.suppress(msgspec.ValidationError):
            raise msgspec.msgpack.decode(body, type=Refused).exception()
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise Failed("the tap answered something else", why=str(error)) from error


class TapClient:
    """The agent's connection to the tap. One call at a time; others wait their turn."""

    def __init__(self, peer: socket.socket, where: str) -> None:
        self._peer, self._where = peer, where
        self._turn = asyncio.Lock()

    async def call(
        self, request: Request, kind: type[Reply], *, held: int | None = None, timeout_s: float = TIMEOUT_S
    ) -> Reply:
        """Send ``request`` and return its reply.

        Args:
            held: Descriptor to send along; the caller keeps its own.

        Raises:
            Unreachable: No tap, or no answer in time; this client cannot be used any more.
            FarshoreError: The tap refused, with its own words.
        """
        reply, _ = await self._exchange(request, kind, held, timeout_s)
        return reply

    async def hold(self, name: str) -> int:
        """Return a descriptor of the volume's open disk, which the caller owns. Raises as `call`."""
        _, descriptor = await self._exchange(Hold(name), Done, None, TIMEOUT_S)
        if descriptor is None:
            raise Failed("the tap sent no descriptor", where=name)
        return descriptor

    async def _exchange(
        self, request: Request, kind: type[Reply], held: int | None, timeout_s: float
    ) -> tuple[Reply, int | None]:
        async with self._turn:
            whole = False
            try:
                async with asyncio.timeout(timeout_s):
                    await self._send(encode(request), held)
                    body, descriptor = await self._receive()
                whole = True
            except TimeoutError as error:
                why = f"no answer within {timeout_s:g} s"
                raise Unreachable("the tap does not answer", where=self._where, why=why) from error
            except OSError as error:
                why = error.strerror or str(error)
                raise Unreachable("the tap is gone", where=self._where, why=why) from error
            finally:
                if not whole:
                    self._peer.close()  # what comes next would be the answer to this
        return _decode(body, kind), descriptor

    async def _send(self, message: bytes, held: int | None) -> None:
        loop = asyncio.get_running_loop()
        if held is not None:
            sent = socket.send_fds(self._peer, [message], [held])
            message = message[sent:]
        await loop.sock_sendall(self._peer, message)

    async def _receive(self) -> tuple[bytes, int | None]:
        loop = asyncio.get_running_loop()
        descriptor: int | None = None
        content = bytearray()
        while len(content) < LENGTH.size or len(content) < LENGTH.size + LENGTH.unpack_from(content)[0]:
            try:
                part, descriptors, _, _ = socket.recv_fds(self._peer, 1 << 16, 1)
            except BlockingIOError:
                await _readable(loop, self._peer)
                continue
            descriptor = descriptors[0] if descriptors else descriptor
            if not part:
                raise ConnectionResetError("it closed the connection")
            content += part
            if len(content) >= LENGTH.size and LENGTH.unpack_from(content)[0] > MESSAGE_BYTES_MAX:
                raise ConnectionResetError("its answer is too long")
        return bytes(content[LENGTH.size :]), descriptor

    async def hello(self) -> Welcome:
        return await self.call(Hello(), Welcome)

    async def status(self) -> TapStatus:
        return await self.call(Status(), TapStatus)

    async def protect(self, name: str, *, held: int | None = None) -> VolumeStatus:
        """Serve a volume; with ``held`` the tap takes over that open disk. May take long: redo."""
        request = Protect(name, held is not None)
        return await self.call(request, VolumeStatus, held=held, timeout_s=3600)

    async def unprotect(self, name: str) -> None:
        await self.call(Unprotect(name), Done)

    async def cut(self, tag: str | None = None) -> CutTaken:
        return await self.call(TakeCut(tag), CutTaken)

    async def vaulted(self, name: str, incarnation: bytes, lsn: int) -> None:
        await self.call(Vaulted(name, incarnation, lsn), Done)

    async def dirty(self, name: str) -> DirtyMapIs:
        return await self.call(Dirty(name), DirtyMapIs)

    async def dirty_clear(self, name: str, round: int, regions: tuple[int, ...]) -> int:
        return (await self.call(DirtyClear(name, round, regions), Cleared)).count

    async def resync_required(self, name: str, why: str, above_lsn: int = 0, above_ordinal: int = 0) -> None:
        await self.call(ResyncRequired(name, why, above_lsn, above_ordinal), Done)

    async def resync_done(self, name: str) -> None:
        await self.call(ResyncDone(name), Done)

    async def stop(self) -> None:
        """Returns when the tap has stopped in order."""
        await self.call(Stop(), Done, timeout_s=120)


@contextlib.asynccontextmanager
async def connect(path: Path) -> AsyncIterator[TapClient]:
    """Connect to the tap at ``DIR/run/tap.sock``.

    Raises:
        Unreachable: There is no tap.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with peer:
        peer.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(peer, str(path))
        except OSError as error:
            why = error.strerror or str(error)
            raise Unreachable("there is no tap", where=str(path), why=why) from error
        yield TapClient(peer, str(path))


def call(path: Path, request: Request, kind: type[Reply], *, timeout_s: float = TIMEOUT_S) -> Reply:
    """Ask the tap one thing without an event loop. Raises as `TapClient.call`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as peer:
        peer.settimeout(timeout_s)
        try:
            peer.connect(str(path))
            peer.sendall(encode(request))
            head = _exactly(peer, LENGTH.size)
            (length,) = LENGTH.unpack(head)
            if length > MESSAGE_BYTES_MAX:
                raise ConnectionResetError("its answer is too long")
            body = _exactly(peer, length)
        except OSError as error:
            why = error.strerror or str(error)
            raise Unreachable("the tap does not answer", where=str(path), why=why) from error
    return _decode(body, kind)


def _exactly(peer: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        part = peer.recv(length - len(content))
        if not part:
            raise ConnectionResetError("it closed the connection")
        content += part
    return bytes(content)


async def _readable(loop: asyncio.AbstractEventLoop, peer: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(peer.fileno(), wake)
    try:
        await ready
    finally:
        loop.remove_reader(peer.fileno())
