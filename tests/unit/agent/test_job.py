"""The books of a copy job: nothing is safe before it is vaulted, nothing is lost with a copier."""

from hypothesis import given
from hypothesis import strategies as st

from agent.replicate.job import UNIT_BYTES, Job, Unit, dirty_units, whole_volume
from farshore.units import KIB


def test_a_unit_is_safe_only_when_finished_and_vaulted() -> None:
    job = Job("initial", whole_volume(2 * UNIT_BYTES + 512), compare=False, after=0)
    assert job.take(1) == Unit(0, 0, UNIT_BYTES)
    job.accepted(1, 11)
    job.token_vaulted(11)
    assert job.safe == set()
    job.accepted(1, 12)
    job.done(1)
    assert job.safe == set()
    job.token_vaulted(12)
    assert job.safe == {0}
    assert job.take(2) is not None
    job.done(2)
    assert job.safe == {0, 1}
    assert job.remaining_bytes == 512
    assert not job.finished


def test_what_a_dead_copier_had_is_done_again() -> None:
    job = Job("initial", whole_volume(UNIT_BYTES), compare=False, after=0)
    job.take(1)
    job.accepted(1, 11)
    job.give_back(1)
    assert job.waiting
    assert not job.finished
    job.take(2)
    job.accepted(2, 12)
    job.done(2)
    job.token_vaulted(12)
    assert job.safe == set()  # the first copy is placed too, and counted until vaulted
    job.token_vaulted(11)
    assert job.vaulted
    assert job.safe == {0}


def test_a_job_of_nothing_is_over_at_once() -> None:
    job = Job("resync", [], compare=True, after=0)
    assert job.finished
    assert job.vaulted
    assert job.take(1) is None


@given(
    st.sets(st.integers(0, 3000)),
    st.sampled_from([64 * KIB, 128 * KIB]),
    st.sampled_from([16 * KIB, 64 * KIB, 128 * KIB, 1024 * KIB]),
)
def test_dirty_units_cover_every_region_in_whole_chunks(
    regions: set[int], region_bytes: int, chunk_bytes: int
) -> None:
    size = 3001 * region_bytes - 512
    units = dirty_units(sorted(regions), region_bytes, chunk_bytes, size)
    step = 16 * KIB
    covered = set()
    before = 0
    for unit in units:
        assert unit.offset >= before
        assert unit.offset % chunk_bytes == 0
        assert 0 < unit.length <= UNIT_BYTES
        before = unit.offset + unit.length
        assert before % chunk_bytes == 0 or before == size
        covered |= set(range(unit.offset // step, -(-before // step)))
    wanted = {
        block
        for region in regions
        for block in range(
            region * region_bytes // (16 * KIB), -(-min(size, (region + 1) * region_bytes) // (16 * KIB))
        )
    }
    assert wanted <= covered
    assert len(covered) <= len(wanted) + 2 * len(regions) * chunk_bytes // step
    assert [unit.index for unit in units] == list(range(len(units)))
