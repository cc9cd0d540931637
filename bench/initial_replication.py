"""Initial replication of an image of real programs, beside borg and restic on the same image.

Agent and server share this host. Our time ends when the first point that may be offered is in the vault, that
of the others when their command ends. Caches are dropped before each run. borg: authenticated encryption with
BLAKE2b, fixed chunks of 4 MiB, zstd 1; restic: its defaults; each into a new local repository.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench.harness import drop_caches, show, spread, version_of
from bench.replication import Memory, data_bytes, image_of_programs, protect, running_site
from farshore.units import GIB

FLOOR_MB_S = (535, 600)
"""What the sum of the stages allows on two cores, with decompress-and-compare before the acknowledgement."""


def farshore(image: Path, directory: Path) -> tuple[float, Memory]:
    """One round; returns seconds and memory."""
    with running_site(directory) as site:
        memory = Memory(site)
        memory.start()
        seconds = protect(site, image)
        memory.stop()
    return seconds, memory


def borg(image: Path, directory: Path) -> float:
    env = {**os.environ, "BORG_PASSPHRASE": "bench", "BORG_BASE_DIR": str(directory / "home")}
    repository = directory / "repository"
    subprocess.run(["borg", "init", "-e", "repokey-blake2", repository], env=env, check=True)
    began = time.monotonic()
    subprocess.run(
        [
            *("borg", "create", "--read-special", "--chunker-params", "fixed,4194304"),
            *("--compression", "zstd,1", f"{repository}::image", image),
        ],
        env=env,
        check=True,
    )
    return time.monotonic() - began


def restic(image: Path, directory: Path) -> float:
    env = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(directory / "cache")}
    repository = directory / "repository"
    subprocess.run(["restic", "-q", "-r", repository, "init"], env=env, check=True)
    began = time.monotonic()
    subprocess.run(["restic", "-q", "-r", repository, "backup", image], env=env, check=True)
    return time.monotonic() - began


def stored_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=int, default=6, help="size of the image, at least what /usr needs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="borg,restic", help="which of borg and restic to run beside")
    options = parser.parse_args()
    image = image_of_programs(options.gib)
    size = options.gib * GIB
    peers = {"borg": borg, "restic": restic}
    names = ["farshore", *filter(None, options.peers.split(","))]
    rates: dict[str, list[float]] = {name: [] for name in names}
    stored: dict[str, int] = {}
    memory: Memory | None = None
    for _ in range(options.rounds):
        for name in names:
            with tempfile.TemporaryDirectory(prefix=f"farshore-bench-{name}-") as folder:
                directory = Path(folder)
                drop_caches()
                if name == "farshore":
                    seconds, memory = farshore(image, directory)
                    stored[name] = stored_bytes(directory / "vault")
                else:
                    seconds = peers[name](image, directory)
                    stored[name] = stored_bytes(directory / "repository")
            rates[name].append(size / 1e6 / seconds)
    ours = statistics.median(rates["farshore"])
    used = data_bytes(image)
    lines = [
        f"image: {options.gib} GiB ext4 of /usr, {used / 1e9:.2f} GB not zero; MB/s are of the whole image"
    ]
    lines += [f"{name:10} {spread(rates[name])} MB/s, stored {stored[name] / 1e9:.2f} GB" for name in names]
    lines += [f"ratio to {name}: {ours / statistics.median(rates[name]):.2f}" for name in names[1:]]
    low, high = FLOOR_MB_S
    lines.append(
        f"of the measured floor ({low}-{high} MB/s): {100 * ours / high:.0f}-{100 * ours / low:.0f} %"
    )
    assert memory is not None
    lines += memory.lines()
    lines += [version_of(name, "--version" if name == "borg" else "version") for name in names[1:]]
    figures = {
        "mb_per_second": rates,
        "stored_bytes": stored,
        "agent_pss_bytes": memory.agent,
        "server_pss_bytes": memory.server,
        "image_bytes": size,
        "data_bytes": used,
    }
    show("initial replication", figures, lines)


if __name__ == "__main__":
    main()
