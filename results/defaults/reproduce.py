"""The defaults on several data sets: dense, searched, uniform schedules, training-free, and two papers' operators.

    python results/defaults/reproduce.py --data photos eurosat --seeds 0 1 2 --work FOLDER --device cuda
    python results/defaults/reproduce.py --data photos --ways dense "searched 60%" --threads 2
    python results/defaults/reproduce.py --table

Nothing but what a new user gives: data, weights, image size and budget. Every way ends with `poolshare retrain`, but for
"tuned", the dense model that the search itself makes, and those called "untrained". What a way costs is the time of all
its phases, its share of the search included, in epochs of the dense model's tuning; from scratch, in seconds alone. Run folders
are kept in --work; each row is written to results/defaults/results.csv at once, so the same command goes on where it was.
Data sets are read from POOLSHARE_DATA; --every 4 takes every fourth training image of each class, of image folders.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torchvision.datasets import FashionMNIST

from poolshare.search import SearchResult, search
from poolshare.search.exported.export import load_export, save_export
from poolshare.search.exported.retrain import evaluate, retrain
from poolshare.search.job.dense import read_tuned
from poolshare.search.job.records import write_csv
from poolshare.search.untrained.search import gradual
from poolshare.space import OPERATORS, Architecture, SearchSpace
from poolshare.space.operators import grid_of
from poolshare.space.presets import even_levels
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs

ROWS = Path(__file__).parent / "results.csv"
BUDGETS = ("60%", "40%")
UNIFORM = ("tome", "kmeans", "avg2d")
VIT = {"img_size": 112, "weights": "vit_tiny_patch16_224.safetensors"}
DATA: dict[str, dict[str, Any]] = {
    "photos": {"data": "photos", **VIT},
    "eurosat": {"data": "eurosat", **VIT},
    "fashion": {
        "data": "fashion",
        "img_size": 28,
        "in_chans": 1,
        "model_args": {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6},
        "recipe": {"crop_scale": 1.0, "color_jitter": 0.0},
    },
    "digits": {"data": "digits"},
}
OF_ONE_MODEL = ("format", "runs", "classes", "versions", "architecture", "search_score", "search_loss")


def options_of(name: str, every: int, work: Path) -> dict[str, Any]:
    """What a user of this data set gives."""
    options = dict(DATA[name])
    if name == "digits":
        return options
    root = Path(os.environ["POOLSHARE_DATA"])
    folder = fashion_folder(root, work) if name == "fashion" else root / name
    if "weights" in options:
        options["weights"] = str(root / options["weights"])
    return options | {"data": str(thinned(folder, every, work))}


def fashion_folder(root: Path, work: Path) -> Path:
    """Fashion-MNIST as an image folder, each image named by its place in the data set."""
    out = (work / "fashion").resolve()
    for split, last in (("train", "59999.png"), ("test", "09999.png")):
        images = FashionMNIST(root, train=split == "train")
        if any((out / split).glob(f"*/{last}")):
            continue
        for number, (image, label) in enumerate(images):
            place = out / split / str(label) / f"{number:05}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            image.save(place)
    return out


def thinned(folder: Path, every: int, work: Path) -> Path:
    """A folder of links with every so manyth training image of each class."""
    if every == 1:
        return folder
    out = (work / f"{folder.name}-every-{every}").resolve()
    for one in sorted((folder / "train").iterdir()):
        (out / "train" / one.name).mkdir(parents=True, exist_ok=True)
        for image in sorted(one.iterdir())[::every]:
            link = out / "train" / one.name / image.name
            if not link.is_symlink():
                link.symlink_to(image)
    if not (out / "test").is_symlink():
        (out / "test").symlink_to(folder / "test")
    return out


class Ways:
    """Everything that is measured on one data set with one seed."""

    def __init__(self, name: str, seed: int, every: int, work: Path, machine: dict[str, Any]):
        self.seed, self.machine = seed, machine
        self.folder = work / f"{name}-{every}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.options = options_of(name, every, work) | {"seed": seed, "quiet": True, **machine}
        self.warm = "weights" in self.options

    @property
    def all(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What measures each way, the most telling first."""
        found = {"tuned": self.tuned} if self.warm else {}
        found |= {"searched 60%": partial(self.searched, BUDGETS[0]), "dense": self.dense}
        if self.warm:
            found |= {"uniform tome 60%": partial(self.uniform, "tome", 0.6)}
            found |= {"training-free 60%, untrained": partial(self.training_free, False)}
            found |= {"training-free 60%": partial(self.training_free, True)}
        found |= {"searched 40%": partial(self.searched, BUDGETS[1])}
        if self.warm:
            found |= {f"uniform {name} 60%": partial(self.uniform, name, 0.6) for name in UNIFORM[1:]}
            found |= {"MSTM 60%": self.mstm, "Token Pooling 60%": partial(self.uniform, "wkmedoids", 0.6)}
            found |= {"uniform tome 40%": partial(self.uniform, "tome", 0.4)}
        return found

    def export(self, budget: str) -> Path:
        """The default pick within a budget, and beside it the dense model and the seconds that scoring took.

        The second search finds the first one's dense model tuned, and trains nothing again.
        """
        out, run = self.folder / f"searched-{budget.rstrip('%')}", self.folder / "run"
        if not out.exists():
            before = self.spent("scoring") if (run / "summary.json").exists() else 0.0
            found = search(out=run, budget=budget, **self.options)
            (self.folder / f"{out.name}.seconds").write_text(str(self.spent("scoring") - before))
            if not (self.folder / "dense").exists():
                found.export("dense", self.folder / "dense")
            found.export(found.pick(), out)
        return out

    # Each way's row

    def tuned(self) -> dict[str, Any]:
        """The dense model that the search makes first, as it is."""
        facts = evaluate(self.dense_export, **self.machine)
        return self.row(facts["details"]["correct"], facts["total"], 1.0, self.spent("tuning"))

    def dense(self) -> dict[str, Any]:
        """The dense model, retrained as every export without a teacher is."""
        return self.retrained(self.dense_export, self.spent("tuning"))

    def searched(self, budget: str) -> dict[str, Any]:
        """The default pick."""
        out = self.export(budget)
        scoring = float((self.folder / f"{out.name}.seconds").read_text())
        return self.retrained(out, self.spent("tuning", "training") + scoring)

    def uniform(self, operator: str, share: float) -> dict[str, Any]:
        """The most expensive schedule within the share that loses about as many tokens before every block."""
        levels = even_levels(self.tokens)
        if OPERATORS[operator].needs_grid:
            levels = tuple(level for level in levels if grid_of(level))
        space = SearchSpace(self.depth, levels, (operator,), max_run=1)
        base, options = load_export(self.dense_export).model.base
        costs = measure_macs(SuperNet.from_timm(base, space, **options))
        schedule = gradual(space.within(costs, None, share * costs.total(space[0])))[0]
        return self.retrained(self.built(f"{operator}-{share:.0%}", schedule), self.spent("tuning"))

    def mstm(self) -> dict[str, Any]:
        """Three reductions by one ratio, before the blocks 4, 7 and 10, as few tokens lost as 60 % of the MACs allow."""
        dense = load_export(self.dense_export)
        (base, options), inputs = dense.model.base, torch.zeros(1, *dense.data_config["input_size"])
        for ratio in (value / 100 for value in range(95, 20, -1)):
            counts = [max(1, round(self.tokens * ratio**stage)) for stage in range(4)]
            layers = [str(counts[0])] * (self.depth // 4)
            for count in counts[1:]:
                layers += [f"{count}@mstm", *[str(count)] * (self.depth // 4 - 1)]
            schedule = Architecture.parse(" ".join(layers))
            if (
                count_macs(Subnet.from_base(base, str(schedule), **options).eval(), (inputs,))
                <= 0.6 * dense.facts["macs"]
            ):
                return self.retrained(self.built("mstm-60", schedule), self.spent("tuning"))
        raise SystemExit("no schedule keeps the budget")

    def training_free(self, trained: bool) -> dict[str, Any]:
        """The tuned dense model as a user's own, searched by `--no-training`."""
        given = self.options | {"weights": str(self.dense_export / "model.safetensors"), "training": False}
        found = search(out=self.folder / "free", budget="60%", **given)
        spent = self.spent("tuning") + found.run.read_summary()["seconds"]["scoring"]
        out = self.folder / "free-60"
        if not out.exists():
            found.export(found.pick(), out)
        if trained:
            return self.retrained(out, spent, teacher=self.dense_export, epochs=8)
        facts = evaluate(out, **self.machine)
        return self.row(facts["details"]["correct"], facts["total"], facts["macs"] / found.report.dense["macs"], spent)

    # What they share

    @cached_property
    def dense_export(self) -> Path:
        """The tuned dense model, from scratch the supernet's, as an export."""
        self.export(BUDGETS[0])
        return self.folder / "dense"

    @property
    def tokens(self) -> int:
        return int(load_export(self.dense_export).model.architecture.layers[0].tokens)

    @property
    def depth(self) -> int:
        return len(load_export(self.dense_export).model.architecture.layers)

    def spent(self, *phases: str) -> float:
        """Seconds of these phases of the search."""
        seconds = SearchResult(self.folder / "run").run.read_summary()["seconds"]
        return float(sum(seconds.get(phase, 0.0) for phase in phases))

    def built(self, name: str, architecture: Architecture) -> Path:
        """The export of any architecture, with the dense model's weights; operators that learn begin as they are made."""
        out = self.folder / name.replace("%", "")
        if out.exists():
            return out
        dense = load_export(self.dense_export)
        base, options = dense.model.base
        torch.manual_seed(self.seed)
        model = Subnet.from_base(base, str(architecture), **options)
        model.load_state_dict(dense.model.state_dict(), strict=False)
        facts = {key: value for key, value in dense.facts.items() if key not in OF_ONE_MODEL}
        inputs = torch.zeros(1, *dense.data_config["input_size"])
        facts |= {"macs": count_macs(model.eval(), (inputs,)), "parameters": sum(p.numel() for p in model.parameters())}
        save_export(out, model, tuple(dense.facts["classes"]), dense.data_config, facts)
        return out

    def retrained(
        self, export: Path, spent: float, teacher: Path | None = None, epochs: int | None = None
    ) -> dict[str, Any]:
        """Retrained by default, in a folder that is not there yet: rows that are missing are measured again."""
        tries = (self.folder / f"{export.name}-retrained-{number}" for number in range(1000))
        target, start = next(path for path in tries if not path.exists()), time.monotonic()
        changes = {"recipe_changes": {"epochs": epochs}} if epochs else {}
        facts = retrain(export, target, seed=self.seed, teacher=teacher, **changes, **self.machine)
        spent += time.monotonic() - start
        return self.row(
            facts["test_details"]["correct"], facts["test_total"], facts["macs"] / facts["dense_macs"], spent
        )

    def row(self, correct: int, total: int, share: float, seconds: float) -> dict[str, Any]:
        tuned = read_tuned(SearchResult(self.folder / "run").run)
        epochs = seconds / (tuned.seconds / tuned.epochs) if tuned and tuned.epochs else float("nan")
        facts = {"top1": round(100 * correct / total, 2), "correct": correct, "total": total}
        return {**facts, "macs": round(share, 4), "seconds": round(seconds, 1), "dense_epochs": round(epochs, 1)}


def measure(options: argparse.Namespace) -> None:
    """Every row that is missing."""
    machine = {"device": options.device, "workers": options.workers, "threads": options.threads}
    machine = {name: value for name, value in machine.items() if value is not None}
    for seed in options.seeds:
        for name in options.data:
            label = name if options.every == 1 else f"{name}/{options.every}"
            ways = Ways(name, seed, options.every, options.work, machine)
            for way, act in ways.all.items():
                rows = (
                    pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=["data", "seed", "way"])
                )
                done = ((rows["data"] == label) & (rows["seed"] == seed) & (rows["way"] == way)).any()
                if done or (options.ways and way not in options.ways):
                    continue
                new = pd.DataFrame([{"data": label, "seed": seed, "way": way, **act()}])
                write_csv(options.out, pd.concat([rows, new], ignore_index=True) if len(rows) else new)
                print(new.to_string(header=False, index=False), flush=True)


def table(path: Path) -> str:
    """Means over seeds: top-1 and its range, share of the dense MACs, cost in epochs of the dense tuning."""
    rows = pd.read_csv(path)
    lines = ["| data | way | seeds | MACs | test top-1 (range) | cost, dense epochs |", "|---|---|---|---|---|---|"]
    for (name, way), group in rows.groupby(["data", "way"], sort=False):
        top1 = group["top1"]
        reached = f"{top1.mean():.2f}" + (f" ({top1.min():.2f}–{top1.max():.2f})" if len(group) > 1 else "")
        cost = "–" if group["dense_epochs"].isna().all() else f"{group['dense_epochs'].mean():.1f}"
        lines.append(f"| {name} | {way} | {len(group)} | {group['macs'].mean():.1%} | {reached} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", help="these alone; default: all")
    parser.add_argument("--every", type=int, default=1, help="take every so manyth training image")
    parser.add_argument("--work", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--out", type=Path, default=ROWS, help="the table that rows are added to")
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    options = parser.parse_args()
    if options.every > 1 and "digits" in options.data:
        parser.error("--every thins image folders; give --data without digits")
    if not options.table:
        measure(options)
    print(table(options.out))


if __name__ == "__main__":
    main()
