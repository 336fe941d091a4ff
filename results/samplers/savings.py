"""Two ways to save image-evaluations, tried on a table of true scores: shared prefixes, and racing.

    python results/samplers/savings.py results/fashion-bench/benchmark.csv.gz

Every generation of our evolution is walked as a prefix tree; "walked": MACs of the walks over those of one by one.

- *Racing* scores a generation on an eighth of the images, then a quarter, then half, and drops who is worse than the frontier
  at its cost by a paired one-sided test at 99 %. A table has no answers image by image: they are drawn so that two
  architectures disagree on a given share of the images and both have the score of the table (hypergeometric blocks).
  "saved": of all image-evaluations; "lost": points of the true frontier that were dropped, of those proposed.
- *Larger generations* share longer prefixes but are chosen from less.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import NormalDist

import numpy as np
from study import EVALUATIONS, ours

from poolshare.search.analysis.pareto import frontier
from poolshare.search.samplers.benchmark import Benchmark
from poolshare.search.samplers.propose import Scored
from poolshare.search.study.loop import GENERATION
from poolshare.space import Architecture, forecast

STAGES = (0.125, 0.25, 0.5)
CONFIDENT = NormalDist().inv_cdf(0.99)


def generations(table: Benchmark, seed: int, size: int, evaluations: int) -> list[list[Scored]]:
    """What our evolution proposes, generation by generation, with its true scores."""
    rows = zip(table.space, table.candidates["top1"], table.candidates["macs"], strict=True)
    known = {a: Scored(a, top1, macs) for a, top1, macs in rows}
    run = ours(table, known.__getitem__, seed, "evolution", size)
    return [[known[next(run)] for _ in range(size)] for _ in range(evaluations // size)]


def walked(table: Benchmark, found: list[list[Scored]]) -> float:
    """MACs of the walks over those of one by one."""
    walks = [forecast([scored.architecture for scored in generation], table.macs) for generation in found]
    return sum(walk.cost for walk in walks) / sum(walk.one_by_one for walk in walks)


def raced(
    table: Benchmark, found: list[list[Scored]], disagree: float, rng: np.random.Generator
) -> tuple[float, set[Architecture]]:
    """The share of image-evaluations that is saved, and who was dropped, from the second generation on."""
    images = int(table.frame["total"].iloc[0])
    earlier, saved, dropped = list(found[0]), 0.0, set()
    for generation in found[1:]:
        for scored in generation:
            best = max((one.score for one in earlier if one.cost <= scored.cost), default=None)
            if best is None:
                continue
            stage = _dropped_at(round((scored.score - best) / 100 * images), images, disagree, rng)
            if stage < 1:
                saved += 1 - stage
                dropped.add(scored.architecture)
        earlier += generation
    return saved / sum(map(len, found)), dropped


def _dropped_at(ahead: int, images: int, disagree: float, rng: np.random.Generator) -> float:
    """The share of the images after which a paired test drops who is right on `ahead` images more; 1: never."""
    differ = max(round(disagree * images), abs(ahead))
    left = np.array([(differ + ahead) // 2, (differ - ahead) // 2, images - differ])  # better, worse, equal
    better = worse = taken = 0
    for stage in STAGES:
        drawn = rng.multivariate_hypergeometric(left, round(stage * images) - taken)
        left, taken = left - drawn, taken + int(drawn.sum())
        better, worse = better + int(drawn[0]), worse + int(drawn[1])
        if worse - better > CONFIDENT * np.sqrt((better + worse) * (1 - stage)):
            return stage
    return 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    table = Benchmark.load(asked.benchmark)
    true = set(frontier(table.candidates)["architecture"])
    for size in (GENERATION, 2 * GENERATION):
        runs = [generations(table, seed, size, EVALUATIONS) for seed in range(asked.seeds)]
        print(f"generations of {size}: walked {np.median([walked(table, found) for found in runs]):.1%}")
        for disagree in (0.05, 0.1, 0.2) if size == GENERATION else ():
            results = [raced(table, found, disagree, np.random.default_rng(seed)) for seed, found in enumerate(runs)]
            proposed = sum(str(one.architecture) in true for found in runs for part in found[1:] for one in part)
            lost = sum(str(architecture) in true for _, dropped in results for architecture in dropped)
            saved = np.median([share for share, _ in results])
            print(f"racing, {disagree:.0%} disagree: saved {saved:.1%}, lost {lost} of {proposed} frontier points")


if __name__ == "__main__":
    main()
