"""The worker processes: started, given sockets, listened to, started again when they die."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from farshore.errors import Failed
from farshore.telemetry import get_logger
from process_server.ingest import ipc

CONNECTIONS_MAX: Final = 1024
READY_S: Final = 30.0
RESTART_PAUSE_S: Final = 0.2
STOP_S: Final = 10.0
MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "33554432"}
"""glibc maps and unmaps every block of 128 KiB, the size of a group of small records: 21.6 us a record as
against 20.2 with these."""

log = get_logger()


@dataclass(eq=False, slots=True)
class WorkerProcess:
    """One worker as the main process sees it."""

    process: subprocess.Popen[bytes]
    channel: ipc.Channel
    sockets: socket.socket
    ready: asyncio.Event
    ended: asyncio.Event
    connections: set[int] = field(default_factory=set)


class WorkerPool:
    """Keeps ``count`` workers running.

    Args:
        setup: Makes the first message; called for each start, so that a renewed certificate is used.
        receive: Called with what a worker says, in order.
        died: Called once a worker is gone; its connections are closed already.
    """

    def __init__(
        self,
        count: int,
        setup: Callable[[], ipc.Setup],
        receive: Callable[[WorkerProcess, ipc.Message, bytes], None],
        died: Callable[[WorkerProcess], None],
    ) -> None:
        self._count, self._setup, self._receive, self._died = count, setup, receive, died
        self.workers: list[WorkerProcess] = []
        self._usable = asyncio.Event()
        self._stopping = False
        self._connection = 0

    @property
    def connections(self) -> int:
        return sum(len(worker.connections) for worker in self.workers)

    async def wait_ready(self) -> None:
        """Wait until every worker can take connections. Raises Failed."""
        try:
            async with asyncio.timeout(READY_S):
                while len(self.workers) < self._count or not all(w.ready.is_set() for w in self.workers):
                    self._usable.clear()
                    await self._usable.wait()
        except TimeoutError:
            raise Failed("ingest workers do not start", why=f"not ready after {READY_S:.0f} s") from None

    async def run(self) -> None:
        """Start the workers and keep them running until cancelled; then stop them."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._count):
                    group.create_task(self._keep(number), name=f"ingest-worker-{number}")
        finally:
            self._stopping = True
            for worker in self.workers:
                worker.channel.send(ipc.Stop())
            for worker in self.workers:
                await asyncio.shield(asyncio.to_thread(_reap, worker.process))
                worker.sockets.close()
                worker.channel.close()

    def hand_over(self, accepted: socket.socket) -> tuple[WorkerProcess, int] | None:
        """Give a connection to the least loaded worker; the caller closes its own copy.

        Returns:
            Worker and number of the connection, or None when nobody can take it.
        """
        usable = [worker for worker in self.workers if worker.ready.is_set() and not worker.ended.is_set()]
        if not usable or self.connections >= CONNECTIONS_MAX:
            return None
        worker = min(usable, key=lambda worker: len(worker.connections))
        self._connection += 1
        try:
            socket.send_fds(worker.sockets, [self._connection.to_bytes(8, "little")], [accepted.fileno()])
        except OSError:
            return None
        worker.connections.add(self._connection)
        return worker, self._connection

    async def _keep(self, number: int) -> None:
        while True:
            worker = await self._start()
            self.workers.append(worker)
            try:
                await worker.ended.wait()
            finally:
                if not self._stopping and worker.ended.is_set():
                    self.workers.remove(worker)
            log.error("ingest_worker_died", worker=number, pid=worker.process.pid)
            await asyncio.to_thread(_reap, worker.process)
            worker.sockets.close()
            self._died(worker)
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _start(self) -> WorkerProcess:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        sockets, their_sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (control, sockets):
            end.setblocking(False)
        with theirs, their_sockets:
            descriptors = (theirs.fileno(), their_sockets.fileno())
            # A program of its own and not a fork: it imports a tenth of what is loaded here, and inherits
            # neither locks nor keys. It finds our modules where this process found them.
            environment = {
                **os.environ,
                **MALLOC,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            process = subprocess.Popen(  # noqa: ASYNC220 - fork and exec only; nothing is waited for
                [
                    sys.executable,
                    "-m",
                    "process_server.ingest.worker",
                    *map(str, descriptors),
                    str(os.getpid()),
                ],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        ready, ended = asyncio.Event(), asyncio.Event()

        def receive(message: ipc.Message, raw: bytes) -> None:
            if isinstance(message, ipc.Ready):
                ready.set()
                self._usable.set()
                return
            if isinstance(message, ipc.Closed):
                worker.connections.discard(message.connection)
            self._receive(worker, message, raw)

        channel = ipc.Channel(receive, ended.set, worker=False)
        worker = WorkerProcess(process, channel, sockets, ready, ended)
        await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=control)
        channel.send(self._setup())
        return worker


def _reap(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
