"""An export, as the NBD clients that people use see it."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from farshore.cli.main import main
from farshore.nbd.client import connect
from tests.harness.small_vault import SmallVault, SmallVolume, scribble

SIZE = 3 * 1024 * 1024 + 512 * 3


@pytest.fixture
def vault(tmp_path: Path) -> SmallVault:
    random_ = random.Random(3)
    volume = SmallVolume("data", SIZE)
    made = SmallVault(tmp_path / "vault", volume)
    for number in range(4):
        scribble(volume, random_, 10)
        made.commit(inline=number == 1, groups=4)
    return made


def words(vault: SmallVault, *more: object) -> list[str]:
    return [
        *("export", "web1", "--volume", "data", "--point", "latest"),
        *("--vault", vault.url, "--recovery-key-file", str(vault.key_file)),
        *(str(word) for word in more),
    ]


@contextlib.contextmanager
def exported(vault: SmallVault, *more: object) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run an export; stop it by SIGTERM, which has to end it with 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "farshore", *words(vault, *more)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready"
        yield ready["uri"], process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def content(vault: SmallVault) -> bytes:
    return bytes(vault.volumes[0].content)


@pytest.mark.needs("qemu-img", "nbdcopy", "nbdinfo")
def test_qemu_and_libnbd_read_exactly_the_volume(vault: SmallVault, tmp_path: Path) -> None:
    raw = tmp_path / "expected.raw"
    raw.write_bytes(content(vault))
    socket = tmp_path / "nbd.sock"
    with exported(vault, "--nbd", f"unix:{socket}") as (uri, _):
        assert uri == f"nbd+unix:///data?socket={socket}"
        subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri], check=True)
        back = tmp_path / "back.raw"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, back], check=True)
        assert back.read_bytes() == content(vault)
        copied = tmp_path / "copied.raw"
        copied.touch()
        os.truncate(copied, SIZE)
        subprocess.run(["nbdcopy", uri, copied], check=True)
        assert copied.read_bytes() == content(vault)
        told = subprocess.run(["nbdinfo", "--map", "--json", uri], check=True, capture_output=True, text=True)
        mapped = json.loads(told.stdout)
        assert sum(entry["length"] for entry in mapped) == SIZE
        for entry in mapped:
            if entry["type"] == 3:
                assert not any(content(vault)[entry["offset"] : entry["offset"] + entry["length"]])
    assert not socket.exists()


async def test_without_an_overlay_it_is_read_only(vault: SmallVault) -> None:
    with exported(vault, "--nbd", "127.0.0.1:0") as (uri, _):
        host, port = uri.removeprefix("nbd://").partition("/")[0].split(":")
        async with connect((host, int(port)), "data") as client:
            assert client.read_only
            assert client.size == SIZE
            assert await client.read(0, SIZE) == content(vault)


@pytest.mark.needs("qemu-io")
def test_what_was_flushed_to_an_overlay_is_there_after_a_kill(vault: SmallVault, tmp_path: Path) -> None:
    overlay, socket = tmp_path / "overlay", tmp_path / "nbd.sock"
    expected = bytearray(content(vault))
    with exported(vault, "--nbd", f"unix:{socket}", "--overlay", overlay) as (uri, process):
        steps = ("write -P 7 1000k 5k", "write -P 9 0 200k", "write -z 500k 300k", "flush")
        _io(uri, *steps)
        expected[1000 * 1024 : 1005 * 1024] = b"\x07" * 5 * 1024
        expected[: 200 * 1024] = b"\x09" * 200 * 1024
        expected[500 * 1024 : 800 * 1024] = bytes(300 * 1024)
        process.kill()
        process.wait()
    with exported(vault, "--nbd", f"unix:{socket}", "--overlay", overlay) as (uri, _):
        raw = tmp_path / "expected.raw"
        raw.write_bytes(expected)
        subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri], check=True)
    # The vault still has what it had.
    with exported(vault, "--nbd", f"unix:{socket}") as (uri, _):
        raw.write_bytes(content(vault))
        subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri], check=True)


async def test_random_writes_to_an_overlay_agree_with_a_model(vault: SmallVault, tmp_path: Path) -> None:
    random_ = random.Random(11)
    expected = bytearray(content(vault))
    socket = tmp_path / "nbd.sock"
    with exported(vault, "--nbd", f"unix:{socket}", "--overlay", "tmp") as (_, _process):
        async with connect(socket, "data") as client:
            for number in range(120):
                length = random_.choice((1, 3, 8, 128, 300)) * 512
                offset = random_.randrange((SIZE - length) // 512 + 1) * 512
                if number % 3 == 0:
                    await client.zero(offset, length)
                    expected[offset : offset + length] = bytes(length)
                elif number % 7 == 0:
                    await client.trim(offset, length)
                    expected[offset : offset + length] = bytes(length)
                else:
                    data = random_.randbytes(length)
                    await client.write(offset, data)
                    expected[offset : offset + length] = data
                assert await client.read(offset, length) == expected[offset : offset + length]
            assert await client.read(0, SIZE) == expected
    assert _names(tmp_path) == ["vault", "vault.key"]


async def test_a_hydrated_overlay_needs_the_vault_no_more(vault: SmallVault, tmp_path: Path) -> None:
    from process_server.recovery.export import VolumeExport
    from process_server.recovery.image import VolumeImage
    from process_server.recovery.overlay import OverlayFile
    from process_server.recovery.points import find_machine, resolve

    chain = find_machine(vault.store, vault.keys, "web1")
    image = VolumeImage(chain, resolve(chain, "latest", volume="data", allow_fuzzy=False, now_ns=0), "data")
    export = VolumeExport(image, OverlayFile(tmp_path / "overlay", image, machine=vault.machine, keep=True))
    try:
        await export.write(4096, b"new" * 1024, fua=False)
        await export.hydrate()
        for path in (vault.folder / "p").rglob("*"):
            if path.is_file():
                path.unlink()
        expected = bytearray(content(vault))
        expected[4096 : 4096 + 3072] = b"new" * 1024
        assert await export.read(0, SIZE) == expected
    finally:
        export.close()


def test_an_overlay_of_another_point_is_refused(vault: SmallVault, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    with exported(vault, "--nbd", f"unix:{tmp_path / 'nbd.sock'}", "--overlay", overlay):
        pass
    before = overlay.read_bytes()
    vault.volumes[0].write(0, b"x" * 512)
    vault.commit()
    assert main(words(vault, "--nbd", f"unix:{tmp_path / 'nbd.sock'}", "--overlay", overlay)) == 6
    assert overlay.read_bytes() == before


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:10809", "[::]:0", "unix:", "10809", "host:1"])
def test_off_the_loopback_is_a_usage_error(vault: SmallVault, address: str) -> None:
    assert main(words(vault, "--nbd", address)) == 2


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _io(uri: str, *steps: str) -> None:
    commands = [word for step in steps for word in ("-c", step)]
    done = subprocess.run(["qemu-io", "-f", "raw", *commands, uri], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout + done.stderr, done.stdout
