"""What the other scripts wrote, as a picture and as the README's table: means over splits.

python results/training-free/figure.py imagenet
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).parent
AT = (0.7, 0.6, 0.5)


def rows_of(pattern: str) -> pd.DataFrame:
    """All rows of these files, with their split."""
    parts = []
    for path in sorted(HERE.glob(pattern)):
        result = json.loads(path.read_text())
        parts.append(pd.DataFrame(result["rows"]).assign(split=result["split"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def best_within(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """Of every name and split the most expensive row within a share of the MACs: frontiers are by loss, so it is the best."""
    within = rows[rows["share"] <= share + 1e-9]
    within = within[within["share"] > share - 0.05]
    return within.loc[within.groupby(["name", "split"])["share"].idxmax()]


def table(rows: pd.DataFrame) -> str:
    """Markdown: mean over splits, by share and name."""
    lines = [
        "| MACs | | splits | MACs used | top-1 against dense (of each split) | divergence (nats) |",
        "|---|---|---|---|---|---|",
    ]
    for share in AT:
        found = best_within(rows[rows["name"] != "dense"], share)
        for name, group in sorted(found.groupby("name"), key=lambda item: item[1]["loss"].mean()):
            each = ", ".join(f"{value:+.2f}" for value in group["difference"])
            lines.append(
                f"| {share:.0%} | {name} | {len(group)} | {group['share'].mean():.1%} | {group['difference'].mean():+.2f} ({each}) "
                f"| {group['loss'].mean():.3f} |"
            )
    return "\n".join(lines)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Divergence and top-1 against dense, over MACs."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), dpi=150)
    names = [name for name in rows["name"].unique() if name not in ("dense", "searched")]
    for axis, column, label in zip(
        axes, ("loss", "difference"), ("divergence from dense (nats)", "top-1 against dense (points)"), strict=True
    ):
        for number, name in enumerate(names):
            mean = rows[rows["name"] == name].groupby(rows["share"].round(1))[["share", column]].mean()
            marker = "x" if name.startswith("learned") else "o"
            axis.plot(100 * mean["share"], mean[column], marker + "--", lw=1, ms=5, color=f"C{number % 10}", label=name)
        for split, group in rows[rows["name"] == "searched"].groupby("split"):
            label_once = "searched (a line for each split)" if split == rows["split"].min() else None
            axis.plot(100 * group["share"], group[column], "k.-", lw=1.5, label=label_once)
        axis.set_xlabel("% of the dense model's MACs")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(-16, 2)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def main(setting: str) -> None:
    rows = pd.concat([rows_of(f"{setting}-[0-9].json"), rows_of(f"{setting}-rates-[0-9].json")], ignore_index=True)
    print(table(rows))
    draw(rows, HERE / f"{setting}.png")


if __name__ == "__main__":
    main(sys.argv[1])
