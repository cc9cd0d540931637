"""``--attach loop``: a mounted file system over the tap does not notice that the tap is killed."""

import asyncio
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.capture import attach
from farshore.errors import Conflict, NotFound
from farshore.nbd.client import connect
from farshore.units import MIB
from tests.harness.tap import TapHost, wait_until

pytestmark = pytest.mark.needs("loop", "fuse", "root", "qemu-storage-daemon", "losetup")


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def host(tmp_path: Path) -> Iterator[TapHost]:
    with TapHost(tmp_path / "agent") as made:
        made.add(size=128 * MIB)
        made.start()
        try:
            yield made
        finally:
            if made.process is None:
                made.start()
            attach.detach(made.directory, "disk")


@pytest.mark.needs("mkfs.ext4", "e2fsck")
def test_a_file_system_goes_on_over_a_killed_tap(host: TapHost, tmp_path: Path) -> None:
    device = attach.attach(host.directory, "disk", "loop", host.socket())
    assert attach.device_of(host.directory, "disk") == device
    run("mkfs.ext4", "-q", device)
    point = tmp_path / "mounted"
    point.mkdir()
    run("mount", device, point)
    written: dict[str, str] = {}
    stopping = threading.Event()

    def work() -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            content = os.urandom(64 * 1024)
            path = point / f"file{number % 200}"
            with path.open("wb") as file:
                file.write(content)
                if number % 5 == 0:
                    os.fsync(file.fileno())
            written[path.name] = hashlib.sha256(content).hexdigest()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        time.sleep(1)
        host.kill()
        time.sleep(1.5)
        host.start()
        assert host.status().resync == ""
        count = len(written)
        wait_until(lambda: len(written) > count or len(written) == 200, what="the workload stands still")
        time.sleep(1)
    finally:
        stopping.set()
        worker.join(timeout=60)
        run("umount", point)
    assert not worker.is_alive()
    run("e2fsck", "-fn", device)
    run("mount", device, point)
    try:
        found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in point.glob("file*")}
    finally:
        run("umount", point)
    assert found == written
    attach.detach(host.directory, "disk")
    assert attach.device_of(host.directory, "disk") is None
    assert host.status().mode == "data"
    assert host.stop() == 0
    run("e2fsck", "-fn", host.directory / "disk.img")


def test_attaching_again_finds_what_is_there(host: TapHost) -> None:
    device = attach.attach(host.directory, "disk", "loop", host.socket())
    assert attach.attach(host.directory, "disk", "loop", host.socket()) == device
    host.stop()
    host.start()
    assert attach.attach(host.directory, "disk", "loop", host.socket()) == device
    with open(device, "r+b", buffering=0) as disk:
        disk.write(b"z" * 4096)
        os.fsync(disk.fileno())

    async def read() -> bytes:
        async with connect(host.socket(), "disk") as client:
            return await client.read(0, 4096)

    assert asyncio.run(read()) == b"z" * 4096
    attach.detach(host.directory, "disk")
    attach.detach(host.directory, "disk")
    assert attach.device_of(host.directory, "disk") is None


@pytest.mark.needs("mkfs.ext4")
def test_a_mounted_device_is_not_detached(host: TapHost, tmp_path: Path) -> None:
    device = attach.attach(host.directory, "disk", "loop", host.socket())
    run("mkfs.ext4", "-q", device)
    point = tmp_path / "mounted"
    point.mkdir()
    run("mount", device, point)
    try:
        with pytest.raises(Conflict, match="unmount"):
            attach.detach(host.directory, "disk")
    finally:
        run("umount", point)


def test_what_is_missing_is_named_with_its_package(host: TapHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_PATH", "/nowhere")
    with pytest.raises(NotFound, match="apt install qemu-system-common"):
        attach.attach(host.directory, "disk", "loop", host.socket())
    with pytest.raises(NotFound, match="apt install nbd-client"):
        attach.attach(host.directory, "disk", "nbd", host.socket())
