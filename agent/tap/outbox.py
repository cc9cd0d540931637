"""Replies of one NBD connection, sent from whichever thread has them."""

import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

_IOV_MAX: Final = 64


class Outbox:
    """Sends from any thread without waiting; what the socket does not take is sent by the loop's thread.

    Attributes:
        bytes: Not taken yet.
        broken: The client is gone.
    """

    def __init__(self, peer: socket.socket, stuck: Callable[[], None]) -> None:
        """``stuck`` is called, in the sending thread, when there is something to send later, or broken."""
        self.bytes = 0
        self.broken = False
        self._peer, self._stuck = peer, stuck
        self._queue: deque[memoryview] = deque()
        self._lock = threading.Lock()

    def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        """Send ``buffers`` in order; they must not change any more."""
        with self._lock:
            if self.broken:
                return
            waiting = bool(self._queue)
            for buffer in buffers:
                self._queue.append(memoryview(buffer).cast("B"))
                self.bytes += len(buffer)
            if waiting:
                return
            self._push()
            if not self._queue and not self.broken:
                return
        self._stuck()

    def push(self) -> bool:
        """Send more; True when nothing is left."""
        with self._lock:
            self._push()
            return not self._queue

    def close(self) -> None:
        with self._lock:
            self.broken = True
            self._queue.clear()
            self.bytes = 0

    def _push(self) -> None:
        while self._queue:
            try:
                buffers = [self._queue[n] for n in range(min(len(self._queue), _IOV_MAX))]
                sent = self._peer.sendmsg(buffers, [], socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.broken = True
                self._queue.clear()
                self.bytes = 0
                return
            self.bytes -= sent
            while sent:
                first = self._queue[0]
                if sent < len(first):
                    self._queue[0] = first[sent:]
                    break
                sent -= len(first)
                self._queue.popleft()
