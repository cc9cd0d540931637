"""``vault check``: what it finds, and that the points it calls lost are exactly those that cannot be had."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from farshore.cli.main import main
from farshore.errors import FarshoreError
from farshore.units import KIB
from process_server.recovery.check import Findings, VaultCheck
from process_server.recovery.check_chain import Receipt
from process_server.recovery.image import VolumeImage
from process_server.recovery.points import ChainReader, Cut, Point
from process_server.vault.chain import Chain
from process_server.vault.changes import PackTable, read_changes
from process_server.vault.commit import commit_name
from process_server.vault.map import MapReader, encode_map, map_name, map_prefix, merged_regions, write_map
from process_server.vault.pack import pack_name
from process_server.vault.rows import overlay
from tests.harness.faults import Injected
from tests.harness.small_vault import SmallVault, SmallVolume, scribble

SIZE = 96 * KIB
COMMITS = 12
SEEDS = [*range(24), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(24, 1000))]


def made(tmp_path: Path, seed: int, *, maps: bool = True) -> tuple[SmallVault, dict[int, dict[str, bytes]]]:
    """A vault of two volumes, and what each of them held at each commit."""
    random_ = random.Random(seed)
    volumes = SmallVolume("data", SIZE), SmallVolume("logs", SIZE // 2)
    vault = SmallVault(tmp_path / f"vault-{seed}", *volumes)
    states: dict[int, dict[str, bytes]] = {}
    for _ in range(COMMITS):
        for volume in volumes:
            scribble(volume, random_, random_.randrange(4))
        seq = vault.commit(inline=random_.random() < 0.4, groups=random_.choice((1, 4)))
        states[seq] = {volume.name: bytes(volume.content) for volume in volumes}
        if random_.random() < 0.15:
            vault.fence()
        if maps and random_.random() < 0.25:
            volume = random_.choice(volumes)
            write_map(vault.store, vault.keys, vault.machine, volume.id, vault.seq, None)
    return vault, states


def checked(vault: SmallVault, **how: object) -> Findings:
    return VaultCheck(vault.store, vault.keys, **how).run()  # type: ignore[arg-type]


def said_lost(found: Findings, states: dict[int, dict[str, bytes]]) -> set[tuple[int, str]]:
    return {
        (seq, affected.volume)
        for affected in found.affected
        for first, last in affected.spans
        for seq in states
        if first <= seq <= last
    }


def truly_lost(vault: SmallVault, states: dict[int, dict[str, bytes]]) -> set[tuple[int, str]]:
    """Recover every volume at every point; what comes out wrong without an error would be worse than lost."""
    lost = set()
    for seq, volumes in states.items():
        for name, content in volumes.items():
            chain = ChainReader(vault.store, vault.keys, vault.machine)
            try:
                cut = Cut(Point(vault.machine, chain.head(seq)), None, False)
                image = VolumeImage(chain, cut, name)
                assert image.read(0, image.size_bytes) == content
            except FarshoreError:
                lost.add((seq, name))
    return lost


def test_a_sound_vault_is_called_sound(tmp_path: Path) -> None:
    vault, states = made(tmp_path, 1)
    for share in (0.0, 1.0):
        found = checked(vault, read_share=share)
        assert found.damage == []
        assert found.affected == []
        assert found.commits == vault.seq
        assert found.packs == len(vault.packs)
        assert found.packs_read == (found.packs if share else 0)
    assert truly_lost(vault, states) == set()


def flip(path: Path, others: list[Path], random_: random.Random) -> None:
    body = bytearray(path.read_bytes())
    body[random_.randrange(len(body))] ^= 1 << random_.randrange(8)
    path.write_bytes(body)


def truncate(path: Path, others: list[Path], random_: random.Random) -> None:
    os.truncate(path, random_.randrange(path.stat().st_size))


def remove(path: Path, others: list[Path], random_: random.Random) -> None:
    path.unlink()


def swap(path: Path, others: list[Path], random_: random.Random) -> None:
    """Another object of the vault, whole and sealed, lies under this name."""
    path.write_bytes(random_.choice([other for other in others if other != path]).read_bytes())


def objects(vault: SmallVault) -> list[Path]:
    """All but the newest commit, which nothing follows; in an order that no random id decides on."""
    names = [pack_name(pack) for pack in vault.packs]
    names += [commit_name(vault.machine, seq) for seq in range(1, vault.seq)]
    names += [
        name
        for volume in vault.volumes
        for name in sorted(vault.store.list(map_prefix(vault.machine, volume.id)))
    ]
    return [vault.folder / name for name in names]


HARM: list[Callable[[Path, list[Path], random.Random], None]] = [flip, truncate, remove, swap]


@pytest.mark.fault("F27")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_points_called_lost_are_exactly_those_that_cannot_be_had(
    tmp_path: Path, injected: Injected, seed: int
) -> None:
    vault, states = made(tmp_path, seed)
    random_ = random.Random(seed)
    there = objects(vault)
    harmed = random_.sample(there, random_.choice((1, 1, 2)))
    for path in harmed:
        random_.choice(HARM)(path, [other for other in there if other not in harmed], random_)
        injected("F27")
    found = checked(vault, read_share=1.0)
    reported = {damage.object for damage in found.damage}
    for path in harmed:
        name = str(path.relative_to(vault.folder))
        # A map that is gone is only one that was never made; of a pack nobody knows when its commit is gone.
        forgotten = not path.exists() if name.startswith("m/") else name.startswith("p/") and len(harmed) > 1
        assert forgotten or name in reported, f"nobody hears of {name}"
    assert said_lost(found, states) == truly_lost(vault, states)


def test_a_pack_that_is_gone_is_found_without_reading_the_data(tmp_path: Path) -> None:
    vault, states = made(tmp_path, 7, maps=False)
    (vault.folder / pack_name(vault.packs[0])).unlink()
    found = checked(vault)
    assert [damage.object for damage in found.damage] == [pack_name(vault.packs[0])]
    assert said_lost(found, states) == truly_lost(vault, states) != set()


def test_a_damaged_chunk_takes_only_the_points_that_hold_it(tmp_path: Path) -> None:
    volume = SmallVolume("data", SIZE)
    vault = SmallVault(tmp_path / "vault", volume)
    states = {}
    for content in (b"a", b"b", b"c"):
        volume.write(0, content * 4096)
        states[vault.commit()] = {"data": bytes(volume.content)}
    path = vault.folder / pack_name(vault.packs[1])
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    assert checked(vault).damage == []  # nothing of it is read
    found = checked(vault, read_share=1.0)
    assert said_lost(found, states) == {(2, "data")}
    point = f"rp-{vault.machine[:4].hex()}-2"
    (affected,) = found.affected
    assert affected.as_dict() == {
        "machine": "web1",
        "volume": "data",
        "points": 1,
        "spans": [{"first": point, "last": point}],
        "extents": ((0, 4096),),
    }


def test_a_map_that_says_something_else_than_the_commits_is_told(tmp_path: Path) -> None:
    volume = SmallVolume("data", SIZE)
    vault = SmallVault(tmp_path / "vault", volume)
    states = {}
    for content in (b"a", b"b", b"c"):
        volume.write(0, content * 4096)
        states[vault.commit()] = {"data": bytes(volume.content)}
    # Authentic, and of the state one commit before: as a bug of whoever makes maps would leave it.
    stale = write_map(vault.store, vault.keys, vault.machine, volume.id, 1, None)
    change = next(iter(read_changes(vault.store, vault.keys, vault.machine, 2, 2)))
    table = PackTable()
    body = encode_map(
        vault.keys,
        machine=vault.machine,
        volume=volume.id,
        seq=2,
        commit_header=change.header_digest,
        lsn=2,
        size_bytes=SIZE,
        regions=merged_regions(stale, overlay(change.rows[:0]), SIZE, table),
        packs=table.packs,
    )
    vault.store.put_new(map_name(vault.machine, volume.id, 2), body)
    assert MapReader.parse(vault.keys, vault.machine, volume.id, 2, body).head.lsn == 2
    found = checked(vault, read_share=1.0)
    assert [damage.object for damage in found.damage] == [map_name(vault.machine, volume.id, 2)]
    assert "something else" in found.damage[0].why
    assert {seq for seq, _ in said_lost(found, states)} == {2, 3}


def test_a_rolled_back_chain_is_found_by_a_receipt_and_by_nothing_else(tmp_path: Path) -> None:
    vault, _ = made(tmp_path, 3, maps=False)
    newest = Chain(vault.store, vault.keys, vault.machine).load_head()
    assert newest is not None
    receipt = Receipt(vault.machine, newest.head.seq, newest.digest)
    assert checked(vault, receipts=[receipt]).damage == []
    (vault.folder / commit_name(vault.machine, vault.seq)).unlink()
    assert checked(vault).damage == []
    found = checked(vault, receipts=[receipt])
    assert [damage.object for damage in found.damage] == [commit_name(vault.machine, vault.seq)]
    assert "rolled back" in found.damage[0].why


def words(vault: SmallVault, *more: object) -> list[str]:
    return [*map(str, more), "--vault", vault.url, "--recovery-key-file", str(vault.key_file)]


def test_the_command_ends_with_7_and_names_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault, states = made(tmp_path, 7, maps=False)
    assert main(words(vault, "vault", "check", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (vault.folder / pack_name(vault.packs[0])).unlink()
    assert main(words(vault, "vault", "check", "--read-data", "--json")) == 7
    shown = json.loads(capsys.readouterr().out)
    assert shown["damage"] == [{"object": pack_name(vault.packs[0]), "why": "it is missing"}]
    assert sum(each["points"] for each in shown["affected"]) == len(truly_lost(vault, states))
    assert main(words(vault, "vault", "check")) == 7
    out, err = capsys.readouterr()
    assert f"damaged  {pack_name(vault.packs[0])}: it is missing" in out
    assert "lost     web1, volume data" in out
    assert err.count("\n") == 1


def test_what_info_prints_is_a_receipt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault, _ = made(tmp_path, 5, maps=False)
    assert main(words(vault, "vault", "info")) == 0
    assert "web1" in capsys.readouterr().out
    assert main(words(vault, "vault", "info", "--json")) == 0
    receipt = tmp_path / "receipt.json"
    receipt.write_text(capsys.readouterr().out)
    assert main(words(vault, "vault", "check", "--receipt", receipt)) == 0
    (vault.folder / commit_name(vault.machine, vault.seq)).unlink()
    assert main(words(vault, "vault", "check", "--receipt", receipt)) == 7
    assert "rolled back" in capsys.readouterr().out
    other, _ = made(tmp_path, 6, maps=False)
    assert main(words(other, "vault", "check", "--receipt", receipt)) == 3


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--subset", "5%"), 2),
        (("--read-data", "--subset", "5"), 2),
        (("--read-data", "--subset", "0%"), 2),
        (("--read-data", "--subset", "101%"), 2),
        (("--read-data", "--subset", "50%"), 0),
        (("--receipt", "/nonexistent"), 5),
        (("--receipt", "/dev/null"), 3),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], code: int
) -> None:
    vault, _ = made(tmp_path, 2)
    assert main(words(vault, "vault", "check", *more)) == code
    assert capsys.readouterr().err.count("\n") == bool(code)
