"""A pretrained ViT-Tiny on EuroSAT: searched models beside dense, hand-made schedules and random draws of equal cost.

    python results/eurosat/reproduce.py --data DATA/eurosat --weights vit_tiny_patch16_224.safetensors
    python results/eurosat/reproduce.py … --img-size 224 --seeds 10 --device cuda --jobs 10 --workers 4

Three supernets are trained and searched from the command line: one within each budget (`--recipe within=`), and one by
the sandwich over the whole space. Then, with each seed, every competitor is fine-tuned by the same recipe and tested:

    searched   the best score of the supernet that was trained within the budget
    finalist   the best of its eight best and the uniform schedule, after two epochs of training alone (`poolshare finalists`)
    sandwich   the best score within the budget of the supernet that was trained on the whole space
    uniform    hand-made: one reduction (mean over the grid), as late as the budget asks
    tome       hand-made: ToMe with the same number of merges in every layer
    random     another architecture of the budget for each seed

All of a budget begin at the weights of the supernet that was trained within it, `sandwich` and the dense model at the
sandwich's. `searched` and `uniform` are trained from there too, and the dense model from ImageNet's. All who learn with one
seed see the same images. `--jobs`: processes at once, one for each seed. Some 6 hours on one core at 112 px.
Writes results/eurosat/<size>-<operators>.csv and .json, and resumes after the last training of each seed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from rich.console import Console
from scipy.stats import ttest_1samp

from poolshare.search.export import load_supernet
from poolshare.search.pareto import pick
from poolshare.search.progress import progress_bar
from poolshare.search.report import load_report
from poolshare.search.run import RunFolder, versions, write_csv, write_json
from poolshare.space import Architecture
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs
from poolshare.supernet.data import Data, open_data
from poolshare.supernet.recipe import Recipe
from poolshare.supernet.subnet import checkpoint_filter_fn
from poolshare.supernet.train import steps_per_epoch, train_model
from poolshare.supernet.weights import load_base_weights

HERE = Path(__file__).parent
MODEL, CLASSES, DEPTH = "vit_tiny_patch16_224", 10, 12
LEVELS = {112: (49, 25, 16, 9), 224: (196, 100, 49, 25)}  # by size of the images
BUDGETS = (0.58, 0.40)  # of the dense MACs: 42 % fewer is what Token Pooling claims for DeiT
FINALISTS = ["--count", "8", "--epochs", "2"]
POOLSHARE = [sys.executable, "-c", "from poolshare.search.cli import main; main()"]


class Competitor(NamedTuple):
    """Who is trained; start: from whose weights, `imagenet` or a supernet's."""

    name: str
    budget: float  # share of the dense MACs
    start: str
    architecture: Architecture


class Bytes(list):
    """Batches of (uint8 images, labels), given as timm makes images numbers: x / 255, then (x − 0.5) / 0.5."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((images.float().div(255).sub(0.5).div(0.5), labels) for images, labels in super().__iter__())


class Remembered:
    """The augmented images of one seed on the device, bit for bit those of `data`; `train_model` takes it for a Data."""

    def __init__(self, data: Data, recipe: Recipe, device: torch.device, workers: int) -> None:
        self.classes, self.epochs = data.classes, list[Bytes]()
        for epoch in range(recipe.epochs):
            batches = data.train_loader(epoch, recipe.batch_size, full=True, workers=workers)
            self.epochs.append(Bytes(((127.5 * x + 127.5).round().byte().to(device), y.to(device)) for x, y in batches))

    def train_loader(self, epoch: int, batch_size: int, **_: Any) -> Bytes:
        """The batches of an epoch."""
        return self.epochs[epoch]


def merging_schedule(tokens: int, merges: int) -> Architecture:
    """ToMe with so many merges before every layer but the first, at most half of the tokens at once, as in ToMe."""
    runs, now = [str(tokens)], tokens
    for _ in range(DEPTH - 1):
        fewer = max(now - merges, (now + 1) // 2)
        runs.append(f"{fewer}@tome" if fewer < now else str(now))
        now = fewer
    return Architecture.parse(" ".join(runs))


def late_reduction(tokens: int, after: int, at: int) -> Architecture:
    """All tokens for `at` layers, then mean pooling of the grid."""
    return Architecture.parse(" ".join([str(tokens)] * at + [f"{after}@avg2d"] + [str(after)] * (DEPTH - at - 1)))


def dense_model(size: int) -> Architecture:
    """All tokens in all layers."""
    return Architecture.parse(" ".join([str(LEVELS[size][0])] * DEPTH))


@cache
def macs_of(architecture: Architecture, size: int) -> int:
    """MACs of one image of this size."""
    model = Subnet.from_base(MODEL, str(architecture), img_size=size, num_classes=CLASSES)
    return count_macs(model.eval(), (torch.zeros(1, 3, size, size),))


@cache
def hand_made(budget: float, size: int) -> dict[str, Architecture]:
    """The dearest schedule of each family within the budget."""
    (tokens, *fewer), limit = LEVELS[size], budget * macs_of(dense_model(size), size)

    def dearest(schedules: Sequence[Architecture]) -> list[Architecture]:  # of ever cheaper ones; none or one
        first = bisect_left(schedules, True, key=lambda one: macs_of(one, size) <= limit)
        return list(schedules[first : first + 1])

    late = [dearest([late_reduction(tokens, after, at) for at in range(DEPTH - 1, 0, -1)]) for after in fewer]
    [merging] = dearest([merging_schedule(tokens, merges) for merges in range(1, tokens // 2)])
    return {"uniform": max(chain(*late), key=lambda one: macs_of(one, size)), "tome": merging}


def within(budget: float) -> str:
    """What the supernet that was trained within the budget is called."""
    return f"within {budget:.0%}"


def search(given: argparse.Namespace, name: str, log: Path | None) -> None:
    """Train and search one supernet; within a budget, train its finalists too."""
    budget = next((budget for budget in BUDGETS if name == within(budget)), None)
    words = ["--data", given.data, "--model", MODEL, "--weights", given.weights, "--img-size", given.img_size]
    words += ["--levels", ",".join(map(str, LEVELS[given.img_size])), "--operators", given.operators]
    words += ["--sampler", "evolution", "--trials", given.trials, "--epochs", given.search_epochs, "--batch-size", 32]
    words += ["--device", given.device, "--amp", given.amp, "--workers", given.workers, "--out", given.run(name)]
    for one in BUDGETS if budget is None else [budget]:  # the hand-made ones take part in the last choice
        words += ["--include", hand_made(one, given.img_size)["uniform"]]
    if budget is not None:
        words += ["--budget", f"{budget:.0%}", "--recipe", f"within={budget}"]
    with nullcontext() if log is None else log.open("a") as stderr:
        subprocess.run([*POOLSHARE, "search", *map(str, words)], check=True, stderr=stderr)
        if budget is not None:
            more = [*FINALISTS, "--workers", given.workers, "--device", given.device]
            subprocess.run([*POOLSHARE, "finalists", given.run(name), *map(str, more)], check=True, stderr=stderr)


def competitors(given: argparse.Namespace, net: SuperNet, seed: int) -> list[Competitor]:
    """Who is trained with this seed, the most important first. net: one of the supernets."""
    space, costs = net.space, measure_macs(net)
    first = [Competitor("dense", 1.0, "sandwich", space[0])]
    later = [Competitor("dense", 1.0, "imagenet", space[0])]
    for budget in BUDGETS:
        limit, start, made = budget * costs.total(space[0]), within(budget), hand_made(budget, given.img_size)
        folder, whole = RunFolder.open(given.run(start)), RunFolder.open(given.run("sandwich"))
        chosen, of_whole = (
            Architecture.parse(pick(one.read_candidates(), "budget", limit)["architecture"]) for one in (folder, whole)
        )
        best = Architecture.parse(load_report(folder).pick("finalist").architecture)
        drawn = space.within(costs, int(0.97 * limit), int(limit)).sample(random.Random(f"eurosat {budget} {seed}"))
        first += [Competitor("searched", budget, start, chosen), Competitor("uniform", budget, start, made["uniform"])]
        later += [
            Competitor("tome", budget, start, made["tome"]),
            Competitor("random", budget, start, drawn),
            Competitor("sandwich", budget, "sandwich", of_whole),
            Competitor("finalist", budget, start, best),
            Competitor("searched", budget, "sandwich", chosen),
            Competitor("uniform", budget, "sandwich", made["uniform"]),
        ]
    return first + later


def starting_model(start: str, architecture: Architecture, given: argparse.Namespace) -> Subnet:
    """The architecture with a supernet's weights, or with ImageNet's."""
    model = Subnet.from_base(MODEL, str(architecture), img_size=given.img_size, num_classes=CLASSES)
    if start == "imagenet":
        source: torch.nn.Module = timm.create_model(MODEL, img_size=given.img_size, num_classes=CLASSES)
        load_base_weights(source, given.weights, MODEL)
    else:
        source = load_supernet(RunFolder.open(given.run(start)))
    model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model))
    return model


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
    """For each competitor and start: mean and deviation of test top-1, and its differences in points, paired by seed and
    image, from the dense model and from the searched and the uniform one that began at the same weights.

    Two 95 % intervals: over the seeds, and over the test images, where each image gives the mean over seeds of its
    difference.
    """
    found = []
    for (name, budget, start), group in table.groupby(["name", "budget", "start"], sort=False):
        row = {"name": name, "budget": budget, "start": start, "seeds": len(group)}
        row |= {"of_dense_macs": round(float(group["of_dense"].mean()), 4)}
        row |= {"top1": round(group["top1"].mean(), 3), "deviation": round(group["top1"].std(ddof=1), 3)}
        for other, at, from_where in (
            ("dense", 1.0, "sandwich"),
            ("searched", budget, start),
            ("uniform", budget, start),
        ):
            rivals = table[(table["name"] == other) & (table["budget"] == at) & (table["start"] == from_where)]
            both = group.merge(rivals, on="seed", suffixes=("", "_rival"))
            if (name, start) == (other, from_where) or both.empty:
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


def train_seed(given: argparse.Namespace, seed: int, deadline: float) -> None:
    """Fine-tune and test every competitor with one seed, into a table of its own."""
    console, device, recipe = Console(stderr=True), torch.device(given.device), recipe_of(given)
    data = open_data(
        given.data, img_size=given.img_size, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9,
        interpolation="bicubic", augmentation=recipe.augmentation,
    )  # fmt: skip
    data.seed = seed  # of order and augmentation; the splits are made
    images = Remembered(data, recipe, device, given.workers)
    console.print(f"seed {seed}: images are ready")
    for budget in BUDGETS:
        hand_made(budget, given.img_size)
    while not given.searched.exists():
        time.sleep(1)
    if given.searched.read_text():
        sys.exit("a search failed")
    table = given.rows(seed)
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    everybody = competitors(given, load_supernet(RunFolder.open(given.run("sandwich"))), seed)
    dense = macs_of(dense_model(given.img_size), given.img_size)
    for name, budget, start, architecture in everybody:
        if (name, budget, start) in {(row["name"], row["budget"], row["start"]) for row in rows}:
            continue
        same = [row for row in rows if (row["architecture"], row["start"]) == (str(architecture), start)]
        if same:  # the same training under another name
            row = same[0] | {"name": name, "budget": budget}
        elif time.time() > deadline:
            break
        else:
            torch.manual_seed(seed)
            model = starting_model(start, architecture, given).to(device)
            total = recipe.epochs * steps_per_epoch(images, recipe, full=True)  # type: ignore[arg-type]
            with progress_bar(console, f"{name} {budget:.0%} from {start}, seed {seed}", total, "steps") as advance:
                train_model(
                    model, images, recipe, seed=seed,  # type: ignore[arg-type]
                    progress=lambda step, loss, show=advance: show(step, f"loss {loss:.3f}"),
                )  # fmt: skip
            hits, macs = test_hits(model, data, device), macs_of(architecture, given.img_size)
            row = {"name": name, "budget": budget, "start": start, "seed": seed, "macs": macs, "of_dense": macs / dense}
            row |= {"correct": int(hits.sum()), "total": len(hits), "top1": 100 * hits.mean()}
            row |= {"architecture": str(architecture), "hits": packed(hits)}
        rows.append(row)
        write_csv(table, pd.DataFrame(rows))
        print(f"{name} {budget:.0%} from {start}, seed {seed}: {row['top1']:.1f} %", flush=True)


def recipe_of(given: argparse.Namespace) -> Recipe:
    """How everybody is fine-tuned."""
    return Recipe(epochs=given.epochs, batch_size=32, lr=3e-4, layer_decay=0.75, amp=given.amp)


def main() -> None:
    """Run or resume everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of train and test")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of the pretrained ViT-Tiny")
    parser.add_argument("--img-size", type=int, choices=LEVELS, default=112)
    parser.add_argument("--operators", default="avg2d", help="of the search, with commas")
    parser.add_argument("--search-epochs", type=int, default=8)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--workers", type=int, default=0, help="of each process, for its images")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no training after so many")
    parser.add_argument("--amp", choices=("none", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/eurosat-results"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # a process of --jobs
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    setting = f"{given.img_size}-{given.operators.replace(',', '-')}"
    given.run = lambda name: given.work / f"{setting} {name}".replace(" ", "-").rstrip("%")
    given.rows = lambda seed: given.work / f"{setting}-seed-{seed}.csv"
    given.searched = given.work / f"{setting}-searched"
    if given.seed is not None:
        return train_seed(given, given.seed, given.deadline)
    given.work.mkdir(parents=True, exist_ok=True)
    given.searched.unlink(missing_ok=True)
    deadline, alone = time.time() + 60 * given.minutes, given.jobs == 1

    def train(seed: int) -> None:
        words = [sys.executable, *sys.argv, "--seed", str(seed), "--deadline", str(deadline)]
        with nullcontext() if alone else (given.work / f"{setting}-seed-{seed}.log").open("a") as stderr:
            subprocess.run(words, check=True, stderr=stderr)

    names = [*map(within, BUDGETS), "sandwich"]
    with ThreadPoolExecutor(given.jobs) as pool, ThreadPoolExecutor(given.jobs) as trainers:
        logs = [None if alone else given.run(name).with_suffix(".log") for name in names]
        searching = [pool.submit(search, given, name, log) for name, log in zip(names, logs, strict=True)]
        training = [] if alone else [trainers.submit(train, seed) for seed in range(given.seeds)]  # they wait
        wait(searching)
        given.searched.write_text("".join(str(one.exception() or "") for one in searching))
        for one in searching:
            one.result()
        training = training or [trainers.submit(train, seed) for seed in range(given.seeds)]
        for one in training:
            one.result()
    tables = [pd.read_csv(given.rows(seed)) for seed in range(given.seeds) if given.rows(seed).exists()]
    rows = pd.concat(tables, ignore_index=True)
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(given.out / f"{setting}.csv", rows)
    facts = {"recipe": recipe_of(given).model_dump(), "versions": versions(), "device": given.device}
    facts |= {"device_name": torch.cuda.get_device_name(given.device) if "cuda" in given.device else "CPU"}
    facts |= {"search_epochs": given.search_epochs, "trials": given.trials, "competitors": paired(rows)}
    write_json(given.out / f"{setting}.json", facts)
    for name in names:
        folder = RunFolder.open(given.run(name))
        write_csv(
            given.out / f"{setting}-{given.run(name).name.removeprefix(setting + '-')}.csv", folder.read_candidates()
        )
    summary = pd.DataFrame(facts["competitors"]).drop(columns=["minus_searched", "minus_uniform"], errors="ignore")
    print(summary.to_string())


if __name__ == "__main__":
    main()
