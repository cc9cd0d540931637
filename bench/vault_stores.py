"""Initial replication into a bucket of SeaweedFS, beside a vault in a directory, in the same run.

Agent, server and store share this host, so the store's own work is in the figure. The vault in the directory
is durable when it says so (fdatasync); SeaweedFS, as it comes, leaves that to the kernel. What providers ask
money for is printed, too: requests for each GiB of the disk.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.harness import drop_caches, show, spread, version_of
from bench.replication import Memory, data_bytes, image_of_programs, protect, running_site, server_metric
from farshore.units import GIB, MIB
from tests.harness.object_stores import S3_KEYS, SeaweedFS

AIM = 0.6
SETTLE_S = 2.5
"""The workers tell the main process what they asked of the store once a second."""


def replicate(image: Path, directory: Path, vault: str | None) -> tuple[float, dict[str, float], Memory]:
    """One round; returns seconds, requests by operation, and memory."""
    with running_site(directory, vault) as site:
        memory = Memory(site)
        memory.start()
        seconds = protect(site, image)
        memory.stop()
        time.sleep(SETTLE_S)
        requests = {
            operation: server_metric(site, f'farshore_blob_requests_total{{code="ok",op="{operation}"}}')
            for operation in ("put", "get", "get_range", "head", "list", "cas", "delete")
        }
        requests["all"] = server_metric(site, "farshore_blob_requests_total")
    return seconds, requests, memory


@contextlib.contextmanager
def vault_of(kind: str, directory: Path) -> Iterator[str | None]:
    """The address of a new vault of ``kind``; what it needs runs until the block ends."""
    if kind == "directory":
        yield None
        return
    folder = directory / "store"
    folder.mkdir()
    with contextlib.closing(SeaweedFS(folder)) as store:
        yield store.url()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gib", type=int, default=6, help="size of the image, at least what /usr needs")
    parser.add_argument("--mib", type=int, help="take only the first part of it")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(S3_KEYS)
    whole = image_of_programs(options.gib)
    kinds = ("directory", "seaweedfs")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    requests: dict[str, dict[str, float]] = {}
    memory: Memory | None = None
    with tempfile.TemporaryDirectory(prefix="farshore-bench-image-") as made:
        image = whole
        if options.mib:
            image = Path(made, "part.img")
            with whole.open("rb") as source, image.open("wb") as target:
                for _ in range(options.mib):
                    target.write(source.read(MIB))
        size = image.stat().st_size
        for _ in range(options.rounds):
            for kind in kinds:
                with tempfile.TemporaryDirectory(prefix=f"farshore-bench-{kind}-") as folder:
                    directory = Path(folder)
                    with vault_of(kind, directory) as vault:
                        drop_caches()
                        seconds, requests[kind], memory = replicate(image, directory, vault)
                rates[kind].append(size / 1e6 / seconds)
        used = data_bytes(image)
    ratio = statistics.median(rates["seaweedfs"]) / statistics.median(rates["directory"])
    lines = [f"image: {size / GIB:g} GiB of an ext4 of /usr, {used / 1e9:.2f} GB not zero; MB/s are of all"]
    lines += [f"{kind:10} {spread(rates[kind])} MB/s" for kind in kinds]
    lines.append(f"ratio to the directory: {ratio:.2f}, aim {AIM}" + (" - MISSED" if ratio < AIM else ""))
    for kind in kinds:
        per_gib = {name: count * GIB / size for name, count in requests[kind].items()}
        told = ", ".join(f"{name} {count:.0f}" for name, count in per_gib.items() if count)
        lines.append(f"{kind:10} requests per GiB: {told}")
    assert memory is not None
    lines += memory.lines()
    lines.append(version_of("weed", "version"))
    figures = {
        "mb_per_second": rates,
        "ratio": ratio,
        "requests": requests,
        "image_bytes": size,
        "data_bytes": used,
    }
    show("vault stores", figures, lines)


if __name__ == "__main__":
    main()
