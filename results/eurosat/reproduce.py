"""A pretrained ViT-Tiny on EuroSAT: searched models beside dense, hand-made schedules and random draws of equal cost.

    python results/eurosat/reproduce.py --data DATA/eurosat --weights vit_tiny_patch16_224.safetensors
    python results/eurosat/reproduce.py … --img-size 224 --device cuda --jobs 12 --workers 1 --seeds 10
        --budgets 0.58 --names dense,searched,finalist,uniform

Three supernets are trained and searched from the command line: one within each budget (`--recipe within=`), and one by
the sandwich over the whole space. Then, with each seed, every competitor is fine-tuned by the same recipe and tested:

    searched   the best score of the supernet that was trained within the budget
    finalist   the best of its eight best and, where the search has avg2d, the uniform schedule, after two epochs of training
               alone (`poolshare finalists`)
    sandwich   the best score within the budget of the supernet that was trained on the whole space
    uniform    hand-made: one reduction (mean over the grid), as late as the budget asks
    tome       hand-made: ToMe with the same number of merges in every layer
    random     another architecture of the budget for each seed

All of a budget begin at the weights of the supernet that was trained within it, `sandwich` and the dense model at the
sandwich's. `searched` and `uniform` are trained from there too, and the dense model from ImageNet's: for as many epochs, and
(`imagenet, longer`) for those of the supernet's training besides. `--starts` and `--names` say who takes part; supernets that
none of these needs are not trained. `--take NAME=ARCHITECTURE` puts one that was found elsewhere in the place of what is found
here, with `--trials 1` nothing is searched. All who learn with one seed see the same images, which are augmented once and kept
in --work (1.2 GB a seed at 112 px, 3.6 GB at 224). Some 6 hours on one core at 112 px.
Resumes from --work after the last training; writes results/eurosat/<size>-<operators>.csv and .json.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

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
from poolshare.search.run import RunFolder, read_json, versions, write_csv, write_json
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
NAMES = ("dense", "searched", "uniform", "tome", "random", "sandwich", "finalist")
LONGER = "imagenet, longer"
STARTS = ("within", "sandwich", "imagenet", "longer")  # the last is LONGER
FINALISTS = ["--count", "8", "--epochs", "2"]
POOLSHARE = [sys.executable, "-c", "from poolshare.search.cli import main; main()"]


class Settings(NamedTuple):
    """The options."""

    data: str
    weights: Path
    img_size: int
    operators: str
    budgets: tuple[float, ...]  # of the dense MACs
    names: tuple[str, ...]
    starts: tuple[str, ...]
    take: tuple[tuple[str, str], ...]  # name and architecture
    search_epochs: int
    trials: int
    epochs: int
    batch_size: int
    lr: float
    seeds: int
    jobs: int
    workers: int
    minutes: float
    amp: Literal["none", "bf16"]
    device: str
    work: Path
    out: Path

    @property
    def setting(self) -> str:
        """What its files are called."""
        return f"{self.img_size}-{self.operators.replace(',', '-')}"

    def run(self, name: str) -> Path:
        """The run folder of a supernet."""
        return self.work / f"{self.setting} {name}".replace(" ", "-").rstrip("%")


class Competitor(NamedTuple):
    """Who is trained; start: from whose weights, `imagenet` or a supernet's."""

    name: str
    budget: float  # share of the dense MACs
    start: str
    architecture: Architecture


class Epoch:
    """Batches of bytes, made numbers on the device as timm makes them: x / 255, then (x − 0.5) / 0.5."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> None:
        self.images, self.labels, self.device = images, labels, device

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in zip(self.images, self.labels, strict=True):
            yield images.to(self.device).float().div(255).sub(0.5).div(0.5), labels


class Remembered:
    """The augmented images of one seed, on a CPU bit for bit those of `Data`; `train_model` takes it for one.

    images: uint8 (epochs, steps, B, 3, H, W); labels: (epochs, steps, B).
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], device: torch.device
    ) -> None:
        self.images, self.labels, self.classes, self.device = images, labels, classes, device

    def train_loader(self, epoch: int, batch_size: int, **_: Any) -> Epoch:
        """The batches of an epoch."""
        return Epoch(self.images[epoch], self.labels[epoch], self.device)


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


def search(given: Settings, name: str) -> None:
    """Train and search one supernet; within a budget, train its finalists too."""
    budget = next((budget for budget in given.budgets if name == within(budget)), None)
    words = ["--data", given.data, "--model", MODEL, "--weights", given.weights, "--img-size", given.img_size]
    words += ["--levels", ",".join(map(str, LEVELS[given.img_size])), "--operators", given.operators]
    words += ["--sampler", "evolution", "--trials", given.trials, "--epochs", given.search_epochs]
    words += ["--batch-size", given.batch_size, "--device", given.device, "--amp", given.amp]
    words += ["--workers", given.workers, "--out", given.run(name)]
    if "avg2d" in given.operators.split(","):  # the hand-made ones take part in the last choice
        for one in given.budgets if budget is None else [budget]:
            words += ["--include", hand_made(one, given.img_size)["uniform"]]
    if budget is not None:
        words += ["--budget", f"{budget:.0%}", "--recipe", f"within={budget}"]
        words += list(chain(*(("--include", architecture) for _, architecture in given.take)))
    with nullcontext() if given.jobs == 1 else given.run(name).with_suffix(".log").open("a") as stderr:
        subprocess.run([*POOLSHARE, "search", *map(str, words)], check=True, stderr=stderr)
        if budget is not None and "finalist" in given.names and "finalist" not in dict(given.take):
            more = [*FINALISTS, "--workers", given.workers, "--device", given.device]
            subprocess.run([*POOLSHARE, "finalists", given.run(name), *map(str, more)], check=True, stderr=stderr)


def competitors(given: Settings, seed: int) -> list[Competitor]:
    """Who is trained with this seed from a supernet, the most important first."""
    one = supernet_of(given, supernets(given)[0])
    space, costs = one.space, measure_macs(one)
    first, later = [Competitor("dense", 1.0, "sandwich", space[0])], list[Competitor]()
    for budget in given.budgets:
        limit, start, made = budget * costs.total(space[0]), within(budget), hand_made(budget, given.img_size)
        drawn = space.within(costs, int(0.97 * limit), int(limit)).sample(random.Random(f"eurosat {budget} {seed}"))
        chosen = found_in(given, start, "searched", limit)
        first += [Competitor("searched", budget, start, chosen), Competitor("uniform", budget, start, made["uniform"])]
        later += [Competitor("tome", budget, start, made["tome"]), Competitor("random", budget, start, drawn)]
        if "finalist" in given.names:
            later.append(Competitor("finalist", budget, start, found_in(given, start, "finalist", limit)))
        if "sandwich" in supernets(given):
            of_whole = found_in(given, "sandwich", "sandwich", limit)
            later += [
                Competitor("sandwich", budget, "sandwich", of_whole),
                Competitor("searched", budget, "sandwich", chosen),
                Competitor("uniform", budget, "sandwich", made["uniform"]),
            ]
    return [one for one in first + later if one.name in given.names and kind(one.start) in given.starts]


def found_in(given: Settings, supernet: str, name: str, limit: float) -> Architecture:
    """The best score of a search within the limit, its best finalist, or what `--take` says."""
    folder, told = RunFolder.open(given.run(supernet)), dict(given.take)
    if name in told:
        return Architecture.parse(told[name])
    if name == "finalist":
        return Architecture.parse(load_report(folder).pick("finalist").architecture)
    return Architecture.parse(pick(folder.read_candidates(), "budget", limit)["architecture"])


def dense_alone(given: Settings) -> list[Competitor]:
    """The dense model as it is trained without any supernet."""
    if "dense" not in given.names:
        return []
    both = [Competitor("dense", 1.0, start, dense_model(given.img_size)) for start in ("imagenet", LONGER)]
    return [one for one in both if kind(one.start) in given.starts]


def kind(start: str) -> str:
    """Which of `--starts`."""
    return "within" if start.startswith("within") else "longer" if start == LONGER else start


def supernets(given: Settings) -> list[str]:
    """Those that somebody begins at or was found in."""
    needed = [*map(within, given.budgets)] if {*given.names} - {"dense", "sandwich"} else []
    of_sandwich = {*given.names} - {"tome", "random", "finalist"} and "sandwich" in given.starts
    return needed + ["sandwich"] * bool(of_sandwich)


@cache
def supernet_of(given: Settings, name: str) -> SuperNet:
    """A trained supernet."""
    return load_supernet(RunFolder.open(given.run(name)))


def starting_model(start: str, architecture: Architecture, given: Settings) -> Subnet:
    """The architecture with a supernet's weights, or with ImageNet's."""
    model = Subnet.from_base(MODEL, str(architecture), img_size=given.img_size, num_classes=CLASSES)
    if start in ("imagenet", LONGER):
        source: torch.nn.Module = timm.create_model(MODEL, img_size=given.img_size, num_classes=CLASSES)
        load_base_weights(source, given.weights, MODEL)
    else:
        source = supernet_of(given, start)
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
    image, from the dense models and from the searched and the uniform one that began at the same weights.

    Two 95 % intervals: over the seeds, and over the test images, where each image gives the mean over seeds of its
    difference.
    """
    found = []
    for (name, budget, start), group in table.groupby(["name", "budget", "start"], sort=False):
        row = {"name": name, "budget": budget, "start": start, "seeds": len(group)}
        row |= {"of_dense_macs": round(float(group["of_dense"].mean()), 4)}
        row |= {"top1": round(group["top1"].mean(), 3)}
        row |= {"deviation": round(group["top1"].std(ddof=1), 3) if len(group) > 1 else None}
        for other, rival in (
            ("dense", ("dense", 1.0, "sandwich")),
            ("dense_from_imagenet", ("dense", 1.0, "imagenet")),
            ("dense_from_imagenet_longer", ("dense", 1.0, LONGER)),
            ("searched", ("searched", budget, start)),
            ("uniform", ("uniform", budget, start)),
        ):
            rivals = table[
                (table[["name", "budget", "start"]] == pd.Series(rival, ["name", "budget", "start"])).all(axis=1)
            ]
            both = group.merge(rivals, on="seed", suffixes=("", "_rival"))
            if (name, budget, start) == rival or both.empty:
                continue
            images = int(group["total"].iloc[0])
            ours, theirs = (
                np.stack([unpacked(text, images) for text in both[column]]).astype(float)
                for column in ("hits", "hits_rival")
            )
            gaps = 100 * (ours - theirs)
            row[f"minus_{other}"], row[f"minus_{other}_pairs"] = round(gaps.mean(), 3), len(gaps)
            row[f"minus_{other}_over_seeds"] = interval(gaps.mean(1)) if len(gaps) > 1 else None
            row[f"minus_{other}_over_images"] = interval(gaps.mean(0))
        found.append(row)
    return found


def recipe_of(given: Settings) -> Recipe:
    """How everybody is fine-tuned."""
    return Recipe(epochs=given.epochs, batch_size=given.batch_size, lr=given.lr, layer_decay=0.75, amp=given.amp)


def opened(given: Settings, seed: int) -> Data:
    """The images in the order and augmentation of a seed; the splits do not depend on it."""
    data = open_data(
        given.data, img_size=given.img_size, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9,
        interpolation="bicubic", augmentation=recipe_of(given).augmentation,
    )  # fmt: skip
    data.seed = seed
    return data


def files_of(given: Settings, seed: int) -> tuple[Path, Path]:
    """Where the augmented images and their labels lie."""
    name = f"{given.setting}-{given.epochs}-{given.batch_size}-seed-{seed}"
    return given.work / f"{name}-images.npy", given.work / f"{name}-labels.npy"


def augment(given: Settings, seed: int) -> None:
    """Write the images that everybody sees with this seed."""
    images, labels = files_of(given, seed)
    if labels.exists():
        return
    data, recipe, kept = opened(given, seed), recipe_of(given), list[np.ndarray]()
    steps = steps_per_epoch(data, recipe, full=True)
    shape = (recipe.epochs, steps, recipe.batch_size, 3, given.img_size, given.img_size)
    pixels = np.lib.format.open_memmap(images, "w+", np.uint8, shape)
    with progress_bar(
        Console(stderr=True, quiet=given.jobs > 1), f"images of seed {seed}", recipe.epochs * steps, "steps"
    ) as show:
        for epoch in range(recipe.epochs):
            batches = data.train_loader(epoch, recipe.batch_size, full=True, workers=given.workers)
            for step, (x, y) in enumerate(batches):
                pixels[epoch, step] = (127.5 * x + 127.5).round().byte().numpy()
                kept.append(y.numpy())
                show(epoch * steps + step + 1, "")
    np.save(labels, np.stack(kept).reshape(shape[:3]))


@cache
def images_of(given: Settings, seed: int) -> Remembered:
    """What `augment` wrote."""
    images, labels = files_of(given, seed)
    pixels = torch.from_numpy(np.load(images, mmap_mode="c"))
    return Remembered(pixels, torch.from_numpy(np.load(labels)), test_images(given).classes, torch.device(given.device))


@cache
def test_images(given: Settings) -> Data:
    """The data set for testing; it decodes them once."""
    return opened(given, 0)


def train(given: Settings, one: Competitor, seed: int) -> dict[str, Any]:
    """Fine-tune and test one competitor; its row of the table."""
    device, recipe = torch.device(given.device), recipe_of(given)
    images: Any = images_of(given, seed)
    if one.start == LONGER:
        recipe, images = recipe.model_copy(update={"epochs": given.search_epochs + given.epochs}), opened(given, seed)
    torch.manual_seed(seed)
    model = starting_model(one.start, one.architecture, given).to(device)
    title = f"{one.name} {one.budget:.0%} from {one.start}, seed {seed}"
    total = recipe.epochs * steps_per_epoch(images, recipe, full=True)
    with progress_bar(Console(stderr=True, quiet=given.jobs > 1), title, total, "steps") as advance:
        train_model(
            model, images, recipe, seed=seed, workers=given.workers,
            progress=lambda step, loss: advance(step, f"loss {loss:.3f}"),
        )  # fmt: skip
    hits, macs = test_hits(model, test_images(given), device), macs_of(one.architecture, given.img_size)
    row = {"name": one.name, "budget": one.budget, "start": one.start, "seed": seed, "macs": macs}
    row |= {"of_dense": macs / macs_of(dense_model(given.img_size), given.img_size)}
    row |= {"correct": int(hits.sum()), "total": len(hits), "top1": 100 * hits.mean()}
    return row | {"architecture": str(one.architecture), "hits": packed(hits)}


def main() -> None:
    """Run or resume everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of train and test")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of the pretrained ViT-Tiny")
    parser.add_argument("--img-size", type=int, choices=LEVELS, default=112)
    parser.add_argument("--operators", default="avg2d", help="of the search, with commas")
    parser.add_argument(
        "--budgets",
        type=lambda text: tuple(map(float, text.split(","))),
        default=(0.58, 0.40),
        help="0.58,0.4 of the MACs",
    )
    parser.add_argument("--names", type=lambda text: tuple(text.split(",")), default=NAMES, help="of those to train")
    parser.add_argument("--starts", type=lambda text: tuple(text.split(",")), default=STARTS, help="at whose weights")
    parser.add_argument(
        "--take", type=lambda text: tuple(text.split("=", 1)), action="append", default=[], help="NAME=ARCHITECTURE"
    )
    parser.add_argument("--search-epochs", type=int, default=8)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--workers", type=int, default=0, help="of each process, for its images")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no training after so many")
    parser.add_argument("--amp", choices=("none", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/eurosat-results"))
    parser.add_argument("--out", type=Path, default=HERE)
    options = vars(parser.parse_args())
    given = Settings(**options | {"take": tuple(options["take"])})
    if unknown := {*given.names} - {*NAMES}:
        parser.error(f"--names {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if unknown := {*given.starts} - {*STARTS}:
        parser.error(f"--starts {', '.join(unknown)}: there are {', '.join(STARTS)}")
    if given.take and (len(given.budgets) > 1 or {*dict(given.take)} - {"searched", "finalist"}):
        parser.error("--take: it is searched=… or finalist=…, and wants a single one of --budgets")
    if odd := [
        budget for budget in given.budgets if not 0 < budget < 1 or round(100 * budget) != round(100 * budget, 6)
    ]:
        parser.error(f"--budgets {', '.join(map(str, odd))}: take whole percents as shares, such as 0.58")
    given.work.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    begin, found, ranked = time.time(), earlier(given), list[tuple[Competitor, int]]()
    running, failed, lock = list[Future[Any]](), list[BaseException](), Lock()

    def keep(future: Future[dict[str, Any]]) -> None:
        if future.cancelled():
            return
        if error := future.exception():
            failed.append(error)
            print(f"a training failed: {error!r}", file=sys.stderr, flush=True)
            return
        row = future.result()
        with lock:
            found[row["start"], row["architecture"], row["seed"]] = row
            write_results(given, ranked, found)
        print(f"{row['name']} from {row['start']}, seed {row['seed']}: {row['top1']:.1f} %", flush=True)

    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        searching = [pool.submit(search, given, name) for name in supernets(given)]
        augmented = [pool.submit(augment, given, seed) for seed in range(given.seeds)]

        def begin_all(everybody: Sequence[tuple[Competitor, int]]) -> None:
            with lock:
                ranked.extend(everybody)
            missing = {(one.start, str(one.architecture), seed): (one, seed) for one, seed in everybody}
            for key in missing:
                if key not in found:
                    running.append(pool.submit(train, given, *missing[key]))
                    running[-1].add_done_callback(keep)

        for one in augmented:
            one.result()
        begin_all([(one, seed) for seed in range(given.seeds) for one in dense_alone(given)])
        for one in searching:
            one.result()
        if searching:
            begin_all([(one, seed) for seed in range(given.seeds) for one in competitors(given, seed)])
        print(f"{time.time() - begin:.0f} s: {len(ranked)} competitors, seeds counted", flush=True)
        wait(running, max(begin + 60 * given.minutes - time.time(), 0))
        pool.shutdown(cancel_futures=True)  # those that have begun are ended
    if not found:
        sys.exit("no training was finished in this time")
    shown = write_results(given, ranked, found)
    for name in supernets(given):
        folder = RunFolder.open(given.run(name))
        write_csv(given.out / f"{given.run(name).name}-search.csv", folder.read_candidates())
    if failed:
        sys.exit(f"{len(failed)} trainings failed; the same command tries them again")
    print(shown.drop(columns=[column for column in shown if "searched" in column or "uniform" in column]).to_string())


def settings_of(given: Settings) -> dict[str, Any]:
    """What a row depends on beside who is trained."""
    kept = {name: getattr(given, name) for name in ("data", "search_epochs", "trials", "device")}
    return kept | {"recipe": recipe_of(given).model_dump()}


def earlier(given: Settings) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What has been trained in --work with these settings: (start, architecture, seed) → row."""
    table, settings = given.work / f"{given.setting}.csv", given.work / f"{given.setting}-settings.json"
    if not settings.exists():
        write_json(settings, settings_of(given))
    there = {name: value for name, value in read_json(settings).items() if name != "checksum"}
    if there != settings_of(given):
        sys.exit(f"{given.work} was begun with {there}: repeat these, or give another --work")
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    return {(row["start"], row["architecture"], row["seed"]): row for row in rows}


def write_results(
    given: Settings, ranked: Sequence[tuple[Competitor, int]], found: dict[tuple[str, str, int], dict[str, Any]]
) -> pd.DataFrame:
    """Write table and summary of what has been trained; a training may stand there under several names."""
    write_csv(given.work / f"{given.setting}.csv", pd.DataFrame(found.values()))
    keys = [((one.start, str(one.architecture), seed), one) for one, seed in ranked]
    rows = pd.DataFrame([found[key] | {"name": one.name, "budget": one.budget} for key, one in keys if key in found])
    write_csv(given.out / f"{given.setting}.csv", rows)
    facts: dict[str, Any] = {"recipe": recipe_of(given).model_dump(), "versions": versions()}
    facts |= {"search_epochs": given.search_epochs, "trials": given.trials, "competitors": paired(rows)}
    facts |= {"device": given.device if given.device == "cpu" else torch.cuda.get_device_name(given.device)}
    write_json(given.out / f"{given.setting}.json", facts)
    return pd.DataFrame(facts["competitors"])


if __name__ == "__main__":
    main()
