"""The frontier as a PNG, for papers and README files. Matplotlib is imported where it is used."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from poolshare.space import BY_COLUMN
from poolshare.space.files import write_whole

from ..job.records import write_csv
from .report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CANDIDATE, FRONTIER, DENSE, BUDGET, INCLUDED = "#8795a8", "#2f7fd1", "#e07b1a", "#c2455a", "#2b8a5f"
OTHER_RUNS = (("#a03d8c", "s"), ("#2b8a5f", "^"), ("#7a6a00", "v"), ("#5b5bd6", "D"), ("#444444", "P"))
INK, FAINT = "#1f2933", "#6b7785"
SMALL_FROM = 3_000  # from so many candidates on, their dots are small


def figure_png(report: Report, path: str | Path, cost: str = "macs", others: Sequence[Report] = ()) -> None:
    """Accuracy against `cost` as a PNG of 1800 × 1125 pixels: candidates, frontier, dense, budget, compared frontiers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    divisor, label = BY_COLUMN[cost].axis(report.dense[cost])
    dense_cost = report.dense[cost] / divisor
    figure = Figure(figsize=(9, 5.625), dpi=200)
    axes = figure.add_axes((0.08, 0.095, 0.9, 0.715))
    _draw_candidates(axes, report, cost, divisor)
    for other, (colour, marker) in zip(others, OTHER_RUNS, strict=False):
        _draw_frontier(axes, other, cost, divisor, colour, marker, textwrap.shorten(other.run, 40))
    _draw_frontier(
        axes, report, cost, divisor, FRONTIER, "o", textwrap.shorten(report.run, 40) if others else "frontier"
    )
    axes.scatter(
        dense_cost, report.dense_score, marker="*", s=300, color=DENSE, edgecolors="white", linewidths=0.9,
        zorder=4, label="dense",  # above the frontier, which may end here
    )  # fmt: skip
    if cost in report.limits:
        limit = report.limits[cost]
        text = f"budget {BY_COLUMN[cost].short(limit)}"
        axes.axvline(limit / divisor, color=BUDGET, linewidth=1.3, linestyle=(0, (5, 3)), label=text)
    axes.set_xlabel(label, color=INK)
    axes.set_ylabel(f"{report.metric} on search-validation images (%)", color=INK)
    _style(axes, dense_cost / 100, BY_COLUMN[cost].label)
    scored = (
        report.verdict.partition(";")[0]
        if report.looked_at is not None
        else f"Certified: all {report.space_size:,} architectures of the space are scored"
        if report.certified
        else f"Found: {len(report.candidates):,} of the space's {report.space_size:,} architectures are scored"
    )
    # A dollar sign in a title does not start a formula, hence parse_math.
    title = textwrap.shorten(report.title, 75, placeholder=" ...")
    figure.text(0.08, 0.945, title, fontsize=15, fontweight="bold", color=INK, parse_math=False)
    figure.text(0.08, 0.9, scored, fontsize=11, color=INK)
    canvas = FigureCanvasAgg(figure)
    write_whole(Path(path), lambda part: canvas.print_png(part, metadata={"Software": None}))


def figure_numbers(reports: Sequence[Report], path: str | Path, cost: str = "macs") -> None:
    """The numbers behind a figure as CSV: every candidate of every run, and whether it stands on the frontier."""
    parts = []
    for report in reports:
        frontier = set(report.by(cost)["architecture"])
        on = report.candidates["architecture"].isin(frontier)
        parts.append(report.candidates.assign(run=report.run, frontier=on))
    write_csv(Path(path), pd.concat(parts, ignore_index=True))


def opacity(points: int) -> float:
    """Faint enough that a crowd of this many points still shows where it is dense."""
    return float(np.clip(20 / np.sqrt(points), 0.15, 0.7))


def _draw_candidates(axes: Axes, report: Report, cost: str, divisor: float) -> None:
    count = len(report.candidates)
    axes.scatter(
        report.candidates[cost] / divisor, report.candidates[report.column], s=14 if count <= SMALL_FROM else 6,
        color=CANDIDATE, alpha=opacity(count), linewidths=0, label="scored candidate",
    )  # fmt: skip
    included = report.candidates[report.candidates["architecture"].isin(report.included)]
    if len(included):
        axes.scatter(
            included[cost] / divisor, included[report.column], marker="s", s=52, color=INCLUDED, edgecolors="white",
            linewidths=0.9, zorder=4, label="included by hand",
        )  # fmt: skip


def _draw_frontier(axes: Axes, report: Report, cost: str, divisor: float, colour: str, marker: str, label: str) -> None:
    frontier = report.by(cost)
    intervals = np.array([report.interval(row) for row in frontier.to_dict("records")], float)  # nan: unknown
    costs = frontier[cost] / divisor
    band = "95 % interval" if label == "frontier" else None
    axes.fill_between(
        costs, intervals[:, 0], intervals[:, 1], step="post", color=colour, alpha=0.12, linewidth=0, label=band
    )
    axes.step(
        costs, frontier[report.column], where="post", color=colour, linewidth=1.8, marker=marker, markersize=6,
        markeredgecolor="white", markeredgewidth=0.9, label=label.replace("$", r"\$"),
    )  # fmt: skip


def _style(axes: Axes, per_percent: float, what: str) -> None:
    to_percent, from_percent = partial(np.multiply, 1 / per_percent), partial(np.multiply, per_percent)
    share = axes.secondary_xaxis("top", functions=(to_percent, from_percent))
    share.set_xlabel(f"% of the dense network's {what}", color=FAINT, fontsize=9)
    share.tick_params(colors=FAINT, labelsize=8, length=0)
    share.spines["top"].set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c1cc")
    axes.tick_params(colors=FAINT)
    axes.grid(color="#e6eaef", linewidth=0.8)
    axes.set_axisbelow(True)
    legend = axes.legend(loc="lower right", facecolor="white", edgecolor="none", labelcolor=INK)
    for handle in legend.legend_handles:
        if handle is not None and handle.get_label() == "scored candidate":
            handle.set_alpha(0.8)  # as faint as its points it could not be seen
