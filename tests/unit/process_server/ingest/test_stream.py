"""Cut-outs, positions and the refusals of a volume's stream."""

import random

import numpy as np
import pytest

from farshore.hrl.batch import first_digest, incarnation_key
from farshore.wire import messages as m
from process_server.ingest.stream import PackTable, Position, Refused, VolumeStream, clip, cut_out
from process_server.vault.commit import ROW_DTYPE, ZEROS

MACHINE, VOLUME, OLD, NEW = b"m" * 16, b"v" * 16, b"1" * 16, b"2" * 16


def stream() -> VolumeStream:
    here = Position(OLD, 3, 10, b"d" * 32, b"s" * 32)
    return VolumeStream(VOLUME, "disk", 1 << 20, 512, "protected", "data", here, here, True, 0)


def start(**changes: object) -> m.IncarnationStart:
    fields: dict[str, object] = {
        "volume": VOLUME,
        "id": NEW,
        "ordinal": 4,
        "previous": OLD,
        "previous_lsn": 10,
        "previous_digest": b"d" * 32,
        "first_lsn": 11,
        "resync": False,
    }
    return m.IncarnationStart(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("digest", [b"d" * 32, b"s" * 32])
def test_an_incarnation_continues_from_the_record_or_the_seal_behind_it(digest: bytes) -> None:
    here = stream()
    key = here.start(MACHINE, start(previous_digest=digest))
    assert key == incarnation_key(MACHINE, VOLUME, NEW)
    assert here.received == Position(NEW, 4, 10, first_digest(key, OLD, 10, digest))
    assert here.copied


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"previous_digest": b"x" * 32}, "gap"),
        ({"previous_lsn": 9}, "gap"),
        ({"first_lsn": 12}, "gap"),
        ({"first_lsn": 10}, "conflict"),
        ({"ordinal": 3}, "conflict"),
        ({"id": OLD}, "conflict"),
        ({"first_lsn": 5, "resync": True}, "conflict"),
    ],
)
def test_what_does_not_continue_is_refused_and_changes_nothing(changes: dict[str, object], code: str) -> None:
    here = stream()
    with pytest.raises(Refused) as refused:
        here.start(MACHINE, start(**changes))
    assert refused.value.code == code
    assert here == stream()


def test_a_resync_may_begin_anywhere_above_and_is_not_copied() -> None:
    here = stream()
    here.start(MACHINE, start(previous=b"9" * 16, previous_lsn=90, first_lsn=200, resync=True))
    assert (here.received.lsn, here.copied, here.resync) == (199, False, True)


@pytest.mark.parametrize("seed", range(50))
def test_cut_outs_leave_exactly_the_other_bytes(seed: int) -> None:
    rng = random.Random(seed)
    rows = np.zeros(rng.randrange(1, 8), ROW_DTYPE)
    at = 0
    for row in rows:
        at += rng.randrange(0, 5)
        row["offset"], row["length"] = at, rng.randrange(1, 20)
        row["pack"] = ZEROS if rng.random() < 0.3 else 0
        row["start"] = 0 if row["pack"] == ZEROS else 1000 + at
        at += int(row["length"])
    holes = [(rng.randrange(0, at), rng.randrange(1, 12)) for _ in range(rng.randrange(0, 6))]
    wanted = {
        int(row["offset"]) + n: (int(row["pack"]), 0 if row["pack"] == ZEROS else int(row["start"]) + n)
        for row in rows
        for n in range(int(row["length"]))
    }
    for offset, length in holes:
        for n in range(length):
            wanted.pop(offset + n, None)
    found = {
        int(row["offset"]) + n: (int(row["pack"]), 0 if row["pack"] == ZEROS else int(row["start"]) + n)
        for row in cut_out(rows, holes)
        for n in range(int(row["length"]))
    }
    assert found == wanted


def test_rows_end_with_the_volume() -> None:
    rows = np.zeros(3, ROW_DTYPE)
    rows["offset"], rows["length"] = [0, 8, 16], [8, 8, 8]
    assert clip(rows, 12)[["offset", "length"]].tolist() == [(0, 8), (8, 4)]
    assert clip(rows, 24) is rows


def test_packs_of_many_frames_share_one_table() -> None:
    table, rows = PackTable(), np.zeros(3, ROW_DTYPE)
    table.number(b"a")
    rows["pack"] = [1, ZEROS, 0]
    table.adopt(rows, (b"b", b"a"))
    assert rows["pack"].tolist() == [0, ZEROS, 1]
    assert table.ids == [b"a", b"b"]
