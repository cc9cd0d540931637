"""One NBD connection of a volume: bytes in, batches out; replies from any thread.

A client has a thread to itself. It receives, hands what it parsed to the volume, and with that appends it to
the journal and answers: no other thread has a part in it (docs/decisions/0021). A journal that hangs
would keep the thread, so whoever looks after the connections gives the client to another one then.
"""

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from agent.tap.batch import Bytes
from agent.tap.frontend import Frontend
from agent.tap.outbox import Outbox
from agent.tap.parse import RUN_MIN, write_run
from agent.tap.vectored import aligned
from farshore.nbd import codec, handshake
from farshore.nbd.codec import NbdError
from farshore.telemetry import get_logger
from farshore.units import KIB, MIB, SECTOR_BYTES

RECEIVE_BYTES: Final = 512 * KIB
LARGE_BYTES: Final = 64 * KIB
"""A write from this length on is received into memory of its own, where it stays until the disk has it."""
SEND_BYTES_MAX: Final = 8 * MIB
"""Replies that the client does not take; no request is read from it above this."""
READS_BYTES_MAX: Final = 64 * MIB
"""Data of reads under way on one connection; the largest single read is half of it."""
READS_MAX: Final = 256
HANDSHAKE_TIMEOUT_S: Final = 30.0
STUCK_S: Final = 0.25
"""A thread that the journal has kept for this long is left to it, and the client gets another."""

_FLAGS: Final = (
    codec.HAS_FLAGS
    | codec.SEND_FLUSH
    | codec.SEND_FUA
    | codec.SEND_TRIM
    | codec.SEND_WRITE_ZEROES
    | codec.SEND_DF
    | codec.CAN_MULTI_CONN
)
_ALLOWED: Final = {
    codec.READ: codec.DF | codec.FUA,
    codec.WRITE: codec.FUA,
    codec.FLUSH: codec.FUA,
    codec.TRIM: codec.FUA,
    codec.WRITE_ZEROES: codec.FUA | codec.NO_HOLE,
    codec.BLOCK_STATUS: codec.REQ_ONE | codec.FUA,
}


class _Gone(Exception):
    """The client is gone, or told to go."""


class _Superseded(Exception):
    """Another thread serves the client meanwhile."""


def describe(frontend: Frontend) -> handshake.ExportInfo:
    """What clients are told of a volume."""
    return handshake.ExportInfo(frontend.size_bytes, _FLAGS, SECTOR_BYTES, 4 * KIB, codec.DATA_BYTES_MAX)


class Connection:
    """One client. The loop's thread makes it; what is said to be so can be called from any other."""

    def __init__(
        self,
        peer: socket.socket,
        find: Callable[[str], Frontend | None],
        names: Callable[[], list[str]],
        closed: Callable[["Connection"], None],
    ) -> None:
        """``closed`` is called once, in the loop's thread, when the connection is gone."""
        self._peer, self._closed = peer, closed
        self._loop = asyncio.get_running_loop()
        self._log = get_logger(component="nbd")
        self._frontend: Frontend | None = None
        self._find = find
        self._structured = self._allocation = False
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._expected = 0  # length of the next write, if it is like the last
        self._header = memoryview(bytearray(codec.REQUEST.size))
        self._reads = self._read_bytes = 0
        self._open = True
        self._goodbye = False
        self._room = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None  # the one that serves this client
        self._inside_since = 0.0
        self._outbox = Outbox(peer, self._send_later)
        self._handshake = handshake.ServerHandshake(
            lambda name: describe(found) if (found := find(name)) else None, names
        )
        self._timer = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._timed_out)
        peer.setblocking(True)
        self._start_thread()

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        """Send to the client without waiting. Any thread."""
        self._outbox.send(*buffers)

    def close(self) -> None:
        """Drop the client. What it was not answered yet never will be. Any thread."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._outbox.close()
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)  # its thread comes back from receiving
        self._room.set()

    def resume(self) -> None:
        """There may be room again for what this client sends. Any thread."""
        self._room.set()

    def stop_reading(self) -> None:
        """Take in no more requests; replies still go out. Any thread."""
        self._goodbye = True
        self._room.set()

    def look_after(self, now: float) -> None:
        """Give the client to another thread if the journal keeps its own. The loop's thread."""
        with self._lock:
            stuck = self._inside_since and now - self._inside_since > STUCK_S
            if not stuck or not self._open:
                return
            self._inside_since = 0.0
            self._start_thread()

    def read_done(self, length: int) -> None:
        """From a read thread: one read was answered."""
        with self._lock:
            self._reads -= 1
            self._read_bytes -= length
        self._room.set()

    # -- threads -------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="nbd", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Serve the client until it goes, or the journal keeps us."""
        try:
            if self._frontend is None:
                self._shake_hands()
            while True:
                self._parse()
                if self._goodbye or self._must_wait():  # also after a long write, which the buffer never sees
                    self._wait_for_room()
                self._receive()
        except _Superseded:
            return  # nothing here is ours any more
        except NbdError as error:
            self._log.warning("nbd_client_refused", error=str(error))
        except (_Gone, OSError):
            pass
        self.close()
        self._tell_loop(self._finish)

    def _finish(self) -> None:
        """In the loop's thread: nobody uses the socket any more."""
        self._timer.cancel()
        self._loop.remove_writer(self._peer.fileno())
        self._peer.close()
        self._closed(self)

    def _tell_loop(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call)

    def _timed_out(self) -> None:
        if self._frontend is None:
            self.close()

    def _send_later(self) -> None:
        self._tell_loop(self._want_to_send)

    def _want_to_send(self) -> None:
        if not self._open:
            return
        if self._outbox.broken:
            self.close()
        elif self._outbox.bytes:
            self._loop.add_writer(self._peer.fileno(), self._writable)

    def _writable(self) -> None:
        if self._outbox.push() or self._outbox.broken:
            self._loop.remove_writer(self._peer.fileno())
            self._room.set()
        if self._outbox.broken:
            self.close()

    # -- in ------------------------------------------------------------------------------------------------

    def _some(self, target: memoryview) -> int:
        """Receive into ``target``; at least one byte."""
        while True:
            try:
                got = self._peer.recv_into(target)
            except BlockingIOError:
                self._until_readable()
                continue
            if not got or not self._open:
                raise _Gone
            return got

    def _until_readable(self) -> None:
        """Sockets block here, until the loop has once had to send for one: uv_poll makes it non-blocking."""
        poll = select.poll()
        poll.register(self._peer, select.POLLIN)
        poll.poll()

    def _all(self, target: memoryview) -> None:
        at = 0
        while at < len(target):
            at += self._some(target[at:])

    def _shake_hands(self) -> None:
        machine = self._handshake
        self.send(machine.greeting())
        while machine.agreed is None:
            got = self._some(self._view)
            out = machine.feed(self._view[:got])
            if out:
                self.send(out)
            if machine.closed:
                raise _Gone
        frontend = self._find(machine.agreed.name)
        if frontend is None:  # taken away between two packets
            raise _Gone
        self._structured, self._allocation = machine.agreed.structured, machine.agreed.allocation
        unread = machine.unread()
        self._view[: len(unread)] = unread
        self._end = len(unread)
        self._frontend = frontend

    def _receive(self) -> None:
        """Receive more, after what is there and could not be used yet."""
        if self._start == self._end:
            self._start = self._end = 0
            if self._expected:
                self._receive_expected()
                return
        elif self._start and len(self._buffer) - self._end < RECEIVE_BYTES // 2:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left
        self._end += self._some(self._view[self._end :])

    def _receive_expected(self) -> None:
        """Guess that another write of the same length follows, and receive it where it is to stay."""
        payload = aligned(self._expected)
        try:
            got, _, _, _ = self._peer.recvmsg_into([self._header, payload.data])
        except BlockingIOError:
            self._until_readable()
            return
        if not got:
            raise _Gone
        head = codec.REQUEST.size
        request = codec.decode_request(self._header) if got >= head else None
        if request is not None and request.type == codec.WRITE and request.length == self._expected:
            self._all(payload.data[got - head :])
            self._large(request, payload)
            return
        self._expected = 0
        if got > len(self._buffer):  # the guess was longer than the buffer, and wrong
            self._buffer = bytearray(got + RECEIVE_BYTES)
            self._view = memoryview(self._buffer)
        self._view[: min(got, head)] = self._header[: min(got, head)]
        if got > head:
            self._view[head:got] = payload.data[: got - head]
        self._end = got

    def _receive_large(self, request: codec.Request) -> None:
        """Receive what is missing of one long write straight into its own memory."""
        payload = aligned(request.length)
        first = self._start + codec.REQUEST.size
        here = self._end - first
        payload.data[:here] = self._view[first : self._end]
        self._start = self._end = 0
        self._all(payload.data[here:])
        self._large(request, payload)

    def _large(self, request: codec.Request, payload: Bytes) -> None:
        self._expected = request.length
        if self._check(request):
            self._write_one(request, payload)

    # -- requests ------------------------------------------------------------------------------------------

    def _must_wait(self) -> bool:
        frontend = self._frontend
        return self._outbox.bytes > SEND_BYTES_MAX or (
            frontend is not None
            and (frontend.full or self._reads >= READS_MAX or self._read_bytes > READS_BYTES_MAX // 2)
        )

    def _wait_for_room(self) -> None:
        """Until what this client causes is within its bounds. Raises _Gone."""
        while self._open:
            self._room.clear()
            if not self._goodbye:
                if not self._must_wait():
                    return
                frontend = self._frontend
                if frontend is not None and frontend.full:
                    frontend.want_relief()
            self._room.wait()
        raise _Gone

    def _parse(self) -> None:
        frontend = self._frontend
        assert frontend is not None
        single: list[codec.Request] = []
        starts: list[int] = []
        while self._end - self._start >= codec.REQUEST.size:
            if not self._open or self._goodbye or self._must_wait():
                self._write_together(single, starts)
                self._wait_for_room()
            if not single and self._end - self._start > RUN_MIN * (codec.REQUEST.size + SECTOR_BYTES):
                run = write_run(self._buffer, self._start, self._end, frontend.size_bytes, SECTOR_BYTES)
                if run is not None:
                    self._start = run.end
                    lengths = np.full(len(run.offsets), run.length, np.int64)
                    self._enter()
                    frontend.write(run.offsets, lengths, run.payload, self, run.reply)
                    self._leave()
                    continue
            request = codec.decode_request(self._buffer, self._start)
            if request.type == codec.WRITE:
                if self._end - self._start < codec.REQUEST.size + request.length:
                    self._write_together(single, starts)
                    if request.length >= LARGE_BYTES:
                        self._receive_large(request)
                    return
                good = self._check(request)
                if good and not request.flags and request.length < LARGE_BYTES:
                    single.append(request)
                    starts.append(self._start + codec.REQUEST.size)
                    self._start += codec.REQUEST.size + request.length
                    continue
                first = self._start + codec.REQUEST.size
                self._write_together(single, starts)
                self._start = first + request.length
                if good:
                    payload = np.frombuffer(self._buffer, np.uint8, request.length, first).copy()
                    self._write_one(request, payload)
                continue
            self._write_together(single, starts)
            self._start += codec.REQUEST.size
            self._other(request)
        self._write_together(single, starts)

    def _enter(self) -> None:
        """What follows may be kept by the journal; everything before it has been taken off the buffer."""
        self._inside_since = time.monotonic()

    def _leave(self) -> None:
        """Raises _Superseded when the client was given to another thread meanwhile."""
        with self._lock:
            if self._thread is not threading.current_thread():
                raise _Superseded
            self._inside_since = 0.0

    def _write_together(self, single: list[codec.Request], starts: list[int]) -> None:
        """Hand on the small writes gathered so far, as one batch."""
        frontend = self._frontend
        if not single or frontend is None:
            return
        lengths = np.array([request.length for request in single], np.int64)
        payload = np.empty(int(lengths.sum()), np.uint8)
        target, at = payload.data, 0
        for request, start in zip(single, starts, strict=True):
            target[at : at + request.length] = self._view[start : start + request.length]
            at += request.length
        offsets = np.array([request.offset for request in single], np.int64)
        reply = b"".join([codec.simple_reply(request.cookie) for request in single])
        single.clear()
        starts.clear()
        self._enter()
        frontend.write(offsets, lengths, payload, self, reply)
        self._leave()

    def _write_one(self, request: codec.Request, payload: Bytes) -> None:
        frontend = self._frontend
        assert frontend is not None
        offsets, lengths = np.array([request.offset], np.int64), np.array([request.length], np.int64)
        fua = bool(request.flags & codec.FUA)
        self._enter()
        frontend.write(offsets, lengths, payload, self, codec.simple_reply(request.cookie), fua=fua)
        self._leave()

    def _check(self, request: codec.Request) -> bool:
        """Whether a request makes sense; answers it when it does not."""
        frontend = self._frontend
        assert frontend is not None
        error = 0
        if request.type not in _ALLOWED or request.flags & ~_ALLOWED[request.type]:
            error = codec.EINVAL
        elif request.type == codec.READ and request.length > codec.DATA_BYTES_MAX:
            error = codec.EOVERFLOW
        elif request.type == codec.BLOCK_STATUS and not self._allocation:
            error = codec.EINVAL
        else:
            error = codec.range_error(request, frontend.size_bytes, SECTOR_BYTES)
        if not error:
            return True
        if self._structured and request.type in (codec.READ, codec.BLOCK_STATUS):
            self.send(codec.error_chunk(request.cookie, error))
        else:
            self.send(codec.simple_reply(request.cookie, error))
        return False

    def _other(self, request: codec.Request) -> None:
        frontend = self._frontend
        assert frontend is not None
        if request.type == codec.DISC:
            # Everything it sent before was taken in; what is under way finishes without it.
            raise _Gone
        if not self._check(request):
            return
        reply = codec.simple_reply(request.cookie)
        match request.type:
            case codec.READ:
                self._read(frontend, request)
            case codec.FLUSH:
                frontend.flush(self, reply)
            case codec.BLOCK_STATUS:
                frontend.extents(
                    self, request.cookie, request.offset, request.length, handshake.ALLOCATION_ID
                )
            case codec.TRIM | codec.WRITE_ZEROES:
                make = frontend.trim if request.type == codec.TRIM else frontend.zero
                self._enter()
                make(request.offset, request.length, self, reply, fua=bool(request.flags & codec.FUA))
                self._leave()

    def _read(self, frontend: Frontend, request: codec.Request) -> None:
        with self._lock:
            self._reads += 1
            self._read_bytes += request.length
        answer = _ReadAnswer(self, request.length)
        frontend.read(answer, request.cookie, request.offset, request.length, structured=self._structured)


class _ReadAnswer:
    """Counts a read as done when it is answered."""

    __slots__ = ("_connection", "_length")

    def __init__(self, connection: Connection, length: int) -> None:
        self._connection, self._length = connection, length

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        self._connection.send(*buffers)
        self._connection.read_done(self._length)
