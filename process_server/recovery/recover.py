"""Writing a volume at a cut to a file or device: parallel, sparse, verified, whole or not at all.

Two passes. The first finds out what lies where, allocates it (a full disk is known before much is written)
and hands out small rows sorted by pack: 32 writes from all over the disk share one chunk, which would
otherwise be decompressed 32 times. The second hands out the rest in order of the volume, and a thread that
follows behind reads back what was written and hashes it.
"""

import ctypes
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from blake3 import blake3

from farshore.errors import Failed, FarshoreError, NotFound
from farshore.units import KIB, MIB
from process_server.recovery.image import VolumeImage
from process_server.recovery.points import ChainReader
from process_server.recovery.target import DeviceTarget, FileTarget, Output
from process_server.recovery.writer import Done, Setup, Task, run, runs
from process_server.vault.changes import PackRef
from process_server.vault.commit import Rows

TASK_BYTES: Final = 32 * MIB
SMALL_BYTES: Final = 32 * KIB
"""Rows shorter than this are written in the order of packs."""
SMALL_ROWS_MAX: Final = 1_000_000
"""Small rows that are sorted at once: 48 MB. What does not fit is sorted in a further round."""
TASK_ROWS: Final = 8192
TASKS_AHEAD: Final = 3
"""Per worker: one being worked on, the next ones already there."""
READ_BACK_BYTES: Final = 4 * MIB
_ZEROS: Final = bytes(16 * MIB)
_SYNC_FILE_RANGE_WRITE: Final = 2

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

Progress = Callable[[int, int], None]
"""Called now and then with the bytes written and the bytes to write."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """A volume that was written.

    Attributes:
        name: Of the volume.
        lsn: The last record that is in it.
        bytes: Length of the volume.
        blake3: Of the whole volume, zeros included, in hexadecimal: as read back from where it was written.
    """

    name: str
    lsn: int
    bytes: int
    blake3: str


def recover_volume(
    vault_url: str,
    chain: ChainReader,
    image: VolumeImage,
    target: FileTarget | DeviceTarget,
    *,
    format: str = "raw",
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Recovered:
    """Write the volume; on return it is complete, durable and under its name, else nothing is.

    Args:
        format: ``raw``, or what ``qemu-img`` makes of it: ``qcow2``, ``vhdx``, ``vmdk``.
        workers: Processes; by default one more than there are cores.

    Raises:
        WrongKey, IntegrityError: Something in the vault is not ours, damaged or missing.
        CapacityError: There is no room for it.
        Conflict: The device is too small, or a file of that name appeared meanwhile.
        Failed: Reading back or converting failed.
    """
    made: Path | None = None
    try:
        path = target.prepare(image.size_bytes)
        # One more than cores: they wait for the disk in turns.
        count = workers if workers is not None else 1 + len(os.sched_getaffinity(0))
        setup = Setup(vault_url, chain.keys.to_bytes(), chain.machine, path, target.device)
        digest = _write(image, setup, count, progress)
        if isinstance(target, DeviceTarget) or format == "raw":
            target.commit()
        else:
            made = target.temporary.with_name(target.temporary.name + f".{format}")
            _convert(target.temporary, made, format)
            target.commit(made)
            target.discard()
    except BaseException:
        target.discard()
        if made is not None:
            with suppress(OSError):
                os.unlink(made)
        raise
    return Recovered(image.name, image.lsn, image.size_bytes, digest)


def _write(image: VolumeImage, setup: Setup, workers: int, progress: Progress) -> str:
    output = Output(setup.path, device=setup.device)
    pool = _Pool(setup, workers)
    hasher = _ReadBack(setup.path, setup.device, image.size_bytes)
    try:
        total = _Total()
        written = 0
        number = 0
        for number, (rows, _) in enumerate(_small_tasks(image, output, total)):
            written += pool.submit(_task(number, rows, image.packs))
            progress(written, total.bytes)
        written += pool.drain(lambda done: progress(written + done, total.bytes))
        starts: dict[int, int] = {}
        for rows, start in _large_tasks(image):
            number += 1
            starts[number] = start
            written += pool.submit(_task(number, rows, image.packs))
            hasher.allow(min((starts[open] for open in pool.open), default=start))
            progress(written, total.bytes)
        while pool.open:
            written += pool.one()
            hasher.allow(min((starts[open] for open in pool.open), default=image.size_bytes))
            progress(written, total.bytes)
        hasher.allow(image.size_bytes)
        pool.close()
        digest = hasher.finish()
        output.sync()
        return digest
    finally:
        hasher.stop()
        pool.kill()
        output.close()


@dataclass
class _Total:
    bytes: int = 0


def _small_tasks(image: VolumeImage, output: Output, total: _Total) -> Iterator[tuple[Rows, int]]:
    """First pass: allocate what will be written, zero the rest of a device, yield the small rows by pack."""
    held: list[Rows] = []
    count = 0
    at = 0
    for region in image.regions():
        rows = image.rows(region)
        total.bytes += int(rows["length"].sum())
        for start, end in runs(rows):
            output.zero(at, start)
            output.reserve(start, end)
            at = end
        small = rows[rows["length"] < SMALL_BYTES]
        held.append(small)
        count += len(small)
        if count > SMALL_ROWS_MAX:
            yield from _by_pack(np.concatenate(held))
            held, count = [], 0
    output.zero(at, image.size_bytes)
    if count:
        yield from _by_pack(np.concatenate(held))


def _by_pack(rows: Rows) -> Iterator[tuple[Rows, int]]:
    rows = rows[np.lexsort((rows["chunk"], rows["pack"]))]
    for begin in range(0, len(rows), TASK_ROWS):
        yield rows[begin : begin + TASK_ROWS], 0


def _large_tasks(image: VolumeImage) -> Iterator[tuple[Rows, int]]:
    """Second pass: yield the other rows in order of the volume, with the first byte of each task."""
    for region in image.regions():
        rows = image.rows(region)
        rows = rows[rows["length"] >= SMALL_BYTES]
        bounds = np.cumsum(rows["length"].astype(np.int64)) // TASK_BYTES
        for number in np.unique(bounds).tolist():
            part = rows[bounds == number]
            yield part, int(part["offset"][0])


def _task(number: int, rows: Rows, packs: list[PackRef]) -> Task:
    used, place = np.unique(rows["pack"], return_inverse=True)
    rows = rows.copy()
    rows["pack"] = place
    return Task(number, rows.tobytes(), tuple(packs[index] for index in used.tolist()))


class _Pool:
    """Worker processes and the tasks they have.

    Attributes:
        open: Numbers of tasks handed out and not yet done.
    """

    def __init__(self, setup: Setup, workers: int) -> None:
        # Not fork: a store client may have threads of its own, which a fork would leave behind holding locks.
        context = get_context("spawn")
        self.open: set[int] = set()
        self._workers: dict[Connection, tuple[SpawnProcess, set[int]]] = {}
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=run, args=(theirs, setup), daemon=True)
                process.start()
                theirs.close()
                self._workers[ours] = (process, set())
        except BaseException:
            self.kill()
            raise

    def submit(self, task: Task) -> int:
        """Hand a task out, waiting for room; return the bytes of the tasks that were done meanwhile."""
        written = 0
        while True:
            connection = min(self._workers, key=lambda one: len(self._workers[one][1]))
            if len(self._workers[connection][1]) < TASKS_AHEAD:
                break
            written += self.one()
        self.open.add(task.number)
        self._workers[connection][1].add(task.number)
        try:
            connection.send_bytes(msgspec.msgpack.encode(task))
        except OSError:
            self._receive(connection)  # says why it is gone
        return written

    def one(self) -> int:
        """Wait until some task is done; return the bytes it wrote. Raises what a worker raised."""
        ready = wait(list(self._workers))
        return sum(self._receive(connection) for connection in ready if isinstance(connection, Connection))

    def drain(self, told: Callable[[int], None]) -> int:
        """Wait until all tasks are done; return the bytes they wrote, telling in between."""
        written = 0
        while self.open:
            written += self.one()
            told(written)
        return written

    def _receive(self, connection: Connection) -> int:
        process, tasks = self._workers[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            process.join(5)
            raise Failed(
                "a recovery worker died", why=f"exit code {process.exitcode}", fix="look at the kernel's log"
            ) from None
        if isinstance(message, FarshoreError):
            raise message
        assert isinstance(message, Done), message
        tasks.discard(message.number)
        self.open.discard(message.number)
        return message.bytes

    def close(self) -> None:
        """Let the workers end: there is nothing more to do."""
        for connection, (process, _) in self._workers.items():
            connection.close()
            process.join(5)

    def kill(self) -> None:
        """End the workers, whatever they are doing."""
        for connection, (process, _) in self._workers.items():
            connection.close()
            if process.is_alive():
                process.kill()
            process.join()
        self._workers.clear()


class _ReadBack:
    """Reads back what was written, as far as it may, and hashes it: in a thread, for both release the GIL."""

    def __init__(self, path: str, device: bool, size_bytes: int) -> None:
        self._size_bytes, self._device = size_bytes, device
        self._output = Output(path, device=device)
        self._seek = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._allowed = 0
        self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._hash = blake3(max_threads=blake3.AUTO)
        self._thread = threading.Thread(target=self._run, name="read-back", daemon=True)
        self._thread.start()

    def allow(self, end: int) -> None:
        """Everything before ``end`` is written."""
        with self._changed:
            self._allowed = max(self._allowed, end)
            self._changed.notify()

    def finish(self) -> str:
        """Return the hash of all of it, in hexadecimal. Raises Failed when it cannot be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self._output.close()
        os.close(self._seek)

    def _run(self) -> None:
        try:
            at = 0
            buffer = mmap.mmap(-1, READ_BACK_BYTES)  # on a page
            while at < self._size_bytes:
                with self._changed:
                    while self._allowed <= at and not self._stopped:
                        self._changed.wait()
                    end, stopped = self._allowed, self._stopped
                if stopped:
                    return
                at = self._step(at, end, memoryview(buffer))
        except BaseException as exc:
            self._error = exc

    def _step(self, at: int, end: int, buffer: memoryview) -> int:
        start = min(self._next(at, os.SEEK_DATA), end)
        while at < start:
            step = min(len(_ZEROS), start - at)
            with memoryview(_ZEROS)[:step] as zeros:
                self._hash.update(zeros)
            at += step
        stop = min(self._next(at, os.SEEK_HOLE), end) if at < end else end
        if at < stop:
            view = buffer[: min(len(buffer), stop - at)]
            self._output.read_into(at, view)
            self._hash.update(view)
            if not self._device:
                # Writing back begins while the rest is still being made; the sync at the end finds less.
                _libc.sync_file_range(self._seek, at, len(view), _SYNC_FILE_RANGE_WRITE)
            at += len(view)
        return at

    def _next(self, at: int, what: int) -> int:
        if self._device:
            return at if what == os.SEEK_DATA else self._size_bytes
        try:
            return os.lseek(self._seek, at, what)
        except OSError:
            # ENXIO: no data from here on. Anything else: holes cannot be told, so all of it is read.
            return self._size_bytes


def _convert(source: Path, target: Path, format: str) -> None:
    """Make an image of another format and compare it with the raw one. Raises NotFound, Failed."""
    steps = (
        ["convert", "-f", "raw", "-O", format, str(source), str(target)],
        ["compare", "-f", "raw", "-F", format, str(source), str(target)],
    )
    for step in steps:
        try:
            done = subprocess.run(
                ["qemu-img", *step], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        except FileNotFoundError as exc:
            raise NotFound(
                "cannot make this format", where=format, why="there is no qemu-img", fix="install qemu-utils"
            ) from exc
        if done.returncode:
            raise Failed("cannot make this format", where=format, why=done.stderr or done.stdout)
    os.chmod(target, 0o600)
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
