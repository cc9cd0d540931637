"""Age of the newest recoverable write, under random 4 KiB writes at a fixed rate.

The oracle's ledger says when each write was answered; the chain in the vault says, commit by commit, which
writes could be recovered and since when. Nothing is asked of agent or server: the figure is what a reader of
the vault would have found at each moment.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.harness import percentile, show, spread
from farshore.site import Site
from farshore.units import GIB
from farshore.workload import Ledger
from process_server.vault.chain import Chain
from process_server.vault.keys import open_vault
from process_server.vault.recovery_key import RecoveryKey
from process_server.vault.store.url import open_store

MACHINE, VOLUME = "bench", "data"


def watch_chain(site: Site, until: float) -> list[tuple[int, int, bool]]:
    """Poll the chain; return (time seen, ns; writes recoverable; fuzzy) of every commit as it appears."""
    store = open_store(site.vault)
    keys = open_vault(store, RecoveryKey.parse(site.key.read_text()))
    prefix = next(iter(sorted(name.rsplit("/", 1)[0] for name in store.list("c/"))))
    chain = Chain(store, keys, bytes.fromhex(prefix.removeprefix("c/")))
    head = chain.load_head()
    assert head is not None
    seq, writes, seen = head.head.seq, 0, []
    folder = Path(site.vault.removeprefix("file://"))
    while time.time() < until:
        name = f"{prefix}/{seq + 1:020d}"
        if not (folder / name).exists():
            time.sleep(0.002)
            continue
        now = time.time_ns()
        commit = next(iter(chain.iterate(seq + 1, seq + 1)))
        writes += int((commit.rows["lsn"] > 0).sum())
        seen.append((now, writes, commit.head.consistency == "fuzzy"))
        seq += 1
    return seen


def ages(
    acks_ns: "np.ndarray[tuple[int], np.dtype[np.uint64]]", seen: list[tuple[int, int, bool]], end_ns: int
) -> list[float]:
    """Age in seconds, every 10 ms, of the newest write that could be recovered; 0 when all could be."""
    result, at = [], 0
    recoverable = 0
    for now in range(int(acks_ns[0]) + 5_000_000_000, end_ns, 10_000_000):
        while at < len(seen) and seen[at][0] <= now:
            if not seen[at][2]:
                recoverable = seen[at][1]
            at += 1
        answered = int(np.searchsorted(acks_ns, now, side="right"))
        # The oldest answered write that is not recoverable yet: how far back one would fall.
        result.append((now - int(acks_ns[recoverable])) / 1e9 if answered > recoverable else 0.0)
    return result


def one_round(rate: int, seconds: int, size: int) -> tuple[list[float], float]:
    """Run one workload; return the ages and the rate that was reached."""
    with tempfile.TemporaryDirectory(prefix="farshore-rpo-") as name:
        directory = Path(name)
        disk = directory / "disk.img"
        with disk.open("wb") as file:
            file.truncate(size)
        site = Site(directory)
        site.init()
        try:
            site.start_server()
            site.enrol(MACHINE)
            site.start_agent(MACHINE)
            uri = str(site.protect(MACHINE, VOLUME, disk)["uri"])
            writer = subprocess.Popen(
                [
                    *(sys.executable, "-m", "farshore.workload", uri, "--ledger", str(directory / "ledger")),
                    *("--seed", "1", "--block-count", str(size // 4096), "--rate", str(rate)),
                    *("--seconds", str(seconds), "--depth", "64"),
                ]
            )
            started = time.time()
            seen = watch_chain(site, started + seconds)
            writer.wait()
            acks = np.array(Ledger(directory / "ledger").ack_times_ns(), np.uint64)
        finally:
            site.close()
    end_ns = int((started + seconds) * 1e9)
    reached = float((acks < end_ns).sum()) / ((end_ns - int(acks[0])) / 1e9)
    return ages(acks, seen, end_ns), reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", type=int, nargs="+", default=[5000, 15000])
    parser.add_argument("--size", type=int, default=2 * GIB, help="bytes of the volume")
    options = parser.parse_args()
    figures, lines = {}, []
    for rate in options.rates:
        rounds = [one_round(rate, options.seconds, options.size) for _ in range(options.rounds)]
        p99 = [percentile(ages, 0.99) for ages, _ in rounds]
        median = [percentile(ages, 0.5) for ages, _ in rounds]
        reached = [reached for _, reached in rounds]
        figures[str(rate)] = {"p99_s": p99, "p50_s": median, "writes_per_s": reached}
        lines.append(
            f"{rate:>6} writes/s asked, {spread(reached)} reached: age of the newest recoverable write "
            f"p50 {spread(median, 2)} s, p99 {spread(p99, 2)} s"
        )
    show("rpo", figures, lines)


if __name__ == "__main__":
    main()
