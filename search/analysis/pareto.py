"""The frontier of a set of scored candidates.

A candidates frame has one row per scored architecture and these columns: `architecture` (canonical text),
then its score on the search-validation images, at most 100 and called as the metric of the task (`top1`); `correct`, the
right answers, or `sums`, what else images contribute, as text; `total` (images), `macs` (per image), `parameters` and
`generation`; `latency_ms` (per image) where it was measured; `loss` and `loss_margin` (nats, and the
half-width of its 95 % interval) where architectures were compared by a loss, which then decides, for it says more about
few images than a score does. Rows stand in the order in which they were scored. Every function here is pure: frames go
in, new frames and numbers come out. `cost` names the column to be kept small.
"""

from typing import Any

import moocore
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import ndtri

from poolshare.space.errors import ConfigError, RunError

PICKS = ("half-point", "knee", "budget", "accuracy")
TRAINED = ["epochs", "batch_size", "lr", "amp"]  # how a finalist was: those compared are alike in it
HALF_POINT = 0.5  # percent of the images


def frontier(candidates: pd.DataFrame, cost: str = "macs", score: str | None = None) -> pd.DataFrame:
    """The rows that no other row beats (better `score`, less `cost`), by rising cost; of equal rows the first.

    score: the column that is to be large, or "loss"; None: see `score_of`. No candidates have an empty frontier.
    """
    if candidates.empty:
        return candidates.reset_index(drop=True)
    score = score or score_of(candidates)
    points, maximise = _points(candidates, cost, score), [score != "loss", False]
    best = moocore.is_nondominated(points, maximise=maximise, keep_weakly=False)  # the first of equal points alone
    return candidates[best].sort_values(cost, ignore_index=True)


def score_of(candidates: pd.DataFrame) -> str:
    """The column that architectures are compared by: "loss" where there is one, else the score."""
    return "loss" if "loss" in candidates else measured(candidates)


def measured(candidates: pd.DataFrame) -> str:
    """The column of the score: the one after the architecture."""
    return str(candidates.columns[1])


def hypervolume(candidates: pd.DataFrame, reference: tuple[float, float], cost: str = "macs") -> float:
    """The share, 0 to 1, of the rectangle between `reference` and the ideal that the candidates dominate.

    The reference is a (score, cost) pair, usually the worst of each on the true frontier; the ideal
    is 100 percent at no cost. Candidates that are not better than the reference in both add nothing. Dividing
    by the rectangle makes the number free of units, so runs with different costs can stand in one table.
    """
    worst, worst_cost = reference
    if not (worst < 100 and worst_cost > 0):
        raise RunError(
            f"the hypervolume's reference is ({worst}, {worst_cost}); it needs a score below 100 and a cost above 0"
        )
    if candidates.empty:
        return 0.0
    scores, costs = _points(candidates, cost, measured(candidates)).T
    losses = np.column_stack([(100 - scores) / (100 - worst), costs / worst_cost])  # (candidates, 2)
    return float(moocore.hypervolume(losses, ref=(1.0, 1.0)))


def progress(
    candidates: pd.DataFrame, reference: tuple[float, float], cost: str = "macs", points: int = 200
) -> pd.DataFrame:
    """Hypervolume after so many evaluations: columns `evaluations` and `hypervolume`, some `points` rows, evenly spread.

    The first row is the first evaluation, the last one the whole frame. See `hypervolume` for the reference.
    """
    counts = np.unique(np.linspace(1, len(candidates), min(points, len(candidates))).astype(int))
    best, start, reached = candidates.iloc[:0], 0, []
    for count in counts:
        best = frontier(pd.concat([best, candidates.iloc[start:count]]), cost, measured(best))
        reached.append(hypervolume(best, reference, cost))
        start = count
    return pd.DataFrame({"evaluations": counts, "hypervolume": reached})


def pick(frontier: pd.DataFrame, how: str, cost: str = "macs", dense: float | None = None) -> pd.Series:
    """One row of a frontier that is sorted by rising cost.

    - "half-point": the cheapest that loses at most half a point against the score `dense`, which it requires;
    - "knee": the point farthest above the chord between the frontier's ends, both axes scaled to 0..1;
    - "budget", of a frontier within a budget, and "accuracy": the most accurate; of equals the cheapest.

    Raises RunError for an empty frontier or where nothing comes close to dense, ConfigError for an unknown `how`.
    """
    if how not in PICKS:
        raise ConfigError(f"cannot pick by {how!r}; choose one of {', '.join(PICKS)}")
    if frontier.empty:
        raise RunError("the frontier is empty: no candidate has been scored yet, so search first")
    if how == "half-point":
        if dense is None:
            raise ConfigError("picking by 'half-point' needs the dense network's score")
        scores = frontier[measured(frontier)]
        close = frontier[scores >= dense - HALF_POINT]
        if close.empty:
            raise RunError(
                f"the best of the frontier reaches {scores.max():.2f} %, more than half a point below "
                f"the dense network's {dense:.2f} %; pick by 'knee' or 'accuracy'"
            )
        return close.iloc[0]
    if how == "knee":
        return frontier.iloc[_knee(frontier[cost].to_numpy(float), frontier[score_of(frontier)].to_numpy(float))]
    return frontier.iloc[-1]  # the most expensive of a frontier is the most accurate


def compared(finalists: pd.DataFrame) -> pd.DataFrame:
    """Those that were trained alike: the largest such group; of equals the one trained longest, then the last begun."""
    groups = [group for _, group in finalists.groupby(TRAINED, sort=False)]
    return max(reversed(groups), key=lambda group: (len(group), group["epochs"].iloc[0]), default=finalists)


def ranked(finalists: pd.DataFrame) -> pd.DataFrame:
    """Finalists, the best first; of equals the one that the supernet scored higher, then the cheaper one."""
    order = ["score", "supernet_score", "macs"]
    return finalists.sort_values(order, ascending=[False, False, True], kind="stable", ignore_index=True)


def binomial_interval(correct: ArrayLike, total: ArrayLike) -> tuple[Any, Any]:
    """Wilson's 95 % interval for `correct` out of `total` images: (low, high) in percent, in the inputs' shape.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). The same as
    scipy's `binomtest(…).proportion_ci(method="wilson")`, which takes milliseconds for each pair.
    """
    hits, images = np.broadcast_arrays(np.asarray(correct, float), np.asarray(total, float))
    if not (np.all(images > 0) and np.all(hits >= 0) and np.all(hits <= images)):
        raise RunError(f"{correct!r} correct of {total!r} images; need 0 <= correct <= total and total > 0")
    share, z = hits / images, ndtri(0.975)
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    reach = z / (1 + z**2 / images) * np.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    # At the ends the formula is exactly 0 or 1; rounding would leave 1e-17 beside it.
    low = np.where(hits == 0, 0.0, 100 * (centre - reach))
    high = np.where(hits == images, 100.0, 100 * (centre + reach))
    return low[()], high[()]


def _points(candidates: pd.DataFrame, cost: str, score: str) -> np.ndarray:
    """(candidates, 2) array of score and cost, all finite."""
    missing = [column for column in (score, cost) if column not in candidates]
    if missing:
        present = ", ".join(candidates.columns)
        raise RunError(f"the candidates have no column {missing[0]!r}; they have {present}")
    points = candidates[[score, cost]].to_numpy(float)
    broken = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if broken.size:
        raise RunError(
            f"candidate row {broken[0]} has {score} {points[broken[0], 0]} and {cost} {points[broken[0], 1]}; "
            "both must be finite, so score it again or leave it out"
        )
    return points


def _knee(costs: np.ndarray, scores: np.ndarray) -> int:
    """Position of the knee of a frontier sorted by rising cost; its ends lie on the chord, at height 0."""
    if len(costs) < 3:
        return 0
    heights = (scores - scores[0]) / (scores[-1] - scores[0]) - (costs - costs[0]) / (costs[-1] - costs[0])
    return int(heights.argmax())
