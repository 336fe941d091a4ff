"""Images in, class names and probabilities out, by an exported model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils import natural_key

from poolshare.space import DataError
from poolshare.supernet.sources import Images, check_images, passed_over_note
from poolshare.supernet.transforms import Augmentation, picture_transform

from .export import load_export
from .prepare import opening_options, pick_device

BATCH = 64


@torch.inference_mode()
def predict(
    exported: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 3,
    device: str | None = None,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """For each image its path and its `top` most probable classes with their probabilities, 0 to 1, falling.

    images: files, and folders whose images, however deep, are taken in natural order. say: told which files of a folder
    are passed over.
    Raises DataError where there is none, BrokenDataError naming all that cannot be read.
    """
    paths = [path for one in images for path in _files(Path(one), say)]
    pictures = Images([(path,) for path in paths], "the images")
    check_images(pictures, None)
    source, place = load_export(exported), pick_device(device)
    transform = picture_transform(**opening_options(source.data_config), augmentation=Augmentation.none())
    model, classes = source.model.eval().to(place), source.facts["classes"]
    found = []
    for start in range(0, len(paths), BATCH):
        inputs = torch.stack(
            [transform(pictures(index), None) for index in range(start, min(start + BATCH, len(paths)))]
        )
        for path, row in zip(paths[start : start + BATCH], model(inputs.to(place)).softmax(dim=-1).cpu(), strict=True):
            values, indices = row.topk(min(top, len(classes)))
            named = zip(indices.tolist(), values.tolist(), strict=True)
            found.append(
                {"image": path, "classes": [{"class": classes[index], "probability": value} for index, value in named]}
            )
    return found


def _files(path: Path, say: Callable[[str], None] | None) -> list[str]:
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise DataError(f"no image and no folder at {str(path)!r}")
    endings = get_img_extensions()
    names = [os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files]
    images = sorted((name for name in names if os.path.splitext(name)[1].lower() in endings), key=natural_key)
    if not images:
        raise DataError(f"no image ({' '.join(endings)}) in {str(path)!r}")
    if say:
        for note in passed_over_note(path, sorted(os.path.relpath(name, path) for name in {*names} - {*images})):
            say(note)
    return images
