"""Checks of samples and batches of data given in Python; faults are described in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from poolshare.space.errors import DataError

from ..tasks.task import Targets
from .pictures import digest
from .sources import Split

IMAGE_KEYS, LABEL_KEYS = ("pixel_values", "image"), ("label", "labels")  # of samples that are dictionaries


class Part(NamedTuple):
    """The training or validation images that were read."""

    split: Split
    shape: tuple[int, ...]  # of all its images
    repeatable: bool  # whether a second reading with the same seeds gives the same images
    sizes: tuple[int, ...] = ()  # images of its batches, each number once, rising; where it is a loader


def image_of(item: Any) -> Any:
    """The image of a sample, or the images of a batch, whatever else is in it."""
    if isinstance(item, Mapping):
        return next((item[key] for key in IMAGE_KEYS if key in item), None)
    return item[0] if isinstance(item, (tuple, list)) and item else item


def pair(item: Any, targets: Targets) -> tuple[Any, Any]:
    """Image and label of a sample, or images and labels of a batch; without labels zeros. Raises DataError for anything else."""
    if targets == "dense":
        image = image_of(item)
        batch = isinstance(image, Tensor) and image.ndim == 4
        return image, torch.zeros(len(image), dtype=torch.int64) if batch else 0
    if isinstance(item, Mapping):
        found = [[item[key] for key in keys if key in item][:1] for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if all(found):
            return found[0][0], found[1][0]
        raise DataError(
            f"it is a dictionary of {', '.join(map(repr, item))}, and must have {' or '.join(map(repr, IMAGE_KEYS))}, and "
            f"{' or '.join(map(repr, LABEL_KEYS))}"
        )
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"it is {described(item)}, and must be (image tensor, label)")
    return item[0], item[1]


def image_fault(image: Any, dimensions: int) -> str:
    wanted = "(channels, H, W)" if dimensions == 3 else "(B, channels, H, W)"
    if not isinstance(image, Tensor):
        return f"its image is {described(image)}, and must be a float tensor {wanted}: end its transform in a tensor"
    if image.ndim != dimensions or not image.is_floating_point():
        return f"its image is {described(image)}, and must be a float tensor {wanted}"
    return ""


def not_finite_fault(image: Tensor) -> str:
    return "" if bool(torch.isfinite(image).all()) else "its image holds values that are not finite"


def whole_numbers(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex())


def label_fault(label: Any, targets: Targets) -> str:
    if targets == "classes":
        fault = hot_fault(label, 1)
        return f"its label is {described(label)}, and must be a 0 or 1 for each class" if fault else ""
    whole = isinstance(label, (int, np.integer)) or (
        isinstance(label, Tensor) and label.ndim == 0 and whole_numbers(label)
    )
    return "" if whole and int(label) >= 0 else f"its label is {described(label)}, and must be a class index, 0, 1, 2 …"


def hot_fault(labels: Any, dimensions: int) -> bool:
    """Whether labels are anything but zeros and ones, for each class, and in a batch for each image."""
    if not isinstance(labels, (Tensor, np.ndarray, list, tuple)):
        return True
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return True
    return values.ndim != dimensions or not values.numel() or not bool(((values == 0) | (values == 1)).all())


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype} and shape {value.shape}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.40}" if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def listed(shapes: Any) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in sorted(shapes))


def image_digest(image: Tensor) -> int:
    return digest(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def digest_column(digests: list[int], repeatable: bool) -> np.ndarray:
    """(N,) uint64; all 1 where the images differ from one reading to the next."""
    return np.array(digests, dtype=np.uint64) if repeatable else np.ones(len(digests), dtype=np.uint64)
