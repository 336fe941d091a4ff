"""How long does a folder of ImageNet's size keep a search from beginning? Writes scale.json.

    python results/scale/reproduce.py --images PHOTOS --work FOLDER                  # 1,280,000 files, some 10 minutes
    python results/scale/reproduce.py --images PHOTOS --work FOLDER --count 128000

PHOTOS: a folder of class folders with real JPEG files. FOLDER gets train/CLASS/*.jpg in 1,000 classes, hard links to copies
of some of these files, so they take next to no disk. Each opening is a process of its own, as each verb's is: its time from
the start of opening, the processor time of that process, and its greatest resident size. Then a file is changed, one
removed, one added and one broken, and what a continued run would say of each is kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import timm
import torch

from poolshare.search.job.images import changed_files, difference, write_images
from poolshare.search.job.records import versions
from poolshare.space import BrokenDataError
from poolshare.supernet.data import ImageFormat, Place, open_data
from poolshare.supernet.data.seen import CACHE_VARIABLE
from poolshare.supernet.training.loop import train_model
from poolshare.supernet.training.recipe import Recipe

CLASSES, COPIES, LINKS = 1000, 24, 60_000  # links: file systems allow some 65,000 to one file


def make(root: Path, photos: Path, count: int) -> None:
    """Link `count` files into 1,000 class folders below root/train."""
    originals = sorted(photos.rglob("*.jpg"))[:: max(1, len(list(photos.rglob("*.jpg"))) // COPIES)][:COPIES]
    pool = root / "pool"
    pool.mkdir(parents=True)
    copies = [
        shutil.copy(one, pool / f"{turn}-{one.parent.name}-{one.name}")
        for turn in range(-(-count // (LINKS * len(originals))))
        for one in originals
    ]
    files = islice(cycle(copies), count)
    for index, file in enumerate(files):
        folder = root / "train" / f"n{index % CLASSES:08d}"
        if index < CLASSES:
            folder.mkdir(parents=True)
        os.link(file, folder / f"{folder.name}_{index // CLASSES}.jpg")


def opened(root: Path) -> Any:
    """The data as a search opens them."""
    return open_data(Place(str(root)), ImageFormat((112, 112), 3, (0.5,) * 3, (0.5,) * 3))


def opening(root: Path) -> dict[str, Any]:
    """Seconds and megabytes of an opening, and its fingerprint."""
    start, processor = time.perf_counter(), time.process_time()
    data = opened(root)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    usage = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {"seconds": seconds, "cpu_seconds": processor, "mb": usage[0], "mb_of_a_process": usage[1]}
    return found | {"fingerprint": data.fingerprint}


def first_step(root: Path) -> dict[str, Any]:
    """Seconds from the start of opening to the end of the first training step of a batch of 64."""

    class Done(Exception):
        pass

    def stop(step: int, loss: float | None) -> None:
        raise Done

    start, processor = time.perf_counter(), time.process_time()
    data = opened(root)
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, num_classes=len(data.classes))
    with suppress(Done):
        train_model(model, data, Recipe(epochs=1, batch_size=64), workers=2, progress=stop)
    processor = time.process_time() - processor
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cpu_seconds": processor,
        "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def told(root: Path, table: Path, then: str) -> str:
    """What a run that was begun with other files says."""
    try:
        data = opened(root)
    except BrokenDataError as error:
        return str(error)
    return f"{difference(data.fingerprint, then)}: {changed_files(table, dict(data.files()))}"


def keep(root: Path, table: Path) -> None:
    """Write the table of images that a run keeps."""
    write_images(table, opened(root).files())


def alone(task: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def main() -> None:
    """Make the files, open them, change some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1_280_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("scale.json"))
    given = parser.parse_args()
    os.environ[CACHE_VARIABLE] = str(given.work / "cache")
    root, table = given.work / "images", given.work / "images.csv"
    if not root.exists():
        start = time.perf_counter()
        make(root, given.images, given.count)
        print(f"{given.count:,} files made in {time.perf_counter() - start:.0f} s", flush=True)
    train = root / "train"
    found: dict[str, Any] = {
        "files": given.count,
        "cores": os.cpu_count(),
        "others_on_them": os.getloadavg()[0],
        "versions": versions(),
        "torch": torch.__version__,
    }
    for name in ("first", "second", "third"):
        found[name] = alone(opening, train)
        print(name, found[name], flush=True)
    found["first_step"] = alone(first_step, train)
    print("first step", found["first_step"], flush=True)
    alone(keep, train, table)
    then, some = found["third"]["fingerprint"], sorted(train.iterdir())[500]
    images = sorted(some.iterdir())
    content = images[1].read_bytes()
    whole = {path: path.read_bytes() for path in images[:4]}

    def replaced(path: Path, new: bytes) -> None:
        path.unlink()  # it is a link: its neighbours stay as they are
        path.write_bytes(new)

    replaced(images[0], images[0].read_bytes() + b"\0")
    found["changed"] = alone(told, train, table, then)
    replaced(images[0], whole[images[0]])
    images[1].unlink()
    found["missing"] = alone(told, train, table, then)
    images[1].write_bytes(content)
    (some / "new.jpg").write_bytes(content)
    found["added"] = alone(told, train, table, then)
    (some / "new.jpg").unlink()
    replaced(images[2], whole[images[2]][:200])
    found["broken"] = alone(told, train, table, then)
    replaced(images[2], whole[images[2]])
    found["mended"] = alone(told, train, table, then)
    for name in ("changed", "missing", "added", "broken", "mended"):
        found[name] = found[name].replace(str(train), "ROOT")
        print(name, found[name], flush=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
