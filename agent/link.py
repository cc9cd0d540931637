"""The agent's end of ``hrl/1``: TLS, who the server is, frames both ways, and when to try again.

The server is known by ``farshore:<vault id>`` in its certificate under the vault's CA; its host name means
nothing. In TLS 1.3 a refused client certificate shows only at the first read, so connected means that HELLO
was answered with WELCOME (``docs/formats/wire.md``).
"""

import asyncio
import contextlib
import random
import socket
import ssl
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from farshore.errors import AuthError, ConfigError, FarshoreError
from farshore.failpoints import failpoint
from farshore.ids import id_to_hex
from farshore.units import KIB, MIB
from farshore.wire import frames
from farshore.wire import messages as m

ALPN: Final = "hrl/1"
SILENCE_S: Final = 20.0
"""The server sends PING every 5 s; four missing ones and the connection is given up."""
CONNECT_S: Final = 10.0
USER_TIMEOUT_MS: Final = 20_000
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
SEND_BUFFER_BYTES: Final = 4 * MIB
"""What may wait for the socket; beyond it the sender waits."""
SEND_BYTES: Final = 256 * KIB
"""Encrypted and handed to the kernel at a time, while it lies in the processor's cache."""

REASONS: Final = (
    "unreachable",
    "timeout",
    "certificate",
    "refused",
    "silent",
    "closed",
    "protocol",
    "auth",
    "denied",
    "superseded",
    "gap",
    "conflict",
    "bounds",
    "corrupt",
    "capacity",
    "internal",
    "retry",
)
"""Every value of ``LinkDown.reason``: label of ``farshore_reconnects_total``."""


class LinkDown(FarshoreError):
    """The connection ended or did not come about; trying again, later, is always allowed.

    Attributes:
        reason: One of `REASONS`.
    """

    exit_code = 9
    retryable = True

    def __init__(self, reason: str, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.reason = reason if reason in REASONS else "protocol"


class Backoff:
    """Full jitter: waits between 0 and min(30 s, 0.5 s * 2^n); a thousand agents do not come at once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.failures = 0

    def next_s(self) -> float:
        """Return how long to wait before the next attempt, and count this one."""
        bound = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(self.failures, 16))
        self.failures += 1
        return self._rng.uniform(0, bound)

    def reset(self) -> None:
        """The peer proved to be well."""
        self.failures = 0


@dataclass(frozen=True, slots=True)
class Server:
    """Where and who the server is, and who we are: all that a connection needs.

    Attributes:
        identity: Folder with ``key.pem``, ``cert.pem``, ``ca.pem``; read at each connection, so that a
            renewed certificate is used from the next one on.
    """

    host: str
    port: int
    vault: bytes
    identity: Path

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def client_context(identity: Path) -> ssl.SSLContext:
    """TLS 1.3 with our certificate, trusting nothing but the vault's CA.

    Not `farshore.pki`, which brings a whole X.509 library into each copier process.

    Raises:
        ConfigError: A file of the identity is missing or cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the SAN URI is what counts, see check_server
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN])
    try:
        context.load_verify_locations(identity / "ca.pem")
        context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "cannot use this machine's certificate",
            where=str(identity),
            why=error.strerror or str(error),
            fix="enrol the machine again",
        ) from error
    return context


def check_server(certificate: Mapping[str, Any] | None, alpn: str | None, server: Server) -> None:
    """Hold the server's certificate (as ``getpeercert()`` gives it) against who it should be.

    Raises:
        LinkDown: It is another vault's server, or does not speak ``hrl/1``.
    """
    names = (certificate or {}).get("subjectAltName", ())
    expected = f"farshore:{id_to_hex(server.vault)}"
    if ("URI", expected) not in names:
        known = ", ".join(value for kind, value in names if kind == "URI") or "nobody we know"
        raise LinkDown(
            "certificate", "this is not our process server", where=server.address, why=f"it is {known}"
        )
    if alpn != ALPN:
        raise LinkDown("protocol", "the server does not speak hrl/1", where=server.address)


def prepare_socket(connected: socket.socket) -> None:
    """No Nagle, and a peer that vanished is noticed within 20 s whatever is under way."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def explain(error: BaseException, where: str) -> LinkDown:
    """Return what went wrong below the protocol, in words an operator can act on."""
    match error:
        case LinkDown():
            return error
        case ssl.SSLCertVerificationError():
            return LinkDown(
                "certificate",
                "the server's certificate is not from our vault's CA",
                where=where,
                why=error.verify_message,
                fix="check the address; something may sit in between",
            )
        case ssl.SSLError():
            alert = (error.reason or "").upper()
            if "ALERT" in alert or "CERTIFICATE" in alert:
                return LinkDown(
                    "refused",
                    "the server refused this machine's certificate",
                    where=where,
                    why=(error.reason or str(error)).replace("_", " ").lower(),
                    fix="if it expired, the agent renews it by itself within 30 days; else enrol again",
                )
            return LinkDown("protocol", "TLS failed", where=where, why=error.reason or str(error))
        case TimeoutError():
            return LinkDown("timeout", "the server did not answer in time", where=where)
        case asyncio.IncompleteReadError() | EOFError() | ConnectionResetError() | BrokenPipeError():
            return LinkDown("closed", "the server closed the connection", where=where)
        case frames.ProtocolError():
            return LinkDown("protocol", error.what, where=where, why=error.why)
        case OSError():
            return LinkDown(
                "unreachable",
                "the process server cannot be reached",
                where=where,
                why=error.strerror or str(error),
            )
    return LinkDown("internal", "the link failed", where=where, why=f"{type(error).__name__}: {error}")


def refusal(error: m.Error, where: str) -> LinkDown:
    """Return what an ERROR frame says."""
    words = {
        "auth": "the server does not accept this machine's identity",
        "denied": "this machine was denied",
        "superseded": "another session or owner has this machine",
    }
    what = words.get(error.code, "the server ended the session")
    return LinkDown(error.code, what, where=where, why=error.text)


class Link:
    """One control connection: frames out and in, with the credit of raw parts.

    Attributes:
        server: Who is at the other end.
        credit_bytes: Raw bytes that may still be sent; set from WELCOME, raised by CREDIT.
        raw_bytes, wire_bytes: Sent so far: raw parts as they are, and everything.
    """

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.credit_bytes = 0
        self.raw_bytes = self.wire_bytes = 0
        self._reader, self._writer = reader, writer
        self._more_credit = asyncio.Event()

    @classmethod
    async def connect(cls, server: Server) -> "Link":
        """Connect and check who answers. Cancelling is safe.

        Raises:
            LinkDown: With the reason, in one line.
            ConfigError: Our own certificate cannot be used.
        """
        context = client_context(server.identity)
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(
                    server.host, server.port, ssl=context, server_hostname="", limit=MIB
                )
        except (OSError, TimeoutError) as error:
            raise explain(error, server.address) from error
        link = cls(server, reader, writer)
        try:
            check_server(
                writer.get_extra_info("peercert"),
                writer.get_extra_info("ssl_object").selected_alpn_protocol(),
                server,
            )
            prepare_socket(writer.get_extra_info("socket"))
            writer.transport.set_write_buffer_limits(high=SEND_BUFFER_BYTES)
        except BaseException:
            link.abort()
            raise
        return link

    async def send(self, message: m.Message) -> None:
        """Send a frame without raw part. Raises LinkDown."""
        await self._write(frames.encode(message), None)

    async def send_raw(self, message: m.Message, raw: bytes | bytearray | memoryview) -> None:
        """Send a frame with ``raw``, when the credit allows it; ``raw`` is copied before this returns.

        Raises:
            LinkDown: The connection ended.
        """
        size = len(raw)
        # A frame larger than the whole credit could wait for ever; the server bounds what it takes anyway.
        while self.credit_bytes < size and self.credit_bytes < self._credit_whole:
            self._more_credit.clear()
            await self._more_credit.wait()
        self.credit_bytes -= size
        self.raw_bytes += size
        failpoint("agent.before_data_sent")
        await self._write(frames.encode(message, size), raw)

    _credit_whole = 0

    def start_credit(self, credit_bytes: int) -> None:
        """WELCOME or POLICY gave this much for the connection."""
        self._credit_whole = self.credit_bytes = credit_bytes

    def add_credit(self, count: int) -> None:
        """CREDIT came."""
        self.credit_bytes += count
        self._more_credit.set()

    async def receive(self, timeout_s: float = SILENCE_S) -> m.Message:
        """Return the next message. ERROR and BYE are raised, not returned.

        Raises:
            LinkDown: Silence of ``timeout_s``, end of the connection, ERROR, BYE or a broken frame.
        """
        try:
            async with asyncio.timeout(timeout_s):
                head = await self._reader.readexactly(frames.HEADER.size)
                header = frames.decode_header(head)
                meta = await self._reader.readexactly(header.meta_bytes) if header.meta_bytes else b""
                if header.raw_bytes:
                    raise frames.ProtocolError("the server sent a raw part")
            message = frames.decode_message(header, meta)
        except TimeoutError as error:
            raise LinkDown(
                "silent", f"nothing heard for {timeout_s:g} s", where=self.server.address
            ) from error
        except (OSError, EOFError, frames.ProtocolError) as error:
            raise explain(error, self.server.address) from error
        if isinstance(message, m.Error) and message.volume is None:
            raise refusal(message, self.server.address)
        if isinstance(message, m.Bye):
            raise LinkDown("closed", "the server said goodbye", where=self.server.address, why=message.reason)
        return message

    async def close(self, reason: str) -> None:
        """Say BYE and close in order, within a second. Raises nothing."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1):
                await self.send(m.Bye(reason))
                self._writer.close()
                await self._writer.wait_closed()
        self.abort()

    def abort(self) -> None:
        """Drop the connection now."""
        self._writer.transport.abort()

    async def _write(self, frame: bytes, raw: bytes | bytearray | memoryview | None) -> None:
        try:
            self._writer.write(frame)
            if raw is not None:
                # bytes(): the transport may keep what it cannot send at once, the caller's buffer is reused.
                self._writer.write(bytes(raw))
            self.wire_bytes += len(frame) + (len(raw) if raw is not None else 0)
            await self._writer.drain()
        except (OSError, RuntimeError) as error:
            raise explain(error, self.server.address) from error


async def hello(link: Link, message: m.Hello) -> m.Welcome:
    """Introduce this machine. Only after this is the agent connected.

    Raises:
        LinkDown: Refused, or no answer.
        AuthError: The answer is from another vault.
    """
    await link.send(message)
    answer = await link.receive(CONNECT_S)
    if not isinstance(answer, m.Welcome):
        raise LinkDown(
            "protocol",
            "HELLO was not answered with WELCOME",
            where=link.server.address,
            why=type(answer).__name__,
        )
    if answer.vault_id != link.server.vault:
        raise AuthError("the server answers for another vault", where=link.server.address)
    link.start_credit(answer.policy.credit_bytes)
    return answer


class BlockingLink:
    """The same for a process that does one thing at a time: a blocking socket and TLS over memory buffers.

    One ``recv`` of 256 KiB feeds sixteen TLS records (PERFORMANCE, section 2).
    """

    def __init__(self, server: Server) -> None:
        """Connect and check who answers. Raises LinkDown, ConfigError."""
        context = client_context(server.identity)
        self.server = server
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        self._receive_buffer = bytearray(256 * 1024)
        self._received = bytearray()
        self.wire_bytes = 0
        try:
            self._socket = socket.create_connection((server.host, server.port), CONNECT_S)
        except OSError as error:
            raise explain(error, server.address) from error
        try:
            prepare_socket(self._socket)
            self._shake()
            check_server(self._tls.getpeercert(), self._tls.selected_alpn_protocol(), server)
            self._socket.settimeout(None)
            # A blocking send must not outlive the peer by hours: SO_SNDTIMEO bounds each.
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", USER_TIMEOUT_MS // 1000, 0)
            )
        except (OSError, EOFError) as error:
            self._socket.close()
            raise explain(error, server.address) from error
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For select: readable when `receive` will find something new."""
        return self._socket.fileno()

    def send(self, message: m.Message, raw: Sequence[bytes | memoryview] = ()) -> None:
        """Send one frame; the buffers of ``raw`` may be reused when this returns. Raises LinkDown."""
        try:
            self._tls.write(frames.encode(message, sum(map(len, raw))))
            for part in raw:
                self._tls.write(part)
                if self._outgoing.pending >= SEND_BYTES:
                    self._flush()
            self._flush()
        except (OSError, EOFError) as error:
            raise explain(error, self.server.address) from error

    def receive(self) -> list[m.Message]:
        """Take what one ``recv`` brings and return the whole messages in it, maybe none.

        Raises:
            LinkDown: End of the connection, ERROR, BYE or a broken frame.
        """
        try:
            self._fill()
            while True:
                try:
                    self._received += self._tls.read(256 * 1024)
                except ssl.SSLWantReadError:
                    break
                except ssl.SSLZeroReturnError as error:
                    raise EOFError from error
            self._flush()
            return self._messages()
        except (OSError, EOFError, frames.ProtocolError) as error:
            raise explain(error, self.server.address) from error

    def close(self) -> None:
        """Say goodbye and close; wait briefly for the peer, so that its last words are not lost to a RST."""
        with contextlib.suppress(Exception):
            self.send(m.Bye("done"))
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(1)
            while self._socket.recv_into(self._receive_buffer):
                pass
        self._socket.close()

    def _messages(self) -> list[m.Message]:
        messages: list[m.Message] = []
        at = 0
        size = frames.HEADER.size
        while len(self._received) - at >= size:
            header = frames.decode_header(self._received, at)
            if header.raw_bytes:
                raise frames.ProtocolError("the server sent a raw part")
            end = at + size + header.meta_bytes
            if len(self._received) < end:
                break
            message = frames.decode_message(header, bytes(self._received[at + size : end]))
            at = end
            if isinstance(message, m.Error):
                raise refusal(message, self.server.address)
            if isinstance(message, m.Bye):
                raise LinkDown("closed", "the server said goodbye", why=message.reason)
            messages.append(message)
        del self._received[:at]
        return messages

    def _shake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            else:
                self._flush()
                return

    def _fill(self) -> None:
        count = self._socket.recv_into(self._receive_buffer)
        if not count:
            raise EOFError
        with memoryview(self._receive_buffer)[:count] as received:
            self._incoming.write(received)

    def _flush(self) -> None:
        if self._outgoing.pending:
            encrypted = self._outgoing.read()
            self.wire_bytes += len(encrypted)
            self._socket.sendall(encrypted)
