"""One class per image, judged by the share of right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .task import Task


class Classification(Task):
    """Outputs are logits (B, classes), targets class indices (B,), in training also mixed ones (B, classes)."""

    name = "classification"
    metric = "top-1"
    targets = "class"
    proportion = True
    mixes = True
    keeps = True
    loss_words = "cross-entropy with the labels"

    def loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        # mixed labels are smoothed already
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing if targets.ndim == 1 else 0.0)

    def follow(self, outputs: Tensor, taught: Tensor) -> Tensor:
        return F.cross_entropy(outputs, taught.softmax(dim=-1))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL(reference ‖ outputs) of the class probabilities."""
        answers, wanted = (logits.log_softmax(dim=-1) for logits in (outputs, reference))
        return F.kl_div(answers, wanted, reduction="none", log_target=True).sum(dim=-1).clamp_min(0)

    def as_targets(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=-1)

    def contributions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the most probable class is the label, (B,) bool."""
        return outputs.argmax(dim=-1) == targets

    def details(
        self, contributions: np.ndarray, targets: Tensor, outputs: Tensor, classes: Sequence[str]
    ) -> dict[str, Any]:
        report = class_report(targets.numpy(), outputs.argmax(dim=-1).numpy(), classes)
        return {"correct": int(contributions.sum()), **report}

    def predictions(self, outputs: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
        return most_probable(outputs.softmax(dim=-1), classes, top)


CLASSIFICATION = Classification()


def most_probable(probabilities: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """For each image its `top` classes, as "classes", with their probabilities (B, classes), falling."""
    found = probabilities.topk(min(top, len(classes)))
    return [
        {"classes": [{"class": classes[at], "probability": value} for at, value in zip(places, values, strict=True)]}
        for places, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def baseline(labels: np.ndarray) -> float:
    """Top-1 in percent of always answering with the most frequent class."""
    return 100 * float(np.bincount(labels).max()) / len(labels)


def class_report(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What one number for all images hides; accuracies in percent.

    labels, predicted: class indices (n,). Returns balanced_top1 (the mean of the classes' top-1, of those that have images),
    most_frequent_class_alone (see `baseline`), and per_class: for each class with images its name, images, correct and score.
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
            "score": 100 * float(recall),
        }
        for index, recall in zip(present.tolist(), recalls, strict=True)
    ]
    balanced = 100 * float(np.mean(recalls))
    return {"balanced_top1": balanced, "most_frequent_class_alone": baseline(labels), "per_class": per_class}
