"""ImageNet classes without any training: every operator put into a pretrained ViT-Tiny, by paired differences.

    python results/operators/imagenet.py IMAGES WEIGHTS      # a quarter of an hour on 2 cores

IMAGES: a folder per class, the sorted names being ImageNet's order; WEIGHTS: safetensors of vit_tiny_patch16_224. Each
row is one path: MACs over the dense model's, top-1, and the mean of its paired difference to the dense model and to
the row it refines, with the 95 % interval over images. Rows of "sizes restart" let every pooling begin with sizes of
one, which is what merging was before tokens carried theirs. After every row it writes results/operators/imagenet.csv,
and which images are classified rightly to imagenet_right.csv; rows that stand there are not computed again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

from poolshare.search.job.records import write_csv
from poolshare.space import Architecture
from poolshare.supernet import Subnet, count_macs
from poolshare.supernet.tokens import Carry

BASE = "vit_tiny_patch16_224"
HERE = Path(__file__).parent
RIGHT = HERE / "imagenet_right.csv"


def every_layer(operator: str, merges: int) -> str:
    """So many tokens fewer before each block from the second on."""
    return " ".join(["196", *(f"{196 - merges * layer}@{operator}" for layer in range(1, 12))])


def at(operator: str, reductions: dict[int, int]) -> str:
    """Patch tokens before the blocks that reduce them, these counted from 0."""
    words, tokens = [], 196
    for layer in range(12):
        tokens = reductions.get(layer, tokens)
        words.append(f"{tokens}@{operator}" if layer in reductions else str(tokens))
    return " ".join(words)


THIRDS = {3: 137, 6: 96, 9: 67}  # a keep rate of 0.7, as in MSTM and EViT
# Name, architecture, whether sizes restart at every pooling, and the name of the row that it refines.
ROWS: list[tuple[str, str, bool, str]] = [("dense", "196 " * 11 + "196", False, "dense")]
for merges in (8, 13):
    ROWS += [
        (f"tome, {merges} a layer, sizes restart", every_layer("tome", merges), True, "dense"),
        (f"tome, {merges} a layer", every_layer("tome", merges), False, f"tome, {merges} a layer, sizes restart"),
        (f"tome_prop, {merges} a layer", every_layer("tome_prop", merges), False, f"tome, {merges} a layer"),
    ]
ROWS += [
    ("tome, 196 to 98 before block 4", at("tome", {4: 98}), False, "dense"),
    ("tome_prop, 196 to 98 before block 4", at("tome_prop", {4: 98}), False, "tome, 196 to 98 before block 4"),
    ("kmeans, 196 to 98 before block 4", at("kmeans", {4: 98}), False, "dense"),
    ("avg2d, 196 to 49 before block 6", at("avg2d", {6: 49}), False, "dense"),
]
for operator in ("tome", "tome_prop", "kmeans", "kmedoids", "wkmedoids", "mstm", "evit", "topk"):
    name = f"{operator}, keep rate 0.7"
    if operator in ("tome", "kmeans", "kmedoids"):
        ROWS.append((f"{name}, sizes restart", at(operator, THIRDS), True, "dense"))
    refined = f"{name}, sizes restart" if operator in ("tome", "kmeans", "kmedoids") else "dense"
    ROWS.append((name, at(operator, THIRDS), False, "tome, keep rate 0.7" if operator == "tome_prop" else refined))


def interval(right: pd.Series, other: pd.Series) -> tuple[float, float]:
    """Mean of the paired difference in points, and half of its 95 % interval."""
    difference = 100 * (right - other)
    return difference.mean(), 1.96 * difference.std(ddof=1) / len(difference) ** 0.5


def main() -> None:
    """Score every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    transform = create_transform((3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.9)
    classes = sorted(folder for folder in options.images.iterdir() if folder.is_dir())
    files = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in files])
    labels = torch.tensor([label for _, label in files])

    weights = load_file(options.weights)
    # Row → MACs, and 1 for every image that it classifies rightly; what is written down already is kept.
    macs: dict[str, int] = {}
    right = pd.read_csv(RIGHT) if RIGHT.exists() else pd.DataFrame()
    for name, architecture, restart, _ in ROWS:
        model = Subnet.from_base(BASE, str(Architecture.parse(architecture)), num_classes=1000)
        fresh = model.state_dict()  # MSTM's multi-scale part begins as the identity
        fresh.update({key: value for key, value in weights.items() if key in fresh})
        model.load_state_dict(fresh)
        if restart:
            model.carry = Carry.NOTHING
        model.eval().to(options.device)
        macs[name] = count_macs(model, (images[:1].to(options.device),))
        if name not in right:
            with torch.inference_mode():
                found = [model(batch.to(options.device)).argmax(1).cpu() for batch in images.split(50)]
            right[name] = (torch.cat(found) == labels).int().numpy()
            write_csv(RIGHT, right)
        rows = table(macs, right)
        write_csv(HERE / "imagenet.csv", rows)
        row = rows.iloc[-1]
        print(
            f"{name:45} {row['macs']:.3f} {row['top1']:.1f}  {row['over_refined']:+.1f} ± "
            f"{row['over_refined_interval']:.1f} over {row['refines']}",
            flush=True,
        )


def table(macs: dict[str, int], right: pd.DataFrame) -> pd.DataFrame:
    """The rows so far, each beside the dense model and the row it refines."""
    rows = []
    for name, architecture, _, refined in ROWS[: len(macs)]:
        row = {"row": name, "macs": macs[name] / macs["dense"], "top1": 100 * right[name].mean()}
        for column, other in (("dense", "dense"), ("refined", refined)):
            row[f"over_{column}"], row[f"over_{column}_interval"] = interval(right[name], right[other])
        rows.append(row | {"refines": refined, "architecture": architecture})
    return pd.DataFrame(rows).round(4)


if __name__ == "__main__":
    main()
