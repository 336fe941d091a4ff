"""ViT-Tiny with its 1,000 ImageNet classes, made cheaper without training: searched on 300 images, tested on 700 others.

    python results/training-free/reproduce.py IMAGES WEIGHTS --split 0 --out results/training-free

IMAGES is a folder with one sub-folder of pictures for each ImageNet class, in the order of its synsets; WEIGHTS is timm's
vit_tiny_patch16_224 as .safetensors. Decoded images are kept in --cache. Beside what the search finds stand the dense
model and uniform schedules: the same number of tokens less before every block, at equal MACs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.data import create_transform
from torchvision.datasets import ImageFolder

from poolshare.search.untrained.losses import MICRONATS, ImageLosses, image_losses
from poolshare.search.untrained.search import Effort, search_untrained
from poolshare.space import Architecture, CostTable, Layer, SearchSpace
from poolshare.space.presets import UNTRAINED
from poolshare.supernet import SuperNet, measure_macs

MODEL, PATCHES, DEPTH, WIDTH = "vit_tiny_patch16_224", 196, 12, 192
SEARCHED = 300  # of the 1,000 images; the others are for testing
LEVELS = (196, 178, 160, 142, 124, 106, 88, 70, 52, 34, 16)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the dense model's MACs, for the uniform schedules


def load_images(folder: Path, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(1000, 3, 224, 224) and (1000,) in a fixed random order, as the model wants them."""
    if not cache.exists():
        half = (0.5, 0.5, 0.5)
        transform = create_transform((3, 224, 224), mean=half, std=half, interpolation="bicubic", crop_pct=0.9)
        data = ImageFolder(str(folder), transform)
        order = np.random.default_rng(0).permutation(len(data))
        labels = torch.tensor([data.targets[index] for index in order])
        torch.save((torch.stack([data[index][0] for index in order]), labels), cache)
    return torch.load(cache, weights_only=True, mmap=True)


class Scorer:
    """Losses of a space's architectures on images, named by their places."""

    def __init__(self, space: SearchSpace, images: tuple[torch.Tensor, torch.Tensor], options: argparse.Namespace):
        self.net = SuperNet.from_timm(MODEL, space)
        self.net.load_state_dict(self.net.state_dict() | load_file(options.weights))
        self.costs = measure_macs(self.net)
        self.net.to(options.device)
        self.images, self.loss, self.batch = images, options.loss, options.batch

    def __call__(self, architectures: Sequence[Architecture], places: np.ndarray) -> ImageLosses:
        parts = [torch.from_numpy(places[at : at + self.batch]) for at in range(0, len(places), self.batch)]
        batches = [(self.images[0][part], self.images[1][part]) for part in parts]
        return image_losses(self.net, architectures, batches, loss=self.loss)


def block(patches: int) -> int:
    """MACs of one block without pooling."""
    tokens = patches + 1
    return 12 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 10 * tokens * WIDTH


def uniform(operator: str, budget: float, dense: int) -> Architecture:
    """As many tokens less before each block, one more before the first few; blocks alone just keep the budget."""
    best: tuple[int, list[int]] = (0, [])
    for less in range(PATCHES // DEPTH):
        for longer in range(DEPTH - 1):
            counts = [PATCHES - less * index - min(index, longer) for index in range(DEPTH)]
            cost = dense - DEPTH * block(PATCHES) + sum(map(block, counts))
            if cost <= budget:
                best = max(best, (cost, counts))
    counts = best[1]
    pairs = pairwise(counts)
    return Architecture((Layer(PATCHES), *(Layer(b, operator if b < a else None) for a, b in pairs)))


def uniform_within(
    operator: str, budget: float, dense: int, images: tuple[torch.Tensor, torch.Tensor], options: argparse.Namespace
) -> tuple[Architecture, Scorer]:
    """The uniform schedule that keeps the budget with its operators' own MACs, and what scores it."""
    room = budget
    while True:
        schedule = uniform(operator, room, dense)
        counts = tuple(dict.fromkeys(layer.tokens for layer in schedule.layers))
        alone = Scorer(SearchSpace(DEPTH, counts, (operator,), 1, True), images, options)
        excess = alone.costs.total(schedule) - budget
        if excess <= 0:
            return schedule, alone
        room -= excess


def row(name: str, architecture: Architecture, costs: CostTable, losses: ImageLosses, dense: ImageLosses) -> dict:
    """Accuracy and its paired difference to dense in points with 95 %, and the mean loss in nats."""
    difference = 100 * (losses.right[0].astype(float) - dense.right[0])
    return {
        "name": name,
        "architecture": str(architecture),
        "macs": costs.total(architecture),
        "share": round(costs.total(architecture) / costs.total(Architecture((Layer(PATCHES),) * DEPTH)), 4),
        "top1": round(100 * float(losses.right.mean()), 2),
        "difference": round(float(difference.mean()), 2),
        "margin": round(1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5, 2),
        "loss": round(float(losses.loss.mean()) / MICRONATS, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="IMAGES")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument("--split", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("images.pt"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS)
    parser.add_argument("--operators", nargs="+", default=UNTRAINED)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--loss", default="divergence")
    parser.add_argument("--searched", type=int, default=SEARCHED)
    parser.add_argument("--tested", type=int, help="of the other images; default: all of them")
    parser.add_argument("--rounds", type=int, default=Effort.rounds)
    parser.add_argument("--proposals", type=int, default=Effort.proposals)
    parser.add_argument("--finalists", type=int, default=Effort.finalists)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(exist_ok=True, parents=True)
    images = load_images(options.folder, options.cache)
    order = np.random.default_rng(options.split).permutation(len(images[1]))
    search, test = order[: options.searched], order[SEARCHED:][: options.tested]

    space = SearchSpace(DEPTH, tuple(options.levels), tuple(options.operators), max_run=1, has_cls=True)
    scorer = Scorer(space, images, options)
    dense = scorer.costs.total(space[0])
    start = time.monotonic()

    def note(text: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {text}", flush=True)

    found = search_untrained(
        space.within(scorer.costs, None, options.budget * dense),
        lambda architectures, begin, end: scorer(architectures, search[begin:end]),
        len(search),
        Effort(options.rounds, options.proposals, options.finalists, options.split),
        note,
    )
    race = found.race
    result = {
        "split": options.split,
        "images": len(search),
        "loss": options.loss,
        "levels": space.levels,
        "operators": space.operators,
        "seconds": round(time.monotonic() - start),
        "passes": round(found.passes, 1),
        "rounds": found.rounds,
        "scored": [
            {"architecture": str(a), "images": race.losses[a].images, "loss": race.loss(a)} for a in race.losses
        ],
    }
    note(f"searched: {found.passes:.1f} dense passes, {found.rounds} rounds")

    def save(rows: list[dict]) -> None:
        path = options.out / f"split-{options.split}.json"
        path.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")

    reference = scorer([space[0]], test)
    rows = [row("dense", space[0], scorer.costs, reference, reference)]
    tested = scorer(found.finalists, test)
    for place, architecture in enumerate(found.finalists):
        one = ImageLosses(tested.loss[place : place + 1], tested.right[place : place + 1])
        rows.append(row("searched", architecture, scorer.costs, one, reference) | {"searched": race.loss(architecture)})
        note(str(rows[-1]))
    save(rows)
    for share in sorted(SHARES, key=lambda share: abs(share - options.budget)):
        for operator in space.operators:
            schedule, alone = uniform_within(operator, share * dense, dense, images, options)
            rows.append(row(f"uniform {operator}", schedule, alone.costs, alone([schedule], test), reference))
            note(str(rows[-1]))
        save(rows)


if __name__ == "__main__":
    main()
