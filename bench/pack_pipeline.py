"""What storing a chunk costs, stage by stage: hash, id, zstd 1, decompress and compare, seal, put.

    python3 -m bench.pack_pipeline [--source PATH] [--store DIR] [--mib 1024] [--rounds 3]

Sketches of single stages took, on 2 cores of Zen 4 and in ns per byte: BLAKE3 0.22, zstd 1 at 64 KiB 1.73
to 2.1, decompressing 0.64, sealing 0.09, writing 0.1 to 0.2. Prints the machine, the commit, medians, spread.

The source is a real ext4 image made from /usr/lib, or any file; zero blocks are left out, for they never get
here.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard
from blake3 import blake3

from farshore.compression import Codec
from process_server.vault.keys import VaultKeys
from process_server.vault.pack import PackBuilder, PackReader, SealedPack
from process_server.vault.store.file import FileStore

KEYS = VaultKeys(b"v" * 16, 1, b"m" * 32)
STAGES = ("blake3", "id", "zstd 1", "decompress, compare", "add, all of it", "seal", "put", "read back")


def make_image(folder: Path, mib: int) -> Path:
    """Return an ext4 image with files of /usr/lib in it, and about ``mib`` MiB large."""
    tree, image = folder / "tree", folder / "image"
    tree.mkdir()
    copied = 0
    for path in sorted(Path("/usr/lib").rglob("*")):
        if path.is_file() and not path.is_symlink() and copied < mib * 2**20 * 0.8:
            with path.open("rb") as source, (tree / f"{copied}-{path.name[:60]}").open("wb") as target:
                shutil.copyfileobj(source, target)
            copied += path.stat().st_size
    with image.open("wb") as made:
        made.truncate(mib * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, image], check=True)
    shutil.rmtree(tree)
    return image


def batches(image: Path, chunk_bytes: int) -> Iterator[list[bytes]]:
    """Yield chunks that are not zeros, 8 MiB at a time: as warm as when they arrive."""
    zeros, batch = bytes(chunk_bytes), []
    with image.open("rb") as source:
        while chunk := source.read(chunk_bytes):
            if chunk != zeros[: len(chunk)]:
                batch.append(chunk)
            if len(batch) * chunk_bytes >= 8 * 2**20:
                yield batch
                batch = []
    if batch:
        yield batch


class Watch:
    """CPU and elapsed time per stage."""

    def __init__(self) -> None:
        self.cpu = dict.fromkeys(STAGES, 0.0)
        self.wall = dict.fromkeys(STAGES, 0.0)

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, stage: str) -> None:
        self.cpu[stage] += time.process_time() - self._cpu
        self.wall[stage] += time.perf_counter() - self._wall


def measure(image: Path, folder: Path, chunk_bytes: int) -> tuple[Watch, int, int]:
    """Run one round; return the times, plain bytes and stored bytes."""
    store = FileStore(folder, create=True)
    builder, codec, watch = PackBuilder(KEYS), Codec(1), Watch()
    plain_total = stored_total = 0
    kept: list[bytes] = []

    def ship() -> None:
        nonlocal stored_total
        watch.start()
        pack: SealedPack = builder.build()
        watch.stop("seal")
        stored_total += len(pack.body)
        watch.start()
        pack.put(store)
        watch.stop("put")
        kept.append(pack.id)
        pack.release()

    for batch in batches(image, chunk_bytes):
        watch.start()
        digests = [blake3(chunk).digest() for chunk in batch]
        watch.stop("blake3")
        watch.start()
        ids = [KEYS.chunk_id(digest) for digest in digests]
        watch.stop("id")
        # The two halves of add, alone, on one batch in four: they are in "add" once more.
        if plain_total // (8 * 2**20) % 4 == 0:
            watch.start()
            squeezed = [codec._compressor.compress(chunk) for chunk in batch]
            watch.stop("zstd 1")
            watch.start()
            for small, chunk in zip(squeezed, batch, strict=True):
                assert codec._decompressor.decompress(small, max_output_size=len(chunk)).startswith(chunk)
            watch.stop("decompress, compare")
        watch.start()
        for id, chunk in zip(ids, batch, strict=True):
            builder.add(id, chunk)
        watch.stop("add, all of it")
        plain_total += sum(map(len, batch))
        if builder.is_full:
            ship()
    if builder.count:
        ship()
    reader = PackReader(store, KEYS, cache_bytes=2**20)
    read = 0
    for pack_id in kept[:8]:
        index = reader.index(pack_id)
        watch.start()
        reader.read_chunks(pack_id, range(len(index)))
        watch.stop("read back")
        read += sum(index.plain_bytes)
    for times in (watch.cpu, watch.wall):
        times["zstd 1"] *= 4
        times["decompress, compare"] *= 4
        times["read back"] *= plain_total / read
    return watch, plain_total, stored_total


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--source", type=Path, help="an image; by default one is made from /usr/lib")
    arguments.add_argument("--store", type=Path, help="where packs go, on a real disk")
    arguments.add_argument("--mib", type=int, default=1024)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", end=", ")
    print(f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}, commit {commit.stdout.strip()}")
    with tempfile.TemporaryDirectory(dir=options.store or Path.cwd(), prefix=".bench-") as work:
        image = options.source or make_image(Path(work), options.mib)
        for chunk_bytes in (65_536, 131_072):
            rounds = []
            for number in range(options.rounds + 1):  # the first, on fresh memory, does not count
                folder = Path(work) / "vault"
                rounds.append(measure(image, folder, chunk_bytes))
                shutil.rmtree(folder)
                if number == 0:
                    rounds.clear()
            report(chunk_bytes, rounds)


def report(chunk_bytes: int, rounds: list[tuple[Watch, int, int]]) -> None:
    """Print the median of the rounds, in ns per plain byte that is not zero."""
    _, plain, stored = rounds[0]
    print(f"\n{chunk_bytes // 1024} KiB chunks: {plain / 1e6:.0f} MB, stored {stored / plain:.3f}")
    print(f"{'':22}{'CPU ns/B':>10}{'spread':>16}{'elapsed ns/B':>14}")
    for stage in STAGES:
        cpus = [watch.cpu[stage] / plain * 1e9 for watch, _, _ in rounds]
        walls = [watch.wall[stage] / plain * 1e9 for watch, _, _ in rounds]
        spread = f"{min(cpus):.3f}-{max(cpus):.3f}"
        print(f"{stage:22}{statistics.median(cpus):>10.3f}{spread:>16}{statistics.median(walls):>14.3f}")
    path = ("blake3", "id", "add, all of it", "seal", "put")
    cpu = statistics.median(sum(watch.cpu[stage] for stage in path) / plain * 1e9 for watch, _, _ in rounds)
    wall = statistics.median(sum(watch.wall[stage] for stage in path) / plain * 1e9 for watch, _, _ in rounds)
    print(f"{'one worker, in turn':22}{cpu:>10.3f}{'':16}{wall:>14.3f}  = {1000 / wall:.0f} MB/s")


if __name__ == "__main__":
    main()
