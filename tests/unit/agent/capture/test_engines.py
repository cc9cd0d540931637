"""One cut over volumes of several engines."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.capture import scan as scan_module
from agent.capture.engines import Engines
from agent.capture.scan import ScanReplica
from agent.replicate.job import Job, whole_volume
from agent.replicate.ports import VolumeSpec
from agent.replicate.replica import Replica
from farshore.errors import Unreachable
from farshore.hrl.cut import Cut, CutVolume
from farshore.units import MIB
from farshore.wire import messages as m
from tests.fakes.clock import ManualClock

DATA, ROOT = b"d" * 16, b"r" * 16


class NotingTap:
    """Takes cuts of one volume, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.before_answer: Any = lambda: None

    async def cut(self, tag: str | None) -> Cut:
        self.told.append("cut")
        self.before_answer()
        return Cut(70, 7, tag, (CutVolume(DATA, b"i" * 16, 5, False),))

    async def vaulted(self, volume: bytes, incarnation: bytes, lsn: int) -> None:
        self.told.append("vaulted")

    async def resync_required(self, volume: bytes, above_lsn: int, above_ordinal: int) -> None:
        self.told.append("resync_required")

    async def resync_done(self, volume: bytes) -> None:
        self.told.append("resync_done")

    async def dirty(self, volume: bytes) -> Any:
        raise Unreachable("no tap")

    async def dirty_clear(self, volume: bytes, round: int, regions: tuple[int, ...]) -> None:
        raise Unreachable("no tap")


def spec(folder: Path, id: bytes, name: str) -> VolumeSpec:
    (folder / name).mkdir()
    disk = folder / f"{name}.img"
    disk.write_bytes(bytes(MIB))
    return VolumeSpec(id, name, disk, MIB, 512, folder / name, folder / f"{name}.state")


@pytest.fixture
def root(tmp_path: Path) -> ScanReplica:
    replica = ScanReplica(spec(tmp_path, ROOT, "root"), 900, True, ManualClock())
    position = m.VolumePosition(ROOT, bytes(16), 0, 0, bytes(32), False, 0, True)
    replica.open(position)
    begun = replica.begin(replica.look(), position)
    begun.job = Job("resync", whole_volume(MIB), compare=True, after=0)
    begun.job.take(1)
    begun.job.done(1)
    return replica


def engines(tap: NotingTap, *replicas: Replica) -> Engines:
    found: Sequence[Replica] = replicas
    return Engines(tap, lambda: found, ManualClock())


async def test_scans_alone_need_no_tap(root: ScanReplica) -> None:
    tap = NotingTap()
    both = engines(tap, root)
    first, second = await both.cut("tag"), await both.cut(None)
    assert tap.told == []
    assert second.seq > first.seq
    assert first.tag == "tag"
    assert [(entry.volume, entry.lsn, entry.fuzzy) for entry in first.volumes] == [(ROOT, 1, False)]
    await both.vaulted(ROOT, b"i" * 16, 1)
    await both.resync_done(ROOT)
    await both.resync_required(ROOT, 1, 1)
    assert tap.told == []
    assert root.last_pass is None
    assert (await both.cut(None)).volumes == ()


async def test_a_disk_is_looked_at_after_the_tap_s_cut(root: ScanReplica, tmp_path: Path) -> None:
    tap = NotingTap()
    data = Replica(spec(tmp_path, DATA, "data"), None)
    both = engines(tap, root, data)
    cut = await both.cut("tag")
    assert (cut.seq, cut.time_ns, cut.tag) == (70, 7, "tag")
    assert [(entry.volume, entry.fuzzy) for entry in cut.volumes] == [(DATA, False), (ROOT, False)]
    # A write that came before the cut was taken, however late, is not in what the pass read.
    tap.before_answer = lambda: root.spec.disk.write_bytes(b"x" * MIB)
    cut = await both.cut(None)
    assert [(entry.volume, entry.fuzzy) for entry in cut.volumes] == [(DATA, False), (ROOT, True)]


async def test_without_scans_it_is_the_tap_s_cut(tmp_path: Path) -> None:
    tap = NotingTap()
    only = engines(tap, Replica(spec(tmp_path, DATA, "data"), None))
    assert [entry.volume for entry in (await only.cut(None)).volumes] == [DATA]
    await only.vaulted(DATA, b"i" * 16, 1)
    await only.resync_required(DATA, 1, 1)
    await only.resync_done(DATA)
    assert tap.told == ["cut", "vaulted", "resync_required", "resync_done"]


async def test_without_a_tap_scans_go_on_beside_volumes_that_cannot_be_served(
    root: ScanReplica, tmp_path: Path
) -> None:
    tap = NotingTap()
    data = Replica(spec(tmp_path, DATA, "data"), None)

    async def no_tap(tag: str | None) -> Cut:
        raise Unreachable("there is no tap")

    tap.cut = no_tap  # type: ignore[method-assign]
    both = engines(tap, root, data)
    with pytest.raises(Unreachable):
        await both.cut(None)  # its newest state is in the journal, and belongs into the point
    data.lost("there is no such disk")
    assert [entry.volume for entry in (await both.cut(None)).volumes] == [ROOT]
    with pytest.raises(Unreachable):
        await engines(tap, data).cut(None)


async def test_a_disk_that_cannot_be_looked_at_is_fuzzy(root: ScanReplica) -> None:
    root.spec.disk.unlink()
    (entry,) = (await engines(NotingTap(), root).cut(None)).volumes
    assert entry.fuzzy


async def test_a_disk_that_hangs_is_fuzzy_and_holds_up_nobody(
    root: ScanReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "LOOK_S", 0.05)
    only = engines(NotingTap(), root)
    go_on, hanging = threading.Event(), threading.Event()
    look = root.look

    def hang() -> Any:
        hanging.set()
        go_on.wait()
        return look()

    monkeypatch.setattr(root, "look", hang)
    (entry,) = (await only.cut(None)).volumes
    assert entry.fuzzy
    assert hanging.is_set()
    hanging.clear()
    with pytest.raises(TimeoutError):
        await root.looked()
    assert not hanging.is_set()  # one thread hangs, not one for each cut
    go_on.set()
    thread = root._looking
    assert thread is not None
    await asyncio.to_thread(thread.join)
    monkeypatch.setattr(root, "look", look)
    assert (await root.looked()).size_bytes == MIB


async def test_two_looks_at_a_time_are_one_after_the_other(root: ScanReplica) -> None:
    async with asyncio.TaskGroup() as tasks:
        looks = [tasks.create_task(root.looked()) for _ in range(20)]
    assert {look.result().size_bytes for look in looks} == {MIB}
