"""``farshore test``: the tests of a checkout, with every test that could not run named."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import click
import msgspec

from farshore.errors import Failed, NotFound, UsageError

RESULT_ENVIRONMENT: Final = "FARSHORE_TEST_RESULT"
"""Where tests/conftest.py writes a `TestRun` as JSON when the run ends."""

WORKERS: Final = 2
"""Processes that run tests, unless told otherwise. Half of a test is to wait for a disk or a process."""

TEARDOWN_S: Final = 60.0
"""What pytest is given to take down what runs when it is interrupted; the second time it is given nothing."""

_CHECKOUT: Final = Path(__file__).resolve().parents[2]


class Unavailable(msgspec.Struct, frozen=True):
    """A test that did not run, and what it would have needed."""

    test: str
    needs: list[str]


class FaultCount(msgspec.Struct, frozen=True):
    """What was done to the product on purpose: a class of faults, by its number in the fault matrix.

    Attributes:
        fault: F1, F2 …
        injected: Faults that tests counted once they had happened.
        violations: Tests of this class that failed.
    """

    fault: str
    injected: int
    violations: int


class TestRun(msgspec.Struct, frozen=True):
    """What a run came to. A test with a failing setup, call or teardown is one failed test."""

    __test__ = False  # pytest: not a class of tests

    ran: int
    failed: int
    unavailable: list[Unavailable]
    faults: list[FaultCount] = []


@click.command("test", context_settings={"ignore_unknown_options": True})
@click.option("--nightly", is_flag=True, help="Also run the long tests.")
@click.option("--require-all", is_flag=True, help="A test that cannot run here is a failure (for CI).")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Run tests in N processes; default {WORKERS}, or 1 where there is one core.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; pytest writes to stderr.")
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
def command(
    nightly: bool, require_all: bool, workers: int | None, as_json: bool, pytest_args: tuple[str, ...]
) -> int:
    """Run the tests of this checkout; further arguments go to pytest (paths, -k, -x ...)."""
    if not (_CHECKOUT / "tests" / "conftest.py").is_file():
        raise NotFound(
            "there are no tests here", where=str(_CHECKOUT), fix="run it in a checkout of the source"
        )
    flags = [flag for flag, on in (("--nightly", nightly), ("--require-all", require_all)) if on]
    if workers is None:
        workers = min(WORKERS, len(os.sched_getaffinity(0)))
    code, run = run_pytest([*flags, *in_processes(workers), *pytest_args], quiet_stdout=as_json)
    if as_json:
        print(json.dumps(msgspec.to_builtins(run)))
    else:
        print(f"{run.ran - run.failed} passed, {run.failed} failed")
        if run.unavailable:
            needs = sorted({need for test in run.unavailable for need in test.needs})
            print(f"{len(run.unavailable)} unavailable, named above, for want of: {', '.join(needs)}")
    return 1 if run.failed else code


def in_processes(workers: int) -> list[str]:
    """Return what pytest is told to run tests in ``workers`` processes; none of its own with one."""
    if workers == 1:
        return []
    # A file stays together, for the fixtures that its tests share, and files begin in the order of the tree:
    # the long ones first, so that no process is left alone with one at the end. A process that dies is not
    # replaced: its successor would be given the same test, and die of it again.
    together = ["--dist=loadfile", "--no-loadscope-reorder"]
    return [f"--numprocesses={workers}", *together, "--max-worker-restart=0"]


def run_pytest(arguments: list[str], *, quiet_stdout: bool = False) -> tuple[int, TestRun]:
    """Run pytest in a process of its own, in the checkout, and return our exit code and what it came to.

    Args:
        arguments: For pytest.
        quiet_stdout: Send pytest's output to stderr.

    Raises:
        UsageError: pytest refused its arguments.
        Failed: It ended without a result, or ran no test at all.
        KeyboardInterrupt: It was interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="farshore-test-") as folder:
        result = Path(folder) / "result.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=_CHECKOUT,
            env={**os.environ, RESULT_ENVIRONMENT: str(result)},
            stdout=sys.stderr if quiet_stdout else None,
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            # The terminal told pytest too; to end what a test has started takes more than an instant.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=TEARDOWN_S)
            raise
        finally:
            process.kill()
            process.wait()
        if process.returncode == 4:
            raise UsageError("pytest refused its arguments", where=" ".join(arguments))
        if process.returncode == 2:
            raise KeyboardInterrupt
        try:
            run = msgspec.json.decode(result.read_bytes(), type=TestRun)
        except (OSError, msgspec.MsgspecError) as error:
            raise Failed(
                "the tests ended without a result", why=f"pytest ended with {process.returncode}"
            ) from error
    if not run.ran and not run.unavailable:
        raise Failed("no test was run", where=" ".join(arguments), why="nothing matches")
    return (0 if process.returncode in (0, 5) else 1), run
