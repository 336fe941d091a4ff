"""The frontier as a PNG, and the numbers that go with it."""

import os
import struct
from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from reports import candidates, make_report

from poolshare.search.report.figure import BUDGET, DENSE, FRONTIER, INCLUDED, OTHER_RUNS, figure_numbers, figure_png


def pixels(picture: np.ndarray, colour: str) -> int:
    return int((np.abs(picture[..., :3] - to_rgb(colour)).max(axis=-1) < 0.02).sum())


def test_figure_shows_frontier_dense_budget_and_included_in_their_colours(tmp_path):
    included = [candidates()["architecture"].iloc[2]]
    figure_png(make_report(title="costs $5 and x_{", limits={"macs": 24e6}, included=included), tmp_path / "figure.png")
    content = (tmp_path / "figure.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1800, 1125)
    picture = imread(BytesIO(content))
    assert all(pixels(picture, colour) > 200 for colour in (FRONTIER, DENSE, BUDGET, INCLUDED))
    figure_png(make_report(certified=False), tmp_path / "figure.png")
    assert pixels(imread(tmp_path / "figure.png"), BUDGET) == 0
    assert os.listdir(tmp_path) == ["figure.png"]


def test_compared_runs_are_drawn_in_colours_and_marks_of_their_own(tmp_path):
    rows = candidates()
    rows["correct"] -= 40
    rows["top1"] = 100 * rows["correct"] / 540
    other = make_report(rows, run="costs $x_{ too")
    figure_png(make_report(), tmp_path / "figure.png", others=[other])
    assert pixels(imread(tmp_path / "figure.png"), OTHER_RUNS[0][0]) > 200


def test_the_same_report_is_the_same_picture_byte_for_byte(tmp_path):
    for name in ("one.png", "two.png"):
        figure_png(make_report(), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_numbers_of_a_figure_are_every_candidate_of_every_run(tmp_path):
    reports = [make_report(run="a", limits={"macs": 24e6}), make_report(run="b")]
    figure_numbers(reports, tmp_path / "figure.csv")
    table = pd.read_csv(tmp_path / "figure.csv")
    assert list(table["run"]) == ["a"] * 12 + ["b"] * 12
    assert table[table["run"] == "a"]["frontier"].sum() == len(reports[0].frontier) < 12
    assert table[table["run"] == "b"]["frontier"].all()
