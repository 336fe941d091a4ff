"""Samplers on tables of true scores: how much of the true frontier after how many evaluations, over many seeds.

    python results/samplers/study.py results/digits-bench/benchmark.csv.gz --out results/samplers/digits

An evaluation is an architecture scored for the first time; one that is proposed again is answered from the record and
counts for nothing. Hypervolume is a share of the true frontier's, between the frontier's own worst accuracy and worst
cost (its nadir). A run goes on to the last checkpoint, and from there until it has 99 %. A sampler is asked at most 3,000
times (TPE 400: it asks most slowly, and repeats itself most); where that gives fewer distinct architectures than a
checkpoint wants, it stays at what it had reached.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

from poolshare.search.analysis.pareto import frontier, hypervolume
from poolshare.search.samplers.benchmark import Benchmark
from poolshare.search.samplers.propose import PROPOSERS, Scored, decode, distributions, encode
from poolshare.search.study.loop import GENERATION
from poolshare.space import Architecture

CHECKPOINTS = (50, 100, 200, 400)
EVALUATIONS = CHECKPOINTS[-1]
WANTED = 0.99  # of the true frontier's hypervolume
NEVER = 1e15  # evaluations
STEP = 10  # evaluations between two looks at the hypervolume
ASKS = {"tpe": 400}
MOST_ASKS = 3000
POPULATION = 50  # of NSGA-II and AutoFormer's

Score = Callable[[Architecture], Scored]
Run = Iterator[Architecture]  # what is proposed, in order; the next is asked for when this one is scored


def ours(table: Benchmark, score: Score, seed: int, name: str, size: int = GENERATION) -> Run:
    """A proposer of `propose`, in the generations of `study`."""
    problem, record, generation = table.problem(), [], 0
    while proposals := PROPOSERS[name](problem.allowed, table.macs, record, f"{name} {seed} {generation}", size):
        yield from proposals
        record += map(score, proposals)
        generation += 1


def by_optuna(table: Benchmark, score: Score, seed: int, make: Callable[[int], BaseSampler]) -> Run:
    """An Optuna sampler through the total encoding, told after each ask: the best it can have."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(seed))
    while True:
        trial = study.ask(distributions(table.space))
        architecture = decode(trial.params, table.space)
        yield architecture
        study.tell(trial, [score(architecture).score, score(architecture).cost])


def autoformer(
    table: Benchmark, score: Score, seed: int, population: int = POPULATION, parents: int = 10, rate: float = 0.2
) -> Run:
    """The evolution of AutoFormer (2107.00651): half mutations, half crossovers of the most accurate parents.

    It searches for one budget; here the budget goes round five, one each generation, to cover a frontier. Genes are
    those of the total encoding, each mutated with probability `rate`; what was seen already is drawn again.
    """
    rng, space = random.Random(f"autoformer {seed}"), table.space
    genes = {name: _values(distribution) for name, distribution in distributions(space).items()}
    draw = lambda: {name: rng.choice(values) for name, values in genes.items()}  # noqa: E731
    cheapest, dense = (table.macs.total(a) for a in (space.cheapest(table.macs), space[0]))
    seen: set[Architecture] = set()
    generation = 0
    while True:
        limit = cheapest + (dense - cheapest) * (generation % 5 + 1) // 5
        best = sorted((s for a in seen if (s := score(a)).cost <= limit), key=lambda s: (-s.score, str(s.architecture)))
        pool = [encode(s.architecture, space) for s in best[:parents]]
        for index in range(population):
            for _ in range(100):
                if not pool:
                    child = draw()
                elif index % 2:
                    parent, fresh = rng.choice(pool), draw()
                    child = {name: fresh[name] if rng.random() < rate else parent[name] for name in genes}
                else:
                    pair = rng.choice(pool), rng.choice(pool)
                    child = {name: rng.choice(pair)[name] for name in genes}
                architecture = decode(child, space)
                if architecture not in seen and table.macs.total(architecture) <= limit:
                    break
            yield architecture
            seen.add(architecture)
        generation += 1


def _values(distribution: optuna.distributions.BaseDistribution) -> list:
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return list(range(distribution.low, distribution.high + 1))
    return list(distribution.choices)  # type: ignore[attr-defined]


SAMPLERS: dict[str, Callable[[Benchmark, Score, int], Run]] = {
    **{name: partial(ours, name=name) for name in PROPOSERS},
    "nsga2": partial(by_optuna, make=lambda seed: NSGAIISampler(population_size=POPULATION, seed=seed)),
    "tpe": partial(by_optuna, make=lambda seed: TPESampler(multivariate=True, seed=seed)),
    "autoformer": autoformer,
}


def race(table: Benchmark, sampler: str, seed: int, evaluations: int) -> pd.DataFrame:
    """One run: columns sampler, seed, evaluations, hypervolume (share of the true), found (true frontier points)."""
    rows = table.candidates.set_index("architecture", drop=False)
    true = frontier(table.candidates)
    reference = float(true["top1"].min()), float(true["macs"].max())
    whole = hypervolume(true, reference)
    known = {text: Scored(a, top1, macs) for a, text, top1, macs in
             zip(table.space, rows["architecture"], rows["top1"], rows["macs"], strict=True)}  # fmt: skip
    evaluated: dict[str, None] = {}
    looks: list[tuple[int, float, int]] = []
    asked = islice(SAMPLERS[sampler](table, lambda a: known[str(a)], seed), ASKS.get(sampler, MOST_ASKS))
    for text in map(str, asked):
        if text in evaluated:
            continue
        evaluated[text] = None
        if len(evaluated) % STEP == 0:
            best = frontier(rows.loc[list(evaluated)])
            points = set(zip(best["top1"], best["macs"], strict=True))
            found = sum(point in points for point in zip(true["top1"], true["macs"], strict=True))
            looks.append((len(evaluated), hypervolume(best, reference) / whole, found))
            if len(evaluated) >= evaluations or (len(evaluated) >= EVALUATIONS and looks[-1][1] >= WANTED):
                break
    result = pd.DataFrame(looks, columns=["evaluations", "hypervolume", "found"])
    return result.assign(sampler=sampler, seed=seed)[["sampler", "seed", "evaluations", "hypervolume", "found"]]


def summarise(runs: pd.DataFrame, points: int) -> str:
    """The table of the README: medians and quartiles over seeds."""
    titles = ["sampler", *(f"{n}" for n in CHECKPOINTS), f"true points of {points}", "evaluations to 99 %", "distinct"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, part in runs.groupby("sampler", sort=False):
        by_seed = [one.set_index("evaluations") for _, one in part.groupby("seed")]
        reached = lambda column, n: [one[column][one.index <= n].iloc[-1] for one in by_seed]  # noqa: B023, E731
        cells = [_quartiles(np.multiply(100, reached("hypervolume", n)), 1) for n in CHECKPOINTS]
        there = [next(iter(one.index[one["hypervolume"] >= WANTED]), np.inf) for one in by_seed]
        cells += [_quartiles(reached("found", EVALUATIONS), 0), _quartiles(there, 0, int(part["evaluations"].max()))]
        cells.append(_quartiles([one.index.max() for one in by_seed], 0))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _quartiles(values: Sequence[float] | np.ndarray, digits: int, last: int = 0) -> str:
    """Median (lower to upper quartile); infinite is what was not reached within `last`, and nothing lies halfway to it."""
    finite = np.minimum(np.asarray(values, dtype=float), NEVER)
    text = lambda value: f"> {last:,}" if value > last > 0 else f"{value:,.{digits}f}"  # noqa: E731
    low, middle, high = map(text, np.quantile(finite, (0.25, 0.5, 0.75)))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="beginning of the names of the two files to write")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=3000)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = Benchmark.load(arguments.benchmark)
    path = Path(f"{arguments.out}.csv")
    runs = []
    if path.exists():  # of the samplers that are not run again
        earlier = pd.read_csv(path)
        runs.append(earlier[~earlier["sampler"].isin(arguments.samplers.split(","))])
    for sampler in arguments.samplers.split(","):
        start = time.monotonic()
        runs += [race(table, sampler, seed, arguments.evaluations) for seed in range(arguments.seeds)]
        print(f"{sampler}: {time.monotonic() - start:.0f} s", flush=True)
    frame = pd.concat(runs, ignore_index=True)
    frame.to_csv(path, index=False, float_format="%.6f")
    text = summarise(frame, len(frontier(table.candidates)))
    Path(f"{arguments.out}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
