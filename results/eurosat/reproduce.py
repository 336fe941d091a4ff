"""A pretrained ViT-Tiny on EuroSAT: searched models beside dense, hand-made schedules and random draws of equal cost.

    python results/eurosat/reproduce.py --data DATA/eurosat --weights vit_tiny_patch16_224.safetensors
    python results/eurosat/reproduce.py … --img-size 224 --device cuda

One supernet is trained and searched from the command line. Then, at each budget, every competitor is fine-tuned by the
same recipe with the same seeds and tested. `--starts` says how: `supernet` (default) from the weights of the supernet;
`teacher` from there, with the dense model of the same seed as teacher; `imagenet` from the ImageNet weights.
`finalist` is the best of eight candidates and the uniform schedules within the budget, after two epochs of training alone
(`poolshare finalists`); `searched` has the best supernet score. Hand-made are one reduction as late as the budget asks
(uniform pooling, mean over the grid) and ToMe with the same number of merges in every layer; random is another architecture
of the budget for each seed.
Several of these may run at once, each with its own `--names`.
About 2 hours on one core at 112 px with bf16 for one start. Writes results/eurosat/<size>-<operators>.csv and .json after every
training, and resumes after the last.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_1samp

from poolshare.search.export import load_supernet
from poolshare.search.pareto import pick
from poolshare.search.progress import progress_bar
from poolshare.search.report import load_report
from poolshare.search.run import RunFolder, versions, write_csv, write_json
from poolshare.space import Architecture, CostTable, SearchSpace
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs
from poolshare.supernet.data import Data, open_data
from poolshare.supernet.recipe import Recipe
from poolshare.supernet.subnet import checkpoint_filter_fn
from poolshare.supernet.train import steps_per_epoch, train_model
from poolshare.supernet.weights import load_base_weights

HERE = Path(__file__).parent
MODEL, CLASSES = "vit_tiny_patch16_224", 10
LEVELS = {49: (49, 25, 16, 9), 196: (196, 100, 49, 25)}
BUDGETS = (0.58, 0.40)  # of the dense MACs: 42 % fewer is what Token Pooling claims for DeiT
NAMES = ("dense", "searched", "finalist", "uniform", "tome", "random")
ORDER = (  # who is trained first, with all seeds
    {("dense", 1.0), ("searched", BUDGETS[0]), ("finalist", BUDGETS[0]), ("uniform", BUDGETS[0])},
    {("searched", BUDGETS[1]), ("finalist", BUDGETS[1]), ("uniform", BUDGETS[1])},
    {("tome", budget) for budget in BUDGETS},
    {("random", budget) for budget in BUDGETS},
)
FINALISTS = ["--count", "8", "--epochs", "2"]


def merging_schedule(depth: int, tokens: int, merges: int) -> Architecture:
    """ToMe with so many merges before every layer but the first, at most half of the tokens at once, as in ToMe."""
    runs, now = [str(tokens)], tokens
    for _ in range(depth - 1):
        fewer = max(now - merges, (now + 1) // 2)
        runs.append(f"{fewer}@tome" if fewer < now else str(now))
        now = fewer
    return Architecture.parse(" ".join(runs))


def late_reduction(depth: int, tokens: int, after: int, at: int) -> Architecture:
    """All tokens for `at` layers, then mean pooling of the grid."""
    return Architecture.parse(" ".join([str(tokens)] * at + [f"{after}@avg2d"] + [str(after)] * (depth - at - 1)))


@cache
def macs_of(architecture: Architecture, size: int) -> int:
    """MACs of one image of this size."""
    model = Subnet.from_base(MODEL, str(architecture), img_size=size, num_classes=CLASSES)
    return count_macs(model.eval(), (torch.zeros(1, 3, size, size),))


def hand_made(depth: int, tokens: int, limit: float, size: int) -> dict[str, Architecture]:
    """The dearest schedule of each family within the limit."""
    late = [late_reduction(depth, tokens, after, at) for after in LEVELS[tokens][1:] for at in range(depth - 1, 0, -1)]
    families = {"uniform": late, "tome": [merging_schedule(depth, tokens, merges) for merges in range(1, tokens // 2)]}
    found = {}
    for name, schedules in families.items():
        within = {one: cost for one in schedules if (cost := macs_of(one, size)) <= limit}
        if within:
            found[name] = max(within, key=within.__getitem__)
    return found


def competitors(folder: RunFolder, space: SearchSpace, costs: CostTable, size: int, seed: int) -> list[dict[str, Any]]:
    """Who is trained with this seed: name, budget (share of the dense MACs), architecture."""
    dense = costs.total(space[0])
    rows: list[dict[str, Any]] = [{"name": "dense", "budget": 1.0, "architecture": space[0]}]
    for budget in BUDGETS:
        limit = budget * dense
        chosen = Architecture.parse(pick(folder.read_candidates(), "budget", limit)["architecture"])
        rows.append({"name": "searched", "budget": budget, "architecture": chosen})
        best = Architecture.parse(load_report(folder, f"{budget:.0%}").pick("finalist").architecture)
        rows.append({"name": "finalist", "budget": budget, "architecture": best})
        drawn = space.within(costs, 0.97 * limit, limit).sample(random.Random(f"eurosat {budget} {seed}"))
        rows.append({"name": "random", "budget": budget, "architecture": drawn})
        for name, schedule in hand_made(space.depth, space.levels[0], limit, size).items():
            rows.append({"name": name, "budget": budget, "architecture": schedule})
    return rows


@torch.inference_mode()
def test_hits(model: Any, data: Data, device: torch.device) -> np.ndarray:
    """Whether each test image was classified correctly, (images,) of bool."""
    model.eval()
    batches = data.eval_loader("test", 250)
    return np.concatenate([(model(x.to(device)).argmax(-1).cpu() == y).numpy() for x, y in batches])


def packed(hits: np.ndarray) -> str:
    """Eight images a byte, in hexadecimal."""
    return np.packbits(hits).tobytes().hex()


def unpacked(text: str, images: int) -> np.ndarray:
    """What `packed` made text of."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:images]


def interval(values: np.ndarray) -> list[float]:
    """The 95 % t-interval of a mean."""
    return [round(float(end), 3) for end in ttest_1samp(values, 0).confidence_interval(0.95)]


def paired(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each competitor and start: mean and deviation of test top-1, and its differences from dense and from the
    searched model of the same budget, in points, paired by seed and by image.

    Who is compared began at the same place. Two 95 % intervals: over the seeds, and over the test images, where each
    image gives the mean over seeds of its difference.
    """
    found = []
    for (start, budget, name), group in table.groupby(["start", "budget", "name"], sort=False):
        row = {"start": start, "budget": budget, "name": name, "seeds": len(group)}
        row |= {"of_dense_macs": round(float(group["of_dense"].mean()), 4)}
        row |= {"top1": round(group["top1"].mean(), 3), "deviation": round(group["top1"].std(ddof=1), 3)}
        for other, at in (("dense", 1.0), ("searched", budget)):
            rivals = table[(table["name"] == other) & (table["budget"] == at)]
            # Who began at a supernet that never trained the dense network is compared with the dense one of the other.
            rivals = rivals[rivals["start"] == (start if start in set(rivals["start"]) else "supernet")]
            both = group.merge(rivals, on="seed", suffixes=("", "_rival"))
            if name == other or both.empty:
                continue
            images = int(group["total"].iloc[0])
            ours, theirs = (
                np.stack([unpacked(text, images) for text in both[column]]).astype(float)
                for column in ("hits", "hits_rival")
            )
            gaps = 100 * (ours - theirs)
            row[f"minus_{other}"] = round(gaps.mean(), 3)
            row[f"minus_{other}_over_seeds"] = interval(gaps.mean(1)) if len(gaps) > 1 else None
            row[f"minus_{other}_over_images"] = interval(gaps.mean(0))
        found.append(row)
    return found


class Remembered(torch.nn.Module):
    """A teacher that is asked once for each batch: all who learn with one seed see the same images."""

    def __init__(self, teacher: Subnet) -> None:
        super().__init__()
        self.teacher, self.answers = teacher, dict[bytes, torch.Tensor]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        key = blake2b(images.cpu().numpy().tobytes(), digest_size=16).digest()
        if key not in self.answers:
            self.answers[key] = self.teacher(images)
        return self.answers[key]


def starting_model(start: str, architecture: Architecture, trained: SuperNet, weights: Path, size: int) -> Subnet:
    """The architecture with the supernet's weights, or with ImageNet's."""
    model = Subnet.from_base(MODEL, str(architecture), img_size=size, num_classes=CLASSES)
    if start == "imagenet":
        source: torch.nn.Module = timm.create_model(MODEL, img_size=size, num_classes=CLASSES)
        load_base_weights(source, weights, MODEL)
    else:
        source = trained
    model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model))
    return model


def dense_weights(work: Path, setting: str, seed: int) -> Path:
    """Where the dense model of this seed is kept as teacher."""
    return work / f"{setting}-dense-{seed}.safetensors"


def main() -> None:
    """Run or resume everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of train and test")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of the pretrained ViT-Tiny")
    parser.add_argument("--img-size", type=int, choices=(112, 224), default=112)
    parser.add_argument("--operators", default="avg2d", help="of the search, with commas")
    parser.add_argument("--search-epochs", type=int, default=8)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--starts", default="supernet", help="supernet, teacher, imagenet, or several with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--names", default=",".join(NAMES), help="of the competitors to train, with commas")
    parser.add_argument("--also", metavar="NAME=ARCHITECTURE", help="one more competitor at the first budget")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="RUN", help="begin at this run's supernet, not at the script's"
    )
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--amp", choices=("none", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/eurosat-results"))
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    console, device = Console(stderr=True), torch.device(given.device)
    tokens = (given.img_size // 16) ** 2
    setting = f"{given.img_size}-{given.operators.replace(',', '-')}"
    run = given.work / f"run-{setting}"
    command = "from poolshare.search.cli import main; main()"
    words = ["--data", given.data, "--model", MODEL, "--weights", str(given.weights), "--img-size", str(given.img_size)]
    words += ["--levels", ",".join(map(str, LEVELS[tokens])), "--operators", given.operators, "--sampler", "evolution"]
    words += ["--trials", str(given.trials), "--epochs", str(given.search_epochs), "--batch-size", "32"]
    words += ["--device", given.device, "--amp", given.amp, "--workers", str(given.workers), "--out", str(run)]
    base = Subnet.from_base(MODEL, " ".join([str(tokens)] * 12), img_size=given.img_size, num_classes=CLASSES)
    dense_cost = count_macs(base.eval(), (torch.zeros(1, 3, given.img_size, given.img_size),))
    for budget in BUDGETS:  # the uniform ones take part in the last choice
        words += ["--include", str(hand_made(12, tokens, budget * dense_cost, given.img_size)["uniform"])]
    subprocess.run([sys.executable, "-c", command, "search", *words], check=True)
    for budget in BUDGETS:
        subprocess.run(
            [sys.executable, "-c", command, "finalists", str(run), "--budget", f"{budget:.0%}", *FINALISTS], check=True
        )
    folder = RunFolder.open(run)
    trained = load_supernet(folder)
    costs = measure_macs(trained)
    recipe = Recipe(epochs=given.epochs, batch_size=32, lr=3e-4, layer_decay=0.75, amp=given.amp)
    data = open_data(
        given.data, img_size=given.img_size, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9,
        interpolation="bicubic", augmentation=recipe.augmentation,
    )  # fmt: skip

    given.out.mkdir(parents=True, exist_ok=True)
    table = given.out / f"{setting}.csv"
    dense_macs = costs.total(trained.space[0])
    source = trained if given.source is None else load_supernet(RunFolder.open(given.source))
    starts = given.starts.split(",") if given.source is None else [given.source.name]
    also, _, text = (given.also or "").partition("=")
    order = ({(also, BUDGETS[0])},) if also else ORDER
    names = [also] if also else given.names.split(",")
    todo = [(start, stage, seed) for start in starts for stage in order for seed in range(given.seeds)]
    teachers: dict[int, Remembered] = {}
    for start, stage, seed in todo:
        data.seed = seed  # of order and augmentation; the splits are made
        extra = [{"name": also, "budget": BUDGETS[0], "architecture": Architecture.parse(text)}] if also else []
        for one in [*competitors(folder, trained.space, costs, given.img_size, seed), *extra]:
            architecture, name, budget = one["architecture"], one["name"], one["budget"]
            rows = pd.read_csv(table).to_dict("records") if table.exists() else []
            done = {(row["name"], row["budget"], row["start"], row["seed"]) for row in rows}
            if name not in names or (name, budget) not in stage or (name, budget, start, seed) in done:
                continue
            twins = [r for r in rows if (r["architecture"], r["start"], r["seed"]) == (str(architecture), start, seed)]
            if twins:  # the same training under another name
                write_csv(table, pd.DataFrame([*rows, twins[0] | {"name": name, "budget": budget}]))
                continue
            torch.manual_seed(seed)
            model = starting_model(start, architecture, source, given.weights, given.img_size).to(device)
            guide = None
            if start == "teacher" and name != "dense":
                if seed not in teachers:
                    kept_dense = dense_weights(given.work, setting, seed)
                    if not kept_dense.is_file():
                        sys.exit(
                            f"{kept_dense} is missing: without {table}'s dense rows from teacher it is trained again"
                        )
                    dense = starting_model(start, trained.space[0], trained, given.weights, given.img_size)
                    dense.load_state_dict(load_file(kept_dense))
                    teachers[seed] = Remembered(dense)
                guide = teachers[seed]
            macs = macs_of(architecture, given.img_size)
            state = given.work / f"{setting}-{name}-{budget:g}-{start}-{seed}.training.safetensors"
            settings = {"architecture": str(architecture), "start": start, "seed": seed}
            total = recipe.epochs * steps_per_epoch(data, recipe, full=True)
            with progress_bar(console, f"{name} {budget:.0%} from {start}, seed {seed}", total, "steps") as advance:
                train_model(
                    model, data, recipe, teacher=guide, seed=seed, workers=given.workers, state=state, settings=settings,
                    progress=lambda step, loss, show=advance: show(step, f"loss {loss:.3f}"),
                )  # fmt: skip
            if start == "teacher" and name == "dense":
                save_file(model.state_dict(), dense_weights(given.work, setting, seed))
            hits = test_hits(model, data, device)
            for kept in given.work.glob(f"{state.stem}*"):
                kept.unlink()
            row = {"name": name, "budget": budget, "start": start, "seed": seed, "macs": macs}
            row |= {"of_dense": macs / dense_macs, "correct": int(hits.sum()), "total": len(hits)}
            row |= {"top1": 100 * hits.mean(), "architecture": str(architecture), "hits": packed(hits)}
            rows = pd.read_csv(table).to_dict("records") if table.exists() else []  # others may have written meanwhile
            rows.append(row)
            write_csv(table, pd.DataFrame(rows))
            facts = {"recipe": recipe.model_dump(), "versions": versions(), "threads": torch.get_num_threads()}
            facts |= {"device": given.device, "competitors": paired(pd.DataFrame(rows))}
            write_json(given.out / f"{setting}.json", facts)
            console.print(f"{name} {budget:.0%} from {start}, seed {seed}: {row['top1']:.1f} %")


if __name__ == "__main__":
    main()
