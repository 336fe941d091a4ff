"""Do supernet scores rank architectures as training them alone does, and what makes them rank better?

    python results/trust/reproduce.py fashion alone --twice 12 --data-dir DATA   # 24 architectures trained alone
    python results/trust/reproduce.py fashion plain drawn --data-dir DATA        # supernets with levers, and their scores
    python results/trust/reproduce.py fashion table                              # taus, ceilings, diagnosis; no training
    python results/trust/reproduce.py fashion cost --data-dir DATA               # counted MACs of a step of each lever

Trainings alone do not depend on the supernet: they are kept in <setting>-alone.csv, and a lever costs one supernet, whose
scores go to <setting>-scores.csv. Everything resumes after the last training that was finished.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import nn

from poolshare.search.analysis.ranking import summarise
from poolshare.search.analysis.trust import Plan, draw
from poolshare.search.config import SearchConfig
from poolshare.search.job.prepare import Job, make_supernet, prepare
from poolshare.search.job.records import versions, write_csv, write_json
from poolshare.search.scoring import answers, score_counts
from poolshare.space import Architecture, Layer, forecast
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.model import PlainSuperNet
from poolshare.supernet.training.loop import fit, train_model
from poolshare.supernet.training.sandwich import Sandwich

HERE = Path(__file__).parent
PLAN = Plan(architectures=24, twice=24, bands=4)
# Settings whose true spread exceeds their noise; that takes an operator that can do harm.
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits", "operators": ("random", "max2d"), "search_fraction": 0.4},
    "fashion": {
        "data": "torch/fashion_mnist",
        "model": "vit_tiny_patch16_224",
        "model_args": {
            "patch_size": 4,
            "embed_dim": 48,
            "depth": 6,
            "num_heads": 2,
            "mlp_ratio": 2,
            "class_token": False,
            "global_pool": "avg",
        },
        "in_chans": 1,
        "img_size": 28,
        "levels": (49, 16, 4, 1),
        "operators": ("random", "max2d"),
        "search_fraction": 0.8,
        "budget": "60%",
        "epochs": 20,
        "batch_size": 32,
        "recipe": {"hflip": 0.5, "crop_scale": 1, "color_jitter": 0},
    },
}
TRAINED, SCORED = 2_500, 10_000  # images of Fashion-MNIST, the first ones


@dataclass
class Pictures:
    """The first images of Fashion-MNIST as tensors, flipped in training: what `Data` would give, without decoding."""

    folder: Path
    seed: int = 0
    classes: tuple[str, ...] = tuple("0123456789")
    notes: tuple[str, ...] = ()
    labelled: bool = True
    images: torch.Tensor = field(init=False, repr=False)
    labels: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        raw, count = self.folder / "FashionMNIST" / "raw", TRAINED + SCORED
        pixels = np.fromfile(raw / "train-images-idx3-ubyte", np.uint8, count * 784, offset=16)
        labels = np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8, count, offset=8)
        self.images = torch.from_numpy(pixels.reshape(count, 1, 28, 28)).float() / 127.5 - 1
        self.labels = torch.from_numpy(labels).long()

    def train_loader(self, epoch: int, batch_size: int, *, epochs: int = 1, start_step: int = 0, **_: Any) -> list[Any]:
        """Batches of one epoch after the other, in an order and with flips keyed by (seed, epoch)."""
        found = []
        for now in range(epoch, epoch + epochs):
            generator = np.random.default_rng((self.seed, now))
            order = torch.from_numpy(generator.permutation(TRAINED))
            flipped = torch.from_numpy(generator.random(TRAINED) < 0.5)[:, None, None, None]
            images = torch.where(flipped, self.images[:TRAINED].flip(-1), self.images[:TRAINED])
            rows = order[: TRAINED // batch_size * batch_size].split(batch_size)[start_step if now == epoch else 0 :]
            found += [(images[row], self.labels[row]) for row in rows]
        return found

    def eval_loader(self, split: str, batch_size: int, **_: Any) -> list[Any]:
        """The images that are scored."""
        return list(zip(self.images[TRAINED:].split(batch_size), self.labels[TRAINED:].split(batch_size), strict=True))


def open_job(setting: str, data_dir: Path | None) -> Job:
    """Data, costs and an untrained supernet."""
    config = SearchConfig(**SETTINGS[setting], seed=0, device="cpu")
    if setting == "digits":
        return prepare(config)
    assert data_dir is not None, "--data-dir: where FashionMNIST/raw lies"
    return prepare(config, data=Pictures(data_dir))  # type: ignore[arg-type]


# Trained alone


def train_alone(job: Job, architecture: Architecture, seed: int) -> int:
    """Images answered right after a training from random weights; the seed is of weights and of the images' order."""
    base, options = job.supernet.base
    torch.manual_seed(seed)
    model = Subnet.from_base(base, str(architecture), **options)
    order, job.data.seed = job.data.seed, seed
    train_model(model, job.data, job.recipe, seed=seed)
    job.data.seed = order
    return right(model, job)


def right(model: nn.Module, job: Job) -> int:
    """Of the scored images."""
    return answers(model, job.data.eval_loader("search", 256)).counts.sums[0]


def alone(job: Job, table: Path, twice: int) -> None:
    """Train what is missing: everybody once, then the first ones again."""
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    done = {(row["architecture"], row["repeat"]) for row in rows}
    total = len(job.data.eval_loader("search", 1))
    for repeat in range(2):
        for index, (architecture, band) in enumerate(draw(job, PLAN)[: twice if repeat else None]):
            if (str(architecture), repeat) in done:
                continue
            correct = train_alone(job, architecture, 1000 * repeat + index)
            row = {"architecture": str(architecture), "band": band, "macs": job.macs.total(architecture)}
            rows.append(row | {"repeat": repeat, "correct": correct, "total": total})
            write_csv(table, pd.DataFrame(rows))
            print(len(rows), architecture, f"{correct / total:.2%}", flush=True)


# Supernets, by lever


@dataclass(frozen=True)
class Lever:
    """How a supernet's training, or the scoring after it, differs from the product's."""

    epochs: int = 1  # times the recipe's
    students: int = 2  # drawn across bands, beside the smallest
    within: bool = False  # bands of the budget alone
    labels: float = 0.0  # the labels' share of the students' loss; the rest is the largest network's answers
    equal: bool = False  # every network weighs the same; else the largest as much as all students together
    alone: bool = False  # neither largest nor smallest, and no distillation: all drawn across bands, on labels
    largest_first: float = 0.0  # share of the steps that train the largest alone, on labels
    alpha: bool = False  # AlphaNet's divergence in place of the cross-entropy with the largest network's answers
    norms: bool = False  # scales and shifts of LayerNorm for each pair of token count and sharing
    ema: float | None = None
    tuned: int = 0  # epochs that each architecture is trained further before it is scored, from the plain supernet


LEVERS = {
    "plain": Lever(),
    "tuned-1": Lever(tuned=1),
    "tuned-3": Lever(tuned=3),
    "students-6": Lever(students=6),
    "norms": Lever(norms=True),
    "twice": Lever(epochs=2),
    "labels-equal": Lever(labels=1.0, equal=True),
    "within": Lever(within=True),
    "four-times": Lever(epochs=4),
    "ema": Lever(ema=0.99),
    "drawn-anywhere": Lever(students=6, alone=True),
    "drawn": Lever(students=6, within=True, alone=True),
    "within-6": Lever(students=6, within=True),
    "within-labels": Lever(students=6, within=True, labels=1.0),
    "drawn-after-largest": Lever(students=6, within=True, alone=True, largest_first=0.25),
    "drawn-four-times": Lever(epochs=4, students=6, within=True, alone=True),
    "half": Lever(labels=0.5),
    "labels": Lever(labels=1.0),
    "alpha": Lever(alpha=True),
    "largest-first": Lever(largest_first=0.25),
}
TUNING_LR = 5e-4


class StateNorm(nn.Module):
    """A LayerNorm with a scale and a shift for each state; `StateNet` sets the state before every layer."""

    def __init__(self, norm: nn.LayerNorm, states: list[str]):
        super().__init__()
        self.shape, self.eps, self.state = norm.normalized_shape, norm.eps, states[0]
        self.scale, self.shift = (
            nn.ParameterDict({state: nn.Parameter(values.detach().clone()) for state in states})
            for values in (norm.weight, norm.bias)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C), normalised."""
        return F.layer_norm(tokens, self.shape, self.scale[self.state], self.shift[self.state], self.eps)


class StateNet(PlainSuperNet):
    """A supernet whose blocks have norms of their own for each (token count, own or shared map)."""

    @classmethod
    def of(cls, supernet: SuperNet) -> StateNet:
        """The same supernet, changed."""
        states = [f"{tokens} {shared}" for tokens in supernet.space.levels for shared in (False, True)]
        for block in supernet.blocks:
            block.norm1, block.norm2 = StateNorm(block.norm1, states), StateNorm(block.norm2, states)
        supernet.__class__ = cls
        return supernet  # type: ignore[return-value]

    def run_layer(self, index: int, layer: Layer, *path: Any) -> Any:
        """As before, in the state of this layer."""
        block = self.blocks[index]
        block.norm1.state = block.norm2.state = f"{layer.tokens} {layer.shared}"
        return super().run_layer(index, layer, *path)


def divergence(student: torch.Tensor, targets: torch.Tensor, clip: float = 5.0) -> torch.Tensor:
    """AlphaNet's loss (2102.07954): for each image the larger of the α-divergences −1 and 1, clipped; logits (B, C)."""
    log_q = student.log_softmax(dim=-1)
    q, ratio = log_q.detach().exp(), (targets.clamp_min(1e-12).log() - log_q.detach()).exp()
    inverse = (1 / ratio).clamp_max(clip)
    left = (q * (inverse / 2 - 0.5)).sum(-1), -(q * (0.5 - inverse) * log_q).sum(-1)  # α = −1: value, its gradient
    right = (q * ratio * ratio.log()).sum(-1), -(q * ratio * log_q).sum(-1)  # α = 1
    return torch.where(left[0] > right[0], left[1], right[1]).mean()


def draws(job: Job, lever: Lever, seed: int, steps: int) -> Callable[[int], list[Architecture]]:
    """Which architectures a step of a lever trains; `steps` in all."""
    space = job.supernet.space
    sandwich = Sandwich(space, job.macs, seed, lever.students)
    if lever.within:
        limit, low = job.allowed.high, job.macs.total(sandwich.smallest)
        borders = [low + (limit + 1 - low) * index // 8 for index in range(9)]
        sandwich.bands = [space.within(job.macs, start, stop - 1) for start, stop in pairwise(borders)]

    def at(step: int) -> list[Architecture]:
        if step < lever.largest_first * steps:
            return sandwich.at(step)[:1]
        if lever.alone:
            rng = random.Random(f"drawn {seed} {step}")
            return [rng.choice(sandwich.bands).sample(rng) for _ in range(lever.students)]
        return sandwich.at(step)

    return at


def train(job: Job, lever: Lever, seed: int, state: Path) -> SuperNet:
    """A supernet on a job's images, trained with a lever."""
    torch.manual_seed(seed)
    supernet = make_supernet(job.config, len(job.data.classes), job.config.pretrained)
    supernet = StateNet.of(supernet) if lever.norms else supernet
    recipe = job.recipe.model_copy(update={"epochs": lever.epochs * job.recipe.epochs, "ema": lever.ema})
    steps = recipe.epochs * len(job.data.train_loader(0, recipe.batch_size))
    at = draws(job, lever, seed, steps)

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        teacher, *students = model(images, at(step)).unbind(0)  # each (B, classes)
        first = F.cross_entropy(teacher, labels)
        if not students:
            return first
        targets, parts = teacher.detach().softmax(dim=-1), []
        for one in students:
            part = torch.zeros(())
            if lever.labels < 1 and not lever.alone:
                given = divergence(one, targets) if lever.alpha else F.cross_entropy(one, targets)
                part = part + (1 - lever.labels) * given
            if lever.labels or lever.alone:
                part = part + (1.0 if lever.alone else lever.labels) * F.cross_entropy(one, labels)
            parts.append(part)
        if lever.equal or lever.alone:
            return torch.stack([first, *parts]).mean() * 2  # as much as largest and students weigh else
        return first + torch.stack(parts).mean()

    fit(supernet, loss, job.data, recipe, seed=seed, state=state)
    return supernet


def tune(job: Job, supernet: SuperNet, architecture: Architecture, epochs: int, seed: int) -> int:
    """Images answered right after a few more epochs alone, from the supernet's weights."""
    model = Subnet.from_supernet(supernet, architecture)
    train_model(model, job.data, job.recipe.model_copy(update={"epochs": epochs, "lr": TUNING_LR}), seed=seed)
    return right(model, job)


def score(job: Job, names: list[str], name: str, seed: int, work: Path) -> dict[str, int]:
    """Images that each architecture answers right under a lever."""
    lever = LEVERS[name]
    begun = "plain" if lever.tuned else name
    state = work / f"{job.config.data.replace('/', '-')}-{begun}-{seed}.safetensors"
    supernet = train(job, LEVERS[begun], seed, state)
    architectures = [Architecture.parse(text) for text in names]
    if lever.tuned:
        correct = [tune(job, supernet, one, lever.tuned, seed) for one in architectures]
    else:
        counts = score_counts(supernet, architectures, job.data.eval_loader("search", 256))
        correct = [one.sums[0] for one in counts]
    return dict(zip(names, correct, strict=True))


# What came of it


def compare(setting: str) -> None:
    """Print a line of the README's table for each lever, and write all estimates to <setting>.json."""
    truths, scores = (pd.read_csv(HERE / f"{setting}-{name}.csv") for name in ("alone", "scores"))
    wide = truths.pivot(index=["architecture", "band", "macs"], columns="repeat", values="correct").reset_index()
    macs, first, total = wide["macs"].to_numpy(float), wide[0].to_numpy(float), int(truths["total"].iloc[0])
    noise = float(np.sqrt(((wide[0] - wide[1]).dropna() ** 2).mean() / 2))  # deviation of one training
    facts = {
        "n": len(wide),
        "images": total,
        "mean": float(first.mean()),
        "spread": float(first.std(ddof=1)),
        "noise": noise,
    }
    facts |= {"tau_with_macs": kendalltau(first, macs).statistic}
    groups = {
        operator: (wide["architecture"].map(first_drop) == operator).to_numpy() for operator in ("random", "max2d")
    }
    facts["alone_by_first_drop"] = {
        operator: {"n": int(some.sum()), "mean": float(first[some].mean()), "spread": float(first[some].std(ddof=1))}
        for operator, some in groups.items()
    }
    plains = scores[scores["lever"] == "plain"].set_index(["seed", "architecture"])["correct"]
    found = []
    for (lever, seed), group in scores.groupby(["lever", "seed"], sort=False):
        correct = group.set_index("architecture")["correct"]
        plain = wide["architecture"].map(plains[seed]).to_numpy(float)
        both = [(lever, correct)]
        if lever == "plain":
            both.append(("calibrated", calibrated(wide, correct)))
        for name, values in both:
            scored = truths.rename(columns={"correct": "score"})
            result = summarise(scored.assign(supernet_score=truths["architecture"].map(values)))
            score = wide["architecture"].map(values).to_numpy(float)
            row = {"lever": name, "seed": int(seed), "seconds": float(group["seconds"].iloc[0])}
            row["seconds"] = None if np.isnan(row["seconds"]) else row["seconds"]
            row |= {"mean": float(score.mean()), "score_with_macs": kendalltau(score, macs).statistic}
            row |= {"gap_with_macs": kendalltau(first - score, macs).statistic, "over_plain": gain(wide, plain, score)}
            row |= {key: result[key] for key in ("tau", "share_of_ceiling", "within")}
            row["tau_with_plain"] = kendalltau(score, plain).statistic
            row["tau_by_first_drop"] = {
                name: kendalltau(score[some], first[some]).statistic for name, some in groups.items()
            }
            facts |= {"ceiling": result["ceiling"], "ceiling_within": result["within"]["ceiling"]}
            found.append(row)
            minutes = "" if row["seconds"] is None else f"{row['seconds'] / 60:.0f} min"
            cells = [name, str(seed), text(result["tau"]), text(row["over_plain"]), text(result["within"]["tau"])]
            cells += [text(result["share_of_ceiling"]), f"{row['mean'] / total:.1%}", f"{row['gap_with_macs']:.2f}"]
            print("| " + " | ".join([*cells, minutes]) + " |")
    print({name: text(value) if "ceiling" in name else value for name, value in facts.items()})
    write_json(HERE / f"{setting}.json", facts | {"versions": versions(), "threads": 1, "levers": found})


def first_drop(architecture: str) -> str | None:
    """The operator of an architecture's first reduction."""
    return next((layer.operator for layer in Architecture.parse(architecture).layers if layer.operator), None)


def calibrated(wide: pd.DataFrame, correct: pd.Series) -> pd.Series:
    """For each architecture, accuracy alone as a line in score and MACs says it, fitted to all the others."""
    columns = np.column_stack([wide["architecture"].map(correct), wide["macs"]]).astype(float)
    design = np.column_stack([np.ones(len(wide)), (columns - columns.mean(0)) / columns.std(0)])
    fitted = []
    for index in range(len(wide)):
        others = np.arange(len(wide)) != index
        fitted.append(design[index] @ np.linalg.lstsq(design[others], wide[0].to_numpy(float)[others], rcond=None)[0])
    return pd.Series(fitted, index=wide["architecture"])


def gain(wide: pd.DataFrame, plain: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """τ minus the plain supernet's, with a 95 % interval: percentiles of a bootstrap over architectures, by band."""
    rng, values = np.random.default_rng(0), np.column_stack([wide[0], plain, score]).astype(float)
    places = [np.flatnonzero(wide["band"] == band) for band in wide["band"].unique()]

    def difference(rows: np.ndarray) -> float:
        alone, before, after = values[rows].T
        return kendalltau(after, alone).statistic - kendalltau(before, alone).statistic

    samples = [np.concatenate([rng.choice(place, len(place)) for place in places]) for _ in range(2000)]
    low, high = np.percentile([difference(rows) for rows in samples], (2.5, 97.5))
    return {"value": difference(np.arange(len(wide))), "low": float(low), "high": float(high)}


def text(estimate: dict[str, float | None]) -> str:
    """0.71 (0.52 to 0.85)."""
    return "–" if estimate["value"] is None else "{value:.2f} ({low:.2f} to {high:.2f})".format(**estimate)


def main() -> None:
    """Train alone, train supernets with levers and score, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("what", nargs="+", choices=("alone", "table", "cost", *LEVERS))
    parser.add_argument("--data-dir", type=Path, help="where FashionMNIST/raw lies")
    parser.add_argument("--seed", type=int, default=0, help="of the supernet")
    parser.add_argument("--twice", type=int, default=PLAN.architectures)
    parser.add_argument("--work", type=Path, default=Path("runs/trust"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    truths, table = (HERE / f"{options.setting}-{name}.csv" for name in ("alone", "scores"))
    for what in options.what:
        if what == "table":
            compare(options.setting)
            continue
        job = open_job(options.setting, options.data_dir)
        if what == "cost":
            for name, lever in LEVERS.items():
                at = draws(job, lever, options.seed, 300)
                counted = sum(forecast(at(step), job.macs).cost for step in range(300)) / 300
                print(f"{name}: a step costs {counted / job.macs.total(job.dense):.2f} of the dense network's")
            continue
        if what == "alone":
            alone(job, truths, options.twice)
            continue
        rows = pd.read_csv(table).to_dict("records") if table.exists() else []
        if (what, options.seed) in {(row["lever"], row["seed"]) for row in rows}:
            continue
        options.work.mkdir(parents=True, exist_ok=True)
        names, start = list(pd.read_csv(truths)["architecture"].unique()), time.monotonic()
        found = score(job, names, what, options.seed, options.work)
        seconds = round(time.monotonic() - start, 1)
        for name, correct in found.items():
            rows.append(
                {"lever": what, "seed": options.seed, "architecture": name, "correct": correct, "seconds": seconds}
            )
        write_csv(table, pd.DataFrame(rows))
        print(what, options.seed, f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
