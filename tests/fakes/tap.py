"""A tap without NBD: one volume in a file, its journal in memory, its state page real.

The workload is the test. What it has written by each cut is remembered as a digest, for the oracle.
"""

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from agent.journal.reader import IncarnationStart
from agent.journal.state import StatePageWriter
from agent.replicate.ports import DirtyRegions, Item, VolumeSpec
from farshore.errors import Conflict, Unreachable
from farshore.hrl.batch import (
    MARK,
    RECORD,
    WRITE,
    ZERO,
    Batch,
    RunningDigest,
    decode_batch,
    encode_head,
    first_digest,
    incarnation_key,
    padded,
)
from farshore.hrl.cut import Cut, CutVolume, encode_cut
from farshore.hrl.segment import NO_DIGEST, NO_INCARNATION, Incarnation
from farshore.ids import new_id

REGION_BYTES = 65536


class FakeTap:
    """Implements `Tap` for one volume and `Journal` through `FakeJournal`."""

    def __init__(self, folder: Path, machine: bytes, size: int, rng: random.Random) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.machine, self.rng = machine, rng
        self.spec = VolumeSpec(new_id(), "data", folder / "disk", size, 512, folder, folder / "state")
        self.truth = bytearray(rng.randbytes(size // 3) + bytes(size - size // 3))
        self.spec.disk.write_bytes(self.truth)
        self.fd = os.open(self.spec.disk, os.O_RDWR)
        self.items: list[Item] = []
        self.waiting: list[tuple[int, int, bytes]] = []
        self.captured = self.durable = 0
        self.cut_seq = time.time_ns()
        self.digests: dict[int, bytes] = {}
        self.dirty_set: set[int] = set()
        self.round = 0
        self.since_round: set[int] = set()
        self.vaulted_lsn = 0
        self.resync_flag = False
        self.down = False
        self.ordinal = 0
        self.incarnation = Incarnation(NO_INCARNATION, 0)
        self.chain = RunningDigest(bytes(32), NO_DIGEST)
        self.page: StatePageWriter | None = None
        self.open_incarnation(0)

    def open_incarnation(self, above_lsn: int) -> None:
        before, last_lsn = self.incarnation, self.captured
        before_digest = self.chain.value if self.ordinal else NO_DIGEST
        self.ordinal += 1
        self.incarnation = Incarnation(new_id(), self.ordinal, before.id, last_lsn, before_digest)
        self.captured = self.durable = max(last_lsn, above_lsn)
        key = incarnation_key(self.machine, self.spec.id, self.incarnation.id)
        digest = first_digest(key, before.id, last_lsn, before_digest)
        self.chain = RunningDigest(key, digest)
        self.items.append(IncarnationStart(self.incarnation, self.captured + 1))
        self.page = StatePageWriter.create(
            self.spec.state_page, incarnation=self.incarnation.id, boot_id=bytes(16)
        )
        self.publish()

    def publish(self) -> None:
        assert self.page is not None
        self.page.update(
            incarnation=self.incarnation.id,
            captured_lsn=self.captured,
            durable_lsn=self.durable,
            applied_lsn=self.waiting[0][0] - 1 if self.waiting else self.captured,
            dirty_regions=len(self.dirty_set),
            flags=4 if self.resync_flag else 0,
            capture_mode=1,
        )

    # --- workload ---

    def write(self, offset: int, data: bytes) -> None:
        self.truth[offset : offset + len(data)] = data
        kind = WRITE if any(data) else ZERO
        payload = data if kind == WRITE else b""
        self.append(RECORD.pack(offset, len(data), kind, 0, 0, len(payload)), payload)
        self.waiting.append((self.captured, offset, data))
        self.publish()

    def append(self, table: bytes, payload: bytes) -> None:
        head = encode_head(self.chain.copy(), self.captured + 1, time.time_ns(), 1, table, payload)
        raw = head + table + payload
        raw = raw.ljust(padded(len(raw)), b"\0")
        batch = decode_batch(memoryview(raw), 0, self.chain, self.captured + 1)
        assert batch is not None
        self.items.append(batch)
        self.captured += 1

    def work(self, writes: int) -> None:
        """Some random writes, some of them applied late."""
        for _ in range(writes):
            length = 512 * self.rng.randint(1, 64)
            offset = 512 * self.rng.randrange((self.spec.size_bytes - length) // 512)
            data = self.rng.choice([self.rng.randbytes(length), bytes(length)])
            self.write(offset, data)
            if self.rng.random() < 0.9:
                self.settle(self.rng.randint(0, 2))

    def settle(self, left: int = 0) -> None:
        """Make everything durable and apply all but the last ``left`` writes."""
        self.durable = self.captured
        self.publish()
        while len(self.waiting) > left:
            _, offset, data = self.waiting.pop(0)
            os.pwrite(self.fd, data, offset)
        self.publish()

    def bypass(self) -> None:
        """A write in bitmap mode."""
        self.settle()
        data = self.rng.randbytes(4096)
        offset = 512 * self.rng.randrange((self.spec.size_bytes - 4096) // 512)
        self.truth[offset : offset + 4096] = data
        touched = {offset // REGION_BYTES, (offset + 4095) // REGION_BYTES}
        self.dirty_set |= touched
        self.since_round |= touched
        os.pwrite(self.fd, data, offset)
        self.publish()

    # --- Tap ---

    async def cut(self, tag: str | None) -> Cut:
        if self.down:
            raise Unreachable("the tap is down")
        return cut_over([self], tag)

    @property
    def fresh(self) -> bool:
        """There are records since the last cut, so the next one leaves its MARK here."""
        last = next((item for item in reversed(self.items) if isinstance(item, Batch)), None)
        return last is not None and bool(last.records["type"][0] != MARK)

    def place(self) -> CutVolume:
        """Where a cut taken now passes through."""
        fuzzy = bool(self.dirty_set) or self.resync_flag
        return CutVolume(self.spec.id, self.incarnation.id, self.captured + self.fresh, fuzzy)

    def was_cut(self, cut: Cut) -> None:
        """Keep what was written by then, and the MARK."""
        if self.fresh:
            payload = encode_cut(cut)
            self.append(RECORD.pack(0, 0, MARK, 0, 0, len(payload)), payload)
        self.durable = self.captured
        self.cut_seq = cut.seq
        self.digests[cut.seq] = blake3(self.truth).digest()
        self.publish()

    async def vaulted(self, volume: bytes, incarnation: bytes, lsn: int) -> None:
        self.vaulted_lsn = max(self.vaulted_lsn, lsn)

    async def dirty(self, volume: bytes) -> DirtyRegions:
        self.round += 1
        self.since_round = set()
        return DirtyRegions(self.round, REGION_BYTES, tuple(sorted(self.dirty_set)))

    async def dirty_clear(self, volume: bytes, round: int, regions: tuple[int, ...]) -> None:
        if round == self.round:
            self.dirty_set -= set(regions) - self.since_round
        self.publish()

    async def resync_required(self, volume: bytes, above_lsn: int, above_ordinal: int) -> None:
        self.settle()
        self.ordinal = max(self.ordinal, above_ordinal)
        self.resync_flag = True
        self.items.clear()
        self.open_incarnation(above_lsn)

    async def resync_done(self, volume: bytes) -> None:
        self.resync_flag = False
        self.publish()

    def close(self) -> None:
        os.close(self.fd)


def cut_over(taps: Sequence[FakeTap], tag: str | None, absent: Sequence[FakeTap] = ()) -> Cut:
    """Take one cut over several volumes; ``absent`` ones have no journal."""
    now_ns = time.time_ns()
    nowhere = [CutVolume(tap.spec.id, NO_INCARNATION, 0, True) for tap in absent]
    seq = max(now_ns, *(tap.cut_seq + 1 for tap in taps))
    cut = Cut(seq, now_ns, tag, (*(tap.place() for tap in taps), *nowhere))
    for tap in taps:
        tap.was_cut(cut)
    return cut


class FakeTaps:
    """One tap of several volumes, which does not serve those in ``gone``."""

    def __init__(self, *taps: FakeTap) -> None:
        self.taps = taps
        self.gone: set[bytes] = set()

    async def cut(self, tag: str | None) -> Cut:
        served = [tap for tap in self.taps if tap.spec.id not in self.gone]
        return cut_over(served, tag, [tap for tap in self.taps if tap.spec.id in self.gone])

    async def vaulted(self, volume: bytes, incarnation: bytes, lsn: int) -> None:
        await self._of(volume).vaulted(volume, incarnation, lsn)

    async def dirty(self, volume: bytes) -> DirtyRegions:
        return await self._of(volume).dirty(volume)

    async def dirty_clear(self, volume: bytes, round: int, regions: tuple[int, ...]) -> None:
        await self._of(volume).dirty_clear(volume, round, regions)

    async def resync_required(self, volume: bytes, above_lsn: int, above_ordinal: int) -> None:
        await self._of(volume).resync_required(volume, above_lsn, above_ordinal)

    async def resync_done(self, volume: bytes) -> None:
        await self._of(volume).resync_done(volume)

    def _of(self, volume: bytes) -> FakeTap:
        if volume in self.gone:
            raise Conflict("the volume is not served")
        (tap,) = (tap for tap in self.taps if tap.spec.id == volume)
        return tap


class FakeJournal:
    """The items of a `FakeTap`, as `JournalReader` gives them."""

    def __init__(self, tap: FakeTap) -> None:
        self.tap = tap
        self.at = 0
        self.beginning: IncarnationStart | None = None

    def position(self, incarnation_id: bytes, lsn: int, digest: bytes) -> bool:
        start: IncarnationStart | None = None
        for index, item in enumerate(self.tap.items):
            if isinstance(item, IncarnationStart):
                start = item
                previous = start.incarnation
                if (previous.id, start.first_lsn - 1) == (incarnation_id, lsn):
                    self.at, self.beginning = index + 1, start
                    key = incarnation_key(self.tap.machine, self.tap.spec.id, previous.id)
                    return digest == first_digest(
                        key, previous.previous, previous.previous_last_lsn, previous.previous_digest
                    )
            elif start and start.incarnation.id == incarnation_id and item.last_lsn == lsn:
                self.at, self.beginning = index + 1, start
                return item.digest == digest
        return False

    def start_at_oldest(self) -> None:
        self.at, self.beginning = 0, None

    def start_at_newest(self) -> None:
        items = self.tap.items
        self.at = max(i for i, item in enumerate(items) if isinstance(item, IncarnationStart))
        self.beginning = None

    def read(self, durable: tuple[bytes, int], bytes_max: int) -> list[Item]:
        found: list[Item] = [self.beginning] if self.beginning else []
        self.beginning = None
        size = 0
        while self.at < len(self.tap.items) and size < bytes_max:
            item = self.tap.items[self.at]
            if isinstance(item, Batch):
                if item.last_lsn > durable[1]:
                    break
                size += len(item.raw)
            found.append(item)
            self.at += 1
        return found

    def announce(self, durable: tuple[bytes, int]) -> list[Item]:
        return []
