"""Whether models are within a latency budget: whole models are timed, because sums of layers are approximate."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from poolshare.space import Architecture, parse_budget
from poolshare.space.quantities import LATENCY

from ..progress import Advance
from .pareto import frontier

if TYPE_CHECKING:
    from poolshare.supernet import SuperNet
    from poolshare.supernet.latency import Share

TOGETHER = 6  # models timed in one session, beside the dense one
AGAIN = 3  # sessions before a timing is trusted: sessions differ by more than the interval inside one of them
SESSIONS = 20  # at most
MODELS = TOGETHER * SESSIONS


@dataclass(frozen=True)
class Timed:
    """Timings of whole models, each relative to the dense one, and what they imply for models that were not timed."""

    dense_ms: float  # per image
    # architecture → share of the dense time: median, and of all its sessions the highest end of a 95 % interval
    shares: Mapping[str, tuple[float, float]]

    def keeps(self, candidates: pd.DataFrame, dense_sum: float, budget: str) -> pd.Series:
        """Which candidates keep a latency budget in words.

        One that was timed does where the high end of its interval does. Of another the sum does, made longer by as much
        as the timed ones took longer than theirs (median; never shorter). dense_sum: the dense network's sum, in ms.
        """
        high = candidates["architecture"].map({text: share[1] for text, share in self.shares.items()})
        sums = candidates["latency_ms"] / dense_sum
        limit, longer = self.limit(budget), self.longer(candidates, dense_sum)
        return (high <= limit).where(high.notna(), sums * longer <= limit)

    def limit(self, budget: str) -> float:
        """A latency budget in words as a share of the dense model's time."""
        dense = round(self.dense_ms * LATENCY.scale)
        return parse_budget(budget, dense, "latency") / dense

    def longer(self, candidates: pd.DataFrame, dense_sum: float) -> float:
        """How much longer the candidates that were timed took than their sums: the median factor, at least 1."""
        high = candidates["architecture"].map({text: share[1] for text, share in self.shares.items()})
        factors = (high / (candidates["latency_ms"] / dense_sum)).dropna()
        return max(1.0, float(factors.median())) if len(factors) else 1.0

    @property
    def shortest(self) -> str:
        """The fastest of those that were timed, in words."""
        text, (median, high) = min(self.shares.items(), key=lambda item: item[1][1])
        return f"{median:.1%} of the dense model's time, perhaps {high:.1%}: {text}"

    def words(self, architecture: str) -> str:
        """An architecture's timing, as the end of a sentence."""
        if architecture not in self.shares:
            return "; its latency is a sum of layers, the whole model was not timed"
        median, high = self.shares[architecture]
        took = f"; timed whole, it takes {median:.1%} of the dense model's time"
        return f"{took}, at most {high:.1%} (95 % interval, the worst of its sessions)"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return {"dense_ms": self.dense_ms, "shares": {text: list(share) for text, share in self.shares.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Timed:
        """Read what `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        shares = {str(text): (float(median), float(high)) for text, (median, high) in value["shares"].items()}
        return cls(float(value["dense_ms"]), shares)


def time_frontier(
    supernet: SuperNet,
    candidates: pd.DataFrame,
    dense_sum: float,
    budget: str,
    batch_size: int,
    advance: Advance,
    dtype: str = "fp32",
) -> Timed:
    """Time models of the latency frontier from the most expensive down, until one is confirmed to be within budget.

    The one that decides is timed in `AGAIN` sessions, each with new models and the dense one beside them, and must be
    within budget in the slowest of them. candidates: with `latency_ms`, sums of the table; dense_sum: the dense
    network's. advance: called with the number of models timed, in all sessions, and a note.
    """
    from poolshare.supernet.latency import measure_shares

    dense = str(supernet.space[0])
    timed = Timed(dense_sum, {dense: (1.0, 1.0)})
    dense_times: list[float] = []
    sessions: dict[str, list[Share]] = {}

    def confirmed(text: str) -> bool:
        return text == dense or len(sessions.get(text, ())) >= AGAIN

    for session in range(SESSIONS):
        rows = frontier(candidates[timed.keeps(candidates, dense_sum, budget)], "latency_ms")
        texts = list(rows["architecture"])
        if not texts and not dense_times:  # none is within budget by its sum, but one may be by the clock
            texts = list(candidates.nsmallest(TOGETHER, "latency_ms")["architecture"])
        if not texts or confirmed(texts[-1]):
            break
        wanted = [text for text in texts if not confirmed(text)][-TOGETHER:]
        rng = random.Random(f"frontier {session}")
        took, shares = measure_shares(
            supernet, [Architecture.parse(text) for text in wanted], batch_size, rng, dtype=dtype
        )
        dense_times.append(took / LATENCY.scale)
        for text, share in zip(wanted, shares, strict=True):
            sessions.setdefault(text, []).append(share)
        new = {
            text: (statistics.median(share.median for share in each), max(share.high for share in each))
            for text, each in sessions.items()
        }
        timed = Timed(statistics.median(dense_times), {**timed.shares, **new})
        advance(sum(map(len, sessions.values())), f"dense: {timed.dense_ms:.4g} ms per image")
    return timed
