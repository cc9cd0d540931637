"""The dirty map against a set of region numbers."""

import os
import random
from pathlib import Path

import pytest

from agent.journal.dirty import HEADER_BYTES, DirtyMap, region_bytes_for
from agent.journal.errors import JournalFailed
from farshore.errors import CorruptRecord
from farshore.units import GIB, KIB, MIB, TIB


@pytest.mark.parametrize(
    ("volume_bytes", "region_bytes"),
    [
        (512, 64 * KIB),
        (TIB, 64 * KIB),
        (TIB + 512, 128 * KIB),
        (2 * TIB, 128 * KIB),
        (10 * TIB, MIB),
        (64 * TIB, 4 * MIB),
    ],
)
def test_region_size(volume_bytes: int, region_bytes: int) -> None:
    assert region_bytes_for(volume_bytes) == region_bytes


def test_random_writes_against_a_model(tmp_path: Path) -> None:
    rng = random.Random(7)
    size = 3 * GIB + 512
    dirty = DirtyMap.create(tmp_path / "dirty", size)
    model: set[int] = set()
    for _ in range(2000):
        if rng.random() < 0.8:
            offset = rng.randrange(0, size // 512) * 512
            length = min(rng.choice([512, 4096, 200 * KIB, 40 * MIB]), size - offset)
            touched = set(
                range(offset // dirty.region_bytes, (offset + length - 1) // dirty.region_bytes + 1)
            )
            assert dirty.set(offset, length) == len(touched - model)
            model |= touched
            assert dirty.is_dirty(offset, length)
        else:
            gone = rng.sample(sorted(model), min(len(model), 50))
            assert dirty.clear([*gone, *gone]) == len(gone)
            model -= set(gone)
        assert dirty.count == len(model)
    assert dirty.regions().tolist() == sorted(model)
    dirty.write_bits()
    again = DirtyMap.open(tmp_path / "dirty")
    assert again.regions().tolist() == sorted(model)
    again.close()
    dirty.close()


def test_a_set_bit_is_in_the_file_when_set_returns(tmp_path: Path) -> None:
    dirty = DirtyMap.create(tmp_path / "dirty", GIB)
    dirty.set(100 * MIB, 4096)
    assert DirtyMap.open(tmp_path / "dirty").regions().tolist() == [1600]
    dirty.set(200 * MIB, 4096, write=False)
    assert DirtyMap.open(tmp_path / "dirty").regions().tolist() == [1600]
    dirty.sync()
    assert DirtyMap.open(tmp_path / "dirty").regions().tolist() == [1600, 3200]


def test_all_of_the_file_is_there_from_the_beginning(tmp_path: Path) -> None:
    dirty = DirtyMap.create(tmp_path / "dirty", TIB)
    status = os.stat(tmp_path / "dirty")
    assert status.st_size == HEADER_BYTES + 2 * MIB
    assert status.st_blocks * 512 >= status.st_size
    dirty.close()


def test_a_region_written_again_during_its_copy_stays_dirty(tmp_path: Path) -> None:
    dirty = DirtyMap.create(tmp_path / "dirty", GIB)
    dirty.set(0, 10 * 64 * KIB)
    first = dirty.begin_round()
    regions = dirty.regions().tolist()
    dirty.set(3 * 64 * KIB, 512)
    assert dirty.clear(regions, copy_round=first) == 9
    assert dirty.regions().tolist() == [3]
    second = dirty.begin_round()
    assert dirty.clear([3], copy_round=first) == 0, "an earlier round"
    assert dirty.clear([3], copy_round=second) == 1


def test_sync_covers_bits_that_only_another_call_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty = DirtyMap.create(tmp_path / "dirty", GIB)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    dirty.sync()
    assert synced == []
    dirty.set(0, 512)
    dirty.sync()
    dirty.set(0, 512)
    dirty.sync()
    assert len(synced) == 1


def test_an_error_is_final_and_the_bits_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty = DirtyMap.create(tmp_path / "dirty", GIB)

    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    dirty.set(0, 512)
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(JournalFailed):
        dirty.sync()
    monkeypatch.undo()
    with pytest.raises(JournalFailed):
        dirty.sync()
    dirty.set(MIB, 512, write=False)
    assert dirty.count == 2


def test_bounds_and_nothing(tmp_path: Path) -> None:
    dirty = DirtyMap.create(tmp_path / "dirty", GIB)
    assert dirty.set(0, 0) == 0
    with pytest.raises(ValueError, match="beyond"):
        dirty.set(GIB, 512)
    assert dirty.clear([]) == 0


@pytest.mark.parametrize("at", [0, 8, 12, 16, 4095])
def test_a_damaged_header_is_refused(tmp_path: Path, at: int) -> None:
    DirtyMap.create(tmp_path / "dirty", GIB).close()
    raw = bytearray((tmp_path / "dirty").read_bytes())
    raw[at] ^= 1
    (tmp_path / "dirty").write_bytes(raw)
    with pytest.raises(CorruptRecord):
        DirtyMap.open(tmp_path / "dirty")
    os.truncate(tmp_path / "dirty", 100)
    with pytest.raises(CorruptRecord):
        DirtyMap.open(tmp_path / "dirty")


def test_a_map_cut_short_is_refused(tmp_path: Path) -> None:
    DirtyMap.create(tmp_path / "dirty", GIB).close()
    os.truncate(tmp_path / "dirty", HEADER_BYTES + 100)
    with pytest.raises(CorruptRecord):
        DirtyMap.open(tmp_path / "dirty")
