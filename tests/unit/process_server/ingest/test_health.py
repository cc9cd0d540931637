"""What is said of a machine's health, and why."""

from process_server.ingest.machine import judge


def judged(
    *,
    rpo_s: float | None = 1.0,
    target_s: float = 15.0,
    has_point: bool = True,
    late: tuple[tuple[str, float, float], ...] = (),
    fuzzy: tuple[str, ...] = (),
    failed: tuple[tuple[str, str], ...] = (),
) -> tuple[str, list[str]]:
    return judge(
        connected=True,
        denied=False,
        fenced=False,
        states=["protected"],
        rpo_s=rpo_s,
        target_s=target_s,
        has_point=has_point,
        late=late,
        scanned_fuzzy=fuzzy,
        failed=failed,
    )


def test_a_volume_that_failed_is_named_with_its_reason() -> None:
    health, reasons = judged(failed=(("data", "there is no such disk: /dev/sdb"), ("more", "")))
    assert health == "critical"
    assert reasons == ["volume data failed: there is no such disk: /dev/sdb", "volume more failed"]


def test_a_scanned_disk_as_old_as_its_timetable_is_well() -> None:
    assert judged(rpo_s=900.0, target_s=1815.0) == ("ok", [])
    assert judged(rpo_s=1900.0, target_s=1815.0)[0] == "critical"


def test_a_disk_scanned_in_use_is_a_warning_that_names_it() -> None:
    health, reasons = judged(rpo_s=None, has_point=False, fuzzy=("root",))
    assert health == "warning"
    assert any("volume root is scanned" in reason for reason in reasons)


def test_a_volume_that_is_late_is_told_where_the_machine_as_a_whole_hides_it() -> None:
    for rpo_s in (None, 900.0):
        health, reasons = judged(rpo_s=rpo_s, target_s=1815.0, late=(("data", 60.0, 15.0),))
        assert health == "critical"
        assert any("volume data is 60 s old" in reason for reason in reasons)
    # Where the machine is late, all of it is said once.
    assert len(judged(rpo_s=60.0, late=(("data", 60.0, 15.0),))[1]) == 1
