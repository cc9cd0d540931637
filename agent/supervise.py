"""Keeps a tap running: adopts one that runs, starts one where none does, starts it again when it dies.

The tap is a session of its own, so it outlives an agent that is killed. Where a service manager runs it
(``FARSHORE_TAP_UNIT=1``) it is only waited for.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from agent.capture import control
from agent.capture.control import TapClient
from agent.config import Layout
from agent.spawn import environment
from farshore.errors import FarshoreError, Unreachable
from farshore.failpoints import failpoint
from farshore.telemetry import get_logger

UNIT_ENVIRONMENT: Final = "FARSHORE_TAP_UNIT"
START_S: Final = 30.0
STEADY_S: Final = 10.0
"""A tap that served this long may be started again at once when it dies."""
PAUSE_MAX_S: Final = 5.0
POLL_S: Final = 0.05
STOP_S: Final = 90.0
"""Everything taken in is applied and made durable first."""

log = get_logger()


class TapKeeper:
    """The tap of one directory.

    Args:
        up: Called when a tap answers, before others get its `client`.
        died: Called when one ended that nobody had asked to.
        unit: A service manager runs the tap; None: the environment says.
    """

    def __init__(
        self,
        directory: Path,
        up: Callable[[], Awaitable[None]],
        died: Callable[[], None],
        *,
        unit: bool | None = None,
    ) -> None:
        self._directory, self._up, self._died = directory, up, died
        self.unit = os.environ.get(UNIT_ENVIRONMENT) == "1" if unit is None else unit
        self.pid: int | None = None
        self._client: TapClient | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._wanted = asyncio.Event()
        self._serving = asyncio.Event()
        self._broken = asyncio.Event()

    @property
    def client(self) -> TapClient:
        """The control connection for short calls. Raises Unreachable while there is none."""
        if self._client is None:
            raise Unreachable("the tap does not run", where=str(self._directory))
        return self._client

    def broken(self) -> None:
        """`client` raised Unreachable: connect again, to the same tap if it lives."""
        self._broken.set()

    def connect(self) -> "contextlib.AbstractAsyncContextManager[TapClient]":
        """A connection of one's own, for calls that may take long. Raises Unreachable."""
        return control.connect(Layout(self._directory).tap_socket)

    def want(self) -> None:
        """There is something to serve: have a tap from now on."""
        self._wanted.set()

    async def wait_serving(self, timeout_s: float) -> None:
        """Wait for a tap that answers. Raises Unreachable."""
        self.want()
        try:
            async with asyncio.timeout(timeout_s):
                await self._serving.wait()
        except TimeoutError as error:
            raise Unreachable("the tap did not start", where=str(self._directory)) from error

    async def run(self) -> None:
        """Keep a tap until cancelled; it then runs on, see `stop`."""
        failures = 0
        while True:
            if not await self._answers():
                await self._wanted.wait()
                await self._begin()
            began = time.monotonic()
            died = await self._serve()
            if not died:
                continue
            self._died()
            failures = 0 if time.monotonic() - began > STEADY_S else failures + 1
            # The workload waits: the first time at once, then ever more slowly, but never for long.
            pause_s = min(PAUSE_MAX_S, 0.1 * 2 ** min(failures - 1, 10)) if failures else 0.0
            log.warning("tap_gone", pause_s=pause_s, failures=failures)
            await asyncio.sleep(pause_s)

    async def stop(self) -> None:
        """Stop the tap in order, unless it is a unit's. Call after `run` was cancelled."""
        if self.unit:
            return
        try:
            async with asyncio.timeout(STOP_S):
                async with self.connect() as client:
                    pid = (await client.hello()).pid
                    await client.stop()
                if self._process is not None:
                    await self._process.wait()
                await _ended(pid)
        except (FarshoreError, TimeoutError) as error:
            if self._process is not None and self._process.returncode is None and self.pid is None:
                await self._call_off(self._process)
            elif self.pid is not None and _alive(self.pid):
                log.error("tap_not_stopped", error=str(error) or f"not within {STOP_S:g} s")

    async def _call_off(self, process: asyncio.subprocess.Process) -> None:
        """Have a tap end that has been started and does not answer yet: nobody else would ever stop it."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            log.error("tap_not_stopped", error=f"not within {STOP_S:g} s of being started")

    async def _answers(self) -> bool:
        try:
            async with self.connect() as client:
                await client.hello()
        except FarshoreError:
            return False
        return True

    async def _begin(self) -> None:
        """Start a tap, or wait for the unit's, until it answers or ends."""
        deadline = time.monotonic() + START_S
        if not self.unit:
            failpoint("agent.before_tap_start")
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agent.tap",
                str(self._directory),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,
            )
            log.info("tap_started", pid=self._process.pid)
        while time.monotonic() < deadline:
            if await self._answers():
                return
            if self._process is not None and self._process.returncode is not None:
                log.error("tap_ended_at_once", code=self._process.returncode)
                return
            await asyncio.sleep(POLL_S)
        log.error("tap_does_not_answer", seconds=START_S)

    async def _serve(self) -> bool:
        """From the tap's first answer to its end; False when only the connection ended."""
        try:
            async with self.connect() as client:
                self.pid = (await client.hello()).pid
                gone = asyncio.create_task(_ended(self.pid), name="tap-end")
                broken = asyncio.create_task(self._broken.wait(), name="tap-broken")
                try:
                    await self._up()
                    self._broken.clear()
                    self._client = client
                    self._serving.set()
                    await asyncio.wait({gone, broken}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self._client = None
                    self._serving.clear()
                    gone.cancel()
                    broken.cancel()
        except FarshoreError as error:
            log.error("tap_not_usable", error=str(error))
            await asyncio.sleep(POLL_S)
        if self.pid is not None and _alive(self.pid):
            if self._process is None or self._process.pid != self.pid:
                return False
            # Ours: what looks alive may only be waiting to be reaped.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._process.wait()
            if self._process.returncode is None:
                return False
        self._process = None
        return True


async def _ended(pid: int) -> None:
    """Return when process ``pid`` has ended, ours or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(descriptor, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False
