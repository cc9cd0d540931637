"""What all tests share: capabilities that are probed and never skipped in silence, and the result of a run.

A test says what it needs from the host with ``@pytest.mark.needs("fio", "loop", "py:nbd")``. What is not
there makes it *unavailable*: listed by name at the end, written to the result, failed with ``--require-all``.

A test that breaks something on purpose says what with ``@pytest.mark.fault("F1")``, by the number in the
fault matrix (`tests.harness.faults`), and counts each fault that really happened with the ``injected``
fixture. The sums, and how many of those tests failed, are printed at the end and written to the result. One
that passes without having counted a fault fails: it has shown nothing.

With ``-n 2`` (pytest-xdist) two processes run tests. What they find out travels to the one that started them
with the reports of the tests, as user properties; the record is kept there and nowhere else. A test that
measures time, or needs the whole machine, says ``@pytest.mark.alone``: it comes last and runs by itself.
"""

import functools
import importlib
import importlib.machinery
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from fcntl import ioctl
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import hypothesis
import pytest

from farshore.cli.test import RESULT_ENVIRONMENT
from tests.harness.faults import FAULTS, Injected
from tests.harness.object_stores import azurite, rclone_s3, seaweedfs
from tests.harness.turns import Turns

__all__ = ["azurite", "rclone_s3", "seaweedfs"]  # fixtures

_LOOP_CTL_GET_FREE: Final = 0x4C82  # linux/loop.h

# Examples are the same in each run, so that a red run can be repeated; --nightly looks for new ones.
hypothesis.settings.register_profile("every-run", deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)


class _DebianModules:
    """Finds libnbd's Python binding, which is only packaged by Debian, for the interpreter it was built for.

    Not by a longer sys.path: that would let every other old module in that folder stand in for a missing one.
    """

    _FOLDER = "/usr/lib/python3/dist-packages"
    _NAMES = frozenset({"libnbdmod", "nbd"})

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [cls._FOLDER]) if fullname in cls._NAMES else None


sys.meta_path.append(_DebianModules)


def _has_loop() -> bool:
    try:
        with open("/dev/loop-control", "rb") as control:
            number = ioctl(control, _LOOP_CTL_GET_FREE)
        with open(f"/dev/loop{number}", "r+b", buffering=0):
            return os.geteuid() == 0
    except OSError:
        return False


def _has_fuse() -> bool:
    try:
        with open("/dev/fuse", "r+b", buffering=0):
            return os.geteuid() == 0 or shutil.which("fusermount3") is not None
    except OSError:
        return False


def _has_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


_PROBES: Final[dict[str, Callable[[], bool]]] = {
    "fuse": _has_fuse,
    "loop": _has_loop,
    "root": lambda: os.geteuid() == 0,
}


@functools.cache
def is_available(capability: str) -> bool:
    """Tell whether this host has ``capability``: a probe above, ``py:MODULE``, or a program on the PATH."""
    if probe := _PROBES.get(capability):
        return probe()
    if capability.startswith("py:"):
        return _has_module(capability.removeprefix("py:"))
    # An ordinary user's PATH lacks mkfs and losetup, which an ordinary user may well run on an image file.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(capability, path=path) is not None


class _Record:
    """Counts tests, whatever number of reports each of them makes."""

    def __init__(self, *, require_all: bool, target: str) -> None:
        self.require_all, self.target = require_all, target
        self.passed: set[str] = set()
        self.failed: set[str] = set()
        self.unavailable: dict[str, list[str]] = {}
        self.injected: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.interrupted = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == _NEEDS:
                assert isinstance(value, list)
                self.unavailable[report.nodeid] = value
        for name, value in report.user_properties:
            if name == _FAULTS and report.when == "teardown" and report.nodeid not in self.unavailable:
                assert isinstance(value, dict)
                self.injected.update(value)
                if report.failed or report.nodeid in self.failed:
                    self.violations.update(value.keys())
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.when == "call" and not _is_skip(report):
            self.passed.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.skipped:
            self.unavailable[report.nodeid] = [_skip_reason(report)]
            if self.require_all:
                self.failed.add(report.nodeid)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # What stops a run for its failures (a file that cannot be imported; -x with xdist) is derived from
        # KeyboardInterrupt and comes by here too.
        self.interrupted = excinfo.type is KeyboardInterrupt or excinfo.errisinstance(pytest.exit.Exception)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        unmarked = (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED)
        if self.failed and not self.interrupted and session.exitstatus in unmarked:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not self.target:
            return
        result = {
            "ran": len(self.passed | self.failed),
            "failed": len(self.failed),
            "unavailable": [
                {"test": test, "needs": needs} for test, needs in sorted(self.unavailable.items())
            ],
            "faults": self.faults(),
        }
        Path(self.target).write_text(json.dumps(result))

    def faults(self) -> list[dict[str, object]]:
        """What was injected, by class, in the order of the matrix."""
        return [
            {"fault": fault, "injected": self.injected[fault], "violations": self.violations[fault]}
            for fault in FAULTS
            if fault in self.injected
        ]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if faults := self.faults():
            terminalreporter.section("faults injected")
            terminalreporter.line(f"{'':5} {'injected':>9} {'violations':>10}")
            for row in faults:
                fault = str(row["fault"])
                line = f"{fault:5} {row['injected']:9,} {row['violations']:10}  {FAULTS[fault]}"
                terminalreporter.line(line)
        if self.unavailable:
            terminalreporter.section("unavailable here")
            for test, needs in sorted(self.unavailable.items()):
                terminalreporter.line(f"{test} needs {', '.join(needs)}")


def _is_skip(report: pytest.TestReport) -> bool:
    return report.skipped and not hasattr(report, "wasxfail")  # an expected failure did run


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


# User properties of a test's reports: what it counted, and what it would have needed.
_FAULTS: Final = "faults"
_NEEDS: Final = "needs"

_TURNS: Final = pytest.StashKey[Turns]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")
    parser.addoption("--require-all", action="store_true", help="fail the tests that cannot run here")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("nightly" if config.getoption("--nightly") else "every-run")
    # Taken out of the environment: a pytest that a test starts must not write its result over ours.
    target = os.environ.pop(RESULT_ENVIRONMENT, "")
    workerinput: dict[str, Any] | None = getattr(config, "workerinput", None)
    if workerinput is None:
        record = _Record(require_all=config.getoption("--require-all"), target=target)
        config.pluginmanager.register(record, "farshore-record")
    else:
        config.stash[_TURNS] = turns = Turns(Path(workerinput["turns"]))
        config.add_cleanup(turns.close)


@functools.cache
def _turns_folder(config: pytest.Config) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="farshore-turns-")
    config.add_cleanup(folder.cleanup)
    return Path(folder.name)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process that is to run tests (a ``WorkerController`` of xdist) where the run's turns are."""
    node.workerinput["turns"] = str(_turns_folder(node.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--nightly"):
        long = [item for item in items if item.get_closest_marker("nightly")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    if _TURNS in config.stash:
        # Last, where the others no longer wait for them; the order of all else is as written.
        items.sort(key=_is_alone)


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # Outermost: what a test waits for its turn does not count for its timeout.
    turns = item.config.stash.get(_TURNS, None)
    if turns is None:
        return (yield)
    with turns.turn(alone=_is_alone(item)):
        return (yield)


def _needs(item: pytest.Item) -> Iterable[str]:
    return (name for marker in item.iter_markers("needs") for name in marker.args)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if faults := [str(name) for marker in item.iter_markers("fault") for name in marker.args]:
        unknown = sorted(set(faults) - FAULTS.keys())
        assert not unknown, f"not in tests/conftest.py: {unknown}"
        item.user_properties.append((_FAULTS, dict.fromkeys(faults, 0)))
    missing = sorted({name for name in _needs(item) if not is_available(name)})
    if missing:
        item.user_properties.append((_NEEDS, missing))
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    counted = dict(item.user_properties).get(_FAULTS)
    if report.when == "call" and report.passed and isinstance(counted, dict) and not all(counted.values()):
        without = ", ".join(fault for fault, count in counted.items() if not count)
        report.outcome, report.longrepr = "failed", f"no fault was injected: {without}"
    if _is_skip(report):
        reason = _skip_reason(report)
        if _NEEDS not in dict(report.user_properties):
            item.user_properties.append((_NEEDS, [reason]))
            report.user_properties.append((_NEEDS, [reason]))
        if item.config.getoption("--require-all"):
            report.outcome, report.longrepr = "failed", f"unavailable: {reason}"
    return report


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Injected:
    """For a test marked ``fault``: ``injected("F1")``, or with how many."""
    found = dict(request.node.user_properties)[_FAULTS]
    assert isinstance(found, dict)
    return Injected(found)


@pytest.fixture
def tmp_state(tmp_path: Path) -> Path:
    """An empty state directory as a unit gets it: mode 0700, beside the test's own files."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    return state
