"""Which sum of single reductions predicts what a schedule of several does: random schedules at 60 to 85 % of the MACs.

    python results/training-free/additivity.py eurosat EUROSAT TUNED --searched 200

D(layer, tokens) is the divergence from the dense model of one reduction that stays to the end. Each form adds something
up over the steps (layer, before -> after) of a schedule. "corrected" is the ridge regression of `DamageModel.fit`, "GP" the
process of `surrogate` on log divergence, alone and on what the guess leaves; these three are fitted to nine tenths of the
schedules and asked about the rest. Printed are Kendall's tau and the correlation of logarithms with what was measured,
and the tau between the two halves of the images: what any prediction of one from the other could reach.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from setting import Losses, Scorer, Setting, arguments

from poolshare.search.counts import MICRONATS
from poolshare.search.samplers.surrogate import Surrogate
from poolshare.search.untrained.damage import DamageModel, single_reductions, steps
from poolshare.space import Architecture

FOLDS = 10


def forms(model: DamageModel) -> dict[str, Callable[[Architecture], float]]:
    """Name → sum over the steps of an architecture."""
    dense = model.space.levels[0]

    def added(step: Callable[[Callable[[float], float], int, int], float]) -> Callable[[Architecture], float]:
        def total(architecture: Architecture) -> float:
            found = 0.0
            for index, before, layer in steps(architecture):
                curve = partial(model.single, str(layer.operator), index)
                found += step(curve, before.tokens, layer.tokens)
            return found

        return total

    return {
        "D(after)": added(lambda D, before, after: D(after)),
        "D(after) - D(before) / 2": added(lambda D, before, after: D(after) - D(before) / 2),
        "D(after) - D(before)": added(lambda D, before, after: D(after) - D(before)),
        "(root D(after) - root D(before)) ** 2": added(lambda D, b, a: (D(a) ** 0.5 - D(b) ** 0.5) ** 2),
        "D(dense * after / before)": added(lambda D, before, after: D(dense * after / before)),
        "D(dense - before + after)": added(lambda D, before, after: D(dense - before + after)),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--schedules", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting.open(options)
    scorer = Scorer(setting.space(), setting, Losses(setting))
    space = scorer.net.space
    dense = scorer.costs.total(space[0])
    band, rng = space.within(scorer.costs, 0.6 * dense, 0.85 * dense), random.Random(0)
    singles = single_reductions(space)
    drawn = list(dict.fromkeys(band.sample(rng) for _ in range(options.schedules)))
    schedules = [schedule for schedule in drawn if schedule not in singles]
    found = scorer([*singles, *schedules], setting.places(0)[0]).loss / MICRONATS
    measured, losses = dict(zip(singles, found.mean(1), strict=False)), found[len(singles) :]
    truth, errors = losses.mean(1), losses.std(1) / losses.shape[1] ** 0.5
    model = DamageModel(space, measured)
    predictions = {name: np.array([form(a) for a in schedules]) for name, form in forms(model).items()}
    guess = np.array([model.total(architecture) for architecture in schedules])
    fitted = {name: np.zeros(len(schedules)) for name in ("corrected", "GP", "GP on the guess")}
    for fold in range(FOLDS):
        asked = np.arange(len(schedules)) % FOLDS == fold
        known, unknown = ([a for a, there in zip(schedules, mask, strict=True) if there] for mask in (~asked, asked))
        model = DamageModel(space, measured)
        model.fit(known, truth[~asked].tolist(), errors[~asked].tolist())
        fitted["corrected"][asked] = [model.total(architecture) for architecture in unknown]
        for name, start in (("GP", np.ones_like(guess)), ("GP on the guess", guess)):
            process = Surrogate(space, known, list(100 * np.log(truth / start)[~asked]), unknown)
            fitted[name][asked] = start[asked] * np.exp(process.mean / 100)
    rows = [
        {
            "form": name,
            "tau": round(float(kendalltau(values, truth).statistic), 3),
            "correlation of logs": round(float(np.corrcoef(np.log(values), np.log(truth))[0, 1]), 3),
            "measured / predicted": round(float(np.median(truth / values)), 2),
        }
        for name, values in (predictions | fitted).items()
    ]
    halves = kendalltau(losses[:, ::2].mean(1), losses[:, 1::2].mean(1)).statistic
    rows.append({"form": "one half of the images from the other", "tau": round(float(halves), 3)})
    table = pd.DataFrame(rows)
    print(f"{', '.join(space.operators)}: {len(schedules)} schedules on {losses.shape[1]} images")
    print(table.to_string(index=False))
    table.to_csv(options.out / f"{options.setting}-additivity.csv", index=False)


if __name__ == "__main__":
    main()
