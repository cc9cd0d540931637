"""The age that is shown is never smaller than the truth."""

from farshore.wire import messages as m
from process_server.ingest.rpo import WAITING_MAX, RpoTracker

VOLUME, FIRST, SECOND = b"v" * 16, b"1" * 16, b"2" * 16


def status(
    lsn: int, *, mode: str = "data", state: str = "protected", incarnation: bytes = FIRST
) -> tuple[m.VolumeStatus]:
    return (m.VolumeStatus(VOLUME, incarnation, lsn, lsn, 0, mode, state),)


def test_unknown_until_something_offerable_covers_an_answer() -> None:
    rpo = RpoTracker()
    assert rpo.rpo_s(5.0) is None
    rpo.ping(1, 10.0)
    rpo.pong(1, status(7), {VOLUME})
    assert rpo.rpo_s(11.0) is None
    rpo.vaulted({VOLUME: (FIRST, 1, 6)}, offerable=True)
    assert rpo.rpo_s(11.0) is None
    rpo.vaulted({VOLUME: (FIRST, 1, 7)}, offerable=False)
    assert rpo.rpo_s(11.0) is None
    rpo.vaulted({VOLUME: (FIRST, 1, 7)}, offerable=True)
    assert rpo.rpo_s(13.0) == 3.0


def test_it_counts_from_when_the_ping_went_out_and_grows_when_nothing_comes() -> None:
    rpo = RpoTracker()
    rpo.vaulted({VOLUME: (FIRST, 1, 7)}, offerable=True)
    rpo.ping(1, 10.0)
    rpo.pong(1, status(7), {VOLUME})
    assert rpo.rpo_s(10.5) == 0.5
    rpo.ping(2, 20.0)
    rpo.disconnected()
    rpo.pong(2, status(7), {VOLUME})
    assert rpo.rpo_s(1010.0) == 1000.0


def test_answers_that_prove_nothing_are_not_used() -> None:
    rpo = RpoTracker()
    rpo.vaulted({VOLUME: (FIRST, 1, 7)}, offerable=True)
    rpo.pong(9, status(7), {VOLUME})  # to no PING of ours
    for number, answer in enumerate((status(7, mode="bitmap"), status(7, state="resync"))):
        rpo.ping(number, 1.0)
        rpo.pong(number, answer, {VOLUME})
    rpo.ping(5, 1.0)
    rpo.pong(5, status(7), {VOLUME, b"w" * 16})
    rpo.ping(6, 1.0)
    rpo.pong(6, status(3, incarnation=SECOND), {VOLUME})
    assert rpo.rpo_s(2.0) is None


def test_answers_that_wait_are_bounded_and_dropping_some_only_adds_to_the_age() -> None:
    rpo = RpoTracker()
    for number in range(3 * WAITING_MAX):
        rpo.ping(number, float(number))
        rpo.pong(number, status(number), {VOLUME})
    assert len(rpo._waiting) <= WAITING_MAX
    rpo.vaulted({VOLUME: (FIRST, 1, 1000)}, offerable=True)
    age = rpo.rpo_s(1000.0)
    assert age is not None
    assert age >= 0.0
