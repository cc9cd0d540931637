"""The agent's end of its copier processes: start them, hand out work, hear what was accepted."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from agent.link import Backoff, Server
from agent.replicate import ipc
from agent.spawn import environment
from farshore.telemetry import get_logger
from farshore.units import KIB
from farshore.wire.messages import Policy

WORKS_AHEAD: Final = 3
"""Given to one copier and not done: one read, one asked about, one waiting."""
TOKENS_PER_COPIER: Final = 1 << 40
STOP_S: Final = 5.0
EXPECT_S: Final = 5.0

log = get_logger()


class Source(Protocol):
    """Who has something to copy, and wants to know what became of it. Called from the event loop."""

    def next_work(self, number: int) -> ipc.Work | None:
        """Return the next work, known from now on as ``number``; None when there is none at present."""
        ...

    def taken(self, message: ipc.Taken) -> None: ...

    def done(self, message: ipc.Done) -> None: ...

    def given_back(self, numbers: list[int], reason: str, text: str, volume: bytes) -> None:
        """The copier is gone; these works are to do again. With reason ``disk``, ``volume`` is whose."""
        ...


@dataclass(slots=True)
class Running:
    """One copier process."""

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    works: set[int]
    ready: bool = False


class CopierPool:
    """Up to ``count`` copiers of one session, started when there is work, or about to be, and ended without.

    Attributes:
        pids: Process ids, for the memory report.
    """

    def __init__(
        self,
        source: Source,
        setup: Callable[[int], ipc.Setup],
        *,
        count: int,
        numbers: "itertools.count[int]",
        idle_s: float = 10.0,
    ) -> None:
        self._source, self._make_setup, self._count = source, setup, count
        self._numbers = numbers
        self._idle_s = idle_s
        self._wake = asyncio.Condition()
        self._expected_until = 0.0
        self._running: dict[int, Running] = {}
        self._launched = 0

    @property
    def pids(self) -> list[int]:
        return [running.process.pid for running in self._running.values()]

    async def run(self) -> None:
        """Serve until cancelled; then every copier is dead."""
        async with asyncio.TaskGroup() as tasks:
            for place in range(self._count):
                tasks.create_task(self._place(place), name=f"copier-{place}")

    async def expect_work(self) -> None:
        """There will be work in a moment: starting a process takes as long as what comes before it."""
        self._expected_until = time.monotonic() + EXPECT_S
        await self.work_arrived()

    async def work_arrived(self) -> None:
        """`next_work` may have something now."""
        async with self._wake:
            self._wake.notify_all()

    async def _place(self, place: int) -> None:
        backoff = Backoff(random.Random())
        while True:
            # The first work is what starts a process: no work, no process, unless it is on its way.
            first = self._source.next_work(next(self._numbers))
            if first is None and time.monotonic() >= self._expected_until:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0), self._wake:
                        await self._wake.wait()
                continue
            reason, text = await self._serve(place, first, backoff)
            if reason:
                pause_s = backoff.next_s()
                log.warning("copier_ended", reason=reason, error=text, pause_s=round(pause_s, 2))
                await asyncio.sleep(pause_s)

    async def _serve(self, place: int, first: ipc.Work | None, backoff: Backoff) -> tuple[str, str]:
        """Run one copier until it is idle for long or dies; return why, empty for idle."""
        self._launched += 1
        setup = self._make_setup(self._launched * TOKENS_PER_COPIER)
        ours, theirs = socket.socketpair()
        reason, text, volume = "internal", "it was stopped", b""
        running: Running | None = None
        works = {first.number} if first is not None else set()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "agent.replicate.copier",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    env=environment(),
                )
            ours.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=256 * KIB)
            running = self._running[place] = Running(process, writer, works)
            writer.write(ipc.encode(setup) + (ipc.encode(first) if first is not None else b""))
            await writer.drain()
            reason, text, volume = await self._converse(running, reader, backoff)
        except (OSError, asyncio.IncompleteReadError) as error:
            reason, text = "internal", f"the copier ended: {error}"
        finally:
            self._running.pop(place, None)
            if running is not None:
                running.writer.close()
                await self._reap(running.process, hard=bool(reason))
            else:
                ours.close()
            if works:
                self._source.given_back(sorted(works), reason, text, volume)
        return reason, text

    async def _converse(
        self, running: Running, reader: asyncio.StreamReader, backoff: Backoff
    ) -> tuple[str, str, bytes]:
        received = bytearray()
        idle = 0.0
        while True:
            got = b""
            try:
                async with asyncio.timeout(0.2 if running.ready and len(running.works) < WORKS_AHEAD else 60):
                    got = await reader.read(256 * KIB)
                if not got:
                    return "internal", "the copier died", b""
            except TimeoutError:
                if not running.ready:
                    return "timeout", "the data connection did not come about", b""
            received += got
            for message in ipc.split(received, ipc.from_copier):
                match message:
                    case ipc.Ready():
                        running.ready = True
                        backoff.reset()
                    case ipc.Taken():
                        self._source.taken(message)
                    case ipc.Done():
                        running.works.discard(message.work)
                        self._source.done(message)
                    case ipc.Broken(reason=reason, text=text, volume=volume):
                        return reason, text, volume
            if running.ready:
                self._feed(running)
            idle = 0.0 if running.works else idle + 0.2
            if idle >= self._idle_s:
                running.writer.write(ipc.encode(ipc.Stop()))
                await running.writer.drain()
                return "", "", b""

    def _feed(self, running: Running) -> None:
        while len(running.works) < WORKS_AHEAD:
            work = self._source.next_work(next(self._numbers))
            if work is None:
                return
            running.works.add(work.number)
            running.writer.write(ipc.encode(work))

    async def _reap(self, process: asyncio.subprocess.Process, *, hard: bool) -> None:
        if not hard:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await process.wait()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        await process.wait()


def setup_for(
    server: Server,
    session: bytes,
    policy: Policy,
) -> Callable[[int], ipc.Setup]:
    """What a copier of this session has to know, but for its tokens."""

    def make(first_token: int) -> ipc.Setup:
        return ipc.Setup(
            server.host,
            server.port,
            server.vault,
            str(server.identity),
            session,
            policy.credit_bytes,
            policy.chunk_bytes,
            first_token,
            policy.copy_level,
        )

    return make
