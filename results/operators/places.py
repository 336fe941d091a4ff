"""What it costs to rotate merged tokens by wrong places: a small DINOv3 on Fashion-MNIST, 3 seeds.

    python results/operators/places.py FASHION_MNIST      # a folder with the four IDX files; ten minutes of one core

Its positions are rotary alone. Each seed trains the dense model once; then every operator is put in at one schedule, with
places as they are carried (the mean of a token's patches, or its own), and with what is there without bookkeeping: "first",
the places of the first patches, as a table cut to the number of tokens has them; "spread", places at even distances along
the sequence. Each is tested as it is, and after the same short training from the dense weights. Differences are paired by
test image. Writes results/operators/places.csv after every row.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F

from poolshare.search.job.records import write_csv
from poolshare.space import Architecture
from poolshare.supernet import Subnet
from poolshare.supernet.operators.pooling import Pooling
from poolshare.supernet.subnet import checkpoint_filter_fn
from poolshare.supernet.tokens import grid_places

HERE = Path(__file__).parent
BASE = "vit_small_patch16_dinov3"
OPTIONS = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 2,
}
OPERATORS = ("tome", "kmeans", "topk")
SCHEDULE = "49 49 32@{0} 20@{0} 12@{0} 12"
TRAIN, TEST, EPOCHS, TUNE_EPOCHS = 8000, 2000, 6, 1
PATCHES = (7, 7)  # rows, columns
PLACES = ("carried", "first", "spread")


@contextmanager
def placed(how: str) -> Iterator[None]:
    """Inside, pooled tokens stand where `how` says."""
    pool = Pooling.pool

    def wrong(self: Pooling, *arguments: Any) -> Any:
        tokens = pool(self, *arguments)
        positions = torch.arange(self.after)
        if how == "spread":
            positions = positions * math.prod(PATCHES) // self.after
        places = grid_places(math.prod(PATCHES), PATCHES)[positions]
        return tokens._replace(places=places.expand(len(tokens.features), -1, -1))

    if how != "carried":
        Pooling.pool = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        Pooling.pool = pool  # type: ignore[method-assign]


def train(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, lr: float, seed: int
) -> None:
    """AdamW, a cosine after a short warm-up, images shifted by up to 2 pixels and mirrored."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator)[: len(images) // 64 * 64].split(64):
            row, column = torch.randint(0, 5, (2,), generator=generator).tolist()
            x = F.pad(images[batch], (2, 2, 2, 2))[:, :, row : row + 28, column : column + 28]
            x = x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def right(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """1 for every image that is classified rightly."""
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(1) for batch in images.split(250)]).eq(labels).float().numpy()


def read(folder: Path, kind: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images, (count, 1, 28, 28) from -1 to 1, and their labels."""
    pixels = np.fromfile(folder / f"{kind}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 1, 28, 28)[:count]
    labels = np.fromfile(folder / f"{kind}-labels-idx1-ubyte", np.uint8)[8:][:count]
    return torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(labels).long()


def main() -> None:
    """Train, pool, test, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    images, labels = read(options.folder, "train", TRAIN)
    test = read(options.folder, "t10k", TEST)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        dense: Any = timm.create_model(BASE, **OPTIONS)
        train(dense, images, labels, EPOCHS, 2e-3, seed)
        rows.append({"seed": seed, "operator": "dense", "top1": 100 * right(dense, *test).mean()})
        for operator in OPERATORS:
            reference: dict[str, np.ndarray] = {}
            for how in PLACES:
                with placed(how):
                    model = Subnet.from_base(BASE, str(Architecture.parse(SCHEDULE.format(operator))), **OPTIONS)
                    model.load_state_dict(checkpoint_filter_fn(dense.state_dict(), model))
                    found = {"top1": right(model.eval(), *test)}
                    train(model, images, labels, TUNE_EPOCHS, 5e-4, seed)
                    found["tuned"] = right(model, *test)
                reference = reference or found
                row: dict[str, Any] = {"seed": seed, "operator": operator, "places": how}
                for name, values in found.items():
                    difference = 100 * (values - reference[name])
                    margin = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
                    row |= {
                        name: 100 * values.mean(),
                        f"{name}_over_carried": difference.mean(),
                        f"{name}_margin": margin,
                    }
                rows.append(row)
                print(row, flush=True)
                write_csv(HERE / "places.csv", pd.DataFrame(rows).round(3))


if __name__ == "__main__":
    main()
