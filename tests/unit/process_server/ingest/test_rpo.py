"""The age that is shown is never smaller than the truth."""

from farshore.wire import messages as m
from process_server.ingest.rpo import WAITING_MAX, MachineRpo, RpoTracker

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


def scanned(next_pass: int, *, incarnation: bytes = FIRST) -> tuple[m.VolumeStatus]:
    lsn = max(0, next_pass - 1)
    return (m.VolumeStatus(VOLUME, incarnation, lsn, lsn, 0, "scan", "protected", next_pass, 900.0),)


def test_a_scanned_disk_is_as_old_as_the_last_answer_before_its_pass_began() -> None:
    rpo = RpoTracker()
    for now, next_pass in ((1, 0), (2, 5), (3, 5), (4, 6), (5, 6)):
        rpo.ping(now, float(now))
        rpo.pong(now, scanned(next_pass), {VOLUME})
    # Pass 4 is whole, and everything that anybody captured is vaulted: that says nothing of now.
    rpo.vaulted({VOLUME: (FIRST, 4, 4)}, offerable=True)
    assert rpo.rpo_s(10.0) is None
    rpo.vaulted({VOLUME: (SECOND, 5, 5)}, offerable=False)
    assert rpo.rpo_s(10.0) is None
    rpo.vaulted({VOLUME: (SECOND, 5, 5)}, offerable=True)
    assert rpo.rpo_s(10.0) == 7.0
    for now in (20, 30, 40):
        rpo.ping(now, float(now))
        rpo.pong(now, scanned(6, incarnation=SECOND), {VOLUME})
    assert rpo.rpo_s(50.0) == 47.0
    rpo.vaulted({VOLUME: (b"3" * 16, 6, 6)}, offerable=True)
    assert rpo.rpo_s(50.0) == 10.0


def test_a_pass_that_takes_days_is_still_known_to_within_a_part_of_them() -> None:
    rpo = RpoTracker()
    data = m.VolumeStatus(b"d" * 16, FIRST, 0, 0, 0, "data", "protected")
    days = 2 * 86_400
    for now in range(days):
        rpo.ping(now, float(now))
        answer = (
            m.VolumeStatus(b"d" * 16, FIRST, now, now, 0, "data", "protected"),
            *scanned(5 + (now > 60_000)),
        )
        rpo.pong(now, answer, {VOLUME, data.id})
    assert len(rpo._waiting) <= WAITING_MAX
    rpo.vaulted({VOLUME: (FIRST, 5, 5), data.id: (FIRST, 1, days)}, offerable=True)
    age = rpo.rpo_s(float(days))
    assert age is not None
    assert 0 <= age - (days - 60_000) < days / 100


def test_an_incarnation_that_ended_holds_up_nothing() -> None:
    rpo = RpoTracker()
    for number, incarnation in ((1, FIRST), (2, SECOND)):
        rpo.ping(number, float(number))
        rpo.pong(number, status(7, incarnation=incarnation), {VOLUME})
    rpo.vaulted({VOLUME: (SECOND, 2, 7)}, offerable=True)
    assert rpo.rpo_s(5.0) == 3.0


def test_a_volume_that_is_fuzzy_hides_the_age_of_the_machine_and_of_no_other_volume() -> None:
    rpo, data = MachineRpo(), b"d" * 16
    answer = (m.VolumeStatus(data, FIRST, 7, 7, 0, "data", "protected"), *scanned(5))
    positions = {data: (FIRST, 1, 7), VOLUME: (FIRST, 5, 5)}
    rpo.ping(1, 1.0)
    rpo.pong(1, answer, {data, VOLUME})
    rpo.vaulted(positions, offerable=False, fuzzy={VOLUME})
    rpo.ping(2, 2.0)
    rpo.pong(2, answer, {data, VOLUME})
    assert rpo.rpo_s(3.0) is None
    assert rpo.volume_rpo_s(data, 3.0) == 1.0
    assert rpo.volume_rpo_s(VOLUME, 3.0) is None
    assert rpo.volume_rpo_s(b"x" * 16, 3.0) is None
    rpo.vaulted(positions, offerable=True, fuzzy=())
    assert (rpo.rpo_s(3.0), rpo.volume_rpo_s(VOLUME, 3.0)) == (1.0, 1.0)
    rpo.ping(3, 3.0)
    rpo.disconnected()
    rpo.pong(3, answer, {data, VOLUME})
    assert rpo.rpo_s(4.0) == 2.0
