"""A proxy before an object store that breaks what it is told to break, one request at a time.

It reads a request whole, decides, asks the store or does not, and passes the answer on or does not. What it
knows of HTTP is where a message ends; Host and everything that is signed go through unchanged.
"""

import contextlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import BinaryIO, Final, Literal

IDLE_S: Final = 60.0
_HEAD_BYTES_MAX: Final = 65536
_RESET: Final = struct.pack("ii", 1, 0)  # linger for no time: close() sends RST

How = Literal["reset", "lost", "503", "403", "cut", "slow"]
"""``reset``: the store never hears of it. ``lost``: it does what was asked, and nobody hears of that. Of
``503`` (busy) and ``403`` (credentials refused) nothing was done. ``cut``: the answer ends half way.
``slow``: it comes a second later."""

SLOW_S: Final = 1.0


@dataclass
class Trouble:
    """The next ``count`` requests of ``method`` (a regular expression, as ``path`` is) go wrong ``how``.

    Attributes:
        happened: How many did.
    """

    how: How
    method: str = ".*"
    path: str = ".*"
    count: int = 1
    happened: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> How | None:
        """Return what goes wrong with this request, and count it."""
        wanted = self.happened < self.count
        if not wanted or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return None
        self.happened += 1
        return self.how


class Storm(Trouble):
    """A ``share`` of all requests goes wrong, each in one of the ways ``hows``, the same for a seed."""

    def __init__(self, seed: int, share: float, *hows: How) -> None:
        super().__init__("lost", count=2**31)
        self._random, self._share, self._hows = random.Random(seed), share, hows

    def strikes(self, method: str, path: str) -> How | None:
        if self._random.random() >= self._share:
            return None
        self.happened += 1
        return self._random.choice(self._hows)


class FaultProxy:
    """Listens on a port of its own and passes requests on to ``target`` of this host.

    Attributes:
        port: Where to send requests to.
        requests: (method, path) of each that arrived whole.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._troubles: list[Trouble] = []
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._gone = False
        self._asking = 0
        self._asked = threading.Condition(self._lock)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        self.requests: list[tuple[str, str]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def plan(self, *troubles: Trouble) -> None:
        """Break what comes from now on; of several that fit the first one strikes."""
        with self._lock:
            self._troubles += troubles

    def clear(self) -> int:
        """Break nothing more; return how many requests went wrong so far."""
        with self._lock:
            troubles, self._troubles = self._troubles, []
        return sum(trouble.happened for trouble in troubles)

    def go_away(self) -> None:
        """The store is gone: connections are reset, and new ones as soon as they are made.

        What it was asked before has had its effect when this returns.
        """
        with self._asked:
            self._gone = True
            self._asked.wait_for(lambda: not self._asking, IDLE_S)
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        self._gone = False

    def close(self) -> None:
        self.go_away()
        self._listener.close()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.settimeout(IDLE_S)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.add(client)
        store = http.client.HTTPConnection("127.0.0.1", self._target, timeout=IDLE_S)
        try:
            # A request that does not come whole, or a peer that goes, ends the connection and nothing else.
            quiet = contextlib.suppress(OSError, http.client.HTTPException, ValueError)
            with quiet, client.makefile("rb") as stream:
                while not self._gone and (request := _Request.read(stream)) is not None:
                    if not self._pass_on(request, store, client):
                        break
        finally:
            with self._lock:
                self._clients.discard(client)
            store.close()
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()

    def _pass_on(self, request: "_Request", store: http.client.HTTPConnection, client: socket.socket) -> bool:
        """Handle one request; False when the connection has to be reset after it."""
        with self._lock:
            self.requests.append((request.method, request.path))
            struck = (trouble.strikes(request.method, request.path) for trouble in self._troubles)
            how = next(filter(None, struck), None)
            if how == "reset" or self._gone:
                return False
            self._asking += how not in ("503", "403")
        if how in ("503", "403"):
            client.sendall(f"HTTP/1.1 {how} No\r\nContent-Length: 0\r\n\r\n".encode())
            return True
        try:
            head, body = request.ask(store)
        finally:
            with self._asked:
                self._asking -= 1
                self._asked.notify_all()
        if how == "lost" or self._gone:
            return False
        if how == "slow":
            time.sleep(SLOW_S)
        if how == "cut":
            # Where there is no body the head is cut.
            whole = head + body
            client.sendall(whole[: len(head) + len(body) // 2] if body else head[: len(head) // 2])
            client.shutdown(socket.SHUT_WR)  # an orderly end, not a reset: the length alone tells
            with contextlib.suppress(OSError):
                client.settimeout(5)
                client.recv(1)
            return False
        client.sendall(head + body)
        return True


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @classmethod
    def read(cls, stream: BinaryIO) -> "_Request | None":
        """Return the next one; None when there is none."""
        line = stream.readline(_HEAD_BYTES_MAX)
        if not line:
            return None
        method, path, _ = line.decode("ascii").split(" ", 2)
        headers = []
        while (line := stream.readline(_HEAD_BYTES_MAX)) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers.append((name, value.strip()))
        length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
        body = stream.read(length)
        if len(body) != length:
            raise ValueError("the request ended before its body")
        return cls(method, path, headers, body)

    def ask(self, store: http.client.HTTPConnection) -> tuple[bytes, bytes]:
        """Have the store answer; return head and body."""
        store.putrequest(self.method, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers:
            store.putheader(name, value)
        store.endheaders(self.body)
        answer = store.getresponse()
        body = answer.read()
        headers = [(name, value) for name, value in answer.getheaders() if not _about_transfer(name)]
        length = answer.getheader("Content-Length") if self.method == "HEAD" else str(len(body))
        lines = [
            f"HTTP/1.1 {answer.status} {answer.reason}",
            *(f"{name}: {value}" for name, value in headers),
        ]
        if length is not None and answer.status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1"), body


def _about_transfer(name: str) -> bool:
    return name.lower() in ("content-length", "transfer-encoding", "connection", "keep-alive")
