"""Reading and filling the catalog; blocking, from any thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, create_engine, delete, event, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from farshore.clock import format_time
from farshore.errors import Failed, IntegrityError
from farshore.ids import id_to_hex
from process_server.catalog.schema import CHAINS, METADATA, POINT_VOLUMES, POINTS
from process_server.vault.chain import Chain
from process_server.vault.commit import CommitHead, point_id

BATCH_COMMITS: Final = 256


@dataclass(frozen=True, slots=True)
class PointRow:
    """A recovery point as ``farshore point list`` shows it; ``volumes``: name to (LSN, size in bytes)."""

    id: str
    seq: int
    time_ns: int
    consistency: str
    tag: str | None
    timeline: bytes
    volumes: dict[str, tuple[int, int]]

    def as_dict(self) -> dict[str, object]:
        """Return the point as ``point list`` prints it."""
        return {
            "id": self.id,
            "time": format_time(self.time_ns),
            "consistency": self.consistency,
            "tag": self.tag,
            "timeline": id_to_hex(self.timeline),
            "volumes": {
                name: {"lsn": lsn, "size_bytes": size_bytes}
                for name, (lsn, size_bytes) in self.volumes.items()
            },
        }


class Catalog:
    """An SQLite file, or memory when ``path`` is None. One connection: one writer or reader at a time.

    Not in WAL mode: Debian 12's SQLite can lose a reset WAL, and a cache of what is written twice a second
    needs no more than the rollback journal.

    Raises:
        Failed: The file cannot be used; remove it, it is filled again.
    """

    def __init__(self, path: Path | None) -> None:
        self._where = str(path or ":memory:")
        self._lock = threading.Lock()
        url = f"sqlite:///{path}" if path is not None else "sqlite://"
        self._engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})

        @event.listens_for(self._engine, "connect")
        def prepare(connection: Any, record: object) -> None:
            connection.execute("PRAGMA journal_mode = TRUNCATE")
            connection.execute("PRAGMA synchronous = NORMAL")

        with self._begin() as connection:
            METADATA.create_all(connection)

    def close(self) -> None:
        self._engine.dispose()

    def position(self, machine: bytes) -> tuple[int, bytes] | None:
        """Return sequence number and digest of the newest commit that is in here."""
        with self._begin() as connection:
            row = connection.execute(
                select(CHAINS.c.seq, CHAINS.c.digest).where(CHAINS.c.machine == machine)
            ).one_or_none()
        return (row.seq, row.digest) if row is not None else None

    def add(self, head: CommitHead, digest: bytes) -> bool:
        """Take one commit; False when it is not the next one: then `follow` the chain."""
        with self._begin() as connection:
            row = connection.execute(
                select(CHAINS.c.seq, CHAINS.c.digest).where(CHAINS.c.machine == head.machine)
            ).one_or_none()
            here = (row.seq, row.digest) if row is not None else (0, bytes(32))
            if here != (head.seq - 1, head.previous):
                return False
            _insert(connection, [(head, digest)])
        return True

    def follow(self, chain: Chain, machine: bytes) -> int:
        """Read on from what is here to the chain's newest commit; return how many were new.

        What is here and not in the chain (another vault's catalog, an older copy of the store) goes first.

        Raises:
            IntegrityError: The chain is broken. Store errors as they come.
        """
        newest = chain.head.seq if chain.head is not None else 0
        here = self.position(machine)
        if here is not None:
            seq, digest = here
            try:
                known = 0 < seq <= newest and next(chain.iterate(seq, seq)).digest == digest
            except IntegrityError:
                known = False
            if not known:
                self.forget(machine)
                here = None
        first, previous = (here[0] + 1, here[1]) if here is not None else (1, bytes(32))
        waiting: list[tuple[CommitHead, bytes]] = []
        count = 0
        for commit in chain.iterate(first, newest, previous=previous) if newest >= first else ():
            waiting.append((commit.head, commit.digest))
            count += 1
            if len(waiting) >= BATCH_COMMITS:
                self._take(waiting)
        self._take(waiting)
        return count

    def forget(self, machine: bytes) -> None:
        """Drop all rows of a machine."""
        with self._begin() as connection:
            for table in (CHAINS, POINTS, POINT_VOLUMES):
                connection.execute(delete(table).where(table.c.machine == machine))

    def points(self, machine: bytes) -> list[PointRow]:
        """Return the points of a machine, oldest first."""
        with self._begin() as connection:
            rows = connection.execute(
                select(POINTS).where(POINTS.c.machine == machine).order_by(POINTS.c.seq)
            ).all()
            volumes: dict[int, dict[str, tuple[int, int]]] = {}
            for row in connection.execute(select(POINT_VOLUMES).where(POINT_VOLUMES.c.machine == machine)):
                volumes.setdefault(row.seq, {})[row.name] = (row.lsn, row.size_bytes)
        return [
            PointRow(
                point_id(machine, row.seq),
                row.seq,
                row.time_ns,
                row.consistency,
                row.tag,
                row.timeline,
                volumes.get(row.seq, {}),
            )
            for row in rows
        ]

    def _take(self, waiting: list[tuple[CommitHead, bytes]]) -> None:
        if waiting:
            with self._begin() as connection:
                _insert(connection, waiting)
            waiting.clear()

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._lock, self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as exc:
            raise Failed(
                "cannot use the catalog",
                where=self._where,
                why=str(exc).splitlines()[0],
                fix="remove it; it is filled again from the vault",
            ) from exc


def _insert(connection: Connection, commits: list[tuple[CommitHead, bytes]]) -> None:
    points = [
        {
            "machine": head.machine,
            "seq": head.seq,
            "time_ns": head.time_ns,
            "consistency": head.consistency,
            "tag": head.tag,
            "timeline": head.timeline.id,
        }
        for head, _ in commits
        if head.kind == "data"
    ]
    volumes = [
        {
            "machine": head.machine,
            "seq": head.seq,
            "name": volume.name,
            "lsn": volume.lsn,
            "size_bytes": volume.size_bytes,
        }
        for head, _ in commits
        if head.kind == "data"
        for volume in head.volumes
    ]
    if points:
        connection.execute(insert(POINTS), points)
    if volumes:
        connection.execute(insert(POINT_VOLUMES), volumes)
    last, digest = commits[-1]
    connection.execute(delete(CHAINS).where(CHAINS.c.machine == last.machine))
    connection.execute(insert(CHAINS), {"machine": last.machine, "seq": last.seq, "digest": digest})
