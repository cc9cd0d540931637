"""NBD on the wire, after the handshake: requests and replies as values and bytes. Pure.

Numbers and names are the ones of the protocol's own text (proto.md, "Values").
"""

import struct
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final

import msgspec

from farshore.errors import FarshoreError
from farshore.units import MIB

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

REQUEST: Final = struct.Struct(">IHHQQI")
"""magic, command flags, type, cookie, offset, length"""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""magic, error, cookie"""
CHUNK: Final = struct.Struct(">IHHQI")
"""magic, flags, type, cookie, length"""

READ: Final = 0
WRITE: Final = 1
DISC: Final = 2
FLUSH: Final = 3
TRIM: Final = 4
CACHE: Final = 5
WRITE_ZEROES: Final = 6
BLOCK_STATUS: Final = 7

FUA: Final = 1
NO_HOLE: Final = 2
DF: Final = 4
REQ_ONE: Final = 8
FAST_ZERO: Final = 16

HAS_FLAGS: Final = 1
READ_ONLY: Final = 2
SEND_FLUSH: Final = 4
SEND_FUA: Final = 8
SEND_TRIM: Final = 32
SEND_WRITE_ZEROES: Final = 64
SEND_DF: Final = 128
CAN_MULTI_CONN: Final = 256
SEND_FAST_ZERO: Final = 2048

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108
ERRORS: Final = frozenset({EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN})
"""All that may be on the wire; anything else is sent as EIO."""

CHUNK_NONE: Final = 0
CHUNK_DATA: Final = 1
CHUNK_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_ERROR: Final = 0x8001
CHUNK_ERROR_OFFSET: Final = 0x8002
CHUNK_DONE: Final = 1

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

DATA_BYTES_MAX: Final = 32 * MIB
"""Data of one request or reply: what qemu and libnbd may send to a server that states no other bound."""
EXTENTS_MAX: Final = 4096
"""Descriptors in one block status reply; clients ask again for the rest."""
_CHUNK_BYTES_MAX: Final = DATA_BYTES_MAX + 4096

_U32: Final = struct.Struct(">I")
_OFFSET: Final = struct.Struct(">Q")
_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")
_EXTENT: Final = struct.Struct(">II")


class NbdError(FarshoreError):
    """The peer does not speak the protocol as we do: close the connection. Nothing more can be parsed."""

    retryable: ClassVar[bool] = False


class RequestError(FarshoreError):
    """One request was answered with an error; the connection goes on.

    Attributes:
        error: NBD error number, one of ``ERRORS``.
    """

    def __init__(self, what: str, error: int) -> None:
        super().__init__(what, why=f"NBD error {error}")
        self.error = error


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request, as decoded.

    Attributes:
        type: ``READ`` … ``BLOCK_STATUS``, or a number unknown to us.
        flags: ``FUA`` …
        cookie: The client's name for it, opaque.
        offset: First byte; not checked against the export yet.
        length: Bytes concerned; at most ``DATA_BYTES_MAX`` in a WRITE.
        data: The bytes of a WRITE, owned by the receiver of this value.
    """

    type: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes = b""


class Extent(msgspec.Struct, frozen=True, gc=False):
    """``length`` bytes in one allocation state: ``STATE_HOLE``, ``STATE_ZERO``, both, or 0 for data."""

    length: int
    state: int


class Reply(msgspec.Struct, frozen=True, gc=False):
    """One simple reply, or one chunk of a structured one.

    Attributes:
        cookie: Of the request that it answers.
        done: Nothing more will come for this cookie.
        error: NBD error number, 0 for none.
        offset: Where ``data`` or the hole lies; 0 in a simple reply, whose data begins where was asked.
        data: Data of a read.
        hole: Length of a run of zeros at ``offset``.
        extents: Of a block status.
    """

    cookie: int
    done: bool
    error: int = 0
    offset: int | None = None
    data: bytes = b""
    hole: int = 0
    extents: tuple[Extent, ...] = ()


def encode_request(kind: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    """28 bytes; the data of a WRITE follows them."""
    return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, length)


def decode_request(buffer: bytes | bytearray | memoryview, at: int = 0) -> Request:
    """Decode 28 bytes, without the data of a WRITE.

    Raises:
        NbdError: Not a request, or a WRITE longer than ``DATA_BYTES_MAX``: its end could not be found
            without taking all of it in.
    """
    magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(buffer, at)
    if magic != REQUEST_MAGIC:
        raise NbdError("not an NBD request", why=f"magic {magic:#x}")
    if kind == WRITE and length > DATA_BYTES_MAX:
        raise NbdError("write too long", why=f"{length} bytes, at most {DATA_BYTES_MAX}")
    return Request(kind, flags, cookie, offset, length)


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A whole simple reply; the data of a successful read follows it."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error if not error or error in ERRORS else EIO, cookie)


def data_chunk(cookie: int, offset: int, length: int) -> bytes:
    """Head of the only chunk of a read's structured reply; ``length`` bytes follow it."""
    head = CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, CHUNK_DATA, cookie, length + _OFFSET.size)
    return head + _OFFSET.pack(offset)


def error_chunk(cookie: int, error: int) -> bytes:
    """A whole structured reply that says only ``error``."""
    head = CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, CHUNK_ERROR, cookie, _ERROR.size)
    return head + _ERROR.pack(error if error in ERRORS else EIO, 0)


def block_status_chunk(cookie: int, context: int, extents: Sequence[Extent]) -> bytes:
    """A whole structured reply to BLOCK_STATUS for the one context ``context``."""
    body = b"".join(_EXTENT.pack(extent.length, extent.state) for extent in extents[:EXTENTS_MAX])
    length = _U32.size + len(body)
    head = CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, CHUNK_BLOCK_STATUS, cookie, length)
    return head + _U32.pack(context) + body


def range_error(request: Request, size: int, block_bytes: int) -> int:
    """NBD error for a request that does not fit the export, 0 when it does.

    ENOSPC beyond the end for what writes and EINVAL otherwise, as the protocol wants it.
    """
    if request.type == FLUSH:
        return 0 if request.offset == request.length == 0 else EINVAL
    if request.length == 0 or (request.offset | request.length) % block_bytes:
        return EINVAL
    if request.offset + request.length > size:
        return ENOSPC if request.type in (WRITE, WRITE_ZEROES, TRIM) else EINVAL
    return 0


class RequestDecoder:
    """A server's incoming bytes to requests; the same requests however the bytes are cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head: Request | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Request]:
        """Take ``data`` in (copied) and yield the requests that are whole now.

        Raises:
            NbdError: As ``decode_request``; what was yielded before it is good.
        """
        self._buffer += data
        while True:
            head = self._head
            if head is None:
                if len(self._buffer) < REQUEST.size:
                    return
                head = decode_request(self._buffer)
                del self._buffer[: REQUEST.size]
            if head.type != WRITE:
                yield head
                continue
            if len(self._buffer) < head.length:
                self._head = head
                return
            self._head = None
            content = bytes(memoryview(self._buffer)[: head.length])
            del self._buffer[: head.length]
            yield Request(head.type, head.flags, head.cookie, head.offset, head.length, content)


class ReplyDecoder:
    """A client's incoming bytes to replies."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._reads: dict[int, int] = {}

    def expect_data(self, cookie: int, length: int) -> None:
        """Announce a read: only we know how many bytes follow a simple reply to it."""
        self._reads[cookie] = length

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Reply]:
        """Take ``data`` in (copied) and yield the replies that are whole now.

        Raises:
            NbdError: Not a reply, or a length beyond what any request of ours can be answered with.
        """
        self._buffer += data
        while (reply := self._next()) is not None:
            if reply.done:
                self._reads.pop(reply.cookie, None)
            yield reply

    def _next(self) -> Reply | None:
        if len(self._buffer) < _U32.size:
            return None
        (magic,) = _U32.unpack_from(self._buffer)
        if magic == SIMPLE_REPLY_MAGIC:
            return self._simple()
        if magic == STRUCTURED_REPLY_MAGIC:
            return self._chunk()
        raise NbdError("not an NBD reply", why=f"magic {magic:#x}")

    def _simple(self) -> Reply | None:
        if len(self._buffer) < SIMPLE_REPLY.size:
            return None
        _, error, cookie = SIMPLE_REPLY.unpack_from(self._buffer)
        length = 0 if error else self._reads.get(cookie, 0)
        content = self._take(SIMPLE_REPLY.size, length)
        if content is None:
            return None
        return Reply(cookie, done=True, error=error, data=content)

    def _chunk(self) -> Reply | None:
        if len(self._buffer) < CHUNK.size:
            return None
        _, flags, kind, cookie, length = CHUNK.unpack_from(self._buffer)
        if length > _CHUNK_BYTES_MAX:
            raise NbdError("reply too long", why=f"{length} bytes claimed")
        body = self._take(CHUNK.size, length)
        if body is None:
            return None
        done = bool(flags & CHUNK_DONE)
        try:
            if kind == CHUNK_NONE and not body:
                return Reply(cookie, done)
            if kind == CHUNK_DATA:
                return Reply(cookie, done, offset=_OFFSET.unpack_from(body)[0], data=body[_OFFSET.size :])
            if kind == CHUNK_HOLE:
                offset, hole = _HOLE.unpack(body)
                return Reply(cookie, done, offset=offset, hole=hole)
            if kind == CHUNK_BLOCK_STATUS:
                pairs = _EXTENT.iter_unpack(body[_U32.size :])
                return Reply(cookie, done, extents=tuple(Extent(*pair) for pair in pairs))
            if kind & 0x8000:
                return Reply(cookie, done, error=_ERROR.unpack_from(body)[0] or EIO)
        except struct.error as error:
            raise NbdError("malformed NBD reply", why=f"chunk type {kind}: {error}") from error
        raise NbdError("malformed NBD reply", why=f"chunk type {kind} with {length} bytes")

    def _take(self, skip: int, length: int) -> bytes | None:
        if len(self._buffer) < skip + length:
            return None
        content = bytes(memoryview(self._buffer)[skip : skip + length])
        del self._buffer[: skip + length]
        return content
