"""What a store is asked, and how long it takes: counted in every process, shown by one.

A worker process has no metrics of its own (a scrape asks one process): it sends what its meter counted to the
main process, whose meter adds it up.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from farshore.errors import CapacityError, ConfigError, NotFound, Unreachable
from process_server.vault.store.protocol import AlreadyExists, Body, Precondition, Store, buffers_of

T = TypeVar("T")

BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Row = tuple[str, str, int, int, float, tuple[int, ...]]
"""Operation, what came of it, requests, bytes, seconds, and requests by the bucket of `BUCKETS_S` (one more
than there are bounds) they took."""

_CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (AlreadyExists, "exists"),
    (Precondition, "precondition"),
    (NotFound, "not_found"),
    (Unreachable, "unreachable"),
    (CapacityError, "full"),
    (ConfigError, "refused"),
)


@dataclass(slots=True)
class _Tally:
    requests: int = 0
    bytes: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))


class Meter(Collector):
    """Sums by operation and outcome. Any thread may add to it."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._lock = threading.Lock()

    def note(self, operation: str, code: str, bytes_moved: int, seconds: float) -> None:
        """Count one request."""
        buckets = [0] * (len(BUCKETS_S) + 1)
        buckets[bisect_left(BUCKETS_S, seconds)] = 1
        self.add([(operation, code, 1, bytes_moved, seconds, tuple(buckets))])

    def add(self, rows: list[Row] | tuple[Row, ...]) -> None:
        """Add what another meter gave with `take`."""
        with self._lock:
            for operation, code, requests, bytes_moved, seconds, buckets in rows:
                tally = self._tallies.setdefault((operation, code), _Tally())
                tally.requests += requests
                tally.bytes += bytes_moved
                tally.seconds += seconds
                for at, count in enumerate(buckets):
                    tally.buckets[at] += count

    def take(self) -> tuple[Row, ...]:
        """Return what was counted since the last call, and count from zero again."""
        with self._lock:
            taken, self._tallies = self._tallies, {}
        return tuple(
            (operation, code, tally.requests, tally.bytes, tally.seconds, tuple(tally.buckets))
            for (operation, code), tally in taken.items()
        )

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "farshore_blob_requests", "Requests to the store; a listing is one.", labels=["op", "code"]
        )
        moved = CounterMetricFamily("farshore_blob_bytes", "Bytes of objects sent and read.", labels=["op"])
        conflicts = CounterMetricFamily(
            "farshore_blob_cas_conflicts", "Compare-and-swaps that met another object than they expected."
        )
        seconds = HistogramMetricFamily("farshore_blob_request_seconds", "Time of a request.", labels=["op"])
        with self._lock:
            by_operation: dict[str, _Tally] = {}
            for (operation, code), tally in sorted(self._tallies.items()):
                requests.add_metric([operation, code], tally.requests)
                total = by_operation.setdefault(operation, _Tally())
                total.bytes += tally.bytes
                total.seconds += tally.seconds
                total.buckets = [a + b for a, b in zip(total.buckets, tally.buckets, strict=True)]
            conflict = self._tallies.get(("cas", "precondition"))
            conflicts.add_metric([], conflict.requests if conflict is not None else 0)
        for operation, total in by_operation.items():
            moved.add_metric([operation], total.bytes)
            bounds = [*map(floatToGoString, BUCKETS_S), "+Inf"]
            below = [sum(total.buckets[: at + 1]) for at in range(len(bounds))]
            seconds.add_metric([operation], list(zip(bounds, below, strict=True)), total.seconds)
        yield from (requests, moved, conflicts, seconds)


class MeteredStore:
    """Wraps a store and counts each call in ``meter``."""

    def __init__(self, store: Store, meter: Meter) -> None:
        self._store, self._meter = store, meter

    def put_new(self, name: str, body: Body) -> None:
        self._timed("put", lambda: self._store.put_new(name, body), lambda _: _length(body))

    def get(self, name: str) -> bytes:
        return self._timed("get", lambda: self._store.get(name), len)

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        return self._timed("get", lambda: self._store.get_with_etag(name), lambda found: len(found[0]))

    def get_range(self, name: str, at: int, length: int) -> bytes:
        return self._timed("get_range", lambda: self._store.get_range(name, at, length), len)

    def size(self, name: str) -> int:
        return self._timed("head", lambda: self._store.size(name))

    def modified_s(self, name: str) -> float:
        return self._timed("head", lambda: self._store.modified_s(name))

    def list(self, prefix: str) -> Iterator[str]:
        return iter(self._timed("list", lambda: list(self._store.list(prefix))))

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        return self._timed("cas", lambda: self._store.cas(name, body, expected), lambda _: _length(body))

    def delete(self, name: str) -> None:
        self._timed("delete", lambda: self._store.delete(name))

    def close(self) -> None:
        self._store.close()

    def _timed(self, operation: str, call: Callable[[], T], moved: Callable[[T], int] = lambda _: 0) -> T:
        began, code, bytes_moved = time.monotonic(), "failed", 0
        try:
            result = call()
            code, bytes_moved = "ok", moved(result)
            return result
        except Exception as exc:
            code = next((code for kind, code in _CODES if isinstance(exc, kind)), "failed")
            raise
        finally:
            self._meter.note(operation, code, bytes_moved, time.monotonic() - began)


def _length(body: Body) -> int:
    return sum(len(piece) for piece in buffers_of(body))
