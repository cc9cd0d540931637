import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from farshore import __version__
from farshore.cli.main import VERBS, Verb, main
from farshore.errors import CorruptRecord, Fenced, Unreachable

ROOT = Path(__file__).parents[3]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Register a verb ``probe`` that does what the test wants."""

    def register(action: Callable[[], object]) -> None:
        module = types.ModuleType("probe_module")
        command = click.Command(
            "probe", callback=lambda **_: action(), params=[click.Option(["--json"], is_flag=True)]
        )
        module.command = command  # type: ignore[attr-defined]  # modules take any attribute
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(VERBS, "probe", Verb("probe_module:command", "For tests."))

    return register


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


@pytest.mark.parametrize("name", VERBS)
def test_every_registered_verb_exists(name: str) -> None:
    module, _, attribute = VERBS[name].target.partition(":")
    assert isinstance(getattr(importlib.import_module(module), attribute), click.Command)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"farshore {__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in VERBS)


def test_without_a_verb_help_is_shown_and_that_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tset"], "error: No such command 'tset'. Did you mean 'test'?"),
        (["xyzzy"], "error: No such command 'xyzzy'; see 'farshore --help'"),
        (["--verison"], "error: No such option '--verison'. Did you mean '--version'?"),
    ],
)
def test_a_usage_error_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


@pytest.mark.parametrize(
    "error", [Fenced("not ours", where="db1"), CorruptRecord(7, "torn"), Unreachable("store")]
)
def test_an_error_is_one_line_and_the_exit_code_of_its_class(
    error: Fenced, probe: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(raising(error))
    assert main(["probe"]) == error.exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {error}\n")

    assert main(["probe", "--json"]) == error.exit_code
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": error.as_dict()}
    assert captured.err == f"error: {error}\n"


def test_an_error_in_a_task_group_is_found(
    probe: Callable[[Callable[[], object]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(raising(ExceptionGroup("tasks", [ValueError("x"), ExceptionGroup("inner", [Fenced("not ours")])])))
    assert main(["probe"]) == 6
    assert capsys.readouterr().err == "error: not ours\n"


def test_what_nobody_expected_is_one_line_and_a_way_to_see_more(
    probe: Callable[[Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FARSHORE_DEBUG", raising=False)
    probe(raising(ValueError("line\nbreak")))
    assert main(["probe"]) == 1
    line = "error: internal error: ValueError: line break; set FARSHORE_DEBUG=1 for a traceback\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("FARSHORE_DEBUG", "1")
    assert main(["probe"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_interrupting_is_130(probe: Callable[[Callable[[], object]], None]) -> None:
    probe(raising(KeyboardInterrupt()))
    assert main(["probe"]) == 130


def test_a_number_returned_by_a_command_is_the_exit_code(
    probe: Callable[[Callable[[], object]], None],
) -> None:
    probe(lambda: 7)
    assert main(["probe"]) == 7


def test_a_broken_pipe_of_our_own_is_not_mistaken_for_a_closed_stdout(
    probe: Callable[[Callable[[], object]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    probe(raising(BrokenPipeError("socket")))
    assert main(["probe"]) == 1
    assert "internal error: BrokenPipeError" in capfd.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = (
        "import sys, types, click\n"
        "from farshore.cli.main import VERBS, Verb, main\n"
        "module = sys.modules['m'] = types.ModuleType('m')\n"
        "many = lambda: [print('x' * 1000) for _ in range(10_000)]\n"
        "module.command = click.Command('p', callback=many)\n"
        "VERBS['p'] = Verb('m:command', '')\n"
        "sys.exit(main(['p']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.read(10)
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait(timeout=30) == 1


def test_help_imports_nothing_slow() -> None:
    """Cold start is what TAB completion feels: together these cost several times what it takes without."""
    program = (
        "import sys; from farshore.cli.main import main; main(['--help'])\n"
        "slow = {'asyncio', 'cryptography', 'msgspec', 'numpy', 'rich', 'structlog'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stderr == "[]\n"
