"""What is known of a volume that nobody serves, and what is remembered of it."""

import json
from pathlib import Path

import pytest

from agent.journal.state import DATA, StatePageWriter
from agent.replicate.ports import VolumeSpec
from agent.replicate.replica import FILE_NAME, Replica, known_size
from farshore.errors import CapacityError, Unreachable

MIB = 1 << 20


def spec(folder: Path, size_bytes: int = MIB) -> VolumeSpec:
    return VolumeSpec(b"v" * 16, "data", folder / "disk", size_bytes, 512, folder, folder / "state")


def publish(folder: Path) -> None:
    page = StatePageWriter.create(folder / "state", incarnation=b"i" * 16, boot_id=bytes(16))
    page.update(captured_lsn=9, durable_lsn=9, applied_lsn=9, capture_mode=DATA, flags=0)
    page.close()


def test_the_page_of_a_tap_that_is_gone_says_nothing_of_a_volume_that_is_not_served(tmp_path: Path) -> None:
    publish(tmp_path)
    replica = Replica(spec(tmp_path), None)
    replica.copied = True
    assert (replica.name_state(), replica.capture_mode()) == ("protected", "data")
    assert replica.lost("there is no such disk")
    assert (replica.name_state(), replica.capture_mode()) == ("failed", "bitmap")
    assert (replica.hello().state, replica.hello().problem) == ("failed", "there is no such disk")
    assert replica.volume_status() is None
    assert replica.fuzzy_anyway()
    with pytest.raises(Unreachable, match="no such disk"):
        replica.state()
    assert not replica.lost("there is no such disk")
    assert replica.lost("the disk is in use")
    replica.found()
    assert (replica.name_state(), replica.hello().problem) == ("protected", "")
    replica.close()


def test_a_volume_that_is_being_opened_is_awaited_for_a_while_and_not_called_failed(tmp_path: Path) -> None:
    replica = Replica(spec(tmp_path), None)
    replica.copied = True
    replica.expect(60.0)
    assert replica.awaited(59.0)
    assert not replica.awaited(60.0)
    assert replica.name_state() == "degraded"
    with pytest.raises(Unreachable):
        replica.found()  # whoever is said to serve it has published nothing
    assert not replica.served
    replica.lost("there is no such disk")
    assert not replica.awaited(0.0)
    publish(tmp_path)
    replica.found()
    assert not replica.awaited(0.0)
    replica.close()


def test_the_size_is_remembered_once_it_is_replicated_and_files_without_it_are_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"paused": true, "copied": true}')  # of an agent from before
    replica = Replica(spec(tmp_path), None)
    assert (replica.paused, replica.copied, known_size(tmp_path)) == (True, True, 0)
    replica.paused = False
    assert known_size(tmp_path) == 0
    replica.remember_size()
    assert known_size(tmp_path) == MIB
    replica.copied = False
    assert json.loads((tmp_path / FILE_NAME).read_text()) == {
        "paused": False,
        "copied": False,
        "size_bytes": MIB,
    }
    Replica(spec(tmp_path, 2 * MIB), None).remember_size()
    assert known_size(tmp_path) == 2 * MIB


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"size_bytes": "1"}', '{"size_bytes": -5}', '{"size_bytes": null}']
)
def test_a_memory_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert known_size(tmp_path) == 0


def test_a_size_that_could_not_be_kept_is_kept_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(spec(tmp_path), None)

    def full(path: Path, content: bytes) -> None:
        raise CapacityError("cannot write")

    monkeypatch.setattr("agent.replicate.replica.write_private", full)
    with pytest.raises(CapacityError):
        replica.remember_size()
    monkeypatch.undo()
    assert known_size(tmp_path) == 0
    replica.remember_size()
    assert known_size(tmp_path) == MIB
