"""The two slots of the mark."""

import os
from pathlib import Path

import pytest

from agent.journal.errors import JournalFailed
from agent.journal.mark import (
    CLEAN,
    RESYNC_REQUIRED,
    SLOT_BYTES,
    SLOT_STRIDE,
    Mark,
    MarkFile,
    decode_slot,
    load_mark,
)
from farshore.errors import CorruptRecord
from tests.harness.journal import BOOT, DISK


def mark(lsn: int, flags: int = 0) -> Mark:
    return Mark(bytes(range(16)), lsn, lsn - 1, flags, 7, DISK, BOOT)


def test_what_is_written_is_read_and_the_newest_counts(tmp_path: Path) -> None:
    assert load_mark(tmp_path) is None
    file = MarkFile.open(tmp_path)
    for lsn in range(1, 6):
        written = file.write(mark(lsn, CLEAN | RESYNC_REQUIRED))
        assert load_mark(tmp_path) == written
        assert written.serial == lsn
    file.close()
    again = MarkFile.open(tmp_path)
    assert again.write(mark(9)).serial == 6
    again.close()


@pytest.mark.parametrize("torn", range(0, SLOT_BYTES, 8))
def test_a_slot_torn_anywhere_leaves_the_other(tmp_path: Path, torn: int) -> None:
    file = MarkFile.open(tmp_path)
    file.write(mark(1))
    before = (tmp_path / "mark").read_bytes()
    file.write(mark(2))
    file.close()
    at = 0 * SLOT_STRIDE  # where serial 2 goes
    after = bytearray((tmp_path / "mark").read_bytes())
    after[at + torn : at + SLOT_BYTES] = before[at + torn : at + SLOT_BYTES]
    (tmp_path / "mark").write_bytes(after)
    found = load_mark(tmp_path)
    assert found
    assert found.durable_lsn == 1


def test_no_valid_slot_is_corruption_not_absence(tmp_path: Path) -> None:
    (tmp_path / "mark").write_bytes(os.urandom(8192))
    with pytest.raises(CorruptRecord):
        load_mark(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    slot = mark(3).encode()
    assert decode_slot(slot) == mark(3)
    for bit in range(len(slot) * 8):
        changed = bytearray(slot)
        changed[bit // 8] ^= 1 << bit % 8
        assert decode_slot(bytes(changed)) is None


def test_an_error_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MarkFile.open(tmp_path)
    file.write(mark(1))

    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(JournalFailed):
        file.write(mark(2))
    monkeypatch.undo()
    with pytest.raises(JournalFailed):
        file.write(mark(3))
    file.close()
