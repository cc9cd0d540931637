"""Journals for tests: small ones, whose every payload follows from its LSN, so that a wrong record shows."""

from pathlib import Path
from typing import Any

from blake3 import blake3

from agent.journal.continuity import IMAGE, DiskIdentity
from agent.journal.mark import Mark, MarkFile
from agent.journal.recovery import Recovered, recover, redo_records
from agent.journal.writer import JournalWriter
from farshore.clock import Clock, SystemClock
from farshore.hrl.batch import RECORD, WRITE, Batch
from farshore.units import GIB, KIB, MIB

MACHINE = bytes(range(16))
VOLUME = bytes(range(16, 32))
DISK = DiskIdentity(IMAGE, 1, 2, GIB, 3, 0)
BOOT = bytes(range(32, 48))


def stamp(lsn: int, size: int) -> bytes:
    """The payload of record ``lsn``."""
    return blake3(lsn.to_bytes(8, "little")).digest(size)


def opened(directory: Path, clock: Clock | None = None, **changes: Any) -> JournalWriter:
    """Recover a journal and open it for writing."""
    settings: dict[str, Any] = {
        "machine": MACHINE,
        "volume": VOLUME,
        "volume_bytes": GIB,
        "sector_bytes": 512,
        "segment_bytes": 64 * KIB,
        "quota_bytes": 4 * MIB,
        "clock": clock or SystemClock(),
    }
    settings["recovered"] = changes.pop("recovered", None) or look(directory)
    return JournalWriter.open(directory, **settings | changes)


def look(directory: Path, **options: Any) -> Recovered:
    return recover(directory, MACHINE, VOLUME, **options)


def put(writer: JournalWriter, count: int = 1, size: int = 512) -> int:
    """Append a batch of ``count`` stamped writes; record ``lsn`` goes to offset ``lsn * size``."""
    lsns = range(writer.next_lsn, writer.next_lsn + count)
    table = b"".join(RECORD.pack(lsn * size, size, WRITE, 0, 0, size) for lsn in lsns)
    return writer.append(lsns[0], count, table, b"".join(stamp(lsn, size) for lsn in lsns))


def marked(
    directory: Path, incarnation: bytes, durable_lsn: int, stable_lsn: int = 0, flags: int = 0
) -> None:
    """Write a mark as the tap does."""
    file = MarkFile.open(directory)
    file.write(Mark(incarnation, durable_lsn, stable_lsn, flags, 0, DISK, BOOT))
    file.close()


def lsns(batch: Batch) -> list[int]:
    """LSNs of a batch's records, after checking that each holds what was written under it."""
    at = 0
    for index, size in enumerate(batch.records["payload_length"].tolist()):
        lsn = batch.first_lsn + index
        assert bytes(batch.payload[at : at + size]) == stamp(lsn, size), f"record {lsn} is another"
        at += size
    return list(range(batch.first_lsn, batch.first_lsn + batch.count))


def held(recovered: Recovered, after_lsn: int = 0) -> list[int]:
    """LSNs of all records that redo would write, each checked."""
    return [lsn for batch in redo_records(recovered, after_lsn) for lsn in lsns(batch)]
