"""A copier: a process that reads extents of protected disks and puts them into the vault.

One process per data connection, because reading, hashing and TLS do not share one interpreter well
(PERFORMANCE, sections 2 and 3). It is told what to copy through a socketpair and reports what was accepted;
when to place it in the stream is decided in the agent (`agent.replicate.copyrule`). It ends with the agent.

Run as ``python -m agent.replicate.copier FD PARENT``.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blake3 import blake3

from agent.link import BlockingLink, LinkDown, Server
from agent.replicate.disk import READ_BYTES, Block, OpenDisk, Reader
from agent.replicate.ipc import (
    Broken,
    Done,
    FromCopier,
    Ready,
    Setup,
    Stop,
    Taken,
    ToCopier,
    Volume,
    Work,
    encode,
    split,
    to_copier,
)
from farshore import heap
from farshore.compression import Codec
from farshore.errors import FarshoreError
from farshore.failpoints import failpoint
from farshore.wire import messages as m

OFFERS_AHEAD: Final = 2
"""Works whose OFFER was not answered: hides the round trip behind the hashing of the next."""
COPIES_AHEAD: Final = 64
"""COPYs not yet ACCEPTED on one connection; the credit bounds their bytes."""
KEEPALIVE_S: Final = 5.0
"""A data connection that is silent for 20 s is closed; an OFFER of nothing is a sign of life."""
ANSWER_S: Final = 600.0
"""Nothing heard for this long while answers are due: a server that builds its table of a large volume may
take minutes, one that forgot to answer must not stop a copy for ever."""
_PR_SET_PDEATHSIG: Final = 1
_EMPTY_OFFER_TOKEN: Final = 0


class DiskFault(Exception):
    """The disk of ``volume`` cannot be read."""

    def __init__(self, volume: bytes, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.volume = volume


@dataclass(slots=True)
class Sent:
    """A COPY under way."""

    work: "Progress"
    extents: list[tuple[int, int]]
    applied_lsn: int
    captured_lsn: int


@dataclass(slots=True)
class Progress:
    """One work and what became of its bytes."""

    work: Work
    tokens: int = 0
    reading: bool = True
    captured_lsn: int = 0
    sent_bytes: int = 0
    referenced_bytes: int = 0
    zero_bytes: int = 0
    same_bytes: int = 0
    offered: list[m.OfferChunk] = field(default_factory=list)
    applied_lsn: int = 0


class Copier:
    """The loop: take work, read, hash, send as far as the credit goes, report what was accepted."""

    def __init__(self, setup: Setup, parent: socket.socket, link: BlockingLink, received: bytearray) -> None:
        """``received``: the beginning of a message that is not whole yet."""
        self._setup, self._parent, self._link = setup, parent, link
        self._readers: dict[bytes, tuple[Volume, OpenDisk, Reader]] = {}
        self._asked: Counter[bytes] = Counter()
        self._credit = setup.credit_bytes
        self._token = setup.first_token
        self._zeros = bytes(max(setup.chunk_bytes, READ_BYTES))
        self._codec = Codec(setup.level) if setup.level is not None else None
        self._works: deque[Progress] = deque()
        self._steps: Iterator[None] | None = None
        self._offers: dict[int, Progress] = {}
        self._answered: deque[tuple[Progress, bytes]] = deque()
        self._again: deque[tuple[Progress, list[tuple[int, int]]]] = deque()
        self._sent: dict[int, Sent] = {}
        self._stopping = False
        self._received = received
        self._reported_wire_bytes = 0
        self._heard_at = time.monotonic()

    def run(self) -> None:
        """Work until told to stop. Raises LinkDown, OSError; EOFError when the agent is gone."""
        while True:
            progressed = self._step() if self._may_send() else False
            idle = not progressed
            if idle and self._stopping and not self._busy:
                return
            self._look(KEEPALIVE_S if idle else 0.0)

    @property
    def _busy(self) -> bool:
        return bool(self._steps or self._works or self._sent or self._offers or self._answered or self._again)

    def _may_send(self) -> bool:
        # A negative credit never happens: a COPY is at most READ_BYTES and checked against it before.
        return self._credit >= min(READ_BYTES, self._setup.credit_bytes) and len(self._sent) < COPIES_AHEAD

    def _step(self) -> bool:
        """Send at most about one COPY; tell whether anything was done."""
        if self._steps is None:
            self._steps = self._next_steps()
        if self._steps is None:
            return False
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None
        return True

    def _next_steps(self) -> Iterator[None] | None:
        if self._again:
            return self._resend(*self._again.popleft())
        if self._answered:
            return self._follow_offer(*self._answered.popleft())
        if self._works and not (self._works[0].work.compare and len(self._offers) >= OFFERS_AHEAD):
            progress = self._works.popleft()
            return self._offer(progress) if progress.work.compare else self._copy(progress)
        return None

    # --- sending ---

    def _copy(self, progress: Progress) -> Iterator[None]:
        """Send a whole work without asking."""
        work = progress.work
        for offset in range(work.offset, work.offset + work.length, READ_BYTES):
            self._copy_extents(progress, [(offset, min(READ_BYTES, work.offset + work.length - offset))])
            yield
        self._finish(progress)

    def _offer(self, progress: Progress) -> Iterator[None]:
        """Hash a whole work and ask."""
        work, chunk_bytes, zeros = progress.work, self._setup.chunk_bytes, self._zeros
        reader = self._reader(work.volume)
        end = work.offset + work.length
        for offset in range(work.offset, end, READ_BYTES):
            block = self._read(work, reader, offset, min(READ_BYTES, end - offset))
            if offset == work.offset:
                # The oldest of the works's reads stands for all: more is cut out, never less.
                progress.applied_lsn = block.applied_lsn
            progress.captured_lsn = max(progress.captured_lsn, block.captured_lsn)
            view, size = block.view, len(block.view)
            for at in range(0, size, chunk_bytes):
                part = view[at : at + chunk_bytes]
                # memoryview == bytes goes item by item; this is memcmp.
                zero = zeros.startswith(part)
                digest = b"" if zero else blake3(part).digest()
                progress.offered.append(m.OfferChunk(offset + at, len(part), digest))
            yield
        token = self._next_token()
        self._offers[token] = progress
        self._link.send(m.Offer(token, work.volume.id, tuple(progress.offered)))

    def _follow_offer(self, progress: Progress, answers: bytes) -> Iterator[None]:
        """Send what the server has not got, refer to what it has."""
        if len(answers) != len(progress.offered):
            raise LinkDown("protocol", "HAVE does not answer the OFFER")
        known: list[m.OfferChunk] = []
        needed: list[tuple[int, int]] = []
        for chunk, answer in zip(progress.offered, answers, strict=True):
            if answer == m.HAVE_SAME:
                progress.same_bytes += chunk.length
            elif answer == m.HAVE_CHUNK and chunk.hash:
                known.append(chunk)
            else:
                needed.append((chunk.offset, chunk.length))
        progress.offered = []
        if known:
            chunks = tuple(m.CopyChunk(c.offset, c.length, m.COPY_REFERENCE, c.hash) for c in known)
            extents = [(chunk.offset, chunk.length) for chunk in known]
            progress.referenced_bytes += sum(chunk.length for chunk in known)
            self._send_copy(progress, chunks, extents, progress.applied_lsn, progress.captured_lsn)
            yield
        for extents in _frames(needed):
            self._copy_extents(progress, extents)
            yield
        self._finish(progress)

    def _resend(self, progress: Progress, extents: list[tuple[int, int]]) -> Iterator[None]:
        """A REFERENCE did not hold: send the bytes."""
        for part in _frames(extents):
            self._copy_extents(progress, part)
            yield
        progress.tokens -= 1
        self._report(progress)

    def _copy_extents(self, progress: Progress, extents: list[tuple[int, int]]) -> None:
        """Read ``extents``, READ_BYTES in all at most, and send them as one COPY."""
        reader = self._reader(progress.work.volume)
        chunk_bytes, zeros = self._setup.chunk_bytes, self._zeros
        chunks: list[m.CopyChunk] = []
        raw: list[bytes | memoryview] = []
        filled = 0
        applied_lsn, captured_lsn = -1, 0
        for offset, length in extents:
            block = self._read(progress.work, reader, offset, length, filled)
            applied_lsn = block.applied_lsn if applied_lsn < 0 else applied_lsn
            captured_lsn = block.captured_lsn
            for at in range(0, length, chunk_bytes):
                part = block.view[at : at + chunk_bytes]
                if zeros.startswith(part):
                    _add_zeros(chunks, offset + at, len(part))
                    progress.zero_bytes += len(part)
                else:
                    chunk, body = self._pack(offset + at, part)
                    chunks.append(chunk)
                    raw.append(body)
                    progress.sent_bytes += len(part)
            filled += length
        progress.captured_lsn = max(progress.captured_lsn, captured_lsn)
        self._send_copy(progress, tuple(chunks), extents, applied_lsn, captured_lsn, raw)

    def _pack(self, offset: int, plain: memoryview) -> tuple[m.CopyChunk, bytes | memoryview]:
        """Hash a block and bring it into the form in which it is sent."""
        digest = blake3(plain).digest()
        if self._codec is None:
            return m.CopyChunk(offset, len(plain), m.COPY_DATA, digest), plain
        frame = self._codec.shrink(plain)
        if frame is None:
            return m.CopyChunk(offset, len(plain), m.COPY_DENSE, digest), plain
        return m.CopyChunk(offset, len(plain), m.COPY_ZSTD, digest, len(frame)), frame

    def _send_copy(
        self,
        progress: Progress,
        chunks: tuple[m.CopyChunk, ...],
        extents: list[tuple[int, int]],
        applied_lsn: int,
        captured_lsn: int,
        raw: Sequence[bytes | memoryview] = (),
    ) -> None:
        token = self._next_token()
        self._sent[token] = Sent(progress, extents, applied_lsn, captured_lsn)
        progress.tokens += 1
        self._credit -= sum(map(len, raw))
        failpoint("agent.copier_before_copy")
        self._link.send(m.Copy(token, progress.work.volume.id, applied_lsn, chunks), raw)

    def _reader(self, volume: Volume) -> Reader:
        found = self._readers.get(volume.id)
        if found is not None and found[0] == volume:
            return found[2]
        self._let_go(volume.id)
        try:
            disk = OpenDisk(volume)
        except OSError as error:
            raise DiskFault(volume.id, error) from error
        reader = Reader(disk)
        self._readers[volume.id] = volume, disk, reader
        return reader

    def _read(self, work: Work, reader: Reader, offset: int, length: int, at: int = 0) -> Block:
        try:
            return reader.read(offset, length, work.applied_min, at)
        except OSError as error:
            raise DiskFault(work.volume.id, error) from error

    def _let_go(self, volume: bytes) -> None:
        found = self._readers.pop(volume, None)
        if found is not None:
            found[1].close()

    def _next_token(self) -> int:
        self._token += 1
        return self._token

    def _finish(self, progress: Progress) -> None:
        progress.reading = False
        self._report(progress)

    def _report(self, progress: Progress) -> None:
        if progress.reading or progress.tokens:
            return
        wire_bytes = self._link.wire_bytes
        self._tell(
            Done(
                progress.work.number,
                progress.captured_lsn,
                progress.sent_bytes,
                progress.referenced_bytes,
                progress.zero_bytes,
                progress.same_bytes,
                wire_bytes - self._reported_wire_bytes,
            )
        )
        self._reported_wire_bytes = wire_bytes
        volume = progress.work.volume
        self._asked[volume.id] -= 1
        if volume.scan and not self._asked[volume.id]:
            # Held open, a snapshot could not be removed when its pass is over.
            self._let_go(volume.id)

    # --- receiving ---

    def _look(self, timeout_s: float) -> None:
        """Take what has arrived from both sides; wait up to ``timeout_s`` for something."""
        watched: list[BlockingLink | socket.socket] = [self._link, self._parent]
        readable, _, _ = select.select(watched, [], [], timeout_s)
        now = time.monotonic()
        if self._link in readable or not (self._sent or self._offers):
            self._heard_at = now
        elif now - self._heard_at > ANSWER_S:
            raise LinkDown("silent", f"no answer for {ANSWER_S:g} s", where=self._link.server.address)
        if self._link in readable:
            for message in self._link.receive():
                self._heard(message)
        if self._parent in readable:
            received = self._parent.recv(64 * 1024)
            if not received:
                raise EOFError
            self._received += received
            for message in split(self._received, to_copier):
                self.take(message)
        if not readable and timeout_s:
            for volume in list(self._readers)[:1]:
                self._link.send(m.Offer(_EMPTY_OFFER_TOKEN, volume, ()))

    def _heard(self, message: m.Message) -> None:
        match message:
            case m.Credit(bytes=count):
                self._credit += count
            case m.Accepted(token=token, missing=missing):
                self._accepted(token, missing)
            case m.Have(token=token, answers=answers):
                if token != _EMPTY_OFFER_TOKEN:
                    self._answered.append((self._offers.pop(token), answers))
            case m.Ping(id=id):
                self._link.send(m.Pong(id, ()))
            case m.Policy() | m.Ack():
                pass
            case _:
                raise LinkDown("protocol", "an unexpected frame", why=type(message).__name__)

    def _accepted(self, token: int, missing: tuple[int, ...]) -> None:
        sent = self._sent.pop(token)
        progress = sent.work
        if missing:
            self._again.append((progress, sent.extents))
            progress.referenced_bytes -= sum(length for _, length in sent.extents)
            return
        begin = min(offset for offset, _ in sent.extents)
        end = max(offset + length for offset, length in sent.extents)
        self._tell(
            Taken(progress.work.number, token, begin, end - begin, sent.applied_lsn, sent.captured_lsn)
        )
        progress.tokens -= 1
        self._report(progress)

    def take(self, message: ToCopier) -> None:
        """Do as the agent says."""
        match message:
            case Work():
                self._asked[message.volume.id] += 1
                self._works.append(Progress(message))
            case Stop():
                self._stopping = True
            case _:
                raise AssertionError("set up twice")

    def _tell(self, message: FromCopier) -> None:
        self._parent.sendall(encode(message))


def _add_zeros(chunks: list[m.CopyChunk], offset: int, length: int) -> None:
    """Append a block of zeros, or make the last one longer."""
    if chunks and (last := chunks[-1]).kind == m.COPY_ZEROS and last.offset + last.length == offset:
        chunks[-1] = m.CopyChunk(last.offset, last.length + length, m.COPY_ZEROS, b"")
    else:
        chunks.append(m.CopyChunk(offset, length, m.COPY_ZEROS, b""))


def _frames(extents: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Group extents, joined where they touch, into lists of READ_BYTES at most."""
    group: list[tuple[int, int]] = []
    room = READ_BYTES
    for offset, length in extents:
        while length:
            size = min(length, room)
            if group and group[-1][0] + group[-1][1] == offset:
                group[-1] = (group[-1][0], group[-1][1] + size)
            else:
                group.append((offset, size))
            offset, length, room = offset + size, length - size, room - size
            if not room:
                yield group
                group, room = [], READ_BYTES
    if group:
        yield group


def _first_message(parent: socket.socket, received: bytearray) -> tuple[Setup, list[ToCopier]]:
    """Return the first message, and what came right behind it."""
    while True:
        got = parent.recv(64 * 1024)
        if not got:
            raise EOFError
        received += got
        if messages := split(received, to_copier):
            setup = messages.pop(0)
            assert isinstance(setup, Setup)
            return setup, messages


def attach(setup: Setup) -> BlockingLink:
    """Open a data connection of the session. Raises LinkDown, ConfigError."""
    link = BlockingLink(Server(setup.host, setup.port, setup.vault, Path(setup.identity)))
    link.send(m.Attach(setup.session))
    while not (messages := link.receive()):
        pass
    if not isinstance(messages[0], m.Attached) or len(messages) > 1:
        raise LinkDown("protocol", "ATTACH was not answered with ATTACHED", where=link.server.address)
    return link


def main(descriptor: int, parent_pid: int) -> None:
    """Serve the agent at the other end of ``descriptor`` until it says so or is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent says when
    heap.keep()
    parent = socket.socket(fileno=descriptor)
    received = bytearray()
    try:
        setup, messages = _first_message(parent, received)
        try:
            link = attach(setup)
            parent.sendall(encode(Ready()))
            copier = Copier(setup, parent, link, received)
            for message in messages:
                copier.take(message)
            copier.run()
            link.close()
        except LinkDown as error:
            parent.sendall(encode(Broken(error.reason, str(error))))
        except DiskFault as error:
            parent.sendall(encode(Broken("disk", str(error), error.volume)))
        except FarshoreError as error:
            parent.sendall(encode(Broken("internal", str(error))))
        except OSError as error:
            parent.sendall(encode(Broken("internal", error.strerror or str(error))))
    except (EOFError, ConnectionError):
        pass  # the agent is gone, and with it whoever could want to know


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
