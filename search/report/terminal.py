"""A run and an architecture in characters: table, plot, comparison, picture; all fit 80 columns and need no colour.

Plotext is imported where it is used, so that importing this module stays cheap.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from poolshare.space import BY_COLUMN, Architecture, ConfigError, RunError
from poolshare.space.quantities import human

from ..analysis.pareto import HALF_POINT, hypervolume, measured
from ..console import printable
from .report import Report, Row

WIDE = 72  # columns that tables need to show everything
RUN_MARKS = "OXHVWZ"  # one per run that is compared: readable without colour


def terminal_table(report: Report, limit: int | None = None, cost: str = "macs", width: int = WIDE) -> Table:
    """The frontier by `cost` and the dense network as a rich table.

    `limit` shows that many points at most, spread evenly over the frontier and with both of its ends. Below `WIDE`
    columns only the score and the cost stand beside the architectures, which are shown whole at any width.
    """
    if limit is not None and limit < 1:
        raise RunError(f"a table of {limit} rows shows nothing; limit it to 1 or more, or to None for all")
    rows = report.rows(report.by(cost), cost)
    caption = report.verdict
    if limit is not None and limit < len(rows):
        caption = f"{limit} of the frontier's {len(rows)} points. {caption}"
        rows = [rows[round(position)] for position in np.linspace(0, len(rows) - 1, limit)]
    # Text objects are printed as they are; plain strings would be read as markup.
    table = Table(title=Text(printable(report.title)), caption=Text(caption), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("architecture", overflow="fold")
    headings = {
        "score": f"{report.metric} % (95 %)",
        "loss": "loss",
        "macs": "MACs",
        "share": "% dense",
        "parameters": "params",
        "latency_ms": "latency",
    }
    if width < WIDE:
        headings = {"score": f"{report.metric} %", cost: headings[cost]}
    else:
        del headings["parameters" if "loss" in report.candidates else "loss"]
        if "latency_ms" not in report.costs:
            del headings["latency_ms"]
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)

    def add(row: Row) -> None:
        interval = "" if width < WIDE or row.low is None else f" ({row.low:.1f}-{row.high:.1f})"
        cells = {"score": f"{row.score:.2f}{interval}", "macs": row.macs, "share": f"{row.of_dense:.1f}"}
        cells |= {"parameters": row.parameters, "latency_ms": row.latency, "loss": row.loss}
        table.add_row(Text(printable(row.architecture)), *(cells[name] for name in headings))

    for row in rows:
        add(row)
    table.add_section()
    add(report.dense_row)
    return table


def finalists_table(rows: pd.DataFrame, report: Report, width: int = WIDE) -> Table:
    """Finalists with their scores, supernet's weights and trained alone, as a rich table; columns `folder.FINALISTS`.

    Below `WIDE` columns costs and intervals are left out. report: of their run.
    """
    epochs, images = int(rows["epochs"].iloc[0]), int(rows["total"].iloc[0])
    more = "one more epoch" if epochs == 1 else f"{epochs} more epochs"
    who = "1 finalist" if len(rows) == 1 else f"{len(rows)} finalists"
    caption = f"{report.metric} of {who} on {images:,} search-validation images; alone: {more}"
    if report.baseline is not None:
        caption += f". The most frequent class alone makes {report.baseline:.2f} %"
    table = Table(caption=Text(caption), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("architecture", overflow="fold")
    wide = width >= WIDE
    for heading in ("MACs", "supernet %", "alone % (95 %)") if wide else ("supernet %", "alone %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        before, after = (f"{row[name]:.2f}" for name in ("supernet_score", "score"))
        cells = (
            (human(row["macs"]), before, f"{after} ({row['low']:.1f}-{row['high']:.1f})") if wide else (before, after)
        )
        table.add_row(Text(row["architecture"]), *cells)
    return table


def terminal_plot(
    report: Report,
    width: int = 78,
    height: int = 18,
    colour: bool = False,
    cost: str = "macs",
    others: Sequence[Report] = (),
) -> str:
    """Accuracy against `cost` in characters, `width` by `height` cells; escape codes only where `colour` asks.

    With `others` only the frontiers are drawn, each run's with a letter of its own.
    """
    import plotext

    divisor, label = BY_COLUMN[cost].axis(report.dense[cost])
    figure = plotext.figure  # plotext has this one global figure: it is cleared afterwards
    tones = ("blue", "red", "green", "magenta", "cyan", "yellow")
    layers: list[tuple[pd.DataFrame, str, str]] = []
    key = []
    if others:
        key = [f"{mark} {printable(each.run)}" for mark, each in zip(RUN_MARKS, [report, *others], strict=False)]
        runs = zip([report, *others], RUN_MARKS, tones, strict=False)
        layers += [(each.by(cost), mark, tone) for each, mark, tone in runs][::-1]  # the first run on top
    else:
        key += ["· candidate", "O frontier"]
        layers += [(report.candidates, "·", "gray"), (report.by(cost), "O", "blue")]
        included = report.candidates[report.candidates["architecture"].isin(report.included)]
        if len(included):
            key.append("+ included")
            layers.append((included, "+", "green"))
    key.append("* dense")
    layers.append((pd.DataFrame([dict(report.dense)])[["architecture", report.column, cost]], "*", "orange"))
    try:
        plotext.terminal.limit(False, False)
        figure.clear()
        figure.theme("simple" if colour else "colorless")
        figure.plot_size(width, height - 1)
        figure.label(label, axis="x")
        figure.label(f"{report.metric} %", axis="y")
        figure.ruler("y").frequency(max(2, height // 3))
        if cost in report.limits:
            figure.line(report.limits[cost] / divisor, orientation="vertical")
            key.append(f"│ budget {BY_COLUMN[cost].short(report.limits[cost])}")
        for frame, marker, tone in layers:
            symbol = plotext.marker(marker, pixel=tone) if colour else marker
            figure.draw(figure.signal(list(frame[cost] / divisor), list(frame[measured(frame)]), marker=symbol))
        drawing = figure.build().string(colorless=not colour)
    finally:
        figure.clear()
        plotext.terminal.limit()
    return drawing.rstrip("\n") + "\n" + _centred(key, width)


def _centred(parts: Iterable[str], width: int) -> str:
    """The parts on as few centred lines as they need."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}   {part}" if lines[-1] else part
        if len(longer) > width and lines[-1]:
            lines.append(part)
        else:
            lines[-1] = longer
    return "\n".join(line.center(width).rstrip() for line in lines)


def comparison(reports: Sequence[Report], cost: str = "macs") -> list[dict[str, Any]]:
    """One record per run, made comparable: hypervolumes of all runs have the first run's dense cost and the worst score.

    Raises ConfigError for more runs than there are marks.
    """
    if len(reports) > len(RUN_MARKS):
        raise ConfigError(f"{len(reports)} runs are too many for one plot; compare at most {len(RUN_MARKS)}")
    reference = min(report.reference[0] for report in reports), float(reports[0].dense[cost])
    records = []
    for report in reports:
        frontier = report.by(cost)
        close = frontier[frontier[report.column] >= report.dense_score - HALF_POINT]
        records.append(
            {
                "run": report.run,
                "title": report.title,
                "images": report.images,
                "scored": len(report.candidates),
                "certified": report.certified,
                "hypervolume": hypervolume(report.allowed, reference, cost),
                "points": len(frontier),
                "best": float(frontier[report.column].max()),
                "dense": report.dense_score,
                "half_point": None if close.empty else float(close[cost].iloc[0]),
                "half_point_of_dense": None if close.empty else float(close[cost].iloc[0] / report.dense[cost]),
            }
        )
    return records


def comparison_table(reports: Sequence[Report], cost: str = "macs") -> Table:
    """`comparison` as a rich table, one row per run, with a warning where the numbers are not of the same images."""
    table = Table(title=Text("Runs compared"), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold", min_width=12)
    for heading in ("scored", "points", "best %", "dense %", "half-point", "hypervolume"):
        table.add_column(heading, justify="right")
    for mark, record in zip(RUN_MARKS, comparison(reports, cost), strict=False):
        half = record["half_point"]
        table.add_row(
            Text(printable(f"{mark} {record['run']}")),
            f"{record['scored']:,}",
            f"{record['points']}",
            f"{record['best']:.2f}",
            f"{record['dense']:.2f}",
            "none" if half is None else f"{BY_COLUMN[cost].short(half)} ({record['half_point_of_dense']:.0%})",
            f"{record['hypervolume']:.4f}",
        )
    if len({(report.title, report.images) for report in reports}) > 1:
        table.caption = Text("These runs differ in model, data or images: their scores are not of the same test.")
    return table


def draw_architecture(architecture: Architecture, width: int = 80) -> str:
    """One line per layer: its tokens as a bar, a bracket around layers that share a map, the operator that pooled."""
    layers = architecture.layers
    notes = []
    for index, layer in enumerate(layers):
        follows = index + 1 < len(layers) and layers[index + 1].shared
        bracket = {(False, False): "╶ ", (False, True): "┐ ", (True, True): "┤ ", (True, False): "┘ "}[
            layer.shared, follows
        ]
        note = "shares the map" if layer.shared else "own map"
        if layer.operator:
            note += f"; {layer.operator} {layers[index - 1].tokens} → {layer.tokens}"
        notes.append(bracket + note)
    bar = max(8, width - len("layer  tokens  ") - 1 - max(map(len, notes)))
    lines = ["layer  tokens"]
    for index, (layer, note) in enumerate(zip(layers, notes, strict=True)):
        filled = max(1, round(bar * layer.tokens / layers[0].tokens))
        lines.append(f"{index:5}  {layer.tokens:6}  {('█' * filled).ljust(bar)} {note}")
    own = len(architecture.runs)
    summary = f"{len(layers)} layers, {own} attention map{'s' if own != 1 else ''} of their own: {architecture}"
    return "\n".join(lines + textwrap.wrap(summary, width))
