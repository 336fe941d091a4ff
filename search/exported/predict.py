"""Images in, class names and probabilities or masks out, by an exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from poolshare.space import BrokenDataError, ConfigError, DataError
from poolshare.space.quantities import check_whole
from poolshare.supernet.data.listing import ENDINGS, list_folder
from poolshare.supernet.data.pictures import Images
from poolshare.supernet.data.transforms import Augmentation, mask_transform, picture_transform
from poolshare.supernet.tasks import Task
from poolshare.supernet.threads import choose_threads, computing_with

from ..job.prepare import image_format, pick_device
from ..progress import progress_bar
from .export import check_new, load_export
from .masks import MaskWriter
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
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """For each image its path and what the task says of it: of classification the `top` most probable classes with their
    probabilities, 0 to 1, falling; of segmentation the classes of most pixels with their shares of the image.

    images: files, and folders whose images, however deep, are taken in natural order. say: told which files of a folder
    are passed over. console: where the progress of more than one batch goes. threads: of PyTorch on a CPU; None: see
    `choose_threads`. task: one that was given in Python to the search.
    out: a new folder for what a model with a head for every pixel predicts, see `MaskWriter`; the paths are said with each image.
    An image that cannot be read has an `error` instead, which names it and says why. Raises DataError where there
    are not images.
    """
    check_whole(1, top=top, threads=threads)
    paths = [path for one in images for path in _files(Path(one), say)]
    source, place = load_export(exported), pick_device(device)
    task = task_of(source, task)
    read = Images([(path,) for path in paths], "the images", source.facts.get("scale_16bit", False))
    pixels, writer = source.facts["targets"] == "pixels", None
    if out is not None:
        if not pixels:
            raise ConfigError(f"--out {out} is for masks, and the task of {source.path} is {task.name}: leave it out")
        check_new(Path(out))
        writer = MaskWriter(Path(out), paths)
    transform: Any = (mask_transform if pixels else picture_transform)(
        image_format(source.data_config), Augmentation.none()
    )
    model, classes = source.model.eval().to(place), source.facts["classes"]
    found: list[dict[str, Any]] = [{"image": path} for path in paths]
    chosen = choose_threads(threads, source.facts.get("threads"), model)
    shown = console if console and len(paths) > BATCH else Console(quiet=True)
    with computing_with(chosen.number), progress_bar(shown, "predicting", len(paths), "images") as advance:
        for start in range(0, len(paths), BATCH):
            whole, inputs, pictures = [], [], []
            for index in range(start, min(start + BATCH, len(paths))):
                try:
                    picture = read(index)
                    inputs.append(transform(picture, None))
                    pictures += [picture] if writer else []
                    whole.append(index)
                except BrokenDataError as error:
                    found[index]["error"] = str(error).removeprefix("cannot read ")
            if not inputs:  # all of them are broken
                advance(min(start + BATCH, len(paths)))
                continue
            outputs = model(torch.stack(inputs).to(place))
            for index, one in zip(whole, task.predictions(outputs, classes, top), strict=True):
                found[index] |= one
            for index, logits, picture in zip(whole, outputs, pictures, strict=True) if writer else ():
                found[index] |= writer.write(index, logits, picture)  # type: ignore[union-attr]
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
