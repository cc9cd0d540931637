"""The order of a volume's steps, seen from the system calls: what must be durable before what.

`Watched` is told of every write and sync of journal, mark, dirty map and disk, and of every reply and counter
that is made known, and says no at the first that comes too early. No power has to fail for that.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.journal import segments
from agent.journal.dirty import DirtyMap
from agent.journal.mark import decode_slot
from agent.journal.state import StatePageWriter
from agent.journal.writer import JournalWriter
from agent.tap.lastrun import Place
from agent.tap.opening import open_volume, open_writer
from agent.tap.vectored import Ints, VectoredWriter
from agent.tap.volume import Volume
from agent.volumes import VolumeConfig
from farshore.clock import SystemClock
from farshore.errors import Conflict
from farshore.hrl.batch import HEAD, RECORD, WRITE
from farshore.nbd import codec
from farshore.units import KIB, MIB

BLOCK = 4 * KIB
SIZE = 8 * MIB
MACHINE = b"M" * 16


class Watched:
    """Knows what is durable, and keeps what came too early in ``wrong``. Write ``n`` goes to block n - 1."""

    def __init__(self, folder: Path, disk: Path) -> None:
        self.folder, self.disk = folder, disk
        self.wrong: list[str] = []
        self.appended = 0
        self.written: dict[int, list[int]] = {}  # inode of a segment: LSNs in it
        self.unsynced: set[int] = set()  # LSNs
        self.on_disk: set[int] = set()
        self.flushed: set[int] = set()
        self.mark = self.durable_mark = 0
        self.vaulted = self.freed = self.passed = 0
        self.lock = threading.RLock()
        self.block_sync: threading.Event | None = None

    def must(self, holds: bool, what: str) -> None:
        if not holds and len(self.wrong) < 5:
            self.wrong.append(what)

    @property
    def captured(self) -> int:
        return min(self.unsynced, default=self.appended + 1) - 1

    @property
    def stable(self) -> int:
        return next(lsn for lsn in range(len(self.flushed) + 1) if lsn + 1 not in self.flushed)

    def wrote(self, fd: int, data: bytes, at: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.name.startswith("seg-") and data[:4] == b"HRLB":
            _, count, first_lsn, *_ = HEAD.unpack_from(data)
            lsns = range(first_lsn, first_lsn + count)
            self.written.setdefault(os.fstat(fd).st_ino, []).extend(lsns)
            self.unsynced.update(lsns)
            self.appended = max([self.appended, *lsns])
        elif path.name == "mark" and (mark := decode_slot(data)):
            self.must(
                mark.stable_lsn <= self.stable, f"a mark at {mark.stable_lsn}, the disk is at {self.stable}"
            )
            self.must(mark.durable_lsn <= self.captured, f"a mark vouches for {mark.durable_lsn}")
            self.mark = mark.stable_lsn

    def synced(self, fd: int, call: Callable[[int], None]) -> None:
        path, inode = Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_ino
        with self.lock:
            journal, disk, mark = set(self.written.get(inode, ())), set(self.on_disk), self.mark
        if self.block_sync is not None and path.name.startswith("seg-"):
            self.block_sync.wait(60)
        if path == self.disk:
            time.sleep(0.004)  # what is written meanwhile is not in this sync
        call(fd)
        with self.lock:
            self.unsynced -= journal
            if path == self.disk:
                self.flushed |= disk
            elif path.name == "mark":
                self.durable_mark = mark

    def to_disk(self, offsets: Iterable[int], lengths: Iterable[int]) -> None:
        dirty = DirtyMap.open(self.folder / "dirty")
        for offset, length in zip(offsets, lengths, strict=True):
            for lsn in range(offset // BLOCK + 1, (offset + length) // BLOCK + 1):
                logged = lsn <= self.captured
                self.must(logged or dirty.is_dirty(offset, length), f"write {lsn} went to the disk unseen")
                self.passed += not logged
                self.on_disk.add(lsn)
        dirty.close()

    def gone(self, path: Path) -> None:
        last = max(self.written.pop(path.stat().st_ino, [0]))
        self.must(last <= self.durable_mark, f"freed up to {last}, the stable mark is {self.durable_mark}")
        self.must(last <= self.vaulted, f"freed up to {last}, vaulted is {self.vaulted}")
        self.freed += 1

    def told(self, **counters: Any) -> None:
        durable = counters.get("durable_lsn", 0)
        self.must(durable <= self.captured, f"{durable} was called durable, and is so up to {self.captured}")
        stable = counters.get("stable_lsn", 0)
        self.must(stable <= self.durable_mark, f"{stable} was called stable, the mark is {self.durable_mark}")


def w(number: int) -> bytes:
    """The reply to write ``number``."""
    return codec.simple_reply(2 * number, 0)


def f(number: int) -> bytes:
    """The reply to a FLUSH after write ``number``."""
    return codec.simple_reply(2 * number + 1, 0)


class Client:
    """Holds each reply against what it promises."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.replies: set[bytes] = set()

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        reply = b"".join(buffers)
        _, error, cookie = codec.SIMPLE_REPLY.unpack(reply)
        number = cookie // 2
        with self.watched.lock:
            self.watched.must(not error, f"error {error} for {number}")
            if cookie % 2:
                there = set(range(1, number + 1)) <= self.watched.flushed
                self.watched.must(there, f"FLUSH after {number} was answered too early")
            else:
                known = self.watched.appended >= number or number in self.watched.on_disk
                self.watched.must(known, f"write {number} was answered before it was anywhere")
        self.replies.add(reply)

    async def has(self, reply: bytes, seconds: float = 60.0) -> None:
        await until(lambda: reply in self.replies, seconds)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        await asyncio.sleep(0.002)


def watch(monkeypatch: pytest.MonkeyPatch, watched: Watched) -> None:
    fdatasync, fsync, release, pwritev = os.fdatasync, os.fsync, segments.release, os.pwritev
    to_disk, told = VectoredWriter.write, StatePageWriter.update

    def noted_pwritev(fd: int, buffers: list[bytes], at: int) -> int:
        with watched.lock:
            done = pwritev(fd, buffers, at)
            watched.wrote(fd, b"".join(bytes(buffer) for buffer in buffers), at)
        return done

    def noted_release(directory: Path, path: Path, *, keep: bool) -> None:
        with watched.lock:
            watched.gone(path)
            release(directory, path, keep=keep)

    def noted_to_disk(
        self: VectoredWriter, fd: int, offsets: Ints, lengths: Ints, addresses: Ints, *rest: Any, **named: Any
    ) -> None:
        with watched.lock:
            watched.to_disk(offsets.tolist(), lengths.tolist())
            to_disk(self, fd, offsets, lengths, addresses, *rest, **named)

    def noted_told(self: StatePageWriter, **counters: Any) -> None:
        with watched.lock:
            watched.told(**counters)
        told(self, **counters)

    monkeypatch.setattr(os, "fdatasync", lambda fd: watched.synced(fd, fdatasync))
    monkeypatch.setattr(os, "fsync", lambda fd: watched.synced(fd, fsync))
    monkeypatch.setattr(os, "pwritev", noted_pwritev)
    monkeypatch.setattr(segments, "release", noted_release)
    monkeypatch.setattr(VectoredWriter, "write", noted_to_disk)
    monkeypatch.setattr(StatePageWriter, "update", noted_told)


def made(tmp_path: Path, **settings: Any) -> tuple[Place, VolumeConfig]:
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, SIZE)
    values: dict[str, Any] = {"segment_bytes": 64 * KIB, "quota_bytes": 4 * MIB} | settings
    config = VolumeConfig(id="33" * 16, name="disk", disk=str(disk), **values)
    return Place(tmp_path / "journal", tmp_path / "state", MACHINE), config


@asynccontextmanager
async def served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[tuple[Volume, Watched, Client]]:
    """A volume that is served in this loop, watched, and looked after as the tap does."""
    place, config = made(tmp_path, **settings)
    watched = Watched(place.folder, Path(config.disk))
    watch(monkeypatch, watched)
    opened = await asyncio.to_thread(open_volume, place, config, None, SystemClock())
    volume = Volume(place, config, opened, SystemClock(), threading.Lock(), lambda: None)

    async def look_after() -> None:
        while True:
            volume.tick()
            await asyncio.sleep(0.02)

    task = asyncio.create_task(look_after())
    try:
        yield volume, watched, Client(watched)
    finally:
        if watched.block_sync is not None:
            watched.block_sync.set()
        task.cancel()
        await volume.stop(timeout_s=10)


def write(volume: Volume, client: Client, number: int, count: int = 1) -> None:
    """Writes ``number`` to ``number + count - 1``, in one request each, that arrive together."""
    offsets = np.arange(number - 1, number - 1 + count, dtype=np.int64) * BLOCK
    payload = np.concatenate([np.full(BLOCK, n % 251, np.uint8) for n in range(number, number + count)])
    lengths = np.full(count, BLOCK, np.int64)
    volume.frontend.write(offsets, lengths, payload, client, w(number + count - 1))


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_comes_before_what_it_rests_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    async with served(tmp_path, monkeypatch) as (volume, watched, client):
        last = 0
        for _ in range(120):
            count = rng.randint(1, 6)
            write(volume, client, last + 1, count)
            last += count
            if rng.random() < 0.5:
                await client.has(w(last))
            if rng.random() < 0.2:
                volume.frontend.flush(client, f(last))
            if rng.random() < 0.3:
                # Vaulted is whatever was durable; the disk may be far behind.
                watched.vaulted = max(watched.vaulted, volume.durable_lsn)
                await volume.vaulted(volume.incarnation, watched.vaulted)
            await asyncio.sleep(rng.choice((0, 0, 0.003, 0.01)))
            assert watched.wrong == []
        volume.frontend.flush(client, f(last))
        await client.has(f(last))
        watched.vaulted = last
        await volume.vaulted(volume.incarnation, last)
    assert watched.wrong == []
    assert watched.freed > 5
    assert watched.captured == watched.stable == last


async def test_a_segment_outlives_the_vault_until_the_disk_is_stable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, monkeypatch) as (volume, watched, client):
        for number in range(1, 101):
            write(volume, client, number)
            await client.has(w(number))
        await until(lambda: volume.durable_lsn == 100)
        watched.vaulted = 100
        await volume.vaulted(volume.incarnation, 100)
        assert watched.wrong == []
        assert watched.freed == 0
        volume.frontend.flush(client, f(100))
        await client.has(f(100))
        while not watched.freed:
            await volume.vaulted(volume.incarnation, 100)
    assert watched.wrong == []


async def test_past_a_full_journal_no_write_reaches_the_disk_unmarked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, monkeypatch, quota_bytes=128 * KIB) as (volume, watched, client):
        for number in range(1, 201):
            write(volume, client, number)
            await client.has(w(number))
        assert volume.mode == "bitmap"
        volume.frontend.flush(client, f(200))
        await client.has(f(200))
        assert watched.passed > 100
        assert volume.fuzzy
    assert watched.wrong == []


async def test_the_next_incarnation_begins_right_behind_the_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of writes that found no room, and went past the journal, are of no record: no gap is left."""
    async with served(tmp_path, monkeypatch, quota_bytes=128 * KIB) as (volume, watched, client):
        for number in range(1, 101):  # all at once: each has its LSN before the first finds the journal full
            write(volume, client, number)
        assert volume.lsn == 100
        await client.has(w(100))
        captured, before = volume.captured_lsn, volume.incarnation
        assert captured < 50
        volume.frontend.flush(client, f(100))
        await client.has(f(100))
        watched.vaulted = captured
        await volume.vaulted(volume.incarnation, captured)
        await until(lambda: volume.mode == "data")
        assert volume.incarnation != before
        assert volume.lsn == captured
        write(volume, client, 101)
        await client.has(w(101))
        await until(lambda: volume.captured_lsn == captured + 1)


async def test_a_journal_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, monkeypatch, journal_stall_max_s=0.3) as (volume, watched, client):
        write(volume, client, 1)
        await client.has(w(1))
        watched.block_sync = threading.Event()
        write(volume, client, 2)
        volume.frontend.flush(client, f(2))
        await client.has(f(2), 0.3 + 2.0)
        assert volume.mode == "bitmap"
        assert volume.fuzzy
        write(volume, client, 3)
        await client.has(w(3), 1.0)


async def test_bits_set_while_the_journal_is_opened_again_are_kept_before_it_counts_as_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write goes past the journal after the bits were brought into the file, before writes are logged."""
    late = 100  # a region that no other write touches
    opening, opened = threading.Event(), threading.Event()

    def slow_open(*args: Any, **settings: Any) -> JournalWriter:
        opening.set()
        assert opened.wait(20)
        return open_writer(*args, **settings)

    monkeypatch.setattr("agent.tap.volume.open_writer", slow_open)
    async with served(tmp_path, monkeypatch, journal_stall_max_s=0.3) as (volume, watched, client):
        watched.block_sync = threading.Event()
        write(volume, client, 1)
        await until(lambda: volume.mode == "bitmap")
        watched.block_sync.set()
        watched.block_sync = None
        await until(opening.is_set)
        write(volume, client, late)
        await client.has(w(late))
        opened.set()
        await until(lambda: volume.mode == "data" and not volume.ladder.lost)
        # From here on a killed tap is not compared: what it does not find in the file is forgotten.
        dirty = DirtyMap.open(watched.folder / "dirty")
        assert dirty.is_dirty((late - 1) * BLOCK, BLOCK)
        dirty.close()
        for _ in range(2):  # a region marked during a round is left to the next
            name, bitmap, _ = await volume.dirty_regions()
            bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
            await volume.clear_dirty(name, np.flatnonzero(bits).tolist())
        assert volume.dirty_count == 0
        assert not volume.fuzzy


async def test_a_copy_begun_before_the_last_write_past_the_journal_landed_clears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its region is marked and the volume logs again, but the disk does not have it yet."""
    landing = threading.Event()
    async with served(tmp_path, monkeypatch, journal_stall_max_s=0.3) as (volume, watched, client):
        watched.block_sync = threading.Event()
        write(volume, client, 1)
        await until(lambda: volume.mode == "bitmap")
        await client.has(w(1))
        to_disk = volume.disk_lane._write

        def slowly(group: Any) -> None:
            assert landing.wait(20)
            to_disk(group)

        monkeypatch.setattr(volume.disk_lane, "_write", slowly)
        write(volume, client, 100)
        watched.block_sync.set()
        watched.block_sync = None
        await until(lambda: volume.mode == "data")
        name, bitmap, _ = await volume.dirty_regions()
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
        regions = np.flatnonzero(bits).tolist()
        assert 99 * BLOCK // (64 * KIB) in regions
        assert volume.disk_lane.applied_ticket < 3  # what a copy would read now is without it
        landing.set()
        await client.has(w(100))
        with pytest.raises(Conflict):
            await volume.clear_dirty(name, regions)
        assert volume.dirty_count


def test_what_the_disk_may_lack_is_redone_before_anything_is_served(tmp_path: Path) -> None:
    place, config = made(tmp_path)
    first = open_volume(place, config, None, SystemClock())
    assert first.writer is not None
    table = RECORD.pack(3 * BLOCK, BLOCK, WRITE, 0, 0, BLOCK)
    first.writer.append(1, 1, table, b"r" * BLOCK)
    first.writer.sync()
    # As after a kill: captured, never applied.
    first.writer.close()
    first.disk.close()
    with suppress(BufferError):
        first.page.close()
    second = open_volume(place, config, None, SystemClock())
    assert second.continuity.proved
    assert not second.resync
    with open(config.disk, "rb") as disk:
        disk.seek(3 * BLOCK)
        assert disk.read(BLOCK) == b"r" * BLOCK
    assert second.writer is not None
    second.writer.close()
    second.disk.close()
    second.page.close()
