"""The frontier against brute force, hypervolumes against areas cut by hand, intervals against scipy."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from poolshare.search.analysis.pareto import binomial_interval, frontier, hypervolume, pick
from poolshare.space.errors import ConfigError, RunError


def frame(*points: tuple[float, int]) -> pd.DataFrame:
    """Candidates from (top1, macs) pairs; the architecture's text is the row number."""
    return pd.DataFrame(
        {
            "architecture": [f"row {row}" for row in range(len(points))],
            "top1": [float(top1) for top1, _ in points],
            "correct": [round(5 * top1) for top1, _ in points],
            "total": 500,
            "macs": [macs for _, macs in points],
            "parameters": 1000,
            "generation": 0,
        }
    )


# Few distinct values, so that ties in one axis and in both are common.
clouds = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=40)


def brute_force_frontier(points: list[tuple[int, int]]) -> list[int]:
    def beaten(row: int) -> bool:
        top1, macs = points[row]
        return any(
            (other_top1 >= top1 and other_macs <= macs and (other_top1, other_macs) != (top1, macs))
            or ((other_top1, other_macs) == (top1, macs) and other < row)
            for other, (other_top1, other_macs) in enumerate(points)
        )

    return sorted((row for row in range(len(points)) if not beaten(row)), key=lambda row: points[row][1])


@given(clouds)
@settings(deadline=None)
def test_frontier_is_the_brute_force_one_and_its_own_frontier(points):
    candidates = frame(*points)
    found = frontier(candidates)
    assert list(found["architecture"]) == [f"row {row}" for row in brute_force_frontier(points)]
    assert list(found.columns) == list(candidates.columns)
    pd.testing.assert_frame_equal(frontier(found), found)


def test_of_exact_ties_the_first_row_stands_and_the_input_is_left_alone():
    candidates = frame((90, 30), (80, 10), (90, 30), (80, 10), (90, 31), (79, 10))
    before = candidates.copy()
    assert list(frontier(candidates)["architecture"]) == ["row 1", "row 0"]
    pd.testing.assert_frame_equal(candidates, before)


def test_costs_a_single_multiply_add_apart_are_kept_apart():
    candidates = frame((90.0, 10**15 + 1), (80.0, 10**15))
    assert len(frontier(candidates)) == 2


def test_frontier_by_another_cost():
    candidates = frame((90, 30), (80, 10))
    candidates["latency"] = [5, 7]
    assert list(frontier(candidates, cost="latency")["architecture"]) == ["row 0"]


def test_no_candidates_have_an_empty_frontier_and_no_volume():
    empty = frame().astype({"top1": float, "macs": int})
    assert frontier(empty).empty
    assert hypervolume(empty, (0, 10)) == 0


def test_hypervolume_of_a_staircase_cut_by_hand():
    # Reference (50 %, 100). From the right: cost 80..100 is 40 high, 40..80 is 30 high, 20..40 is 10 high.
    candidates = frame((60, 20), (80, 40), (90, 80), (55, 70), (99, 120), (40, 1))
    area = 20 * 40 + 40 * 30 + 20 * 10
    assert hypervolume(candidates, (50, 100)) == pytest.approx(area / (50 * 100))


def test_hypervolume_of_the_ideal_is_one_and_of_the_reference_nothing():
    assert hypervolume(frame((100, 0)), (50, 100)) == 1
    assert hypervolume(frame((50, 100)), (50, 100)) == 0
    assert hypervolume(frame((49, 1), (100, 101)), (50, 100)) == 0


@given(clouds, st.integers(0, 11), st.integers(1, 12))
@settings(deadline=None)
def test_hypervolume_is_the_count_of_dominated_unit_cells(points, worst_top1, worst_cost):
    # The points are whole numbers: a cell is dominated if a point is at least as good as its best corner.
    cells = sum(
        any(top1 >= height + 1 and macs <= left for top1, macs in points)
        for height in range(worst_top1, 12)
        for left in range(worst_cost)
    )
    expected = cells / ((100 - worst_top1) * worst_cost)
    assert hypervolume(frame(*points), (worst_top1, worst_cost)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reference", [(100, 10), (50, 0), (float("nan"), 10)])
def test_hypervolume_refuses_a_reference_without_a_rectangle(reference):
    with pytest.raises(RunError, match="a score below 100"):
        hypervolume(frame((90, 1)), reference)


def test_knee_is_the_point_farthest_above_the_chord():
    # Heights above the chord, after scaling: 0, 0.5 - 0.1, 0.8 - 0.5, 0.
    points = frontier(frame((90, 100), (95, 110), (98, 150), (100, 200)))
    assert pick(points, "knee")["macs"] == 110
    # A thousandfold unit or another offset on either axis changes nothing.
    assert pick(points.assign(macs=points["macs"] * 1000 + 7), "knee")["top1"] == 95


@given(clouds)
@settings(deadline=None)
def test_knee_against_the_distance_from_a_point_to_a_line(points):
    choices = frontier(frame(*points))
    chosen = pick(choices, "knee")
    if len(choices) < 3:
        assert chosen["macs"] == choices["macs"].iloc[0]
        return
    scaled = choices[["macs", "top1"]].to_numpy(float)
    scaled = (scaled - scaled[0]) / (scaled[-1] - scaled[0])
    along = np.array([1.0, 1.0]) / np.sqrt(2)
    signed = [along[0] * y - along[1] * x for x, y in scaled]  # cross product with the chord's direction
    at_chosen = signed[int(np.flatnonzero(choices["macs"] == chosen["macs"])[0])]
    assert at_chosen == pytest.approx(max(signed), abs=1e-12)


def test_a_frontier_that_sags_below_its_chord_gives_its_cheap_end():
    assert pick(frame((10, 10), (11, 90), (100, 100)), "knee")["macs"] == 10


def test_pick_by_accuracy():
    points = frontier(frame((90, 100), (95, 110), (98, 150), (98, 151)))
    assert pick(points, "accuracy")["macs"] == pick(points, "budget")["macs"] == 150


def test_pick_says_what_is_wrong_and_what_would_be_right():
    points = frame((90, 100), (95, 110))
    with pytest.raises(ConfigError, match="knee, budget, accuracy"):
        pick(points, "fastest")
    with pytest.raises(RunError, match="no candidate has been scored"):
        pick(points.iloc[:0], "knee")


def test_unusable_candidates_are_named():
    with pytest.raises(RunError, match="no column 'latency'"):
        frontier(frame((90, 1)), cost="latency")
    with pytest.raises(RunError, match="row 1 has top1 nan"):
        frontier(frame((90, 1), (90, 2)).assign(top1=[90.0, np.nan]))


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 540), (540, 540), (530, 540), (1, 50_000)])
def test_wilson_interval_is_scipys(correct, total):
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    low, high = binomial_interval(correct, total)
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-10)


def test_wilson_interval_of_columns():
    low, high = binomial_interval(pd.Series([5, 10]), 10)
    assert low.shape == (2,)
    assert (low[1], high[1]) == binomial_interval(10, 10)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5), ([1, 6], [5, 5])])
def test_impossible_counts_are_refused(correct, total):
    with pytest.raises(RunError, match="correct <= total"):
        binomial_interval(correct, total)
