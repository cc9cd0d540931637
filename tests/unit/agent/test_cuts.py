"""What a MARK says: one cut over all volumes, and fuzzy wherever that was not so."""

import numpy as np

from agent.journal.reader import IncarnationStart
from agent.replicate import cuts
from agent.replicate.copyrule import CopyRule
from agent.replicate.cuts import Stream
from agent.replicate.delta import Delta, Frame
from agent.tap.cutter import plan_cut
from farshore.hrl.batch import RECORD_DTYPE
from farshore.hrl.cut import Cut, CutVolume
from farshore.hrl.segment import Incarnation
from farshore.wire import messages as m

ONE, TWO, INCARNATION = b"1" * 16, b"2" * 16, b"i" * 16


class NoJournal:
    """Nobody reads here."""

    def position(self, incarnation_id: bytes, lsn: int, digest: bytes) -> bool:
        raise AssertionError

    def start_at_oldest(self) -> None:
        raise AssertionError

    def start_at_newest(self) -> None:
        raise AssertionError

    def read(self, durable: tuple[bytes, int], bytes_max: int) -> list[object]:
        raise AssertionError


def stream(id: bytes, sent: int, **changes: object) -> Stream:
    """A volume whose records up to ``sent`` were sent."""
    rule = CopyRule(0)
    delta = Delta(id, NoJournal(), rule)  # type: ignore[arg-type]
    start = IncarnationStart(Incarnation(INCARNATION, 1), 1)
    begin = m.IncarnationStart(id, INCARNATION, 1, bytes(16), 0, bytes(32), 1, False)
    delta.was_sent(Frame(begin, started=start))
    if sent:
        delta.was_sent(Frame(m.Data(id, 1, sent), b"", None, [(1, np.zeros(sent, RECORD_DTYPE))]))
    return Stream(id, delta, rule, resync=False, copied=True, opened=True, **changes)  # type: ignore[arg-type]


def cut(**lsns: int) -> Cut:
    ids = {"one": ONE, "two": TWO}
    return Cut(7, 0, None, tuple(CutVolume(ids[name], INCARNATION, lsn, False) for name, lsn in lsns.items()))


def test_a_cut_waits_for_every_volume_and_is_lost_with_any() -> None:
    streams = {ONE: stream(ONE, 5), TWO: stream(TWO, 2)}
    assert cuts.ready(cut(one=5, two=2), streams)
    assert not cuts.ready(cut(one=5, two=3), streams)
    assert not cuts.ready(cut(one=6, two=2), streams)
    assert not cuts.lost(cut(one=6, two=3), streams)
    streams[TWO].mark = (INCARNATION, 2)
    assert cuts.lost(cut(one=6, two=1), streams)


def test_the_mark_names_the_places_of_the_cut() -> None:
    streams = {ONE: stream(ONE, 9), TWO: stream(TWO, 4)}
    mark = cuts.make_mark(cut(one=5, two=2), 1, streams)
    assert {volume.volume: volume.lsn for volume in mark.volumes} == {ONE: 5, TWO: 2}
    assert not cuts.is_fuzzy(mark)


def test_a_volume_that_stays_behind_makes_it_fuzzy() -> None:
    for changes in ({"paused": True}, {}):
        streams = {ONE: stream(ONE, 5), TWO: stream(TWO, 2, **changes)}
        streams[TWO].mark = (INCARNATION, 2)
        places = cut(one=5, two=2) if changes else cut(one=5)
        mark = cuts.make_mark(places, 1, streams)
        assert {volume.volume: volume.lsn for volume in mark.volumes} == {ONE: 5, TWO: 2}
        assert cuts.is_fuzzy(mark)


def test_where_several_streams_happen_to_be_is_no_point() -> None:
    streams = {ONE: stream(ONE, 5)}
    assert not cuts.is_fuzzy(cuts.make_mark(cuts.own_cut(streams, 0, dirty=False), 1, streams))
    streams[TWO] = stream(TWO, 2)
    assert cuts.is_fuzzy(cuts.make_mark(cuts.own_cut(streams, 0, dirty=False), 2, streams))


def test_it_is_fuzzy_below_the_end_of_the_reads() -> None:
    streams = {ONE: stream(ONE, 9)}
    streams[ONE].rule.seen(6)
    assert cuts.is_fuzzy(cuts.make_mark(cut(one=5), 1, streams))
    assert not cuts.is_fuzzy(cuts.make_mark(cut(one=6), 2, streams))


class AVolume:
    """What `plan_cut` asks of a volume."""

    def __init__(self, lsn: int, *, cut_lsn: int = 0, captured: int = 0, logs: bool = True) -> None:
        self.id, self.incarnation = bytes([lsn]) * 16, INCARNATION
        self.lsn, self.captured_lsn, self.logs, self.fuzzy = lsn, captured, logs, not logs
        self.changed = lsn != cut_lsn


def test_the_marks_own_record_is_inside_the_cut() -> None:
    volumes = [AVolume(5, cut_lsn=3), AVolume(7, cut_lsn=7), AVolume(9, captured=8, logs=False)]
    taken, marked = plan_cut(volumes, 3, 0, None)
    assert marked == [0]
    assert [volume.lsn for volume in taken.volumes] == [6, 7, 8]
    assert [volume.fuzzy for volume in taken.volumes] == [False, False, True]


def test_a_cut_from_before_the_pass_under_way_leaves_the_volume_where_it_was() -> None:
    streams = {ONE: stream(ONE, 5), TWO: stream(TWO, 0)}
    taken = cut(one=5, two=0)
    start = IncarnationStart(Incarnation(b"j" * 16, 2), 8)
    begin = m.IncarnationStart(TWO, b"j" * 16, 2, INCARNATION, 0, bytes(32), 8, True)
    streams[TWO].delta.was_sent(Frame(begin, started=start))
    streams[TWO].mark = (INCARNATION, 0)
    assert cuts.ready(taken, streams)
    mark = cuts.make_mark(taken, 1, streams)
    (two,) = (volume for volume in mark.volumes if volume.volume == TWO)
    assert (two.incarnation, two.lsn, two.fuzzy) == (INCARNATION, 0, True)
    assert cuts.is_fuzzy(mark)
    assert not cuts.is_fuzzy(mark, without={TWO})


def test_a_journal_s_word_of_a_cut_does_not_replace_one_that_knows_more_volumes() -> None:
    pending = cuts.PendingCuts()
    for taken in (cut(one=5), cut(one=5, two=2), cut(one=5)):
        pending.add(taken)
    assert pending.first() == cut(one=5, two=2)
    assert len(pending) == 1


def test_a_volume_that_nobody_serves_stays_where_the_vault_has_it_and_holds_up_no_cut() -> None:
    """It was never opened in this session; the tap's cut has no place in it."""
    streams = {ONE: stream(ONE, 5), TWO: stream(TWO, 0)}
    streams[TWO].opened = False
    streams[TWO].mark = (b"j" * 16, 70)
    streams[TWO].rule.copy_end = 66
    nowhere = CutVolume(TWO, bytes(16), 0, True)
    taken = cuts.served(Cut(7, 0, None, (*cut(one=5).volumes, nowhere)))
    assert cuts.ready(taken, streams)
    assert not cuts.lost(taken, streams)
    for places in (taken, cuts.own_cut(streams, 0, dirty=False)):
        mark = cuts.make_mark(places, 1, streams)
        (two,) = (volume for volume in mark.volumes if volume.volume == TWO)
        assert two == m.VolumeMark(TWO, b"j" * 16, 70, True, True, 66, ())
        assert cuts.is_fuzzy(mark)
    assert not cuts.is_fuzzy(cuts.make_mark(taken, 2, streams), without={TWO})
