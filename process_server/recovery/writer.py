"""A recovery worker: a process that reads, authenticates and writes the pieces of a volume it is told to.

Python holds one core; decrypting and decompressing want all of them. The worker keeps nothing: what it was
doing when it died is what the parent has not heard of.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from farshore import heap
from farshore.errors import Failed, FarshoreError
from farshore.units import MIB
from process_server.recovery.image import ChunkSource, read_rows
from process_server.recovery.target import Output
from process_server.vault.changes import PackRef
from process_server.vault.commit import ROW_DTYPE, Rows
from process_server.vault.keys import VaultKeys
from process_server.vault.rows import ends
from process_server.vault.store import open_store

CHUNKS_AT_ONCE: Final = 16
"""Chunks of one pack that are in memory at once: 2 MiB at the usual size, 16 MiB at the largest."""
CACHE_BYTES: Final = 32 * MIB
_PR_SET_PDEATHSIG: Final = 1


class Setup(msgspec.Struct, frozen=True):
    """What a worker needs. ``keys`` is `VaultKeys.to_bytes`: it goes through a pipe, never a disk or argv."""

    vault_url: str
    keys: bytes
    machine: bytes
    path: str
    device: bool


class Task(msgspec.Struct, frozen=True):
    """Rows to be written: `ROW_DTYPE`, their pack column counts in ``packs``."""

    number: int
    rows: bytes
    packs: tuple[PackRef, ...]


class Done(msgspec.Struct, frozen=True):
    """A task was finished: ``bytes`` of the volume were written."""

    number: int
    bytes: int


def run(connection: Connection, setup: Setup) -> None:
    """Work on tasks until the parent closes the connection. An error is sent to the parent and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal signals the whole group; the parent decides
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    heap.keep(64 * MIB)
    store = open_store(setup.vault_url)
    chunks = ChunkSource(store, VaultKeys.from_bytes(setup.keys), setup.machine, cache_bytes=CACHE_BYTES)
    with suppress(BrokenPipeError, EOFError, ConnectionResetError):
        try:
            output = Output(setup.path, device=setup.device)
            while True:
                task = msgspec.msgpack.decode(connection.recv_bytes(), type=Task)
                rows = np.frombuffer(task.rows, ROW_DTYPE)
                connection.send(Done(task.number, write_rows(output, chunks, task.packs, rows)))
        except FarshoreError as exc:
            connection.send(exc)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as exc:
            connection.send(Failed("a recovery worker failed", where=type(exc).__name__, why=str(exc)))
    os._exit(0)  # nothing to clean up, and the parent waits for us


def write_rows(output: Output, chunks: ChunkSource, packs: tuple[PackRef, ...], rows: Rows) -> int:
    """Write what ``rows`` say; return how many bytes. Raises as `read_rows` and `Output.write`."""
    written = 0
    for part in batches(rows):
        pending: list[bytes | memoryview] = []
        at = end = -1
        for offset, piece in read_rows(chunks, packs, part):
            if offset != end:
                if pending:
                    output.write(at, pending)
                pending, at = [], offset
            pending.append(piece)
            end = offset + len(piece)
            written += len(piece)
        if pending:
            output.write(at, pending)
    return written


def batches(rows: Rows) -> Iterator[Rows]:
    """Yield the rows pack by pack, each time of at most `CHUNKS_AT_ONCE` chunks."""
    order = np.lexsort((rows["chunk"], rows["pack"]))
    rows = rows[order]
    pack, chunk = rows["pack"], rows["chunk"]
    new_pack = np.concatenate(([True], pack[1:] != pack[:-1]))
    new_chunk = new_pack | np.concatenate(([True], chunk[1:] != chunk[:-1]))
    of_pack = np.flatnonzero(new_pack)
    number = np.cumsum(new_chunk)
    within: npt.NDArray[np.int64] = number - np.repeat(
        number[of_pack], np.diff(np.append(of_pack, len(rows)))
    )
    cut = new_pack | (new_chunk & (within % CHUNKS_AT_ONCE == 0))
    starts = np.flatnonzero(cut).tolist()
    for begin, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield rows[begin:stop]


def runs(rows: Rows) -> list[tuple[int, int]]:
    """Return the runs (start, end) that sorted, not overlapping ``rows`` cover."""
    if not len(rows):
        return []
    start, end = rows["offset"].astype(np.int64), ends(rows)
    first = np.flatnonzero(np.concatenate(([True], start[1:] != end[:-1])))
    last = np.concatenate((first[1:] - 1, [len(rows) - 1]))
    return list(zip(start[first].tolist(), end[last].tolist(), strict=True))
