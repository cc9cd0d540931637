"""A store that asks again when no answer came, for a bounded time, and says whose write it then meets."""

from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import stamina
from stamina.instrumentation import set_on_retry_hooks

from farshore.errors import FarshoreError, NotFound, Unreachable
from process_server.vault.store.protocol import AlreadyExists, Body, Precondition, Store, body_bytes

T = TypeVar("T")

TOTAL_S: Final = 30.0
"""No try begins later than this after the first: then the caller hears of it, and decides."""
PAUSE_S: Final = (0.1, 5.0)
JITTER_S: Final = 0.5
"""Several workers lose a store at one moment; they do not come back at one moment."""

# By default each retry is logged with what was called, and in a command structlog writes to stdout.
set_on_retry_hooks([])


class RetryingStore:
    """Wraps a store each call of which is one request.

    Asked again is whatever was Unreachable. A read may be asked twice as it is. A create or swap may have
    happened the first time, and then the second meets our own object: only if an answer was lost is what
    lies there compared, and equal bytes are success. Otherwise AlreadyExists and Precondition mean what they
    say, so that of several writers of equal bytes still only one succeeds.

    A swap that was lost, had its effect and was replaced by another writer is reported as Precondition: who
    swaps looks again, and finds its own mark (`ControlStore.update`). Two tries of one swap cannot both have
    an effect, since no object that is swapped ever has the same bytes twice, and so no etag either.

    Args:
        total_s: No try begins later than this after the first.
        pause_s: The first pause and the longest.
    """

    def __init__(
        self, store: Store, *, total_s: float = TOTAL_S, pause_s: tuple[float, float] = PAUSE_S
    ) -> None:
        self._store, self._total_s, self._pause_s = store, total_s, pause_s

    def put_new(self, name: str, body: Body) -> None:
        met: AlreadyExists | None = None

        def put(answers_lost: int) -> None:
            nonlocal met
            if met is None:
                try:
                    self._store.put_new(name, body)
                    return
                except AlreadyExists as exc:
                    if not answers_lost:
                        raise
                    met = exc  # what lies there stays: if the reading is lost, only that is repeated
            try:
                found = self._store.get(name)
            except NotFound as exc:
                met = None
                raise Unreachable(
                    "cannot create the object", where=name, why="the store says that it exists and that not"
                ) from exc
            if found != body_bytes(body):
                raise met

        self._write("cannot create the object", name, put)

    def get(self, name: str) -> bytes:
        return self._ask(lambda _: self._store.get(name))

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        return self._ask(lambda _: self._store.get_with_etag(name))

    def get_range(self, name: str, at: int, length: int) -> bytes:
        return self._ask(lambda _: self._store.get_range(name, at, length))

    def size(self, name: str) -> int:
        return self._ask(lambda _: self._store.size(name))

    def modified_s(self, name: str) -> float:
        return self._ask(lambda _: self._store.modified_s(name))

    def list(self, prefix: str) -> Iterator[str]:
        # All of it before the first name is given out: one that was begun again would say names twice.
        yield from self._ask(lambda _: list(self._store.list(prefix)))

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        def swap(answers_lost: int) -> str:
            try:
                return self._store.cas(name, body, expected)
            except Precondition:
                if not answers_lost:
                    raise
            # Bytes and etag of one reading: between two of them it could become another's etag.
            try:
                found, etag = self._store.get_with_etag(name)
            except NotFound:
                found, etag = b"", ""
            if not etag or found != body_bytes(body):
                raise Precondition("cannot replace the object", where=name, why="it has changed")
            return etag

        return self._write("cannot replace the object", name, swap)

    def delete(self, name: str) -> None:
        self._ask(lambda _: self._store.delete(name))

    def close(self) -> None:
        self._store.close()

    def _write(self, what: str, name: str, call: Callable[[int], T]) -> T:
        def write(answers_lost: int) -> T:
            try:
                return call(answers_lost)
            except (AlreadyExists, Precondition, Unreachable):
                raise
            except FarshoreError as exc:
                if not answers_lost:
                    raise
                # Full, or refused: that is said of this try, and of what the one before did it says nothing.
                raise Unreachable(what, where=name, why=f"no answer before, and now: {exc}") from exc

        return self._ask(write)

    def _ask(self, call: Callable[[int], T]) -> T:
        first_s, longest_s = self._pause_s
        answers_lost = -1
        for attempt in stamina.retry_context(
            on=Unreachable,
            attempts=None,
            timeout=self._total_s,
            wait_initial=first_s,
            wait_max=longest_s,
            wait_jitter=min(JITTER_S, first_s * 5),
        ):
            answers_lost += 1
            with attempt:
                return call(answers_lost)
        raise AssertionError("stamina raises what the last attempt did")
