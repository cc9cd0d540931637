"""Power cuts under a journal on a real file system (F4): what was durable is there, the log a prefix."""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.journal.recovery import lsn_before
from farshore.units import MIB
from tests.harness.faults import Injected
from tests.harness.journal import held, look, marked, opened, put
from tests.harness.power import FLUSH, PowerCuts, entries_so_far, in_memory, logged_device

ROOT = Path(__file__).parents[2]
DISK_BYTES = 64 * MIB
SUBSETS = 2
"""Random fates of the unflushed writes, per place of a cut."""
CUTS = 30
CUTS_NIGHTLY = 600
"""Places between flushes; and half as many flushes, or all there are."""


@contextmanager
def mounted(device: Path, where: Path, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, device, where], check=True)
    try:
        yield where / "j"
    finally:
        subprocess.run(["umount", where], check=True)


def write_and_count(journal: Path, log: Path) -> list[tuple[int, int]]:
    """Run a journal process; returns each LSN it called durable with the requests logged by then."""
    command = [sys.executable, "-m", "tests.harness.journal_process", str(journal), "160", "abandon"]
    owed = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            kind, _, value = line.partition(" ")
            if kind == "D":
                owed.append((entries_so_far(log), int(value)))
    assert process.returncode == 0
    return owed


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path / "memory") as folder:
        yield folder


@pytest.mark.fault("F4")
@pytest.mark.timeout(3600)
@pytest.mark.needs("qemu-storage-daemon", "loop", "fuse", "root")
@pytest.mark.parametrize(
    "filesystem",
    [pytest.param(name, marks=pytest.mark.needs(f"mkfs.{name}")) for name in ("ext4", "xfs", "btrfs")],
)
def test_every_durable_record_survives_every_cut(
    tmp_path: Path, memory: Path, filesystem: str, injected: Injected, request: pytest.FixtureRequest
) -> None:
    count = CUTS_NIGHTLY if request.config.getoption("--nightly") else CUTS
    disk_bytes = {"ext4": DISK_BYTES, "xfs": 320 * MIB, "btrfs": 128 * MIB}[filesystem]
    make = f"mkfs.{filesystem}"
    with logged_device(tmp_path, disk_bytes) as (device, log):
        subprocess.run([make, "-q", device], check=True)
        with mounted(device, tmp_path / "mnt") as journal:
            begun = entries_so_far(log)
            owed = write_and_count(journal, log)
            written = entries_so_far(log)
    assert len(owed) > 30
    seed = 11
    rng = random.Random(seed)
    cuts = PowerCuts(log, disk_bytes, memory / "base.img")
    request.addfinalizer(cuts.close)
    flushes = [at + 1 for at in range(begun, written) if cuts.entries[at].flags & FLUSH]
    between = range(begun, written)
    chosen = {
        *rng.sample(flushes, min(count // 2, len(flushes))),
        *rng.sample(between, min(count, len(between))),
    }
    places = sorted(chosen)
    open_fates = 0
    for place in places:
        for _ in range(SUBSETS):
            image = memory / "cut.img"
            open_fates += cuts.cut(place, image, rng)
            injected("F4")
            durable = max((lsn for entries, lsn in owed if entries <= place), default=0)
            check(image, tmp_path / "cut", durable, f"seed {seed}, cut after {place}")
    assert open_fates


def check(image: Path, where: Path, durable_lsn: int, label: str) -> None:
    with mounted(image, where, "-o", "loop") as journal:
        found = look(journal, every_byte=True)
        assert found.corrupt is None, f"{label}: {found.corrupt}"
        assert found.last_lsn >= durable_lsn, label
        first = lsn_before(found.segments[0].header) if found.segments else found.last_lsn
        assert held(found, first) == list(range(first + 1, found.last_lsn + 1)), label
        if found.mark:
            assert first <= found.mark.stable_lsn, label
        writer = opened(journal, recovered=found)
        marked(journal, writer.incarnation.id, found.last_lsn, found.mark.stable_lsn if found.mark else 0)
        put(writer)
        writer.sync()
        writer.close()
        assert look(journal, every_byte=True).last_lsn == found.last_lsn + 1, label
