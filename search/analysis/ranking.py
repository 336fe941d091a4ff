"""How well one ranking predicts another: Kendall's τ with its ceiling, within bands, and bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 2000  # of the architectures, for the intervals
ESTIMATES = ("tau", "ceiling", "share_of_ceiling")

Estimate = dict[str, float | None]  # value, and the ends of its 95 % interval; None where nothing can be ranked


def summarise(rows: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """τ of supernet score against one training alone, its ceiling, and both within bands; all with 95 % intervals.

    rows: columns `trust.POINTS`; an architecture's score is that of its first row. "tau" is over all architectures;
    "ceiling" is τ of a first against a second training, over those trained twice, and "share_of_ceiling" compares like
    with like: among those trained twice, the mean of the score's τ with either training, divided by the ceiling.
    "within" repeats the three with pairs of the same band alone, which cost in MACs cannot decide. Intervals:
    percentiles of a bootstrap over architectures, band by band.
    """
    facts = rows.drop_duplicates("architecture").set_index("architecture")[["band", "macs", "supernet_score"]]
    wide = facts.join(rows.pivot(index="architecture", columns="repeat", values="score"))
    wide = wide.reset_index().sort_values(["band", "macs", "architecture"], ignore_index=True)
    images, band, macs = int(rows["total"].iloc[0]), wide["band"].to_numpy(), wide["macs"]
    second = wide[1].to_numpy(float) if 1 in wide else np.full(len(wide), np.nan)
    sample = _Sample(wide["supernet_score"].to_numpy(), wide[0].to_numpy(), second)
    places = [np.flatnonzero(band == label) for label in np.unique(band)]
    rng = np.random.default_rng(seed)
    resamples = [np.concatenate([rng.choice(place, len(place)) for place in places]) for _ in range(RESAMPLES)]
    everyone, one_group = np.arange(len(wide)), np.zeros(len(wide), dtype=int)
    return {
        **sample.estimates(everyone, one_group, resamples),
        "within": sample.estimates(everyone, band, resamples),
        "n": len(wide),
        "twice": int((~np.isnan(second)).sum()),
        "images": images,
        "bands": [
            {
                "band": int(band[place[0]]),
                "low_macs": int(macs[place].min()),
                "high_macs": int(macs[place].max()),
                "n": len(place),
                **sample.estimates(place, one_group, resamples),
            }
            for place in places
        ],
        "points": [_point(row) for row in wide.to_dict("records")],
    }


def _point(row: dict[Any, Any]) -> dict[str, Any]:
    """An architecture's scores."""
    alone = [row[repeat] for repeat in (0, 1) if repeat in row and not np.isnan(row[repeat])]
    return {
        "architecture": row["architecture"],
        "macs": int(row["macs"]),
        "supernet_score": row["supernet_score"],
        "retrained_scores": alone,
    }


@dataclass(frozen=True)
class _Sample:
    """Scores, each (n,): by the supernet's score, after a first training, after a second (nan: none)."""

    score: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def taus(self, chosen: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
        """ESTIMATES of some architectures, from pairs of the same group."""
        twice = chosen[~np.isnan(self.second[chosen])]
        tau = kendall_tau(self.score[chosen], self.first[chosen], groups[chosen])
        ceiling = kendall_tau(self.first[twice], self.second[twice], groups[twice])
        either = [kendall_tau(self.score[twice], alone[twice], groups[twice]) for alone in (self.first, self.second)]
        return tau, ceiling, float(np.mean(either)) / ceiling if ceiling > 0 else float("nan")

    def estimates(self, members: np.ndarray, groups: np.ndarray, resamples: list[np.ndarray]) -> dict[str, Estimate]:
        """ESTIMATES of the members, each with its interval over the resamples."""
        inside = np.isin(np.arange(len(self.score)), members)
        spread = np.array([self.taus(sample[inside[sample]], groups) for sample in resamples])
        values = self.taus(members, groups)
        return {name: _estimate(values[index], spread[:, index]) for index, name in enumerate(ESTIMATES)}


def kendall_tau(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    """Kendall's τ-b of two (n,) rankings, over pairs of the same group alone; nan where they rank nothing.

    With one group the same as scipy's `kendalltau`. M. G. Kendall, "The treatment of ties in ranking problems",
    Biometrika 33 (1945).
    """
    same = np.equal.outer(groups, groups)
    first, second = (np.where(same, np.sign(np.subtract.outer(ranks, ranks)), 0) for ranks in (x, y))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale > 0 else float("nan")


def _estimate(value: float, spread: np.ndarray) -> Estimate:
    spread = spread[np.isfinite(spread)]
    if not np.isfinite(value) or not len(spread):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(spread, (2.5, 97.5))
    return {"value": value, "low": float(low), "high": float(high)}
