"""Images in, class names and probabilities out, by an exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from poolshare.space import BrokenDataError, DataError
from poolshare.space.quantities import check_whole
from poolshare.supernet.data.listing import ENDINGS, list_folder
from poolshare.supernet.data.pictures import Images
from poolshare.supernet.data.transforms import Augmentation, picture_transform
from poolshare.supernet.tasks import Task
from poolshare.supernet.threads import choose_threads, computing_with

from ..job.prepare import image_format, pick_device
from ..progress import progress_bar
from .export import load_export
from .retrain import task_of

BATCH = 64


@torch.inference_mode()
def predict(
    exported: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 3,
    device: str | None = None,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
    console: Console | None = None,
    task: Task | None = None,
) -> list[dict[str, Any]]:
    """For each image its path and what the task says of it: of classification the `top` most probable classes with their
    probabilities, 0 to 1, falling.

    images: files, and folders whose images, however deep, are taken in natural order. say: told which files of a folder
    are passed over. console: where the progress of more than one batch goes. threads: of PyTorch on a CPU; None: see
    `choose_threads`. task: one that was given in Python to the search.
    An image that cannot be read has an `error` instead, which names it and says why. Raises DataError where there
    are not images.
    """
    check_whole(1, top=top, threads=threads)
    paths = [path for one in images for path in _files(Path(one), say)]
    source, place = load_export(exported), pick_device(device)
    task = task_of(source, task)
    read = Images([(path,) for path in paths], "the images", source.facts.get("scale_16bit", False))
    transform = picture_transform(image_format(source.data_config), Augmentation.none())
    model, classes = source.model.eval().to(place), source.facts["classes"]
    found: list[dict[str, Any]] = [{"image": path} for path in paths]
    chosen = choose_threads(threads, source.facts.get("threads"), model)
    shown = console if console and len(paths) > BATCH else Console(quiet=True)
    with computing_with(chosen.number), progress_bar(shown, "predicting", len(paths), "images") as advance:
        for start in range(0, len(paths), BATCH):
            whole, inputs = [], []
            for index in range(start, min(start + BATCH, len(paths))):
                try:
                    inputs.append(transform(read(index), None))
                    whole.append(index)
                except BrokenDataError as error:
                    found[index]["error"] = str(error).removeprefix("cannot read ")
            said = task.predictions(model(torch.stack(inputs).to(place)), classes, top) if inputs else ()
            for index, one in zip(whole, said, strict=True):
                found[index] |= one
            advance(min(start + BATCH, len(paths)))
    return found


def _files(path: Path, say: Callable[[str], None] | None) -> list[str]:
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise DataError(f"no image and no folder at {str(path)!r}")
    listing = list_folder(path)
    if not listing.paths:
        raise DataError(f"no image ({' '.join(ENDINGS)}) in {str(path)!r}")
    for note in listing.notes if say else ():
        say(note)  # type: ignore[misc]
    return [str(path / name) for name in listing.paths]
