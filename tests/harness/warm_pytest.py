"""Many runs of pytest, each in a process of its own that need not import pytest anew.

Run as a program this imports what tests use and is not ours, once; each run is a fork of it. Nothing of ours
is imported before the fork, since every run finds our modules in its own folder.
"""

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

# What takes long; a module that is not here is imported by the run that needs it.
MODULES: Final = (
    *("pytest", "_pytest.assertion.util", "pdb", "pytest_asyncio.plugin", "pytest_timeout"),
    *("xdist.plugin", "execnet.gateway", "anyio.pytest_plugin"),
    *("hypothesis.strategies", "hypothesis.stateful", "_hypothesis_pytestplugin"),
    *("asyncio", "blake3", "click", "msgspec", "numpy", "prometheus_client"),
    *("cryptography.x509", "cryptography.hazmat.primitives.ciphers.aead"),
    *("sqlalchemy", "ssl", "starlette.applications", "structlog", "uvloop", "uvicorn", "zstandard"),
)


class WarmPytest:
    """The program as a context manager; one run at a time."""

    def __enter__(self) -> "WarmPytest":
        # -P: the folder of this file is not on the path; -B: no bytecode beside sources that will change.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def run(self, folder: Path, arguments: Sequence[str], output: Path, timeout_s: float) -> int:
        """Run pytest in ``folder`` and return its exit code; what it prints is in ``output`` then.

        Raises:
            TimeoutError: It took longer than ``timeout_s``. There can be no other run.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(folder), list(arguments), str(output)]) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise TimeoutError(f"no end of {' '.join(arguments)} in {timeout_s:g} s")
        return int(self._process.stdout.readline())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()


def main() -> None:
    """Answer each line (folder, arguments, file for the output; JSON) with the exit code of that run."""
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage at its end, and would look at all of this each time
    for line in sys.stdin:
        folder, arguments, output = json.loads(line)
        pid = os.fork()
        if not pid:
            _become_pytest(folder, arguments, output)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _become_pytest(folder: str, arguments: list[str], output: str) -> None:
    import pytest

    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, write)):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.exit(pytest.main(arguments))


if __name__ == "__main__":
    main()
