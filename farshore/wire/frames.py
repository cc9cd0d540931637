"""Frames of ``hrl/1``: bytes to messages and back, without a socket (``docs/formats/wire.md``)."""

import struct
from typing import Final

import msgspec

from farshore.errors import FarshoreError
from farshore.units import KIB, MIB
from farshore.wire import messages as m

HEADER: Final = struct.Struct("<IIBBH")
VERSION: Final = 1

META_BYTES_MAX: Final = 4 * MIB
"""MessagePack part; a MARK after a long copy names many tokens."""
RAW_BYTES_MAX: Final = 5 * MIB
"""Raw part: 4 MiB of records and their tables, or 2 MiB of copied blocks."""
UNAUTHENTICATED_BYTES_MAX: Final = 64 * KIB
"""Whole frame before the peer has shown a certificate."""

TYPES: Final[dict[int, type[m.Message]]] = {
    1: m.Enrol,
    2: m.Renew,
    3: m.Enrolled,
    10: m.Hello,
    11: m.Welcome,
    12: m.Attach,
    13: m.Attached,
    14: m.VolumeAdd,
    15: m.VolumeAdded,
    16: m.VolumeRemove,
    20: m.IncarnationStart,
    21: m.Data,
    22: m.Copy,
    23: m.Accepted,
    24: m.Offer,
    25: m.Have,
    26: m.Mark,
    30: m.Ack,
    31: m.Credit,
    32: m.Policy,
    33: m.Command,
    34: m.Result,
    35: m.Ping,
    36: m.Pong,
    40: m.Error,
    41: m.Bye,
}
_CODES: Final = {message: code for code, message in TYPES.items()}
_DECODERS: Final = {code: msgspec.msgpack.Decoder(message) for code, message in TYPES.items()}
_encoder: Final = msgspec.msgpack.Encoder()
_WITH_RAW: Final = frozenset({21, 22})


class ProtocolError(FarshoreError):
    """The peer broke a rule of the protocol: say so, close, count it. Nothing it sent was applied."""

    exit_code = 1


class Header(msgspec.Struct, frozen=True, gc=False):
    """What the fixed 12 bytes before every message say, already within bounds."""

    type: int
    meta_bytes: int
    raw_bytes: int


def encode(message: m.Message, raw_bytes: int = 0) -> bytes:
    """Header and message; the caller sends exactly ``raw_bytes`` of raw part after it."""
    meta = _encoder.encode(message)
    assert len(meta) <= META_BYTES_MAX
    assert raw_bytes <= RAW_BYTES_MAX
    return HEADER.pack(len(meta), raw_bytes, _CODES[type(message)], VERSION, 0) + meta


def decode_header(
    buffer: bytes | bytearray | memoryview, at: int = 0, *, bytes_max: int | None = None
) -> Header:
    """Decode 12 bytes and hold every length against its bound before anyone waits for that many bytes.

    Args:
        bytes_max: Bound on the whole frame, for peers without a certificate.

    Raises:
        ProtocolError: Not this protocol, an unknown type, or a length beyond its bound.
    """
    meta_bytes, raw_bytes, code, version, zero = HEADER.unpack_from(buffer, at)
    if version != VERSION or zero or code not in TYPES:
        raise ProtocolError("not a frame of hrl/1", why=f"type {code}, version {version}")
    if meta_bytes > META_BYTES_MAX or raw_bytes > RAW_BYTES_MAX or (raw_bytes and code not in _WITH_RAW):
        raise ProtocolError("frame too long", why=f"type {code}, {meta_bytes} + {raw_bytes} bytes claimed")
    if bytes_max is not None and HEADER.size + meta_bytes + raw_bytes > bytes_max:
        raise ProtocolError(
            "frame too long before a certificate was shown", why=f"{meta_bytes} bytes claimed"
        )
    return Header(code, meta_bytes, raw_bytes)


def decode_message(header: Header, meta: bytes | bytearray | memoryview) -> m.Message:
    """Decode the MessagePack part.

    Raises:
        ProtocolError: It is not the message that the header announced.
    """
    try:
        return _DECODERS[header.type].decode(meta)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise ProtocolError(f"bad {TYPES[header.type].__name__} message", why=str(exc)) from exc
