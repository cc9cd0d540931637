"""``python3 -m farshore``: the command, and in a checkout also the environment it runs in.

Until that environment exists nothing but the standard library may be imported here, and the syntax stays
readable for the Pythons that are too old, since it is this file that tells their users so.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON_MIN = (3, 11)

# The import names of what the lock files install, one per direct dependency in pyproject.toml.
RUNTIME_MODULES = (
    "aiofiles",
    "blake3",
    "click",
    "cryptography",
    "msgspec",
    "numpy",
    "obstore",
    "prometheus_client",
    "rich",
    "sqlalchemy",
    "stamina",
    "starlette",
    "structlog",
    "uvicorn",
    "uvloop",
    "zstandard",
)
TEST_MODULES = (
    "hypothesis",
    "importlinter",
    "mypy",
    "pytest",
    "pytest_asyncio",
    "pytest_timeout",
    "trustme",
    "xdist",
)

# Set across the one re-execution, so that an environment which stays incomplete is an error and not a loop.
_AGAIN = "FARSHORE_ENVIRONMENT_MADE"


class EnvironmentFailed(Exception):
    """No environment could be made; the text says what to do."""


def missing_modules(verb: str) -> "list[str]":
    """Return the modules that the running interpreter lacks for ``verb``."""
    wanted = RUNTIME_MODULES + (TEST_MODULES if verb == "test" else ())
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def accepted_locks(root: Path, verb: str) -> "list[Path]":
    """Return the lock files whose installation serves ``verb``, the one to install first."""
    runtime, test = root / "requirements.lock", root / "requirements-test.lock"
    return [test] if verb == "test" else [runtime, test]  # the test lock holds the runtime one


def marker_of(lock: Path) -> str:
    """Return what the marker file says once ``lock`` is installed."""
    return f"{lock.name} {hashlib.sha256(lock.read_bytes()).hexdigest()}\n"


def installed_marker(venv: Path) -> str:
    """Return what was installed last and completely; empty when nothing was, or not by us."""
    try:
        return _marker_path(venv).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def is_stale(root: Path, venv: Path, verb: str) -> bool:
    """Tell whether we installed something into ``venv`` that is not what the lock files now ask for.

    A ``.venv`` without a marker is somebody else's, or was left half made: its modules decide.
    """
    marker = installed_marker(venv)
    return bool(marker) and marker not in [marker_of(lock) for lock in accepted_locks(root, verb)]


def ensure_environment(root: Path, venv: Path, verb: str) -> None:
    """Make or complete ``venv``. Of several processes that ask, one works; the others wait and look.

    Raises:
        EnvironmentFailed: venv or ensurepip is missing, or pip failed (it has then said why on stderr).
    """
    with _locked(root / ".venv.lock"):
        python = venv / "bin" / "python"
        if python.exists() and not is_stale(root, venv, verb) and _has_modules(python, verb):
            return
        started = time.monotonic()
        lock = accepted_locks(root, verb)[0]
        _say(f"making {venv} from {lock.name} (once; nothing outside the checkout changes)")
        if not python.exists():
            _make_venv(venv)
        _marker_path(venv).unlink(missing_ok=True)
        _pip_install(python, lock)
        _write_marker(venv, marker_of(lock))
        _say(f"environment ready after {time.monotonic() - started:.1f} s")


def main() -> int:
    """Run the command line, in an environment made for it when this is a checkout that has none yet."""
    if sys.version_info < PYTHON_MIN:
        _say("error: farshore needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info[:2]))
        return 1
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if not __package__:
        # Started as "python3 PATH/farshore": the path begins with the package's inside instead of its parent.
        sys.path[0] = str(ROOT)
    if (ROOT / "pyproject.toml").is_file() and _must_move(verb):
        if os.environ.pop(_AGAIN, ""):
            _say(f"error: {VENV} lacks {', '.join(missing_modules(verb))} even after installing; remove it")
            return 1
        try:
            ensure_environment(ROOT, VENV, verb)
        except EnvironmentFailed as error:
            _say(f"error: {error}")
            return 1
        return _run_inside(VENV)
    os.environ.pop(_AGAIN, None)
    from farshore.cli.main import main as command

    return command()


def _must_move(verb: str) -> bool:
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    return bool(missing_modules(verb)) or (inside and is_stale(ROOT, VENV, verb))


def _run_inside(venv: Path) -> int:
    environment = {**os.environ, _AGAIN: "1"}
    if Path.cwd() != ROOT:
        # "-m farshore" finds the checkout by the working directory, which is elsewhere.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    python = str(venv / "bin" / "python")
    sys.stdout.flush()
    os.execve(python, [python, "-m", "farshore", *sys.argv[1:]], environment)


def _make_venv(venv: Path) -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise EnvironmentFailed(
            "this Python cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"
        )
    # --clear: what is there has no working interpreter, so it is of no use to anybody.
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(venv)], stdout=sys.stderr, check=False
    )
    if made.returncode:
        raise EnvironmentFailed(f"python -m venv ended with {made.returncode}; its message is above")


def _pip_install(python: Path, lock: Path) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    # The lock names everything and nothing is built, which would fetch build tools that no hash covers.
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(lock)]
    installed = subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL, check=False)
    if installed.returncode:
        raise EnvironmentFailed(f"pip ended with {installed.returncode}; its message is above")


def _has_modules(python: Path, verb: str) -> bool:
    wanted = RUNTIME_MODULES + (TEST_MODULES if verb == "test" else ())
    look = (
        "import importlib.util as u, sys; sys.exit(any(u.find_spec(name) is None for name in sys.argv[1:]))"
    )
    # -I: an environment is complete by what is in it, not by what lies in the working directory.
    found = subprocess.run([str(python), "-I", "-c", look, *wanted], stderr=subprocess.DEVNULL, check=False)
    return found.returncode == 0


def _marker_path(venv: Path) -> Path:
    return venv / "farshore-lock"


def _write_marker(venv: Path, text: str) -> None:
    temporary = venv / "farshore-lock.tmp"
    temporary.write_text(text, encoding="ascii")
    temporary.replace(_marker_path(venv))


@contextlib.contextmanager
def _locked(path: Path) -> "Iterator[None]":
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that makes the environment")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(text if text.startswith("error: ") else f"farshore: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
