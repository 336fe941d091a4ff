"""Which operators a pretrained start should be offered: one data set, one seed, a ViT-Tiny at 112 pixels.

    python results/defaults/choose.py --data photos --weights vit_tiny.safetensors --seed 0 --out rows.csv --device cuda
    python results/defaults/choose.py --data eurosat --every 2 --weights vit_tiny.safetensors --seed 0 --out rows.csv

A dense model is tuned on 80 % of the training images. Then, within 60 % and 40 % of its MACs: uniform schedules of each
operator, and architectures searched without training, by how little they change the dense model's probabilities on the
other 20 %; all tested as they are, some retrained on all training images with the dense model as teacher. At last a short
supernet from the dense model, searched, and its finds retrained from its weights and from the dense ones.

--data is a folder with train/CLASS/… and test/CLASS/…, --weights are ImageNet's of vit_tiny_patch16_224. Appends a row
to --out after each test. Up to the supernet an earlier form took about 5 minutes on an H200 that ran six such processes
at once (README.md); on a CPU it takes hours.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from poolshare.search.counts import MICRONATS
from poolshare.search.job.records import write_csv
from poolshare.search.scoring import ImageScores, image_scores
from poolshare.space import Architecture, Band, SearchSpace
from poolshare.space.operators import grid_of
from poolshare.space.presets import even_levels
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.weights import load_base_weights

BASE, DEPTH, PIXELS, MARGIN = "vit_tiny_patch16_224", 12, 112, 8  # images are kept with a margin on every side
LEVELS = even_levels(49)
GRIDS = tuple(level for level in LEVELS if grid_of(level))
OPERATORS = ("tome", "kmeans", "avg2d", "max2d")
SPACES = {"tome": ("tome",), "kmeans": ("kmeans",), "avg2d": ("avg2d",), "mix": ("tome", "kmeans", "avg2d")}
SHARES = (0.6, 0.4)  # of the dense MACs
RETRAINED = (
    *("training-free tome 60%", "uniform tome 60%", "training-free mix 60%", "training-free avg2d 60%"),
    *(
        "uniform avg2d 60%",
        "uniform kmeans 60%",
        "uniform max2d 60%",
        "training-free tome 40%",
        "training-free mix 40%",
    ),
)
DENSE_EPOCHS, RETRAIN_EPOCHS, SUPERNET_EPOCHS = 15, 10, 5
DRAWS, GENERATION, GENERATIONS = 3, 25, 8  # generations that are drawn, architectures in each, all generations
BATCH, LR, LAYER_DECAY, DISTILL = 64, 3e-4, 0.75, 0.5

BatchLoss = Callable[[Tensor, Tensor, int], Tensor]  # (images, labels, step) -> ()


def read_images(folder: Path, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    """All images as bytes, (N, 3, 128, 128), their labels, (N,), and the names of the classes."""
    size = PIXELS + 2 * MARGIN
    prepare = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()])
    found = ImageFolder(folder, prepare)
    images, labels = zip(*(found[index] for index in range(len(found))), strict=True)
    return torch.stack(images).to(device), torch.tensor(labels, device=device), found.classes


def normalised(images: Tensor) -> Tensor:
    """Bytes to what the base model takes."""
    return images.float().div(255).sub(0.5).div(0.5)


def evaluation_batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The centre of each image, (B, 3, 112, 112), with the labels."""
    centre = normalised(images[..., MARGIN:-MARGIN, MARGIN:-MARGIN])
    return list(zip(centre.split(512), labels.split(512), strict=True))


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of 35 to 100 % of the area, half of them mirrored, by bilinear sampling where the images are."""

    def drawn() -> Tensor:
        return torch.rand(len(images), generator=generator).to(images.device)

    area, ratio = 0.35 + 0.65 * drawn(), torch.exp((2 * drawn() - 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    affine = torch.zeros(len(images), 2, 3, device=images.device)
    affine[:, 0, 0], affine[:, 1, 1] = width * (1 - 2 * (drawn() < 0.5).float()), height
    affine[:, 0, 2], affine[:, 1, 2] = (2 * drawn() - 1) * (1 - width), (2 * drawn() - 1) * (1 - height)
    grid = F.affine_grid(affine, [len(images), 3, PIXELS, PIXELS], align_corners=False)
    return F.grid_sample(normalised(images), grid, padding_mode="reflection", align_corners=False)


class Experiment:
    """One data set and seed: the images, the model whose weights change, and the rows."""

    def __init__(self, data: Path, every: int, weights: str, seed: int, out: Path, device: torch.device):
        self.name, self.seed, self.out, self.device = data.name, seed, out, device
        images, labels, classes = read_images(data / "train", device)
        self.images, self.labels = images[::every].contiguous(), labels[::every]
        test_images, test_labels, test_classes = read_images(data / "test", device)
        if test_classes != classes:
            raise SystemExit(f"{data}: train and test have other classes: {sorted({*classes} ^ {*test_classes})}")
        self.test = evaluation_batches(test_images, test_labels)
        generator = torch.Generator().manual_seed(seed)
        self.all = torch.randperm(len(self.images), generator=generator).to(device)
        held_out = self.all[: len(self.all) // 5]
        self.train80 = self.all[len(held_out) :]
        self.validation = evaluation_batches(self.images[held_out], self.labels[held_out])
        torch.manual_seed(seed)
        space = SearchSpace(DEPTH, LEVELS, OPERATORS, max_run=1)
        self.net = SuperNet.from_timm(BASE, space, img_size=PIXELS, num_classes=len(classes))
        load_base_weights(self.net, weights, BASE, fresh_head=True)
        self.net.to(device)
        self.dense, self.costs = space[0], measure_macs(self.net)
        self.pretrained = self.weights()

    # Weights, answers, rows

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are."""
        return {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def losses(self, architectures: Sequence[Architecture], batches: list, loss: str) -> ImageScores:
        with self.precision():
            return image_scores(self.net, architectures, batches, loss=loss)

    def share(self, architecture: Architecture) -> float:
        """Of the dense model's MACs."""
        return self.costs.total(architecture) / self.costs.total(self.dense)

    def row(self, what: str, stage: str, architecture: Architecture) -> None:
        """Test an architecture with the weights as they are, and write the row."""
        top1 = 100 * self.losses([architecture], self.test, "loss").contributions.mean()
        facts = {"data": self.name, "seed": self.seed, "what": what, "stage": stage}
        facts |= {"macs": round(self.share(architecture), 3), "top1": round(top1, 2), "architecture": str(architecture)}
        new = pd.DataFrame([facts])
        write_csv(self.out, pd.concat([pd.read_csv(self.out), new]) if self.out.exists() else new)
        print(new.to_string(header=False, index=False), flush=True)

    # Training

    def train(self, rows: Tensor, epochs: int, loss: BatchLoss, key: int) -> None:
        """AdamW with layer-wise decay, a warm-up over a tenth of the steps and a cosine, over these training images."""
        batch = min(BATCH, len(rows))
        steps = len(rows) // batch
        total = epochs * steps
        optimizer = create_optimizer_v2(self.net, opt="adamw", lr=LR, weight_decay=0.05, layer_decay=LAYER_DECAY)
        warmup = {"warmup_t": total // 10, "warmup_lr_init": LR / 100}
        schedule = CosineLRScheduler(optimizer, t_initial=total, t_in_epochs=False, **warmup)
        generator = torch.Generator().manual_seed(1000 * self.seed + key)
        self.net.train()
        for step in range(total):
            if step % steps == 0:
                order = rows[torch.randperm(len(rows), generator=generator).to(self.device)]
            chosen = order[step % steps * batch :][:batch]
            schedule.step_update(step)
            optimizer.zero_grad(set_to_none=True)
            loss(augmented(self.images[chosen], generator), self.labels[chosen], step).backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            optimizer.step()

    def by_labels(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The dense model's loss."""
        with self.precision():
            logits = self.net(images, [self.dense])[0]
        return F.cross_entropy(logits.float(), labels)

    def guided(self, architectures: Callable[[int], list[Architecture]]) -> BatchLoss:
        """Labels and the teacher's probabilities, half and half, over the architectures of a step."""

        def loss(images: Tensor, labels: Tensor, step: int) -> Tensor:
            with torch.no_grad(), self.precision():
                targets = self.teacher(images).float().softmax(-1)
            with self.precision():
                outputs = self.net(images, architectures(step)).float()
            parts = [
                (1 - DISTILL) * F.cross_entropy(output, labels) + DISTILL * F.cross_entropy(output, targets)
                for output in outputs
            ]
            return torch.stack(parts).mean()

        return loss

    def retrain(self, what: str, stage: str, architecture: Architecture, start: dict[str, Tensor]) -> None:
        """Train one architecture from these weights on all training images, and test it."""
        self.net.load_state_dict(start)
        self.train(self.all, RETRAIN_EPOCHS, self.guided(lambda _: [architecture]), key=5)
        self.row(what, stage, architecture)

    # Schedules and search

    def uniform(self, operator: str, share: float) -> Architecture:
        """The most expensive within the share of those that lose as many tokens before every block.

        On grids, which such steps do not fit: of those with one or two reductions.
        """
        schedules: Iterable[Sequence[int]]
        if operator in ("avg2d", "max2d"):
            single = [[49] * at + [tokens] * (DEPTH - at) for at in range(1, DEPTH) for tokens in GRIDS[1:]]
            double = [
                [49] * at + [first] * (then - at) + [second] * (DEPTH - then)
                for at, then in itertools.combinations(range(1, DEPTH), 2)
                for first, second in itertools.combinations(GRIDS[1:], 2)
            ]
            schedules = single + double
        else:
            schedules = [
                [
                    max(level for level in LEVELS if level <= max(LEVELS[-1], 49 - loss * layer))
                    for layer in range(DEPTH)
                ]
                for loss in np.linspace(0.5, 14, 200)
            ]
        found = [
            Architecture.parse(
                " ".join(
                    f"{after}@{operator}" if after < before else f"{after}"
                    for before, after in itertools.pairwise([49, *schedule])
                )
            )
            for schedule in schedules
        ]
        return max((one for one in found if self.share(one) <= share), key=self.share)

    def band(self, operators: tuple[str, ...], low: float, high: float) -> Band:
        """The architectures of these operators between two shares of the dense MACs."""
        levels = GRIDS if operators == ("avg2d",) else LEVELS
        dense = self.costs.total(self.dense)
        return SearchSpace(DEPTH, levels, operators, max_run=1).within(self.costs, low * dense, high * dense)

    def search(self, space: str, share: float, loss: str) -> Architecture:
        """The least loss on the validation images among uniform draws and then offspring of the best eight."""
        rng = random.Random(f"{self.seed} {space} {share} {loss}")
        band, scored = self.band(SPACES[space], share - 0.05, share), dict[Architecture, float]()
        for generation in range(GENERATIONS):
            best = sorted(scored, key=scored.__getitem__)[:8]
            children = [offspring(band, best if generation >= DRAWS else [], rng) for _ in range(GENERATION)]
            new = [child for child in dict.fromkeys(children) if child not in scored]
            if new:
                losses = self.losses(new, self.validation, loss).loss.mean(axis=1) / MICRONATS
                scored.update(zip(new, losses.tolist(), strict=True))
        return min(scored, key=scored.__getitem__)

    # The experiment

    def run(self) -> None:
        """All rows, in this order."""
        tuned = self.dense_models()
        self.teacher = copy.deepcopy(self.net).eval()  # without architectures: timm's own forward, the dense model
        picks = {f"uniform {name} {share:.0%}": self.uniform(name, share) for share in SHARES for name in OPERATORS}
        for share, space in itertools.product(SHARES, SPACES):
            picks[f"training-free {space} {share:.0%}"] = self.search(space, share, "divergence")
        for what, architecture in picks.items():
            self.row(what, "untrained", architecture)
        for what in RETRAINED:
            self.retrain(what, "retrained", picks[what], tuned)
        for space in ("tome", "mix"):
            self.net.load_state_dict(tuned)
            self.supernet(space, picks[f"training-free {space} 60%"], tuned)

    def dense_models(self) -> dict[str, Tensor]:
        """Tune the dense model on 80 % and on all images. Leaves it tuned on 80 %, and returns those weights."""
        for key, stage, rows, epochs in (
            (2, "15 epochs on all", self.all, DENSE_EPOCHS),
            (3, "30 epochs on all", self.all, 2 * DENSE_EPOCHS),
            (1, "15 epochs on 80 %", self.train80, DENSE_EPOCHS),
        ):
            self.net.load_state_dict(self.pretrained)
            self.train(rows, epochs, self.by_labels, key=key)
            self.row("dense", stage, self.dense)
        tuned = self.weights()
        self.train(self.all, RETRAIN_EPOCHS, self.by_labels, key=4)
        self.row("dense", "15 epochs on 80 %, 10 on all", self.dense)
        self.net.load_state_dict(tuned)
        return tuned

    def supernet(self, space: str, free: Architecture, tuned: dict[str, Tensor]) -> None:
        """A short supernet within 60 %, four architectures a step; its own find and the training-free one."""
        shares = [0.3 + 0.05 * part for part in range(6)]
        bands = [self.band(SPACES[space], low, low + 0.05) for low in shares]

        def draws(step: int) -> list[Architecture]:
            rng = random.Random(f"{self.seed} {step}")
            return [rng.choice(bands).sample(rng) for _ in range(4)]

        self.train(self.train80, SUPERNET_EPOCHS, self.guided(draws), key=7)
        trained, found = self.weights(), self.search(space, 0.6, "loss")
        finds = {f"supernet {space} 60%": found, f"training-free {space} 60%": free}
        for what, architecture in finds.items():
            self.row(what, "supernet's weights", architecture)
        for what, architecture in finds.items():
            self.retrain(what, "retrained from the supernet", architecture, trained)
        self.retrain(f"supernet {space} 60%", "retrained", found, tuned)


def offspring(band: Band, best: list[Architecture], rng: random.Random, tries: int = 50) -> Architecture:
    """A mutation or crossover of the best within the band; without any, or where none falls into it, a uniform draw."""
    for _ in range(tries if best else 0):
        parent = rng.choice(best)
        crossed = rng.random() < 0.3
        child = band.space.crossover(parent, rng.choice(best), rng) if crossed else band.space.mutate(parent, rng)
        if rng.random() < 0.5:
            child = band.space.mutate(child, rng)
        if child in band:
            return child
    return band.sample(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/… and test/CLASS/…")
    parser.add_argument("--every", type=int, default=1, help="use every so manyth training image")
    parser.add_argument("--weights", required=True, help="of vit_tiny_patch16_224, safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="CSV file, to which rows are appended")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    Experiment(given.data, given.every, given.weights, given.seed, given.out, torch.device(given.device)).run()


if __name__ == "__main__":
    main()
