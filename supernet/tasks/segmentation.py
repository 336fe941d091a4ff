"""A class for every pixel, judged by the mean over the classes of intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.pictures import IGNORED
from .classification import most_probable
from .task import Task


class Segmentation(Task):
    """Outputs are logits (B, classes, H, W), targets class indices (B, H, W), or IGNORED, which counts for nothing.

    An image contributes three numbers of each class, in this order: its pixels that are of the class and are taken for it,
    those that are taken for it, and those that are of it. That is what a confusion matrix says of intersections and unions,
    in 3 · classes numbers; only labelled pixels count. A class that is neither there nor found has no share in the mean.
    """

    name = "segmentation"
    metric = "mIoU"
    targets = "pixels"
    loss_words = "cross-entropy with the masks"

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean over the labelled pixels of the batch; 0 where there are none."""
        total = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp_min(1)

    def follow(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """The mean over all pixels, labelled or not: the teacher has an answer for each."""
        return F.cross_entropy(outputs, taught.softmax(dim=1))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the labelled pixels of each image."""
        losses = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="none")
        return losses.sum(dim=(1, 2)) / (targets != IGNORED).sum(dim=(1, 2)).clamp_min(1)

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL(reference ‖ outputs) of the class probabilities, the mean over the pixels of each image."""
        answers, wanted = (logits.log_softmax(dim=1) for logits in (outputs, reference))
        return F.kl_div(answers, wanted, reduction="none", log_target=True).sum(dim=1).clamp_min(0).mean(dim=(1, 2))

    def as_targets(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1)

    def contributions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B, 3 · classes) int64, see the class."""
        classes, found = outputs.shape[1], outputs.argmax(dim=1)
        image = torch.arange(len(outputs), device=outputs.device)[:, None, None] * classes
        labelled = targets != IGNORED

        def counted(indices: Tensor, where: Tensor) -> Tensor:
            counts = torch.bincount((indices + image)[where], minlength=len(outputs) * classes)
            return counts.unflatten(0, (len(outputs), classes))

        parts = counted(targets, labelled & (found == targets)), counted(found, labelled), counted(targets, labelled)
        return torch.cat(parts, dim=1)

    def number(self, sums: np.ndarray, images: int) -> Any:
        """Mean intersection over union, in percent."""
        return 100 * _mean(_iou(sums))

    def details(
        self, contributions: np.ndarray, targets: Tensor, outputs: Tensor, classes: Sequence[str]
    ) -> dict[str, Any]:
        """pixel_accuracy and mean_class_accuracy in percent, and per_class: of each class its name, the images it is in, and as
        score its intersection over union in percent; without classes that are neither there nor found."""
        sums = contributions.sum(axis=0)
        right, _, there = np.split(sums, 3)
        images = (np.split(contributions, 3, axis=1)[2] > 0).sum(axis=0)
        with np.errstate(invalid="ignore"):
            recalls = right / there
        return {
            "pixel_accuracy": 100 * float(right.sum() / there.sum()),
            "mean_class_accuracy": 100 * float(_mean(recalls)),
            "per_class": [
                {"class": name, "images": int(count), "score": 100 * float(iou)}
                for name, count, iou in zip(classes, images, _iou(sums), strict=True)
                if not np.isnan(iou)
            ],
        }

    def predictions(self, outputs: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
        """The `top` classes of most pixels, as "classes", with their shares of the image, 0 to 1."""
        found, count = outputs.argmax(dim=1).flatten(1), outputs.shape[1]
        shares = [torch.bincount(image, minlength=count) / len(image) for image in found]
        answers = most_probable(torch.stack(shares), classes, top)
        return [{"classes": [one for one in answer["classes"] if one["probability"]]} for answer in answers]


SEGMENTATION = Segmentation()


def _iou(sums: np.ndarray) -> np.ndarray:
    """Of each class, (…, 3 · classes) → (…, classes); nan for a class that is neither there nor found."""
    right, found, there = np.split(np.asarray(sums, dtype=float), 3, axis=-1)
    with np.errstate(invalid="ignore"):
        return right / (found + there - right)  # type: ignore[no-any-return]


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, without nan; 0 where nothing else is there."""
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1).clip(1)  # type: ignore[no-any-return]
