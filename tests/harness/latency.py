"""How long a volume's clients wait, asked all the time from a thread of its own."""

import asyncio
import os
import threading
import time
from typing import Final

from farshore.nbd.client import connect, parse_uri

PAUSE_S: Final = 0.005
ENDS_S: Final = 60.0


class Latency:
    """One write of 4 KiB after another to offset 0, each answered before the next; perhaps flushed, too.

    Attributes:
        writes, flushes: When each began (monotonic) and how many seconds it took, in order.
        under_way_since: When the request that is not answered yet began; 0 between two.
        content: What the last answered write put there.
    """

    def __init__(self, uri: str, *, flush: bool = False) -> None:
        self.writes: list[tuple[float, float]] = []
        self.flushes: list[tuple[float, float]] = []
        self.under_way_since = 0.0
        self.content = b""
        self._uri, self._flush = uri, flush
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def longest(self, since: float) -> float:
        """Longest request, write or FLUSH, that was answered after ``since``."""
        return max((took for at, took in self.writes + self.flushes if at + took > since), default=0.0)

    def __enter__(self) -> "Latency":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._thread.join(ENDS_S)
        if kind is None:
            assert not self._thread.is_alive(), "a request is never answered"
            assert self._error is None, self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._ask())
        except Exception as error:
            self._error = error

    async def _ask(self) -> None:
        address, export = parse_uri(self._uri)
        async with connect(address, export) as client:
            while not self._over.is_set():
                content = os.urandom(4096)
                begun = self.under_way_since = time.monotonic()
                await client.write(0, content)
                self.content = content
                self.writes.append((begun, time.monotonic() - begun))
                if self._flush:
                    begun = self.under_way_since = time.monotonic()
                    await client.flush()
                    self.flushes.append((begun, time.monotonic() - begun))
                self.under_way_since = 0.0
                await asyncio.sleep(PAUSE_S)
