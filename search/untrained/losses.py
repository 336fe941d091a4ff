"""What a reduction does to each image's answer: losses in whole micronats, their mean and its paired interval.

Top-1 moves only where an image is near a border between classes; a loss moves with every image, so a few hundred of
them distinguish architectures of equal accuracy. A loss is rounded to a whole number of micronats (1e-6 nat)
image by image: sums are exact, whatever the order of images, batches and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from poolshare.space import Architecture, ConfigError, ModelError
from poolshare.supernet import SuperNet
from poolshare.supernet.data.splits import Batches

from ..scoring import Metric, judged, top1

MICRONATS = 1_000_000  # per nat
LOSSES = ("divergence", "cross-entropy")


@dataclass(frozen=True)
class ImageLosses:
    """Architectures × images: how far each answer is from the wanted one, and whether it counts as right."""

    loss: np.ndarray  # (architectures, images) int64, micronats
    right: np.ndarray  # (architectures, images) bool

    def __post_init__(self) -> None:
        assert self.loss.shape == self.right.shape
        assert self.loss.dtype == np.int64

    @property
    def images(self) -> int:
        """Number of images."""
        return self.loss.shape[1]

    def followed_by(self, other: ImageLosses) -> ImageLosses:
        """The same architectures on these images and then on those of `other`."""
        return ImageLosses(np.hstack([self.loss, other.loss]), np.hstack([self.right, other.right]))


class Difference(NamedTuple):
    """A mean over images with its 95 % interval, in nats."""

    mean: float
    low: float
    high: float


def paired(loss: np.ndarray, reference: np.ndarray) -> Difference:
    """Mean of `loss` − `reference`, two architectures' micronats on the same images, by Student's t for pairs.

    Two arrays (images,) → nats. The interval of a single image is everything.
    """
    differences = (loss - reference) / MICRONATS
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Difference(mean, -np.inf, np.inf)
    margin = float(stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    return Difference(mean, mean - margin, mean + margin)


@torch.inference_mode()
def image_losses(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    *,
    loss: str = "divergence",
    labelled: bool = True,
    metric: Metric = top1,
    progress: Callable[[float], None] | None = None,
) -> ImageLosses:
    """Losses of all architectures on all images, by one walk over their prefix tree per batch.

    loss: "divergence": KL(dense ‖ architecture) of the class probabilities, which needs no labels; "cross-entropy": of
    the label. labelled: whether the labels of the batches mean anything. Without labels an answer is right where its
    most probable class is the dense model's. progress: called after each batch with the share that is done, 0 to 1.

    Raises ConfigError for a cross-entropy without labels, ModelError where an answer is not a number.
    """
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown; known are {', '.join(LOSSES)}")
    if loss == "cross-entropy" and not labelled:
        raise ConfigError("a cross-entropy needs labels, and these images have none; take loss='divergence'")
    supernet.eval()
    device = next(supernet.parameters()).device
    dense = supernet.space[0]
    walked = [dense, *architectures]  # depth first, so the dense model answers first, and only once
    parts = []
    for index, (images, labels) in enumerate(batches, start=1):
        labels = labels.to(device)
        values = torch.zeros(len(walked), len(images), dtype=torch.int64, device=device)
        right = torch.zeros(len(walked), len(images), dtype=torch.bool, device=device)
        reference: torch.Tensor | None = None
        for positions, logits in supernet.leaves(images.to(device), walked):
            answers = F.log_softmax(logits.double(), dim=-1)  # (B, classes)
            if reference is None:
                assert positions[0] == 0
                reference = answers
                wanted = labels if labelled else logits.argmax(dim=-1)
            if loss == "divergence":
                nats = F.kl_div(answers, reference, reduction="none", log_target=True).sum(dim=-1).clamp_min(0)
            else:
                nats = F.nll_loss(answers, labels, reduction="none")
            if not bool(nats.isfinite().all()):
                named = walked[positions[0]]
                raise ModelError(f"'{named}' has outputs that are not numbers; check the weights and the images")
            values[positions] = (nats * MICRONATS).round().long()
            right[positions] = judged(metric, logits, wanted)
        parts.append(ImageLosses(values[1:].cpu().numpy(), right[1:].cpu().numpy()))
        if progress:
            progress(index / len(batches))
    if not parts:
        raise ConfigError("there are no images to score on")
    return ImageLosses(np.hstack([p.loss for p in parts]), np.hstack([p.right for p in parts]))
