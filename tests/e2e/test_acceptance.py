"""What a new user does, with the commands of the README: protect, lose everything, get it back."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from farshore.site import Site, wait_for
from farshore.stamps import BLOCK_BYTES, Workload, check_prefix
from farshore.workload import Ledger
from tests.harness.patience import protect_and_start

MIB = 1 << 20


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    site.init()
    site.start_server()
    yield site
    site.close()


def _run(*command: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode in ok, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _write_tree(root: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(count):
        folder = root / f"d{number % 100:02d}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{number:05d}").write_bytes(rng.randbytes(rng.randrange(1, 6000)))


def _hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class _Changing:
    """Goes on changing other files of a mounted file system, synced now and then, and counts its writes."""

    def __init__(self, root: Path) -> None:
        self._root, self._over = root, threading.Event()
        self.writes = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        rng = random.Random(9)
        files = [os.open(self._root / f"busy{n}", os.O_RDWR | os.O_CREAT) for n in range(8)]
        with suppress(OSError):  # the disk dies under it, as the test means it to
            while not self._over.is_set():
                for _ in range(20):
                    os.pwrite(rng.choice(files), rng.randbytes(4096), rng.randrange(1024) * 4096)
                    self.writes += 1
                os.fdatasync(rng.choice(files))
                time.sleep(0.01)
        for fd in files:
            os.close(fd)

    def __enter__(self) -> "_Changing":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.timeout(600)
@pytest.mark.needs("qemu-storage-daemon", "loop", "fuse", "mkfs.ext4", "e2fsck")
def test_a_file_system_comes_back_from_vault_and_key_alone(site: Site, tmp_path: Path) -> None:
    disk, mount = tmp_path / "data.img", tmp_path / "mnt"
    mount.mkdir()
    disk.touch()
    os.truncate(disk, 512 * MIB)
    _run("mkfs.ext4", "-q", disk)
    site.enrol("web1")
    device = protect_and_start(site, "web1", "data", disk, "--attach", "loop")["device"]
    assert device.startswith("/dev/loop")
    _run("mount", device, mount)
    mounted = True
    try:
        (mount / "tree").mkdir()
        _write_tree(mount / "tree", 10_000, seed=1)
        _run("sync", "-f", mount)
        listed = _hashes(mount / "tree")
        assert len(listed) == 10_000
        point = site.json("point", "create", "web1", "--tag", "listed", "--wait", "vaulted")["point"]
        with _Changing(mount) as changing:
            wait_for(lambda: changing.writes >= 2500, 60, "a load")
            # Everything dies under load. The mount cannot be flushed any more; that is the disaster.
            site.kill_agent("web1")
            site.kill_server()
            _run("umount", "--lazy", mount)
            mounted = False
            _kill_attachment(disk, device)
        recovered = tmp_path / "recovered.img"
        site.recover("web1", point, recovered)
    finally:
        if mounted:
            _run("umount", "--lazy", mount)
            _kill_attachment(disk, device)
    _run("e2fsck", "-p", recovered, ok=(0, 1))
    _run("e2fsck", "-fn", recovered)
    _run("mount", "-o", "loop,ro", recovered, mount)
    try:
        assert _hashes(mount / "tree") == listed
    finally:
        _run("umount", mount)


def _kill_attachment(disk: Path, device: str) -> None:
    """The NBD client dies with its server; the loop device over it is let go."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"qemu-storage-daemon" in words.split(b"\0")[0] and str(disk.parent).encode() in words:
                os.kill(int(entry.name), signal.SIGKILL)
    subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)
    for line in Path("/proc/mounts").read_text().splitlines():
        mounted = line.split()[1]
        if mounted.startswith(f"{disk.parent}/"):
            subprocess.run(["umount", "--lazy", mounted], check=False)


@pytest.mark.timeout(400)
def test_any_lsn_is_an_exact_prefix_and_a_lost_server_directory_is_adopted(
    site: Site, tmp_path: Path
) -> None:
    disk = tmp_path / "raw.img"
    disk.write_bytes(os.urandom(4 * MIB))
    os.truncate(disk, 64 * MIB)
    before = disk.read_bytes()
    workload = Workload(seed=20, first_block=256, block_count=64 * MIB // BLOCK_BYTES - 256)
    site.enrol("db1")
    uri = protect_and_start(site, "db1", "raw", disk)["uri"]
    first = site.json("point", "list", "db1")[-1]["volumes"]["raw"]["lsn"]
    ledger = _write_for(uri, workload, tmp_path / "ledger", seconds=6)
    site.cli("point", "create", "db1", "--tag", "end", "--wait", "vaulted")
    last = site.json("point", "list", "db1")[-1]["volumes"]["raw"]["lsn"]
    acked = ledger.state().acked
    assert acked > 2000

    # The server's directory is lost; another one takes over from vault and key, the agent comes by itself.
    listen = str(site.server.ready["listen"]) if site.server else ""
    site.kill_server()
    _run("rm", "-rf", site.server_dir)
    site.cli(
        *("server", "adopt", site.server_dir, "--vault", site.vault, "--listen", listen),
        *("--api", "127.0.0.1:0", "--recovery-key-file", site.key),
    )
    site.start_server()

    def attached() -> bool:
        machine = site.json("status")["machines"][0]
        return bool(machine["volumes"]) and machine["volumes"][0]["state"] == "protected"

    wait_for(attached, 60, "the agent re-attaches")
    more = Workload(seed=21, first_block=workload.first_block, block_count=workload.block_count)
    _write_for(uri, more, tmp_path / "ledger2", seconds=2)
    site.cli("point", "create", "db1", "--tag", "after adopt", "--wait", "vaulted")
    states = [p["consistency"] for p in site.json("point", "list", "db1")]
    assert "fuzzy" not in states[states.index("crash") :], "replication went on as deltas, not by a new copy"

    site.kill_agent("db1")
    site.kill_server()
    rng = random.Random(5)
    seen = []
    for lsn in [*sorted(rng.sample(range(first, last), 19)), last]:
        image = tmp_path / "at.img"
        site.recover("db1", f"lsn:{lsn}", image, "--volume", "raw", "--force")
        content = image.read_bytes()

        report = check_prefix(workload, _reader(content), _same_as(before, content))
        assert report.exact, (lsn, report)
        assert content[: 256 * BLOCK_BYTES] == before[: 256 * BLOCK_BYTES]
        seen.append(report.seq)
    assert seen == sorted(seen)
    assert seen[-1] == acked


def _reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: content[offset : offset + length]


def _same_as(before: bytes, content: bytes) -> Callable[[int], bool]:
    """Whether a block is as it was before the workload."""
    return lambda block: (
        _reader(content)(block * BLOCK_BYTES, BLOCK_BYTES)
        == _reader(before)(block * BLOCK_BYTES, BLOCK_BYTES)
    )


def _write_for(uri: str, workload: Workload, ledger: Path, seconds: float) -> Ledger:
    _run(
        *(sys.executable, "-m", "farshore.workload", uri, "--ledger", ledger, "--seed", str(workload.seed)),
        *("--first-block", str(workload.first_block), "--block-count", str(workload.block_count)),
        *("--rate", "1000", "--seconds", str(seconds)),
    )
    return Ledger(ledger)
