"""The test verb and tests/conftest.py, by running them on small test files."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def run(folder: Path, *words: str, source: str = SAMPLE) -> subprocess.CompletedProcess[str]:
    path = folder / "test_sample.py"
    path.write_text(source)
    ours = [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [sys.executable, "-m", "farshore", "test", *words, *ours, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


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


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    done = run(tmp_path, "--json", source="import no_such_module\n")
    assert done.returncode != 0


def test_arguments_that_pytest_refuses_are_a_usage_error(tmp_path: Path) -> None:
    assert run(tmp_path, "--no-such-flag").returncode == 2


def test_a_run_that_dies_is_not_a_success(tmp_path: Path) -> None:
    done = run(tmp_path, source="import os\ndef test_dies(): os._exit(0)\n")
    assert done.returncode == 1
    assert "error: the tests ended without a result" in done.stderr


@pytest.mark.needs("py:nbd")
def test_the_debian_binding_of_libnbd_is_importable_from_this_environment() -> None:
    import nbd

    assert nbd.NBD().get_version()
