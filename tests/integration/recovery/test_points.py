"""Which point is meant, on a small chain made by the real encoders."""

import json
from pathlib import Path

import pytest

from farshore.cli.main import main
from farshore.clock import format_time
from farshore.errors import Conflict, NotFound, UsageError
from process_server.recovery.points import (
    ChainReader,
    Cut,
    find_machine,
    list_points,
    parse_time,
    resolve,
)
from process_server.vault.map import write_map
from tests.harness.small_vault import SmallVault, SmallVolume

SIZE = 1024 * 1024


def block(number: int) -> bytes:
    return bytes([number]) * 512


@pytest.fixture
def vault(tmp_path: Path) -> SmallVault:
    """Commits: 1 fuzzy, 2 fence, 3 and 4 with two records each, 5 with none, 6 fuzzy again."""
    volume = SmallVolume("data", SIZE)
    made = SmallVault(tmp_path / "vault", volume)
    volume.fuzzy = True
    volume.copy(0, block(1))
    made.commit()
    made.fence()
    volume.fuzzy = False
    for _ in range(2):
        volume.write(512, block(2))
        volume.write(1024, block(3))
        made.commit(tag="before the upgrade")
    made.commit()
    volume.fuzzy = True
    volume.write(2048, block(4))
    made.commit()
    return made


@pytest.fixture
def chain(vault: SmallVault) -> ChainReader:
    return find_machine(vault.store, vault.keys, "web1")


def at(chain: ChainReader, wanted: str, *, allow_fuzzy: bool = False) -> Cut:
    return resolve(chain, wanted, volume="data", allow_fuzzy=allow_fuzzy, now_ns=2**62)


def test_latest_is_the_newest_that_is_not_fuzzy(chain: ChainReader) -> None:
    assert at(chain, "latest").point.seq == 5
    assert at(chain, "latest", allow_fuzzy=True).point.seq == 6


def test_an_id_names_one_commit(chain: ChainReader, vault: SmallVault) -> None:
    prefix = vault.machine[:4].hex()
    assert at(chain, f"rp-{prefix}-3").point.seq == 3
    for wanted in (f"rp-{prefix}-2", f"rp-{prefix}-7", f"rp-{prefix}-0", "rp-00000000-3"):
        with pytest.raises(NotFound):
            at(chain, wanted)
    with pytest.raises(Conflict):
        at(chain, f"rp-{prefix}-1")
    assert at(chain, f"rp-{prefix}-1", allow_fuzzy=True).is_fuzzy


def test_a_time_is_the_newest_state_not_after_it(chain: ChainReader, vault: SmallVault) -> None:
    for seq in (3, 4, 5):
        assert at(chain, format_time(vault.time_ns(seq))).point.seq == seq
    assert at(chain, format_time(vault.time_ns(4) - 1000)).point.seq == 3
    assert at(chain, format_time(vault.time_ns(9))).point.seq == 5
    with pytest.raises(Conflict):
        at(chain, format_time(vault.time_ns(2)))
    with pytest.raises(NotFound):
        at(chain, format_time(vault.time_ns(0)))


def test_a_time_that_is_not_yet_is_refused(chain: ChainReader, vault: SmallVault) -> None:
    later = format_time(vault.time_ns(100))
    with pytest.raises(UsageError):
        resolve(chain, later, volume=None, allow_fuzzy=False, now_ns=vault.time_ns(50))


@pytest.mark.parametrize(
    "text",
    [
        "2025-11-13T02:13:20Z",
        "2025-11-13T02:13:20.000000Z",
        "2025-11-13t03:13:20+01:00",
        "2025-11-13 02:13:20z",
    ],
)
def test_a_time_is_read_whatever_its_zone(text: str) -> None:
    assert parse_time(text) == 1_763_000_000_000_000_000


def test_nanoseconds_of_a_time_count() -> None:
    assert parse_time("2025-11-13T02:13:20.123456789Z") == 1_763_000_000_123_456_789


@pytest.mark.parametrize(
    "wanted",
    ["yesterday", "2025-11-13", "2025-11-13T02:13:20", "lsn:", "lsn:-1", "rp-", "", "2025-13-01T00:00:00Z"],
)
def test_what_is_no_point_is_a_usage_error(chain: ChainReader, wanted: str) -> None:
    with pytest.raises(UsageError):
        at(chain, wanted)


def test_an_lsn_is_a_commit_or_a_part_of_one(chain: ChainReader) -> None:
    assert (at(chain, "lsn:1").point.seq, at(chain, "lsn:1").lsn) == (3, 1)
    assert (at(chain, "lsn:2").point.seq, at(chain, "lsn:2").lsn) == (3, None)
    # Of the commits that end at one LSN the newest: extents copied meanwhile are in it.
    assert (at(chain, "lsn:4").point.seq, at(chain, "lsn:4").lsn) == (5, None)
    with pytest.raises(Conflict):
        at(chain, "lsn:5")
    with pytest.raises(NotFound):
        at(chain, "lsn:6")
    with pytest.raises(UsageError):
        resolve(chain, "lsn:1", volume=None, allow_fuzzy=False, now_ns=0)
    with pytest.raises(NotFound):
        resolve(chain, "lsn:1", volume="other", allow_fuzzy=False, now_ns=0)


def test_an_lsn_below_the_end_of_a_copy_is_fuzzy(tmp_path: Path) -> None:
    volume = SmallVolume("data", SIZE)
    vault = SmallVault(tmp_path / "vault", volume)
    volume.copy(0, block(9))
    for number in range(4):
        volume.write(512 * number, block(number))
    volume.copy_end = 3
    vault.commit()
    chain = find_machine(vault.store, vault.keys, "web1")
    with pytest.raises(Conflict):
        at(chain, "lsn:2")
    assert at(chain, "lsn:2", allow_fuzzy=True).is_fuzzy
    assert not at(chain, "lsn:3").is_fuzzy


def test_the_list_is_the_contract(vault: SmallVault, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--vault", vault.url, "--recovery-key-file", str(vault.key_file))
    assert main(["point", "list", "web1", *words, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert [point["id"].rpartition("-")[2] for point in points] == ["1", "3", "4", "5", "6"]
    assert points[1] == {
        "id": f"rp-{vault.machine[:4].hex()}-3",
        "time": "2025-11-13T02:13:23.000000Z",
        "consistency": "crash",
        "tag": "before the upgrade",
        "timeline": vault.timeline.id.hex(),
        "volumes": {"data": {"lsn": 2, "size_bytes": SIZE}},
    }
    assert [point["consistency"] for point in points] == ["fuzzy", "crash", "crash", "crash", "fuzzy"]
    assert main(["point", "list", "web1", *words]) == 0
    assert "before the upgrade" in capsys.readouterr().out


def test_retired_commits_are_no_points(vault: SmallVault) -> None:
    write_map(vault.store, vault.keys, vault.machine, vault.volumes[0].id, 3, None)
    for seq in (1, 2):
        (vault.folder / f"c/{vault.machine.hex()}/{seq:020}").unlink()
    chain = find_machine(vault.store, vault.keys, "web1")
    assert [point.seq for point in list_points(chain)] == [3, 4, 5, 6]
    with pytest.raises(NotFound):
        at(chain, "lsn:1")
    assert at(chain, "lsn:3").lsn == 3


def test_a_machine_is_found_by_name_or_id(vault: SmallVault) -> None:
    assert find_machine(vault.store, vault.keys, vault.machine.hex()).machine == vault.machine
    for name in ("web2", "00" * 16):
        with pytest.raises(NotFound):
            find_machine(vault.store, vault.keys, name)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is known on this host."""
    for name in ("FARSHORE_SERVER_DIR", "FARSHORE_CLIENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("words", [["--vault", "file:///nowhere"], ["--recovery-key-file", "key"]])
def test_a_vault_has_to_be_named_whole(words: list[str]) -> None:
    assert main(["point", "list", "web1", *words]) == 2


@pytest.mark.usefixtures("nowhere")
def test_without_a_vault_and_a_server_the_verbs_say_what_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["point", "list", "web1"]) == 3
    assert "client.toml" in capsys.readouterr().err
    assert main(["recover", "web1", "--point", "latest", "--to", "x.img"]) == 2
    assert "--recovery-key-file" in capsys.readouterr().err


def test_of_one_volume_only_that_one_must_not_be_fuzzy(tmp_path: Path) -> None:
    data, root = SmallVolume("data", SIZE), SmallVolume("root", SIZE, fuzzy=True)
    vault = SmallVault(tmp_path / "vault", data, root)
    data.write(0, block(1))
    vault.commit()
    chain = find_machine(vault.store, vault.keys, "web1")
    when = format_time(vault.time_ns(1))
    for wanted in ("latest", f"rp-{vault.machine[:4].hex()}-1", when):
        found = resolve(chain, wanted, volume="data", allow_fuzzy=False, now_ns=2**62)
        assert (found.point.seq, found.is_fuzzy) == (1, False)
        for volume in ("root", None):
            with pytest.raises(Conflict):
                resolve(chain, wanted, volume=volume, allow_fuzzy=False, now_ns=2**62)
            assert resolve(chain, wanted, volume=volume, allow_fuzzy=True, now_ns=2**62).is_fuzzy


def test_of_the_commits_at_one_lsn_the_newest_that_is_not_fuzzy_is_meant(tmp_path: Path) -> None:
    volume = SmallVolume("root", SIZE)
    vault = SmallVault(tmp_path / "vault", volume)
    for lsn, fuzzy in ((1, True), (1, False), (1, True), (2, True), (2, True)):
        volume.lsn, volume.fuzzy = lsn, fuzzy
        vault.commit()
    chain = find_machine(vault.store, vault.keys, "web1")

    def seq(wanted: str, *, allow_fuzzy: bool = False) -> int:
        return resolve(chain, wanted, volume="root", allow_fuzzy=allow_fuzzy, now_ns=0).point.seq

    assert seq("lsn:1") == 2
    assert seq("lsn:1", allow_fuzzy=True) == 3
    assert seq("lsn:2", allow_fuzzy=True) == 5
    with pytest.raises(Conflict):
        seq("lsn:2")
