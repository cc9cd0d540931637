"""The state page, with a writer that does its worst."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.journal.state import BITMAP, SLOT_STRIDE, StatePageReader, StatePageWriter, load_state
from farshore.errors import Unreachable
from tests.harness.journal import BOOT

HOSTILE = """
import sys
from pathlib import Path
from agent.journal.state import StatePageWriter
page = StatePageWriter.create(Path(sys.argv[1]), incarnation=bytes(16), boot_id=bytes(16))
n = int(sys.argv[2])
print("ready", flush=True)
while True:
    n += 1
    page.update(captured_lsn=n, durable_lsn=n, applied_lsn=n, stable_lsn=n, heartbeat_ns=n,
                heartbeat_monotonic_ns=n, dirty_epoch=n, dirty_regions=n,
                incarnation=n.to_bytes(16, "little"))
"""


@contextmanager
def hostile(path: Path, first: int) -> Iterator[None]:
    """A process that updates the page as fast as it can; killed with -9 in the end."""
    command = [sys.executable, "-c", HOSTILE, str(path), str(first)]
    root = Path(__file__).parents[4]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def test_fields_stay_until_they_are_changed(tmp_path: Path) -> None:
    page = StatePageWriter.create(tmp_path / "state", incarnation=bytes(range(16)), boot_id=BOOT)
    reader = StatePageReader(tmp_path / "state")
    with pytest.raises(Unreachable):
        reader.read()
    page.update(captured_lsn=5, durable_lsn=4)
    page.update(capture_mode=BITMAP, dirty_regions=3)
    state = reader.read()
    assert (state.captured_lsn, state.durable_lsn, state.capture_mode, state.dirty_regions) == (
        5,
        4,
        BITMAP,
        3,
    )
    assert (state.process_id, state.boot_id, state.incarnation) == (os.getpid(), BOOT, bytes(range(16)))
    assert load_state(tmp_path / "state") == state
    page.close()
    reader.close()


def test_a_new_writer_goes_on_from_the_serial(tmp_path: Path) -> None:
    first = StatePageWriter.create(tmp_path / "state", incarnation=bytes(16), boot_id=BOOT)
    for lsn in range(7):
        first.update(captured_lsn=lsn)
    first.close()
    second = StatePageWriter.create(tmp_path / "state", incarnation=bytes(16), boot_id=BOOT)
    second.update(captured_lsn=1)
    state = load_state(tmp_path / "state")
    assert state
    assert (state.serial, state.captured_lsn) == (8, 1)
    second.close()


def test_no_page_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state") is None
    (tmp_path / "state").write_bytes(b"short")
    assert load_state(tmp_path / "state") is None
    with pytest.raises(OSError, match="state page"):
        StatePageReader(tmp_path / "state")


def test_either_slot_may_be_garbage(tmp_path: Path) -> None:
    page = StatePageWriter.create(tmp_path / "state", incarnation=bytes(16), boot_id=BOOT)
    page.update(captured_lsn=1)
    page.update(captured_lsn=2)
    page.close()
    whole = (tmp_path / "state").read_bytes()
    for at, expected in ((0, 1), (SLOT_STRIDE, 2)):
        torn = bytearray(whole)
        torn[at + 40 : at + 48] = b"\xff" * 8
        (tmp_path / "state").write_bytes(torn)
        state = load_state(tmp_path / "state")
        assert state
        assert state.captured_lsn == expected


def test_no_read_is_a_mixture_while_another_process_writes_without_pause(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with hostile(path, 0):
        reader = StatePageReader(path)
        newest = reads = 0
        while reads < 20_000 or newest < 20_000:
            try:
                state = reader.read()
            except Unreachable:  # nothing published yet
                assert not reads
                continue
            n = state.captured_lsn
            numbers = {state.durable_lsn, state.applied_lsn, state.stable_lsn, state.heartbeat_ns, n}
            numbers |= {state.dirty_epoch, state.dirty_regions, int.from_bytes(state.incarnation, "little")}
            assert numbers == {n}
            assert n >= newest
            newest, reads = n, reads + 1
        reader.close()


def test_a_writer_killed_anywhere_leaves_a_state(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = 0
    for attempt in range(10):
        with hostile(path, first):
            time.sleep(0.003 * attempt)
        state = load_state(path)
        if attempt:
            assert state
            assert state.captured_lsn >= first
            first = state.captured_lsn
