"""Recovering from a vault made by the real encoders, through the command line, held against a model."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from farshore.cli.main import main
from process_server.vault.map import newest_map, write_map
from process_server.vault.pack import pack_name
from tests.harness.small_vault import SmallVault, SmallVolume, scribble

SIZE = 4 * 1024 * 1024 + 512


def volume_with_history(tmp_path: Path, *, commits: int = 6) -> tuple[SmallVault, SmallVolume]:
    """A volume copied first, then written to at random; packs of every kind, a map in the middle."""
    random_ = random.Random(7)
    volume = SmallVolume("data", SIZE)
    vault = SmallVault(tmp_path / "vault", volume)
    volume.fuzzy = True
    for at in range(0, SIZE // 2, 128 * 1024):
        volume.copy(at, random_.randbytes(64 * 1024) * 2)
    vault.commit()
    volume.fuzzy = False
    vault.fence()
    for number in range(commits):
        scribble(volume, random_, 12)
        vault.commit(tag=f"number {number}", inline=number % 2 == 0, groups=1 + number % 3)
        if number == commits // 2:
            write_map(vault.store, vault.keys, vault.machine, volume.id, vault.seq, None)
    return vault, volume


def farshore(vault: SmallVault, *words: object) -> list[str]:
    return [
        *(str(word) for word in words),
        *("--vault", vault.url, "--recovery-key-file", str(vault.key_file), "--json"),
    ]


def run(capsys: pytest.CaptureFixture[str], vault: SmallVault, *words: object, code: int = 0) -> Any:
    capsys.readouterr()
    found = main(farshore(vault, *words))
    out, err = capsys.readouterr()
    assert found == code, err
    return json.loads(out)


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "partial" in path.name or path.suffix == ".img"]


def test_latest_is_the_disk_byte_for_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault, volume = volume_with_history(tmp_path)
    image = tmp_path / "out.img"
    result = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", image)
    assert image.read_bytes() == volume.content
    assert result["point"] == f"rp-{vault.machine[:4].hex()}-{vault.seq}"
    assert result["volumes"] == [
        {
            "name": "data",
            "lsn": volume.lsn,
            "bytes": SIZE,
            "blake3": blake3(bytes(volume.content)).hexdigest(),
        }
    ]
    assert result["seconds"] > 0
    assert image.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("with_map", [True, False])
def test_every_lsn_is_exactly_the_prefix_of_the_writes(tmp_path: Path, with_map: bool) -> None:
    from process_server.recovery.image import VolumeImage
    from process_server.recovery.points import find_machine, resolve

    vault, volume = volume_with_history(tmp_path)
    if with_map:
        base = newest_map(vault.store, vault.keys, vault.machine, volume.id, vault.seq)
        write_map(vault.store, vault.keys, vault.machine, volume.id, vault.seq - 1, base)
    chain = find_machine(vault.store, vault.keys, "web1")
    for lsn in range(1, volume.lsn + 1):
        cut = resolve(chain, f"lsn:{lsn}", volume="data", allow_fuzzy=False, now_ns=0)
        image = VolumeImage(chain, cut, "data")
        assert image.read(0, SIZE) == volume.states[lsn], lsn
        assert image.lsn == lsn


def test_an_lsn_is_recovered_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault, volume = volume_with_history(tmp_path)
    image = tmp_path / "out.img"
    for lsn in (1, 17, volume.lsn):
        words = ("--point", f"lsn:{lsn}", "--volume", "data", "--to", image, "--force")
        assert run(capsys, vault, "recover", "web1", *words)["volumes"][0]["lsn"] == lsn
        assert image.read_bytes() == volume.states[lsn]


def test_the_output_is_sparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = SmallVolume("data", 256 * 1024 * 1024)
    vault = SmallVault(tmp_path / "vault", volume)
    volume.write(200 * 1024 * 1024, b"x" * 4096)
    volume.write(0, b"y" * 1024 * 1024)
    vault.commit()
    image = tmp_path / "out.img"
    result = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", image)
    assert image.stat().st_blocks * 512 < 4 * 1024 * 1024
    assert result["volumes"][0]["blake3"] == blake3(bytes(volume.content)).hexdigest()


def test_a_damaged_pack_is_an_integrity_error_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault, _ = volume_with_history(tmp_path)
    for pack in vault.packs:
        path = vault.folder / pack_name(pack)
        body = bytearray(path.read_bytes())
        body[len(body) * 3 // 4] ^= 1
        path.write_bytes(body)
    image = tmp_path / "out.img"
    error = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", image, code=7)["error"]
    assert error["where"].startswith("p/")
    assert nothing_left(tmp_path)


def test_a_missing_pack_or_commit_is_an_integrity_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault, _ = volume_with_history(tmp_path)
    image = tmp_path / "out.img"
    (vault.folder / pack_name(vault.packs[0])).unlink()
    error = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", image, code=7)["error"]
    assert error["where"] == pack_name(vault.packs[0])
    lost = vault.folder / f"c/{vault.machine.hex()}/{vault.seq - 1:020}"
    lost.unlink()
    error = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", image, code=7)["error"]
    assert error["where"] == f"c/{vault.machine.hex()}/{vault.seq - 1:020}"
    assert nothing_left(tmp_path)


def test_a_damaged_map_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault, volume = volume_with_history(tmp_path)
    found = newest_map(vault.store, vault.keys, vault.machine, volume.id, vault.seq)
    assert found is not None
    path = vault.folder / found.name
    path.write_bytes(path.read_bytes()[:100])
    image = tmp_path / "out.img"
    run(capsys, vault, "recover", "web1", "--point", "latest", "--to", image)
    assert image.read_bytes() == volume.content


def test_a_wrong_key_is_told_from_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault, _ = volume_with_history(tmp_path)
    other = SmallVault(tmp_path / "other", SmallVolume("data", SIZE))
    vault.key_file = other.key_file
    error = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", tmp_path / "x.img", code=7)
    assert error["error"]["kind"] == "WrongKey"


def test_a_key_file_that_others_can_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault, _ = volume_with_history(tmp_path)
    vault.key_file.chmod(0o644)
    run(capsys, vault, "recover", "web1", "--point", "latest", "--to", tmp_path / "x.img", code=3)


def test_a_newer_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault, _ = volume_with_history(tmp_path)
    path = vault.folder / f"c/{vault.machine.hex()}/{vault.seq:020}"
    body = bytearray(path.read_bytes())
    body[8] = 2
    path.write_bytes(body)
    error = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", tmp_path / "x.img", code=7)
    assert re.search("newer", error["error"]["message"])


def test_an_existing_file_is_kept_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault, volume = volume_with_history(tmp_path)
    image = tmp_path / "out.raw"
    image.write_text("mine")
    words = ("recover", "web1", "--point", "latest", "--to", image)
    run(capsys, vault, *words, code=6)
    assert image.read_text() == "mine"
    run(capsys, vault, *words, "--force")
    assert image.read_bytes() == volume.content


def test_several_volumes_go_to_a_directory_and_one_failing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = SmallVolume("one", SIZE), SmallVolume("two", SIZE)
    vault = SmallVault(tmp_path / "vault", one, two)
    one.write(0, b"1" * 65536)
    vault.commit()
    two.write(0, b"2" * 65536)
    vault.commit()
    out = tmp_path / "out"
    result = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", out)
    assert (out / "one.raw").read_bytes() == one.content
    assert (out / "two.raw").read_bytes() == two.content
    assert [each["name"] for each in result["volumes"]] == ["one", "two"]
    (vault.folder / pack_name(vault.packs[1])).unlink()
    again = tmp_path / "again"
    result = run(capsys, vault, "recover", "web1", "--point", "latest", "--to", again, code=1)
    assert [each["name"] for each in result["volumes"]] == ["one"]
    assert result["failed"]["two"]["exit_code"] == 7
    assert [path.name for path in again.iterdir()] == ["one.raw"]
    run(capsys, vault, "recover", "web1", "--point", "latest", "--to", out / "one.raw", code=6)


@pytest.mark.needs("qemu-img")
@pytest.mark.parametrize("kind", ["qcow2", "vhdx", "vmdk"])
def test_other_formats_hold_the_same_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    vault, volume = volume_with_history(tmp_path)
    image, raw = tmp_path / f"out.{kind}", tmp_path / "back.raw"
    words = ("--point", "latest", "--to", image, "--format", kind)
    run(capsys, vault, "recover", "web1", *words)
    subprocess.run(["qemu-img", "convert", "-f", kind, "-O", "raw", image, raw], check=True)
    assert raw.read_bytes()[:SIZE] == volume.content
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.needs("loop", "losetup")
def test_a_device_takes_it_only_when_confirmed_free_and_large_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault, volume = volume_with_history(tmp_path)
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xff" * 8 * 1024 * 1024)
    device = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        words = ("recover", "web1", "--point", "latest", "--to", device)
        run(capsys, vault, *words, code=6)
        run(capsys, vault, *words, "--force", code=6)
        run(capsys, vault, *words, "--confirm", "other", code=6)
        assert backing.read_bytes()[:SIZE] == b"\xff" * SIZE
        result = run(capsys, vault, *words, "--confirm", "data")
        assert backing.read_bytes()[:SIZE] == volume.content
        assert backing.read_bytes()[SIZE:] == b"\xff" * (8 * 1024 * 1024 - SIZE)
        assert result["volumes"][0]["blake3"] == blake3(bytes(volume.content)).hexdigest()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.needs("loop", "losetup", "mkfs.ext4", "mount")
def test_a_mounted_or_too_small_device_is_refused_before_a_byte_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vault, _ = volume_with_history(tmp_path)
    for size, mounted in ((8 * 1024 * 1024, True), (1024 * 1024, False)):
        backing, mount = tmp_path / f"backing{size}", tmp_path / f"mount{size}"
        backing.write_bytes(bytes(size))
        mount.mkdir()
        device = subprocess.run(
            ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
        ).stdout.strip()
        try:
            if mounted:
                subprocess.run(["mkfs.ext4", "-q", device], check=True)
                subprocess.run(["mount", device, mount], check=True)
            words = ("recover", "web1", "--point", "latest", "--to", device, "--confirm", "data")
            error = run(capsys, vault, *words, code=6)["error"]
            assert (str(mount) if mounted else "too small") in error["message"]
            if not mounted:
                assert backing.read_bytes() == bytes(size)
        finally:
            if mounted:
                subprocess.run(["umount", mount], check=True)
            subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.needs("root", "mount")
def test_a_full_disk_is_a_capacity_error_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = SmallVolume("data", 16 * 1024 * 1024)
    vault = SmallVault(tmp_path / "vault", volume)
    for at in range(0, volume.size_bytes, 1024 * 1024):
        volume.write(at, random.Random(at).randbytes(1024 * 1024))
    vault.commit()
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", mount], check=True)
    try:
        words = ("recover", "web1", "--point", "latest", "--to", mount / "out.img")
        run(capsys, vault, *words, code=8)
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_recovery_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    vault, _ = volume_with_history(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    words = farshore(vault, "recover", "web1", "--point", "latest", "--to", out / "disk.img")
    process = subprocess.Popen(
        [sys.executable, "-m", "farshore", *words],
        stdout=subprocess.DEVNULL,
        # A run in the background of a script has SIGINT ignored, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # From its temporary file on it waits for its workers to start: there is time to hit it.
        until = time.monotonic() + 20
        while not list(out.iterdir()):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(number)
        assert process.wait(20) == code
        assert list(out.iterdir()) == []
    finally:
        process.kill()
        process.wait()
