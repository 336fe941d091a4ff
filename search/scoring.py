"""Architectures in, scores out: one walk over the prefix tree per batch of images.

A loss moves with every image, where an answer changes only near a border, so a few hundred images distinguish
architectures of equal accuracy by it. It is rounded to a whole number of micronats (1e-6 nat) image by image: sums of losses
are exact like those of contributions, whatever the order of images, batches and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from poolshare.space import Architecture, ConfigError, ModelError
from poolshare.supernet import SuperNet
from poolshare.supernet.data.splits import Batches
from poolshare.supernet.tasks import CLASSIFICATION, Task
from poolshare.supernet.tasks.task import contributed, sums_of

from .counts import MICRONATS, Counts

SCORING_BATCH = 256  # images
LOSSES = ("divergence", "loss")


@dataclass(frozen=True)
class ImageScores:
    """Architectures × images: how far each answer is from the wanted one, and what it contributes to the score."""

    loss: np.ndarray  # (architectures, images) int64, micronats
    contributions: (
        np.ndarray
    )  # (architectures, images), or (architectures, images, K); bool or whole numbers, see `Task`

    def __post_init__(self) -> None:
        assert self.loss.shape == self.contributions.shape[:2]
        assert self.loss.dtype == np.int64

    @property
    def images(self) -> int:
        """Number of images."""
        return self.loss.shape[1]

    def of(self, index: int) -> ImageScores:
        """Those of one architecture."""
        return ImageScores(self.loss[index : index + 1], self.contributions[index : index + 1])

    def followed_by(self, *others: ImageScores) -> ImageScores:
        """The same architectures on these images and then on those of the others."""
        parts = self, *others
        loss, contributions = (
            np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("loss", "contributions")
        )
        return ImageScores(loss, contributions)

    @property
    def counts(self) -> list[Counts]:
        """The sums over the images."""
        sums = self.contributions.sum(axis=1, dtype=np.int64).reshape(len(self.loss), -1)
        return [
            Counts(tuple(row), self.images, loss)
            for row, loss in zip(sums.tolist(), self.loss.sum(axis=1).tolist(), strict=True)
        ]


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


def image_scores(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    *,
    loss: str = "divergence",
    labelled: bool = True,
    task: Task = CLASSIFICATION,
    progress: Callable[[float], None] | None = None,
) -> ImageScores:
    """Losses and contributions of all architectures on all images, by one walk over their prefix tree per batch.

    loss: "divergence" from the dense model's output, which needs no labels, or "loss", by the targets. labelled: whether
    the targets of the batches mean anything; else the dense model's answers are the targets. progress: called after each
    batch with the share that is done, 0 to 1.

    Raises ConfigError for a loss without labels, ModelError where an answer is not a number.
    """
    first, *rest = _by_batch(supernet, architectures, batches, loss, labelled, task, progress)
    return first.followed_by(*rest)


def score_counts(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    score: str = "metric",
    task: Task = CLASSIFICATION,
    progress: Callable[[float], None] | None = None,
) -> list[Counts]:
    """What is recorded of each architecture by a `--score`: "metric", "loss" or "divergence".

    progress: as in `image_scores`, which says what is raised too.
    """
    if score == "metric":
        return _sums(supernet, architectures, batches, task, progress)
    totals: list[Counts] = []
    for part in _by_batch(supernet, architectures, batches, score, True, task, progress):
        totals = [one.plus(other) for one, other in zip(totals, part.counts, strict=True)] if totals else part.counts
    return totals


@torch.inference_mode()
def _sums(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    task: Task,
    progress: Callable[[float], None] | None,
) -> list[Counts]:
    """Contributions alone, which stay on the device until all are added up."""
    supernet.eval()
    device = next(supernet.parameters()).device
    sums: Tensor | None = None
    images_seen = 0
    for index, (images, targets) in enumerate(batches, start=1):
        targets = targets.to(device)
        for positions, outputs in supernet.leaves(images.to(device), architectures):
            found = sums_of(contributed(task, outputs, targets))
            if sums is None:
                sums = torch.zeros(len(architectures), len(found), dtype=torch.int64, device=device)
            sums[positions] += found
        images_seen += len(images)
        if progress:
            progress(index / len(batches))
    if sums is None:
        raise ConfigError("there are no images to score on")
    return [Counts(tuple(row), images_seen) for row in sums.tolist()]


class Answers(NamedTuple):
    """What a model says to N images."""

    contributions: np.ndarray  # (N,) bool, or (N, K) whole numbers
    targets: Tensor  # (N, …) on the CPU, as the next; of no images unless the task `keeps` them
    outputs: Tensor

    @property
    def counts(self) -> Counts:
        """Their sum."""
        sums = self.contributions.sum(axis=0, dtype=np.int64).reshape(-1)
        return Counts(tuple(sums.tolist()), len(self.contributions))


@torch.inference_mode()
def answers(
    model: nn.Module, batches: Batches, task: Task = CLASSIFICATION, progress: Callable[[int], None] | None = None
) -> Answers:
    """Of one model, which stands alone. progress: called after each batch with the number of batches done."""
    model.eval()
    device = next(model.parameters()).device
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, (images, targets) in enumerate(batches, start=1):
        targets, outputs = targets.to(device), model(images.to(device))
        found = contributed(task, outputs, targets)
        kept = slice(None if task.keeps else 0)
        parts.append((found.cpu(), targets[kept].cpu(), outputs[kept].cpu()))
        if progress:
            progress(index)
    contributions, all_targets, all_outputs = (torch.cat(part) for part in zip(*parts, strict=True))
    return Answers(contributions.numpy(), all_targets, all_outputs)


@torch.inference_mode()
def _by_batch(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    loss: str,
    labelled: bool,
    task: Task,
    progress: Callable[[float], None] | None,
) -> Iterator[ImageScores]:
    """The scores of each batch."""
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown; known are {', '.join(LOSSES)}")
    if loss == "loss" and not labelled:
        raise ConfigError("a loss needs labels, and these images have none; take loss='divergence'")
    if not len(batches):
        raise ConfigError("there are no images to score on")
    supernet.eval()
    device = next(supernet.parameters()).device
    walked = [supernet.space[0], *architectures]  # depth first, so the dense model answers first, and only once
    for index, (images, targets) in enumerate(batches, start=1):
        targets = targets.to(device)
        values = torch.zeros(len(walked), len(images), dtype=torch.int64, device=device)
        contributions: Tensor | None = None
        reference: Tensor | None = None
        for positions, outputs in supernet.leaves(images.to(device), walked):
            exact = outputs.double()
            if reference is None:
                assert positions[0] == 0
                reference = exact
                wanted = targets if labelled else task.as_targets(outputs)
            nats = task.divergence(exact, reference) if loss == "divergence" else task.losses(exact, targets)
            if not bool(nats.isfinite().all()):
                named = walked[positions[0]]
                raise ModelError(f"'{named}' has outputs that are not numbers; check the weights and the images")
            values[positions] = (nats * MICRONATS).round().long()
            found = contributed(task, outputs, wanted)
            if contributions is None:
                contributions = found.new_zeros(len(walked), *found.shape)
            contributions[positions] = found
        assert contributions is not None
        yield ImageScores(values[1:].cpu().numpy(), contributions[1:].cpu().numpy())
        if progress:
            progress(index / len(batches))
