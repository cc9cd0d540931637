"""The copy rule against a model: a disk, its journal, copiers, cuts and a vault, interleaved at random.

Every byte of the model is an element of a list; a write stores its LSN. `truth` is what the workload has
written so far; each cut takes a picture of it, and a cut that is not fuzzy must give exactly that picture
when the vault has committed it. The same model must notice each bug of the rule that is seeded below.
"""

import random
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.replicate.copyrule import AcceptedCopy, CopyRule, PlacedCopy
from farshore.hrl.batch import RECORD_DTYPE, WRITE, Records

SIZE = 40
UNIT = 5
CLEAN = (0, 0)


@dataclass
class Read:
    """A copier at work on one unit."""

    unit: int
    dirt: tuple[int, int]
    offer: bool
    history: int
    applied_lsn: int = -1
    content: list[int] = field(default_factory=list)


@dataclass
class Cut:
    lsn: int
    truth: list[int]
    dirty: bool


@dataclass
class SentMark:
    cut: Cut
    placed: list[PlacedCopy]
    records: list[tuple[int, int, int]]
    copied: bool
    copy_end: int


class Model:
    """One volume, its workload, one agent and one vault."""

    def __init__(self, seed: int, rule: type[CopyRule]) -> None:
        self.random = random.Random(seed)
        self.rule_class = rule
        # All is compared again after each, which hides what went wrong before: so not in every run.
        self.gaps = 0.3 if seed % 3 == 1 else 0
        self.disk = [-1 - at for at in range(SIZE)]
        self.truth = list(self.disk)
        self.records: list[tuple[int, int, int] | None] = []  # None: a number that no record has any more
        self.durable = self.applied = 0
        self.vault = [0] * SIZE
        self.vault_lsn = self.vault_copy_end = 0
        self.units = range(SIZE // UNIT)
        self.committed: set[int] = set()
        self.dirty: dict[int, tuple[int, int]] = {}
        self.generation = 0
        self.histories = 0
        self.resync_after = 0
        self.checked = 0
        self.connect()

    # --- workload and tap ---

    @property
    def captured(self) -> int:
        return len(self.records)

    def write(self) -> None:
        start = self.random.randrange(SIZE)
        length = min(self.random.randint(1, 7), SIZE - start)
        self.records.append((self.captured + 1, start, length))
        self.truth[start : start + length] = [self.captured] * length

    def sync(self) -> None:
        self.durable = self.captured

    def apply(self) -> None:
        if self.applied < self.durable:
            record = self.records[self.applied]
            assert record is not None
            lsn, start, length = record
            self.disk[start : start + length] = [lsn] * length
            self.applied += 1

    def bypass(self) -> None:
        """Bitmap mode and back: everything is applied, then one write goes past the journal."""
        self.sync()
        while self.applied < self.captured:
            self.apply()
        at = self.random.randrange(SIZE)
        self.generation += 1
        self.disk[at] = self.truth[at] = -1000 - self.generation
        self.dirty[at // UNIT] = (self.generation, self.captured)

    # --- agent ---

    def connect(self) -> None:
        """A session begins: what no commit holds of the one before is lost."""
        self.rule = self.rule_class(self.vault_lsn, self.vault_copy_end)
        self.sent_lsn = self.marked_lsn = self.vault_lsn
        self.cut: Cut | None = None
        self.marks: list[SentMark] = []
        self.reads: dict[int, Read] = {}
        self.tokens: dict[int, list[int]] = {}
        self.token_unit: dict[int, tuple[int, tuple[int, int], int]] = {}
        self.busy: set[int] = set()
        self.placed = set(self.committed)
        self.work = 0
        self.rule.track()

    def begin(self) -> None:
        todo = [unit for unit in self.units if (unit not in self.placed or unit in self.dirty)]
        todo = [unit for unit in todo if unit not in self.busy]
        if not todo or len(self.reads) == 3:
            return
        unit = self.random.choice(todo)
        dirt = self.dirty.get(unit, CLEAN)
        if not self.rule.ready(self.applied, max(dirt[1], self.resync_after)):
            return
        self.work += 1
        self.rule.reading(self.work, self.applied)
        self.busy.add(unit)
        offer = self.random.random() < 0.4
        self.reads[self.work] = Read(unit, dirt, offer, self.histories)

    def read(self) -> None:
        """One step of one copier: the note before, a part of the unit, or the delivery."""
        if not self.reads:
            return
        work, read = self.random.choice(list(self.reads.items()))
        if read.applied_lsn < 0:
            read.applied_lsn = self.applied
        elif len(read.content) < UNIT:
            at = read.unit * UNIT + len(read.content)
            read.content.append(self.disk[at])
        else:
            self.deliver(work, read)

    def deliver(self, work: int, read: Read) -> None:
        begin = read.unit * UNIT
        same = self.vault[begin : begin + UNIT] == read.content
        if read.offer and not same:
            read.offer, read.applied_lsn, read.content = False, -1, []  # NEED: read again
            return
        # The captured LSN is noted when the read is over; delivering later only makes it higher.
        self.rule.seen(self.captured)
        if read.offer and read.history == self.histories:
            self.committed.add(read.unit)
            self.placed.add(read.unit)
            self.busy.discard(read.unit)
            if self.dirty.get(read.unit) == read.dirt:
                # Healed without a copy: the cut that shows it must come after this answer.
                del self.dirty[read.unit]
        elif not read.offer:
            # Placed also when continuity was lost meanwhile, but then it says nothing of the disk since.
            self.tokens[work] = read.content
            self.token_unit[work] = (read.unit, read.dirt, read.history)
            self.rule.accepted(AcceptedCopy(work, begin, UNIT, read.applied_lsn))
        self.rule.read(work)
        del self.reads[work]

    def take_cut(self) -> None:
        if self.cut is None:
            self.cut = Cut(self.captured, list(self.truth), bool(self.dirty))

    def send(self) -> None:
        """Send some records, no further than the cut; then its MARK."""
        limit = min(self.durable, self.cut.lsn if self.cut else self.durable)
        end = self.sent_lsn
        while end < limit and self.records[end] is None:
            end += 1
        if end > self.sent_lsn:
            if not self.rule.jump(end):
                self.connect()
                return
            self.sent_lsn = end
        count = min(self.random.randint(1, 4), limit - self.sent_lsn)
        batch = list(takewhile(bool, self.records[self.sent_lsn : self.sent_lsn + max(0, count)]))
        if batch:
            self.rule.sent(self.sent_lsn + 1, as_records([row[1:] for row in batch if row]))
            self.sent_lsn += len(batch)
        if self.cut is not None and self.sent_lsn == self.cut.lsn:
            before, self.marked_lsn = self.marked_lsn, self.cut.lsn
            placed = self.rule.cut(self.cut.lsn, copies_max=self.random.choice((1, 3, 1000)))
            here = [self.token_unit[copy.copy.token] for copy in placed]
            self.placed |= {unit for unit, _, history in here if history == self.histories}
            self.busy -= {unit for unit, _, _ in here}
            copied = self.placed == set(self.units)
            records = [record for record in self.records[before : self.cut.lsn] if record]
            self.marks.append(SentMark(self.cut, placed, records, copied, self.rule.copy_end))
            self.cut = None

    # --- server ---

    def commit(self) -> None:
        if not self.marks:
            return
        mark = self.marks.pop(0)
        for copy in mark.placed:
            content = self.tokens.pop(copy.copy.token)
            keep = set(range(copy.copy.offset, copy.copy.offset + copy.copy.length))
            for start, length in copy.cut_outs:
                assert copy.copy.offset <= start < start + length <= copy.copy.offset + copy.copy.length
                keep -= set(range(start, start + length))
            for at in keep:
                self.vault[at] = content[at - copy.copy.offset]
            unit, dirt, history = self.token_unit[copy.copy.token]
            if history != self.histories:
                continue
            self.committed.add(unit)
            if self.dirty.get(unit) == dirt:
                del self.dirty[unit]
        for lsn, start, length in mark.records:
            self.vault[start : start + length] = [lsn] * length
        self.vault_lsn, self.vault_copy_end = mark.cut.lsn, mark.copy_end
        self.rule.vaulted(mark.cut.lsn)
        if mark.copied and mark.cut.lsn >= mark.copy_end and not mark.cut.dirty:
            assert self.vault == mark.cut.truth
            self.checked += 1

    def lose_link(self) -> None:
        if self.random.random() < 0.1:
            for _ in range(self.random.randint(0, len(self.marks))):
                self.commit()
            self.connect()

    def lose_continuity(self) -> None:
        """A stop after which nothing is proved: the journal's next incarnation begins behind a gap.

        Of the old one the vault still gets what was durable, whether the disk has it or not.
        """
        gone = self.captured - self.durable + self.random.randint(1, 3)
        self.records[self.durable :] = [None] * gone
        for _ in range(self.random.randint(0, 4)):
            self.generation += 1
            self.disk[self.random.randrange(SIZE)] = -1000 - self.generation
        self.truth = list(self.disk)
        self.applied = self.durable = self.resync_after = self.captured
        self.histories += 1
        self.dirty.clear()
        self.committed.clear()
        self.placed.clear()
        self.busy.clear()
        self.cut = None
        if self.random.random() < 0.5:
            self.connect()

    def run(self, steps: int) -> int:
        """Run, then let everything finish; return how many cuts were held against the truth."""
        actions = {
            self.write: 4,
            self.sync: 2,
            self.apply: 5,
            self.begin: 3,
            self.read: 12,
            self.take_cut: 2,
            self.send: 6,
            self.commit: 2,
            self.bypass: 0.3,
            self.lose_link: 0.5,
            self.lose_continuity: self.gaps,
        }
        for action in self.random.choices(list(actions), list(actions.values()), k=steps):
            action()
        for _ in range(400):
            for action in (
                self.sync,
                self.apply,
                self.begin,
                self.read,
                self.send,
                self.commit,
                self.take_cut,
            ):
                action()
        return self.checked


def as_records(extents: list[tuple[int, int]]) -> Records:
    records = np.zeros(len(extents), RECORD_DTYPE)
    for at, (start, length) in enumerate(extents):
        records[at] = (start, length, WRITE, 0, 0, length)
    return records


@given(st.integers(0, 2**32), st.integers(0, 600))
@settings(max_examples=300)
def test_every_cut_that_is_not_fuzzy_is_exactly_the_prefix(seed: int, steps: int) -> None:
    assert Model(seed, CopyRule).run(steps) > 0


class NothingCutOut(CopyRule):
    def cut(self, lsn: int, *, copies_max: int = 9, cut_outs_max: int = 9) -> list[PlacedCopy]:
        return [PlacedCopy(placed.copy, ()) for placed in super().cut(lsn, copies_max=copies_max)]


class CutsOutOnlyWhatCameAfterTheCut(CopyRule):
    """Takes the position of the copy to be the last cut when it was accepted, not when it is placed."""

    def accepted(self, copy: AcceptedCopy) -> None:
        super().accepted(
            AcceptedCopy(copy.token, copy.offset, copy.length, max(copy.applied_lsn, self.previous_cut))
        )


class ForgetsTheEndOfReads(CopyRule):
    def seen(self, captured_lsn: int) -> None:
        pass


class CountsTheReadFromItsEnd(CopyRule):
    """As if the applied LSN were noted after the read: some records between go missing."""

    def accepted(self, copy: AcceptedCopy) -> None:
        super().accepted(AcceptedCopy(copy.token, copy.offset, copy.length, copy.applied_lsn + 1))


class ForgetsRecordsOfReadsUnderWay(CopyRule):
    def reading(self, work: object, applied_lsn: int) -> None:
        super().reading(work, 1 << 40)


class HealsBeforeWhatCameBeforeIsVaulted(CopyRule):
    def ready(self, applied_lsn: int, after: int) -> bool:
        return super().ready(applied_lsn, 0)


class ReadsBeforeWhatWasSentIsApplied(CopyRule):
    def ready(self, applied_lsn: int, after: int) -> bool:
        return self.vaulted_lsn >= after

    def accepted(self, copy: AcceptedCopy) -> None:
        self._accepted.append(copy)

    def reading(self, work: object, applied_lsn: int) -> None:
        self._floors[work] = applied_lsn


class RemembersNothingBeforeTheFirstRead(CopyRule):
    def sent(self, first_lsn: int, records: Records) -> None:
        super().sent(first_lsn, records[:0] if not self._floors else records)


class CallsAGapVaulted(CopyRule):
    """As if the records before a gap were vaulted because none will come that are in it."""

    def jump(self, lsn: int) -> bool:
        gone_on = super().jump(lsn)
        self.vaulted(lsn)
        return gone_on


class CutsOutTooMuch(CopyRule):
    def cut(self, lsn: int, *, copies_max: int = 9, cut_outs_max: int = 9) -> list[PlacedCopy]:
        return [
            PlacedCopy(placed.copy, ((placed.copy.offset, placed.copy.length),) if placed.cut_outs else ())
            for placed in super().cut(lsn, copies_max=copies_max)
        ]


@pytest.mark.parametrize(
    "seeded_bug",
    [
        NothingCutOut,
        CutsOutOnlyWhatCameAfterTheCut,
        ForgetsTheEndOfReads,
        CountsTheReadFromItsEnd,
        ForgetsRecordsOfReadsUnderWay,
        HealsBeforeWhatCameBeforeIsVaulted,
        ReadsBeforeWhatWasSentIsApplied,
        RemembersNothingBeforeTheFirstRead,
        CallsAGapVaulted,
        CutsOutTooMuch,
    ],
)
def test_the_model_notices_a_seeded_bug(seeded_bug: type[CopyRule]) -> None:
    def until_noticed() -> None:
        for seed in range(3000):
            Model(seed, seeded_bug).run(300)

    with pytest.raises(AssertionError):
        until_noticed()


def test_cut_outs_are_clipped_merged_and_sorted() -> None:
    rule = CopyRule(0)
    rule.track()
    rule.reading("work", 0)
    rule.sent(1, as_records([(8, 8), (0, 4), (12, 8), (2, 1), (100, 50)]))
    rule.accepted(AcceptedCopy(1, 1, 15, 0))
    rule.accepted(AcceptedCopy(2, 1, 15, 2))
    rule.read("work")
    assert rule.cut(5) == [
        PlacedCopy(AcceptedCopy(1, 1, 15, 0), ()),
        PlacedCopy(AcceptedCopy(2, 1, 15, 2), ()),
    ]
    rule.accepted(AcceptedCopy(3, 1, 15, 0))
    rule.accepted(AcceptedCopy(4, 1, 15, 3))
    assert [placed.cut_outs for placed in rule.cut(6)] == [((1, 3), (8, 8)), ((2, 1),)]


def test_a_mark_stays_within_its_bounds_and_the_rest_waits() -> None:
    rule = CopyRule(0)
    rule.track()
    rule.reading("work", 0)
    rule.sent(1, as_records([(at, 1) for at in range(0, 40, 2)]))
    rule.cut(20)
    for token in range(4):
        rule.accepted(AcceptedCopy(token, token * 10, 10, 0))
    assert [placed.copy.token for placed in rule.cut(21, cut_outs_max=12)] == [0, 1]
    assert rule.waiting == 2
    assert [len(placed.cut_outs) for placed in rule.cut(22)] == [5, 5]


def test_a_gap_waits_for_no_copy_and_copies_wait_for_what_was_sent_before_it() -> None:
    rule = CopyRule(0)
    rule.track()
    rule.sent(1, as_records([(0, 1), (1, 1)]))
    assert rule.jump(9)
    assert rule.remembered == 0
    assert not rule.ready(8, 9)
    # The disk is far enough; the two records are not in the vault, and would lie over what is copied now.
    assert not rule.ready(9, 9)
    rule.vaulted(1)
    assert not rule.ready(9, 9)
    rule.vaulted(2)
    assert rule.ready(9, 9)
    rule.sent(10, as_records([(5, 1)]))
    assert rule.jump(20)
    assert rule.jump(30)
    assert not rule.ready(30, 30)
    rule.vaulted(10)
    assert rule.ready(30, 30)


def test_where_all_is_vaulted_copies_go_on_behind_a_gap_at_once() -> None:
    rule = CopyRule(5)
    rule.track()
    assert rule.jump(9)
    assert rule.ready(9, 9)
    assert rule.jump(7)
    assert rule.ready(9, 9)


def test_a_gap_under_copies_ends_the_session_and_changes_nothing() -> None:
    """What was written in the gap touched nobody knows what: it cannot be cut out of them."""
    rule = CopyRule(0)
    rule.track()
    rule.reading("work", 0)
    rule.sent(1, as_records([(0, 1)]))
    assert not rule.jump(9)
    rule.accepted(AcceptedCopy(1, 0, 4, 0))
    rule.read("work")
    assert not rule.jump(9)
    assert (rule.previous_cut, rule.waiting, rule.remembered) == (0, 1, 1)
    rule.cut(1)
    assert rule.jump(9)


def test_records_are_forgotten_once_no_read_needs_them() -> None:
    rule = CopyRule(0)
    rule.track()
    rule.reading("work", 1)
    for lsn in range(1, 6):
        rule.sent(lsn, as_records([(lsn, 1)]))
    rule.cut(5)
    assert rule.remembered == 4
    rule.read("work")
    rule.forget()
    assert rule.remembered == 0
    rule.sent(6, as_records([(6, 1)]))
    assert rule.remembered == 0
    rule.track()
    assert not rule.ready(5, 0)
    assert rule.ready(6, 0)
