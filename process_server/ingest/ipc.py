"""What the main process and its ingest workers say to each other over their socketpair.

One message = ``meta length, raw length`` (u32 each), a MessagePack array, raw bytes. Both ends are ours and
of the same version, so nothing is negotiated; what an agent sent never arrives here before it was decoded
within bounds, and stays bytes (``Frame.meta``) or columns of numbers.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import numpy as np

HEADER: Final = struct.Struct("<II")
MESSAGE_BYTES_MAX: Final = 80 * 1024 * 1024
"""A flush hands back one pack whole (64 MiB at most); everything else is far smaller."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of all messages; "raw" says what the bytes after the MessagePack part are."""


# --- main to worker ---


class Setup(Message, frozen=True):
    """First message. ``keys`` is `VaultKeys.to_bytes`; none of it ever touches a disk or argv."""

    certificate: bytes
    private_key: bytes
    ca: bytes
    vault_url: str
    keys: bytes
    pack_bytes: int
    chunk_bytes: int
    compression_level: int


class Renewed(Message, frozen=True):
    """The server's certificate was renewed; connections made from now on use it."""

    certificate: bytes
    private_key: bytes
    ca: bytes


class Send(Message, frozen=True):
    """Raw: an encoded frame for the agent."""

    connection: int


class Admit(Message, frozen=True):
    """HELLO or ATTACH was accepted: bulk frames may follow."""

    connection: int
    session: bytes
    machine: bytes
    control: bool
    credit_bytes: int
    volumes: tuple[tuple[bytes, int], ...]


class Volume(Message, frozen=True):
    """A volume of a session: its size bounds every offset. Size 0: the volume is gone."""

    session: bytes
    volume: bytes
    size_bytes: int


class Position(Message, frozen=True):
    """Where a volume's record stream stands; answers INCARNATION-START. ``key`` empty: it was refused."""

    connection: int
    volume: bytes
    key: bytes
    incarnation: bytes
    lsn: int
    digest: bytes


class Close(Message, frozen=True):
    """Send ERROR ``code`` (when not empty), about ``volume`` (when not empty), then close."""

    connection: int
    code: str
    text: str
    volume: bytes = b""


FOUND_DTYPE: Final = np.dtype([("found", "u1"), ("pack", "V16"), ("chunk", "<u4")])
OFFER_DTYPE: Final = np.dtype([("offset", "<u8"), ("length", "<u8"), ("id", "V32")])
"""One offered block; an id of zeros stands for a block of zeros."""


class Found(Message, frozen=True):
    """Answer to Query. Raw: per id one row of ``FOUND_DTYPE``."""

    request: int


class Answers(Message, frozen=True):
    """Answer to OfferQuery. Raw: the bytes of HAVE."""

    request: int


class Flush(Message, frozen=True):
    """Seal and store what is open for a session; a pack of at most ``inline_bytes`` comes back instead."""

    request: int
    session: bytes
    inline_bytes: int


class Forget(Message, frozen=True):
    """The session is over: drop its open pack and counters."""

    session: bytes


class Stop(Message, frozen=True):
    """Close every connection and end."""


# --- worker to main ---


class Ready(Message, frozen=True):
    """The worker has a store, keys and a TLS context."""


class Opened(Message, frozen=True):
    """TLS is up. Raw: the peer's certificate in DER, empty without one."""

    connection: int


class Frame(Message, frozen=True):
    """A frame that is not bulk. Raw: its MessagePack part."""

    connection: int
    kind: int


class Query(Message, frozen=True):
    """Which of these chunks are there? Raw: chunk ids, 32 bytes each. ``own``: sent by this machine only."""

    request: int
    session: bytes
    own: bool


class OfferQuery(Message, frozen=True):
    """Raw: rows of ``OFFER_DTYPE``."""

    request: int
    session: bytes
    volume: bytes


class CopyRows(Message, frozen=True):
    """A COPY was verified. ``packs``: what the rows' pack column points into; ``fresh``: those of them that
    PackStored has yet to name. Raw: extent rows."""

    session: bytes
    token: int
    volume: bytes
    applied_lsn: int
    packs: tuple[bytes, ...]
    fresh: tuple[bytes, ...]


class DataRows(Message, frozen=True):
    """Records were verified. ``batches``: last LSN, running digest, volume size after each batch with
    records; ``tail``: running digest after all, a SEAL included. ``packs``, ``fresh`` as in CopyRows. Raw:
    extent rows."""

    session: bytes
    volume: bytes
    incarnation: bytes
    first_lsn: int
    packs: tuple[bytes, ...]
    fresh: tuple[bytes, ...]
    batches: tuple[tuple[int, bytes, int], ...]
    tail: bytes


class StoreUse(Message, frozen=True):
    """What the worker asked of the store since the last such message: rows of `Meter.take`."""

    rows: tuple[tuple[str, str, int, int, float, tuple[int, ...]], ...]


class PackStored(Message, frozen=True):
    """A pack's PUT was answered. ``error`` not empty: it was not. Raw: its chunk ids in order."""

    session: bytes
    pack: bytes
    bytes: int
    plain_bytes: int
    duration_s: float
    error: str


class Flushed(Message, frozen=True):
    """Answer to Flush, after every PackStored of it. ``pack`` not empty: raw = that pack's bytes, not stored;
    ``ids``: its chunk ids."""

    request: int
    pack: bytes
    ids: bytes
    plain_bytes: int


class Closed(Message, frozen=True):
    """A connection is gone. ``code`` as in ERROR, empty when the peer left; never answered."""

    connection: int
    code: str
    text: str


class Fault(Message, frozen=True):
    """Something nobody expected, for the log; the connection it happened on was closed."""

    text: str


class Counts(Message, frozen=True):
    """Additions to counters since the last Counts."""

    wire_bytes: int
    chunks_new: int
    chunks_found: int
    chunks_zero: int
    plain_bytes: int
    repeats: int


_encoder: Final = msgspec.msgpack.Encoder()
_to_worker: Final = msgspec.msgpack.Decoder(
    Setup | Renewed | Send | Admit | Volume | Position | Close | Found | Answers | Flush | Forget | Stop
)
_to_main: Final = msgspec.msgpack.Decoder(
    Ready
    | Opened
    | Frame
    | Query
    | OfferQuery
    | CopyRows
    | DataRows
    | PackStored
    | Flushed
    | Closed
    | Fault
    | Counts
    | StoreUse
)


class Channel(asyncio.Protocol):
    """One end of the socketpair.

    Args:
        receive: Called with each message and its raw part, in order; the raw part is the callee's.
        ended: Called once when the other end is gone.
    """

    def __init__(
        self,
        receive: Callable[[Message, bytes], None],
        ended: Callable[[], None],
        *,
        worker: bool,
    ) -> None:
        self._receive, self._ended = receive, ended
        self._decode = (_to_worker if worker else _to_main).decode
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._writable = asyncio.Event()
        self._writable.set()
        self._over = False

    def send(self, message: Message, raw: bytes | bytearray | memoryview = b"") -> None:
        """Queue a message, to nobody when the other end is gone. ``raw`` is the caller's again on return."""
        transport = self._transport
        if transport is None or self._over:
            return
        meta = _encoder.encode(message)
        if len(raw) > 65536:
            transport.write(HEADER.pack(len(meta), len(raw)) + meta)
            transport.write(bytes(raw))
        else:
            transport.write(b"".join((HEADER.pack(len(meta), len(raw)), meta, raw)))

    def drained(self) -> Awaitable[bool]:
        """Wait until the other end has taken most of what was sent."""
        return self._writable.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio.Transport without being one.
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= HEADER.size:
            meta_bytes, raw_bytes = HEADER.unpack_from(buffer, at)
            assert meta_bytes + raw_bytes <= MESSAGE_BYTES_MAX
            end = at + HEADER.size + meta_bytes + raw_bytes
            if len(buffer) < end:
                break
            meta_at = at + HEADER.size
            with memoryview(buffer) as view:
                message = self._decode(view[meta_at : meta_at + meta_bytes])
                raw = bytes(view[meta_at + meta_bytes : end])
            at = end
            self._receive(message, raw)
        if at:
            del buffer[:at]

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._writable.set()
        self._ended()
