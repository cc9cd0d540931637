"""Comparing a whole volume with the vault: unchanged, and after random writes; time and bytes on the wire.

The page cache is warm: what is measured is hashing, asking and answering, not the disk.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import show, spread
from bench.replication import (
    MACHINE,
    VOLUME,
    Memory,
    image_of_programs,
    metric,
    protect,
    resync,
    running_site,
    wait_protected,
)
from farshore.site import Site, wait_for
from farshore.stamps import Workload
from farshore.units import GIB
from farshore.workload import Ledger

TARGET_MB_S = 1500


def measure(site: Site, size: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return MB/s and share of the volume on the wire, in percent, of each round."""
    rates, shares = [], []
    for _ in range(rounds):
        before = metric(site, 'farshore_sent_bytes_total{stage="wire"}')
        rates.append(size / 1e6 / resync(site))
        shares.append(100 * (metric(site, 'farshore_sent_bytes_total{stage="wire"}') - before) / size)
    return rates, shares


def write(site: Site, size: int, seconds: int, rate: int) -> int:
    """Run the stamped writer over the whole volume; return how many writes were answered."""
    ledger = site.directory / "ledger"
    blocks = size // 4096
    uri = site.volume(MACHINE, VOLUME)["uri"]
    workload = Ledger(ledger, Workload(5, 0, blocks))
    subprocess.run(
        [
            *(sys.executable, "-m", "farshore.workload", uri, "--ledger", str(ledger), "--seed", "5"),
            *("--block-count", str(blocks), "--rate", str(rate), "--seconds", str(seconds)),
            *("--flush-seconds", "1"),
        ],
        check=True,
    )
    return workload.state().acked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=600, help="of random writes")
    parser.add_argument("--rate", type=int, default=5000, help="4 KiB writes per second")
    options = parser.parse_args()
    image = image_of_programs(options.gib)
    size = options.gib * GIB
    with tempfile.TemporaryDirectory(prefix="farshore-bench-") as folder:
        directory = Path(folder)
        disk = directory / "disk.img"
        shutil.copyfile(image, disk)
        with running_site(directory) as site:
            protect(site, disk)
            subprocess.run(["cat", disk], stdout=subprocess.DEVNULL, check=True)
            memory = Memory(site)
            memory.start()
            rates, shares = measure(site, size, options.rounds)
            written = write(site, size, options.seconds, options.rate) if options.seconds else 0
            wait_protected(site)
            wait_for(lambda: _caught_up(site), 300, "everything written is vaulted")
            after_rates, after_shares = measure(site, size, 1) if options.seconds else ([], [])
            memory.stop()
    lines = [
        f"unchanged, {options.gib} GiB: {spread(rates)} MB/s (target {TARGET_MB_S}), "
        f"on the wire {spread(shares, 3)} % of the volume",
    ]
    if after_rates:
        lines.append(
            f"after {written} random writes of 4 KiB ({options.rate}/s): {after_rates[0]:.0f} MB/s, "
            f"on the wire {after_shares[0]:.2f} % of the volume; changed were at most "
            f"{100 * written * 4096 / size:.1f} %"
        )
    lines += memory.lines()
    figures = {
        "unchanged_mb_per_second": rates,
        "unchanged_wire_percent": shares,
        "after_writes_mb_per_second": after_rates,
        "after_writes_wire_percent": after_shares,
        "writes": written,
        "agent_pss_bytes": memory.agent,
        "server_pss_bytes": memory.server,
    }
    show("resync", figures, lines)


def _caught_up(site: Site) -> bool:
    volume = site.json("status")["machines"][0]["volumes"][0]
    return bool(volume["vaulted_lsn"] == volume["captured_lsn"])


if __name__ == "__main__":
    main()
