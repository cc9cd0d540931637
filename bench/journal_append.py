"""What one record costs the thread that captures writes: `JournalWriter.append` of 32 writes of 4 KiB.

``python -m bench.journal_append [--directory DIR] [--rounds 5] [--seconds 3] [--sync-ms 10] [--json]``

The syncing thread works beside it, as in the tap. Segments are freed as if the vault kept up, so that files
are recycled; the first round allocates and is not counted. Beside it, what the bare system call and the bare
hash cost on the same machine in the same run.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from agent.journal.recovery import recover
from agent.journal.writer import JournalWriter
from bench.harness import machine, spread
from farshore.clock import SystemClock
from farshore.hrl.batch import RECORD, WRITE
from farshore.units import GIB, KIB, MIB

RECORDS = 32
RECORD_BYTES = 4 * KIB
SEGMENT_BYTES = 64 * MIB
BUFFERS = 64


def append_round(writer: JournalWriter, seconds: float, sync_s: float) -> tuple[float, float, float]:
    """Return CPU and wall microseconds per record of the appending thread, and its longest call in ms."""
    payloads = [os.urandom(RECORDS * RECORD_BYTES) for _ in range(BUFFERS)]
    table = b"".join(
        RECORD.pack(index * RECORD_BYTES, RECORD_BYTES, WRITE, 0, 0, RECORD_BYTES) for index in range(RECORDS)
    )
    stop = threading.Event()

    def keep_durable() -> None:
        while not stop.wait(sync_s):
            durable = writer.sync()
            writer.free(durable, durable)
            writer.prepare()

    syncing = threading.Thread(target=keep_durable)
    writer.prepare()
    syncing.start()
    count, longest = 0, 0.0
    cpu, begun = time.thread_time(), time.perf_counter()
    before = begun
    while before - begun < seconds:
        writer.append(count, RECORDS, table, payloads[count % BUFFERS])
        count += 1
        now = time.perf_counter()
        longest = max(longest, now - before)
        before = now
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - begun
    stop.set()
    syncing.join()
    records = count * RECORDS
    return cpu / records * 1e6, wall / records * 1e6, longest * 1e3


def per_record(call: Callable[[int], object], times: int = 2000) -> float:
    """CPU microseconds per record of a call that handles one batch."""
    begun = time.thread_time()
    for index in range(times):
        call(index)
    return (time.thread_time() - begun) / (times * RECORDS) * 1e6


def bare(directory: Path) -> tuple[float, float]:
    """CPU microseconds per record: pwritev over pages that exist, and BLAKE3 of the payload."""
    payloads = [os.urandom(RECORDS * RECORD_BYTES) for _ in range(BUFFERS)]
    path = directory / "bare"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        size = len(payloads[0])
        slots = SEGMENT_BYTES // size

        def write(index: int) -> None:
            os.pwritev(fd, [payloads[index % BUFFERS]], index % slots * size)

        per_record(write, slots)
        return per_record(write), per_record(lambda index: blake3(payloads[index % BUFFERS]).digest(16))
    finally:
        os.close(fd)
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, help="where the journal lies (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--sync-ms", type=float, default=10.0)
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    columns: tuple[list[float], ...] = ([], [], [], [], [])
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        journal = Path(folder) / "journal"
        machine_id, volume_id = bytes(16), bytes(range(16))
        writer = JournalWriter.open(
            journal,
            machine=machine_id,
            volume=volume_id,
            volume_bytes=GIB,
            sector_bytes=512,
            segment_bytes=SEGMENT_BYTES,
            quota_bytes=16 * GIB,
            recovered=recover(journal, machine_id, volume_id),
            clock=SystemClock(),
        )
        for index in range(options.rounds + 1):
            figures = append_round(writer, options.seconds, options.sync_ms / 1e3)
            write, digest = bare(Path(folder))
            if index:
                for values, value in zip(columns, (*figures, write, digest), strict=True):
                    values.append(value)
        writer.close()
    where = machine()
    names = (
        "append_cpu_us_per_record",
        "append_wall_us_per_record",
        "longest_append_ms",
        "bare_pwritev_us_per_record",
        "bare_blake3_us_per_record",
    )
    result = dict(zip(names, columns, strict=True))
    if options.as_json:
        print(json.dumps({"machine": where, **result}))
        return
    print(f"{where['cpu']}, {where['cores']} cores, kernel {where['kernel']}, commit {where['commit']}")
    print(
        f"batches of {RECORDS} x {RECORD_BYTES} bytes, sync every {options.sync_ms} ms; median (min … max, n)"
    )
    for name, values in result.items():
        print(f"{name:30} {spread(values, 2)}")


if __name__ == "__main__":
    main()
