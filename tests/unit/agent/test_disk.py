"""Reads from the page cache and past it: of what was written a moment ago, at any offset, into any place."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.replicate import disk as module
from agent.replicate.disk import OpenDisk, is_cached
from agent.replicate.ipc import Volume
from farshore.units import KIB, MIB

SIZE = 4 * MIB + 512


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "StatePageReader", lambda path: None)
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(SIZE))
    return disk


@pytest.fixture
def buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, MIB))


def forget(path: Path) -> int:
    """Put the file on its device and out of the page cache; return a descriptor of it."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def test_what_the_page_cache_does_not_hold_is_read_past_it(path: Path, buffer: memoryview) -> None:
    content, fd = path.read_bytes(), forget(path)
    disk = OpenDisk(Volume(b"v" * 16, str(path), ""))
    assert not is_cached(fd, MIB, MIB)
    assert disk.read(buffer, MIB) == MIB
    assert buffer == content[MIB : 2 * MIB]
    assert not is_cached(fd, MIB, MIB)
    os.pread(fd, MIB, MIB)
    assert is_cached(fd, MIB, MIB)


def test_a_write_that_only_the_page_cache_holds_is_seen(path: Path, buffer: memoryview) -> None:
    fd = forget(path)
    os.pwrite(fd, b"new" * 100, MIB + 5000)
    assert not is_cached(fd, MIB, MIB)
    OpenDisk(Volume(b"v" * 16, str(path), "")).read(buffer, MIB)
    assert bytes(buffer[5000:5300]) == b"new" * 100


@pytest.mark.parametrize(("offset", "length"), [(512, 4 * KIB), (4 * KIB, 512), (4 * MIB, 512)])
def test_what_no_direct_read_can_take_is_read_all_the_same(
    path: Path, buffer: memoryview, offset: int, length: int
) -> None:
    content, _ = path.read_bytes(), forget(path)
    assert OpenDisk(Volume(b"v" * 16, str(path), "")).read(buffer[:length], offset) == length
    assert buffer[:length] == content[offset : offset + length]


def test_the_end_of_the_disk_is_a_short_read(path: Path, buffer: memoryview) -> None:
    content, _ = path.read_bytes(), forget(path)
    assert OpenDisk(Volume(b"v" * 16, str(path), "")).read(buffer, 4 * MIB) == 512
    assert buffer[:512] == content[4 * MIB :]


def test_a_heap_that_is_kept_is_not_faulted_in_again() -> None:
    script = (
        "import resource, sys\n"
        "from farshore import heap\n"
        "if sys.argv[1] == 'kept': heap.keep()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def frame(): return [bytearray(100_000) for _ in range(10)]\n"
        "frame()\n"
        "before = faults()\n"
        "for _ in range(50): frame()\n"
        "print(faults() - before)\n"
    )
    counts = [
        int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, check=True).stdout)
        for how in ("kept", "as it is")
    ]
    assert counts[0] < counts[1] / 10
