"""The journal format, version 1, as bytes that may never change.

``python -m tests.golden.test_hrl_v1`` writes the files of ``hrl-v1/`` again; a difference is a new version of
the format, with its own folder, and this one stays readable.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from agent.journal.continuity import IMAGE, DiskIdentity
from agent.journal.mark import CLEAN as CLEAN_STOP
from agent.journal.mark import SLOT_STRIDE, Mark, load_mark
from agent.journal.reader import IncarnationStart, JournalReader
from agent.journal.recovery import recover, redo_records
from agent.journal.scan import SegmentScan
from farshore.errors import CorruptRecord
from farshore.hrl.batch import (
    CLEAN,
    MARK,
    RECORD,
    RESIZE,
    SEAL,
    WRITE,
    ZERO,
    RunningDigest,
    encode_head,
    first_digest,
    incarnation_key,
    padded,
)
from farshore.hrl.cut import Cut, CutVolume, encode_cut
from farshore.hrl.segment import Incarnation, SegmentHeader

FOLDER = Path(__file__).parent / "hrl-v1"
MACHINE, VOLUME = bytes(range(0x10, 0x20)), bytes(range(0x20, 0x30))
FIRST, SECOND = bytes(range(0x30, 0x40)), bytes(range(0x40, 0x50))
TIME = 1_700_000_000_000_000_000
CREATED = 1_699_999_999_000_000_000
VOLUME_BYTES = 1 << 30

Row = tuple[int, int, int, bytes]
CUT = Cut(7, TIME + 3, "golden", (CutVolume(VOLUME, FIRST, 6, False),))
BATCHES: list[list[Row]] = [
    [(WRITE, 4096, 512, bytes(range(256)) * 2)],
    [(WRITE, 8192, 7, b"farshor"), (ZERO, 1 << 20, 1 << 19, b""), (RESIZE, VOLUME_BYTES + 512, 0, b"")],
    [(WRITE, 512, 1, b"x"), (MARK, 0, 0, encode_cut(CUT))],
    [(ZERO, 0, 512, b"")],
    [(WRITE, 0, 5000, b"farshore! " * 500)],
]


def batch(chain: RunningDigest, lsn: int, rows: list[Row], flags: int = 0) -> bytes:
    table = b"".join(
        RECORD.pack(offset, length, kind, 0, 0, len(data)) for kind, offset, length, data in rows
    )
    payload = b"".join(data for *_, data in rows)
    raw = encode_head(chain, lsn, TIME + lsn, len(rows), table, payload, flags) + table + payload
    return raw.ljust(padded(len(raw)), b"\0")


def built() -> dict[str, bytes]:
    """Every file of the folder: two segments of one incarnation, one of the next, a torn tail, a mark."""
    first = Incarnation(FIRST, 1)
    key = incarnation_key(MACHINE, VOLUME, FIRST)
    chain = RunningDigest(key, first_digest(key, first.previous, 0, first.previous_digest))
    head = SegmentHeader(MACHINE, VOLUME, first, 1, 1, chain.value, 512, CREATED, VOLUME_BYTES)
    one = (
        head.encode() + batch(chain, 1, BATCHES[0]) + batch(chain, 2, BATCHES[1]) + batch(chain, 5, [], SEAL)
    )
    head = SegmentHeader(MACHINE, VOLUME, first, 2, 5, chain.value, 512, CREATED + 1, VOLUME_BYTES + 512)
    two = head.encode() + batch(chain, 5, BATCHES[2]) + batch(chain, 7, [], SEAL | CLEAN)
    second = Incarnation(SECOND, 2, FIRST, 6, chain.value)
    key = incarnation_key(MACHINE, VOLUME, SECOND)
    chain = RunningDigest(key, first_digest(key, FIRST, 6, second.previous_digest))
    head = SegmentHeader(MACHINE, VOLUME, second, 4, 11, chain.value, 4096, CREATED + 2, VOLUME_BYTES + 512)
    three = head.encode() + batch(chain, 11, BATCHES[3]) + batch(chain, 12, BATCHES[4]) + bytes(16)
    torn = batch(chain, 13, [(WRITE, 512, 512, bytes(512))])[:300]
    disk = DiskIdentity(IMAGE, 2049, 131, VOLUME_BYTES + 512, TIME + 99, 0)
    older = Mark(FIRST, 6, 6, CLEAN_STOP, 1, disk, bytes(range(16)), 3)
    newer = Mark(SECOND, 12, 6, 0, 1, disk, bytes(range(16)), 4)
    return {
        "seg-00000000000000000001.hrl": one,
        "seg-00000000000000000002.hrl": two,
        "seg-00000000000000000004.hrl": three,
        "torn.hrl": three[:-16] + torn,
        "mark": newer.encode().ljust(SLOT_STRIDE, b"\0") + older.encode(),
    }


def content() -> dict[str, Any]:
    """What a reader finds, as JSON."""
    found = recover(FOLDER, MACHINE, VOLUME, every_byte=True)
    records = []
    for part in redo_records(found, 0):
        at = 0
        for index, row in enumerate(part.records):
            end = at + int(row["payload_length"])
            numbers = [int(row[name]) for name in ("type", "offset", "length")]
            records.append([part.first_lsn + index, *numbers, bytes(part.payload[at:end]).hex()])
            at = end
    return {
        "corrupt": found.corrupt,
        "last_lsn": found.last_lsn,
        "digest": found.digest.hex(),
        "segments": [[s.number, s.first_lsn, s.last_lsn, s.sealed, s.digest.hex()] for s in found.segments],
        "records": records,
    }


@pytest.mark.parametrize("name", sorted(built()))
def test_the_same_bytes_are_written_for_ever(name: str) -> None:
    assert (FOLDER / name).read_bytes() == built()[name]


def test_the_same_content_is_read_for_ever() -> None:
    assert content() == json.loads((FOLDER / "content.json").read_text())


def test_the_stream_names_both_incarnations() -> None:
    reader = JournalReader(FOLDER)
    reader.start_at_oldest()
    items = reader.read((SECOND, 12), 1 << 20)
    starts = [item for item in items if isinstance(item, IncarnationStart)]
    assert [(start.incarnation.id, start.first_lsn) for start in starts] == [(FIRST, 1), (SECOND, 11)]
    assert reader.last_digest.hex() == content()["digest"]
    reader.close()


def test_the_mark_with_the_higher_serial_counts() -> None:
    mark = load_mark(FOLDER)
    assert mark
    assert (mark.serial, mark.incarnation, mark.durable_lsn, mark.stable_lsn) == (4, SECOND, 12, 6)


def test_a_torn_tail_is_behind_the_same_records() -> None:
    with (FOLDER / "torn.hrl").open("rb") as file:
        key = incarnation_key(MACHINE, VOLUME, SECOND)
        start = bytes(file.read(4096)[144:176])
        scan = SegmentScan(file.fileno(), RunningDigest(key, start), 11)
        parts = [scan.next(), scan.next()]
        assert [part.last_lsn for part in parts if part] == [11, 12]
        with pytest.raises(CorruptRecord, match="cut short"):
            scan.next()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, raw in built().items():
        (FOLDER / name).write_bytes(raw)
    (FOLDER / "content.json").write_text(json.dumps(content(), indent=1) + "\n")
