"""Architectures in, accuracy out: one walk over the prefix tree per batch of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from poolshare.space import Architecture
from poolshare.supernet import SuperNet
from poolshare.supernet.data import Batches


@torch.inference_mode()
def count_correct(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batches: Batches,
    progress: Callable[[float], None] | None = None,
) -> tuple[list[int], int]:
    """Correctly classified images of each architecture, and the number of images.

    progress: called after each batch with the share that is done, 0 to 1.
    """
    supernet.eval()
    device = next(supernet.parameters()).device
    correct = torch.zeros(len(architectures), dtype=torch.long, device=device)
    total = 0
    for index, (images, labels) in enumerate(batches, start=1):
        labels = labels.to(device)
        for positions, logits in supernet.leaves(images.to(device), architectures):
            correct[positions] += (logits.argmax(dim=-1) == labels).sum()
        total += len(labels)
        if progress:
            progress(index / len(batches))
    return correct.tolist(), total
