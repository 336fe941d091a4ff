"""Runs and architectures in characters: 80 columns, no colour needed, nothing from outside reaches the terminal raw."""

import re
from io import StringIO

import numpy as np
import pytest
from reports import candidates, make_report
from rich.console import Console

from poolshare.search.analysis.pareto import binomial_interval
from poolshare.search.console import PlainConsole, printable
from poolshare.search.report.terminal import (
    comparison,
    comparison_table,
    draw_architecture,
    finalists_table,
    terminal_plot,
    terminal_table,
)
from poolshare.space import Architecture, ConfigError, RunError

LONG = " ".join(["196*3 100@max2d*3 49@max2d*3"] * 4)


def printed(table) -> list[str]:
    console = Console(width=80, file=StringIO(), record=True, color_system=None)
    console.print(table)
    return console.export_text().splitlines()


def test_table_fits_80_columns_and_loses_no_character_of_a_long_architecture():
    rows = candidates(4)
    rows.loc[2, "architecture"] = LONG
    rows.loc[3, "architecture"] = "196*3" * 30
    rows["latency_ms"] = [1.0, 2.0, 30.0, 400.0]
    for dense in (make_report().dense, {**make_report().dense, "latency_ms": 123.4}):
        lines = printed(terminal_table(make_report(rows, dense=dense)))
        assert max(map(len, lines)) <= 80
        # The numbers stand on an architecture's first line; without them only the first column is left.
        column = "".join(re.sub(r" \d+\.\d\d \(.*", "", line) for line in lines).replace(" ", "")
        assert LONG.replace(" ", "") in column
        assert "196*3" * 30 in column
        assert ("latency" in "".join(lines)) == ("latency_ms" in dense)


def test_table_shows_numbers_intervals_and_markup_as_text():
    rows = candidates(2)
    rows.loc[0, "architecture"] = "[red]64[/red]"
    text = "\n".join(printed(terminal_table(make_report(rows, title="[bold]t[/bold] [/] <script>alert(1)</script>"))))
    low, high = binomial_interval(450, 540)
    assert f"83.33 ({low:.1f}-{high:.1f})" in text
    assert "[red]64[/red]" in text
    assert "[bold]t[/bold] [/] <script>alert(1)</script>" in text
    assert re.search(r"dense: 64[64 ]+ +99\.00 +40\.0 M +100\.0 +400 k", text)
    assert re.search(r"10\.0 M +25\.0 +398 k", text)


def test_control_characters_never_reach_the_terminal():
    hostile = "\x1b[2Jgone\x07\r\x9b31m"
    report = make_report(title=hostile, run=hostile)
    shown = "\n".join(printed(terminal_table(report)) + printed(comparison_table([report, report])))
    shown += terminal_plot(report, others=[report])
    assert not set("\x1b\x07\r\x9b") & set(shown)
    assert r"\x1b[2Jgone" in shown
    assert printable("Kätzchen 猫 <b>\n") == "Kätzchen 猫 <b>\n"
    assert printable("a\u202eb") == r"a\u202eb"
    file = StringIO()
    PlainConsole(file=file, force_terminal=True, color_system=None).print("[red]\x1b[31m", "\x07")
    assert file.getvalue() == "[red]\\x1b[31m \\x07\n"


@pytest.mark.parametrize(("limit", "shown"), [(1, [0]), (2, [0, 11]), (4, [0, 4, 7, 11]), (99, range(12))])
def test_limited_table_spreads_its_rows_from_end_to_end(limit, shown):
    report = make_report()
    text = "\n".join(printed(terminal_table(report, limit=limit)))
    costs = re.findall(r"\)\s+([\d.]+) M", text)
    assert len(costs) == len(list(shown))
    expected = [float(report.candidates["macs"].iloc[row]) / 1e6 for row in shown]
    assert [float(cost) for cost in costs] == pytest.approx(expected, abs=0.06)
    assert (f"{limit} of the frontier's 12 points" in text) == (limit < 12)


def test_table_of_no_rows_is_refused():
    with pytest.raises(RunError, match="limit it to 1 or more"):
        terminal_table(make_report(), limit=0)


def test_plot_has_its_size_its_marks_and_no_escape_codes():
    plot = terminal_plot(make_report(), width=60, height=16)
    lines = plot.splitlines()
    assert len(lines) == 16
    assert max(map(len, lines)) <= 60
    assert "\x1b" not in plot
    canvas = "\n".join(lines[:-1])
    assert canvas.count("O") == 11  # the twelfth lies under the dense network's star
    assert canvas.count("*") == 1
    # Rising cost goes right, rising accuracy goes up: the star is on the top row of the canvas, at its right end.
    assert lines[1].rstrip().endswith("*│")
    assert "budget" not in plot
    limited = terminal_plot(make_report(limits={"macs": 24e6}), width=60, height=16)
    assert limited.splitlines()[-1].endswith("│ budget 24.0 M")
    assert "\x1b[" in terminal_plot(make_report(), colour=True)


def test_plot_marks_what_was_included_by_hand():
    report = make_report(included=[candidates()["architecture"].iloc[0]])
    canvas, key = terminal_plot(report).rsplit("\n", 1)
    assert canvas.count("+") == 1
    assert "+ included" in key


def test_plot_by_parameters_and_latency_has_their_unit():
    rows = candidates()
    rows["latency_ms"] = np.linspace(1, 9, 12)
    report = make_report(rows, dense={**make_report().dense, "latency_ms": 10.0})
    assert "latency per image (ms)" in terminal_plot(report, cost="latency_ms")
    assert "parameters (k)" in terminal_plot(report, cost="parameters")


def test_plot_of_one_candidate_that_is_the_dense_network():
    rows = candidates(1)
    dense = rows.iloc[0].to_dict()
    assert terminal_plot(make_report(rows, dense=dense)).count("*") == 2  # in the plot and its key


def test_plot_leaves_nothing_of_one_run_to_the_next():
    alone = terminal_plot(make_report())
    terminal_plot(make_report(candidates(5)), width=40, height=10, colour=True)
    assert terminal_plot(make_report()) == alone


def test_compared_runs_are_told_apart_by_letters_and_measured_against_one_reference():
    better = candidates()
    better["correct"] += 1
    better["top1"] = 100 * better["correct"] / 540
    reports = [make_report(run="runs/a"), make_report(better, run="runs/b"), make_report(run="runs/" + "long" * 30)]
    canvas, key = terminal_plot(reports[0], others=reports[1:]).split("runs/a")
    assert canvas.count("O") + canvas.count("X") > 12
    assert "X runs/b" in key
    records = comparison(reports)
    assert records[0]["hypervolume"] == records[2]["hypervolume"] < records[1]["hypervolume"]
    assert records[0]["half_point"] == 40_000_000  # 539 of 540 is within half a point of 99 %
    lines = printed(comparison_table(reports))
    assert max(map(len, lines)) <= 80
    assert "differ in model, data or images" not in "\n".join(lines)
    other = make_report(run="c", title="another data set")
    assert "differ in model, data or images" in " ".join(
        " ".join(printed(comparison_table([reports[0], other]))).split()
    )
    with pytest.raises(ConfigError, match="at most 6"):
        comparison([reports[0]] * 7)


def test_a_drawn_architecture():
    assert draw_architecture(Architecture.parse("16*2 16 4@max2d*3"), 64).splitlines() == [
        "layer  tokens",
        "    0      16  █████████████████████████ ┐ own map",
        "    1      16  █████████████████████████ ┘ shares the map",
        "    2      16  █████████████████████████ ╶ own map",
        "    3       4  ██████                    ┐ own map; max2d 16 → 4",
        "    4       4  ██████                    ┤ shares the map",
        "    5       4  ██████                    ┘ shares the map",
        "6 layers, 3 attention maps of their own: 16*2 16 4@max2d*3",
    ]


@pytest.mark.parametrize("text", ["1", "196*24", "196*2 100@max2d_conv*3 49@wkmedoids*2 49*3 1@random*2", LONG[:28]])
def test_a_drawn_architecture_fits_80_columns_and_its_bars_are_its_tokens(text):
    architecture = Architecture.parse(text)
    lines = draw_architecture(architecture).splitlines()
    assert max(map(len, lines)) <= 80
    bars = [line.count("█") for line in lines[1 : architecture.depth + 1]]
    full = bars[0]
    for bar, layer in zip(bars, architecture.layers, strict=True):
        assert bar == max(1, round(full * layer.tokens / architecture.layers[0].tokens))


@pytest.mark.parametrize("width", [40, 50, 71])
def test_narrow_terminals_keep_every_architecture(width):
    rows = candidates(4)
    rows.loc[3, "architecture"] = LONG
    rows["latency_ms"] = [1.0, 2.0, 30.0, 400.0]
    report = make_report(rows, dense={**make_report().dense, "latency_ms": 123.4})
    finalists = rows.assign(epochs=2, supernet_score=rows["top1"], score=rows["top1"], low=0.0, high=100.0)
    for table in (terminal_table(report, width=width), finalists_table(finalists, report, width)):
        console = Console(width=width, file=StringIO(), record=True, color_system=None)
        console.print(table)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        # Numbers stand behind an architecture's first line.
        column = "".join(re.sub(r" +\d+\.\d\d +\S.*$", "", line) for line in lines).replace(" ", "")
        assert LONG.replace(" ", "") in column
    plot = terminal_plot(report, width)
    assert max(map(len, plot.splitlines())) <= width
