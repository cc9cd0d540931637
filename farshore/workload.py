"""A process that writes stamped blocks to an NBD export and keeps the ledger outside it.

Run as ``python -m farshore.workload``. One connection, writes in the order of their numbers, so the order in
which the export logs them is that order; no two writes in flight touch the same block, so sending unanswered
ones again after a lost connection changes nothing. It reconnects for as long as it runs.
"""

import argparse
import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
import urllib.parse
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from farshore.stamps import BLOCK_BYTES, Workload

_HEAD: Final = struct.Struct("<8sQQQQQQ")
_MAGIC: Final = b"FARLEDGR"
_TIMES_AT: Final = 4096

_OPTION_MAGIC: Final = 0x49484156454F5054
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_WRITE: Final = 1
_DISC: Final = 2
_FLUSH: Final = 3
_FLUSH_COOKIE: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What the writer knows: ``sent`` ≥ ``acked`` ≥ ``flushed``, each the highest number of its kind.

    ``errors`` counts writes and flushes that were answered with an error, ``reconnects`` lost connections.
    """

    sent: int
    acked: int
    flushed: int
    errors: int
    reconnects: int


class Ledger:
    """The writer's memory, in a file, so that it survives everything under test.

    Layout: 4,096 bytes of header, then for each write the time of its answer, u64, ns since 1970.
    """

    def __init__(self, path: Path, workload: Workload | None = None, writes_max: int = 1 << 27) -> None:
        """Open for reading, or with ``workload`` make a new one (sparse)."""
        self.path = path
        flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if workload else 0)
        self._fd = os.open(path, flags, 0o600)
        if workload:
            os.truncate(self._fd, _TIMES_AT + 8 * writes_max)
        self._map = mmap.mmap(self._fd, _TIMES_AT)
        if workload:
            self._workload = workload
            self.record(LedgerState(0, 0, 0, 0, 0))

    def record(self, state: LedgerState) -> None:
        """Write the counters; one writer, and a reader sees each field whole."""
        _HEAD.pack_into(
            self._map, 0, _MAGIC, self._workload.seed, state.sent, state.acked, state.flushed, state.errors,
            state.reconnects,
        )  # fmt: skip

    def record_acks(self, first_seq: int, count: int, time_ns: int) -> None:
        """Note when writes ``first_seq`` … were answered."""
        os.pwrite(self._fd, struct.pack("<Q", time_ns) * count, _TIMES_AT + 8 * (first_seq - 1))

    def state(self) -> LedgerState:
        magic, _, *counters = _HEAD.unpack_from(self._map)
        assert magic == _MAGIC
        return LedgerState(*counters)

    def ack_times_ns(self) -> list[int]:
        """Time of the answer of each acknowledged write, the first at index 0."""
        raw = os.pread(self._fd, 8 * self.state().acked, _TIMES_AT)
        return list(struct.unpack(f"<{len(raw) // 8}Q", raw))

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


def connect(uri: str) -> socket.socket:
    """Open ``nbd+unix:///EXPORT?socket=PATH`` and finish the handshake.

    Raises:
        OSError: Nobody listens, or it does not speak fixed newstyle with this export.
    """
    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.parse_qs(parts.query)["socket"][0]
    name = urllib.parse.unquote(parts.path.removeprefix("/")).encode()
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(10)
        sock.connect(path)
        greeting = _receive(sock, 18)
        if greeting[:16] != b"NBDMAGICIHAVEOPT":
            raise OSError("not an NBD server")
        # Fixed newstyle, no zeroes; NBD_OPT_EXPORT_NAME ends the negotiation with size and flags.
        sock.sendall(struct.pack(">IQII", 3, _OPTION_MAGIC, 1, len(name)) + name)
        _receive(sock, 10)
    except BaseException:
        sock.close()
        raise
    sock.settimeout(None)
    return sock


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionResetError("closed during the handshake")
        data += part
    return data


class Writer:
    """Sends numbered writes at a rate, a few in flight, until stopped."""

    def __init__(
        self, uri: str, workload: Workload, ledger: Ledger, rate: float, depth: int, flush_s: float
    ) -> None:
        self._uri, self._workload, self._ledger = uri, workload, ledger
        self._rate, self._depth, self._flush_s = rate, depth, flush_s
        self._sent = self._acked = self._flushed = self._errors = self._reconnects = 0
        self._in_flight: deque[tuple[int, int]] = deque()
        self._answered: set[int] = set()
        self._flushing: int | None = None
        self.stopping = False

    def run(self, seconds: float) -> None:
        """Write for ``seconds`` (0: until ``stopping``), then wait for every answer and flush once more."""
        end = time.monotonic() + seconds if seconds else float("inf")
        while not self._finished(end):
            try:
                sock = connect(self._uri)
            except OSError:
                time.sleep(0.05)
                continue
            try:
                self._stream(sock, end)
            except OSError:
                self._reconnects += 1
            finally:
                sock.close()
        self._record()

    def _finished(self, end: float) -> bool:
        over = self.stopping or time.monotonic() >= end
        return over and self._acked == self._sent and self._flushed == self._acked

    def _stream(self, sock: socket.socket, end: float) -> None:
        self._flushing = None
        again = b"".join(self._request(seq) for seq, _ in self._in_flight if seq not in self._answered)
        sock.sendall(again)
        started, base = time.monotonic(), self._sent
        flush_at = started + self._flush_s
        unread = b""
        while not self._finished(end):
            now = time.monotonic()
            over = self.stopping or now >= end
            due = 0 if over else int(base + (now - started) * self._rate) - self._sent
            sock.sendall(self._next_writes(max(0, due)))
            if self._flushing is None and (now >= flush_at or (over and self._acked == self._sent)):
                sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _FLUSH, _FLUSH_COOKIE, 0, 0))
                self._flushing = self._acked
                flush_at = now + self._flush_s
            self._record()
            if select.select([sock], [], [], 0.001)[0]:
                part = sock.recv(1 << 16)
                if not part:
                    raise ConnectionResetError("the export went away")
                unread = self._take_replies(unread + part)
        with contextlib.suppress(OSError):
            sock.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISC, 0, 0, 0))

    def _next_writes(self, due: int) -> bytes:
        requests = []
        busy = {offset for _, offset in self._in_flight}
        while due > 0 and len(self._in_flight) < self._depth:
            seq = self._sent + 1
            offset = self._workload.offset(seq)
            if offset in busy:
                break
            busy.add(offset)
            self._in_flight.append((seq, offset))
            self._sent = seq
            requests.append(self._request(seq))
            due -= 1
        return b"".join(requests)

    def _request(self, seq: int) -> bytes:
        offset = self._workload.offset(seq)
        head = _REQUEST.pack(_REQUEST_MAGIC, 0, _WRITE, seq, offset, BLOCK_BYTES)
        return head + self._workload.block(seq)

    def _take_replies(self, unread: bytes) -> bytes:
        whole = len(unread) - len(unread) % _REPLY.size
        for magic, error, cookie in _REPLY.iter_unpack(unread[:whole]):
            if magic != _REPLY_MAGIC:
                raise ConnectionResetError("not a simple reply")
            if error:
                self._errors += 1
                raise ConnectionResetError(f"answered with error {error}")
            if cookie == _FLUSH_COOKIE:
                assert self._flushing is not None
                self._flushed, self._flushing = max(self._flushed, self._flushing), None
            else:
                self._answered.add(cookie)
        first = self._acked + 1
        while self._in_flight and self._in_flight[0][0] in self._answered:
            self._acked = self._in_flight.popleft()[0]
            self._answered.discard(self._acked)
        if self._acked >= first:
            self._ledger.record_acks(first, self._acked - first + 1, time.time_ns())
        return unread[whole:]

    def _record(self) -> None:
        state = LedgerState(self._sent, self._acked, self._flushed, self._errors, self._reconnects)
        self._ledger.record(state)


def main() -> int:
    """Write until ``--seconds`` are over or SIGTERM; 0 when every write sent was answered and flushed."""
    parser = argparse.ArgumentParser(prog="farshore.workload", description=__doc__)
    parser.add_argument("uri")
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first-block", type=int, default=0)
    parser.add_argument("--block-count", type=int, required=True)
    parser.add_argument("--rate", type=float, default=1000, help="writes per second")
    parser.add_argument("--depth", type=int, default=32, help="writes in flight")
    parser.add_argument("--flush-seconds", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=0)
    options = parser.parse_args()
    workload = Workload(options.seed, options.first_block, options.block_count)
    ledger = Ledger(options.ledger, workload)
    writer = Writer(options.uri, workload, ledger, options.rate, options.depth, options.flush_seconds)

    def stop(signum: int, frame: object) -> None:
        writer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    writer.run(options.seconds)
    ledger.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
