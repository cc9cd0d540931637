"""A gateway and protected servers as a user runs them: through the command line, each its own process.

The demo, the benchmarks and the end-to-end tests drive Farshore through this: what they show is what a
user gets; nothing here reaches into agent or process server.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from farshore.errors import Failed

READY_S: Final = 60
STOP_S: Final = 60
COMMAND_S: Final = 300


def run(
    *arguments: str | Path, code: int = 0, timeout: float = COMMAND_S, env: dict[str, str] | None = None
) -> str:
    """Run one ``farshore`` command and return its stdout.

    Raises:
        Failed: It ended with another code than ``code``; carries what it printed last.
    """
    done = subprocess.run(
        [sys.executable, "-m", "farshore", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode != code:
        command = " ".join(map(str, arguments))
        raise Failed(
            f"farshore {command} ended with {done.returncode}", why=done.stderr[-2000:] or done.stdout[-500:]
        )
    return done.stdout


class Daemon:
    """One ``farshore … run`` in the foreground of its own session."""

    def __init__(self, *arguments: str | Path, log: Path, env: dict[str, str] | None = None) -> None:
        self._log: IO[bytes] = log.open("ab")
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "farshore", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            self.ready = self._wait_ready()
        except BaseException:  # an interrupt too: nobody else knows of the process yet
            self.kill()
            raise

    def _wait_ready(self) -> dict[str, Any]:
        lines: queue.Queue[bytes] = queue.Queue()
        stdout = self.process.stdout
        assert stdout is not None

        def forward() -> None:
            for line in stdout:
                lines.put(line)

        threading.Thread(target=forward, daemon=True).start()
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            try:
                line = json.loads(lines.get(timeout=0.1))
            except queue.Empty:
                if self.process.poll() is not None:
                    break
                continue
            if line.get("event") == "ready":
                assert isinstance(line, dict)
                return line
        raise Failed("not ready", where=str(self.log), why=self.log.read_text()[-2000:])

    def kill(self) -> None:
        """SIGKILL for the whole session: workers and helpers too."""
        for pid in session_pids(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=STOP_S)
        self._close()

    def stop(self) -> int:
        """SIGTERM, as a service manager stops it; returns the exit code."""
        self.process.terminate()
        code = self.process.wait(timeout=STOP_S)
        self._close()
        return code

    def _close(self) -> None:
        self._log.close()
        if self.process.stdout:
            self.process.stdout.close()


def session_pids(leader: int) -> list[int]:
    """Processes whose session was begun by ``leader``, itself included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until ``condition`` holds; raises Failed naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"waited {timeout:g} s for {what}")
        time.sleep(0.02)


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Site:
    """One gateway with one vault, and any number of agents, below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.vault = f"file://{directory}/vault"
        self.key = directory / "recovery.key"
        self.server_dir = directory / "server"
        self.server: Daemon | None = None
        self.agents: dict[str, Daemon] = {}

    @property
    def env(self) -> dict[str, str]:
        """Environment that points client verbs at this site's server and leaves the user's own alone."""
        return {
            "FARSHORE_CLIENT": str(self.server_dir / "client.toml"),
            "XDG_CONFIG_HOME": str(self.directory / "config"),
        }

    def cli(self, *arguments: str | Path, code: int = 0, timeout: float = 300) -> str:
        return run(*arguments, code=code, timeout=timeout, env=self.env)

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.cli(*arguments, "--json"))

    def init(self) -> None:
        """Make server and vault; the ports stay the same over restarts, as agents expect."""
        self.cli(
            *("server", "init", self.server_dir, "--vault", self.vault, "--recovery-key-file", self.key),
            *("--listen", f"127.0.0.1:{free_port()}", "--api", f"127.0.0.1:{free_port()}"),
        )

    def start_server(self, env: dict[str, str] | None = None) -> Daemon:
        log = self.directory / "server.log"
        self.server = Daemon("server", "run", self.server_dir, log=log, env={**self.env, **(env or {})})
        return self.server

    def agent_dir(self, machine: str) -> Path:
        return self.directory / f"agent-{machine}"

    def enrol(self, machine: str) -> None:
        assert self.server is not None
        token = self.directory / f"{machine}.token"
        token.write_text(self.cli("token", "create", "--machine", machine))
        address = str(self.server.ready["listen"])
        self.cli("agent", "enrol", self.agent_dir(machine), "--server", address, "--token-file", token)

    def start_agent(self, machine: str, env: dict[str, str] | None = None) -> Daemon:
        log = self.directory / f"agent-{machine}.log"
        agent = Daemon("agent", "run", self.agent_dir(machine), log=log, env=env)
        self.agents[machine] = agent
        return agent

    def protect(
        self, machine: str, volume: str, disk: Path, *options: str, timeout: float = 300
    ) -> dict[str, Any]:
        """Protect a disk through the tap and wait until it is; returns its entry of ``volume list``."""
        self.cli(
            *("volume", "protect", volume, "--agent", self.agent_dir(machine), "--disk", disk),
            *("--capture", "tap-nbd", "--wait", "protected", *options),
            timeout=timeout,
        )
        return self.volume(machine, volume)

    def volume(self, machine: str, volume: str) -> dict[str, Any]:
        volumes = self.json("volume", "list", "--agent", self.agent_dir(machine))["volumes"]
        return next(entry for entry in volumes if entry["name"] == volume)

    def tap_pid(self, machine: str) -> int | None:
        """Process id of the tap of a machine, found by its command line."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"agent.tap" in words and str(self.agent_dir(machine)).encode() in words:
                    return int(entry.name)
        return None

    def kill_agent(self, machine: str, tap: bool = True) -> None:
        """SIGKILL for the agent, and for its tap too unless told otherwise."""
        self.agents.pop(machine).kill()
        pid = self.tap_pid(machine) if tap else None
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: self.tap_pid(machine) is None, 10, "the tap is gone")

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.kill()
        self.server = None

    def recover(
        self, machine: str, point: str, to: Path, *options: str, timeout: float = 600
    ) -> dict[str, Any]:
        """Recover from the bare vault: no server, only its URL and the recovery key."""
        printed = run(
            *("recover", machine, "--point", point, "--to", str(to), "--vault", self.vault),
            *("--recovery-key-file", str(self.key), "--json", *options),
            timeout=timeout,
        )
        result = json.loads(printed)
        assert isinstance(result, dict)
        return result

    def close(self) -> None:
        """End what is still running; failures here would hide the test's own."""
        for machine in list(self.agents):
            self.kill_agent(machine)
        if self.server is not None:
            self.kill_server()
