"""A tap's journal in a process of its own, for tests that kill it.

``python -m tests.harness.journal_process DIR BATCHES clean|abandon`` recovers the journal in DIR, appends
stamped batches, syncs, marks, frees and prepares as a tap does, and says on stdout what a workload may rely
on: ``A lsn`` appended, ``D lsn`` durable, ``F``/``X`` the journal said full/failed. The reader of stdout is
the ledger: what it has read is owed, however the process ends.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent.journal.dirty import DirtyMap
from agent.journal.errors import JournalFailed, JournalFull
from agent.journal.mark import Mark, MarkFile
from agent.journal.recovery import Recovered
from farshore.errors import CapacityError, IntegrityError
from farshore.units import GIB, KIB
from tests.harness.journal import BOOT, DISK, look, opened, put

VAULTED_BEHIND = 60
"""Records that the pretended vault is behind the durable LSN: so some segments are freed and some are not."""


def say(*words: object) -> None:
    # One write(2) a line: what was said is in the pipe when the process is killed.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Tap:
    """What a tap does with its journal, without a disk."""

    def __init__(self, directory: Path, found: Recovered) -> None:
        self.writer = opened(directory, recovered=found, quota_bytes=512 * KIB)
        self._doing: Callable[[], object] = self.writer.sync
        self._mark = MarkFile.open(directory)
        self._dirty = DirtyMap.create(directory / "dirty", GIB)
        self._write_mark(found.mark.stable_lsn if found.mark else 0)

    def append(self) -> None:
        self._doing = self.writer.sync
        try:
            say("A", put(self.writer, 3, 1000))
        except JournalFull:
            say("F")

    def make_durable(self, number: int) -> None:
        self._doing = self.writer.sync
        durable = self.writer.sync()
        say("D", durable)
        self._doing = lambda: self._write_mark(durable)
        self._doing()
        self.writer.free(durable - VAULTED_BEHIND, durable)
        self.writer.prepare()
        self._dirty.set(number * 64 * KIB, 512)
        self._doing = self._dirty.sync
        self._doing()

    def try_again(self) -> None:
        """What a tap must never get away with."""
        for _ in range(3):
            with suppress(JournalFailed):
                self._doing()
                say("S")

    def _write_mark(self, stable_lsn: int) -> None:
        self._mark.write(
            Mark(self.writer.incarnation.id, self.writer.durable_lsn, stable_lsn, 0, 0, DISK, BOOT)
        )


def run(directory: Path, batches: int, end: str) -> int:
    found = look(directory)
    say("R", found.last_lsn, found.corrupt or "")
    if found.corrupt:
        return IntegrityError.exit_code
    tap: Tap | None = None
    try:
        tap = Tap(directory, found)
        for number in range(batches):
            tap.append()
            if number % 4 == 3:
                tap.make_durable(number)
        if end == "clean":
            tap.writer.seal(clean=True)
            say("D", tap.writer.durable_lsn)
        tap.writer.close()
    except (JournalFull, OSError):  # OSError: the dirty map, which a tap makes when a volume is protected
        say("F")
        return CapacityError.exit_code
    except JournalFailed as error:
        say("X", error)
        if tap:
            tap.try_again()
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
