"""When a pass begins, what it is called, and when a cut may say that a scanned disk was so."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from agent.capture.scan import Pass, ScanReplica, fresh
from agent.journal.continuity import DiskIdentity
from agent.journal.state import SCAN
from agent.replicate.job import Job, whole_volume
from agent.replicate.ports import VolumeSpec
from agent.replicate.replica import Replica, known_size
from farshore.errors import Failed, Unreachable
from farshore.units import MIB
from farshore.wire import messages as m
from tests.fakes.clock import ManualClock

VOLUME = b"v" * 16
NOWHERE = m.VolumePosition(VOLUME, bytes(16), 0, 0, bytes(32), False, 0, True)
DISK = DiskIdentity(1, 1, 2, MIB, 1_000, 0)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def replica_in(folder: Path, clock: ManualClock, *, quiesced: bool = True, name: str = "root") -> ScanReplica:
    folder.mkdir(exist_ok=True)
    disk = folder / "disk"
    disk.write_bytes(bytes(MIB))
    spec = VolumeSpec(VOLUME, name, disk, MIB, 512, folder, folder / "state")
    return ScanReplica(spec, 900.0, quiesced, clock)


@pytest.fixture
def replica(tmp_path: Path, clock: ManualClock) -> ScanReplica:
    return replica_in(tmp_path, clock)


def here(last: Pass, *, copied: bool) -> m.VolumePosition:
    """The vault stands at a pass."""
    started = last.incarnation
    return m.VolumePosition(
        VOLUME, started.id, started.ordinal, last.number, bytes(32), copied, last.number, False
    )


def begin(replica: ScanReplica, disk: DiskIdentity = DISK, at: m.VolumePosition = NOWHERE) -> Pass:
    replica.volume_status()
    assert replica.due()
    return replica.begin(disk, at)


def read(begun: Pass) -> None:
    """All of it was read."""
    job = begun.job = Job("resync", whole_volume(MIB), compare=True, after=0)
    assert job.take(1)
    job.done(1)
    assert begun.read


def test_a_pass_begins_after_a_ping_and_then_by_the_timetable(
    replica: ScanReplica, clock: ManualClock
) -> None:
    assert not replica.due()  # nobody said where the vault stands
    replica.open(NOWHERE)
    assert not replica.due()  # the server could not tell when it began
    first = begin(replica)
    assert (first.number, first.incarnation.ordinal) == (1, 1)
    clock.advance(1000)
    replica.volume_status()
    assert not replica.due()
    replica.vaulted(first)
    assert replica.due()
    second = begin(replica)
    assert (second.number, second.incarnation.previous) == (2, first.incarnation.id)
    replica.vaulted(second)
    replica.volume_status()
    clock.advance(899)
    assert not replica.due()
    clock.advance(1)
    assert replica.due()


def test_the_page_shows_the_pass_to_copiers(replica: ScanReplica) -> None:
    replica.open(NOWHERE)
    with pytest.raises(Unreachable):
        replica.state()
    begun = begin(replica)
    state = replica.state()
    assert (state.incarnation, state.capture_mode) == (begun.incarnation.id, SCAN)
    assert {state.captured_lsn, state.durable_lsn, state.applied_lsn} == {1}
    assert state.process_id == os.getpid()
    started = replica.journal.announce((begun.incarnation.id, 1))[0]
    assert (started.incarnation, started.first_lsn) == (begun.incarnation, 2)  # type: ignore[union-attr]
    assert replica.journal.announce((b"x" * 16, 1)) == []
    replica.close()
    assert not replica.spec.state_page.exists()


def test_what_is_on_the_disk_now_is_the_next_pass_s(replica: ScanReplica) -> None:
    assert replica.volume_status().next_pass == 0
    replica.open(msgspec.structs.replace(NOWHERE, incarnation=b"j" * 16, ordinal=7, lsn=41))
    assert (replica.volume_status().captured_lsn, replica.volume_status().next_pass) == (41, 42)
    begun = begin(replica)
    assert (begun.number, begun.incarnation.ordinal) == (42, 8)
    assert (replica.volume_status().captured_lsn, replica.volume_status().next_pass) == (42, 43)
    replica.vaulted(begun)
    assert (replica.volume_status().captured_lsn, replica.volume_status().next_pass) == (42, 43)


def test_the_cycle_is_as_long_as_a_pass_takes(replica: ScanReplica, clock: ManualClock) -> None:
    replica.open(NOWHERE)
    assert replica.volume_status().cycle_s == 900
    begun = begin(replica)
    assert replica.scan_age_s() is None
    clock.advance(5000)
    replica.vaulted(begun)
    assert replica.volume_status().cycle_s == 5000
    clock.advance(60)
    assert replica.scan_age_s() == 5060


def test_a_cut_is_fuzzy_until_the_pass_was_read(replica: ScanReplica) -> None:
    replica.open(NOWHERE)
    assert replica.cut(DISK, alone=True) is None
    begun = begin(replica)
    entry = replica.cut(DISK, alone=True)
    assert entry is not None
    assert (entry.incarnation, entry.lsn, entry.fuzzy) == (begun.incarnation.id, 1, True)
    assert replica.fuzzy_anyway()
    read(begun)
    assert not replica.fuzzy_anyway()
    entry = replica.cut(DISK, alone=True)
    assert entry is not None
    assert not entry.fuzzy
    assert not replica.fuzzy_anyway()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "found",
    [
        None,
        DiskIdentity(1, 1, 2, MIB, 1_001, 0),
        DiskIdentity(1, 1, 3, MIB, 1_000, 0),
        DiskIdentity(1, 1, 2, 2 * MIB, 1_000, 0),
    ],
)
def test_a_disk_that_changed_while_it_was_read_makes_the_pass_fuzzy_for_good(
    replica: ScanReplica, found: DiskIdentity | None, alone: bool
) -> None:
    replica.open(NOWHERE)
    begun = begin(replica)
    read(begun)
    for seen in (found, DISK):
        entry = replica.cut(seen, alone=alone)
        assert entry is not None
        assert entry.fuzzy
    assert replica.fuzzy_anyway()
    replica.vaulted(begun)
    again = begin_now(replica, here(begun, copied=True))
    read(again)
    entry = replica.cut(DISK, alone=alone)
    assert entry is not None
    assert not entry.fuzzy


def begin_now(replica: ScanReplica, at: m.VolumePosition) -> Pass:
    replica.release(replica.want())
    return begin(replica, at=at)


@pytest.mark.parametrize("alone", [False, True])
def test_a_disk_written_after_the_pass_was_not_so_at_a_later_cut_of_several_volumes(
    replica: ScanReplica, alone: bool
) -> None:
    replica.open(NOWHERE)
    begun = begin(replica)
    read(begun)
    fuzzy = []
    for seen in (DISK, DiskIdentity(1, 1, 2, MIB, 9_999, 0)):
        entry = replica.cut(seen, alone=alone)
        assert entry is not None
        fuzzy.append(entry.fuzzy)
    assert fuzzy == [False, not alone]


def test_without_the_promise_every_cut_is_fuzzy(tmp_path: Path, clock: ManualClock) -> None:
    replica = replica_in(tmp_path, clock, quiesced=False)
    replica.open(NOWHERE)
    begun = begin(replica)
    read(begun)
    entry = replica.cut(DISK, alone=True)
    assert entry is not None
    assert entry.fuzzy
    assert replica.fuzzy_anyway()


def test_a_disk_written_just_before_the_pass_might_change_unseen(
    replica: ScanReplica, clock: ManualClock
) -> None:
    replica.open(NOWHERE)
    disk = DiskIdentity(1, 1, 2, MIB, clock.wall_ns() - 1_000_000, 0)
    assert replica.just_written(disk)
    begun = begin(replica, disk)
    read(begun)
    entry = replica.cut(disk, alone=True)
    assert entry is not None
    assert entry.fuzzy
    for ctime_ns in (clock.wall_ns() - 50_000_000, clock.wall_ns() + 1):
        assert not replica.just_written(DiskIdentity(1, 1, 2, MIB, ctime_ns, 0))
    assert not replica.just_written(DiskIdentity(2, 1, 0, MIB, clock.wall_ns(), 0))


def test_a_pass_goes_on_in_the_next_session_where_the_vault_has_heard_of_it_or_stands_before_it(
    replica: ScanReplica,
) -> None:
    replica.open(NOWHERE)
    first = begin(replica)
    replica.safe.add(3)
    read(first)
    assert replica.cut(DISK, alone=True) is not None
    assert first.changed is False
    replica.open(here(first, copied=False))
    assert replica.running is first
    # What is not safe is read again: the verdict on the reads is open again.
    assert first == Pass(1, first.incarnation, DISK, first.began_s)
    assert replica.safe == {3}
    replica.open(NOWHERE)
    assert replica.running is first
    assert replica.safe == set()


def test_a_pass_whose_acknowledgement_was_lost_is_over(replica: ScanReplica) -> None:
    replica.open(NOWHERE)
    first = begin(replica)
    replica.open(here(first, copied=True))
    assert replica.running is None
    assert first.whole
    assert replica.copied


@pytest.mark.parametrize("whole", [False, True])
def test_another_vault_s_position_makes_for_another_pass_above_both(
    replica: ScanReplica, whole: bool
) -> None:
    replica.open(NOWHERE)
    first = begin(replica)
    if whole:
        replica.vaulted(first)
    replica.open(msgspec.structs.replace(NOWHERE, incarnation=b"o" * 16, ordinal=9, lsn=0))
    assert replica.last_pass is None
    begun = begin(replica)
    assert (begun.number, begun.incarnation.ordinal) == (2, 10)


def test_a_pass_that_was_given_up_is_not_told_to_a_server_that_never_heard_of_it(
    replica: ScanReplica, clock: ManualClock
) -> None:
    replica.open(NOWHERE)
    begin(replica)
    replica.fail("gone")
    replica.open(NOWHERE)
    assert replica.last_pass is None
    replica.volume_status()
    assert not replica.due()  # a new session is no reason to try again
    clock.advance(900)
    assert begin(replica).number == 2


def test_a_failure_shows_until_a_pass_is_whole(replica: ScanReplica, clock: ManualClock) -> None:
    replica.open(NOWHERE)
    assert replica.name_state() == "initial-replication"
    first = begin(replica)
    replica.vaulted(first)
    assert replica.name_state() == "protected"
    replica.fail("it is gone")
    assert (replica.name_state(), replica.problem) == ("failed", "it is gone")
    clock.advance(900)
    begun = begin(replica, at=here(first, copied=True))
    assert replica.name_state() == "failed"
    replica.vaulted(begun)
    assert replica.name_state() == "protected"


def test_a_resync_that_is_asked_for_shows_and_is_a_pass_that_begins_after(replica: ScanReplica) -> None:
    replica.open(NOWHERE)
    first = begin(replica)
    replica.compare_again()
    assert replica.name_state() == "resync"
    replica.vaulted(first)
    assert replica.name_state() == "resync"
    second = begin(replica, at=here(first, copied=True))
    assert replica.name_state() == "resync"
    replica.vaulted(second)
    assert replica.name_state() == "protected"


def test_what_outlives_the_agent(replica: ScanReplica, tmp_path: Path, clock: ManualClock) -> None:
    assert known_size(tmp_path) == 0
    replica.open(NOWHERE)
    replica.vaulted(begin(replica))
    replica.paused = True
    assert known_size(tmp_path) == MIB
    again = ScanReplica(replica.spec, 900.0, True, clock)
    assert (again.paused, again.copied, again.name_state()) == (True, True, "paused")
    assert known_size(tmp_path) == MIB


async def test_a_point_waits_for_a_pass_that_begins_from_now_on_and_holds_the_next_one_back(
    replica: ScanReplica, clock: ManualClock
) -> None:
    replica.open(NOWHERE)
    first = begin(replica)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def point() -> None:
        async with fresh([replica]):
            entered.set()
            await leave.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(point())
        await asyncio.sleep(0)
        replica.vaulted(first)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not entered.is_set()
        second = begin(replica, at=here(first, copied=True))
        replica.vaulted(second)
        clock.advance(900)
        replica.compare_again()
        replica.volume_status()
        assert not replica.due()
        await entered.wait()
        leave.set()
    assert replica.due()


async def test_a_point_fails_with_the_disk_and_does_not_wait_for_a_pause(
    replica: ScanReplica, tmp_path: Path, clock: ManualClock
) -> None:
    replica.open(NOWHERE)
    waiting = asyncio.create_task(wait(replica))
    await asyncio.sleep(0)
    replica.fail("it is gone")
    with pytest.raises(Failed, match="it is gone"):
        await waiting
    paused = replica_in(tmp_path / "paused", clock, name="paused")
    paused.paused = True
    await wait(paused)


async def wait(*replicas: Replica) -> None:
    async with fresh(replicas):
        pass
