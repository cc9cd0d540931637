"""What the benchmarks of replication share: an image of real programs, a site, memory by side, metrics."""

import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from agent.admin import ask
from bench.harness import descendants, pss_bytes
from farshore.errors import Failed
from farshore.site import Site
from farshore.units import GIB

MACHINE: Final = "bench"
VOLUME: Final = "data"
AGENT_PSS_BYTES_MAX: Final = 200 << 20
SERVER_PSS_BYTES_MAX: Final = 500 << 20


def image_of_programs(size_gib: int) -> Path:
    """An ext4 image filled from /usr, built once and kept. Needs mkfs.ext4 (e2fsprogs)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "farshore-bench"
    cache.mkdir(parents=True, exist_ok=True)
    image = cache / f"usr-{size_gib}g.img"
    if not image.exists():
        fresh = image.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        mkfs = shutil.which("mkfs.ext4", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        if mkfs is None:
            raise Failed(
                "cannot build the image", why="mkfs.ext4 is not installed", fix="apt install e2fsprogs"
            )
        command = [mkfs, "-q", "-F", "-d", "/usr", str(fresh), f"{size_gib}G"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed("cannot build the image", why=done.stderr.strip(), fix="give a larger --gib")
        fresh.rename(image)
    assert image.stat().st_size == size_gib * GIB
    return image


def data_bytes(image: Path) -> int:
    """Bytes of blocks of 64 KiB that are not zero."""
    zero, total = bytes(65536), 0
    with image.open("rb") as file:
        while block := file.read(65536):
            total += len(block) if block != zero[: len(block)] else 0
    return total


class Memory(threading.Thread):
    """The highest proportional set size of each side, sampled once a second: at 10 Hz it costs 7%."""

    def __init__(self, site: Site) -> None:
        super().__init__(daemon=True)
        self._site, self._over = site, threading.Event()
        self.agent = self.server = 0

    def run(self) -> None:
        while not self._over.wait(1.0):
            if (agent := self._site.agents.get(MACHINE)) is not None:
                tap = self._site.tap_pid(MACHINE)
                # The tap is a child too while the agent that began it lives.
                pids = {*descendants(agent.process.pid), *(descendants(tap) if tap is not None else ())}
                self.agent = max(self.agent, pss_bytes(pids))
            if self._site.server is not None:
                self.server = max(self.server, pss_bytes(descendants(self._site.server.process.pid)))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def lines(self) -> list[str]:
        """Both sides against their bounds."""
        return [
            f"memory (PSS) of all {side} processes: {used >> 20} MiB of {most >> 20}"
            + (" - EXCEEDED" if used > most else "")
            for side, used, most in (
                ("agent", self.agent, AGENT_PSS_BYTES_MAX),
                ("server", self.server, SERVER_PSS_BYTES_MAX),
            )
        ]


@contextmanager
def running_site(directory: Path, vault: str | None = None) -> Iterator[Site]:
    """A server and one enrolled, running agent, on this host; the vault below ``directory`` or elsewhere."""
    site = Site(directory)
    site.vault = vault or site.vault
    site.init()
    try:
        site.start_server()
        site.enrol(MACHINE)
        config = site.agent_dir(MACHINE) / "agent.toml"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("metrics_port")]
        config.write_text("\n".join([*lines, "metrics_port = 0", ""]))
        site.start_agent(MACHINE)
        yield site
    finally:
        site.close()


def protect(site: Site, disk: Path) -> float:
    """Protect ``disk``; return the seconds until the first point that is not fuzzy is vaulted."""
    from agent.volume_admin import to_config

    folder = site.agent_dir(MACHINE)
    config = to_config(folder, VOLUME, disk, "tap-nbd", None, None)
    began = time.monotonic()
    ask(folder, "protect", config=config)
    wait_protected(site)
    return time.monotonic() - began


def resync(site: Site) -> float:
    """Compare the whole volume; return the seconds until a point that is not fuzzy is vaulted again."""
    began = time.monotonic()
    ask(site.agent_dir(MACHINE), "resync", name=VOLUME)
    wait_protected(site)
    return time.monotonic() - began


def wait_protected(site: Site) -> None:
    while True:
        status: dict[str, Any] = ask(site.agent_dir(MACHINE), "progress", name=VOLUME)
        if status["state"] == "protected":
            return
        if status["state"] == "failed":
            raise Failed("the volume failed", why=status["problem"])
        # To ask fifty times a second takes 5% of a core from what is measured: only near the end.
        far = status["done_bytes"] < status["total_bytes"] * 0.97
        time.sleep(0.25 if far else 0.02)


def metric(site: Site, name: str) -> float:
    """A metric of the agent, summed over labels when ``name`` has none, else that one line."""
    return _metric(str(site.agents[MACHINE].ready["metrics"]), name)


def server_metric(site: Site, name: str) -> float:
    """A metric of the server, as `metric`."""
    assert site.server is not None
    return _metric(str(site.server.ready["metrics"]), name)


def _metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = [line for line in lines if line.startswith((name + " ", name + "{"))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in values)
