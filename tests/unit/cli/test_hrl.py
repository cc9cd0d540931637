"""``farshore hrl``: what people and scripts are told of a segment."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agent.journal.segments import list_segments, segment_path
from farshore.cli.hrl import command
from tests.harness.journal import marked, opened, put

INTEGRITY = 7


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Two sealed segments and an open one; the mark vouches for all but the last three batches."""
    directory = tmp_path / "j"
    writer = opened(directory)
    while len(list_segments(directory)) < 3:
        put(writer, 4, 4096)
    put(writer)
    marked(directory, writer.incarnation.id, writer.sync())
    for _ in range(3):
        put(writer)
    writer.close()
    return directory


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    """Exit code, JSON of stdout, stderr."""
    code = command.main([*map(str, words), "--json"], standalone_mode=False)
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def files(journal: Path) -> list[Path]:
    return [path for _, path in list_segments(journal)]


def test_a_sound_journal(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = call(capsys, "verify", *files(journal))
    assert (code, result["ok"], result["torn_tail_bytes"], err) == (0, True, 0, "")
    assert [file["sealed"] for file in result["files"]] == [True, True, False]


def test_a_cut_above_the_mark_is_a_torn_tail(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, before, _ = call(capsys, "verify", files(journal)[2])
    end = before["files"][0]["log_bytes"]
    os.truncate(files(journal)[2], end - 100)
    code, result, _ = call(capsys, "verify", *files(journal))
    assert (code, result["ok"]) == (0, True)
    assert result["torn_tail_bytes"] == 600 - 100


def test_a_cut_below_the_mark_is_lost_data(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(files(journal)[2], 5000)
    code, result, err = call(capsys, "verify", *files(journal))
    assert (code, result["ok"]) == (INTEGRITY, False)
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "were durable and are not here" in result["problems"][0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_flipped_bit_in_a_durable_record(
    journal: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = segment_path(journal, number)
    raw = bytearray(path.read_bytes())
    raw[4096 + 300] ^= 4
    path.write_bytes(raw)
    code, result, _ = call(capsys, "verify", *files(journal))
    assert code == INTEGRITY
    assert [file["ok"] for file in result["files"]] == [at != number for at in (1, 2, 3)]


def test_a_missing_segment_between_two(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(journal)[1].unlink()
    code, result, _ = call(capsys, "verify", *files(journal))
    assert code == INTEGRITY
    assert "missing between" in result["problems"][0]


def test_without_a_mark_nothing_is_owed(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (journal / "mark").unlink()
    os.truncate(files(journal)[2], 5000)
    code, result, _ = call(capsys, "verify", *files(journal))
    assert (code, result["ok"], result["torn_tail_bytes"] > 0) == (0, True, True)


def test_where_the_next_incarnation_goes_on_is_owed_and_no_more(
    journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(journal).close()
    code, result, _ = call(capsys, "verify", *files(journal))
    assert (code, result["torn_tail_bytes"]) == (0, 0)
    assert result["files"][2]["durable_lsn"] == result["files"][2]["last_lsn"]
    os.truncate(files(journal)[2], files(journal)[2].stat().st_size - 1)
    assert call(capsys, "verify", *files(journal))[0] == INTEGRITY


@pytest.mark.parametrize("content", [b"", b"text", bytes(100), b"\xff" * 8192])
def test_what_is_no_segment(journal: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    segment_path(journal, 9).write_bytes(content)
    code, result, _ = call(capsys, "verify", segment_path(journal, 9))
    assert code == INTEGRITY
    assert result["files"][0]["problem"]


def test_a_segment_that_was_prepared_and_not_begun(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segment_path(journal, 9).write_bytes(bytes(65536))
    code, result, _ = call(capsys, "verify", segment_path(journal, 9))
    assert (code, result["files"][0]["begun"]) == (0, False)


def test_a_broken_mark_is_said(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (journal / "mark").write_bytes(b"\1" * 8192)
    assert call(capsys, "verify", *files(journal))[0] == INTEGRITY
    _, result, _ = call(capsys, "inspect", journal / "mark")
    assert not result["files"][0]["ok"]


def test_inspect_shows_header_records_and_mark(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = call(capsys, "inspect", "--batches", files(journal)[2], journal / "mark")
    segment, mark = result["files"]
    assert code == 0
    assert (segment["number"], segment["ordinal"], segment["sector_bytes"]) == (3, 1, 512)
    assert segment["records"] == {"write": 8}
    assert [len(batch["records"]) for batch in segment["listed"]] == [4, 1, 1, 1, 1]
    assert segment["listed"][0]["records"][0]["lsn"] == segment["first_lsn"]
    assert mark["durable_lsn"] == segment["last_lsn"] - 3
    assert command.main(["inspect", "--batches", str(files(journal)[2])], standalone_mode=False) == 0
    assert "LSN" in capsys.readouterr().out


def test_a_copy_under_any_name(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.hrl").write_bytes(files(journal)[0].read_bytes())
    code, result, _ = call(capsys, "verify", tmp_path / "x.hrl")
    assert (code, result["files"][0]["sealed"]) == (0, True)
