"""Architectures in, accuracy out: one walk over the prefix tree per batch of images; and one model's answers by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from poolshare.space import Architecture, ConfigError
from poolshare.supernet import SuperNet
from poolshare.supernet.data.splits import Batches

SCORING_BATCH = 256  # images
# logits (B, classes), labels (B,) → (B,) bool, whether each answer counts as right
Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def top1(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the most probable class is the label."""
    return logits.argmax(dim=-1) == labels


def metric_name(metric: Metric) -> str:
    """What a metric is called in the record. Raises ConfigError for one without a name of its own."""
    name = getattr(metric, "__name__", "<no name>")
    if not name.isidentifier() or (name == top1.__name__ and metric is not top1):
        raise ConfigError(f"the metric is called {name}: define it with `def` and a name of its own, which is recorded")
    return str(name)


def check_metric(metric: Metric, classes: int) -> None:
    """Raise ConfigError for a metric that does not judge image by image, tried on made-up logits.

    The record holds whole numbers of right answers, so an answer must count or not whatever else is in the batch.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, classes, generator=generator)
    labels = torch.randint(classes, (8,), generator=generator)
    whole = judged(metric, logits, labels)
    alone = [judged(metric, logits[index : index + 1], labels[index : index + 1]) for index in range(8)]
    if not torch.equal(whole, torch.cat(alone)):
        raise ConfigError(
            f"metric {metric.__name__} judges an image by others in its batch, or by chance: judge each by itself"
        )


def judged(metric: Metric, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B,) bool. Raises ConfigError where the metric gives anything else."""
    right = metric(logits, labels)
    if not isinstance(right, torch.Tensor) or right.shape != labels.shape or right.dtype != torch.bool:
        what = f"{right.dtype} {tuple(right.shape)}" if isinstance(right, torch.Tensor) else type(right).__name__
        raise ConfigError(
            f"metric {getattr(metric, '__name__', metric)} gave {what} for {len(labels)} images: return a bool tensor, "
            "whether each image's answer counts as right"
        )
    return right


@torch.inference_mode()
def count_correct(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    progress: Callable[[float], None] | None = None,
    metric: Metric = top1,
) -> tuple[list[int], int]:
    """Images that each architecture answers right by the metric, and the number of images.

    progress: called after each batch with the share that is done, 0 to 1.
    """
    supernet.eval()
    device = next(supernet.parameters()).device
    correct = torch.zeros(len(architectures), dtype=torch.long, device=device)
    total = 0
    for index, (images, labels) in enumerate(batches, start=1):
        labels = labels.to(device)
        for positions, logits in supernet.leaves(images.to(device), architectures):
            correct[positions] += judged(metric, logits, labels).sum()
        total += len(labels)
        if progress:
            progress(index / len(batches))
    return correct.tolist(), total


@torch.inference_mode()
def count_right(
    model: nn.Module, batches: Batches, progress: Callable[[int], None] | None = None, metric: Metric = top1
) -> tuple[int, int]:
    """Images that one model, which stands alone, answers right by the metric, and the number of images.

    progress: called after each batch with the number of batches done.
    """
    model.eval()
    device = next(model.parameters()).device
    correct = total = 0
    for index, (images, labels) in enumerate(batches, start=1):
        correct += int(judged(metric, model(images.to(device)), labels.to(device)).sum())
        total += len(labels)
        if progress:
            progress(index)
    return correct, total


@torch.inference_mode()
def answers(
    model: nn.Module, batches: Batches, progress: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and most probable classes of all images, each (n,) int64.

    progress: called after each batch with the number of batches done.
    """
    model.eval()
    device = next(model.parameters()).device
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, (images, labels) in enumerate(batches, start=1):
        parts.append((labels, model(images.to(device)).argmax(dim=-1).cpu()))
        if progress:
            progress(index)
    labels_of, predicted = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return labels_of, predicted


def baseline(labels: np.ndarray) -> float:
    """Top-1 in percent of always answering with the most frequent class."""
    return 100 * float(np.bincount(labels).max()) / len(labels)


def class_report(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What one number for all images hides; accuracies in percent.

    labels, predicted: class indices (n,). Returns baseline (see `baseline`), balanced_top1 (the mean of the classes' top-1,
    of those that have images), and per_class: for each class with images its name, images, correct and top1.
    """
    from sklearn.metrics import confusion_matrix, recall_score  # slow to import

    present = np.unique(labels)
    recalls = recall_score(labels, predicted, labels=present, average=None, zero_division=0.0)
    table = confusion_matrix(labels, predicted, labels=np.arange(len(classes)))
    per_class = [
        {
            "class": classes[index],
            "images": int(table[index].sum()),
            "correct": int(table[index, index]),
            "top1": 100 * float(recall),
        }
        for index, recall in zip(present.tolist(), recalls, strict=True)
    ]
    return {"baseline": baseline(labels), "balanced_top1": 100 * float(np.mean(recalls)), "per_class": per_class}
