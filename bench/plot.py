"""Draw the figures of the README: Farshore beside its peers, from the JSON lines that the benchmarks print.

``python -m bench.plot RESULTS.jsonl docs/figures.svg``; each line of RESULTS is
``{"title", "unit", "bars": {name: [value, lowest, highest]}}``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

OURS, PEER = "#1f6f8b", "#b8c4cc"


def draw(panels: list[dict[str, Any]], target: Path) -> None:
    """One panel per benchmark: medians as bars, the lowest and highest run as a line over them."""
    # The same figures give the same file: no dates, no random ids.
    mpl.rcParams["svg.hashsalt"] = "farshore"
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        names = list(panel["bars"])
        medians = [panel["bars"][name][0] for name in names]
        errors = [
            [median - panel["bars"][name][1] for name, median in zip(names, medians, strict=True)],
            [panel["bars"][name][2] - median for name, median in zip(names, medians, strict=True)],
        ]
        colours = [OURS if name.startswith("Farshore") else PEER for name in names]
        axis.bar(names, medians, yerr=errors, color=colours, capsize=3)
        axis.set_title(panel["title"], fontsize=10)
        axis.set_ylabel(panel["unit"])
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    panels = [json.loads(line) for line in options.results.read_text().splitlines() if line]
    draw(panels, options.target)


if __name__ == "__main__":
    main()
