import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farshore import failpoints
from farshore.errors import ConfigError
from farshore.failpoints import InjectedFault, failpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def two_known_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(failpoints, "known_failpoints", lambda: {"a.first": ["x:1"], "b.second": ["x:2"]})
    yield
    failpoints.disarm()


def test_nothing_happens_unless_armed() -> None:
    failpoint("a.first")
    failpoints.arm("b.second=raise")
    failpoint("a.first")
    assert failpoints.pending() == ["b.second"]


def test_raise_at_the_nth_hit_and_only_then() -> None:
    failpoints.arm("a.first=raise:3, b.second=raise")
    failpoint("a.first")
    failpoint("a.first")
    with pytest.raises(InjectedFault, match=r"a\.first"):
        failpoint("a.first")
    failpoint("a.first")
    assert failpoints.pending() == ["b.second"]


@pytest.mark.parametrize(
    "specification",
    ["a.first", "a.first=", "a.first=die", "a.first=kill:", "a.first=kill:0", "a.first=kill:x"],
)
def test_what_cannot_be_read_is_an_error(specification: str) -> None:
    with pytest.raises(ConfigError, match="cannot read a failpoint"):
        failpoints.arm(specification)


def test_an_unknown_name_is_an_error_since_it_could_never_be_hit() -> None:
    with pytest.raises(ConfigError, match=r"no such failpoint: FARSHORE_FAILPOINTS: c\.third"):
        failpoints.arm("a.first=kill,c.third=kill")


def test_the_environment_is_checked_when_the_module_is_imported() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import farshore.failpoints"],
        env={"FARSHORE_FAILPOINTS": "no.such=kill"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "no such failpoint" in found.stderr


def test_kill_is_a_real_sigkill() -> None:
    program = (
        "from farshore import failpoints as f\n"
        "f.known_failpoints = lambda: {'x': []}\n"
        "f.arm('x=kill:2')\n"
        "f.failpoint('x')\n"
        "print('once', flush=True)\n"
        "f.failpoint('x')\n"
        "print('twice', flush=True)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (-signal.SIGKILL, "once\n")


def test_names_are_found_in_source() -> None:
    source = "failpoint('a')\n\nasync def f():\n    failpoints.failpoint('b.c')\n"
    assert list(failpoints.failpoints_in(source)) == [("a", 1), ("b.c", 4)]
    assert list(failpoints.failpoints_in("x = 1\n")) == []


@pytest.mark.parametrize(
    "call", ["failpoint(name)", "failpoint(f'a.{x}')", "failpoint()", "failpoint(name='a')"]
)
def test_a_name_that_nobody_could_list_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match="line 1: a failpoint is named by one string literal"):
        list(failpoints.failpoints_in(call))
