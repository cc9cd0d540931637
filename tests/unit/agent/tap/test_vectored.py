"""Arrays of writes: order, joining, refusals."""

import errno
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.tap.vectored import ROWS_MAX, Ints, VectoredWriter, address_of, aligned, coalesce
from farshore.units import KIB, MIB

Bytes = npt.NDArray[np.uint8]
rows = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8), st.integers(0, 40)), max_size=40)


@pytest.fixture(scope="module")
def disk_folder() -> Iterator[Path]:
    """On a file system that has O_DIRECT; /tmp may be a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def as_arrays(content: Bytes, table: list[tuple[int, int, int]]) -> tuple[Ints, Ints, Ints]:
    offsets, lengths, starts = (np.array(column, np.int64) for column in zip(*table, strict=True))
    return offsets, lengths, starts + address_of(content)


@pytest.mark.parametrize("use_aio", [True, False])
@given(table=rows.filter(bool))
def test_rows_are_written_in_order_where_they_overlap(
    tmp_path_factory: pytest.TempPathFactory, use_aio: bool, table: list[tuple[int, int, int]]
) -> None:
    content = np.arange(48, dtype=np.uint8)
    model = bytearray(48)
    for offset, length, start in table:
        model[offset : offset + length] = bytes(content[start : start + length])
    path = tmp_path_factory.mktemp("rows") / "disk"
    path.write_bytes(bytes(48))
    fd = os.open(path, os.O_RDWR)
    writer = VectoredWriter(use_aio=use_aio)
    try:
        writer.write(fd, *as_arrays(content, table))
    finally:
        writer.close()
        os.close(fd)
    assert path.read_bytes()[:48] == bytes(model)


long_rows = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from([1, 8, 16, 16, 24]), st.integers(0, 255)),
    min_size=2,
    max_size=12,
)


@settings(max_examples=50)
@given(table=long_rows)
def test_long_rows_past_the_page_cache_land_in_order_with_the_others(
    disk_folder: Path, table: list[tuple[int, int, int]]
) -> None:
    """Rows of 32 KiB to 96 KiB at multiples of 32 KiB; some short and unaligned ones go between them."""
    unit = 8 * KIB
    path = disk_folder / "disk"
    path.write_bytes(bytes(48 * unit))
    model = bytearray(48 * unit)
    held, offsets, lengths = [], [], []
    for at, units, fill in table:
        length = units * unit if units > 1 else 1536
        memory = aligned(length)
        memory[:] = fill
        offset = at * 2 * unit if units > 1 else at * 2 * unit + 512
        model[offset : offset + length] = bytes([fill]) * length
        held.append(memory)
        offsets.append(offset)
        lengths.append(length)
    arrays = np.array(offsets, np.int64), np.array(lengths, np.int64)
    addresses = np.array([address_of(memory) for memory in held], np.int64)
    fd, direct_fd = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR | os.O_DIRECT)
    writer = VectoredWriter()
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1

    try:
        writer.write(fd, *arrays, addresses, between, direct_fd=direct_fd)
    finally:
        writer.close()
        os.close(fd)
        os.close(direct_fd)
    assert path.read_bytes() == bytes(model)
    assert not writer.direct_refused
    assert calls >= 2


def test_rows_that_overlap_are_never_under_way_together(
    disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[tuple[int, int]]] = []
    submit = VectoredWriter._submit

    def noted(
        self: VectoredWriter, fd: int, offsets: Ints, lengths: Ints, addresses: Ints, direct_fd: int
    ) -> None:
        assert direct_fd >= 0
        groups.append(list(zip(offsets.tolist(), (offsets + lengths).tolist(), strict=True)))
        submit(self, fd, offsets, lengths, addresses, direct_fd)

    monkeypatch.setattr(VectoredWriter, "_submit", noted)
    path = disk_folder / "disk"
    path.write_bytes(bytes(MIB))
    memory = aligned(128 * KIB)
    offsets = np.array([0, 64, 128, 512, 640, 0], np.int64) * KIB
    lengths = np.full(len(offsets), 128 * KIB, np.int64)
    addresses = np.full(len(offsets), address_of(memory), np.int64)
    fd, direct_fd = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR | os.O_DIRECT)
    writer = VectoredWriter()
    try:
        writer.write(fd, offsets, lengths, addresses, direct_fd=direct_fd)
    finally:
        writer.close()
        os.close(fd)
        os.close(direct_fd)
    assert sum(map(len, groups)) == len(offsets)
    for group in groups:
        for (_, end), (start, _) in pairwise(sorted(group)):
            assert end <= start


def test_a_file_that_does_not_take_direct_writes_gets_them_through_the_page_cache(disk_folder: Path) -> None:
    path = disk_folder / "disk"
    path.write_bytes(bytes(MIB))
    memory = aligned(256 * KIB)
    memory[:] = 7
    fd = os.open(path, os.O_RDWR)
    wrong_fd = os.open(path, os.O_RDONLY | os.O_DIRECT)  # refuses each write
    writer = VectoredWriter()
    rows = np.array([0, 512 * KIB], np.int64), np.full(2, 256 * KIB, np.int64)
    addresses = np.full(2, address_of(memory), np.int64)
    try:
        writer.write(fd, *rows, addresses, direct_fd=wrong_fd)
        assert writer.direct_refused
        writer.write(fd, *rows, addresses, direct_fd=wrong_fd)
    finally:
        writer.close()
        os.close(fd)
        os.close(wrong_fd)
    half = b"\x07" * (256 * KIB) + bytes(256 * KIB)
    assert path.read_bytes() == half + half


@given(rows.filter(bool))
def test_joining_changes_no_byte_and_no_order(table: list[tuple[int, int, int]]) -> None:
    content = np.zeros(1, np.uint8)
    before = as_arrays(content, table)
    after = coalesce(*before)

    def flat(arrays: tuple[Ints, Ints, Ints]) -> list[tuple[int, int]]:
        return [
            (offset + at, address + at)
            for offset, length, address in zip(*(a.tolist() for a in arrays), strict=True)
            for at in range(length)
        ]

    assert flat(before) == flat(after)


def test_a_sequence_of_neighbours_becomes_one_row() -> None:
    at = np.arange(100, dtype=np.int64) * 512
    offsets, lengths, addresses = coalesce(at + 4096, np.full(100, 512, np.int64), at + 77)
    assert (offsets.tolist(), lengths.tolist(), addresses.tolist()) == ([4096], [51200], [77])


@pytest.mark.parametrize("use_aio", [True, False])
def test_more_rows_than_one_call_takes(tmp_path: Path, use_aio: bool) -> None:
    count = ROWS_MAX * 2 + 30
    content = np.frombuffer(os.urandom(count * 512), np.uint8)
    order = np.random.default_rng(1).permutation(count).astype(np.int64)
    path = tmp_path / "disk"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1

    writer = VectoredWriter(use_aio=use_aio)
    starts = np.arange(count, dtype=np.int64) * 512
    writer.write(fd, order * 512, np.full(count, 512, np.int64), starts + address_of(content), between)
    writer.close()
    os.close(fd)
    assert calls == 4
    written = np.frombuffer(path.read_bytes(), np.uint8).reshape(count, 512)
    assert (written[order] == content.reshape(count, 512)).all()


@pytest.mark.parametrize("use_aio", [True, False])
def test_a_write_that_is_refused_raises_its_reason(tmp_path: Path, use_aio: bool) -> None:
    path = tmp_path / "disk"
    path.touch()
    content = np.zeros(4096, np.uint8)
    fd = os.open(path, os.O_RDWR)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = VectoredWriter(use_aio=use_aio)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
        table = [(0, 4096, 0), (5000, 4096, 0)]
        with pytest.raises(OSError, match="large") as caught:
            writer.write(fd, *as_arrays(content, table))
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
        writer.close()
        os.close(fd)


def test_a_closed_descriptor_raises() -> None:
    content = np.zeros(4096, np.uint8)
    writer = VectoredWriter()
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.write(1 << 20, *as_arrays(content, [(0, 512, 0), (4096, 512, 0)]))
    writer.close()
