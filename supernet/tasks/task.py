"""A task: what a model's output is, how it is trained and how it is judged, as one value.

An image contributes a vector of whole numbers to the score: whether its answer is right, its true and false positives of
each class, its similarity in millionths. Contributions are added up over images, batches, workers and processes, so sums
are exact and do not depend on who computed what; the score is a function of the sum. What needs intervals asks for the
contributions themselves, image by image (`search.analysis.intervals`).

    from a batch            loss, follow          one training step: by targets, by a teacher's outputs
                            losses, divergence    of each image: from its target, from another model's output
                            contributions         of each image, whole numbers
    from their sum          number                the score

A score is at most 100, which is perfect: a measure of which less is better is turned round by its task. Everything else
follows from a few words: `targets` says what the data have to bring, `outputs` how wide the head is, and `metric` what
tables, figures and cards call the score.

A task of one's own is a subclass of one of poolshare's, or of `Task`, with a name of its own, and is given as an instance:
`search(…, task=Mine())`. Only the name is recorded, so whoever continues the run gives the same task again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from poolshare.space import ConfigError

# What the data bring for each image: the index of its class; a 0 or 1 for every class; a mask, the class of every pixel;
# nothing: the dense model's output is the target.
Targets = Literal["class", "classes", "pixels", "dense"]


class Task:
    """The part that tasks have in common; see the module. B images, K whole numbers of each.

    name: recorded in a run. metric: what the score is called. agreement: what it is called where the targets are the dense
    model's answers. targets: what the data bring.
    proportion: whether contributions are one truth value per image, so that the score is the share of right answers.
    mixes: whether the loss takes targets mixed by mixup and cutmix, and label smoothing. keeps: whether `details` looks at
    the targets and outputs of all test images.
    lowest: the least possible score. loss_words, divergence_words: what `losses` and `divergence` are, for reports.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    agreement: ClassVar[str] = "agreement"
    targets: ClassVar[Targets]
    proportion: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    lowest: ClassVar[float] = 0.0
    loss_words: ClassVar[str] = "loss against the labels"
    divergence_words: ClassVar[str] = "divergence from the dense network's answers"
    unit: ClassVar[str] = "nats"  # of losses and divergences

    @property
    def column(self) -> str:
        """The score's column in tables: "top1" for the metric "top-1"."""
        return self.metric.lower().replace("-", "").replace(" ", "_")

    def outputs(self, classes: int) -> int:
        """How many numbers the model's head gives; 0: it has none, and its output is the pooled features."""
        return classes

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """What training minimises, (): the mean over the images. smoothing: of labels, 0 unless the task `mixes`."""
        return self.losses(outputs, targets).mean()

    def follow(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """The same with another model's outputs for the same images as target, (); `taught` has no gradient."""
        return self.divergence(outputs, taught).mean()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each image, (B,), at least 0."""
        raise NotImplementedError

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """How far each image's output is from another model's, (B,), at least 0, and 0 for equal ones."""
        raise NotImplementedError

    def as_targets(self, outputs: Tensor) -> Tensor:
        """The targets that these outputs meet perfectly: a model's answers taken for the truth."""
        raise NotImplementedError

    def contributions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What each image contributes to the score: bool (B,), or whole numbers (B, K), each from its own image alone."""
        raise NotImplementedError

    def number(self, sums: np.ndarray, images: int) -> Any:
        """The score of so many images, at most 100, from the sum of their contributions; (…, K) → (…)."""
        return 100 * sums[..., 0] / images

    def details(
        self, contributions: np.ndarray, targets: Tensor, outputs: Tensor, classes: Sequence[str]
    ) -> dict[str, Any]:
        """What `poolshare evaluate` says beside the score of N test images: numbers in percent by name, and "per_class", a list
        of dictionaries with class, images and score.

        contributions: (N,) or (N, K). targets, outputs: (N, …), on the CPU; without images unless the task `keeps` them.
        """
        return {}

    def predictions(self, outputs: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
        """What `poolshare predict` says of each image, JSON values; top: how many classes are asked for."""
        raise NotImplementedError


def contributed(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """`task.contributions`, (B,) bool or (B, K) whole numbers. Raises ConfigError where they are anything else."""
    found = task.contributions(outputs, targets)
    if isinstance(found, Tensor) and found.ndim in (1, 2) and len(found) == len(outputs):
        whole = not (found.is_floating_point() or found.is_complex())
        if found.dtype == torch.bool or (whole and found.ndim == 2):
            return found
    what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ConfigError(
        f"task {task.name}: contributions gave {what} for {len(outputs)} images: return a bool tensor, one value for each "
        "image, or whole numbers, a row for each"
    )


def check_contributions(task: Task, outputs: Tensor) -> None:
    """Raise ConfigError for a task that does not judge image by image, tried on the outputs of a few images.

    Sums over batches and workers are of whole numbers, so a contribution must not depend on what else is in the batch.
    """
    targets = task.as_targets(outputs.roll(1, 0))
    whole = contributed(task, outputs, targets)
    alone = [contributed(task, outputs[at : at + 1], targets[at : at + 1]) for at in range(len(outputs))]
    if not torch.equal(whole, torch.cat(alone)):
        raise ConfigError(
            f"task {task.name} judges an image by others in its batch, or by chance: judge each by itself"
        )
    score = float(task.number(sums_of(whole).cpu().numpy(), len(whole)))
    if not task.lowest <= score <= 100:
        raise ConfigError(
            f"task {task.name}: number gave {score}; a score is from {task.lowest:g} to 100, and 100 is perfect"
        )


def sums_of(contributions: Tensor) -> Tensor:
    """The sum over the images, (B,) or (B, K) → (K,) int64."""
    return contributions.sum(dim=0, dtype=torch.int64).reshape(-1)
