"""Any number of classes per image, each yes or no, judged by the mean over the classes of F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .task import Task


class MultiLabel(Task):
    """Outputs are logits (B, classes), targets 0 or 1 for each (B, classes). A class is predicted where its logit is above 0.

    An image contributes the true positives, false positives and false negatives of each class, so K is 3 · classes.
    """

    name = "multilabel"
    metric = "macro F1"
    agreement = "macro F1 with the dense network's answers"
    targets = "classes"
    keeps = True
    loss_words = "binary cross-entropy with the labels, the mean over the classes"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(dim=-1)

    def follow(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """The cross-entropy with the teacher's probabilities, whose gradient is that of the divergence."""
        return F.binary_cross_entropy_with_logits(outputs, taught.sigmoid())

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """KL(reference ‖ outputs) of each class's yes or no, the mean over the classes."""
        wanted = reference.sigmoid()
        yes = wanted * (F.logsigmoid(reference) - F.logsigmoid(outputs))
        no = (1 - wanted) * (F.logsigmoid(-reference) - F.logsigmoid(-outputs))
        return (yes + no).mean(dim=-1).clamp_min(0)

    def as_targets(self, outputs: Tensor) -> Tensor:
        return (outputs > 0).to(torch.uint8)

    def contributions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return confusions(outputs, targets)

    def number(self, sums: np.ndarray, images: int) -> Any:
        return 100 * f1_of_classes(sums).mean(axis=-1)

    def details(
        self, contributions: np.ndarray, targets: Tensor, outputs: Tensor, classes: Sequence[str]
    ) -> dict[str, Any]:
        """Micro F1, mean average precision over the classes that have images, and each class's F1 and average precision."""
        from sklearn.metrics import average_precision_score  # slow to import

        sums = confusions(outputs, targets).sum(dim=0, dtype=torch.int64).numpy()
        wanted = targets.numpy() > 0
        present = np.flatnonzero(wanted.any(axis=0))
        scores = outputs.sigmoid().numpy()
        precision = {at: 100 * float(average_precision_score(wanted[:, at], scores[:, at])) for at in present.tolist()}
        per_class = [
            {
                "class": classes[at],
                "images": int(wanted[:, at].sum()),
                "score": 100 * float(f1),
                "average_precision": precision.get(at),
            }
            for at, f1 in enumerate(f1_of_classes(sums))
        ]
        micro = f1_of_classes(sums.reshape(3, -1).sum(axis=1))
        return {
            "micro_f1": 100 * float(micro[0]),
            "mean_average_precision": float(np.mean([*precision.values()])) if precision else 0.0,
            "per_class": per_class,
        }

    def predictions(self, outputs: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
        """The classes whose probability is above one half, falling, whatever `top` is."""
        found = []
        for row in outputs.sigmoid().cpu():
            chosen = [(float(row[at]), classes[at]) for at in (row > 0.5).nonzero().flatten().tolist()]
            named = [{"class": name, "probability": value} for value, name in sorted(chosen, reverse=True)]
            found.append({"classes": named})
        return found


def confusions(outputs: Tensor, targets: Tensor) -> Tensor:
    """True positives, false positives and false negatives of each image, (B, 3 · classes) uint8."""
    predicted, wanted = outputs > 0, targets > 0
    return torch.cat([predicted & wanted, predicted & ~wanted, ~predicted & wanted], dim=1).to(torch.uint8)


def f1_of_classes(sums: np.ndarray) -> np.ndarray:
    """(…, 3 · classes) true positives, false positives and false negatives → (…, classes), 0 to 1; 0 where there are none.

    As scikit-learn's f1_score with zero_division=0.
    """
    right, added, missed = np.split(sums, 3, axis=-1)
    return 2 * right / np.maximum(2 * right + added + missed, 1)


MULTILABEL = MultiLabel()
