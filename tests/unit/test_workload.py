"""The writer's memory of what was answered."""

import os
from pathlib import Path

import pytest

from farshore.stamps import Workload
from farshore.workload import Ledger, LedgerState

WORKLOAD = Workload(seed=1, first_block=0, block_count=64)


def test_a_ledger_that_is_begun_anew_can_be_read_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo makes it before it starts the writer, which makes it again, and looks at it meanwhile."""
    path = tmp_path / "ledger"
    first = Ledger(path, WORKLOAD, writes_max=1000)
    first.record(LedgerState(9, 8, 7, 0, 0))
    seen: list[bytes] = []
    truncate = os.truncate

    def noted(fd: int, length: int) -> None:
        seen.append(path.read_bytes()[:8])
        truncate(fd, length)
        seen.append(path.read_bytes()[:8])

    monkeypatch.setattr(os, "truncate", noted)
    second = Ledger(path, WORKLOAD, writes_max=1000)
    assert seen == [b"FARLEDGR", b"FARLEDGR"]
    assert first.state() == second.state() == LedgerState(0, 0, 0, 0, 0)
    second.record(LedgerState(3, 2, 1, 0, 0))
    assert first.state().acked == 2
    first.close()
    second.close()
