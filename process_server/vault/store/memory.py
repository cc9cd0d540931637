"""A store in memory: for tests and tools, under the same contract as the others."""

import threading
import time
from collections.abc import Iterator
from itertools import count

from farshore.errors import NotFound
from process_server.vault.store.protocol import AlreadyExists, Body, Precondition, body_bytes, check_name


class MemoryStore:
    """Objects in a dictionary. Etags are a counter, as in stores where equal bytes written twice differ."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._modified_s: dict[str, float] = {}
        self._lock = threading.Lock()
        self._versions = count(1)

    def put_new(self, name: str, body: Body) -> None:
        check_name(name)
        with self._lock:
            if name in self._objects:
                raise AlreadyExists("cannot create the object", where=name, why="it exists")
            self._objects[name] = (body_bytes(body), str(next(self._versions)))
            self._modified_s[name] = time.time()

    def get(self, name: str) -> bytes:
        return self.get_with_etag(name)[0]

    def get_with_etag(self, name: str) -> tuple[bytes, str]:
        check_name(name)
        with self._lock:
            found = self._objects.get(name)
        if found is None:
            raise NotFound("no such object", where=name)
        return found

    def get_range(self, name: str, at: int, length: int) -> bytes:
        if at < 0 or length < 0:
            raise ValueError(f"no range: {length} bytes at {at}")
        return self.get(name)[at : at + length]

    def size(self, name: str) -> int:
        return len(self.get(name))

    def modified_s(self, name: str) -> float:
        self.get(name)
        with self._lock:
            return self._modified_s[name]

    def list(self, prefix: str) -> Iterator[str]:
        with self._lock:
            names = [name for name in self._objects if name.startswith(prefix)]
        return iter(names)

    def cas(self, name: str, body: Body, expected: str | None) -> str:
        check_name(name)
        with self._lock:
            found = self._objects.get(name)
            if (found[1] if found else None) != expected:
                raise Precondition("cannot replace the object", where=name, why="it has changed")
            etag = str(next(self._versions))
            self._objects[name] = (body_bytes(body), etag)
            self._modified_s[name] = time.time()
        return etag

    def delete(self, name: str) -> None:
        check_name(name)
        with self._lock:
            self._objects.pop(name, None)

    def close(self) -> None:
        """Keep the objects: whoever holds the store may open a vault in it again."""
