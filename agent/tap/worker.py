"""A thread for what may hang: whoever gave it something to do can see since when it has been at it."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """A thread that runs what it is given, one after another.

    Attributes:
        since: Monotonic time at which the running call began; 0 when idle.
    """

    def __init__(self, name: str) -> None:
        self.since = 0.0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

        self._queue.put(run)
        return future

    def stop(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            self.since = time.monotonic()
            call()
            self.since = 0.0
