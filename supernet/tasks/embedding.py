"""The dense model's own features as target: no labels and no head, judged by how similar features stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .task import Task

MILLIONTHS = 1_000_000  # similarities are whole numbers of them


class Embedding(Task):
    """Outputs are pooled features (B, D), targets the dense model's (B, D). The score is the mean cosine similarity."""

    name = "embedding"
    metric = "similarity"
    agreement = "similarity"
    targets = "dense"
    lowest = -100.0
    loss_words = "1 − cosine similarity with the dense network's features"
    divergence_words = loss_words
    unit = ""

    def outputs(self, classes: int) -> int:
        return 0

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.divergence(outputs, targets)

    def divergence(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """1 − cosine similarity, whatever the lengths."""
        return (1 - F.cosine_similarity(outputs, reference, dim=-1)).clamp_min(0)

    def as_targets(self, outputs: Tensor) -> Tensor:
        return outputs

    def contributions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The similarity in millionths, (B, 1)."""
        assert outputs.shape == targets.shape
        similar = F.cosine_similarity(outputs.double(), targets.double(), dim=-1).clamp(-1, 1)
        return (similar * MILLIONTHS).round().to(torch.int64)[:, None]

    def number(self, sums: np.ndarray, images: int) -> Any:
        return 100 * sums[..., 0] / images / MILLIONTHS

    def details(
        self, contributions: np.ndarray, targets: Tensor, outputs: Tensor, classes: Sequence[str]
    ) -> dict[str, Any]:
        least, tenth = np.percentile(contributions[:, 0] * (100 / MILLIONTHS), (0, 10))
        return {"least_similar_image": float(least), "tenth_percentile": float(tenth)}

    def predictions(self, outputs: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
        return [{"embedding": row} for row in outputs.float().cpu().tolist()]


EMBEDDING = Embedding()
