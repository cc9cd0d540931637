"""Draw the figures of the README from what the benchmarks printed, ours beside the peers' of the same run.

``python -m bench.plot OUTPUT… docs/figures.svg``: each OUTPUT is what one benchmark wrote to stdout; its last
line, the JSON one, is read.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt

from farshore.errors import UsageError

OURS, PEER, AIM = "#1f6f8b", "#b8c4cc", "#a23b3b"


@dataclass(frozen=True, slots=True)
class Panel:
    """One group of bars.

    Attributes:
        bars: Name to the figures of the rounds; the first one is ours.
        aim: What ours is to reach, in the same unit.
    """

    title: str
    unit: str
    bars: Mapping[str, Sequence[float]]
    aim: float


def initial(figures: dict[str, Any]) -> Panel:
    rates = figures["mb_per_second"]
    aim = max(1.6 * statistics.median(rates["borg"]), 3.2 * statistics.median(rates["restic"]))
    return Panel("first copy of a disk", "MB/s", rates, aim)


def tap(figures: dict[str, Any]) -> Panel:
    bars = {"farshore": figures["tap_4k_iops"], "qemu-nbd,\nno log": figures["qemu_4k_iops"]}
    return Panel("4 KiB random writes", "writes/s", bars, 2 * statistics.median(figures["qemu_4k_iops"]))


def recover(figures: dict[str, Any]) -> Panel:
    rates = figures["to its end"]["mb_per_s"]
    aim = 1.5 * max(statistics.median(rates[name]) for name in ("restic", "borg"))
    return Panel("recover to a file", "MB/s", rates, aim)


def resync(figures: dict[str, Any]) -> Panel:
    bars = {
        "unchanged": figures["unchanged_mb_per_second"],
        "after writes": figures["after_writes_mb_per_second"],
    }
    return Panel("compare with the vault", "MB/s", bars, 1500)


def rpo(figures: dict[str, Any]) -> Panel:
    bars = {f"{int(rate):,}\nwrites/s": one["p99_s"] for rate, one in figures.items()}
    return Panel("age of the newest\nrecoverable write, p99", "s", bars, 2)


PANELS: Final[dict[str, Callable[[dict[str, Any]], Panel]]] = {
    "initial replication": initial,
    "tap": tap,
    "recover to a raw file": recover,
    "resync": resync,
    "rpo": rpo,
}


def read(path: Path) -> Panel:
    """Return the panel for one benchmark's output. Raises UsageError."""
    lines = path.read_text().splitlines()
    try:
        found = json.loads(lines[-1])
        return PANELS[found["bench"]](found["figures"])
    except (IndexError, ValueError, KeyError) as error:
        raise UsageError("not the output of a benchmark that is drawn", where=str(path)) from error


def draw(panels: Sequence[Panel], target: Path) -> None:
    """One panel per benchmark: medians as bars, lowest and highest round over them, the aim as a line."""
    # The same figures give the same file: no dates, no random ids.
    mpl.rcParams["svg.hashsalt"] = "farshore"
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 3.0), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        rounds = list(panel.bars.values())
        medians = [statistics.median(values) for values in rounds]
        below = [median - min(values) for median, values in zip(medians, rounds, strict=True)]
        above = [max(values) - median for median, values in zip(medians, rounds, strict=True)]
        peers = {"borg", "restic", "qemu-nbd,\nno log"}
        colours = [PEER if name in peers else OURS for name in panel.bars]
        axis.bar(list(panel.bars), medians, yerr=[below, above], color=colours, capsize=3)
        axis.axhline(panel.aim, color=AIM, linestyle="--", linewidth=1)
        axis.set_title(panel.title, fontsize=9)
        axis.set_ylabel(panel.unit, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("outputs", type=Path, nargs="+")
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    draw([read(path) for path in options.outputs], options.target)


if __name__ == "__main__":
    main()
