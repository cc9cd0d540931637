"""What logging before writing costs: the tap beside qemu-nbd, which keeps no journal, on the same image.

``python -m bench.tap [--directory DIR] [--rounds 3] [--gib 1] [--endurance MINUTES]``

fio's nbd engine writes 4 KiB at random 32 deep, then 1 MiB in sequence; ``end_fsync`` is inside the time.
Each run begins with the image on the disk and out of the page cache. Segments are freed as if the vault kept
up, so that the journal recycles its files; a round before the first fills that pool and is not counted.
Beside 1 MiB: what the journal's own device takes when fio writes 1 MiB and fdatasyncs, again and again, into
a file that exists. The tap writes each byte twice, to the journal and to the image, here on the same device.

Targets: 4 KiB at least twice qemu-nbd; 1 MiB at least 0.8 of the journal device.

With ``--endurance`` only this: 4 KiB at random, minute after minute, while so much memory is locked away that
half of the image fits into what is left. The slowest minute is to be at least half of the median one.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.capture.control import Done, ResyncDone
from bench.harness import show, spread, version_of
from farshore.errors import FarshoreError
from farshore.units import GIB, MIB
from tests.harness.tap import TapHost, wait_until

TARGET_4K: Final = 2.0
TARGET_1M: Final = 0.8
TARGET_SLOWEST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """One fio job. ``rate`` is writes per second for 4 KiB, MB/s for 1 MiB; ``cpu_s`` is the server's."""

    rate: float
    cpu_s: float


def fio(*words: str) -> dict[str, float]:
    """Run fio and return its write figures."""
    done = subprocess.run(
        ["fio", "--name=tap", "--output-format=json", *words], capture_output=True, text=True, check=True
    )
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]
    return {"iops": job["iops"], "mb_s": job["bw_bytes"] / 1e6}


def nbd(uri: str, kind: str, size: int, *, seconds: int = 0) -> float:
    """Write through an NBD server, ``size`` bytes or for ``seconds``; returns the rate."""
    common = ("--ioengine=nbd", f"--uri={uri}", f"--size={size}", "--end_fsync=1")
    if kind == "4k":
        random = ("--rw=randwrite", "--bs=4k", "--iodepth=32", "--randrepeat=0", "--norandommap=1")
        timed = ("--time_based", f"--runtime={seconds}") if seconds else ()
        return fio(*common, *random, *timed)["iops"]
    return fio(*common, "--rw=write", "--bs=1M", "--iodepth=4")["mb_s"]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def forget(image: Path) -> None:
    """Everything written back, and the image out of the page cache."""
    os.sync()
    fd = os.open(image, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def measured(pid: int, uri: str, kind: str, size: int, image: Path) -> Run:
    forget(image)
    before = cpu_s(pid)
    rate = nbd(uri, kind, size)
    return Run(rate, cpu_s(pid) - before)


@contextmanager
def keeping_up(host: TapHost) -> Iterator[None]:
    """Say that everything is vaulted, twenty times a second; fails when the volume leaves data mode."""
    stop = threading.Event()
    modes: set[str] = set()

    def run() -> None:
        while not stop.wait(0.05):
            try:
                modes.add(host.status().mode)
                host.vaulted()
            except FarshoreError as error:
                modes.add(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert modes <= {"data"}, modes


def tap_round(directory: Path, image: Path, size: int) -> dict[str, Run]:
    with TapHost(directory) as host:
        host.start()
        pid = int(host.ready["pid"])
        # qemu-nbd wrote to the image behind the tap's back: a compare is due, and not the matter here.
        host.call(ResyncDone("disk"), Done)
        with keeping_up(host):
            runs = {kind: measured(pid, host.uri(), kind, size, image) for kind in ("4k", "1m")}
            status = host.status()
            assert (status.mode, status.dirty_regions, status.resync) == ("data", 0, ""), status
        assert host.stop() == 0
    return runs


def qemu_round(directory: Path, image: Path, size: int) -> dict[str, Run]:
    path = directory / "qemu.sock"
    process = subprocess.Popen(
        ["qemu-nbd", "--persistent", "--format=raw", "--cache=writeback", "-x", "disk", "-k", path, image]
    )
    try:
        wait_until(path.exists)
        uri = f"nbd+unix:///disk?socket={path}"
        return {kind: measured(process.pid, uri, kind, size, image) for kind in ("4k", "1m")}
    finally:
        process.terminate()
        process.wait()


def device_round(directory: Path, size: int) -> float:
    """MB/s of write and fdatasync, 1 MiB at a time, into a file that has blocks, as recycled ones do."""
    path = directory / "device"
    if not path.exists():
        fio(f"--filename={path}", "--rw=write", "--bs=1M", f"--size={size}", "--end_fsync=1")
    words = ("--ioengine=psync", "--rw=write", "--bs=1M", "--overwrite=1", "--fdatasync=1")
    return fio(f"--filename={path}", *words, f"--size={size}")["mb_s"]


@contextmanager
def memory_left(wanted: int) -> Iterator[None]:
    """Lock memory away until about ``wanted`` bytes are left for everybody."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    script = (
        "import ctypes, mmap, sys\n"
        "held = mmap.mmap(-1, int(sys.argv[1]))\n"
        "address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(held)))\n"
        "assert ctypes.CDLL(None).mlock(address, ctypes.c_size_t(len(held))) == 0\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    held = max(available - wanted, mmap.PAGESIZE)
    hog = subprocess.Popen(
        [sys.executable, "-c", script, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert hog.stdout is not None
        assert hog.stdout.readline() == b"held\n"
        yield
    finally:
        hog.kill()
        hog.wait()


def endurance(directory: Path, image: Path, size: int, minutes: int) -> None:
    """Write for ``minutes`` with memory for half of the image; prints the rate of each minute."""
    with TapHost(directory) as host, memory_left(size // 2):
        host.start()
        with keeping_up(host):
            forget(image)
            rates = [nbd(host.uri(), "4k", size, seconds=60) for _ in range(minutes)]
        assert host.stop() == 0
    slowest = min(rates) / statistics.median(rates)
    lines = [
        f"4 KiB random, depth 32, {minutes} min, image {size / GIB:.0f} GiB, memory for half of it",
        f"each minute {' '.join(f'{rate:.0f}' for rate in rates)} writes/s",
        f"slowest beside median {slowest:.2f}, target {TARGET_SLOWEST}",
    ]
    show("tap endurance", {"minute_iops": rates, "slowest": slowest}, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--directory", type=Path, help="on the file system to measure; default: temporary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the image and of each run")
    parser.add_argument("--endurance", type=int, metavar="MINUTES", help="only this, see above")
    options = parser.parse_args()
    size = int(options.gib * GIB) // MIB * MIB
    taps: list[dict[str, Run]] = []
    qemus: list[dict[str, Run]] = []
    device: list[float] = []
    with tempfile.TemporaryDirectory(prefix="farshore-tap-", dir=options.directory) as folder:
        directory = Path(folder)
        image = directory / "disk.img"
        with image.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        TapHost(directory).add(size=size, disk=image, quota_bytes=8 * GIB)
        if options.endurance:
            endurance(directory, image, size, options.endurance)
            return
        for number in range(options.rounds + 1):
            qemu, rate = qemu_round(directory, image, size), device_round(directory, size)
            tap = tap_round(directory, image, size)
            if number:
                taps.append(tap)
                qemus.append(qemu)
                device.append(rate)
    report(taps, qemus, device)


def report(taps: list[dict[str, Run]], qemus: list[dict[str, Run]], device: list[float]) -> None:
    pairs = list(zip(taps, qemus, strict=True))
    ratio_4k = [tap["4k"].rate / qemu["4k"].rate for tap, qemu in pairs]
    ratio_1m = [tap["1m"].rate / qemu["1m"].rate for tap, qemu in pairs]
    ratio_device = [tap["1m"].rate / rate for tap, rate in zip(taps, device, strict=True)]
    rates = {
        "tap_4k_iops": [tap["4k"].rate for tap in taps],
        "qemu_4k_iops": [qemu["4k"].rate for qemu in qemus],
        "tap_1m_mb_s": [tap["1m"].rate for tap in taps],
        "qemu_1m_mb_s": [qemu["1m"].rate for qemu in qemus],
        "device_1m_mb_s": device,
        "tap_4k_cpu_s": [tap["4k"].cpu_s for tap in taps],
        "qemu_4k_cpu_s": [qemu["4k"].cpu_s for qemu in qemus],
    }
    figures = {
        **rates,
        "fio": version_of("fio", "--version"),
        "qemu_nbd": version_of("qemu-nbd", "--version"),
        "load": os.getloadavg(),
    }
    lines = [
        f"4 KiB random, depth 32   tap {spread(rates['tap_4k_iops'])}/s",
        f"                    qemu-nbd {spread(rates['qemu_4k_iops'])}/s",
        f"                       ratio {spread(ratio_4k, 2)}, target {TARGET_4K}",
        f"1 MiB in sequence        tap {spread(rates['tap_1m_mb_s'])} MB/s",
        f"                    qemu-nbd {spread(rates['qemu_1m_mb_s'])} MB/s, ratio {spread(ratio_1m, 2)}",
        f"    journal device, fdatasync {spread(device)} MB/s, ratio {spread(ratio_device, 2)},"
        f" target {TARGET_1M}",
        f"processor time of 4 KiB  tap {spread(rates['tap_4k_cpu_s'], 1)} s,"
        f" qemu-nbd {spread(rates['qemu_4k_cpu_s'], 1)} s",
    ]
    show("tap", figures, lines)


if __name__ == "__main__":
    main()
