"""Segmentation of street scenes: mean IoU against MACs and time, dense, searched, uniform schedules, fewer blocks.

    python results/camvid/reproduce.py --seeds 0 1 2 --work FOLDER
    python results/camvid/reproduce.py --times --work FOLDER
    python results/camvid/reproduce.py --table

CamVid (367 training, 101 validation, 233 test images, 11 classes) and the ImageNet weights of ViT-Tiny are read from
POOLSHARE_DATA. Every way begins with these weights, sees the training images for TUNE + RETRAIN epochs, and is tested once:

    tuned            the dense model that the search makes first, TUNE epochs on the 367; all others but the last go on from it
    dense            the same, retrained on all 468 for RETRAIN epochs: as long as the others
    searched B       the default pick within a budget of B of the dense MACs, retrained as long
    uniform OP 60%   about as many tokens less before every block, by one operator, retrained likewise
    fewer blocks     the first blocks of the ViT, as many as 60 % of the MACs allow, for TUNE + RETRAIN epochs on all 468

MACs are of the whole model, head included, and so are times (--times: medians of interleaved forwards of one thread, as shares
of the dense model's). Mean IoU is at the size of the model's input. Rows are written one by one: the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from poolshare.search import search
from poolshare.search.analysis.intervals import difference_interval, score_interval
from poolshare.search.exported.export import load_export, save_export
from poolshare.search.exported.retrain import retrain
from poolshare.search.job.prepare import image_format
from poolshare.search.job.records import write_csv
from poolshare.search.scoring import Answers, answers
from poolshare.search.untrained.search import gradual
from poolshare.space import OPERATORS, SearchSpace
from poolshare.space.operators import grid_of
from poolshare.space.presets import even_levels
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs
from poolshare.supernet.data import Place, open_tests
from poolshare.supernet.latency import interleaved, typical
from poolshare.supernet.tasks import TASKS
from poolshare.supernet.weights import load_base_weights

TASK = TASKS["segmentation"]
HERE = Path(__file__).parent
TUNE, RETRAIN = 15, 8  # epochs
BUDGETS = ("60%", "45%")
UNIFORM = ("tome", "avg2d", "evit", "max2d")
OF_ONE_MODEL = ("format", "runs", "classes", "versions", "architecture", "search_score", "search_loss", "loss", "unit")


class Ways:
    """Everything that is measured with one seed."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.seed, self.epochs = seed, (options.tune, options.retrain)
        height, width = map(int, options.img_size.split("x"))
        self.folder = options.work / f"{options.img_size}-{options.tune}-{options.retrain}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.answers: dict[Path, Answers] = {}
        self.root = Path(os.environ["POOLSHARE_DATA"])
        self.weights = str(self.root / "vit_tiny_patch16_224.safetensors")
        self.options: dict[str, Any] = {
            "data": str(self.root / "camvid"),
            "task": "segmentation",
            "ignore_index": 11,
            "img_size": (height, width),
            "weights": self.weights,
            "tune_epochs": options.tune,
            "batch_size": 8,
            "lr": 5e-4,
            "seed": seed,
            "threads": options.threads,
            "device": "cpu",
        }

    @property
    def all(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What measures each way, the most telling first."""
        searched = {f"searched {budget}": partial(self.searched, budget) for budget in BUDGETS}
        uniform = {f"uniform {operator} 60%": partial(self.uniform, operator) for operator in UNIFORM}
        first, second = BUDGETS
        return {
            "tuned": self.tuned,
            "dense": self.dense,
            f"searched {first}": searched[f"searched {first}"],
            "uniform tome 60%": uniform["uniform tome 60%"],
            "fewer blocks 60%": self.fewer_blocks,
            f"searched {second}": searched[f"searched {second}"],
            **uniform,
        }

    # Each way's row

    def tuned(self) -> dict[str, Any]:
        self.dense()  # which every row is compared with
        return self.row(self.dense_export)

    def dense(self) -> dict[str, Any]:
        return self.retrained(self.dense_export)

    def searched(self, budget: str) -> dict[str, Any]:
        return self.retrained(self.export(budget))

    def uniform(self, operator: str) -> dict[str, Any]:
        """The most expensive schedule within 60 % that loses about as many tokens before every block."""
        dense = load_export(self.dense_export)
        grid, depth = dense.model.patch_embed.grid_size, len(dense.model.blocks)
        levels = even_levels(grid[0] * grid[1], 10, grid)
        if OPERATORS[operator].needs_grid:
            levels = tuple(level for level in levels if grid_of(level, grid))
        space = SearchSpace(depth, levels, (operator,), 1, None, grid)
        base, options = dense.model.base
        costs = measure_macs(SuperNet.from_timm(base, space, **options))
        schedule = gradual(space.within(costs, None, int(0.6 * costs.total(space[0]))))[0]
        model = Subnet.from_base(base, str(schedule), **options)
        model.load_state_dict(dense.model.state_dict())
        return self.retrained(self.built(f"uniform-{operator}", model))

    def fewer_blocks(self) -> dict[str, Any]:
        dense = load_export(self.dense_export)
        base, options = dense.model.base
        torch.manual_seed(self.seed)
        full = Subnet.from_base(base, str(dense.model.architecture), **options)
        load_base_weights(full, self.weights, base, fresh_head=True)
        tokens = str(full.architecture.layers[0].tokens)
        for depth in range(len(full.blocks) - 1, 0, -1):
            model = Subnet.from_base(base, " ".join([tokens] * depth), **options, depth=depth)
            if self.macs(model) <= 0.6 * dense.facts["macs"]:
                break
        kept = {name: value for name, value in full.state_dict().items() if not name.startswith("head.")}
        own = model.state_dict()
        model.load_state_dict({name: kept.get(name, value) for name, value in own.items()})
        return self.retrained(self.built("fewer-blocks", model), sum(self.epochs))

    # What they share

    @cached_property
    def dense_export(self) -> Path:
        self.export(BUDGETS[0])
        return self.folder / "dense"

    def export(self, budget: str) -> Path:
        """The default pick within a budget; the first time also the dense model that was tuned for it."""
        out = self.folder / f"searched-{budget.rstrip('%')}"
        if not out.exists():
            found = search(out=self.folder / "run", budget=budget, **self.options)
            if not (self.folder / "dense").exists():
                found.export("dense", self.folder / "dense")
            found.export(found.pick(), out)
        return out

    def macs(self, model: Subnet) -> int:
        return count_macs(model.eval(), (torch.zeros(1, 3, *self.options["img_size"]),))

    def built(self, name: str, model: Subnet) -> Path:
        """An export of any model, with what is known about the dense one."""
        out, dense = self.folder / name, load_export(self.dense_export)
        if not out.exists():
            facts = {key: value for key, value in dense.facts.items() if key not in OF_ONE_MODEL}
            if len(model.blocks) != len(dense.model.blocks):
                del facts["dense"]  # it is no model of this one's space
            facts |= {"macs": self.macs(model), "parameters": sum(p.numel() for p in model.parameters())}
            save_export(out, model, tuple(dense.facts["classes"]), dense.data_config, facts)
        return out

    def retrained(self, export: Path, epochs: int | None = None) -> dict[str, Any]:
        target = self.folder / f"{export.name}-retrained"
        if not target.exists():
            changes = {"epochs": epochs or self.epochs[1], "lr": self.options["lr"]}
            threads = {"threads": self.options["threads"], "device": "cpu"}
            retrain(
                export, target, seed=self.seed, recipe_changes=changes, **threads
            )  # by labels alone, as few images are
        return self.row(target)

    def row(self, path: Path) -> dict[str, Any]:
        """Of an exported folder; intervals are a bootstrap over the test images, those of the gap to dense over pairs."""
        export = load_export(path)
        found = self.tested(path).counts
        contributions, dense = (self.tested(one).contributions for one in (path, self.folder / "dense-retrained"))
        low, high = score_interval(TASK, contributions)
        gap = difference_interval(TASK, contributions, dense)
        macs, whole = export.facts["macs"], load_export(self.dense_export).facts["macs"]
        numbers = {"miou": found.score(TASK), "low": low, "high": high, "gap_low": gap[0], "gap_high": gap[1]}
        details = TASK.details(contributions, torch.empty(0), torch.empty(0), export.facts["classes"])
        return {
            **{name: round(value, 2) for name, value in numbers.items()},
            "pixel_accuracy": round(details["pixel_accuracy"], 2),
            "macs": macs,
            "share": round(macs / whole, 4),
            "architecture": str(export.model.architecture),
        }

    def tested(self, path: Path) -> Answers:
        """What an export says to the test images."""
        if path not in self.answers:
            export = load_export(path)
            place = Place(self.options["data"], targets="pixels", ignore_index=self.options["ignore_index"])
            data = open_tests(place, export.facts["classes"], image_format(export.data_config))
            self.answers[path] = answers(export.model, data.eval_loader("test", 16), TASK)
        return self.answers[path]


def measure(options: argparse.Namespace, path: Path) -> None:
    """Every row that is missing."""
    key = ["img_size", "tune", "retrain", "seed", "way"]
    for seed in options.seeds:
        ways = Ways(seed, options)
        for way, act in ways.all.items():
            here = [options.img_size, options.tune, options.retrain, seed, way]
            rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=key)
            if (rows[key] == here).all(axis=1).any() or (options.ways and way not in options.ways):
                continue
            start = time.monotonic()
            new = pd.DataFrame([dict(zip(key, here, strict=True)) | act()])
            write_csv(path, pd.concat([rows, new], ignore_index=True) if len(rows) else new)
            shown = new.drop(columns="architecture").to_string(header=False, index=False)
            print(f"{time.monotonic() - start:.0f} s: {shown}", flush=True)


def measure_times(options: argparse.Namespace, path: Path) -> None:
    """Shares of the dense model's time, of one seed's models, at batch 1 and 16, on one thread."""
    folder = Ways(options.seeds[0], options).folder
    exports = [folder / "dense", *sorted(folder.glob("*-retrained"))]
    models = [load_export(export).model.eval() for export in exports]
    torch.set_num_threads(1)
    rows = []
    for batch in (1, 16):
        images = torch.randn(batch, 3, *map(int, options.img_size.split("x")))
        times = interleaved([(model, (images,)) for model in models], 15, random.Random(0))
        shares = np.sort(times / times[:, :1], axis=0)
        for export, typical_one, column in zip(exports, typical(times), shares.T, strict=True):
            low, high = column[int(0.2 * len(column))], column[int(0.8 * len(column))]
            facts = {"way": export.name.removesuffix("-retrained"), "batch": batch, "ms": round(1e3 * typical_one, 2)}
            rows.append(
                facts | {"share": round(float(np.median(column)), 3), "low": round(low, 3), "high": round(high, 3)}
            )
    write_csv(path, pd.DataFrame(rows))
    print(pd.DataFrame(rows).to_string(index=False))


def table(path: Path) -> str:
    """Means over seeds, and the range."""
    rows = pd.read_csv(path)
    lines = [
        "| way | seeds | MACs | mean IoU on test (range) | against dense of the same seed |",
        "|---|---|---|---|---|",
    ]
    for (size, tune, again), part in rows.groupby(["img_size", "tune", "retrain"], sort=False):
        dense = part[part["way"] == "dense"].set_index("seed")["miou"]
        lines.append(f"| *{size}, {tune} + {again} epochs* | | | | |")
        for way, group in part.groupby("way", sort=False):
            reached = f"{group['miou'].mean():.1f}"
            reached += f" ({group['miou'].min():.1f}–{group['miou'].max():.1f})" if len(group) > 1 else ""
            against = ", ".join(
                f"{row.miou - dense[row.seed]:+.1f} ({row.gap_low:+.1f} to {row.gap_high:+.1f})"
                for row in group.itertuples()
                if way != "dense" and row.seed in dense
            )
            lines.append(f"| {way} | {len(group)} | {group['share'].mean():.1%} | {reached} | {against} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", help="these alone; default: all")
    parser.add_argument("--img-size", default="144x192")
    parser.add_argument("--tune", type=int, default=TUNE)
    parser.add_argument("--retrain", type=int, default=RETRAIN)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--times", action="store_true", help="time the models of the first seed")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    options = parser.parse_args()
    if options.times:
        measure_times(options, HERE / "times.csv")
    elif not options.table:
        measure(options, HERE / "results.csv")
    if (HERE / "results.csv").exists():
        print(table(HERE / "results.csv"))


if __name__ == "__main__":
    main()
