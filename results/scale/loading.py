"""Does loading images cost more than with timm's own loader? Writes loading.json.

    python results/scale/loading.py --images FOLDER      # 500 photos: 5 minutes

FOLDER: image files, however deep. The same files, transforms and batches, with 0, 1 and 2 processes that load images: rounds of
both loaders in turn, each round a new loader and an epoch without its first batches, in which processes start. What counts is
the median over rounds of the ratio of the two speeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader

from poolshare.search.job.records import versions
from poolshare.supernet.data import Data, ImageFormat, Place, open_data
from poolshare.supernet.data.transforms import Augmentation

SIZE, BATCH, FIRST = 224, 32, 4  # pixels; images; batches that are not counted
SCALE, HFLIP, JITTER = (0.08, 1.0), 0.5, 0.4  # as ImageNet is usually trained


def link(files: list[Path], root: Path) -> Path:
    """ROOT/0 and ROOT/1, half of the files in each."""
    for index, file in enumerate(files):
        folder = root / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}{file.suffix}").symlink_to(file.resolve())
    return root


def ours(data: Data, workers: int, epoch: int) -> Iterable[Any]:
    """An epoch as a training has it."""
    return data.train_loader(epoch, BATCH, workers=workers)


def theirs(root: Path, workers: int) -> Iterable[Any]:
    """The same by timm."""
    return create_loader(
        create_dataset("", root=str(root), is_training=True),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        use_prefetcher=False,
        scale=SCALE,
        hflip=HFLIP,
        color_jitter=JITTER,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_workers=workers,
        pin_memory=False,
        persistent_workers=workers > 0,
        device=torch.device("cpu"),
    )


def speed(loader: Iterable[Any]) -> float:
    """Images per second."""
    batches = iter(loader)
    for _ in islice(batches, FIRST):
        pass
    start = time.perf_counter()
    images = sum(len(labels) for _, labels in batches)
    return images / (time.perf_counter() - start)


def main() -> None:
    """Time both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("loading.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(path for path in given.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    found: dict[str, Any] = {
        "images": min(given.count, len(files)),
        "batch": BATCH,
        "pixels": SIZE,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": versions() | {"torch": torch.__version__, "timm": timm.__version__},
        "workers": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        root = link(files[:: max(1, len(files) // given.count)][: given.count], Path(temporary, "train"))
        data = open_data(
            Place(str(root)),
            ImageFormat(SIZE, 3, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            augmentation=Augmentation(HFLIP, SCALE, JITTER),
            search_fraction=0.001,
            test_fraction=0.001,
        )
        for workers in (0, 1, 2):
            rounds = [
                (speed(ours(data, workers, number)), speed(theirs(root, workers))) for number in range(given.rounds)
            ]
            ratios = sorted(mine / other for mine, other in rounds)
            medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
            found["workers"][str(workers)] = {
                "poolshare_images_per_second": round(medians[0], 1),
                "timm_images_per_second": round(medians[1], 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
            print(workers, found["workers"][str(workers)], flush=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
