"""Ways to search without training at equal cost: shortest paths, the Gaussian process on losses and on top-1, draws.

    python results/training-free/compare.py eurosat EUROSAT TUNED --splits 0 1 2

Every way may spend as many dense passes over the search images as the shortest paths took, or the given multiples
of it. What it holds best by its own score is tested on the test images: the area below the frontier of mean
divergence over cost, from half of the budget to the budget, and the best within the budget. Lower is better.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from setting import Losses, Scorer, Setting, arguments, nats

from poolshare.search.counts import MICRONATS
from poolshare.search.samplers.propose import PROPOSERS, Scored
from poolshare.search.scoring import ImageScores
from poolshare.search.study.loop import GENERATION
from poolshare.search.untrained.search import Effort, search_untrained
from poolshare.space import Architecture, Band, forecast

FINALISTS = 16  # of every way, tested on the other images

# What a way makes of an architecture's losses: higher is better, in points of 100.
WORTH: dict[str, Callable[[ImageScores], float]] = {
    "loss": lambda losses: 100 * float(np.exp(-losses.loss.mean() / MICRONATS)),
    "top1": lambda losses: 100 * float(losses.contributions.mean()),
}


def proposed(
    allowed: Band, score: Callable[[Sequence[Architecture]], ImageScores], by: str, worth: str, passes: float, seed: int
) -> tuple[list[Architecture], float]:
    """The frontier that a proposer finds for so many dense passes, at most FINALISTS of it, and what it spent."""
    costs, dense = allowed.costs, allowed.costs.total(allowed.space[0])
    record: list[Scored] = []
    spent, generation = 0.0, 0
    while spent < passes:
        proposals = PROPOSERS[by](allowed, costs, record, f"{by} {seed} {generation}", GENERATION)
        proposals = [p for p in dict.fromkeys(proposals) if p not in {r.architecture for r in record}]
        if not proposals:
            break
        while len(proposals) > 1 and spent + forecast(proposals, costs).cost / dense > passes:
            proposals.pop()
        found = score(proposals)
        for place, architecture in enumerate(proposals):
            one = found.of(place)
            record.append(Scored(architecture, WORTH[worth](one), costs.total(architecture)))
        spent += forecast([allowed.space[0], *proposals], costs).cost / dense
        generation += 1
    frontier: list[Scored] = []
    for scored in sorted(record, key=lambda s: (s.cost, -s.score)):
        if not frontier or scored.score > frontier[-1].score:
            frontier.append(scored)
    return [scored.architecture for scored in frontier[-FINALISTS:]], spent


def area(costs: Sequence[float], losses: Sequence[float], low: float, high: float) -> float:
    """Mean over all limits between low and high of the least loss that is to be had below the limit; 1 nat at most."""
    limits = np.linspace(low, high, 200)
    least = [min([loss for c, loss in zip(costs, losses, strict=True) if c <= limit] + [1.0]) for limit in limits]
    return float(np.mean(least))


def compare(scorer: Scorer, allowed: Band, split: int, options: argparse.Namespace) -> Iterator[dict]:
    """One row for each way to search on one split of the images."""
    search, test = scorer.setting.places(split)

    def row(way: str, finalists: list[Architecture], passes: float, seconds: float) -> dict:
        tested = scorer(finalists, test)
        costs = [scorer.costs.total(architecture) for architecture in finalists]
        losses = nats(tested)
        chosen = int(np.argmax(costs))  # a frontier's most expensive is its best
        return {
            "way": way,
            "split": split,
            "passes": round(passes, 1),
            "seconds": round(seconds),
            "area": round(area(costs, losses, allowed.high / 2, allowed.high), 4),
            "loss": round(float(losses[chosen]), 4),
            "top1": round(100 * float(tested.contributions[chosen].mean()), 2),
            "architecture": str(finalists[chosen]),
        }

    start = time.monotonic()
    effort = Effort(finalists=FINALISTS, seed=split)
    found = search_untrained(allowed, lambda a, begin, end: scorer(a, search[begin:end]), len(search), effort)
    seconds, frontier = time.monotonic() - start, []
    for architecture in found.finalists:
        if not frontier or found.race.loss(architecture) < found.race.loss(frontier[-1]):
            frontier.append(architecture)
    yield row("shortest paths", frontier, found.passes, seconds)
    for multiple in options.multiples:
        for by, worth in (("evolution", "loss"), ("evolution", "top1"), ("random", "loss")):
            start = time.monotonic()
            most = multiple * found.passes
            finalists, passes = proposed(allowed, lambda a: scorer(a, search), by, worth, most, split)
            yield row(f"{by} on {worth}, {multiple:g} x", finalists, passes, time.monotonic() - start)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--multiples", type=float, nargs="+", default=[1, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting.open(options)
    scorer = Scorer(setting.space(), setting, Losses(setting))
    space = scorer.net.space
    allowed = space.within(scorer.costs, None, options.budget * scorer.costs.total(space[0]))
    rows = []
    for split in options.splits:
        for row in compare(scorer, allowed, split, options):
            rows.append(row)
            print(row, flush=True)
            pd.DataFrame(rows).to_csv(options.out / f"{options.setting}-compare.csv", index=False)


if __name__ == "__main__":
    main()
