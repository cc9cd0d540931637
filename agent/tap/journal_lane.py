"""The way of a volume's writes into its journal.

A thread that can hang hangs alone: what it was given is still in `Pending`, and whoever supervises it can see
since when it has been waiting.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from agent.journal.errors import JournalFailed, JournalFull
from agent.journal.writer import JournalWriter
from agent.tap.batch import Batch
from agent.tap.ladder import Broken, Event, Full
from farshore.failpoints import failpoint
from farshore.units import MIB

GROUP_BYTES: Final = MIB
"""The journal is synced at once when this much waits."""


class JournalLane:
    """Appends batches to one incarnation of the journal, answers them, and makes them durable.

    Whoever put a batch appends it: nothing is handed over on the way from a client to its reply. One thread
    appends at a time; what comes meanwhile is left to the lane's own thread.

    Attributes:
        append_since: Monotonic time at which the append under way began; 0 when there is none.
        sync_since: The same of the sync.
    """

    def __init__(
        self,
        writer: JournalWriter,
        name: str,
        *,
        group_commit_s: float,
        durable: Callable[[list[Batch]], None],
        stopped: Callable[[Event], None],
    ) -> None:
        """``durable`` and ``stopped`` are called from this lane's threads, ``stopped`` also from `append`."""
        self.writer = writer
        self.append_since = self.sync_since = 0.0
        self._group_commit_s = group_commit_s
        self._durable, self._stopped = durable, stopped
        self._put: deque[Batch] = deque()
        self._appending = False
        self._turn: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._appended: deque[Batch] = deque()
        self._appended_bytes = 0
        self._armed = self._urgent = False
        self._full = self._abandoned = self._closing = self._append_ended = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._append_loop, name=f"{name}-append", daemon=True),
            threading.Thread(target=self._sync_loop, name=f"{name}-sync", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        """Append this next; `append` or `append_soon` follows. Called in the order of LSNs."""
        self._put.append(batch)

    def append(self, last: Batch) -> None:
        """Append what was put, up to ``last``, unless somebody is doing so; as long as the journal takes."""
        self._append_up_to(last)

    def append_soon(self) -> None:
        """Have the lane's thread append what was put."""
        self._turn.put(None)

    def hurry(self) -> None:
        """Somebody waits for what was put so far to be durable."""
        self._urgent = True
        self._wake.put(True)

    @property
    def undurable(self) -> bool:
        """Batches were put, or appended, that are not durable yet."""
        return bool(self._put or self._appended)

    def abandon(self) -> None:
        """Nothing that the threads still do counts from here on: nothing is answered or becomes durable."""
        with self._lock:
            self._abandoned = True
        self.close()

    def close(self) -> None:
        """Let the threads end when they have done what they were given."""
        with self._lock:
            self._closing = True
        self._turn.put(None)

    @property
    def ended(self) -> bool:
        """No thread uses the writer any more."""
        return not self._appending and not any(thread.is_alive() for thread in self._threads)

    def _given_up(self) -> bool:
        return self._abandoned

    def _append_loop(self) -> None:
        while not self._append_ended:
            self._turn.get()
            self._append_up_to(None)
            with self._lock:
                self._append_ended = self._closing and not self._appending and not self._put
        self._wake.put(True)

    def _append_up_to(self, last: Batch | None) -> None:
        with self._lock:
            if self._appending or not self._put:
                return
            self._appending = True
            batch = self._put.popleft()
        while True:
            self._append(batch)
            with self._lock:
                if batch is last or not self._put:
                    self._appending = False
                    left = self._closing or bool(self._put)
                    break
                batch = self._put.popleft()
        if left:
            self._turn.put(None)

    def _append(self, batch: Batch) -> None:
        if self._full or self._given_up():
            return  # whoever stopped us takes it from Pending
        failpoint("tap.append.before")
        self.append_since = time.monotonic()
        try:
            self.writer.append(batch.time_ns, batch.count, batch.table(), batch.payload.data)
        except JournalFull as error:
            self._full = True
            self._stopped(Full(str(error)))
            return
        except JournalFailed as error:
            self._full = True
            self._stopped(Broken(str(error)))
            return
        finally:
            self.append_since = 0.0
        failpoint("tap.append.after")
        with self._lock:
            if self._abandoned:
                return
            batch.answered = True
            self._appended.append(batch)
            self._appended_bytes += batch.held_bytes
        if batch.client is not None and batch.reply:
            batch.client.send(batch.reply)
        if not self._armed:
            self._armed = True
            self._wake.put(False)
        elif self._appended_bytes >= GROUP_BYTES and not self._urgent:
            self._urgent = True
            self._wake.put(True)

    def _sync_loop(self) -> None:
        while True:
            self._wait()
            ending = self._append_ended
            self._armed = self._urgent = False
            self._appended_bytes = 0
            if self._abandoned or (ending and not self._appended):
                return
            if not self._appended:
                continue
            if ending:
                self._wake.put(True)
            self.sync_since = time.monotonic()
            try:
                durable_lsn = self.writer.sync()
                failpoint("tap.sync.after")
                self._hand_over(durable_lsn)
                self.writer.prepare()
            except JournalFailed as error:
                self._full = True
                self._stopped(Broken(str(error)))
                return
            finally:
                self.sync_since = 0.0

    def _wait(self) -> None:
        """Until something was appended, and then a little longer for company."""
        if self._wake.get():
            return
        deadline = time.monotonic() + self._group_commit_s
        while not self._urgent and (left := deadline - time.monotonic()) > 0:
            try:
                self._wake.get(timeout=left)
            except queue.Empty:
                return

    def _hand_over(self, durable_lsn: int) -> None:
        done: list[Batch] = []
        with self._lock:
            if self._abandoned:
                return
            while self._appended and self._appended[0].last_lsn <= durable_lsn:
                batch = self._appended.popleft()
                batch.durable = True
                done.append(batch)
            if done:  # under the lock: what is taken back after an abandon() must not overtake it
                self._durable(done)
