"""A machine's session in the main process: what its frames mean. No socket; `Link` sends.

Every method that takes a frame either applies it whole or raises `Refused` and has changed nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from farshore.ids import ID_BYTES, new_id, valid_name
from farshore.wire import messages as m
from process_server.ingest import ipc
from process_server.ingest.stream import (
    CopiedRows,
    PackTable,
    Position,
    Refused,
    VolumeCut,
    VolumeStream,
)
from process_server.vault.commit import ROW_DTYPE, Rows

VOLUMES_MAX: Final = 256
TOKENS_MAX: Final = 65536
"""COPYs accepted and not yet named by a MARK; 64 GiB of 1 MiB blocks."""
ROW_BYTES_MAX: Final = 48 * 1024 * 1024
"""Rows that wait for a commit; 1 million writes. Beyond it the session ends rather than the server."""
PROBLEM_MAX: Final = 300
"""Characters of what an agent says of a volume that are kept and shown."""


class Link(Protocol):
    """How a session reaches the worker that holds a connection."""

    def send(self, message: m.Message) -> None: ...

    def position(self, volume: bytes, key: bytes, incarnation: bytes, position: Position) -> None: ...


@dataclass(slots=True)
class Cut:
    """A MARK that was taken: it waits for its commit.

    Attributes:
        time_ns: The server's clock when the MARK arrived.
        copies: It names copies: it is never merged into a commit with records from before it.
        packs: Packs its rows point into that were not yet stored when they came.
    """

    session: "Session"
    cut_seq: int
    tag: str | None
    time_ns: int
    arrived: float
    volumes: list[VolumeCut]
    copies: bool

    @property
    def record_bytes(self) -> int:
        return sum(cut.record_bytes for cut in self.volumes)


@dataclass(eq=False)
class Session:
    """State of one control connection and of the data connections that joined it.

    Attributes:
        unstored: Packs that rows point into and that are not acknowledged by the store yet.
        ended: Why it is over, or empty.
        lost: Why some of its packs will never be stored, or empty.
    """

    machine: bytes
    name: str
    agent_version: str
    link: Link
    connection: int
    id: bytes = field(default_factory=new_id)
    volumes: dict[bytes, VolumeStream] = field(default_factory=dict)
    packs: PackTable = field(default_factory=PackTable)
    unstored: set[bytes] = field(default_factory=set)
    tokens: dict[int, CopiedRows] = field(default_factory=dict)
    status: dict[bytes, m.VolumeStatus] = field(default_factory=dict)
    channels: int = 0
    cut_seq: int = 0
    row_bytes: int = 0
    ended: str = ""
    lost: str = ""

    def add_volume(self, hello: m.VolumeHello, position: m.VolumePosition | None) -> VolumeStream:
        """Take a volume of HELLO or VOLUME-ADD; ``position`` is what the vault has, None for nothing.

        Raises:
            Refused: A name, id or size that no volume can have, or a name that another one has.
        """
        if len(hello.id) != ID_BYTES or not valid_name(hello.name):
            raise Refused("protocol", "a volume without a proper id and name", where=repr(hello.name[:64]))
        where = f"volume {hello.name}"
        if not 0 < hello.size_bytes < 1 << 63 or hello.sector_bytes not in (512, 1024, 2048, 4096):
            raise Refused("bounds", "a volume of impossible size", where=where, why=str(hello.size_bytes))
        for other in self.volumes.values():
            if other.name == hello.name and other.id != hello.id:
                raise Refused("protocol", "two volumes of one name", where=where)
        here = self.volumes.get(hello.id)
        if here is not None:
            here.name, here.state, here.capture_mode = hello.name, hello.state, hello.capture_mode
            here.problem = one_line(hello.problem)
            if not here.rows:
                here.size_bytes = hello.size_bytes
            return here
        if len(self.volumes) >= VOLUMES_MAX:
            raise Refused("capacity", f"more than {VOLUMES_MAX} volumes")
        if position is None:
            start, copied, copy_end = Position(), False, 0
        else:
            start = Position(position.incarnation, position.ordinal, position.lsn, position.digest)
            copied, copy_end = position.copied, position.copy_end
        stream = VolumeStream(
            hello.id,
            hello.name,
            hello.size_bytes,
            hello.sector_bytes,
            hello.state,
            hello.capture_mode,
            received=start,
            cut=start,
            copied=copied,
            copy_end=copy_end,
            resync=not copied,
            problem=one_line(hello.problem),
        )
        self.volumes[hello.id] = stream
        return stream

    def start(self, message: m.IncarnationStart) -> None:
        """INCARNATION-START: hold it against what is here and tell the worker where to go on."""
        stream = self._stream(message.volume)
        key = stream.start(self.machine, message)
        self.link.position(stream.id, key, message.id, stream.received)

    def data_rows(self, message: ipc.DataRows, raw: bytes) -> None:
        """Rows of verified records, from the worker that holds the control connection."""
        stream = self.volumes.get(message.volume)
        if stream is None or self.ended:
            return
        rows = self._rows(raw, message.packs, message.fresh)
        stream.append(message.incarnation, message.first_lsn, rows, message.batches, message.tail)

    def copy_rows(self, message: ipc.CopyRows, raw: bytes) -> None:
        """Rows of a verified COPY, from any worker.

        Raises:
            Refused: The token is in use, or too many wait.
        """
        if message.volume not in self.volumes or self.ended:
            return
        if message.token in self.tokens:
            raise Refused("protocol", "a token that is in use", why=str(message.token))
        if len(self.tokens) >= TOKENS_MAX:
            raise Refused("capacity", "too many copies that no mark names")
        rows = self._rows(raw, message.packs, message.fresh)
        self.tokens[message.token] = CopiedRows(message.volume, message.applied_lsn, rows)

    def unknown_tokens(self, mark: m.Mark) -> bool:
        """Tell whether the mark names a token that has not come yet (another worker may still report it)."""
        return any(copy.token not in self.tokens for volume in mark.volumes for copy in volume.copies)

    def mark(self, message: m.Mark, time_ns: int, arrived: float) -> Cut:
        """Take MARK.

        Raises:
            Refused: It does not describe a cut through what has arrived; nothing was taken.
        """
        if message.cut_seq <= self.cut_seq:
            raise Refused("protocol", "a mark out of order", why=f"{message.cut_seq} after {self.cut_seq}")
        if message.tag is not None and not 0 < len(message.tag) <= 256:
            raise Refused("bounds", "a tag of no or more than 256 characters")
        seen: set[bytes] = set()
        used: set[int] = set()
        for volume in message.volumes:
            stream = self._stream(volume.volume)
            if volume.volume in seen:
                raise Refused("protocol", "a mark with a volume twice", where=stream.name)
            seen.add(volume.volume)
            stream.check(volume)
            for copy in volume.copies:
                token = self.tokens.get(copy.token)
                if token is None or token.volume != volume.volume or copy.token in used:
                    raise Refused("protocol", "a mark that names a copy that is not there", where=stream.name)
                used.add(copy.token)
                if any(
                    offset < 0 or length <= 0 or offset + length >= 1 << 63
                    for offset, length in copy.cut_outs
                ):
                    raise Refused("bounds", "a cut-out that is no extent", where=stream.name)
        # A volume that was in a cut stays in every later one until VOLUME-REMOVE: a point is machine-wide.
        for stream in self.volumes.values():
            if stream.id not in seen and stream.cut.ordinal:
                raise Refused("protocol", "a mark without one of the volumes", where=stream.name)
        self.cut_seq = message.cut_seq
        cuts = [
            self.volumes[volume.volume].take(
                volume, [(self.tokens.pop(copy.token), copy) for copy in volume.copies]
            )
            for volume in message.volumes
        ]
        return Cut(self, message.cut_seq, message.tag, time_ns, arrived, cuts, bool(used))

    def remaining_packs(self) -> set[bytes]:
        """Return the packs that rows outside every cut point into."""
        return self.packs_of(self._uncut())

    def packs_of(self, tables: Iterable[Rows]) -> set[bytes]:
        """Return the packs that ``tables`` point into."""
        numbers: set[int] = set()
        for rows in tables:
            numbers.update(np.unique(rows["pack"]).tolist())
        return {self.packs.ids[number] for number in numbers if number < len(self.packs.ids)}

    def count_rows(self, cuts: Iterable[Cut]) -> None:
        """Count anew the bytes of rows that wait, ``cuts`` included: a commit took the others."""
        waiting = sum(table.nbytes for table in self._uncut())
        waiting += sum(rows.nbytes for cut in cuts for volume in cut.volumes for rows in volume.rows())
        self.row_bytes = waiting

    def _uncut(self) -> Iterator[Rows]:
        for stream in self.volumes.values():
            for _, rows in stream.rows:
                yield rows
        for copy in self.tokens.values():
            yield copy.rows

    def _stream(self, volume: bytes) -> VolumeStream:
        stream = self.volumes.get(volume)
        if stream is None:
            raise Refused("protocol", "a volume that HELLO did not name")
        return stream

    def _rows(self, raw: bytes, packs: Sequence[bytes], fresh: Sequence[bytes]) -> Rows:
        rows = np.frombuffer(bytearray(raw), ROW_DTYPE)
        self.row_bytes += len(raw)
        if self.row_bytes > ROW_BYTES_MAX:
            raise Refused("capacity", "too many records wait for a commit")
        self.packs.adopt(rows, packs)
        self.unstored.update(fresh)
        return rows


def one_line(text: str) -> str:
    """Return an agent's words as they may be shown: bounded, and nothing in them that moves a cursor."""
    return "".join(char if char.isprintable() else " " for char in text[:PROBLEM_MAX])
