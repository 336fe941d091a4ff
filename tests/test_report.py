"""The report in its four forms; no text from outside may become markup, no page may ask for another file."""

import html
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO, StringIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console

from poolshare.search import report as report_module
from poolshare.search.page import BUDGET, DENSE, FRONTIER
from poolshare.search.pareto import binomial_interval, frontier
from poolshare.search.report import (
    SVG_LIMIT,
    Report,
    figure_png,
    human,
    terminal_plot,
    terminal_table,
    write_html,
)
from poolshare.space.errors import RunError

ATTACK = "</script><script>alert(1)</script>"
LONG = " ".join(["196*3 100@max2d*3 49@max2d*3"] * 4)


def candidates(count: int = 12) -> pd.DataFrame:
    """Accuracies and costs rise together, so every row is on the frontier."""
    correct = np.linspace(450, 539, count).astype(int)
    return pd.DataFrame(
        {
            "architecture": [f"64*2 16@max2d*{row + 1}" for row in range(count)],
            "top1": 100 * correct / 540 + np.arange(count) * 1e-6,
            "correct": correct,
            "total": 540,
            "macs": np.linspace(10e6, 40e6, count).astype(int),
            "parameters": 397_834,
            "generation": 0,
        }
    )


def make_report(rows: pd.DataFrame | None = None, **changes) -> Report:
    rows = candidates() if rows is None else rows
    fields = {
        "title": "digits",
        "candidates": rows,
        "frontier": frontier(rows),
        "dense": {"architecture": "64*8", "macs": 40_000_000, "top1": 99.0, "parameters": 400_000},
        "budget": 24e6,
        "certified": True,
        "space_size": 1331,
        "facts": {"seed": "0"},
        "export_command": lambda architecture: f'poolshare export RUN --architecture "{architecture}" --out DIR',
    }
    return Report(**(fields | changes))


class Page(HTMLParser):
    """Every tag with its attributes, the text a reader sees, and the contents of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.seen = ""
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            getattr(self, f"{tag}s").append("")
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside:
            getattr(self, f"{self.inside[-1]}s")[-1] += data
        else:
            self.seen += data


def page_of(report: Report, folder) -> Page:
    write_html(report, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def attacked() -> Report:
    rows = candidates(3)
    rows.loc[1, "architecture"] = ATTACK
    return make_report(
        rows,
        title=f"{ATTACK} $title $x^{{",
        facts={ATTACK: ATTACK},
        dense={"architecture": ATTACK, "macs": 40_000_000, "top1": 99.0, "parameters": 400_000},
    )


def test_page_refers_to_nothing_outside_itself(tmp_path):
    page = page_of(attacked(), tmp_path)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form"), tag
        referring = {"src", "href", "srcset", "action", "data", "poster", "background"} & attributes.keys()
        assert not referring, (tag, referring)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert "url(" not in "".join(page.styles)
    assert "@import" not in "".join(page.styles)
    # Plotly's own library names addresses it would use for maps; what this run adds to it names none.
    own = [script for script in page.scripts if len(script) < 1_000_000]
    assert len(own) == len(page.scripts) - 1
    assert not any("://" in script for script in own)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "connect-src" not in policy


def test_page_has_no_button_that_uploads_the_data(tmp_path):
    assert '"showSendToCloud": false' in page_of(make_report(), tmp_path).scripts[-1]


def test_hostile_text_is_shown_and_not_run(tmp_path):
    harmless, hostile = page_of(make_report(candidates(3)), tmp_path), page_of(attacked(), tmp_path)
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    # title, heading, dense sentence, table, export command, name and value of the fact
    assert hostile.seen.count(ATTACK) == 7
    assert "$title $x^{" in hostile.seen
    assert not any("alert(1)</script>" in script for script in hostile.scripts)


def test_hover_text_is_escaped_for_plotly_which_reads_it_as_markup(tmp_path):
    figure = report_module._plotly_figure(attacked())
    for trace in figure.data:
        shown = [point[0] for point in trace.customdata]
        assert not any("<script" in text for text in shown)
        assert any(html.unescape(text.replace("<br>", "")) == ATTACK for text in shown)


def test_page_tells_the_frontier_the_commands_the_verdict_and_the_facts(tmp_path):
    report = make_report(facts={"seed": "17", "supernet training": "130 s"})
    seen = page_of(report, tmp_path).seen
    for row in report.frontier.itertuples():
        assert report.export_command(row.architecture) in seen
        assert f"{row.top1:.2f} %" in seen
    low, high = binomial_interval(450, 540)
    assert f"{low:.1f} to {high:.1f}" in seen
    assert "25.0 %" in seen  # 10 of 40 million MACs
    assert "The budget was 24.0 M MACs per image." in seen
    assert "Certified: all 1,331 architectures" in seen
    assert "130 s" in seen
    found = page_of(replace(report, certified=False, budget=None), tmp_path).seen
    assert "Found: 12 of the space's 1,331 architectures" in found
    assert "better ones may exist" in found
    assert "The budget was" not in found


def test_plot_holds_the_numbers_and_draws_crowds_by_webgl():
    report = make_report()
    figure = report_module._plotly_figure(report)
    crowd, line, dense = figure.data
    assert list(line.x) == list(report.frontier["macs"])
    assert list(line.y) == list(report.frontier["top1"])
    assert (dense.x[0], dense.y[0]) == (40_000_000, 99.0)
    assert figure.layout.shapes[0].x0 == 24e6
    assert crowd.type == "scatter"
    low, high = binomial_interval(450, 540)
    assert crowd.customdata[0][1] == f"top-1 83.33 % (95 %: {low:.1f} to {high:.1f})"
    assert crowd.customdata[0][2] == "10.0 M MACs, 25.0 % of dense"
    assert not report_module._plotly_figure(replace(report, budget=None)).layout.shapes
    rows = pd.concat([candidates()] * (SVG_LIMIT // 12 + 1))
    assert report_module._plotly_figure(make_report(rows)).data[0].type == "scattergl"


def test_page_survives_a_failed_write(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_html(make_report(), target)
    assert os.listdir(tmp_path) == ["report.html"]
    assert target.read_text() == "old"


def printed(report: Report, **options) -> list[str]:
    console = Console(width=80, file=StringIO(), record=True, color_system=None)
    console.print(terminal_table(report, **options))
    return console.export_text().splitlines()


def test_table_fits_80_columns_and_loses_no_character_of_a_long_architecture():
    rows = candidates(4)
    rows.loc[2, "architecture"] = LONG
    rows.loc[3, "architecture"] = "196*3" * 30
    lines = printed(make_report(rows))
    assert max(map(len, lines)) <= 80
    # The numbers stand on an architecture's first line; without them only the first column is left.
    column = "".join(re.sub(r" \d+\.\d\d \(.*", "", line) for line in lines).replace(" ", "")
    assert LONG.replace(" ", "") in column
    assert "196*3" * 30 in column


def test_table_shows_numbers_intervals_and_markup_as_text():
    rows = candidates(2)
    rows.loc[0, "architecture"] = "[red]64[/red]"
    text = "\n".join(printed(make_report(rows, title="[bold]t[/bold] [/]")))
    low, high = binomial_interval(450, 540)
    assert f"83.33 ({low:.1f}-{high:.1f})" in text
    assert "[red]64[/red]" in text
    assert "[bold]t[/bold] [/]" in text
    assert re.search(r"dense: 64\*8 +99\.00 +40\.0 M +100\.0 +400 k", text)
    assert re.search(r"10\.0 M +25\.0 +398 k", text)


@pytest.mark.parametrize(("limit", "shown"), [(1, [0]), (2, [0, 11]), (4, [0, 4, 7, 11]), (99, range(12))])
def test_limited_table_spreads_its_rows_from_end_to_end(limit, shown):
    text = "\n".join(printed(make_report(), limit=limit))
    rows = [row for row in range(12) if re.search(rf"@max2d\*{row + 1}\b", text)]
    assert rows == list(shown)
    assert (f"{limit} of the frontier's 12 points" in text) == (limit < 12)


def test_table_of_no_rows_is_refused():
    with pytest.raises(RunError, match="limit it to 1 or more"):
        terminal_table(make_report(), limit=0)


def test_terminal_plot_has_its_size_its_marks_and_no_escape_codes():
    plot = terminal_plot(make_report(), width=60, height=16)
    lines = plot.splitlines()
    assert len(lines) == 16
    assert max(map(len, lines)) <= 60
    assert "\x1b" not in plot
    canvas = "\n".join(lines[:-1])
    assert canvas.count("O") == 11  # the twelfth lies under the dense network's star
    assert canvas.count("*") == 1
    assert lines[-1].split("   ")[-1] == "│ budget 24.0 M"
    # Rising cost goes right, rising accuracy goes up: the star is on the top row of the canvas, at its right end.
    assert lines[1].rstrip().endswith("*│")
    assert "budget" not in terminal_plot(make_report(budget=None))
    assert "\x1b[" in terminal_plot(make_report(), colour=True)


def test_terminal_plot_of_one_candidate_that_is_the_dense_network():
    rows = candidates(1)
    dense = rows.iloc[0].to_dict()
    assert terminal_plot(make_report(rows, dense=dense, budget=None)).count("*") == 2  # in the plot and its key


def test_terminal_plot_leaves_nothing_of_one_run_to_the_next():
    alone = terminal_plot(make_report(budget=None))
    terminal_plot(make_report(candidates(5)), width=40, height=10, colour=True)
    assert terminal_plot(make_report(budget=None)) == alone


def pixels(picture: np.ndarray, colour: str) -> int:
    return int((np.abs(picture[..., :3] - to_rgb(colour)).max(axis=-1) < 0.02).sum())


def test_figure_shows_frontier_dense_and_budget_in_their_colours(tmp_path):
    figure_png(make_report(title="costs $5 and x_{"), tmp_path / "figure.png")
    content = (tmp_path / "figure.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1800, 1125)
    picture = imread(BytesIO(content))
    assert all(pixels(picture, colour) > 200 for colour in (FRONTIER, DENSE, BUDGET))
    figure_png(make_report(budget=None, certified=False), tmp_path / "figure.png")
    assert pixels(imread(tmp_path / "figure.png"), BUDGET) == 0
    assert os.listdir(tmp_path) == ["figure.png"]


def test_the_same_report_is_the_same_picture_byte_for_byte(tmp_path):
    for name in ("one.png", "two.png"):
        figure_png(make_report(), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.00 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (9_994_000, "9.99 M"),
        (9_996_000, "10.0 M"),
        (99_960_000, "100 M"),
        (1_261_000_000, "1.26 G"),
        (17_600_000_000, "17.6 G"),
    ],
)
def test_counts_are_read_in_three_digits(count, text):
    assert human(count) == text


def test_an_unusable_report_is_refused_when_it_is_made():
    with pytest.raises(RunError, match="candidates frame lacks 'macs'"):
        make_report(candidates=candidates().drop(columns="macs"))
    with pytest.raises(RunError, match="no frontier to report"):
        make_report(frontier=candidates().iloc[:0])
    with pytest.raises(RunError, match="dense row lacks 'top1'"):
        make_report(dense={"architecture": "64*8", "macs": 1, "parameters": 1})


def test_importing_the_module_loads_no_plotting_library():
    code = (
        "import json, sys, poolshare.search.report;"
        "print(json.dumps([m for m in ('plotly', 'matplotlib', 'plotext', 'torch', 'optuna') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
