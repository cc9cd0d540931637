"""Files of the journal are durable under their names before anybody rests on them, and twins never mix."""

import os
import shutil
from pathlib import Path

import pytest

from agent.journal import segments
from agent.journal.segments import segment_path
from farshore.units import KIB
from tests.harness.journal import held, look, marked, opened, put


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, renamed or removed, in order: directories as ``folder``, files by their kind."""
    found: list[str] = []
    fsync, rename, unlink = os.fsync, os.rename, Path.unlink

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        found.append("sync folder" if path.is_dir() else f"sync {path.name.partition('-')[0]}")

    def noted_rename(source: Path, target: Path) -> None:
        rename(source, target)
        found.append(f"{source.name.partition('-')[0]} becomes {target.name.partition('-')[0]}")

    def noted_unlink(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        found.append(f"no more {path.name.partition('-')[0]}")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(Path, "unlink", noted_unlink)
    return found


def test_a_segment_is_durable_with_its_name_before_it_is_used(tmp_path: Path, steps: list[str]) -> None:
    os.close(segments.allocate(tmp_path, 1, 64 * KIB))
    assert steps == ["sync free", "free becomes seg", "sync folder"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_freed_segment_has_durably_lost_its_name_before_it_is_overwritten(
    tmp_path: Path, steps: list[str], keep: bool
) -> None:
    os.close(segments.allocate(tmp_path, 1, 64 * KIB))
    steps.clear()
    segments.release(tmp_path, segment_path(tmp_path, 1), keep=keep)
    assert steps == ["seg becomes free" if keep else "no more seg", "sync folder"]


def test_a_journals_folder_is_durable_in_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(segments, "sync_directory", synced.append)
    opened(tmp_path / "j").close()
    assert tmp_path in synced
    assert tmp_path / "j" in synced


def test_a_batch_of_a_twin_incarnation_never_counts(tmp_path: Path) -> None:
    """Two openings go on from the same record; what the first wrote may lie where the second writes."""
    writer = opened(tmp_path / "one")
    put(writer, 3)
    marked(tmp_path / "one", writer.incarnation.id, writer.sync())
    writer.close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("one", "two"):
        twin = opened(tmp_path / name)
        put(twin, 2)
        marked(tmp_path / name, twin.incarnation.id, 3)
        twin.sync()
        twin.close()
    assert held(look(tmp_path / "one")) == [1, 2, 3, 4, 5]
    stale = segment_path(tmp_path / "two", 2).read_bytes()
    with segment_path(tmp_path / "one", 2).open("r+b") as file:
        file.seek(4096)
        file.write(stale[4096:])
    found = look(tmp_path / "one")
    assert held(found) == [1, 2, 3]
    assert found.last_lsn == 3


def test_of_many_damaged_files_the_newest_are_kept(tmp_path: Path) -> None:
    count = segments.BAD_FILES_MAX + 5
    for number in range(1, count + 1):
        segment_path(tmp_path, number).write_bytes(b"damaged")
        segments.quarantine(tmp_path, segment_path(tmp_path, number), "bad record")
    kept = sorted(int(path.name[4:24]) for path in tmp_path.glob("bad-*"))
    assert kept == list(range(count - segments.BAD_FILES_MAX + 1, count + 1))
    assert segments.highest_number(tmp_path) == count
