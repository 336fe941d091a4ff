"""Fashion-MNIST from scratch: searched models beside dense ViTs of other widths, and what makes the difference.

    python results/fashion/reproduce.py --data-dir DATA
    python results/fashion/reproduce.py --data-dir DATA --images 60000 --epochs 30 --patch 2 --width 192 --device cuda

A supernet over a 6-layer ViT is trained on four fifths of the first images of the training set; its whole space is scored on
the rest. Then, with each seed, every competitor is trained from random weights on all of these images and tested on the
10,000 test images: dense ViTs of several widths; the searched models that cost no more than each of them; and the
ablation: pooling only, sharing only, pooling of the sequence against the grid, sharing early against late. About 80 minutes
on one core. Writes results/fashion/models.csv after every training, resumes after the last, then models.json and the
figure.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from rich.console import Console
from scipy.stats import ttest_1samp

from poolshare.search.job.folder import RunFolder
from poolshare.search.job.records import versions, write_csv, write_json
from poolshare.search.progress import advance_loss, progress_bar
from poolshare.search.scoring import answers
from poolshare.space import Architecture
from poolshare.supernet import Subnet, count_macs
from poolshare.supernet.data import ImageFormat, Place, open_data
from poolshare.supernet.training.loop import steps_per_epoch, train_model
from poolshare.supernet.training.recipe import Recipe

HERE = Path(__file__).parent
MODEL, DEPTH, SHARING = "vit_tiny_patch16_224", 6, 3
PER_HEAD = 16
NARROWER = (1 / 2, 5 / 8, 3 / 4)  # of the width: 26, 40 and 57 % of the MACs
LEVELS = {4: (49, 25, 16, 9, 4), 2: (196, 100, 49, 25, 9)}  # by patch size
RECIPE = {"hflip": 0.5, "crop_scale": 1.0, "color_jitter": 0.0}


def first_images(source: Path, target: Path, images: int) -> None:
    """The first images of the training set as a data set of its own, beside all test images."""
    raw, cut = source / "FashionMNIST" / "raw", target / "FashionMNIST" / "raw"
    cut.mkdir(parents=True, exist_ok=True)
    for name, header in (("train-images-idx3-ubyte", 16), ("train-labels-idx1-ubyte", 8)):
        read = (raw / name).read_bytes()
        each = 784 if header == 16 else 1
        (cut / name).write_bytes(read[:4] + struct.pack(">i", images) + read[8 : header + images * each])
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (cut / name).write_bytes((raw / name).read_bytes())


def model_args(patch: int, width: int) -> dict[str, int]:
    """timm's words for a ViT of this width; each head has 16 channels."""
    return {"patch_size": patch, "embed_dim": width, "depth": DEPTH, "num_heads": max(width // PER_HEAD, 1)}


def fresh(architecture: Architecture, patch: int, width: int) -> Subnet:
    """The architecture with random weights."""
    options = {"img_size": 28, "in_chans": 1, "num_classes": 10, **model_args(patch, width)}
    return Subnet.from_base(MODEL, str(architecture), **options)


def macs_of(model: Subnet) -> int:
    """MACs of one image."""
    return count_macs(model.eval(), (torch.zeros(1, 1, 28, 28),))


def best(
    candidates: pd.DataFrame, limit: float, holds: Callable[[Architecture], bool] = lambda one: True
) -> Architecture:
    """The candidate with the best score among those of at most `limit` MACs that have a property."""
    within = candidates[candidates["macs"] <= limit].sort_values(["top1", "macs"], ascending=[False, True])
    return next(one for one in map(Architecture.parse, within["architecture"]) if holds(one))


def shares(architecture: Architecture) -> bool:
    """Whether some layer uses its neighbour's attention map."""
    return any(layer.shared for layer in architecture.layers)


def competitors(candidates: pd.DataFrame, patch: int, width: int) -> Iterator[tuple[str, int, Architecture]]:
    """Who is trained: group and name, width, architecture."""
    tokens, middle, *_ = LEVELS[patch]
    dense = Architecture.parse(" ".join([str(tokens)] * DEPTH))
    yield "dense", width, dense
    limits = {}
    for part in NARROWER:
        narrow = round(width * part)
        limits[part] = macs_of(fresh(dense, patch, narrow))
        yield f"dense, width {narrow}", narrow, dense
    for part, limit in limits.items():
        yield f"searched for width {round(width * part)}", width, best(candidates, limit)
    limit = limits[NARROWER[-1]]
    yield "pooling only", width, best(candidates, limit, lambda one: not shares(one))
    yield "sharing only", width, Architecture.parse(" ".join([f"{tokens}*{SHARING}"] * (DEPTH // SHARING)))
    for name, operator in (("sequence", "max1d"), ("grid", "max2d")):
        rest = [str(middle)] * (DEPTH - 3)
        yield (
            f"pooling of the {name}",
            width,
            Architecture.parse(f"{tokens}*1 {tokens}*1 {middle}@{operator} {' '.join(rest)}"),
        )
    half = " ".join([str(tokens)] * (DEPTH // 2))
    yield "sharing early", width, Architecture.parse(f"{tokens}*{DEPTH // 2} {half}")
    yield "sharing late", width, Architecture.parse(f"{half} {tokens}*{DEPTH // 2}")


def summarise(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each competitor: MACs, mean test top-1 and deviation over seeds; the searched ones beside the dense model
    that costs as much, paired by seed, in points with a 95 % t-interval."""
    found = []
    for name, group in table.groupby("name", sort=False):
        row = {"name": name, "architecture": group["architecture"].iloc[0], "macs": int(group["macs"].iloc[0])}
        row |= {"of_dense": round(float(group["of_dense"].iloc[0]), 4), "seeds": len(group)}
        row |= {"top1": round(group["top1"].mean(), 3), "deviation": round(group["top1"].std(ddof=1), 3)}
        if str(name).startswith("searched"):
            rival = table[table["name"] == str(name).replace("searched for", "dense,")]
            gaps = (group.set_index("seed")["top1"] - rival.set_index("seed")["top1"]).dropna()
            row["minus_dense_of_equal_macs"] = round(gaps.mean(), 3)
            if len(gaps) > 1:
                row["interval_95"] = [round(float(end), 3) for end in ttest_1samp(gaps, 0).confidence_interval(0.95)]
        found.append(row)
    return found


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Accuracy against MACs: dense widths and searched models as lines, the ablation as labelled points."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for start, colour in (("dense", "#555555"), ("searched", "#c2410c")):
        line = sorted((row for row in rows if row["name"].startswith(start)), key=lambda row: row["macs"])
        axes.errorbar(
            [row["macs"] / 1e6 for row in line],
            [row["top1"] for row in line],
            yerr=[row["deviation"] for row in line],
            color=colour,
            marker="o",
            capsize=3,
            label="dense ViTs of several widths" if start == "dense" else "searched, of the widest",
        )
    for row in rows:
        if not row["name"].startswith(("dense", "searched")):
            axes.errorbar(row["macs"] / 1e6, row["top1"], yerr=row["deviation"], color="#1d4ed8", marker="s", capsize=3)
            axes.annotate(
                row["name"], (row["macs"] / 1e6, row["top1"]), xytext=(6, -10), textcoords="offset points", fontsize=8
            )
    axes.set(
        xlabel="MACs per image (M)",
        ylabel="test top-1 (%)",
        title="Fashion-MNIST from scratch, mean and deviation over seeds",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run or resume everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="where FashionMNIST/raw lies")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--patch", type=int, choices=LEVELS, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--search-epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/fashion-results"))
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    console, device = Console(stderr=True), torch.device(given.device)
    patch, width = given.patch, given.width
    given.out.mkdir(parents=True, exist_ok=True)
    first_images(given.data_dir, given.work, given.images)
    run = given.work / "run"
    args = ",".join(f"{name}={value}" for name, value in model_args(patch, width).items())
    changes = ",".join(f"{name}={value}" for name, value in RECIPE.items())
    words = ["--data", "torch/fashion_mnist", "--data-dir", str(given.work), "--model", MODEL, "--model-args", args]
    words += ["--img-size", "28", "--in-chans", "1", "--levels", ",".join(map(str, LEVELS[patch]))]
    words += ["--epochs", str(given.search_epochs), "--recipe", changes, "--device", given.device, "--out", str(run)]
    command = "from poolshare.search.cli import main; main()"
    subprocess.run([sys.executable, "-c", command, "search", *words], check=True)
    candidates = RunFolder.open(run).read_candidates()
    recipe = Recipe(epochs=given.epochs, batch_size=64, lr=2e-3, **RECIPE)
    data = open_data(
        Place("torch/fashion_mnist", given.work), ImageFormat(28, in_chans=1, mean=(0.5,), std=(0.5,), crop_pct=1.0),
        augmentation=recipe.augmentation,
    )  # fmt: skip
    everybody = list(competitors(candidates, patch, width))
    dense_macs = macs_of(fresh(everybody[0][2], patch, width))
    table = given.out / "models.csv"
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    done = {(row["name"], row["seed"]) for row in rows}
    for seed in range(given.seeds):
        data.seed = seed  # of order and augmentation; the splits are made
        for name, wide, architecture in everybody:
            if (name, seed) in done:
                continue
            same = [
                row
                for row in rows
                if (row["architecture"], row["width"], row["seed"]) == (str(architecture), wide, seed)
            ]
            if same:
                rows.append(same[0] | {"name": name})
                write_csv(table, pd.DataFrame(rows))
                continue
            torch.manual_seed(seed)
            model = fresh(architecture, patch, wide)
            macs = macs_of(model)
            model.to(device)
            total = recipe.epochs * steps_per_epoch(data.full, recipe)
            with progress_bar(console, f"{name}, seed {seed}", total, "steps") as advance:
                train_model(
                    model, data.full, recipe, seed=seed,
                    progress=partial(advance_loss, advance),
                )  # fmt: skip
            (correct,), images, _ = answers(model, data.eval_loader("test", 256)).counts
            row = {"name": name, "seed": seed, "width": wide, "macs": macs, "of_dense": macs / dense_macs}
            row |= {"correct": correct, "total": images, "top1": 100 * correct / images}
            rows.append(row | {"architecture": str(architecture)})
            write_csv(table, pd.DataFrame(rows))
            console.print(f"{name}, seed {seed}: {row['top1']:.1f} % at {row['of_dense']:.0%} of the dense MACs")
    found = summarise(pd.DataFrame(rows))
    facts = {"images": given.images, "recipe": recipe.model_dump(), "versions": versions(), "device": given.device}
    write_json(given.out / "models.json", facts | {"threads": torch.get_num_threads(), "models": found})
    draw(found, given.out / "frontier.png")


if __name__ == "__main__":
    main()
