"""A cut is one look at all volumes: none shows a write that another one's missing write came before."""

import asyncio
from bisect import bisect_right
from pathlib import Path

import numpy as np

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
    """Waits for one write at a time."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        self.loop.call_soon_threadsafe(self.answered.set)

    async def write(self, volume: Volume, number: int) -> None:
        self.answered.clear()
        offsets, lengths = np.array([number % 1000 * 512], np.int64), np.array([512], np.int64)
        volume.write(offsets, lengths, np.full(512, 7, np.uint8), self, codec.simple_reply(number))
        await self.answered.wait()


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


async def test_no_volume_is_ahead_of_what_its_writer_had_seen(tmp_path: Path) -> None:
    host = TapHost(tmp_path)
    for name in NAMES:
        host.add(name)
    tap = Tap(tmp_path, id_from_hex(MACHINE), SystemClock())
    await tap.start()
    try:
        volumes = [tap._entries[name].volume for name in NAMES]
        first, second = (volume for volume in volumes if volume is not None)
        running = True

        async def work() -> None:
            client, number = Client(), 0
            while running:
                number += 1
                await client.write(first, number)
                await client.write(second, number)

        worker = asyncio.create_task(work())
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
