"""The power-cut machinery itself: it must lose what was not flushed and keep what was."""

import mmap
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.harness.power import PowerCuts, entries_so_far, logged_device

MIB = 1 << 20


@pytest.mark.needs("qemu-storage-daemon", "loop", "fuse")
def test_flushed_writes_survive_every_cut_and_unflushed_ones_do_not_always(tmp_path: Path) -> None:
    flushed_at, written_at = 0, 0
    with logged_device(tmp_path, 64 * MIB) as (device, log):
        fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        try:
            block = memoryview(mmap.mmap(-1, 4096))
            for number in range(40):
                block[:] = bytes([number + 1]) * 4096
                os.pwrite(fd, block, number * MIB)
                if number == 19:
                    os.fdatasync(fd)
                    flushed_at = entries_so_far(log)
            written_at = entries_so_far(log)
        finally:
            os.close(fd)
        subprocess.run(["blockdev", "--flushbufs", device], check=True)
    rng = random.Random(4)
    cuts = PowerCuts(log, 64 * MIB, tmp_path / "base.img")
    lost = 0
    for _ in range(20):
        cuts.cut(written_at, tmp_path / "cut.img", rng)
        content = (tmp_path / "cut.img").read_bytes()
        whole = [content[n * MIB : n * MIB + 4096] == bytes([n + 1]) * 4096 for n in range(40)]
        assert all(whole[:20])
        lost += whole[20:].count(False)
    cuts.close()
    assert flushed_at
    assert lost
