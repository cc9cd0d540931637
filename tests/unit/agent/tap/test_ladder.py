"""The ladder by its rules: each way down keeps the order, and there is always a way back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.tap.ladder import (
    Action,
    Answered,
    BitsKept,
    BitsLost,
    Broken,
    ClimbDue,
    Event,
    Full,
    Ladder,
    Left,
    Mode,
    Opened,
    OpenFailed,
    Reopen,
    Stalled,
    step,
)

A = Action


def path(ladder: Ladder, *events: Event) -> tuple[Ladder, list[tuple[Action, ...]]]:
    done = []
    for event in events:
        ladder, actions = step(ladder, event)
        done.append(actions)
    return ladder, done


def test_a_full_journal_is_left_in_order_and_climbed_back_into() -> None:
    down, actions = path(Ladder(), Full("quota"), Left())
    assert actions == [(A.HOLD, A.LEAVE, A.ALARM), (A.PASS,)]
    assert (down.mode, down.lost, down.retry_s) == (Mode.BITMAP, False, 0.0)
    up, actions = path(down, ClimbDue(), OpenFailed("full", room_only=True), ClimbDue(), Opened())
    assert actions == [(A.OPEN,), (), (A.OPEN,), (A.LOG,)]
    assert up == Ladder()


def test_a_broken_journal_takes_back_what_is_not_durable_before_anything_passes() -> None:
    down, actions = path(Ladder(), Broken("EIO"), Left())
    assert actions == [(A.HOLD, A.ABANDON, A.LEAVE, A.ALARM), (A.PASS,)]
    assert down.retry_s > 0
    assert not down.lost


@pytest.mark.parametrize("event", [Broken("mark"), Stalled("mark")])
def test_a_mark_that_cannot_be_made_means_lost_but_not_an_endless_wait(event: Event) -> None:
    down, actions = path(Ladder(), Full("quota"), event)
    assert actions[1] == (A.ABANDON, A.LOSE, A.PASS, A.ALARM)
    assert down.lost


def test_a_hung_journal_is_left_at_once_and_leaves_word() -> None:
    down, actions = path(Ladder(), Stalled("2 s"))
    assert actions == [(A.HOLD, A.ABANDON, A.LOSE, A.PASS, A.ALARM)]
    assert (down.mode, down.lost) == (Mode.BITMAP, True)


def test_who_waits_is_told_once_and_goes_on_where_it_was() -> None:
    waiting, actions = path(Ladder(wait=True), Stalled("2 s"), Stalled("3 s"), Answered())
    assert actions == [(A.ALARM,), (), ()]
    assert waiting == Ladder(wait=True)
    stuck, actions = path(Ladder(wait=True), Full("quota"), Broken("mark"))
    assert A.PASS not in actions[1]
    assert stuck.mode is Mode.LEAVING


def test_failures_to_open_are_tried_again_ever_more_rarely() -> None:
    ladder, _ = path(Ladder(), Broken("EIO"), Left())
    waits = []
    for _ in range(8):
        ladder, _ = path(ladder, ClimbDue(), OpenFailed("EIO", room_only=False))
        waits.append(ladder.retry_s)
    assert waits == sorted(waits)
    assert waits[-1] == 30.0


def test_a_new_incarnation_on_demand_goes_down_and_up() -> None:
    ladder, actions = path(Ladder(), Reopen(70), Left(), ClimbDue(), Opened())
    assert actions == [(A.HOLD, A.LEAVE), (A.PASS,), (A.OPEN,), (A.LOG,)]
    assert ladder.above_lsn == 70
    lower, _ = path(ladder, Reopen(50))
    assert lower.above_lsn == 70


events: list[Event] = [
    Full("f"),
    Broken("b"),
    Stalled("s"),
    Answered(),
    Left(),
    BitsLost("l"),
    BitsKept(),
    Reopen(5),
    ClimbDue(),
    Opened(),
    OpenFailed("o", room_only=False),
]


@given(st.lists(st.sampled_from(events)), st.booleans())
def test_nothing_passes_that_was_not_prepared(story: list[Event], wait: bool) -> None:
    ladder = Ladder(wait=wait)
    logging, holding, opening = True, False, False
    for event in story:
        ladder, actions = step(ladder, event)
        for action in actions:
            if action is A.HOLD:
                assert logging
                logging, holding = False, True
            elif action is A.PASS:
                # Either all is durable (Left), or word of the loss was left first.
                assert holding
                assert isinstance(event, Left) or actions.index(A.LOSE) < actions.index(A.PASS)
                holding = False
            elif action is A.OPEN:
                assert not logging
                assert not holding
                assert not opening
                opening = True
            elif action is A.LOG:
                assert opening
                logging, opening = True, False
            elif action is A.LOSE:
                assert ladder.lost
        if isinstance(event, OpenFailed):
            opening = opening and ladder.mode is Mode.CLIMBING
        assert (ladder.mode is Mode.DATA) == logging
        assert (ladder.mode is Mode.LEAVING) == holding
        assert wait is False or A.PASS not in actions or isinstance(event, Left)


class AlwaysAWayBack(RuleBasedStateMachine):
    """From wherever trouble has led, room and patience lead to data mode."""

    def __init__(self) -> None:
        super().__init__()
        self.ladder = Ladder()

    @rule(event=st.sampled_from(events))
    def trouble(self, event: Event) -> None:
        self.ladder, _ = step(self.ladder, event)

    @precondition(lambda self: self.ladder.mode is not Mode.DATA)
    @rule()
    def the_end_of_trouble(self) -> None:
        good: dict[Mode, Event] = {
            Mode.LEAVING: Left(),
            Mode.BITMAP: ClimbDue(),
            Mode.CLIMBING: Opened(),
        }
        for _ in range(3):
            if self.ladder.mode is not Mode.DATA:
                self.ladder, _ = step(self.ladder, good[self.ladder.mode])
        assert self.ladder.mode is Mode.DATA
        assert self.ladder.why == ""

    @invariant()
    def lsns_are_never_forgotten(self) -> None:
        assert self.ladder.above_lsn in (0, 5)


TestAlwaysAWayBack = AlwaysAWayBack.TestCase
