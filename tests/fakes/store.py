"""A store that fails as planned: before anything happened, or after it happened and nobody heard."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, TypeVar

from farshore.errors import CapacityError, Unreachable
from process_server.vault.store.protocol import Body, Store, body_bytes

T = TypeVar("T")

How = Literal["refused", "applied", "full"]
"""``refused``: nothing happened. ``applied``: it happened, the reply was lost. ``full``: CapacityError."""


@dataclass
class Fault:
    """The ``hit``-th call (from 1) of ``method`` whose name begins with ``prefix`` fails ``how``."""

    method: str
    how: How
    hit: int = 1
    prefix: str = ""
    seen: int = field(default=0, init=False)

    @property
    def was_hit(self) -> bool:
        return self.seen >= self.hit


class FaultyStore:
    """Wraps a store. As a context manager it fails the test whose planned faults were not all met.

    Attributes:
        calls: (method, name) of every call, in order.
    """

    def __init__(self, store: Store, *faults: Fault) -> None:
        self._store = store
        self._faults = list(faults)
        self.calls: list[tuple[str, str]] = []

    def plan(self, *faults: Fault) -> None:
        """Add faults; calls made before do not count."""
        self._faults.extend(faults)

    def assert_all_hit(self) -> None:
        """Raise AssertionError naming the planned faults that never happened."""
        missed = [fault for fault in self._faults if not fault.was_hit]
        assert not missed, f"planned faults that were never hit: {missed}"

    def __enter__(self) -> "FaultyStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.assert_all_hit()

    def put_new(self, name: str, body: Body) -> None:
        self._call("put_new", name, lambda: self._store.put_new(name, body))

    def get(self, name: str) -> bytes:
        return self._call("get", name, lambda: self._store.get(name))

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        return self._call("get_with_etag", name, lambda: self._store.get_with_etag(name))

    def get_range(self, name: str, at: int, length: int) -> bytes:
        return self._call("get_range", name, lambda: self._store.get_range(name, at, length))

    def size(self, name: str) -> int:
        return self._call("size", name, lambda: self._store.size(name))

    def modified_s(self, name: str) -> float:
        return self._call("modified_s", name, lambda: self._store.modified_s(name))

    def list(self, prefix: str) -> Iterator[str]:
        return self._call("list", prefix, lambda: self._store.list(prefix))

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        return self._call("cas", name, lambda: self._store.cas(name, body, expected))

    def delete(self, name: str) -> None:
        self._call("delete", name, lambda: self._store.delete(name))

    def close(self) -> None:
        self._store.close()

    def _call(self, method: str, name: str, call: Callable[[], T]) -> T:
        self.calls.append((method, name))
        how = self._next_fault(method, name)
        if how == "refused":
            raise Unreachable(f"planned fault in {method}", where=name)
        if how == "full":
            raise CapacityError(f"planned fault in {method}", where=name)
        result = call()
        if how == "applied":
            raise Unreachable(f"planned lost reply of {method}", where=name)
        return result

    def _next_fault(self, method: str, name: str) -> How | None:
        how: How | None = None
        for fault in self._faults:
            if fault.method == method and name.startswith(fault.prefix) and not fault.was_hit:
                fault.seen += 1
                how = how or (fault.how if fault.seen == fault.hit else None)
        return how


class ForgetfulStore(FaultyStore):
    """A store that accepts conditions and ignores them, as some real ones do: what the probe must find."""

    def put_new(self, name: str, body: Body) -> None:
        _, etag = self._store.get_with_etag(name) if name in set(self._store.list(name)) else (b"", None)
        self._store.cas(name, body_bytes(body), etag)


class LaggingStore(FaultyStore):
    """A store whose listing does not show what is ``hidden``, though every object can be read by its name."""

    def __init__(self, store: Store, *hidden: str) -> None:
        super().__init__(store)
        self._hidden = frozenset(hidden)

    def list(self, prefix: str) -> Iterator[str]:
        return (name for name in self._store.list(prefix) if name not in self._hidden)
