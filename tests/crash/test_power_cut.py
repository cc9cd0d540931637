"""F4: power fails while a volume is written, replicated and vaulted, all on one file system on one disk.

One real run, logged request by request; then cut after cut is rebuilt from the log, mounted where it was, and
held against what the world outside had been told: flushed writes are on the disk after the tap's recovery,
the disk is an exact prefix, the chain in the vault is whole and holds what was acknowledged as vaulted.
"""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import volumes
from agent.config import load
from agent.journal.continuity import Boot
from agent.tap import opening
from agent.tap.lastrun import Place
from farshore.clock import Clock, SystemClock
from farshore.ids import id_from_hex, new_id
from farshore.site import Site, wait_for
from farshore.stamps import Workload, check_prefix
from farshore.workload import Ledger
from process_server.vault.chain import Chain
from process_server.vault.keys import VaultKeys, open_vault
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store.protocol import Store
from process_server.vault.store.url import open_store
from tests.harness.faults import Injected
from tests.harness.ledger import made
from tests.harness.patience import protect_and_start
from tests.harness.power import PowerCuts, entries_so_far, in_memory, logged_device

MIB = 1 << 20
DEVICE_BYTES = 1024 * MIB
DISK_BYTES = 32 * MIB
MACHINE, VOLUME = "m1", "v1"


@dataclass(frozen=True, slots=True)
class Told:
    """What had been acknowledged before ``entries`` requests had reached the disk."""

    entries: int
    flushed: int
    vaulted_lsn: int


@dataclass(frozen=True, slots=True)
class Run:
    """One logged run, ended."""

    log: Path
    device: Path
    mount: Path
    workload: Workload
    told: list[Told]
    first_cut: int


def _told_at(run: Run, entries: int) -> Told:
    return max((t for t in run.told if t.entries <= entries), key=lambda t: t.entries)


class _Listener(threading.Thread):
    """Notes what has been acknowledged, each time before it looks how far the disk is."""

    def __init__(self, site: Site, ledger: Ledger, log: Path) -> None:
        super().__init__()
        self._site, self._ledger, self._log = site, ledger, log
        self._over = threading.Event()
        self.told = [Told(0, 0, 0)]

    def run(self) -> None:
        vaulted = 0
        while not self._over.is_set():
            volumes_now = json.loads(self._site.cli("status", "--json"))["machines"][0]["volumes"]
            vaulted = max([vaulted, *(v["vaulted_lsn"] or 0 for v in volumes_now)])
            flushed = self._ledger.state().flushed
            self.told.append(Told(entries_so_far(self._log), flushed, vaulted))

    def stop(self) -> None:
        self._over.set()
        self.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    outside = tmp_path_factory.mktemp("outside")
    mount = outside / "mnt"
    mount.mkdir()
    workload = Workload(seed=4, first_block=16, block_count=DISK_BYTES // 4096 - 16)
    with logged_device(outside, DEVICE_BYTES) as (device, log):
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, mount], check=True)
        site = Site(mount)
        try:
            site.init()
            site.start_server()
            site.enrol(MACHINE)
            disk = mount / "disk.img"
            with disk.open("wb") as file:
                file.truncate(DISK_BYTES)
            # Small segments: one is always being begun or freed, and each of the many recoveries reads few.
            uri = protect_and_start(site, MACHINE, VOLUME, disk, segment_bytes=MIB)["uri"]
            subprocess.run(["sync"], check=True)
            first_cut = entries_so_far(log)
            command = [sys.executable, "-m", "farshore.workload", uri, "--ledger", outside / "ledger"]
            command += ["--seed", str(workload.seed), "--first-block", str(workload.first_block)]
            command += ["--block-count", str(workload.block_count), "--rate", "400", "--seconds", "20"]
            writer = subprocess.Popen([*map(str, command)])
            wait_for(lambda: made(outside / "ledger"), 20, "the workload")
            listener = _Listener(site, Ledger(outside / "ledger"), log)
            listener.start()
            writer.wait()
            listener.stop()
        finally:
            site.close()
            _unmount(mount)
    return Run(log, device, mount, workload, listener.told, first_cut)


def _unmount(mount: Path) -> None:
    """Unmount once the killed processes have let go; they may take a moment to end."""
    wait_for(
        lambda: subprocess.run(["umount", mount], check=False).returncode == 0, 30, "the mount to be free"
    )


@contextmanager
def _mounted(image: Path, device: Path, mount: Path) -> Iterator[None]:
    """Mount a rebuilt disk under the device number it had: that is part of what the tap knows a disk by."""
    subprocess.run(["losetup", device, image], check=True)
    try:
        subprocess.run(["mount", device, mount], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", mount], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _next_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the kernel is another one, just started: that is what a power cut leaves."""

    def read_boot(clock: Clock) -> Boot:
        return Boot(new_id(), clock.wall_ns())

    monkeypatch.setattr(opening, "read_boot", read_boot)


def _recovered_disk(mount: Path, page: Path) -> tuple[str, int]:
    """Let the tap's start do its work; return why it wants a resync (empty: it does not) and the last LSN."""
    directory = Site(mount).agent_dir(MACHINE)
    config = volumes.load_volume(directory, VOLUME)
    place = Place(directory / "volumes" / VOLUME, page, id_from_hex(load(directory).machine_id))
    opened = opening.open_volume(place, config, None, SystemClock())
    last_lsn = opened.last_lsn
    opened.close()
    return opened.resync, last_lsn


def _reader(disk: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: disk[offset : offset + length]


def _vault(mount: Path, key: str) -> tuple[Store, VaultKeys]:
    store = open_store(f"file://{mount}/vault")
    return store, open_vault(store, RecoveryKey.parse(key))


def _check_vault(store: Store, keys: VaultKeys, machine: bytes, vaulted_lsn: int) -> int:
    """Walk the whole chain; every pack that it names is there. Returns the newest seq."""
    chain = Chain(store, keys, machine)
    head = chain.load_head()
    assert head is not None
    lsn = 0
    for commit in chain.iterate(1, head.head.seq):
        for pack in commit.head.packs:
            if pack.inline is None:
                assert store.size(f"p/{pack.id.hex()[:2]}/{pack.id.hex()}") > 0
        lsn = max([lsn, *(volume.lsn for volume in commit.head.volumes)])
    assert lsn >= vaulted_lsn, "a vaulted record is not in the chain"
    return int(head.head.seq)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path / "memory") as folder:
        yield folder


@pytest.mark.fault("F4")
@pytest.mark.timeout(1500)
@pytest.mark.needs("qemu-storage-daemon", "loop", "fuse", "mkfs.ext4")
def test_no_power_cut_loses_what_was_acknowledged(
    run: Run,
    memory: Path,
    monkeypatch: pytest.MonkeyPatch,
    injected: Injected,
    request: pytest.FixtureRequest,
) -> None:
    seed = 20261121
    rng = random.Random(seed)
    cuts = PowerCuts(run.log, DEVICE_BYTES, memory / "base.img")
    request.addfinalizer(cuts.close)
    count = 2000 if request.config.getoption("--nightly") else 200
    ends = sorted(rng.choices(range(run.first_cut, len(cuts.entries) + 1), k=count))
    image, page = memory / "cut.img", memory / "state"
    _next_boot(monkeypatch)
    open_writes = 0
    for number, end in enumerate(ends):
        open_writes += cuts.cut(end, image, rng)
        injected("F4")
        told = _told_at(run, end)
        with _mounted(image, run.device, run.mount):
            page.unlink(missing_ok=True)
            key = Site(run.mount).key.read_text()
            resync, _ = _recovered_disk(run.mount, page)
            assert not resync, (number, end, resync)
            disk = (run.mount / "disk.img").read_bytes()
            report = check_prefix(run.workload, _reader(disk))
            assert report.exact, (number, end, report)
            assert report.seq >= told.flushed, (number, end, report.seq, told)
            store, keys = _vault(run.mount, key)
            machine = id_from_hex(load(Site(run.mount).agent_dir(MACHINE)).machine_id)
            _check_vault(store, keys, machine, told.vaulted_lsn)
            store.close()
    assert open_writes > count, "the cuts fell where nothing was open: they proved nothing"
