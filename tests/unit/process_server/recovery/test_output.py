"""Pieces of a volume on their way to a file: past the page cache, through it, and both in one run."""

import errno
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.errors import CapacityError, Failed
from farshore.units import KIB, MIB
from process_server.recovery.target import DIRECT_BYTES_MIN, Output

SIZE = 8 * MIB + 512
OFFSETS = st.one_of(st.integers(0, SIZE - 1), st.integers(0, SIZE // 4096 - 1).map(lambda page: page * 4096))
LENGTHS = st.sampled_from([1, 512, 4096, 5000, 128 * KIB, 128 * KIB + 512, 3 * MIB])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "volume.raw"
    with made.open("wb") as file:
        file.truncate(SIZE)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(OFFSETS, st.lists(LENGTHS, min_size=1, max_size=4)), min_size=1, max_size=6))
def test_pieces_of_any_shape_lie_where_they_belong(path: Path, writes: list[tuple[int, list[int]]]) -> None:
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(SIZE)
    output, expected = Output(str(path), device=False), bytearray(SIZE)
    for value, (at, lengths) in enumerate(writes, 1):
        pieces: list[bytes | memoryview] = []
        end = at
        for length in lengths:
            part = min(length, SIZE - end)
            if part:
                pieces.append(os.urandom(part) if part < 9000 else bytes([value]) * part)
                end += part
        if pieces:
            output.write(at, pieces)
            expected[at:end] = b"".join(pieces)
    buffer = memoryview(mmap.mmap(-1, 9 * MIB))[:SIZE]
    output.read_into(0, buffer)
    assert buffer == expected
    output.close()
    assert path.read_bytes() == expected


def test_whole_pages_go_past_the_page_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(str(path), device=False)
    cached: list[int] = []
    through = output._write_cached

    def spy(at: int, pieces: list[bytes | memoryview]) -> None:
        cached.append(sum(map(len, pieces)))
        through(at, pieces)

    monkeypatch.setattr(output, "_write_cached", spy)
    output.write(4096, [b"a" * DIRECT_BYTES_MIN, b"b" * 3 * MIB, b"c" * 100])
    assert cached == [100]
    assert path.read_bytes()[4096 : 4096 + DIRECT_BYTES_MIN] == b"a" * DIRECT_BYTES_MIN


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_writes_is_written_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    def pwrite(fd: int, data: bytes, at: int) -> int:
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "pwrite", pwrite)
    output = Output(str(path), device=False)
    content = os.urandom(MIB)
    for at in (0, MIB):
        output.write(at, [content])
    output.close()
    assert path.read_bytes()[: 2 * MIB] == content * 2


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, CapacityError), (errno.EIO, Failed)])
def test_a_direct_write_that_fails_is_no_refusal(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def pwrite(fd: int, data: bytes, at: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(error):
        Output(str(path), device=False).write(0, [b"x" * MIB])
