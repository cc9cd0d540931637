"""Two histories of one machine, both sealed by us: what is read back is one of them, never a mixture."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from farshore.cli.main import main
from farshore.errors import Conflict, IntegrityError
from process_server.ingest.resync import build_table
from process_server.recovery.image import VolumeImage
from process_server.recovery.points import find_machine, list_points, resolve
from process_server.vault.commit import commit_name
from process_server.vault.map import map_name, newest_map, write_map
from tests.harness.small_vault import SmallVault, SmallVolume, scribble

SIZE = 256 * 1024
FORK, NEWEST = 3, 7
MAPPED = 5


class TwoHistories:
    """A chain of seven commits, the fifth a fence, with a map after the fifth; ``other`` holds, by name, what
    lay there in the history that was rolled back after the third."""

    def __init__(self, folder: Path, *, mapped: bool) -> None:
        random_ = random.Random(11)
        self.volume = SmallVolume("data", SIZE)
        self.vault = SmallVault(folder / "vault", self.volume)
        self.mapped = mapped
        for _ in range(FORK):
            scribble(self.volume, random_, 5)
            self.vault.commit()
        self._go_on(random_)
        self.other = self.vault.roll_back(FORK)
        self._go_on(random_)

    def _go_on(self, random_: random.Random) -> None:
        for seq in range(FORK + 1, NEWEST + 1):
            if seq == MAPPED:
                self.vault.fence()
                if self.mapped:
                    self.write_map(seq)
            else:
                scribble(self.volume, random_, 5)
                # Small and large: a reader that looks at the first 64 KiB sees all of the one only.
                self.vault.commit(inline=bool(seq % 2))

    def write_map(self, seq: int) -> None:
        vault = self.vault
        write_map(vault.store, vault.keys, vault.machine, self.volume.id, seq, None)

    def mix(self, name: str) -> None:
        self.vault.put_back(name, self.other[name])

    def commit(self, seq: int) -> str:
        return commit_name(self.vault.machine, seq)

    @property
    def map(self) -> str:
        return map_name(self.vault.machine, self.volume.id, MAPPED)

    def image(self, wanted: str = "latest") -> bytes:
        chain = find_machine(self.vault.store, self.vault.keys, "web1")
        cut = resolve(chain, wanted, volume="data", allow_fuzzy=False, now_ns=0)
        return VolumeImage(chain, cut, "data").read(0, SIZE)

    def point(self, seq: int) -> str:
        return f"rp-{self.vault.machine[:4].hex()}-{seq}"


@pytest.fixture(params=[False, True], ids=["commits", "map"])
def histories(request: pytest.FixtureRequest, tmp_path: Path) -> TwoHistories:
    return TwoHistories(tmp_path, mapped=request.param)


def test_a_history_alone_is_read_whole(histories: TwoHistories) -> None:
    assert histories.image() == histories.volume.content
    chain = find_machine(histories.vault.store, histories.vault.keys, "web1")
    assert [point.seq for point in list_points(chain)] == [1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("seq", range(FORK + 1, NEWEST))
def test_a_commit_of_another_history_is_never_recovered_over(histories: TwoHistories, seq: int) -> None:
    histories.mix(histories.commit(seq))
    if histories.mapped and seq < MAPPED:
        # What the map was made of before somebody changed it.
        assert histories.image() == histories.volume.content
    else:
        with pytest.raises(IntegrityError, match="chain is broken"):
            histories.image()
    chain = find_machine(histories.vault.store, histories.vault.keys, "web1")
    with pytest.raises(IntegrityError, match="chain is broken"):
        list(list_points(chain))


def test_a_point_that_was_replaced_is_noticed_by_the_commit_after_it(histories: TwoHistories) -> None:
    """All before it is as it should be, and the commit follows it: only its successor knows another."""
    histories.mix(histories.commit(FORK + 1))
    with pytest.raises(IntegrityError, match="chain is broken"):
        histories.image(histories.point(FORK + 1))


def test_the_newest_commit_of_another_history_is_noticed(histories: TwoHistories) -> None:
    histories.mix(histories.commit(NEWEST))
    with pytest.raises(IntegrityError, match="chain is broken"):
        histories.image()


def test_damage_after_a_point_does_not_cost_the_point(histories: TwoHistories) -> None:
    point, after = histories.point(FORK + 1), histories.vault.folder / histories.commit(FORK + 2)
    whole = histories.image(point)
    body = bytearray(after.read_bytes())
    body[140] ^= 1
    after.write_bytes(body)
    assert histories.image(point) == whole
    after.unlink()
    assert histories.image(point) == whole


def test_a_map_of_another_history_is_passed_over(tmp_path: Path) -> None:
    histories = TwoHistories(tmp_path, mapped=True)
    histories.mix(histories.map)
    assert histories.image() == histories.volume.content
    vault = histories.vault
    assert newest_map(vault.store, vault.keys, vault.machine, histories.volume.id, NEWEST) is None


def test_a_map_and_its_commit_of_another_history_are_noticed_by_what_follows(tmp_path: Path) -> None:
    histories = TwoHistories(tmp_path, mapped=True)
    histories.mix(histories.map)
    histories.mix(histories.commit(MAPPED))
    with pytest.raises(IntegrityError, match="chain is broken"):
        histories.image()


def test_a_point_right_at_a_map_is_the_one_that_the_map_is_of(tmp_path: Path) -> None:
    """The point's commit says size and LSN, the map what lies there: both of one history, or nothing."""
    histories = TwoHistories(tmp_path, mapped=False)
    histories.write_map(FORK + 1)
    assert histories.image(histories.point(FORK + 1)) == histories.volume.states[lsn_at(histories, FORK + 1)]
    histories.mix(histories.commit(FORK + 1))
    with pytest.raises(IntegrityError, match="chain is broken"):
        histories.image(histories.point(FORK + 1))


def lsn_at(histories: TwoHistories, seq: int) -> int:
    chain = find_machine(histories.vault.store, histories.vault.keys, "web1")
    return chain.head(seq).volumes[0].lsn


def test_a_map_left_by_another_history_does_not_become_ours(tmp_path: Path) -> None:
    """Only the commits were rolled back, the map was not: its name is taken, what it says is not true."""
    histories = TwoHistories(tmp_path, mapped=True)
    vault = histories.vault
    vault.put_back(histories.map, histories.other[histories.map])
    with pytest.raises(Conflict, match="another history"):
        histories.write_map(MAPPED)
    histories.write_map(MAPPED + 1)
    assert histories.image() == histories.volume.content


def test_a_map_is_not_made_of_two_histories(histories: TwoHistories) -> None:
    vault, volume = histories.vault, histories.volume.id
    base = newest_map(vault.store, vault.keys, vault.machine, volume, NEWEST)
    histories.mix(histories.commit(NEWEST - 1))
    with pytest.raises(IntegrityError, match="chain is broken"):
        write_map(vault.store, vault.keys, vault.machine, volume, NEWEST, base)


def test_of_two_histories_nothing_is_called_the_same(histories: TwoHistories) -> None:
    """A block that the agent need not send has to be in the history that is recovered."""
    vault, volume = histories.vault, histories.volume.id
    histories.mix(histories.commit(NEWEST - 1))
    with pytest.raises(IntegrityError, match="chain is broken"):
        build_table(vault.store, vault.keys, vault.machine, volume, NEWEST, 4096, SIZE)


def test_the_commands_end_with_the_code_for_integrity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    histories = TwoHistories(tmp_path, mapped=True)
    histories.mix(histories.commit(MAPPED + 1))
    words = ("--vault", histories.vault.url, "--recovery-key-file", str(histories.vault.key_file), "--json")
    image = tmp_path / "out.img"

    def error(*command: str) -> Any:
        assert main([*command, *words]) == 7
        return json.loads(capsys.readouterr().out)["error"]

    told = error("recover", "web1", "--point", "latest", "--to", str(image))
    assert told["what"] == "the chain is broken"
    assert told["where"] == histories.commit(MAPPED + 1)
    assert error("point", "list", "web1")["what"] == "the chain is broken"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".img"] == []
