"""What a search found, told four ways: a terminal table, a terminal plot, a figure, one self-contained page.

Plotly, matplotlib and plotext are imported where they are used, so that importing this module stays cheap.
"""

import shlex
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from poolshare.search.page import (
    BUDGET,
    CANDIDATE,
    DENSE,
    FRONTIER,
    PAGE,
    PLOT_CONFIGURATION,
    PLOT_LAYOUT,
    RECOLOUR,
)
from poolshare.search.pareto import binomial_interval, frontier, hypervolume
from poolshare.search.run import RunFolder
from poolshare.space import RunError, parse_budget
from poolshare.space.files import write_whole

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure
    from rich.table import Table

COLUMNS = ("architecture", "top1", "correct", "total", "macs", "parameters")
DENSE_FIELDS = ("architecture", "top1", "macs", "parameters")

SVG_LIMIT = 3_000  # more candidates than this are drawn by WebGL: browsers crawl under that many SVG nodes


@dataclass(frozen=True)
class Report:
    """One run, ready to be shown. Frames have the columns of `pareto`; macs are per image, top1 is in percent."""

    title: str
    candidates: pd.DataFrame
    frontier: pd.DataFrame
    dense: Mapping[str, Any]  # architecture, macs, top1, parameters of the unreduced network
    budget: float | None  # MACs per image
    certified: bool  # the whole space was scored
    space_size: int
    facts: Mapping[str, str]  # configuration, versions, seeds, seconds per phase
    export_command: Callable[[str], str]  # architecture → the shell command that takes it home

    def __post_init__(self) -> None:
        for name, part, needed in (
            ("candidates frame", self.candidates, COLUMNS),
            ("frontier frame", self.frontier, COLUMNS),
            ("dense row", self.dense, DENSE_FIELDS),
        ):
            missing = [field for field in needed if field not in part]
            if missing:
                raise RunError(f"a report's {name} lacks {missing[0]!r}; it needs {', '.join(needed)}")
        if self.candidates.empty or self.frontier.empty:
            raise RunError("there is no frontier to report: no architecture has been scored yet")

    @property
    def verdict(self) -> str:
        """How far the frontier can be trusted to be the best there is, in words."""
        if self.certified:
            return (
                f"Certified: all {self.space_size:,} architectures of the space were scored, "
                "and none of them beats this frontier on the search-validation images."
            )
        return (
            f"Found: {len(self.candidates):,} of the space's {self.space_size:,} architectures were scored; "
            "better ones may exist among the rest."
        )


class Row(NamedTuple):
    """One architecture as people read it: percentages as numbers, counts with their unit."""

    architecture: str
    top1: float  # percent
    low: float  # percent, end of the 95 % interval
    high: float
    macs: str
    of_dense: float  # percent of the dense network's MACs
    parameters: str


def terminal_table(report: Report, limit: int | None = None) -> "Table":
    """The frontier and the dense network as a rich table that fits 80 columns and needs no colour.

    `limit` shows that many points at most, spread evenly over the frontier and with both of its ends.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if limit is not None and limit < 1:
        raise RunError(f"a table of {limit} rows shows nothing; limit it to 1 or more, or to None for all")
    rows = _rows(report, report.frontier)
    caption = report.verdict
    if limit is not None and limit < len(rows):
        caption = f"{limit} of the frontier's {len(rows)} points. {caption}"
        rows = [rows[round(position)] for position in np.linspace(0, len(rows) - 1, limit)]
    # Text objects are printed as they are; plain strings would be read as markup.
    table = Table(title=Text(report.title), caption=Text(caption), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("architecture", overflow="fold")
    for heading in ("top-1 % (95 %)", "MACs", "% dense", "params"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        interval = f"{row.top1:.2f} ({row.low:.1f}-{row.high:.1f})"
        table.add_row(Text(row.architecture), interval, row.macs, f"{row.of_dense:.1f}", row.parameters)
    table.add_section()
    dense = report.dense
    label = Text(f"dense: {dense['architecture']}")
    table.add_row(label, f"{dense['top1']:.2f}", human(dense["macs"]), "100.0", human(dense["parameters"]))
    return table


def terminal_plot(report: Report, width: int = 78, height: int = 18, colour: bool = False) -> str:
    """Accuracy against MACs in characters, `width` by `height` cells; escape codes only where `colour` asks."""
    import plotext

    divisor, letter = _unit(report.dense["macs"])
    key = ["· candidate", "O frontier", "* dense"]
    figure = plotext.figure  # plotext knows this one figure only: left as clean as it was found
    try:
        plotext.terminal.limit(False, False)
        figure.clear()
        figure.theme("simple" if colour else "colorless")
        figure.plot_size(width, height - 1)
        figure.label(f"MACs per image ({letter})", axis="x")
        figure.label("top-1 %", axis="y")
        figure.ruler("y").frequency(max(2, height // 3))
        if report.budget is not None:
            figure.line(report.budget / divisor, orientation="vertical")
            key.append(f"│ budget {human(report.budget)}")
        for frame, marker, tone in (
            (report.candidates, "·", "gray"),
            (report.frontier, "O", "blue"),
            (pd.DataFrame([dict(report.dense)]), "*", "orange"),
        ):
            symbol = plotext.marker(marker, pixel=tone) if colour else marker
            figure.draw(figure.signal(list(frame["macs"] / divisor), list(frame["top1"]), marker=symbol))
        drawing = figure.build().string(colorless=not colour)
    finally:
        figure.clear()
        plotext.terminal.limit()
    return drawing.rstrip("\n") + "\n" + "   ".join(key).center(width).rstrip()


def figure_png(report: Report, path: str | Path) -> None:
    """Accuracy against MACs as a PNG of 1800 × 1125 pixels: candidates, frontier, dense, budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, faint = "#1f2933", "#6b7785"
    divisor, letter = _unit(report.dense["macs"])
    dense_macs = report.dense["macs"] / divisor
    figure = Figure(figsize=(9, 5.625), dpi=200)
    axes = figure.add_axes((0.08, 0.095, 0.9, 0.715))
    count = len(report.candidates)
    axes.scatter(
        report.candidates["macs"] / divisor,
        report.candidates["top1"],
        s=14 if count <= SVG_LIMIT else 6,
        color=CANDIDATE,
        alpha=_opacity(count),
        linewidths=0,
        label="scored candidate",
    )
    lows, highs = binomial_interval(report.frontier["correct"], report.frontier["total"])
    frontier_macs = report.frontier["macs"] / divisor
    axes.fill_between(
        frontier_macs, lows, highs, step="post", color=FRONTIER, alpha=0.12, linewidth=0, label="95 % interval"
    )
    axes.step(
        frontier_macs,
        report.frontier["top1"],
        where="post",
        color=FRONTIER,
        linewidth=1.8,
        marker="o",
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.9,
        label="frontier",
    )
    axes.scatter(
        dense_macs,
        report.dense["top1"],
        marker="*",
        s=300,
        color=DENSE,
        edgecolors="white",
        linewidths=0.9,
        zorder=4,  # above the frontier, which may end here
        label="dense",
    )
    if report.budget is not None:
        budget = report.budget / divisor
        label = f"budget {human(report.budget)}"
        axes.axvline(budget, color=BUDGET, linewidth=1.3, linestyle=(0, (5, 3)), label=label)
    axes.set_xlabel(f"MACs per image ({letter})", color=ink)
    axes.set_ylabel("top-1 on search-validation images (%)", color=ink)
    per_percent = dense_macs / 100
    share = axes.secondary_xaxis(
        "top", functions=(lambda macs: np.divide(macs, per_percent), lambda percent: np.multiply(percent, per_percent))
    )
    share.set_xlabel("% of the dense network's MACs", color=faint, fontsize=9)
    share.tick_params(colors=faint, labelsize=8, length=0)
    share.spines["top"].set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c1cc")
    axes.tick_params(colors=faint)
    axes.grid(color="#e6eaef", linewidth=0.8)
    axes.set_axisbelow(True)
    legend = axes.legend(loc="lower right", facecolor="white", edgecolor="none", labelcolor=ink)
    for handle in legend.legend_handles:
        if handle is not None and handle.get_label() == "scored candidate":
            handle.set_alpha(0.8)  # as faint as its points it could not be seen
    scored = (
        f"Certified: all {report.space_size:,} architectures of the space are scored"
        if report.certified
        else f"Found: {count:,} of the space's {report.space_size:,} architectures are scored"
    )
    # A dollar sign in a title is no formula, hence parse_math.
    title = textwrap.shorten(report.title, 75, placeholder=" ...")
    figure.text(0.08, 0.945, title, fontsize=15, fontweight="bold", color=ink, parse_math=False)
    figure.text(0.08, 0.9, scored, fontsize=11, color=ink)
    canvas = FigureCanvasAgg(figure)
    write_whole(Path(path), lambda part: canvas.print_png(part, metadata={"Software": None}))


def write_html(report: Report, path: str | Path) -> None:
    """One page that needs nothing beside itself: plot, verdict, frontier with export commands, facts."""
    from plotly.io import to_html

    plot = to_html(
        _plotly_figure(report),
        full_html=False,
        include_plotlyjs=True,
        config=PLOT_CONFIGURATION,
        div_id="frontier",
        post_script=RECOLOUR,
    )
    rows = []
    for row in _rows(report, report.frontier):
        architecture, command = escape(row.architecture), escape(report.export_command(row.architecture))
        rows.append(
            f"<tbody><tr><td><code>{architecture}</code></td>"
            f'<td data-label="top-1"><b>{row.top1:.2f} %</b></td>'
            f'<td data-label="95 % interval">{row.low:.1f} to {row.high:.1f}</td>'
            f'<td data-label="MACs">{row.macs}</td><td data-label="of dense">{row.of_dense:.1f} %</td>'
            f'<td data-label="parameters">{row.parameters}</td></tr>'
            f'<tr><td colspan="6"><pre>{command}</pre></td></tr></tbody>'
        )
    dense = report.dense
    page = PAGE.substitute(
        title=escape(report.title),
        verdict=escape(report.verdict),
        dense=escape(
            f"The dense network, {dense['architecture']}, reaches {dense['top1']:.2f} % with "
            f"{human(dense['macs'])} MACs per image and {human(dense['parameters'])} parameters."
        ),
        budget="" if report.budget is None else f"The budget was {human(report.budget)} MACs per image.",
        plot=plot,
        rows="\n".join(rows),
        facts="\n".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(str(fact))}</dd>" for name, fact in report.facts.items()
        ),
    )
    write_whole(Path(path), lambda part: part.write_text(page, encoding="utf-8"))


def human(count: float) -> str:
    """A count in three digits and a unit: 1_261_000_000 → "1.26 G"."""
    divisor, letter = _unit(count)
    value = count / divisor
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {letter}" if letter else f"{count:,.0f}"


def _unit(count: float) -> tuple[float, str]:
    """Divisor and letter of the unit in which a count reads best."""
    for divisor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * divisor:  # 999.6 million reads as 1.00 G, not as 1000 M
            return divisor, letter
    return 1.0, ""


def _rows(report: Report, frame: pd.DataFrame) -> list[Row]:
    lows, highs = binomial_interval(frame["correct"], frame["total"])
    columns = [frame[column] for column in ("architecture", "top1", "macs", "parameters")]
    return [
        Row(str(text), top1, low, high, human(macs), 100 * macs / report.dense["macs"], human(parameters))
        for text, top1, macs, parameters, low, high in zip(*columns, lows, highs, strict=True)
    ]


def _opacity(points: int) -> float:
    """Faint enough that a crowd of this many points still shows where it is dense."""
    return float(np.clip(20 / np.sqrt(points), 0.15, 0.7))


def _plotly_figure(report: Report) -> "PlotlyFigure":
    import plotly.graph_objects as go

    def hover(frame: pd.DataFrame) -> list[list[str]]:
        # Plotly reads hover texts as markup, hence the escaping; long architectures are folded for phones.
        return [
            [
                "<br>".join(escape(line) for line in textwrap.wrap(row.architecture, 34)),
                f"top-1 {row.top1:.2f} % (95 %: {row.low:.1f} to {row.high:.1f})",
                f"{row.macs} MACs, {row.of_dense:.1f} % of dense",
            ]
            for row in _rows(report, frame)
        ]

    template = "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>%{customdata[2]}<extra></extra>"
    crowd = go.Scattergl if len(report.candidates) > SVG_LIMIT else go.Scatter
    figure = go.Figure(layout={"template": "none"})
    figure.add_trace(
        crowd(
            x=report.candidates["macs"].to_numpy(),
            y=report.candidates["top1"].to_numpy(),
            customdata=hover(report.candidates),
            hovertemplate=template,
            mode="markers",
            name="scored candidate",
            marker={"color": CANDIDATE, "size": 5, "opacity": _opacity(len(report.candidates))},
        )
    )
    figure.add_trace(
        go.Scatter(
            x=report.frontier["macs"].to_numpy(),
            y=report.frontier["top1"].to_numpy(),
            customdata=hover(report.frontier),
            hovertemplate=template,
            mode="lines+markers",
            name="frontier",
            line={"color": FRONTIER, "width": 2, "shape": "hv"},
            marker={"size": 9},
        )
    )
    dense = report.dense
    figure.add_trace(
        go.Scatter(
            x=[dense["macs"]],
            y=[dense["top1"]],
            customdata=[[escape(str(dense["architecture"])), human(dense["macs"])]],
            hovertemplate="<b>dense: %{customdata[0]}</b><br>top-1 %{y:.2f} %<br>%{customdata[1]} MACs<extra></extra>",
            mode="markers",
            name="dense",
            marker={"symbol": "star", "size": 16, "color": DENSE},
        )
    )
    if report.budget is not None:
        figure.add_vline(
            report.budget,
            line={"color": BUDGET, "dash": "dash", "width": 1.5},
            annotation={"text": f"budget {human(report.budget)}", "font": {"color": BUDGET}},
        )
    figure.update_layout(PLOT_LAYOUT)
    return figure


def load_report(folder: RunFolder, budget: str | None = None) -> Report:
    """The report of a finished run, from its files alone, within its own budget or within another.

    Raises RunError where files are missing or damaged, BudgetError for a budget that no candidate keeps.
    """
    summary, candidates = folder.read_summary(), folder.read_candidates()
    limit = summary["budget_macs"] if budget is None else parse_budget(budget, summary["dense"]["macs"])
    config = folder.config.model_dump(mode="json", exclude_defaults=True)
    facts = {name.replace("_", " "): str(value) for name, value in config.items()}
    facts["images scored on"] = f"{candidates['total'].iloc[0]:,} (search-validation)"
    facts |= {f"seconds {phase}": f"{seconds:,.0f}" for phase, seconds in summary["seconds"].items()}
    worst = float(candidates["top1"].min())
    facts["hypervolume"] = (
        f"{hypervolume(candidates, (worst, summary['dense']['macs'])):.4f} of the rectangle between "
        f"{worst:.2f} % at the dense network's MACs and 100 % at none"
    )
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    out = shlex.quote(str(folder.path))
    return Report(
        title=f"{folder.config.model} on {folder.config.data}",
        candidates=candidates,
        frontier=frontier(candidates, budget=limit),
        dense=summary["dense"],
        budget=limit,
        certified=summary["certified"] and len(candidates) == summary["space_size"],
        space_size=summary["space_size"],
        facts=facts,
        export_command=lambda architecture: (
            f"poolshare export {out} --architecture {shlex.quote(architecture)} --out {out}-export"
        ),
    )
