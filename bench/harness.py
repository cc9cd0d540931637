"""What every benchmark prints and needs: the machine, medians with their spread, memory of process trees."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Where and on what code a figure was measured."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    packages = ("blake3", "cryptography", "msgspec", "numpy", "obstore", "uvloop", "zstandard")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain") else ""),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def version_of(*command: str) -> str:
    """First line that a program prints of its own version."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().splitlines()[0]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """``median (lowest … highest, n)``."""
    ends = f"{min(values):.{digits}f} … {max(values):.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({ends}, n={len(values)})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def drop_caches() -> None:
    """Write back and forget the page cache. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of these processes together; those that have ended count nothing."""
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for at in found:
        for task in Path(f"/proc/{at}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def show(title: str, figures: dict[str, Any], lines: Iterable[str]) -> None:
    """Print for a person on stdout, and the same as one JSON line at the end."""
    about = machine()
    print(f"# {title}")
    print(
        f"# {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, Linux {about['kernel']}, ",
        end="",
    )
    print(f"Python {about['python']}, commit {about['commit']}")
    for line in lines:
        print(line)
    print(json.dumps({"bench": title, "machine": about, "figures": figures}))
