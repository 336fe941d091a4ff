"""What a reduction does to each image's answer: losses in whole micronats, image by image or summed.

Top-1 moves only where an image is near a border between classes; a loss moves with every image, so a few hundred of
them distinguish architectures of equal accuracy. A loss is rounded to a whole number of micronats (1e-6 nat)
image by image: sums are exact, whatever the order of images, batches and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from poolshare.space import Architecture, ConfigError, ModelError
from poolshare.supernet import SuperNet
from poolshare.supernet.data.splits import Batches

from .counts import MICRONATS, Counts
from .scoring import Metric, count_correct, judged, top1

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
    parts = list(_by_batch(supernet, architectures, batches, loss, labelled, metric, progress))
    return ImageLosses(np.hstack([part.loss for part in parts]), np.hstack([part.right for part in parts]))


def score_counts(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    score: str = "top1",
    metric: Metric = top1,
    progress: Callable[[float], None] | None = None,
) -> list[Counts]:
    """What is recorded of each architecture by a `--score`: "top1", "loss" (cross-entropy) or "divergence".

    progress: as in `image_losses`, which says what is raised too.
    """
    if score == "top1":
        correct, total = count_correct(supernet, architectures, batches, progress, metric)
        return [Counts(count, total) for count in correct]
    sums, right, images = (np.zeros(len(architectures), np.int64) for _ in range(3))
    for part in _by_batch(supernet, architectures, batches, loss_of(score), True, metric, progress):
        sums, right, images = sums + part.loss.sum(1), right + part.right.sum(1), images + part.images
    return [Counts(*map(int, numbers)) for numbers in zip(right, images, sums, strict=True)]


def loss_of(score: str) -> str:
    """The loss of a `--score` that is one."""
    return "cross-entropy" if score == "loss" else score


@torch.inference_mode()
def _by_batch(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    loss: str,
    labelled: bool,
    metric: Metric,
    progress: Callable[[float], None] | None,
) -> Iterator[ImageLosses]:
    """The losses of each batch."""
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown; known are {', '.join(LOSSES)}")
    if loss == "cross-entropy" and not labelled:
        raise ConfigError("a cross-entropy needs labels, and these images have none; take loss='divergence'")
    if not len(batches):
        raise ConfigError("there are no images to score on")
    supernet.eval()
    device = next(supernet.parameters()).device
    walked = [supernet.space[0], *architectures]  # depth first, so the dense model answers first, and only once
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
        yield ImageLosses(values[1:].cpu().numpy(), right[1:].cpu().numpy())
        if progress:
            progress(index / len(batches))
