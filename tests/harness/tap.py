"""A tap as a process of its own, on a disk image, for tests and benchmarks."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent import config, volumes
from agent.capture import control
from agent.capture.control import CutTaken, DirtyMapIs, Done, Status, TapStatus, VolumeStatus
from agent.volumes import VolumeConfig
from farshore.units import MIB
from tests.harness.patience import JOURNAL_STALL_MAX_S

READY_S = 60.0
MACHINE = "11" * 16
T = TypeVar("T", bound=msgspec.Struct)


class TapHost:
    """An agent's directory with its tap; volumes on image files beside it."""

    def __init__(self, directory: Path, log: Path | None = None) -> None:
        """``log``: where the tap's messages go; into the directory by default."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.layout = config.Layout(directory)
        self.layout.run.mkdir(exist_ok=True)
        config.save(directory, config.AgentConfig("test", MACHINE, "22" * 16, ("127.0.0.1:1",)))
        self.process: subprocess.Popen[bytes] | None = None
        self.log = log or directory / "tap.log"
        self.ready: dict[str, Any] = {}

    def add(self, name: str = "disk", size: int = 64 * MIB, **settings: Any) -> VolumeConfig:
        """Make an image (unless there is one) and protect it at the next start.

        Its journal may take its time (`tests.harness.patience`), unless ``settings`` say otherwise.
        """
        disk = Path(settings.pop("disk", self.directory / f"{name}.img"))
        if not disk.exists():
            disk.touch()
            os.truncate(disk, size)
        settings.setdefault("quota_bytes", 1024 * MIB)
        settings.setdefault("journal_stall_max_s", JOURNAL_STALL_MAX_S)
        made = VolumeConfig(id=volumes.new_volume_id(), name=name, disk=str(disk), **settings)
        volumes.save_volume(self.directory, made)
        return made

    def socket(self, name: str = "disk") -> Path:
        return volumes.socket_path(self.directory, volumes.load_volume(self.directory, name))

    def uri(self, name: str = "disk") -> str:
        return volumes.nbd_uri(self.directory, volumes.load_volume(self.directory, name))

    def start(self, *wrapper: str, env: dict[str, str] | None = None) -> "TapHost":
        """Start the tap, perhaps under another program (strace), and wait until it is ready."""
        if self.process is not None:  # it died by itself
            self.process.wait(timeout=30)
            self._close()
        log = self.log.open("ab")
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "agent.tap", str(self.directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        log.close()
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
                self.ready = json.loads(lines.get(timeout=0.05))
            except queue.Empty:
                if self.process.poll() is not None:
                    break
                continue
            return self
        self.kill()
        raise AssertionError(f"the tap is not ready:\n{self.log_text()}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")[-8000:]

    def call(self, request: control.Request, kind: type[T], timeout_s: float = 60) -> T:
        return control.call(self.layout.tap_socket, request, kind, timeout_s=timeout_s)

    def status(self, name: str = "disk") -> VolumeStatus:
        return next(v for v in self.call(Status(), TapStatus).volumes if v.name == name)

    def cut(self, tag: str | None = None) -> CutTaken:
        return self.call(control.TakeCut(tag), CutTaken)

    def vaulted(self, name: str = "disk", lsn: int | None = None) -> None:
        """Say that everything (or up to ``lsn``) is in the vault."""
        status = self.status(name)
        last = status.captured_lsn if lsn is None else lsn
        self.call(control.Vaulted(name, status.incarnation, last), Done)

    def dirty(self, name: str = "disk") -> DirtyMapIs:
        return self.call(control.Dirty(name), DirtyMapIs)

    def kill(self) -> None:
        """SIGKILL for it and for what it was started under."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        self._close()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        os.kill(int(self.ready["pid"]), signal.SIGTERM)
        code = self.process.wait(timeout=90)
        self._close()
        return code

    def _close(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    def close(self) -> None:
        """End what runs, and take what is left of it from the tmpfs."""
        if self.process is not None:
            self.kill()
        for name in volumes.list_volumes(self.directory):
            page = volumes.state_page(self.directory, volumes.load_volume(self.directory, name))
            page.unlink(missing_ok=True)

    def __enter__(self) -> "TapHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def remove_journal(self, name: str = "disk") -> None:
        folder = self.layout.volume(name)
        for path in folder.iterdir():
            if path.name != volumes.CONFIG_NAME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def wait_until(condition: Any, timeout_s: float = 60.0, what: str = "") -> None:
    """Poll until ``condition()`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what or "not in time"
        time.sleep(0.02)
