"""MARK: a cut is one place in every volume of the machine, and takes no record from behind it."""

import numpy as np
import pytest

from farshore.wire import messages as m
from process_server.ingest import ipc
from process_server.ingest.session import Session
from process_server.ingest.stream import Position, Refused
from process_server.vault.commit import ROW_DTYPE, ZEROS

ONE, TWO, INCARNATION = b"1" * 16, b"2" * 16, b"i" * 16


class Nowhere:
    """A link to nobody."""

    def send(self, message: m.Message) -> None:
        raise AssertionError(message)

    def position(self, volume: bytes, key: bytes, incarnation: bytes, position: Position) -> None:
        pass


def session(*volumes: bytes) -> Session:
    made = Session(b"M" * 16, "db1", "1", Nowhere(), 1)
    for volume in volumes:
        made.add_volume(m.VolumeHello(volume, f"v{volume[0]}", 1 << 20, 512, "protected", "data"), None)
        made.start(m.IncarnationStart(volume, INCARNATION, 1, bytes(16), 0, bytes(32), 1, False))
    return made


def data(here: Session, volume: bytes, first_lsn: int, *ends: int) -> None:
    """Zeros under every LSN from ``first_lsn`` on, in one frame of batches that end at ``ends``."""
    rows = np.zeros(ends[-1] + 1 - first_lsn, ROW_DTYPE)
    rows["lsn"] = range(first_lsn, ends[-1] + 1)
    rows["offset"], rows["length"], rows["pack"] = rows["lsn"] * 512, 512, ZEROS
    batches = tuple((end, bytes([end]) * 32, 1 << 20) for end in ends)
    message = ipc.DataRows(
        session=here.id,
        volume=volume,
        incarnation=INCARNATION,
        first_lsn=first_lsn,
        batches=batches,
        tail=bytes(32),
        packs=(),
        fresh=(),
    )
    here.data_rows(message, rows.tobytes())


def mark(seq: int, **lsns: int) -> m.Mark:
    ids = {"one": ONE, "two": TWO}
    entries = (m.VolumeMark(ids[n], INCARNATION, lsn, False, True, 0, ()) for n, lsn in lsns.items())
    return m.Mark(seq, 0, None, tuple(entries))


def test_a_cut_takes_the_records_up_to_its_lsn_and_no_other() -> None:
    here = session(ONE)
    data(here, ONE, 1, 3, 5, 9)
    taken = []
    for seq, lsn in enumerate((3, 5, 9), 1):
        cut = here.mark(mark(seq, one=lsn), 0, 0.0)
        (volume,) = cut.volumes
        assert volume.position.lsn == lsn
        taken.append([lsn for rows in volume.rows() for lsn in rows["lsn"].tolist()])
    assert taken == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_a_cut_has_a_place_in_every_volume() -> None:
    here = session(ONE, TWO)
    data(here, ONE, 1, 2)
    data(here, TWO, 1, 1)
    here.mark(mark(1, one=2, two=1), 0, 0.0)
    data(here, ONE, 3, 3)
    with pytest.raises(Refused, match="without one of the volumes"):
        here.mark(mark(2, one=3), 0, 0.0)
    assert here.cut_seq == 1
    with pytest.raises(Refused, match="twice"):
        here.mark(m.Mark(2, 0, None, (*mark(2, one=3).volumes, *mark(2, one=3).volumes)), 0, 0.0)
    here.mark(mark(2, one=3, two=1), 0, 0.0)


def test_a_cut_beyond_what_came_is_a_gap() -> None:
    here = session(ONE)
    data(here, ONE, 1, 2)
    with pytest.raises(Refused) as refused:
        here.mark(mark(1, one=3), 0, 0.0)
    assert refused.value.code == "gap"
    here.mark(mark(1, one=2), 0, 0.0)


def test_what_an_agent_says_of_a_volume_is_bounded_and_moves_no_cursor() -> None:
    here = session(ONE)
    said = "\x1b[2J there is\nno such disk" + "x" * 10_000
    for hello_again in (False, True):
        volume = TWO if hello_again else ONE
        hello = m.VolumeHello(volume, f"v{volume[0]}", 1 << 20, 512, "failed", "bitmap", said)
        problem = here.add_volume(hello, None).problem
        assert problem.startswith(" [2J there is no such disk")
        assert len(problem) <= 300
