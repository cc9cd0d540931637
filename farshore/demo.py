"""``farshore demo``: a disk is protected, everything is killed, the disk comes back from the vault.

Needs no root and no program but Python.
"""

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from farshore.errors import Failed, NotFound
from farshore.nbd.client import connect, parse_uri
from farshore.site import READY_S, Daemon, Site, wait_for
from farshore.stamps import BLOCK_BYTES, Workload, check_prefix
from farshore.units import MIB, format_size
from farshore.workload import Ledger

DISK_BYTES: Final = 192 * MIB
PROGRAM_BYTES: Final = 64 * MIB
"""Front part of the demo disk: files of the Python in use, the kind of data that a real disk holds."""
WRITES_PER_SECOND: Final = 1000
MACHINE: Final = "demo"
VOLUME: Final = "data"


class Say(Protocol):
    """Tells the person at the terminal what happens now."""

    def __call__(self, text: str) -> None: ...


@dataclass
class Outcome:
    """What the demo measured; ``as_json`` has the contract's keys."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    rpo_seconds: list[float] = field(default_factory=list)
    rto_seconds: float = 0.0
    bytes_compared: int = 0
    mismatches: int = 0

    @property
    def ok(self) -> bool:
        """Every byte equal, both roles killed while writes were running."""
        killed = {kill["role"] for kill in self.kills if kill["under_load_writes_per_s"] > 0}
        return self.mismatches == 0 and self.bytes_compared > 0 and killed == {"agent", "server"}

    def rpo_p99(self) -> float | None:
        """99th percentile of the RPO seen while everything was running; None when it was never known."""
        ordered = sorted(self.rpo_seconds)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else None

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "kills": self.kills,
            "rpo_p99_seconds": self.rpo_p99(),
            "rto_seconds": round(self.rto_seconds, 3),
            "bytes_compared": self.bytes_compared,
            "mismatches": self.mismatches,
        }


class Demo:
    """One run below one directory. ``run`` does it all; ``close`` ends what was started."""

    def __init__(self, directory: Path, say: Say) -> None:
        self._directory, self._say = directory, say
        self._disk = directory / "disk.img"
        self._site = Site(directory)
        self._polling = threading.Event()
        self.outcome = Outcome()

    def run(self, disk: Path | None) -> Outcome:
        """Protect, kill, lose, recover, compare.

        Args:
            disk: A raw image to use; it is copied, never written. None makes one.

        Raises:
            Failed: A command of ours ended otherwise than it must; its words are in the error.
        """
        workload = self._make_disk(disk)
        self._start_site()
        uri = self._protect()
        ledger = Ledger(self._directory / "ledger", workload)
        with self._writing(uri, workload), self._watching_rpo():
            self._let_run(ledger, 4)
            self._kill_under_load("agent", ledger)
            self._let_run(ledger, 4)
            self._kill_under_load("server", ledger)
            self._let_run(ledger, 4)
            self._polling.clear()
        point = self._last_point(ledger)
        expected = self._directory / "expected.img"
        shutil.copyfile(self._disk, expected)
        self._lose_everything()
        self._fail_over(point)
        self._compare(point, expected, workload, ledger)
        ledger.close()
        return self.outcome

    def _make_disk(self, given: Path | None) -> Workload:
        if given is not None:
            if not given.is_file():
                raise NotFound("no such disk image", where=str(given))
            shutil.copyfile(given, self._disk)
            blocks = self._disk.stat().st_size // BLOCK_BYTES
            self._say(
                f"Copied {given} ({format_size(self._disk.stat().st_size)}); the original is not touched."
            )
            return Workload(random.getrandbits(63), blocks // 2, blocks - blocks // 2)
        with self._disk.open("wb") as file:
            for content in _program_files():
                file.write(content)
            file.truncate(DISK_BYTES)
        self._say(f"Made a disk of {format_size(DISK_BYTES)} in {self._directory}")
        first = PROGRAM_BYTES // BLOCK_BYTES
        return Workload(random.getrandbits(63), first, DISK_BYTES // BLOCK_BYTES - first)

    def _start_site(self) -> None:
        self._site.init()
        ready = self._site.start_server().ready
        self._site.enrol(MACHINE)
        self._site.start_agent(MACHINE)
        self._say(f"Process server on {ready['listen']}, agent enrolled with a one-use token.")

    def _protect(self) -> str:
        started = time.monotonic()
        uri = str(self._site.protect(MACHINE, VOLUME, self._disk)["uri"])
        self._say(f"Disk protected: first copy vaulted in {time.monotonic() - started:.1f} s.")
        return uri

    @contextlib.contextmanager
    def _writing(self, uri: str, workload: Workload) -> Iterator[None]:
        """A process of its own writes stamped blocks through the tap; at the end each was answered."""
        writer = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "farshore.workload",
                    uri,
                    "--ledger",
                    str(self._directory / "ledger"),
                ),
                *("--seed", str(workload.seed), "--first-block", str(workload.first_block)),
                *("--block-count", str(workload.block_count), "--rate", str(WRITES_PER_SECOND)),
            ],
            stdin=subprocess.DEVNULL,
        )
        try:
            yield
            writer.terminate()
            if writer.wait(timeout=READY_S):
                raise Failed("the writer ended badly", why=f"exit {writer.returncode}")
        finally:
            writer.kill()
            writer.wait()

    @contextlib.contextmanager
    def _watching_rpo(self) -> Iterator[None]:
        """Ask ``status`` over and over while ``_polling`` is set."""
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                if self._polling.is_set():
                    with contextlib.suppress(Failed, subprocess.TimeoutExpired):
                        machine = self._site.json("status")["machines"][0]
                        if machine["rpo_seconds"] is not None and self._polling.is_set():
                            self.outcome.rpo_seconds.append(float(machine["rpo_seconds"]))
                over.wait(0.2)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _let_run(self, ledger: Ledger, seconds: float) -> None:
        before = ledger.state().acked
        wait_for(lambda: ledger.state().acked > before, READY_S, "writes to be answered")
        time.sleep(2)
        self._polling.set()
        time.sleep(seconds)

    def _kill_under_load(self, role: str, ledger: Ledger) -> None:
        before, started = ledger.state().acked, time.monotonic()
        time.sleep(1)
        rate = (ledger.state().acked - before) / (time.monotonic() - started)
        self._polling.clear()
        killed = time.monotonic()
        if role == "agent":
            self._site.kill_agent(MACHINE)
            self._site.start_agent(MACHINE)
        else:
            self._site.kill_server()
            self._site.start_server()
        again = ledger.state().acked
        wait_for(
            lambda: ledger.state().acked > again, READY_S, f"writes to go on after the {role} was killed"
        )
        self.outcome.kills.append({"role": role, "under_load_writes_per_s": round(rate, 1)})
        took = time.monotonic() - killed
        self._say(f"Killed the {role} with SIGKILL at {rate:.0f} writes/s; running again after {took:.1f} s.")

    def _last_point(self, ledger: Ledger) -> str:
        started = time.monotonic()
        created = self._site.json("point", "create", MACHINE, "--tag", "end-of-demo", "--wait", "vaulted")
        took = time.monotonic() - started
        self._say(
            f"{ledger.state().acked} writes answered; point {created['point']} vaulted in {took:.1f} s."
        )
        return str(created["point"])

    def _lose_everything(self) -> None:
        self._site.kill_agent(MACHINE)
        self._site.kill_server()
        shutil.rmtree(self._site.server_dir)
        shutil.rmtree(self._site.agent_dir(MACHINE))
        self._disk.unlink()
        self._say("Lost: agent, server and disk. Left: the vault and the recovery key.")

    def _fail_over(self, point: str) -> None:
        """Serve the point from the vault and read its first block: the recovery time."""
        started = time.monotonic()
        export = Daemon(
            *("export", MACHINE, "--volume", VOLUME, "--point", point),
            *("--nbd", f"unix:{self._directory / 'export.sock'}"),
            *("--vault", self._site.vault, "--recovery-key-file", self._site.key),
            log=self._directory / "export.log",
        )
        first = asyncio.run(_read_first_block(str(export.ready["uri"])))
        self.outcome.rto_seconds = time.monotonic() - started
        export.kill()
        assert len(first) == BLOCK_BYTES
        self._say(f"Failed over: first block readable {self.outcome.rto_seconds:.2f} s after asking.")

    def _compare(self, point: str, expected: Path, workload: Workload, ledger: Ledger) -> None:
        recovered = self._directory / "recovered.img"
        started = time.monotonic()
        self._site.recover(MACHINE, point, recovered)
        size = expected.stat().st_size
        rate = size / (time.monotonic() - started) / 1e6
        with expected.open("rb") as left, recovered.open("rb") as right:
            for _ in range(0, size, MIB):
                a, b = left.read(MIB), right.read(MIB)
                self.outcome.bytes_compared += len(a)
                if a != b:
                    self.outcome.mismatches += sum(x != y for x, y in zip(a, b, strict=False)) + abs(
                        len(a) - len(b)
                    )

            def read(offset: int, length: int) -> bytes:
                return os.pread(right.fileno(), length, offset)

            report = check_prefix(workload, read)
        acked = ledger.state().acked
        if not report.exact or report.seq < acked:
            self.outcome.mismatches += max(1, acked - report.seq)
        compared, wrong = self.outcome.bytes_compared, self.outcome.mismatches
        verdict = f"all {acked} answered writes are there" if not wrong else f"last write found {report.seq}"
        self._say(f"Recovered at {rate:.0f} MB/s: {compared} bytes compared, {wrong} differ; {verdict}.")

    def close(self) -> None:
        """Kill what is still running."""
        self._site.close()


def _program_files() -> Iterator[bytes]:
    """About ``PROGRAM_BYTES`` of files of the Python in use, padded to blocks as a file system would."""
    written = 0
    for root, _, names in os.walk(sysconfig.get_path("stdlib")):
        for name in sorted(names):
            content = Path(root, name).read_bytes()
            content += bytes(-len(content) % BLOCK_BYTES)
            if written + len(content) > PROGRAM_BYTES:
                return
            written += len(content)
            yield content


async def _read_first_block(uri: str) -> bytes:
    address, export = parse_uri(uri)
    async with connect(address, export) as client:
        return await client.read(0, BLOCK_BYTES)


def run_demo(disk: Path | None, keep: bool, say: Say) -> Outcome:
    """Run the demo in a temporary directory, removed at the end unless ``keep``."""
    directory = Path(tempfile.mkdtemp(prefix="farshore-demo-"))
    demo = Demo(directory, say)
    try:
        return demo.run(disk)
    finally:
        demo.close()
        if keep:
            say(f"Kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
