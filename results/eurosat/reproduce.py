"""A pretrained ViT-Tiny on EuroSAT: searched models beside dense, hand-made schedules and random draws of equal cost.

    python results/eurosat/reproduce.py --data DATA/eurosat --weights vit_tiny_patch16_224.safetensors
    python results/eurosat/reproduce.py … --img-size 224 --device cuda --amp bf16

One supernet is trained and searched from the command line. Then, at each budget, every competitor is fine-tuned by the
same recipe with the same seeds and tested: from the ImageNet weights, and where the space holds it also from the
supernet's. Hand-made are one reduction as late as the budget asks (uniform pooling, mean over the grid) and ToMe with
the same number of merges in every layer. About 5 hours on one core at 112 px. Writes results/eurosat/<size>.csv after
every training, resumes after the last, and then writes <size>.json.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from scipy.stats import t as student_t

from poolshare.search.export import load_supernet
from poolshare.search.pareto import pick
from poolshare.search.progress import progress_bar
from poolshare.search.retrain import accuracy
from poolshare.search.run import RunFolder, versions, write_csv, write_json
from poolshare.space import Architecture, CostTable, SearchSpace
from poolshare.supernet import Subnet, SuperNet, measure_macs
from poolshare.supernet.data import open_data
from poolshare.supernet.recipe import Recipe
from poolshare.supernet.train import steps_per_epoch, train_model
from poolshare.supernet.weights import load_base_weights

HERE = Path(__file__).parent
MODEL = "vit_tiny_patch16_224"
LEVELS = {49: (49, 25, 16, 9), 196: (196, 100, 49, 25)}
BUDGETS = (0.58, 0.40)  # of the dense MACs: 42 % fewer is what Token Pooling claims for DeiT
RANDOM_DRAWS = 2  # a budget


def merging_schedule(depth: int, tokens: int, merges: int) -> Architecture:
    """ToMe with so many merges before every layer but the first."""
    counts = [tokens - merges * layer for layer in range(depth)]
    return Architecture.parse(" ".join([str(tokens), *(f"{count}@tome" for count in counts[1:])]))


def late_reduction(depth: int, tokens: int, after: int, at: int) -> Architecture:
    """All tokens for `at` layers, then mean pooling of the grid."""
    return Architecture.parse(" ".join([str(tokens)] * at + [f"{after}@avg2d"] + [str(after)] * (depth - at - 1)))


def macs_of(architecture: Architecture, options: dict[str, Any]) -> int:
    """MACs of an architecture that no space at hand holds."""
    return measure_macs(alone_in_its_space(architecture, options)).total(architecture)


def alone_in_its_space(architecture: Architecture, options: dict[str, Any]) -> SuperNet:
    """A supernet, at random, whose space holds this architecture."""
    levels = sorted({layer.tokens for layer in architecture.layers}, reverse=True)
    operators = dict.fromkeys(layer.operator for layer in architecture.layers if layer.operator)
    space = SearchSpace(architecture.depth, tuple(levels), tuple(operators), 3)
    return SuperNet.from_timm(MODEL, space, **options)


def hand_made(depth: int, tokens: int, limit: float, options: dict[str, Any]) -> dict[str, Architecture]:
    """The dearest schedule of each family within the limit."""
    late = [late_reduction(depth, tokens, LEVELS[tokens][1], at) for at in range(depth - 1, 0, -1)]
    late += [late_reduction(depth, tokens, LEVELS[tokens][2], at) for at in range(depth - 1, 0, -1)]
    most = (tokens - 1) // (depth - 1)
    families = {"uniform": late, "tome": [merging_schedule(depth, tokens, merges) for merges in range(1, most + 1)]}
    found = {}
    for name, schedules in families.items():
        within = {one: cost for one in schedules if (cost := macs_of(one, options)) <= limit}
        if within:
            found[name] = max(within, key=within.__getitem__)
    return found


def competitors(folder: RunFolder, costs: CostTable, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Who is trained: name, budget (share of the dense MACs), architecture, whether the supernet's space holds it."""
    space, summary = SearchSpace(**folder.read_summary()["space"]), folder.read_summary()
    dense = summary["dense"]["macs"]
    rows: list[dict[str, Any]] = [{"name": "dense", "budget": 1.0, "architecture": space[0], "inherits": True}]
    for budget in BUDGETS:
        limit = budget * dense
        chosen = Architecture.parse(pick(folder.read_candidates(), "budget", limit)["architecture"])
        rows.append({"name": "searched", "budget": budget, "architecture": chosen, "inherits": True})
        band = space.within(costs, 0.97 * limit, limit)
        for draw in range(RANDOM_DRAWS):
            drawn = band.sample(random.Random(f"eurosat {budget} {draw}"))
            rows.append({"name": f"random {draw}", "budget": budget, "architecture": drawn, "inherits": True})
        for name, schedule in hand_made(space.depth, space.levels[0], limit, options).items():
            rows.append({"name": name, "budget": budget, "architecture": schedule, "inherits": False})
    return rows


def paired(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each competitor and start: mean and deviation of test top-1, and the difference from dense, paired by seed.

    The dense model that is compared with began at the same place. Intervals are 95 % t-intervals over seeds, in points.
    """
    found = []
    for (name, budget, start), group in table.groupby(["name", "budget", "start"]):
        dense = table[(table["name"] == "dense") & (table["start"] == start)].set_index("seed")["top1"]
        difference = (group.set_index("seed")["top1"] - dense).dropna()
        reach = student_t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
        row = {"name": name, "budget": budget, "start": start, "seeds": len(group)}
        row |= {"of_dense_macs": round(float(group["of_dense"].iloc[0]), 4)}
        row |= {"top1": round(group["top1"].mean(), 3), "deviation": round(group["top1"].std(ddof=1), 3)}
        row |= {"difference": round(difference.mean(), 3)}
        row |= {"interval_95": [round(difference.mean() - reach, 3), round(difference.mean() + reach, 3)]}
        found.append(row)
    return found


def main() -> None:
    """Run or resume everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of train and test")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of the pretrained ViT-Tiny")
    parser.add_argument("--img-size", type=int, choices=(112, 224), default=112)
    parser.add_argument("--search-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--amp", choices=("none", "bf16"), default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/eurosat-results"))
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    console, device = Console(stderr=True), torch.device(given.device)
    tokens = (given.img_size // 16) ** 2
    run = given.work / f"run-{given.img_size}"
    command = "from poolshare.search.cli import main; main()"
    words = ["--data", given.data, "--model", MODEL, "--weights", str(given.weights), "--img-size", str(given.img_size)]
    words += ["--levels", ",".join(map(str, LEVELS[tokens])), "--operators", "tome,max2d", "--sampler", "evolution"]
    words += ["--trials", "600", "--epochs", str(given.search_epochs), "--batch-size", "32", "--device", given.device]
    words += ["--amp", given.amp, "--workers", str(given.workers), "--out", str(run)]
    subprocess.run([sys.executable, "-c", command, "search", *words], check=True)
    folder = RunFolder.open(run)
    trained = load_supernet(folder)
    costs = measure_macs(trained)
    options = {"img_size": given.img_size, "num_classes": len(folder.read_summary()["classes"])}
    recipe = Recipe(epochs=given.epochs, batch_size=32, lr=3e-4, layer_decay=0.75, amp=given.amp)
    data = open_data(
        given.data, img_size=given.img_size, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9,
        interpolation="bicubic", augmentation=recipe.augmentation,
    )  # fmt: skip

    table = given.out / f"{given.img_size}.csv"
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    done = {(row["architecture"], row["start"], row["seed"]) for row in rows}
    dense_macs = costs.total(trained.space[0])
    for seed in range(given.seeds):
        data.seed = seed  # of order and augmentation; the splits are made
        for one in competitors(folder, costs, options):
            architecture = one["architecture"]
            for start in ("imagenet", "supernet") if one["inherits"] else ("imagenet",):
                if (str(architecture), start, seed) in done:
                    continue
                torch.manual_seed(seed)
                if start == "supernet":
                    source = trained
                else:
                    source = alone_in_its_space(architecture, options)
                    load_base_weights(source, given.weights, MODEL)
                model = Subnet.from_supernet(source, architecture).to(device)
                macs = measure_macs(source).total(architecture)
                state = given.work / f"{given.img_size}.training.safetensors"
                settings = {"architecture": str(architecture), "start": start, "seed": seed}
                total = recipe.epochs * steps_per_epoch(data, recipe, full=True)
                with progress_bar(
                    console, f"{one['name']} {one['budget']:.0%}, seed {seed}", total, "steps"
                ) as advance:
                    train_model(
                        model, data, recipe, seed=seed, workers=given.workers, state=state, settings=settings,
                        progress=lambda step, loss, show=advance: show(step, f"loss {loss:.3f}"),
                    )  # fmt: skip
                correct, images = accuracy(model, data, given.workers)
                for kept in given.work.glob(f"{state.stem}*"):
                    kept.unlink()
                row = {"name": one["name"], "budget": one["budget"], "start": start, "seed": seed, "macs": macs}
                row |= {"of_dense": macs / dense_macs, "correct": correct, "total": images}
                rows.append(row | {"top1": 100 * correct / images, "architecture": str(architecture)})
                write_csv(table, pd.DataFrame(rows))
                console.print(f"{one['name']} {one['budget']:.0%} from {start}: {rows[-1]['top1']:.1f} %")
    facts = {"recipe": recipe.model_dump(), "versions": versions(), "threads": torch.get_num_threads()}
    facts |= {"device": given.device, "competitors": paired(pd.DataFrame(rows))}
    write_json(given.out / f"{given.img_size}.json", facts)


if __name__ == "__main__":
    main()
