"""``farshore/__main__.py``: the environment of a checkout."""

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from farshore import __main__ as bootstrap
from farshore.__main__ import EnvironmentFailed, ensure_environment, installed_marker, is_stale, marker_of

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "farshore" / "__main__.py").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {canonical(match[0]) for match in found if match} - {"farshore"}


def pins(lock: str) -> dict[str, tuple[str, int]]:
    """Return name -> (version and marker, number of hashes) of a lock file."""
    text = (ROOT / lock).read_text()
    entries = re.findall(
        r"^([A-Za-z0-9._-]+)==([^\\\n]+?) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M
    )
    assert len(entries) == len(re.findall(r"^[^ #].*==", text, re.M)), "an entry without hashes"
    return {canonical(name): (version, hashes.count("--hash")) for name, version, hashes in entries}


def test_nothing_but_the_standard_library_is_imported_before_the_environment_exists() -> None:
    imported = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names} == {
        "farshore.cli.main"
    }


def test_a_python_that_is_too_old_can_at_least_read_the_message() -> None:
    ast.parse(SOURCE, feature_version=(3, 8))


def test_the_modules_looked_for_are_the_direct_dependencies() -> None:
    distributions = importlib.metadata.packages_distributions()

    def of(modules: tuple[str, ...]) -> set[str]:
        return {canonical(distributions[module][0]) for module in modules}

    assert of(bootstrap.RUNTIME_MODULES) == names(PROJECT["dependencies"] + EXTRAS["server"])
    assert of(bootstrap.TEST_MODULES) == names(EXTRAS["test"]) - {
        "ruff"
    }  # a program without a module of its own


def test_the_locks_pin_every_dependency_by_hash_and_name_no_host() -> None:
    runtime, test = pins("requirements.lock"), pins("requirements-test.lock")
    assert names(PROJECT["dependencies"] + EXTRAS["server"]) <= runtime.keys()
    assert names(EXTRAS["test"] + EXTRAS["bench"]) <= test.keys()
    assert runtime.items() <= test.items(), "the test lock must be an extension of the runtime lock"
    for lock in ("requirements.lock", "requirements-test.lock"):
        assert not re.search(r"://|--index|--find-links|--extra-index", (ROOT / lock).read_text())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose locks ask for nothing, so that an environment is made without a network."""
    monkeypatch.setattr(bootstrap, "RUNTIME_MODULES", ("json",))
    monkeypatch.setattr(bootstrap, "TEST_MODULES", ())
    (tmp_path / "requirements.lock").write_text("# nothing\n")
    (tmp_path / "requirements-test.lock").write_text("# nothing, for tests\n")
    return tmp_path


def test_an_environment_is_made_once_and_follows_its_lock(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    venv, lock, test_lock = (
        checkout / ".venv",
        checkout / "requirements.lock",
        checkout / "requirements-test.lock",
    )
    ensure_environment(checkout, venv, "demo")
    assert (venv / "bin" / "python").exists()
    assert installed_marker(venv) == marker_of(lock)
    assert "environment ready after" in capfd.readouterr().err

    ensure_environment(checkout, venv, "demo")
    assert capfd.readouterr().err == ""

    assert is_stale(checkout, venv, "test")
    ensure_environment(checkout, venv, "test")
    assert installed_marker(venv) == marker_of(test_lock)
    assert not is_stale(checkout, venv, "demo")  # the test lock holds the runtime one

    lock.write_text("# still nothing\n")
    test_lock.write_text("# still nothing, for tests\n")
    assert is_stale(checkout, venv, "demo")
    ensure_environment(checkout, venv, "demo")
    assert installed_marker(venv) == marker_of(lock)


def test_a_failed_install_leaves_no_marker_and_says_so(checkout: Path) -> None:
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (venv / "farshore-lock").write_text("requirements.lock 0\n")
    with pytest.raises(EnvironmentFailed, match="pip ended with 1"):
        ensure_environment(checkout, venv, "demo")
    assert installed_marker(venv) == ""


def test_an_environment_that_somebody_else_made_is_used_as_it_is(checkout: Path) -> None:
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    assert not is_stale(checkout, venv, "demo")
    ensure_environment(checkout, venv, "demo")
    assert installed_marker(venv) == ""


def test_a_missing_ensurepip_is_one_line_with_the_package(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else real(name))
    with pytest.raises(EnvironmentFailed, match="apt-get install python3-venv"):
        ensure_environment(checkout, checkout / ".venv", "demo")


def test_two_at_once_make_one_environment(checkout: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from farshore import __main__ as b\n"
        "import subprocess, time; b.RUNTIME_MODULES = ('json',)\n"
        "b._make_venv = lambda venv: subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv])\n"
        "b._pip_install = lambda python, lock: time.sleep(0.5)\n"
        "root = Path(sys.argv[1]); b.ensure_environment(root, root / '.venv', 'demo')"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(checkout)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(said).count("environment ready") == 1


@pytest.mark.parametrize("how", ["-m", "path"])
def test_the_command_runs_from_anywhere(how: str, tmp_path: Path) -> None:
    arguments = ["-m", "farshore"] if how == "-m" else [str(ROOT / "farshore")]
    found = subprocess.run(
        [sys.executable, *arguments, "--version"],
        cwd=ROOT if how == "-m" else tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith("farshore 0.")


def test_in_a_checkout_a_bare_python_ends_up_in_the_new_environment(tmp_path: Path) -> None:
    """In a copy with an empty lock the second start is inside .venv, and says what is missing there."""
    shutil.copytree(ROOT / "farshore", tmp_path / "farshore", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "requirements.lock").write_text("# nothing\n")
    (tmp_path / "requirements-test.lock").write_text("# nothing, for tests\n")
    bare = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import sys; sys.path[0:0] = [sys.argv.pop(1)]; sys.argv[0] = 'x'\n",
    ]
    bare[-1] += "import runpy; runpy.run_module('farshore', run_name='__main__', alter_sys=True)"
    found = subprocess.run(
        [*bare, str(tmp_path), "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "environment ready after" in found.stderr
    last = found.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/.venv lacks aiofiles, blake3, click")
