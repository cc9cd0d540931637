"""Reads from the page cache and past it: of what was written a moment ago, at any offset, into any place."""

import mmap
import os
import stat
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


@pytest.mark.parametrize(("offset", "length"), [(0, MIB), (MIB, 512), (512, 4 * KIB), (4 * MIB, 512)])
@pytest.mark.parametrize("direct", [True, False])
def test_what_others_write_past_its_page_cache_is_read_past_it_too(
    path: Path, buffer: memoryview, monkeypatch: pytest.MonkeyPatch, offset: int, length: int, direct: bool
) -> None:
    # A file stands for the block device: what matters is which descriptor is asked, and what is forgotten.
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    content = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    assert is_cached(fd, 0, MIB)
    forgotten, direct_reads = [], []
    preadv, fadvise = os.preadv, os.posix_fadvise
    disk = OpenDisk(Volume(b"v" * 16, str(path), "", 3))
    if not direct:
        os.close(disk._direct_fd)
        disk._direct_fd = -1

    def noting(fd: int, buffers: list[memoryview], at: int) -> int:
        direct_reads.append(fd == disk._direct_fd)
        return preadv(fd, buffers, at)

    def forgetting(fd: int, at: int, size: int, advice: int) -> None:
        forgotten.append((at, size))
        fadvise(fd, at, size, advice)

    monkeypatch.setattr(os, "preadv", noting)
    monkeypatch.setattr(os, "posix_fadvise", forgetting)
    assert disk.read(buffer[:length], offset) == length
    assert buffer[:length] == content[offset : offset + length]
    if direct_reads[-1]:
        assert not forgotten
    else:
        ((at, size),) = forgotten
        assert at % 4096 == size % 4096 == 0
        assert at <= offset < offset + length <= at + size
    assert direct_reads[0] is direct


def test_a_disk_is_let_go_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page:
        closed = False

        def close(self) -> None:
            self.closed = True

    page = Page()
    monkeypatch.setattr(module, "StatePageReader", lambda path: page)
    before = set(os.listdir("/proc/self/fd"))
    disk = OpenDisk(Volume(b"v" * 16, str(path), "", 3))
    disk.close()
    assert page.closed
    assert set(os.listdir("/proc/self/fd")) == before
