"""One accepted connection, in whichever worker it is."""

import asyncio
from dataclasses import dataclass, field
from typing import Final

from farshore.wire import frames
from farshore.wire import messages as m
from process_server.ingest import ipc
from process_server.ingest.pool import WorkerProcess
from process_server.ingest.session import Session
from process_server.ingest.stream import Position

FRAMES_MAX: Final = 4096


@dataclass(eq=False)
class Peer:
    """Its worker does the TLS; what is for the main process comes as frames.

    Attributes:
        machine: Id, as its certificate says; empty without one.
        control: It is the session's control connection.
        closing: It was told to end; what still comes does not count.
        frames: Kind and body, in order; None at the end.
    """

    id: int
    worker: WorkerProcess
    address: str
    certificate: bytes = b""
    machine: bytes = b""
    session: Session | None = None
    control: bool = False
    closing: bool = False
    frames: asyncio.Queue[tuple[int, bytes] | None] = field(default_factory=lambda: asyncio.Queue(FRAMES_MAX))

    def send(self, message: m.Message) -> None:
        self.worker.channel.send(ipc.Send(self.id), frames.encode(message))

    def position(self, volume: bytes, key: bytes, incarnation: bytes, position: Position) -> None:
        """Tell the worker where a volume's log goes on."""
        self.worker.channel.send(
            ipc.Position(self.id, volume, key, incarnation, position.lsn, position.digest)
        )

    def close(self, code: str = "", text: str = "", volume: bytes | None = None) -> None:
        """End it, with ERROR if there is a code."""
        if not self.closing:
            self.closing = True
            self.worker.channel.send(ipc.Close(self.id, code, text, volume or b""))

    def ended(self) -> None:
        """Nothing comes any more. For that there is room: a full queue belongs to a peer that is closed."""
        while self.frames.full():
            self.frames.get_nowait()
        self.frames.put_nowait(None)
