"""Every cell of DESIGN section 4's table, both outcomes, and the adapter on real files."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from agent.journal.continuity import (
    BLOCK,
    CTIME_SLACK_NS,
    IMAGE,
    Boot,
    DiskIdentity,
    Stopped,
    decide,
    read_boot,
    read_disk,
)
from farshore.clock import SystemClock
from farshore.units import GIB, MIB

S = 10**9
HERE, THERE = b"h" * 16, b"t" * 16
BEAT = 1000 * S
BOOT = Boot(HERE, 2000 * S)
SAME_BOOT = Boot(HERE, 500 * S)
FILE = DiskIdentity(IMAGE, 8, 77, GIB, 990 * S, 0)
DEVICE = DiskIdentity(BLOCK, 0x801, 0, GIB, 0, 4711)


def stopped(disk: DiskIdentity, boot_id: bytes, *, clean: bool = False) -> Stopped:
    return Stopped(disk, boot_id, clean=clean, journal_lost=False, bitmap=False, heartbeat_ns=BEAT)


def at(ctime_ns: int) -> DiskIdentity:
    return replace(FILE, ctime_ns=ctime_ns)


IN_TIME, TOO_LATE = at(BEAT + CTIME_SLACK_NS), at(BEAT + CTIME_SLACK_NS + 1)
WRITTEN = replace(DEVICE, write_counter=4712)

CELLS = [
    # stop; disk at the last mark, boot of the last run, clean, supervisor; found, this boot; redo, proved
    ("clean, same boot, image", FILE, HERE, True, False, FILE, SAME_BOOT, False, True),
    ("clean, same boot, image changed", FILE, HERE, True, True, at(991 * S), SAME_BOOT, False, False),
    ("clean, new boot, image", FILE, THERE, True, False, FILE, BOOT, False, True),
    ("clean, new boot, image changed", FILE, THERE, True, False, at(2001 * S), BOOT, False, False),
    (
        "clean, new boot, image changed before the boot",
        FILE,
        THERE,
        True,
        False,
        at(991 * S),
        BOOT,
        False,
        False,
    ),
    ("clean, image, ctime went back", FILE, THERE, True, False, at(1 * S), BOOT, False, False),
    ("clean, same boot, block", DEVICE, HERE, True, False, DEVICE, SAME_BOOT, False, True),
    ("clean, same boot, block written", DEVICE, HERE, True, True, WRITTEN, SAME_BOOT, False, False),
    ("clean, new boot, block", DEVICE, THERE, True, False, DEVICE, BOOT, False, False),
    ("tap killed, held, image", FILE, HERE, False, True, IN_TIME, SAME_BOOT, True, True),
    ("tap killed, held, image changed", FILE, HERE, False, True, TOO_LATE, SAME_BOOT, False, False),
    ("tap killed, held, block", DEVICE, HERE, False, True, WRITTEN, SAME_BOOT, True, True),
    ("all killed, image", FILE, HERE, False, False, IN_TIME, SAME_BOOT, True, True),
    ("all killed, image changed", FILE, HERE, False, False, TOO_LATE, SAME_BOOT, False, False),
    ("all killed, image, clock set back", FILE, HERE, False, False, at(989 * S), SAME_BOOT, False, False),
    ("all killed, block", DEVICE, HERE, False, False, DEVICE, SAME_BOOT, False, False),
    ("power cut, image", FILE, THERE, False, False, at(1999 * S), BOOT, True, True),
    ("power cut, image, timestamps not stored", FILE, THERE, False, False, at(1 * S), BOOT, True, True),
    ("power cut, image changed", FILE, THERE, False, False, at(2000 * S), BOOT, False, False),
    ("power cut, block", DEVICE, THERE, False, False, DEVICE, BOOT, False, False),
    ("power cut, block, held by a liar", DEVICE, THERE, False, True, DEVICE, BOOT, False, False),
]


@pytest.mark.parametrize(
    ("disk", "boot_id", "clean", "held", "now", "boot", "redo", "proved"),
    [cell[1:] for cell in CELLS],
    ids=[cell[0] for cell in CELLS],
)
def test_cell(
    disk: DiskIdentity,
    boot_id: bytes,
    clean: bool,
    held: bool,
    now: DiskIdentity,
    boot: Boot,
    redo: bool,
    proved: bool,
) -> None:
    decision = decide(stopped(disk, boot_id, clean=clean), now, boot, supervisor_held=held)
    assert (decision.redo, decision.proved) == (redo, proved), decision.why
    assert decision.why


@pytest.mark.parametrize("cell", CELLS, ids=[cell[0] for cell in CELLS])
@pytest.mark.parametrize("changed", ["kind", "device", "inode", "size_bytes"])
def test_another_disk_is_never_proved(
    cell: tuple[str, DiskIdentity, bytes, bool, bool, DiskIdentity, Boot], changed: str
) -> None:
    _, disk, boot_id, clean, held, now, boot = cell[:7]
    other = replace(now, **{changed: getattr(now, changed) + 1})
    decision = decide(stopped(disk, boot_id, clean=clean), other, boot, supervisor_held=held)
    assert (decision.redo, decision.proved) == (False, False)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell[3]], ids=lambda cell: cell[0])
def test_with_the_journal_lost_every_unclean_stop_is_a_compare(
    cell: tuple[str, DiskIdentity, bytes, bool, bool, DiskIdentity, Boot],
) -> None:
    _, disk, boot_id, clean, held, now, boot = cell[:7]
    lost = replace(stopped(disk, boot_id, clean=clean), journal_lost=True)
    decision = decide(lost, now, boot, supervisor_held=held)
    assert (decision.redo, decision.proved) == (False, False)


def test_below_data_mode_a_kill_is_proved_and_a_power_cut_is_not() -> None:
    killed = replace(stopped(FILE, HERE), bitmap=True)
    assert decide(killed, IN_TIME, SAME_BOOT, supervisor_held=False).proved
    cut = replace(stopped(FILE, THERE), bitmap=True)
    assert not decide(cut, at(1999 * S), BOOT, supervisor_held=False).proved


def test_without_a_heartbeat_a_kill_is_a_compare() -> None:
    lost = replace(stopped(FILE, HERE), heartbeat_ns=None)
    assert not decide(lost, FILE, SAME_BOOT, supervisor_held=True).proved


def test_a_file_is_known_by_what_a_write_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    before = read_disk(path)
    assert before == read_disk(path)
    assert (before.kind, before.size_bytes) == (IMAGE, 8192)
    os.utime(path, ns=(1, 1))
    assert read_disk(path) != before, "ctime tells that mtime was set"
    link = tmp_path / "by-id"
    link.symlink_to(path)
    assert read_disk(link) == read_disk(path)
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(8192))
    assert not read_disk(copy).same_disk(before)


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null"), tmp_path / "none"):
        with pytest.raises(OSError, match=r"neither|No such"):
            read_disk(path)


def test_this_boot() -> None:
    boot = read_boot(SystemClock())
    assert len(boot.id) == 16
    assert boot.time_ns < SystemClock().wall_ns()
    assert boot.id == read_boot(SystemClock()).id


@pytest.mark.needs("loop")
def test_a_block_device_is_known_by_what_was_written(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * MIB))
    made = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    device = Path(made.stdout.strip())
    try:
        before = read_disk(device)
        assert (before.kind, before.size_bytes) == (BLOCK, 4 * MIB)
        assert read_disk(device) == before
        fd = os.open(device, os.O_WRONLY)
        os.pwrite(fd, b"x" * 4096, 8192)
        os.fsync(fd)
        os.close(fd)
        after = read_disk(device)
        assert after.same_disk(before)
        assert after.write_counter == before.write_counter + 8
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
