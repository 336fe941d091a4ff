"""The defaults on several data sets: dense, searched at 60 % and 40 %, uniform schedules, and training-free.

    python results/defaults/reproduce.py --data photos eurosat --seeds 0 1 2 --work FOLDER --device cuda
    python results/defaults/reproduce.py --table

Nothing but what a new user gives: data, weights, image size and budget. Every way ends with `poolshare retrain`, but for
"tuned", the dense model that the search itself makes, and for ways called "untrained". What a way costs is the time of all
its phases, its share of the search included, in epochs of the dense model's tuning; from scratch, in seconds alone. Run folders
are kept in --work; each row is written to results/defaults/results.csv at once, so the same command goes on where it was.
Data sets are read from POOLSHARE_DATA.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from poolshare.search import SearchResult, search
from poolshare.search.exported.retrain import evaluate, retrain
from poolshare.search.job.dense import read_tuned
from poolshare.search.job.prepare import prepare
from poolshare.search.job.records import write_csv
from poolshare.search.untrained.search import gradual
from poolshare.space import parse_budget

HERE = Path(__file__).parent
ROWS = HERE / "results.csv"
BUDGETS = ("60%", "40%")
VIT = {"img_size": 112, "weights": "vit_tiny_patch16_224.safetensors"}
DATA: dict[str, dict[str, Any]] = {
    "photos": {"data": "photos", **VIT},
    "eurosat": {"data": "eurosat", **VIT},
    "fashion": {
        "data": "torch/fashion_mnist",
        "data_dir": "",
        "img_size": 28,
        "in_chans": 1,
        "model_args": {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6},
        "recipe": {"crop_scale": 1.0, "color_jitter": 0.0},
    },
    "digits": {"data": "digits"},
}


def options_of(name: str) -> dict[str, Any]:
    """What a user of this data set gives."""
    root, options = Path(os.environ["POOLSHARE_DATA"]), dict(DATA[name])
    if "weights" in options:
        options |= {"data": str(root / options["data"]), "weights": str(root / options["weights"])}
    if "data_dir" in options:
        options["data_dir"] = str(root / options["data_dir"])
    return options


class Ways:
    """Everything that is measured on one data set with one seed."""

    def __init__(self, name: str, seed: int, work: Path, machine: dict[str, Any]):
        self.name, self.seed, self.machine = name, seed, machine
        self.folder = work / f"{name}-{seed}"
        self.options = options_of(name) | {"seed": seed, "quiet": True, **machine}

    def all(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """The name of each way, and what measures it."""
        warm = "weights" in self.options
        if warm:
            yield "tuned", self.tuned
        yield "dense", self.dense
        for budget in BUDGETS:
            yield f"searched {budget}", lambda budget=budget: self.retrained(self.run(budget).pick(), budget)
        operators = self.run(BUDGETS[0]).run.config.operators if self.started else ("tome", "kmeans", "avg2d")
        for operator in operators or ():
            yield f"uniform {operator} 60%", lambda operator=operator: self.uniform(operator)
        if warm:
            yield "training-free 60%, untrained", lambda: self.training_free(False)
            yield "training-free 60%", lambda: self.training_free(True)

    @property
    def started(self) -> bool:
        return (self.folder / "60" / "summary.json").exists()

    def run(self, budget: str) -> SearchResult:
        """The search within a budget, with the uniform schedules among its candidates."""
        out = self.folder / budget.rstrip("%")
        return search(out=out, budget=budget, include=self.schedules() if budget == BUDGETS[0] else (), **self.options)

    def schedules(self) -> tuple[str, ...]:
        """For each operator the most expensive schedule within the first budget that drops about as many tokens everywhere."""
        from poolshare.search.config import checked_config

        given = {key: value for key, value in self.options.items() if key != "quiet"}
        job = prepare(checked_config(**given, budget=BUDGETS[0]))
        return tuple(map(str, dict.fromkeys(gradual(job.allowed))))

    def tuned(self) -> dict[str, Any]:
        """The dense model that the search makes first, as it is."""
        found = self.run(BUDGETS[0])
        facts = evaluate(self.export(found, "dense"), **self.machine)
        return self.row(facts["correct"], facts["total"], 1.0, read_tuned(found.run).seconds)

    def dense(self) -> dict[str, Any]:
        """The dense model, retrained as everything else is."""
        return self.retrained("dense", BUDGETS[0], ("tuning",))

    def uniform(self, operator: str) -> dict[str, Any]:
        """The more expensive of the operator's schedules within the budget."""
        found = self.run(BUDGETS[0])
        candidates = found.candidates[found.candidates["architecture"].isin(found.report.included)]
        limit = parse_budget(BUDGETS[0], found.report.dense["macs"])
        rows = candidates[candidates["architecture"].str.contains(f"@{operator}") & (candidates["macs"] <= limit)]
        return self.retrained(rows.loc[rows["macs"].idxmax(), "architecture"], BUDGETS[0], ("tuning", "training"))

    def training_free(self, trained: bool) -> dict[str, Any]:
        """The tuned dense model, searched as it is."""
        dense = self.export(self.run(BUDGETS[0]), "dense")
        given = self.options | {"weights": str(dense / "model.safetensors"), "epochs": 0, "budget": BUDGETS[0]}
        found = search(out=self.folder / "free", **given)
        spent = read_tuned(self.run(BUDGETS[0]).run).seconds + found.run.read_summary()["seconds"]["scoring"]
        out = self.export(found, found.pick().architecture)
        share = found.candidates.set_index("architecture").loc[found.pick().architecture, "macs"]
        share /= found.report.dense["macs"]
        if not trained:
            facts = evaluate(out, **self.machine)
            return self.row(facts["correct"], facts["total"], share, spent)
        start = time.monotonic()
        facts = retrain(out, self.place(f"{out.name}-retrained"), teacher=dense, seed=self.seed, **self.machine)
        return self.row(facts["test_correct"], facts["test_total"], share, spent + time.monotonic() - start)

    def retrained(
        self, wish: Any, budget: str, phases: tuple[str, ...] = ("tuning", "training", "scoring")
    ) -> dict[str, Any]:
        """Export and retrain by default. phases: of the search that this way needs."""
        found = self.run(budget)
        out = self.export(found, wish if isinstance(wish, str) else wish.architecture)
        target, start = self.place(f"{out.name}-retrained"), time.monotonic()
        facts = retrain(out, target, seed=self.seed, **self.machine)
        spent = time.monotonic() - start
        spent += sum(found.run.read_summary()["seconds"].get(phase, 0.0) for phase in phases)
        share = facts["macs"] / facts["dense_macs"]
        return self.row(facts["test_correct"], facts["test_total"], share, spent)

    def export(self, found: SearchResult, wish: str) -> Path:
        """The export of one architecture, made once."""
        out = self.folder / f"{found.run.path.name}-{wish.replace(' ', '_').replace('*', 'x')[:150]}"
        if not out.exists():
            found.export(wish, out)
        return out

    def place(self, name: str) -> Path:
        """A folder that is not there yet: rows that are missing are measured again."""
        tries = (self.folder / f"{name}-{number}" for number in range(1000))
        return next(path for path in tries if not path.exists())

    def row(self, correct: int, total: int, share: float, seconds: float) -> dict[str, Any]:
        tuned = read_tuned(self.run(BUDGETS[0]).run)
        epochs = seconds / (tuned.seconds / tuned.epochs) if tuned and tuned.epochs else float("nan")
        facts = {"top1": round(100 * correct / total, 2), "correct": correct, "total": total}
        return {**facts, "macs": round(share, 4), "seconds": round(seconds, 1), "dense_epochs": round(epochs, 1)}


def measure(options: argparse.Namespace) -> None:
    """Every row that is missing."""
    machine = {"device": options.device, "workers": options.workers} if options.device else {"workers": options.workers}
    for seed in options.seeds:
        for name in options.data:
            ways = Ways(name, seed, options.work, machine)
            ways.folder.mkdir(parents=True, exist_ok=True)
            if not ways.started:
                ways.run(BUDGETS[0])
            for way, act in ways.all():
                rows = pd.read_csv(ROWS) if ROWS.exists() else pd.DataFrame(columns=["data", "seed", "way"])
                if ((rows["data"] == name) & (rows["seed"] == seed) & (rows["way"] == way)).any():
                    continue
                new = pd.DataFrame([{"data": name, "seed": seed, "way": way, **act()}])
                write_csv(ROWS, pd.concat([rows, new], ignore_index=True) if len(rows) else new)
                print(new.to_string(header=False, index=False), flush=True)


def table() -> str:
    """Means over seeds: top-1 and its range, share of the dense MACs, cost in epochs of the dense tuning."""
    rows = pd.read_csv(ROWS)
    lines = ["| data | way | seeds | MACs | test top-1 (range) | cost, dense epochs |", "|---|---|---|---|---|---|"]
    for (name, way), group in rows.groupby(["data", "way"], sort=False):
        top1 = group["top1"]
        reached = f"{top1.mean():.2f} ({top1.min():.2f}-{top1.max():.2f})"
        cost = f"{group['dense_epochs'].mean():.1f}"
        lines.append(f"| {name} | {way} | {len(group)} | {group['macs'].mean():.1%} | {reached} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    options = parser.parse_args()
    if not options.table:
        measure(options)
    print(table())


if __name__ == "__main__":
    main()
