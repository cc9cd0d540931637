"""The test verb and tests/conftest.py, by running them on small test files."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from farshore.site import session_pids, wait_for

ROOT = Path(__file__).parents[3]

SAMPLE = """
import os, pytest

def test_good(): assert "FARSHORE_TEST_RESULT" not in os.environ

def test_bad(): assert False

@pytest.mark.needs("sh")
def test_possible(): pass

@pytest.mark.needs("no-such-program", "py:no_such_module", "sh")
def test_impossible(): raise SystemExit("must not run")

def test_changed_its_mind(): pytest.skip("no tape drive")

@pytest.mark.xfail(strict=True, reason="known")
def test_known(): assert False

@pytest.mark.nightly
def test_overnight(): pass

@pytest.fixture
def broken(): raise OSError("fixture")

def test_error(broken): pass

def test_two_faults(request):
    request.addfinalizer(lambda: 1 / 0)
    assert False

def test_state(tmp_state):
    assert oct(tmp_state.stat().st_mode)[-3:] == "700" and not list(tmp_state.iterdir())
"""


def run(
    folder: Path, *words: str, source: str = SAMPLE, workers: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run the tests of ``source``, and what else lies in ``folder``."""
    (folder / "test_sample.py").write_text(source)
    return subprocess.run(
        command(folder, workers, *words), cwd=ROOT, capture_output=True, text=True, check=False
    )


def command(folder: Path, workers: int, *words: str) -> list[str]:
    ours = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-p", "tests.conftest"]
    ours += ["-p", "no:cacheprovider", str(folder)]
    return [sys.executable, "-m", "farshore", "test", f"--workers={workers}", *words, *ours]


def result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_the_result_counts_each_test_once_and_names_what_could_not_run(tmp_path: Path) -> None:
    done = run(tmp_path, "--json")
    assert done.returncode == 1
    assert result(done) == {
        "ran": 7,
        "failed": 3,
        "unavailable": [
            {"test": "test_sample.py::test_changed_its_mind", "needs": ["no tape drive"]},
            {"test": "test_sample.py::test_impossible", "needs": ["no-such-program", "py:no_such_module"]},
        ],
        "faults": [],
    }
    assert "test_sample.py::test_impossible needs no-such-program, py:no_such_module" in done.stderr


def test_people_get_a_line_of_passed_and_failed_and_one_of_unavailable(tmp_path: Path) -> None:
    lines = run(tmp_path).stdout.splitlines()
    assert lines[-2:] == [
        "4 passed, 3 failed",
        "2 unavailable, named above, for want of: no tape drive, no-such-program, py:no_such_module",
    ]


def test_require_all_turns_unavailable_into_failed(tmp_path: Path) -> None:
    found = result(run(tmp_path, "--json", "--require-all", "-k", "possible or mind"))
    assert (found["ran"], found["failed"], len(found["unavailable"])) == (3, 2, 2)


def test_unavailable_alone_is_no_failure_unless_required(tmp_path: Path) -> None:
    assert run(tmp_path, "-k", "impossible").returncode == 0
    assert run(tmp_path, "-k", "impossible", "--require-all").returncode == 1


def test_a_module_skipped_as_a_whole_is_named_and_fails_when_required(tmp_path: Path) -> None:
    source = "import pytest\npytest.importorskip('no_such_module')\n"
    assert [test["test"] for test in result(run(tmp_path, "--json", source=source))["unavailable"]] == [
        "test_sample.py"
    ]
    assert run(tmp_path, "--require-all", source=source).returncode == 1


FAULTY = """
import pytest

@pytest.mark.fault("F1")
@pytest.mark.parametrize("count", [2, 3])
def test_held(injected, count): injected("F1", count)

@pytest.mark.fault("F2", "F1")
def test_broke(injected):
    injected("F2")
    injected("F1")
    assert False

@pytest.mark.fault("F4")
def test_never_hit(injected): pass

@pytest.mark.fault("F7")
def test_breaks_before_it_counts(injected): assert False

@pytest.mark.fault("F10")
@pytest.mark.needs("no-such-program")
def test_impossible(injected): injected("F10")
"""


def test_faults_are_summed_by_class_with_the_tests_that_failed(tmp_path: Path) -> None:
    done = run(tmp_path, "--json", source=FAULTY)
    found = result(done)
    assert (found["ran"], found["failed"]) == (5, 3)
    assert found["faults"] == [
        {"fault": "F1", "injected": 6, "violations": 1},
        {"fault": "F2", "injected": 1, "violations": 1},
        {"fault": "F4", "injected": 0, "violations": 1},
        {"fault": "F7", "injected": 0, "violations": 1},
    ]
    assert re.search(r"F1 +6 +1 +kill -9 at a named place", done.stderr)
    assert "no fault was injected: F4" in done.stderr


def test_a_fault_that_is_in_no_matrix_is_an_error(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.fault('F99')\ndef test_it(): pass\n"
    assert result(run(tmp_path, "--json", source=source))["failed"] == 1


def test_long_tests_run_at_night_only(tmp_path: Path) -> None:
    assert result(run(tmp_path, "--json", "--nightly", "-k", "overnight"))["ran"] == 1
    done = run(tmp_path, "--json", "-k", "overnight")
    assert (done.returncode, result(done)["error"]["what"]) == (1, "no test was run")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path, workers: int) -> None:
    done = run(tmp_path, "--json", source="import no_such_module\n", workers=workers)
    assert (done.returncode, result(done)["failed"]) == (1, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_stops_at_the_first_failure_has_a_result(tmp_path: Path, workers: int) -> None:
    done = run(tmp_path, "--json", "-x", "-k", "bad", workers=workers)
    assert (done.returncode, result(done)["failed"]) == (1, 1)


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    (tmp_path / "test_skipped.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    for words in ([], ["--require-all"]):
        one, two = (run(tmp_path, "--json", *words, workers=workers) for workers in (1, 2))
        assert (two.returncode, result(two)) == (one.returncode, result(one))
        assert len(result(two)["unavailable"]) == 4
        assert "created: 2/2 workers" in two.stderr
        told = [line for line in one.stderr.splitlines() if re.match(r"F\d+ |test_\S+ needs ", line)]
        assert len(told) == 8
        assert [line for line in two.stderr.splitlines() if line in told] == told


ALONE = """
import os, pathlib, pytest, time

HERE = pathlib.Path(__file__).parent

def kinds_seen(kind):
    mine = HERE / f"{os.getpid()}.{kind}"
    mine.touch()
    time.sleep(0.05)
    found = [path.suffix for path in HERE.glob("*.*") if path.suffix in (".alone", ".beside")]
    mine.unlink()
    return found

@pytest.mark.alone
@pytest.mark.parametrize("n", range(5))
def test_alone(n): assert kinds_seen("alone") == [".alone"]

@pytest.mark.parametrize("n", range(20))
def test_beside(n): assert set(kinds_seen("beside")) == {".beside"}

def test_two_meet():
    (HERE / f"{os.getpid()}.waits").touch()
    deadline = time.monotonic() + 60
    while len(list(HERE.glob("*.waits"))) < 2 and time.monotonic() < deadline: time.sleep(0.01)
    assert len(list(HERE.glob("*.waits"))) == 2
"""


def test_a_test_that_is_alone_runs_when_no_other_does(tmp_path: Path) -> None:
    (tmp_path / "test_another.py").write_text(ALONE)
    found = result(run(tmp_path, "--json", source=ALONE, workers=2))
    assert (found["ran"], found["failed"]) == (52, 0)


LONG = """
import pathlib, pytest, time

HERE = pathlib.Path(__file__).parent

@pytest.fixture
def running():
    (HERE / "began").touch()
    yield
    time.sleep(1)
    (HERE / "ended").touch()

def test_it(running): time.sleep(100)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_takes_down_what_runs_and_ends_as_a_shell_says_so(
    tmp_path: Path, workers: int
) -> None:
    began, ended = tmp_path / "began", tmp_path / "ended"
    (tmp_path / "test_sample.py").write_text(LONG)
    process = subprocess.Popen(
        command(tmp_path, workers), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(began.exists, 60, "the test to begin")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=60) == 130
        assert ended.exists()
        wait_for(lambda: session_pids(process.pid) == [], 30, "its processes to end")
    finally:
        process.kill()
        process.wait()


def test_arguments_that_pytest_refuses_are_a_usage_error(tmp_path: Path) -> None:
    assert run(tmp_path, "--no-such-flag").returncode == 2


def test_a_run_that_dies_is_not_a_success(tmp_path: Path) -> None:
    done = run(tmp_path, source="import os\ndef test_dies(): os._exit(0)\n")
    assert done.returncode == 1
    assert "error: the tests ended without a result" in done.stderr


def test_a_process_that_dies_fails_the_test_it_ran(tmp_path: Path) -> None:
    source = "import os\ndef test_dies(): os._exit(0)\ndef test_after(): pass\n"
    done = run(tmp_path, "--json", source=source, workers=2)
    assert (done.returncode, result(done)["failed"]) == (1, 1)
    assert "crashed while running 'test_sample.py::test_dies'" in done.stderr


@pytest.mark.needs("py:nbd")
def test_the_debian_binding_of_libnbd_is_importable_from_this_environment() -> None:
    import nbd

    assert nbd.NBD().get_version()
