"""One agent's connection in a worker: TLS over two memory buffers, and whole frames out of it.

TLS is terminated on `ssl.MemoryBIO` and not by the event loop: one ``recv`` of 256 KiB feeds sixteen TLS
records, and what is decrypted goes straight into the frame's own memory (1.07 ns/B for both sides, the loop's
own TLS 1.09 and one more copy of each payload; PERFORMANCE, section 4).
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from typing import Final, Protocol

from farshore.pki import ALPN_HRL
from farshore.units import KIB, MIB
from farshore.wire import frames
from farshore.wire.messages import Error

RECEIVE_BYTES: Final = 256 * KIB
SEND_BACKLOG_BYTES_MAX: Final = 8 * MIB
"""Answers waiting for a peer that does not read them; beyond it the peer is dropped."""
UNAUTHENTICATED_S: Final = 10.0
SILENCE_S: Final = 20.0

Buffer = bytearray | memoryview


class Owner(Protocol):
    """Who holds a connection; called from its callbacks, never re-entered."""

    def opened(self, connection: "Connection", certificate: bytes) -> None:
        """TLS is up; ``certificate`` is DER, empty when the peer showed none."""

    def frame(self, connection: "Connection", header: frames.Header, meta: bytearray, raw: Buffer) -> None:
        """A whole frame; ``raw`` is memory from `take_buffer`, now the owner's."""

    def closed(self, connection: "Connection") -> None:
        """Nothing more will come. Called once."""


class Connection(asyncio.BufferedProtocol):
    """TLS and framing of one socket. Reading stops while ``paused``; nothing unbounded is ever held.

    Attributes:
        id: As the main process numbered it.
        authenticated: HELLO or ATTACH was accepted.
        quiet: A data connection.
        code, text: Why it was closed; empty when the peer left.
    """

    def __init__(
        self,
        id: int,
        context: ssl.SSLContext,
        receive_buffer: memoryview,
        owner: Owner,
        take_buffer: Callable[[int], Buffer],
    ) -> None:
        self.id = id
        self.code = self.text = ""
        self.authenticated = self.quiet = False
        self.heard_at = self.opened_at = time.monotonic()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        # Shared by all connections of the loop: it is filled and emptied within one callback.
        self._receive_buffer = receive_buffer
        self._owner, self._take_buffer = owner, take_buffer
        self._transport: asyncio.Transport | None = None
        self._shaken = self._paused = self._over = self._pumping = False
        self._bytes_before_certificate = 0
        self._header: frames.Header | None = None
        self._head = bytearray(frames.HEADER.size)
        self._meta = bytearray()
        self._raw: Buffer = b""  # type: ignore[assignment]
        self._target: memoryview = memoryview(self._head)
        self._filled = 0
        self._stage = 0

    # --- from the loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=SEND_BACKLOG_BYTES_MAX)  # type: ignore[attr-defined]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.heard_at = time.monotonic()
        self._incoming.write(self._receive_buffer[:nbytes])
        if not self.authenticated:
            self._bytes_before_certificate += nbytes
            # The handshake with a certificate is a few KiB; a frame of 64 KiB may follow it.
            if self._bytes_before_certificate > frames.UNAUTHENTICATED_BYTES_MAX + 32 * KIB:
                self.refuse("bounds", "too many bytes before HELLO")
                return
        self._pump()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.refuse("capacity", "answers are not read")
        if self._transport is not None:
            self._transport.abort()

    def resume_writing(self) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._owner.closed(self)

    # --- from the owner ---

    def send(self, frame: bytes) -> None:
        """Encrypt and queue a frame."""
        if self._over or not self._shaken:
            return
        self._tls.write(frame)
        self._flush()

    def refuse(self, code: str, text: str, volume: bytes | None = None) -> None:
        """Say ERROR and close; what it sent from here on is not looked at."""
        if self._over:
            return
        if not self.code:
            self.code, self.text = code, text
        if self._shaken:
            self.send(frames.encode(Error(code, text[:500], volume)))
        self.close()

    def close(self) -> None:
        """Close after what was queued has been sent. Called again: nothing."""
        if self._over:
            return
        self._over = True
        if self._shaken:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now: the peer is gone or hostile."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Take no more from the peer; at most what one ``recv`` brought stays encrypted in memory."""
        if not self._paused:
            self._paused = True
            if self._transport is not None and not self._over:
                self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self.heard_at = time.monotonic()
            if self._transport is not None and not self._over:
                self._transport.resume_reading()
                self._pump()

    @property
    def paused(self) -> bool:
        return self._paused

    def overdue(self, now: float) -> bool:
        """Tell whether the peer has been silent, or without a name, for too long."""
        if not self.authenticated:
            return now - self.opened_at > UNAUTHENTICATED_S
        # What we do not read cannot be heard. PING goes over control connections only: another one may be
        # silent between frames, since it ends with its session.
        between = self.quiet and self._stage == 0 and not self._filled
        return not self._paused and not between and now - self.heard_at > SILENCE_S

    # --- TLS and frames ---

    def _flush(self) -> None:
        if self._outgoing.pending and self._transport is not None:
            self._transport.write(self._outgoing.read())

    def _pump(self) -> None:
        if self._pumping or self._over:
            return
        self._pumping = True
        try:
            if self._shaken or self._shake():
                self._read()
        except frames.ProtocolError as exc:
            self.refuse("bounds" if "long" in exc.what else "protocol", str(exc))
        except ssl.SSLError as exc:
            if not self.code:
                self.code, self.text = "protocol", f"TLS: {exc.reason or exc}"
            # The alert that says why is in the outgoing buffer.
            self._flush()
            self._over = True
            if self._transport is not None:
                self._transport.close()
        finally:
            self._pumping = False

    def _shake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        self._flush()
        if self._tls.selected_alpn_protocol() != ALPN_HRL:
            self._shaken = True
            self.refuse("protocol", "not a client of hrl/1 (ALPN)")
            return False
        self._shaken = True
        self._owner.opened(self, self._tls.getpeercert(binary_form=True) or b"")
        return True

    def _read(self) -> None:
        tls, want = self._tls, ssl.SSLWantReadError
        while not (self._paused or self._over):
            target, filled = self._target, self._filled
            size = len(target)
            try:
                while filled < size:
                    count = tls.read(size - filled, target[filled:] if filled else target)
                    if not count:
                        self._filled = filled
                        self.close()
                        return
                    filled += int(count)
            except want:
                self._filled = filled
                return
            except ssl.SSLZeroReturnError:
                self._filled = filled
                self.close()
                return
            self._filled = 0
            self._next()

    def _next(self) -> None:
        if self._stage == 0:
            bytes_max = None if self.authenticated else frames.UNAUTHENTICATED_BYTES_MAX
            started = self._header = frames.decode_header(self._head, bytes_max=bytes_max)
            self._meta = bytearray(started.meta_bytes)
            self._raw = b""  # type: ignore[assignment]
            self._stage = 1
            self._target = memoryview(self._meta)
            if started.meta_bytes:
                return
        assert self._header is not None
        header = self._header
        if self._stage == 1 and header.raw_bytes:
            self._raw = self._take_buffer(header.raw_bytes)
            self._stage = 2
            self._target = memoryview(self._raw)[: header.raw_bytes]
            return
        meta, raw = self._meta, self._raw
        self._stage, self._target = 0, memoryview(self._head)
        self._meta, self._raw = bytearray(), b""  # type: ignore[assignment]
        self._owner.frame(self, header, meta, raw)
