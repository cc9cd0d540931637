"""The fixed newstyle handshake, both sides, as machines: bytes in, bytes out. No I/O.

TLS is not negotiated here: an export is offered on a Unix socket or the loopback, or inside of a TLS
connection that somebody else has ended.
"""

import enum
import struct
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from farshore.errors import NotFound
from farshore.nbd import codec
from farshore.nbd.codec import NbdError
from farshore.units import KIB, SECTOR_BYTES

ALLOCATION: Final = "base:allocation"
ALLOCATION_ID: Final = 1

_HELLO: Final = struct.Struct(">QQH")
_OPTION: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_EXPORT: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCKS: Final = struct.Struct(">HIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")

_NBDMAGIC: Final = 0x4E42444D41474943
_OPTION_MAGIC: Final = 0x49484156454F5054
_REPLY_MAGIC: Final = 0x3E889045565A9

_FIXED_NEWSTYLE: Final = 1
_NO_ZEROES: Final = 2


class _Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


_ACK: Final = 1
_SERVER: Final = 2
_REP_INFO: Final = 3
_META: Final = 4
_ERROR: Final = 1 << 31
_ERR_UNSUP: Final = _ERROR + 1
_ERR_INVALID: Final = _ERROR + 3
_ERR_UNKNOWN: Final = _ERROR + 6

_INFO_TYPE_EXPORT: Final = 0
_INFO_TYPE_BLOCKS: Final = 3

_PADDING: Final = bytes(124)
OPTION_BYTES_MAX: Final = 16 * KIB
"""Data of one option: a name is at most 4,096 bytes, and we need few queries and requests."""
OPTIONS_MAX: Final = 256
"""A client that has not chosen by then never will."""
_NAME_BYTES_MAX: Final = 4096


class ExportInfo(msgspec.Struct, frozen=True):
    """What a client is told about an export.

    Attributes:
        size: Bytes.
        flags: Transmission flags, ``codec.HAS_FLAGS`` among them.
        block_bytes_min: Offsets and lengths are multiples of it.
        block_bytes_preferred: Smaller or unaligned requests cost more.
        block_bytes_max: Longest data of one request.
    """

    size: int
    flags: int
    block_bytes_min: int = SECTOR_BYTES
    block_bytes_preferred: int = 4 * KIB
    block_bytes_max: int = codec.DATA_BYTES_MAX


class Agreed(msgspec.Struct, frozen=True):
    """What both sides know when the handshake is over.

    Attributes:
        name: Export name.
        info: As the server told it.
        structured: Reads and block status are answered in chunks.
        allocation: Block status may be asked for base:allocation.
    """

    name: str
    info: ExportInfo
    structured: bool
    allocation: bool


class ServerHandshake:
    """The server's side.

    Attributes:
        agreed: Set when the client has chosen an export; ``unread()`` is then the first of its requests.
        closed: The client is done, or the rules make us hang up; send what ``feed`` returned, then close.
    """

    def __init__(self, find: Callable[[str], ExportInfo | None], names: Callable[[], Iterable[str]]) -> None:
        self._find, self._names = find, names
        self._buffer = bytearray()
        self._no_zeroes: bool | None = None
        self._structured = False
        self._allocation: str | None = None
        self._options = 0
        self.agreed: Agreed | None = None
        self.closed = False

    def greeting(self) -> bytes:
        """What the server sends first."""
        return _HELLO.pack(_NBDMAGIC, _OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES)

    def unread(self) -> bytes:
        """Bytes fed that belong to what follows the handshake."""
        return bytes(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take ``data`` in and return what is to be sent.

        Raises:
            NbdError: The client breaks a rule that leaves no way to go on.
        """
        self._buffer += data
        out: list[bytes] = []
        while not self.closed and self.agreed is None and self._step(out):
            pass
        return b"".join(out)

    def _step(self, out: list[bytes]) -> bool:
        if self._no_zeroes is None:
            if len(self._buffer) < _U32.size:
                return False
            (flags,) = _U32.unpack_from(self._buffer)
            del self._buffer[: _U32.size]
            if flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES) or not flags & _FIXED_NEWSTYLE:
                raise NbdError("not a client of the fixed newstyle handshake", why=f"flags {flags:#x}")
            self._no_zeroes = bool(flags & _NO_ZEROES)
            return True
        if len(self._buffer) < _OPTION.size:
            return False
        magic, option, length = _OPTION.unpack_from(self._buffer)
        if magic != _OPTION_MAGIC:
            raise NbdError("not an NBD option", why=f"magic {magic:#x}")
        if length > OPTION_BYTES_MAX:
            raise NbdError("NBD option too long", why=f"{length} bytes claimed")
        if len(self._buffer) < _OPTION.size + length:
            return False
        body = bytes(memoryview(self._buffer)[_OPTION.size : _OPTION.size + length])
        del self._buffer[: _OPTION.size + length]
        self._options += 1
        if self._options > OPTIONS_MAX:
            raise NbdError("too many NBD options", why=f"more than {OPTIONS_MAX}")
        self._answer(option, body, out)
        return True

    def _answer(self, option: int, body: bytes, out: list[bytes]) -> None:
        match option:
            case _Option.EXPORT_NAME:  # EXPORT_NAME: no way to refuse but to hang up
                name = _text(body)
                info = self._find(name) if name is not None else None
                if info is None or name is None:
                    self.closed = True
                    return
                out.append(_EXPORT.pack(info.size, info.flags) + (b"" if self._no_zeroes else _PADDING))
                self._agree(name, info)
            case _Option.ABORT:
                out.append(_reply(option, _ACK))
                self.closed = True
            case _Option.LIST:
                if body:
                    out.append(_reply(option, _ERR_INVALID))
                    return
                for name in self._names():
                    encoded = name.encode()
                    out.append(_reply(option, _SERVER, _U32.pack(len(encoded)) + encoded))
                out.append(_reply(option, _ACK))
            case _Option.INFO | _Option.GO:
                self._info(option, body, out)
            case _Option.STRUCTURED_REPLY:
                if body:
                    out.append(_reply(option, _ERR_INVALID))
                    return
                self._structured = True
                out.append(_reply(option, _ACK))
            case _Option.LIST_META_CONTEXT | _Option.SET_META_CONTEXT:
                self._meta(option, body, out)
            case _:
                out.append(_reply(option, _ERR_UNSUP))

    def _info(self, option: int, body: bytes, out: list[bytes]) -> None:
        parsed = _name_and_rest(body)
        if parsed is None:
            out.append(_reply(option, _ERR_INVALID))
            return
        name, rest = parsed
        if len(rest) < _U16.size or len(rest) != _U16.size * (1 + _U16.unpack_from(rest)[0]):
            out.append(_reply(option, _ERR_INVALID))
            return
        info = self._find(name)
        if info is None:
            out.append(_reply(option, _ERR_UNKNOWN))
            return
        out.append(_reply(option, _REP_INFO, _INFO_EXPORT.pack(_INFO_TYPE_EXPORT, info.size, info.flags)))
        # Told whether asked or not: the protocol allows it, and clients that know it behave better.
        blocks = (info.block_bytes_min, info.block_bytes_preferred, info.block_bytes_max)
        out.append(_reply(option, _REP_INFO, _INFO_BLOCKS.pack(_INFO_TYPE_BLOCKS, *blocks)))
        out.append(_reply(option, _ACK))
        if option == _Option.GO:
            self._agree(name, info)

    def _meta(self, option: int, body: bytes, out: list[bytes]) -> None:
        parsed = _name_and_rest(body)
        queries = _queries(parsed[1]) if parsed else None
        if parsed is None or queries is None or (option == _Option.SET_META_CONTEXT and not self._structured):
            out.append(_reply(option, _ERR_INVALID))
            return
        name = parsed[0]
        if self._find(name) is None:
            out.append(_reply(option, _ERR_UNKNOWN))
            return
        if option == _Option.SET_META_CONTEXT:
            found = ALLOCATION in queries
            self._allocation = name if found else None
        else:
            found = not queries or ALLOCATION in queries or "base:" in queries
        if found:
            context = ALLOCATION_ID if option == _Option.SET_META_CONTEXT else 0
            out.append(_reply(option, _META, _U32.pack(context) + ALLOCATION.encode()))
        out.append(_reply(option, _ACK))

    def _agree(self, name: str, info: ExportInfo) -> None:
        # A context counts only for the export it was set for.
        allocation = self._structured and self._allocation == name
        self.agreed = Agreed(name, info, self._structured, allocation)


class ClientHandshake:
    """The client's side, for one export.

    Attributes:
        agreed: Set when done; ``unread()`` is then the first of the server's replies.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffer = bytearray()
        self._waits_for = 0  # option that is being answered; 0 before the greeting
        self._structured = False
        self._allocation = False
        self._export: tuple[int, int] | None = None
        self._blocks = (SECTOR_BYTES, 4 * KIB, codec.DATA_BYTES_MAX)
        self.agreed: Agreed | None = None

    def unread(self) -> bytes:
        """Bytes fed that belong to what follows the handshake."""
        return bytes(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take ``data`` in and return what is to be sent.

        Raises:
            NbdError: Not a server that speaks this handshake.
            NotFound: It has no such export.
        """
        self._buffer += data
        out: list[bytes] = []
        while self.agreed is None and self._step(out):
            pass
        return b"".join(out)

    def _step(self, out: list[bytes]) -> bool:
        if self._waits_for == 0:
            if len(self._buffer) < _HELLO.size:
                return False
            magic, option_magic, flags = _HELLO.unpack_from(self._buffer)
            del self._buffer[: _HELLO.size]
            if (magic, option_magic) != (_NBDMAGIC, _OPTION_MAGIC) or not flags & _FIXED_NEWSTYLE:
                raise NbdError("not a server of the fixed newstyle handshake", why=f"flags {flags:#x}")
            out.append(_U32.pack(_FIXED_NEWSTYLE | flags & _NO_ZEROES))
            self._ask(_Option.STRUCTURED_REPLY, b"", out)
            return True
        if len(self._buffer) < _REPLY.size:
            return False
        magic, option, kind, length = struct.unpack_from(">QIII", self._buffer)
        if magic != _REPLY_MAGIC or option != self._waits_for:
            raise NbdError("not an NBD option reply", why=f"magic {magic:#x}, option {option}")
        if length > OPTION_BYTES_MAX:
            raise NbdError("NBD option reply too long", why=f"{length} bytes claimed")
        if len(self._buffer) < _REPLY.size + length:
            return False
        body = bytes(memoryview(self._buffer)[_REPLY.size : _REPLY.size + length])
        del self._buffer[: _REPLY.size + length]
        if kind == _ACK or kind & _ERROR:
            self._answered(option, kind, body, out)
        else:
            self._told(kind, body)
        return True

    def _ask(self, option: int, body: bytes, out: list[bytes]) -> None:
        self._waits_for = option
        out.append(_OPTION.pack(_OPTION_MAGIC, option, len(body)) + body)

    def _told(self, kind: int, body: bytes) -> None:
        try:
            if kind == _META:
                self._allocation = body[_U32.size :] == ALLOCATION.encode()
            elif kind == _REP_INFO:
                (info,) = _U16.unpack_from(body)
                if info == _INFO_TYPE_EXPORT:
                    _, size, flags = _INFO_EXPORT.unpack(body)
                    self._export = size, flags
                elif info == _INFO_TYPE_BLOCKS:
                    _, *blocks = _INFO_BLOCKS.unpack(body)
                    self._blocks = blocks[0], blocks[1], min(blocks[2], codec.DATA_BYTES_MAX)
        except struct.error as error:
            raise NbdError("malformed NBD option reply", why=f"type {kind}: {error}") from error

    def _answered(self, option: int, kind: int, body: bytes, out: list[bytes]) -> None:
        name = self._name.encode()
        if option == _Option.STRUCTURED_REPLY:
            self._structured = kind == _ACK
            if self._structured:
                query = ALLOCATION.encode()
                self._ask(
                    _Option.SET_META_CONTEXT,
                    _U32.pack(len(name)) + name + _U32.pack(1) + _U32.pack(len(query)) + query,
                    out,
                )
                return
        elif option == _Option.GO:
            if kind != _ACK:
                why = body.decode(errors="replace") or f"NBD error {kind - _ERROR}"
                raise NotFound("the server does not offer this export", where=self._name, why=why)
            if self._export is None:
                raise NbdError("the server agreed without telling the size")
            size, flags = self._export
            info = ExportInfo(size, flags, *self._blocks)
            self.agreed = Agreed(self._name, info, self._structured, self._allocation)
            return
        request = _U32.pack(len(name)) + name + _U16.pack(1) + _U16.pack(_INFO_TYPE_BLOCKS)
        self._ask(_Option.GO, request, out)


def _reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return _REPLY.pack(_REPLY_MAGIC, option, kind, len(body)) + body


def _text(raw: bytes) -> str | None:
    if len(raw) > _NAME_BYTES_MAX:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _name_and_rest(body: bytes) -> tuple[str, bytes] | None:
    if len(body) < _U32.size:
        return None
    (length,) = _U32.unpack_from(body)
    if length > len(body) - _U32.size:
        return None
    name = _text(body[_U32.size : _U32.size + length])
    return None if name is None else (name, body[_U32.size + length :])


def _queries(body: bytes) -> list[str] | None:
    if len(body) < _U32.size:
        return None
    (count,) = _U32.unpack_from(body)
    rest, queries = body[_U32.size :], []
    for _ in range(count):  # ends early: each query takes at least 4 of at most 16 Ki bytes
        parsed = _name_and_rest(rest)
        if parsed is None:
            return None
        queries.append(parsed[0])
        rest = parsed[1]
    return queries if not rest else None
