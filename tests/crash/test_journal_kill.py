"""kill -9, full and failing disks against a ledger outside the process (F1, F3, F10, F11; I1, I3, I4)."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agent.journal.errors import JournalFailed
from agent.journal.recovery import lsn_before
from farshore.failpoints import ENVIRONMENT, known_failpoints
from tests.harness.faults import Injected
from tests.harness.journal import held, look, marked, opened, put

ROOT = Path(__file__).parents[2]
SIGKILL = -9


@dataclass(slots=True)
class Ledger:
    """What the process said, over all its lives."""

    appended: int = 0
    durable: int = 0

    def read(self, text: str) -> list[str]:
        """Enter what was said; returns the kinds of lines."""
        kinds = []
        for line in text.splitlines():
            kind, _, value = line.partition(" ")
            kinds.append(kind)
            if kind == "A":
                assert int(value) > self.appended, "an LSN was given twice"
                self.appended = int(value)
            elif kind == "D":
                self.durable = max(self.durable, int(value))
            elif kind == "R":
                assert value.split()[0] == value.strip(), f"recovery called it corrupt: {value}"
        return kinds

    def check(self, directory: Path) -> None:
        """The kernel lived: everything appended must be here, and right."""
        found = look(directory, every_byte=True)
        assert found.corrupt is None
        assert found.last_lsn >= self.appended
        first = lsn_before(found.segments[0].header) if found.segments else found.last_lsn
        assert held(found, first) == list(range(first + 1, found.last_lsn + 1))


def run(
    directory: Path,
    batches: int,
    end: str,
    *,
    before: Sequence[str] = (),
    failpoints: str = "",
) -> tuple[int, str]:
    """Run a journal process to its end; returns its exit code (negative: signal) and what it said."""
    command = [
        *before,
        sys.executable,
        "-m",
        "tests.harness.journal_process",
        str(directory),
        str(batches),
        end,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({ENVIRONMENT: failpoints} if failpoints else {})
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def plant_foreign(directory: Path) -> None:
    """A file that recovery has to set aside, so that the places on that way are reached too."""
    (directory / f"seg-{10**6:020}.hrl").write_bytes(b"not ours" * 1000)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    """A journal with a past: ended unsynced, in order, and unsynced again."""
    directory = tmp_path_factory.mktemp("lived") / "j"
    ledger = Ledger()
    for end in ("abandon", "clean", "abandon"):
        code, said = run(directory, 90, end)
        assert code == 0
        ledger.read(said)
    return directory, ledger


def go_on(directory: Path, ledger: Ledger) -> None:
    """What was killed is opened again, and works."""
    ledger.check(directory)
    last = look(directory).last_lsn
    writer = opened(directory)
    marked(directory, writer.incarnation.id, last, last)
    assert put(writer, 2) == last + 2
    writer.sync()
    writer.close()
    ledger.check(directory)


NAMES = sorted(name for name in known_failpoints() if name.startswith("journal."))
SETTLING = [name for name in NAMES if name.split(".")[1] in ("settle", "open", "quarantine")]


@pytest.mark.fault("F1")
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_failpoint_nothing_appended_is_lost(
    tmp_path: Path, lived: tuple[Path, Ledger], name: str, injected: Injected
) -> None:
    journal = tmp_path / "j"
    shutil.copytree(lived[0], journal)
    ledger = replace(lived[1])
    plant_foreign(journal)
    code, said = run(journal, 90, "clean", failpoints=f"{name}=kill")
    assert code == SIGKILL, f"{name} was never reached"
    injected("F1")
    ledger.read(said)
    go_on(journal, ledger)


@pytest.mark.fault("F3")
@pytest.mark.parametrize("name", SETTLING)
def test_recovery_killed_five_times_in_a_row_is_recovery(
    tmp_path: Path, lived: tuple[Path, Ledger], name: str, injected: Injected
) -> None:
    journal = tmp_path / "j"
    shutil.copytree(lived[0], journal)
    ledger = replace(lived[1])
    for depth in range(5):
        plant_foreign(journal)
        code, said = run(journal, 0, "abandon", failpoints=f"{name}=kill")
        assert code == SIGKILL, f"{name} was not reached at depth {depth}"
        injected("F3")
        ledger.read(said)
        ledger.check(journal)
    go_on(journal, ledger)


@pytest.mark.fault("F1")
@pytest.mark.timeout(3600)
def test_killed_at_random_times_nothing_appended_is_lost(
    tmp_path: Path, injected: Injected, request: pytest.FixtureRequest
) -> None:
    kills = 1000 if request.config.getoption("--nightly") else 20
    seed = 20
    rng = random.Random(seed)
    journal = tmp_path / "j"
    ledger = Ledger()
    for _ in range(kills):
        command = [sys.executable, "-m", "tests.harness.journal_process", str(journal), "1000000", "abandon"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stderr
            said = process.stdout.readline()  # recovered: from here on it writes
            time.sleep(rng.random() * 0.05)
            process.kill()
            injected("F1")
            said += process.stdout.read()
            assert process.stderr.read() == b"", f"seed {seed}"
        ledger.read(said.decode())
        ledger.check(journal)
    assert ledger.appended > 5 * kills, "it was killed before it wrote"


STRACE = ("strace", "-f", "-qq", "-o")


@pytest.mark.fault("F11")
@pytest.mark.needs("strace")
@pytest.mark.parametrize("when", [1, 2, 3, 4, 5, 6, 11])
def test_after_a_failed_fdatasync_nothing_is_called_durable_again(
    tmp_path: Path, when: int, injected: Injected
) -> None:
    """The kernel reports a lost page once; a second call would return 0 over the hole."""
    journal, trace = tmp_path / "j", tmp_path / "trace"
    inject = ("-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={when}")
    code, said = run(journal, 40, "clean", before=(*STRACE, str(trace), *inject))
    ledger = Ledger()
    assert ledger.read(said)[-1] == "X"
    assert code == JournalFailed.exit_code
    calls = [line for line in trace.read_text().splitlines() if "fdatasync(" in line]
    assert len(calls) == when, "a call was made after the one that failed"
    assert "INJECTED" in calls[-1]
    injected("F11")
    go_on(journal, ledger)


@pytest.mark.fault("F10")
@pytest.mark.needs("strace")
@pytest.mark.parametrize(
    ("call", "when"), [*(("pwritev,pwritev2", when) for when in (1, 2, 3, 7, 20)), ("fallocate", 1)]
)
def test_a_full_disk_loses_nothing_and_the_journal_goes_on(
    tmp_path: Path, lived: tuple[Path, Ledger], call: str, when: int, injected: Injected
) -> None:
    journal, trace = tmp_path / "j", tmp_path / "trace"
    shutil.copytree(lived[0], journal)
    ledger = replace(lived[1])
    inject = ("-e", f"trace={call}", "-e", f"inject={call}:error=ENOSPC:when={when}+7")
    code, said = run(journal, 200, "abandon", before=(*STRACE, str(trace), *inject))
    kinds = ledger.read(said)
    injected("F10", trace.read_text().count("INJECTED"))
    if code:  # while opening, or in the mark: the tap says so and serves below data mode
        assert kinds[-1] in ("F", "X")
    else:
        assert kinds.count("A") > 100
    go_on(journal, ledger)
