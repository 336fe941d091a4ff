"""A pretrained ViT-Tiny on EuroSAT: searched models beside dense, hand-made schedules and random draws of equal cost.

    python results/eurosat/reproduce.py --data DATA/eurosat --weights vit_tiny_patch16_224.safetensors
    python results/eurosat/reproduce.py … --img-size 224 --device cuda --jobs 12 --workers 1 --seeds 10
        --budgets 0.58 --names dense,searched,finalist,uniform

Supernets are trained and searched from the command line: one within each budget (`--recipe within=`), and one by the
sandwich over the whole space. Then, with each seed, every competitor is fine-tuned by the same recipe and tested:

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
none of these needs are not trained. `--take NAME=ARCHITECTURE` puts one that was found elsewhere in the place of what would be
found here; with `--trials 1` nothing is searched. All who learn with one seed, `longer` aside, see the same images, which are
augmented once and kept in --work (0.15 GB an epoch and seed at 112 px, 0.6 GB at 224). Some 6 hours on one core at 112 px.
Resumes from --work after the last training; writes <size>-<operators>.csv and .json (`--files` calls them otherwise).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from functools import cache, partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from rich.console import Console
from scipy.stats import ttest_1samp

from poolshare.search.analysis.pareto import frontier, pick
from poolshare.search.exported.export import load_supernet
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.records import read_json, versions, write_csv, write_json
from poolshare.search.progress import advance_loss, progress_bar
from poolshare.search.report.report import load_report
from poolshare.space import Architecture, CostTable, PoolshareError
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs
from poolshare.supernet.data import Data, ImageFormat, Place, open_data
from poolshare.supernet.subnet import checkpoint_filter_fn
from poolshare.supernet.training.loop import steps_per_epoch, train_model
from poolshare.supernet.training.recipe import Recipe
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
    files: str  # what those in `out` are called

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


class Task(NamedTuple):
    """One thing that a process does: a supernet is searched, a seed's images augmented, or a competitor trained."""

    what: str | Competitor
    seed: int = -1  # none


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
    """The most expensive schedule of each family within the budget."""
    (tokens, *fewer), limit = LEVELS[size], budget * macs_of(dense_model(size), size)

    def most_expensive(
        schedules: Sequence[Architecture],
    ) -> list[Architecture]:  # ever cheaper ones; returns none or one
        first = bisect_left(schedules, True, key=lambda one: macs_of(one, size) <= limit)
        return list(schedules[first : first + 1])

    late = [most_expensive([late_reduction(tokens, after, at) for at in range(DEPTH - 1, 0, -1)]) for after in fewer]
    [merging] = most_expensive([merging_schedule(tokens, merges) for merges in range(1, tokens // 2)])
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
    poolshare(given, name, "search", *words)
    if any(one.name == "finalist" and name in found_in(given, one) for one in competitors(given)):
        poolshare(
            given, name, "finalists", given.run(name), *FINALISTS, "--workers", given.workers, "--device", given.device
        )


def poolshare(given: Settings, name: str, *words: object) -> None:
    """One command; after Ctrl-C, which reaches it too, it has the time to save what it has trained."""
    log = nullcontext() if given.jobs == 1 else given.run(name).with_suffix(".log").open("a")
    with log as stderr, subprocess.Popen([*POOLSHARE, *map(str, words)], stderr=stderr) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if code:
        raise RuntimeError(f"poolshare {words[0]} ended with status {code}: {given.run(name).with_suffix('.log')}")


def competitors(given: Settings) -> list[Competitor]:
    """Who is trained with every seed, the most important first."""
    first, later = [Competitor("dense", 1.0, "sandwich")], [Competitor("dense", 1.0, "imagenet")]
    for budget in given.budgets:
        own = within(budget)
        first += [Competitor("searched", budget, own), Competitor("uniform", budget, own)]
        later += [Competitor(name, budget, own) for name in ("finalist", "tome", "random")]
        later += [Competitor(name, budget, "sandwich") for name in ("sandwich", "searched", "uniform")]
    everybody = [*first, *later, Competitor("dense", 1.0, LONGER)]
    kinds = {within(budget): "within" for budget in given.budgets} | {LONGER: "longer"}
    return [one for one in everybody if one.name in given.names and kinds.get(one.start, one.start) in given.starts]


def found_in(given: Settings, one: Competitor) -> set[str]:
    """The supernet whose search finds a competitor, if any does."""
    if one.name in dict(given.take) or one.name not in ("searched", "finalist", "sandwich", "random"):
        return set()
    return {"sandwich" if one.name == "sandwich" else within(one.budget)}


def needed(given: Settings, one: Competitor) -> set[str]:
    """The supernets that must be there before a competitor can be trained."""
    return found_in(given, one) | {one.start} - {"imagenet", LONGER}


@cache
def architecture_of(given: Settings, one: Competitor, seed: int) -> Architecture:
    """What a competitor is, once its supernets are there."""
    if one.name == "dense":
        return dense_model(given.img_size)
    if one.name in ("uniform", "tome"):
        return hand_made(one.budget, given.img_size)[one.name]
    if one.name in dict(given.take):
        return Architecture.parse(dict(given.take)[one.name])
    [supernet] = found_in(given, one)
    limit = one.budget * macs_of(dense_model(given.img_size), given.img_size)
    if one.name == "random":
        space, costs = supernet_of(given, supernet).space, costs_of(given, supernet)
        among = space.within(costs, int(0.97 * limit), int(limit))
        return among.sample(random.Random(f"eurosat {one.budget} {seed}"))
    folder = RunFolder.open(given.run(supernet))
    if one.name == "finalist":
        return Architecture.parse(load_report(folder).pick("finalist").architecture)
    rows = folder.read_candidates()
    return Architecture.parse(pick(frontier(rows[rows["macs"] <= limit]), "accuracy")["architecture"])


@cache
def costs_of(given: Settings, name: str) -> CostTable:
    """MACs of a supernet's space."""
    return measure_macs(supernet_of(given, name))


@cache
def supernet_of(given: Settings, name: str) -> SuperNet:
    """A trained supernet."""
    return load_supernet(RunFolder.open(given.run(name)))


def starting_model(start: str, architecture: Architecture, given: Settings) -> Subnet:
    """The architecture with a supernet's weights, or with ImageNet's."""
    model = Subnet.from_base(MODEL, str(architecture), img_size=given.img_size, num_classes=CLASSES)
    if start in ("imagenet", LONGER):
        source: torch.nn.Module = timm.create_model(MODEL, img_size=given.img_size, num_classes=CLASSES)
        load_base_weights(source, given.weights, MODEL, fresh_head=True)
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
        Place(given.data), ImageFormat(given.img_size, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9),
        augmentation=recipe_of(given).augmentation,
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
    if images.exists() and labels.exists():
        return
    data, recipe = opened(given, seed).full, recipe_of(given)
    steps = steps_per_epoch(data, recipe)
    shape = (recipe.epochs, steps, recipe.batch_size, 3, given.img_size, given.img_size)
    pixels = np.lib.format.open_memmap(images, "w+", np.uint8, shape)
    numbers = np.empty(shape[:3], np.int64)  # a list of the batches' own would pin the heap between them: 20 MB a step
    with progress_bar(
        Console(stderr=True, quiet=given.jobs > 1), f"images of seed {seed}", recipe.epochs * steps, "steps"
    ) as show:
        for epoch in range(recipe.epochs):
            batches = data.train_loader(epoch, recipe.batch_size, workers=given.workers)
            for step, (x, y) in enumerate(batches):
                pixels[epoch, step] = (127.5 * x + 127.5).round().byte().numpy()
                numbers[epoch, step] = y.numpy()
                show(epoch * steps + step + 1, "")
    np.save(labels, numbers)


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


def train(given: Settings, one: Competitor, seed: int, architecture: Architecture) -> dict[str, Any]:
    """Fine-tune and test one competitor; its row of the table."""
    device, recipe = torch.device(given.device), recipe_of(given)
    images: Any
    if one.start == LONGER:  # these epochs more are augmented as they come
        recipe, images = (
            recipe.model_copy(update={"epochs": given.search_epochs + given.epochs}),
            opened(given, seed).full,
        )
    else:
        images = images_of(given, seed)
    torch.manual_seed(seed)
    model = starting_model(one.start, architecture, given).to(device)
    title = f"{one.name} {one.budget:.0%} from {one.start}, seed {seed}"
    total = recipe.epochs * steps_per_epoch(images, recipe)
    with progress_bar(Console(stderr=True, quiet=given.jobs > 1), title, total, "steps") as advance:
        train_model(
            model, images, recipe, seed=seed, workers=given.workers,
            progress=partial(advance_loss, advance),
        )  # fmt: skip
    hits, macs = test_hits(model, test_images(given), device), macs_of(architecture, given.img_size)
    row = {"name": one.name, "budget": one.budget, "start": one.start, "seed": seed, "macs": macs}
    row |= {"of_dense": macs / macs_of(dense_model(given.img_size), given.img_size)}
    row |= {"correct": int(hits.sum()), "total": len(hits), "top1": 100 * hits.mean()}
    return row | {"architecture": str(architecture), "hits": packed(hits)}


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
    parser.add_argument("--jobs", type=int, default=1, help="trainings and searches at once")
    parser.add_argument("--workers", type=int, default=0, help="of each process, for its images")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no training after so many")
    parser.add_argument("--amp", choices=("none", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/eurosat-results"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--files", default="", help="what those in --out are called; default: <size>-<operators>")
    options = vars(parser.parse_args())
    given = Settings(**options | {"take": tuple(options["take"])})
    given = given._replace(files=given.files or given.setting)
    if unknown := {*given.names} - {*NAMES}:
        parser.error(f"--names {', '.join(unknown)}: there are {', '.join(NAMES)}")
    if unknown := {*given.starts} - {*STARTS}:
        parser.error(f"--starts {', '.join(unknown)}: there are {', '.join(STARTS)}")
    if odd := [
        budget for budget in given.budgets if not 0 < budget < 1 or round(100 * budget) != round(100 * budget, 6)
    ]:
        parser.error(f"--budgets {', '.join(map(str, odd))}: take whole percents as shares, such as 0.58")
    for name, architecture in (one if len(one) == 2 else (one[0], "") for one in given.take):
        if name not in {"searched", "finalist"} & {*given.names} or len(given.budgets) > 1:
            parser.error(
                f"--take {name}: it is searched=… or finalist=…, one of --names, and wants a single one of --budgets"
            )
        try:
            macs = macs_of(Architecture.parse(architecture), given.img_size)
        except PoolshareError as error:
            parser.error(f"--take {name}={architecture}: {error}")
        if macs > given.budgets[0] * macs_of(dense_model(given.img_size), given.img_size):
            parser.error(f"--take {name}={architecture}: its {macs:,} MACs are over --budgets {given.budgets[0]}")
    if not competitors(given):
        parser.error(f"nobody called {', '.join(given.names)} begins at {', '.join(given.starts)}")
    given.work.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    shown, failed = run(given)
    if shown is None:
        sys.exit(f"no results: {failed} failed" if failed else "no training was finished in this time")
    for name in sorted({name for one in competitors(given) for name in found_in(given, one)}):
        table = given.out / f"{given.files}-{name.replace(' ', '-').rstrip('%')}-search.csv"
        write_csv(table, RunFolder.open(given.run(name)).read_candidates())
    print(shown.drop(columns=[column for column in shown if "searched" in column or "uniform" in column]).to_string())
    if failed:
        sys.exit(f"{failed} failed; the same command tries them again")


def run(given: Settings) -> tuple[pd.DataFrame | None, int]:
    """Do all that is missing, at most `jobs` things at once; the summary, and how many failed.

    Supernets come first, then trainings in the order of their importance, as soon as the supernets and images that they need
    are there.
    """
    begin, found, begun, done, failed = time.time(), earlier(given), set[Task](), set[Task](), 0
    everybody = competitors(given)
    supernets = [Task(name) for name in dict.fromkeys(chain(*(sorted(needed(given, one)) for one in everybody)))]
    waiting = [*supernets, *(Task(one, seed) for one in everybody for seed in range(given.seeds))]
    running = dict[Future[Any], Task]()

    def begin_one(pool: ProcessPoolExecutor) -> bool:
        """Whether there was something to begin."""
        late = time.time() > begin + 60 * given.minutes
        for task in [*waiting]:
            one, seed = task
            if isinstance(one, str):
                waiting.remove(task)
                running[pool.submit(search, given, one)] = task
                return True
            if late or not {Task(name) for name in needed(given, one)} <= done:
                continue
            architecture = architecture_of(given, one, seed)
            key, images = (one.start, str(architecture), seed), Task("images", seed)
            if key in found:  # trained, or being trained, under this name or another
                waiting.remove(task)
            elif one.start == LONGER or images in done:
                waiting.remove(task)
                found[key] = {}
                running[pool.submit(train, given, one, seed, architecture)] = task
                return True
            elif images not in begun:
                begun.add(images)
                running[pool.submit(augment, given, seed)] = images
                return True
        return False

    def finish(task: Task, row: dict[str, Any] | None) -> None:
        done.add(task)
        if row is None:
            return
        found[row["start"], row["architecture"], row["seed"]] = row
        write_csv(given.work / f"{given.setting}.csv", pd.DataFrame([row for row in found.values() if row]))
        if {*supernets} <= done:
            write_results(given, found)
        print(f"{row['name']} from {row['start']}, seed {row['seed']}: {row['top1']:.1f} %", flush=True)

    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        try:
            while True:
                while len(running) < given.jobs and begin_one(pool):
                    pass
                if not running:
                    return (write_results(given, found) if {*supernets} <= done else None), failed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    if error := future.exception():
                        failed += 1
                        print(f"{task}: {error!r}", file=sys.stderr, flush=True)
                    else:
                        finish(task, future.result())
        finally:
            pool.shutdown(cancel_futures=True)  # those that have begun are ended


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


def write_results(given: Settings, found: dict[tuple[str, str, int], dict[str, Any]]) -> pd.DataFrame | None:
    """Write table and summary of what has been trained; a training may stand there under several names."""
    rows = []
    for one, seed in product(competitors(given), range(given.seeds)):
        row = found.get((one.start, str(architecture_of(given, one, seed)), seed))
        rows += [row | {"name": one.name, "budget": one.budget}] if row else []
    if not rows:
        return None
    write_csv(given.out / f"{given.files}.csv", pd.DataFrame(rows))
    facts: dict[str, Any] = {"recipe": recipe_of(given).model_dump(), "versions": versions()}
    facts |= {"search_epochs": given.search_epochs, "trials": given.trials, "taken": dict(given.take)}
    facts |= {"competitors": paired(pd.DataFrame(rows))}
    facts |= {"device": given.device if given.device == "cpu" else torch.cuda.get_device_name(given.device)}
    write_json(given.out / f"{given.files}.json", facts)
    return pd.DataFrame(facts["competitors"])


if __name__ == "__main__":
    main()
