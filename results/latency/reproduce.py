"""Sums of a latency table against whole exported models it was not fitted to, beside sums of parts timed alone.

python results/latency/reproduce.py digits 1 --rounds 40      # also: digits 64, vit 1, vit 64; --device cuda
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

import numpy as np
import torch

from poolshare.space import SearchSpace
from poolshare.supernet import SuperNet
from poolshare.supernet.latency import counts, design, fit, kinds_of, time_models, time_parts, typical

HERE = Path(__file__).parent
MODELS = {
    "digits": ("digits_vit", SearchSpace(8, (64, 36, 16, 4), ("max2d",), 3), {}),
    "vit": ("vit_tiny_patch16_224", SearchSpace(12, (49, 25, 9), ("max2d",), 3), {"img_size": 112}),
}
HELD_OUT = 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, space, options = MODELS[asked.model]
    net = SuperNet.from_timm(name, space, num_classes=10, **options).to(asked.device)
    kinds, rng, batch = kinds_of(space), random.Random(0), asked.batch_size
    by_itself = time_parts(net, batch, kinds)  # (kinds,)
    chosen = design(space, kinds, 2 * len(kinds), rng)
    drawn = dict.fromkeys(space.sample(rng) for _ in range(50 * HELD_OUT))
    others = [architecture for architecture in drawn if architecture not in set(chosen)][:HELD_OUT]
    timed = (
        typical(time_models(net, [*chosen, *others], batch, asked.rounds, rng)) * 1e9 / batch
    )  # nanoseconds per image
    table = fit(kinds, by_itself, chosen, timed[: len(chosen)])
    rows = [
        (asked.model, batch, str(a), round(whole), table.total(a), round(float(counts(a, kinds) @ by_itself)))
        for a, whole in zip(others, timed[len(chosen) :], strict=True)
    ]
    suffix = "" if asked.device == "cpu" else "-gpu"
    with open(asked.out / f"{asked.model}-{batch}{suffix}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "batch", "architecture", "timed_ns", "summed_ns", "parts_alone_ns"))
        writer.writerows(rows)
    whole, summed, parts = (np.array([row[column] for row in rows]) for column in (3, 4, 5))
    for label, values in (("table", summed), ("parts alone", parts)):
        errors = abs(values / whole - 1)
        print(f"{asked.model}, batch {batch}, {label}: median {np.median(errors):.1%}, worst {errors.max():.1%}")


if __name__ == "__main__":
    main()
