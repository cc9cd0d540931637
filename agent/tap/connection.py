"""One NBD connection of a volume: bytes in, batches out; replies from any thread."""

import asyncio
import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from agent.tap.batch import Bytes
from agent.tap.parse import RUN_MIN, write_run
from agent.tap.volume import Volume
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
_IOV_MAX: Final = 64

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


def describe(volume: Volume) -> handshake.ExportInfo:
    """What clients are told of a volume."""
    return handshake.ExportInfo(volume.size_bytes, _FLAGS, SECTOR_BYTES, 4 * KIB, codec.DATA_BYTES_MAX)


class Outbox:
    """Sends from any thread without waiting; what the socket does not take is sent by the loop's thread.

    Attributes:
        bytes: Not taken yet.
        broken: The client is gone.
    """

    def __init__(self, peer: socket.socket, stuck: Callable[[], None]) -> None:
        """``stuck`` is called, in the sending thread, when there is something to send later, or broken."""
        self.bytes = 0
        self.broken = False
        self._peer, self._stuck = peer, stuck
        self._queue: deque[memoryview] = deque()
        self._lock = threading.Lock()

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        """Send ``buffers`` in order; they must not change any more."""
        with self._lock:
            if self.broken:
                return
            waiting = bool(self._queue)
            for buffer in buffers:
                self._queue.append(memoryview(buffer).cast("B"))
                self.bytes += len(buffer)
            if waiting:
                return
            self._push()
            if not self._queue and not self.broken:
                return
        self._stuck()

    def push(self) -> bool:
        """Send more; True when nothing is left."""
        with self._lock:
            self._push()
            return not self._queue

    def close(self) -> None:
        with self._lock:
            self.broken = True
            self._queue.clear()
            self.bytes = 0

    def _push(self) -> None:
        while self._queue:
            try:
                sent = self._peer.sendmsg([self._queue[n] for n in range(min(len(self._queue), _IOV_MAX))])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.broken = True
                self._queue.clear()
                self.bytes = 0
                return
            self.bytes -= sent
            while sent:
                first = self._queue[0]
                if sent < len(first):
                    self._queue[0] = first[sent:]
                    break
                sent -= len(first)
                self._queue.popleft()


class Connection:
    """One client. Runs in the loop's thread, except `send`."""

    def __init__(
        self,
        peer: socket.socket,
        find: Callable[[str], Volume | None],
        names: Callable[[], list[str]],
        closed: Callable[["Connection"], None],
    ) -> None:
        """``closed`` is called once, when the connection is gone."""
        self._peer, self._find, self._closed = peer, find, closed
        self._loop = asyncio.get_running_loop()
        self._log = get_logger(component="nbd")
        self.volume: Volume | None = None
        self._structured = self._allocation = False
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._large: Bytes | None = None
        self._large_at = 0
        self._large_head: codec.Request | None = None
        self._expected = 0  # length of the next write, if it is like the last
        self._header = memoryview(bytearray(codec.REQUEST.size))
        self._reads = self._read_bytes = 0
        self._paused = False
        self._open = True
        self._goodbye = False
        self._lock = threading.Lock()
        self._outbox = Outbox(peer, self._stuck)
        self._handshake: handshake.ServerHandshake | None = handshake.ServerHandshake(
            lambda name: describe(found) if (found := find(name)) else None, names
        )
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._timed_out)
        peer.setblocking(False)
        self._loop.add_reader(peer.fileno(), self._readable)
        self.send(self._handshake.greeting())

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        """Send to the client, from any thread, without waiting."""
        self._outbox.send(*buffers)

    def close(self) -> None:
        """Drop the client. What it was not answered yet never will be."""
        if not self._open:
            return
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._peer.fileno())
        self._loop.remove_writer(self._peer.fileno())
        self._outbox.close()
        self._peer.close()
        self._closed(self)

    def resume(self) -> None:
        """There may be room again for what this client sends."""
        if self._open and self._paused and not self._must_pause():
            self._paused = False
            self._continue()  # first: the buffer may be full, and then nothing can be received
            if self._may_read():
                self._loop.add_reader(self._peer.fileno(), self._readable)

    def _may_read(self) -> bool:
        return self._open and not self._paused and not self._goodbye

    def stop_reading(self) -> None:
        """Take in no more requests; replies still go out."""
        if self._open:
            self._goodbye = True
            self._loop.remove_reader(self._peer.fileno())

    # -- in and out ----------------------------------------------------------------------------------------

    def _timed_out(self) -> None:
        self._timer = None
        if self.volume is None:
            self.close()

    def _stuck(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._want_to_send)

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
        if self._outbox.broken:
            self.close()
        else:
            self.resume()

    def _must_pause(self) -> bool:
        volume = self.volume
        return self._outbox.bytes > SEND_BYTES_MAX or (
            volume is not None
            and (volume.full or self._reads >= READS_MAX or self._read_bytes > READS_BYTES_MAX // 2)
        )

    def _pause_if_full(self) -> bool:
        if self._paused:
            return True
        if not self._must_pause():
            return False
        self._paused = True
        self._loop.remove_reader(self._peer.fileno())
        if self.volume is not None and self.volume.full:
            self.volume.want_relief()
        return True

    def _readable(self) -> None:
        try:
            if self._large is not None:
                self._receive_large(self._large)
            elif self._expected and self._start == self._end:
                self._receive_expected()
            else:
                got = self._peer.recv_into(self._view[self._end :])
                self._end += got
                if not got:
                    self.close()
                    return
                self._continue()
        except (BlockingIOError, InterruptedError):
            return
        except NbdError as error:
            self._log.warning("nbd_client_refused", error=str(error))
            self.close()
        except OSError:
            self.close()

    def _continue(self) -> None:
        """Parse what is there, then make room for more."""
        if not self._open:
            return
        try:
            if self._handshake is not None and not self._shake_hands():
                return
            self._parse()
        except NbdError as error:
            self._log.warning("nbd_client_refused", error=str(error))
            self.close()
            return
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and len(self._buffer) - self._end < RECEIVE_BYTES // 2:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left

    def _shake_hands(self) -> bool:
        machine = self._handshake
        assert machine is not None
        out = machine.feed(self._view[self._start : self._end])
        self._start = self._end = 0
        if out:
            self.send(out)
        if machine.closed:
            self.close()
            return False
        if machine.agreed is None:
            return False
        self._handshake = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.volume = self._find(machine.agreed.name)
        if self.volume is None:  # taken away between two packets
            self.close()
            return False
        self._structured, self._allocation = machine.agreed.structured, machine.agreed.allocation
        unread = machine.unread()
        self._view[: len(unread)] = unread
        self._end = len(unread)
        return True

    # -- requests ------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        volume = self.volume
        assert volume is not None
        single: list[codec.Request] = []
        starts: list[int] = []
        while self._end - self._start >= codec.REQUEST.size and self._open and not self._goodbye:
            if self._pause_if_full():
                break
            if not single and self._end - self._start > RUN_MIN * (codec.REQUEST.size + SECTOR_BYTES):
                run = write_run(self._buffer, self._start, self._end, volume.size_bytes, SECTOR_BYTES)
                if run is not None:
                    self._start = run.end
                    lengths = np.full(len(run.offsets), run.length, np.int64)
                    volume.write(run.offsets, lengths, run.payload, self, run.reply)
                    continue
            request = codec.decode_request(self._buffer, self._start)
            if request.type == codec.WRITE:
                if self._end - self._start < codec.REQUEST.size + request.length:
                    if request.length >= LARGE_BYTES:
                        self._write_together(single, starts)
                        self._begin_large(request)
                    break
                good = self._check(request)
                if good and not request.flags and request.length < LARGE_BYTES:
                    single.append(request)
                    starts.append(self._start + codec.REQUEST.size)
                    self._start += codec.REQUEST.size + request.length
                    continue
                self._write_together(single, starts)
                first = self._start + codec.REQUEST.size
                self._start = first + request.length
                if good:
                    payload = np.frombuffer(self._buffer, np.uint8, request.length, first).copy()
                    self._write_one(request, payload)
                continue
            self._write_together(single, starts)
            self._start += codec.REQUEST.size
            self._other(request)
        self._write_together(single, starts)

    def _write_together(self, single: list[codec.Request], starts: list[int]) -> None:
        """Hand on the small writes gathered so far, as one batch."""
        volume = self.volume
        if not single or volume is None:
            return
        lengths = np.array([request.length for request in single], np.int64)
        payload = np.empty(int(lengths.sum()), np.uint8)
        target, at = payload.data, 0
        for request, start in zip(single, starts, strict=True):
            target[at : at + request.length] = self._view[start : start + request.length]
            at += request.length
        offsets = np.array([request.offset for request in single], np.int64)
        reply = b"".join([codec.simple_reply(request.cookie) for request in single])
        volume.write(offsets, lengths, payload, self, reply)
        single.clear()
        starts.clear()

    def _write_one(self, request: codec.Request, payload: Bytes) -> None:
        volume = self.volume
        assert volume is not None
        offsets, lengths = np.array([request.offset], np.int64), np.array([request.length], np.int64)
        fua = bool(request.flags & codec.FUA)
        volume.write(offsets, lengths, payload, self, codec.simple_reply(request.cookie), fua=fua)

    def _begin_large(self, request: codec.Request) -> None:
        self._large = np.empty(request.length, np.uint8)
        first = self._start + codec.REQUEST.size
        self._large_at = self._end - first
        self._large.data[: self._large_at] = self._view[first : self._end]
        self._start = self._end = 0
        self._large_head = request

    def _receive_large(self, payload: Bytes) -> None:
        """Receive what is missing of one long write, straight into its own memory."""
        while self._large_at < len(payload):
            got = self._peer.recv_into(payload.data[self._large_at :])
            if not got:
                self.close()
                return
            self._large_at += got
        request = self._large_head
        assert request is not None
        self._large = self._large_head = None
        self._expected = request.length
        if self._check(request):
            self._write_one(request, payload)
        self._pause_if_full()

    def _receive_expected(self) -> None:
        """Guess that another write of the same length follows, and receive it where it is to stay."""
        payload = np.empty(self._expected, np.uint8)
        got, _, _, _ = self._peer.recvmsg_into([self._header, payload.data])
        if not got:
            self.close()
            return
        head = codec.REQUEST.size
        request = codec.decode_request(self._header) if got >= head else None
        if request is not None and request.type == codec.WRITE and request.length == self._expected:
            self._large, self._large_at, self._large_head = payload, got - head, request
            self._receive_large(payload)
            return
        self._expected = 0
        if got > len(self._buffer):  # the guess was longer than the buffer, and wrong
            self._buffer = bytearray(got + RECEIVE_BYTES)
            self._view = memoryview(self._buffer)
        self._view[: min(got, head)] = self._header[: min(got, head)]
        if got > head:
            self._view[head:got] = payload.data[: got - head]
        self._start, self._end = 0, got
        self._continue()

    def _check(self, request: codec.Request) -> bool:
        """Whether a request makes sense; answers it when it does not."""
        volume = self.volume
        assert volume is not None
        error = 0
        if request.type not in _ALLOWED or request.flags & ~_ALLOWED[request.type]:
            error = codec.EINVAL
        elif request.type == codec.READ and request.length > codec.DATA_BYTES_MAX:
            error = codec.EOVERFLOW
        elif request.type == codec.BLOCK_STATUS and not self._allocation:
            error = codec.EINVAL
        else:
            error = codec.range_error(request, volume.size_bytes, SECTOR_BYTES)
        if not error:
            return True
        if self._structured and request.type in (codec.READ, codec.BLOCK_STATUS):
            self.send(codec.error_chunk(request.cookie, error))
        else:
            self.send(codec.simple_reply(request.cookie, error))
        return False

    def _other(self, request: codec.Request) -> None:
        volume = self.volume
        assert volume is not None
        if request.type == codec.DISC:
            self._goodbye = True
            # Everything it sent before was taken in; what is under way finishes without it.
            self.close()
            return
        if not self._check(request):
            return
        reply = codec.simple_reply(request.cookie)
        match request.type:
            case codec.READ:
                self._read(volume, request)
            case codec.FLUSH:
                volume.flush(self, reply)
            case codec.TRIM:
                fua = bool(request.flags & codec.FUA)
                volume.trim(request.offset, request.length, self, reply, fua=fua)
            case codec.WRITE_ZEROES:
                fua = bool(request.flags & codec.FUA)
                volume.zero(request.offset, request.length, self, reply, fua=fua)
            case codec.BLOCK_STATUS:
                volume.extents(self, request.cookie, request.offset, request.length, handshake.ALLOCATION_ID)

    def _read(self, volume: Volume, request: codec.Request) -> None:
        with self._lock:
            self._reads += 1
            self._read_bytes += request.length
        answer = _ReadAnswer(self, request.length)
        volume.read(answer, request.cookie, request.offset, request.length, structured=self._structured)

    def read_done(self, length: int) -> None:
        """From a read thread: one read was answered."""
        with self._lock:
            self._reads -= 1
            self._read_bytes -= length
        if self._paused:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.resume)


class _ReadAnswer:
    """Counts a read as done when it is answered."""

    __slots__ = ("_connection", "_length")

    def __init__(self, connection: Connection, length: int) -> None:
        self._connection, self._length = connection, length

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        self._connection.send(*buffers)
        self._connection.read_done(self._length)
