"""A cut is one look at all volumes: none shows a write that another one's missing write came before."""

import asyncio
import threading
import time
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pytest

from agent.config import Layout
from agent.journal.reader import IncarnationStart, JournalReader
from agent.tap.service import Tap
from agent.tap.volume import Volume
from farshore.clock import SystemClock
from farshore.hrl.batch import WRITE
from farshore.hrl.cut import decode_cut
from farshore.ids import id_from_hex
from farshore.nbd import codec
from tests.harness.tap import MACHINE, TapHost

NAMES = ("first", "second")
CUTS = 25


class Client:
    """Waits for one write at a time, in a thread of its own, as the clients of the tap do."""

    def __init__(self) -> None:
        self.answered = threading.Event()

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        self.answered.set()

    def write(self, volume: Volume, number: int) -> None:
        self.answered.clear()
        offsets, lengths = np.array([number % 1000 * 512], np.int64), np.array([512], np.int64)
        reply = codec.simple_reply(number)
        volume.frontend.write(offsets, lengths, np.full(512, 7, np.uint8), self, reply)
        assert self.answered.wait(30)


def lsns_of_writes(directory: Path, volume: Volume) -> list[int]:
    """LSNs of the workload's writes, by the volume's journal."""
    reader = JournalReader(directory)
    reader.start_at_oldest()
    found: list[int] = []
    while items := reader.read((volume.incarnation, volume.durable_lsn), 1 << 24):
        for item in items:
            if not isinstance(item, IncarnationStart):
                found += (np.flatnonzero(item.records["type"] == WRITE) + item.first_lsn).tolist()
    reader.close()
    return found


def slow_fuzzy(volume: Volume) -> bool:
    """A cut asks each volume; whoever may write meanwhile has the time to."""
    time.sleep(0.002)
    return False


async def test_no_volume_is_ahead_of_what_its_writer_had_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Volume, "fuzzy", property(slow_fuzzy))
    host = TapHost(tmp_path)
    for name in NAMES:
        host.add(name)
    tap = Tap(tmp_path, id_from_hex(MACHINE), SystemClock())
    await tap.start()
    try:
        volumes = [tap._entries[name].volume for name in NAMES]
        first, second = (volume for volume in volumes if volume is not None)
        running = True

        def work() -> None:
            client, number = Client(), 0
            while running:
                number += 1
                client.write(first, number)
                client.write(second, number)

        worker = asyncio.create_task(asyncio.to_thread(work))
        cuts = []
        for _ in range(CUTS):
            cuts.append(decode_cut((await tap.cut(None)).cut))
            await asyncio.sleep(0.005)
        running = False
        await worker
        logged = [
            lsns_of_writes(Layout(tmp_path).volume(name), volume)
            for name, volume in zip(NAMES, (first, second), strict=True)
        ]
        seen = []
        for cut in cuts:
            places = {entry.volume: entry.lsn for entry in cut.volumes}
            a, b = (bisect_right(logged[at], places[volume.id]) for at, volume in enumerate((first, second)))
            assert b <= a <= b + 1, f"cut {cut.seq}: {a} writes to the first volume and {b} to the second"
            seen.append(a)
        assert seen[-1] > seen[0]
    finally:
        await tap.stop()
        host.close()
