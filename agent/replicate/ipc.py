"""What the agent and its copiers say to each other over a socketpair: MessagePack, its length before it."""

import struct
from typing import Final, TypeVar

import msgspec

_LENGTH: Final = struct.Struct("<I")


class Volume(msgspec.Struct, frozen=True, array_like=True):
    """Where a copier finds a volume.

    Attributes:
        scan: Number of the pass that scans it; 0 for a disk behind a tap. Another pass may find another disk
            at the same path, so the disk is opened anew, and let go of when nothing is asked of it.
    """

    id: bytes
    disk: str
    state_page: str
    scan: int = 0


class Setup(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First message to a copier.

    Attributes:
        first_token: Tokens of this copier count up from here; unique in the session.
        level: zstd level for what is sent; None: as it is.
    """

    host: str
    port: int
    vault: bytes
    identity: str
    session: bytes
    credit_bytes: int
    chunk_bytes: int
    first_token: int
    level: int | None


class Work(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Copy an extent.

    Attributes:
        compare: Offer hashes first.
        applied_min: Reads count only while at least this LSN is applied: records from before it are no
            longer remembered for cutting out.
    """

    number: int
    volume: Volume
    offset: int
    length: int
    compare: bool
    applied_min: int


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Finish what is under way and end."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The data connection is attached."""


class Taken(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The server accepted a COPY of ``work``; fields as in `copyrule.AcceptedCopy`."""

    work: int
    token: int
    offset: int
    length: int
    applied_lsn: int
    captured_lsn: int


class Done(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """All of ``work`` was accepted or found the same.

    Attributes:
        captured_lsn: After the last read.
        sent_bytes, referenced_bytes, zero_bytes, same_bytes: What became of its bytes.
        wire_bytes: Everything this copier sent since its last `Done`.
    """

    work: int
    captured_lsn: int
    sent_bytes: int
    referenced_bytes: int
    zero_bytes: int
    same_bytes: int
    wire_bytes: int


class Broken(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The copier ends: ``reason`` as in `agent.link.REASONS`, or ``disk``, with the volume that it is."""

    reason: str
    text: str
    volume: bytes = b""


_Message = TypeVar("_Message")
ToCopier = Setup | Work | Stop
FromCopier = Ready | Taken | Done | Broken
_encoder: Final = msgspec.msgpack.Encoder()
to_copier: Final = msgspec.msgpack.Decoder(ToCopier)
from_copier: Final = msgspec.msgpack.Decoder(FromCopier)


def encode(message: ToCopier | FromCopier) -> bytes:
    """A message with its length before it."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def split(received: bytearray, decoder: msgspec.msgpack.Decoder[_Message]) -> list[_Message]:
    """Take the whole messages off the front of ``received``."""
    messages = []
    at = 0
    while len(received) - at >= _LENGTH.size:
        (size,) = _LENGTH.unpack_from(received, at)
        end = at + _LENGTH.size + size
        if len(received) < end:
            break
        messages.append(decoder.decode(bytes(received[at + _LENGTH.size : end])))
        at = end
    del received[:at]
    return messages
