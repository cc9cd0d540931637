"""A process that writes stamped blocks to an NBD export and keeps the ledger outside it.

Run as ``python -m farshore.workload``. One connection, writes in the order of their numbers, so the order in
which the export logs them is that order; no two writes in flight touch the same block, so sending unanswered
ones again after a lost connection changes nothing. It reconnects for as long as it runs.
"""

import argparse
import asyncio
import mmap
import os
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from farshore.errors import NotFound, Unreachable
from farshore.nbd.client import NbdClient, connect, parse_uri
from farshore.nbd.codec import RequestError
from farshore.stamps import Workload

_HEAD: Final = struct.Struct("<8sQQQQQQ")
_MAGIC: Final = b"FARLEDGR"
_TIMES_AT: Final = 4096


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What the writer knows: ``sent`` ≥ ``acked`` ≥ ``flushed``, each the highest number of its kind.

    ``errors`` counts connections given up because a request was answered with an error, ``reconnects``
    attempts that found nobody or lost the connection.
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
        """Open for reading, or with ``workload`` make a new one (sparse), or begin one anew.

        One that is begun anew is not made empty first: somebody may be reading it, and a look at a page
        beyond the end of a file is a SIGBUS.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | (os.O_CREAT if workload else 0), 0o600)
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


class Writer:
    """Sends numbered writes at a rate, a few in flight, until stopped."""

    def __init__(
        self, uri: str, workload: Workload, ledger: Ledger, *, rate: float, depth: int, flush_s: float
    ) -> None:
        self._address, self._export = parse_uri(uri)
        self._workload, self._ledger = workload, ledger
        self._rate, self._depth, self._flush_s = rate, depth, flush_s
        self._sent = self._acked = self._flushed = self._errors = self._reconnects = 0
        self._in_flight: dict[int, int] = {}
        """Offset of each write that was sent and not answered, in the order of the numbers."""
        self._answered: set[int] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = False

    async def run(self, seconds: float) -> None:
        """Write for ``seconds`` (0: until ``stopping``), wait for every answer, and flush."""
        end = time.monotonic() + seconds if seconds else float("inf")
        while True:
            try:
                async with connect(self._address, self._export) as client:
                    await self._stream(client, end)
                    return
            except* RequestError:
                self._errors += 1
            except* (Unreachable, NotFound):
                self._reconnects += 1
            self._record()
            await asyncio.sleep(0.05)

    async def _stream(self, client: NbdClient, end: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for seq in list(self._in_flight):
                tasks.create_task(self._write(client, seq))
            flusher = tasks.create_task(self._flush_now_and_then(client))
            started, base = time.monotonic(), self._sent
            while not self.stopping and (now := time.monotonic()) < end:
                for seq in self._next(int(base + (now - started) * self._rate) - self._sent):
                    tasks.create_task(self._write(client, seq))
                self._record()
                await asyncio.sleep(0.001)
            await self._idle.wait()
            flusher.cancel()
        await self._flush(client)

    def _next(self, due: int) -> list[int]:
        """Number the writes that are due, as far as depth and blocks in flight allow."""
        seqs: list[int] = []
        if due <= 0:
            return seqs
        busy = set(self._in_flight.values())
        while due > len(seqs) and len(self._in_flight) < self._depth:
            offset = self._workload.offset(self._sent + 1)
            if offset in busy:
                break
            self._sent += 1
            busy.add(offset)
            self._in_flight[self._sent] = offset
            seqs.append(self._sent)
            self._idle.clear()
        return seqs

    async def _write(self, client: NbdClient, seq: int) -> None:
        await client.write(self._in_flight[seq], self._workload.block(seq))
        self._answered.add(seq)
        del self._in_flight[seq]
        first = self._acked + 1
        while self._acked + 1 in self._answered:
            self._acked += 1
            self._answered.discard(self._acked)
        if not self._in_flight:
            self._idle.set()
        if self._acked >= first:
            self._ledger.record_acks(first, self._acked - first + 1, time.time_ns())

    async def _flush_now_and_then(self, client: NbdClient) -> None:
        while True:
            await asyncio.sleep(self._flush_s)
            await self._flush(client)

    async def _flush(self, client: NbdClient) -> None:
        acked = self._acked
        await client.flush()
        self._flushed = max(self._flushed, acked)
        self._record()

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
    writer = Writer(
        options.uri, workload, ledger, rate=options.rate, depth=options.depth, flush_s=options.flush_seconds
    )

    def stop(signum: int, frame: object) -> None:
        writer.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    uvloop.run(writer.run(options.seconds))
    ledger.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
