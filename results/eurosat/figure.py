"""Accuracy against MACs of everybody in a table of reproduce.py, as a PNG beside it.

python results/eurosat/figure.py 112-avg2d     # also: 224-avg2d
"""

import sys
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).parent
COLOURS = ("#555555", "#c2410c", "#1d4ed8", "#15803d", "#0e7490", "#9ca3af", "#a21caf", "#b45309")


def main(setting: str) -> None:
    """Mean and deviation over seeds: a colour for each competitor, a mark for each start."""
    table = pd.read_csv(HERE / f"{setting}.csv")
    colours = dict(zip(table["name"].unique(), cycle(COLOURS), strict=False))
    marks = dict(zip(table["start"].unique(), "os^Dv", strict=False))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for (name, budget, start), group in table.groupby(["name", "budget", "start"], sort=False):
        axes.errorbar(
            100 * group["of_dense"].mean(),
            group["top1"].mean(),
            yerr=group["top1"].std(ddof=1),
            color=colours[name],
            marker=marks[start],
            linestyle="",
            capsize=3,
            label=f"{name}{f' ≤ {budget:.0%}' if budget < 1 else ''}, from {start} ({len(group)})",
        )
    axes.set(
        xlabel="MACs per image (% of the dense model's)",
        ylabel="test top-1 (%), mean and deviation over seeds",
        title=f"EuroSAT, {setting}",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="who, from whose weights (seeds)", title_fontsize=8)
    figure.savefig(HERE / f"{setting}.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1])
