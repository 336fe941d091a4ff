"""The sandwich: which architectures a supernet step trains, and their loss in one forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from poolshare.space import Architecture, Band, BudgetError, CostTable, SearchSpace


class Sandwich:
    """Which architectures a supernet step trains: the largest, the smallest, and `students` drawn across MAC bands.

    Bands are of equal width from the cheapest to the dearest, so that small and large networks get equal shares
    whatever their numbers. Draws are keyed by (seed, step) alone: nothing to save, and the same on every process.
    """

    def __init__(self, space: SearchSpace, costs: CostTable, seed: int, students: int = 2, bands: int = 8):
        self.space, self.seed, self.students = space, seed, students
        self.largest, self.smallest = space[0], space.cheapest(costs)
        low, high = costs.total(self.smallest), costs.total(space.dearest(costs))
        borders = [low + (high + 1 - low) * index // bands for index in range(bands + 1)]
        self.bands: list[Band] = []
        for start, stop in pairwise(borders):
            try:
                self.bands.append(space.within(costs, start, stop - 1))
            except BudgetError:  # nothing costs so much: no band to draw from
                continue

    def at(self, step: int) -> list[Architecture]:
        """The architectures of one step, the largest first."""
        rng = random.Random(f"sandwich {self.seed} {step}")
        drawn = [rng.choice(self.bands).sample(rng) for _ in range(self.students)]
        return [self.largest, self.smallest, *drawn]


def sandwich_loss(
    supernet: Callable[[torch.Tensor, Sequence[Architecture]], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    architectures: Sequence[Architecture],
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The first architecture on the labels, the others on its detached logits, in one forward (BigNAS, 2003.11142).

    images (B, channels, H, W), labels (B,), or (B, classes) where they are mixed. The students' cross-entropies with
    the teacher's distribution are averaged, so all of them together weigh as much as the teacher.
    """
    teacher, *students = supernet(images, architectures).unbind(0)  # each (B, classes)
    loss = F.cross_entropy(teacher, labels, label_smoothing=label_smoothing)
    if not students:
        return loss
    targets = teacher.detach().softmax(dim=-1)
    return loss + torch.stack([F.cross_entropy(student, targets) for student in students]).mean()
