"""A model made cheaper without training: searched on some images, tested on others, beside uniform schedules.

    python results/training-free/reproduce.py imagenet IMAGES WEIGHTS --splits 0 1 2
    python results/training-free/reproduce.py eurosat EUROSAT TUNED --splits 0 --loss loss

See setting.py for IMAGES and WEIGHTS. A uniform schedule merges or drops as many tokens before every block, at equal MACs.
Writes <setting>-<split>.json; figure.py draws it. A stopped script goes on where it was: every loss is kept in --work.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise

import numpy as np
import torch
from setting import DEPTH, WIDTH, Losses, Scorer, Setting, arguments, make_net, nats

from poolshare.search.scoring import ImageScores
from poolshare.search.untrained.search import Effort, search_untrained
from poolshare.space import Architecture, Layer, SearchSpace
from poolshare.supernet import measure_macs

PUBLISHED = "tome"  # beside the operators of the space: without proportional attention


def block(patches: int) -> int:
    """MACs of one block without pooling."""
    tokens = patches + 1
    return 12 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 10 * tokens * WIDTH


def scheduled(counts: list[int], operator: str) -> Architecture:
    """The architecture with these patch tokens in its layers."""
    layers = (Layer(after, operator if after < before else None) for before, after in pairwise(counts))
    return Architecture((Layer(counts[0]), *layers))


def uniform(patches: int, operator: str, budget: float, dense: int) -> Architecture | None:
    """As many tokens less before each block, one more before the first few; blocks alone just keep the budget, if they can."""
    best: tuple[int, list[int]] = (0, [])
    for less in range(patches // DEPTH):
        for longer in range(DEPTH - 1):
            counts = [patches - less * index - min(index, longer) for index in range(DEPTH)]
            cost = dense - DEPTH * block(patches) + sum(map(block, counts))
            if cost <= budget:
                best = max(best, (cost, counts))
    return scheduled(best[1], operator) if best[1] else None


def around(schedules: list[Architecture], operators: tuple[str, ...]) -> SearchSpace:
    """A space that holds them."""
    counts = sorted({layer.tokens for schedule in schedules for layer in schedule.layers}, reverse=True)
    return SearchSpace(DEPTH, tuple(counts), operators, 1, has_cls=True)


def uniforms(operator: str, shares: list[float], dense: int, setting: Setting) -> list[Architecture]:
    """A uniform schedule for each share of the dense MACs that keeps it with the operator's own; none where none does."""
    found = []
    for share in shares:
        room, excess = share * dense, 1.0
        schedule: Architecture | None = None
        while excess > 0 and (schedule := uniform(setting.patches, operator, room, dense)):
            costs = measure_macs(make_net(setting, around([schedule], (operator,))))
            excess = costs.total(schedule) - share * dense
            room -= max(0, excess)
        found += [schedule] if schedule else []
    return found


def row(
    name: str, architecture: Architecture, macs: int, share: float, losses: ImageScores, dense: ImageScores
) -> dict:
    """Accuracy and its paired difference to dense in points with 95 %, and the mean loss in nats."""
    difference = 100 * (losses.contributions[0].astype(float) - dense.contributions[0])
    return {
        "name": name,
        "architecture": str(architecture),
        "macs": macs,
        "share": round(share, 4),
        "top1": round(100 * float(losses.contributions.mean()), 2),
        "difference": round(float(difference.mean()), 2),
        "margin": round(1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5, 2),
        "loss": round(float(nats(losses)[0]), 4),
    }


def tested(
    name: str, architectures: list[Architecture], scorer: Scorer, test: np.ndarray, reference: ImageScores
) -> list[dict]:
    """A row for each."""
    found, dense, rows = scorer(architectures, test), scorer.costs.total(scorer.net.space[0]), []
    for place, architecture in enumerate(architectures):
        one = found.of(place)
        macs = scorer.costs.total(architecture)
        used = next((layer.operator for layer in architecture.layers if layer.operator), "")
        rows.append(
            row(f"{name} {used}" if name == "uniform" else name, architecture, macs, macs / dense, one, reference)
        )
        print(rows[-1], flush=True)
    return rows


def search(split: int, scorer: Scorer, effort: Effort, budget: float) -> tuple[dict, list[Architecture]]:
    """What it took, and the frontier of its finalists by the loss on the images it saw, by rising cost."""
    places, _ = scorer.setting.places(split)
    start, dense = time.monotonic(), scorer.costs.total(scorer.net.space[0])

    def note(text: str, ahead: float = 0.0) -> None:
        print(f"{time.monotonic() - start:6.0f} s  split {split}: {text}", flush=True)

    allowed = scorer.net.space.within(scorer.costs, None, budget * dense)
    found = search_untrained(allowed, lambda a, begin, end: scorer(a, places[begin:end]), len(places), effort, note)
    frontier: list[Architecture] = []
    for architecture in found.finalists:
        if not frontier or found.race.loss(architecture) < found.race.loss(frontier[-1]):
            frontier.append(architecture)
    facts = {
        "images": len(places),
        "seconds": round(time.monotonic() - start),
        "passes": round(found.passes, 1),
        "rounds": found.rounds,
        "scored": len(found.race.losses),
        "searched": {str(architecture): round(found.race.loss(architecture), 4) for architecture in frontier},
    }
    note(f"searched: {found.passes:.1f} dense passes, {found.rounds} rounds, {len(found.race.losses)} architectures")
    return facts, frontier


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=Effort.rounds)
    parser.add_argument("--proposals", type=int, default=Effort.proposals)
    parser.add_argument("--finalists", type=int, default=Effort.finalists)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.7, 0.6, 0.5], help="of uniform schedules")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting.open(options)
    losses = Losses(setting)
    scorer = Scorer(setting.space(), setting, losses)
    dense = scorer.costs.total(scorer.net.space[0])
    operators = (PUBLISHED, *scorer.net.space.operators)
    beside = {one: uniforms(one, options.shares, dense, setting) for one in operators if options.shares}
    if beside:  # one walk over all of them
        together = Scorer(around([one for each in beside.values() for one in each], operators), setting, losses)
    for split in options.splits:
        effort = Effort(options.rounds, options.proposals, options.finalists, split)
        facts, frontier = search(split, scorer, effort, options.budget)
        _, test = setting.places(split)
        reference = scorer([scorer.net.space[0]], test)
        rows = [row("dense", scorer.net.space[0], dense, 1.0, reference, reference)]
        rows += tested("searched", frontier, scorer, test, reference)
        if beside:
            rows += tested("uniform", [one for each in beside.values() for one in each], together, test, reference)
        result = vars(options) | {"split": split, "levels": scorer.net.space.levels, **facts, "rows": rows}
        name = f"{options.setting}-{split}" + ("" if options.loss == "divergence" else f"-{options.loss}")
        name += "" if options.searched is None else f"-{options.searched}"
        kept = {
            key: value
            for key, value in result.items()
            if key not in ("folder", "weights", "more_test", "work", "out", "splits")
        }
        (options.out / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
