"""Which architectures a supernet step trains, the sandwich or draws within a limit, and their loss in one forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from poolshare.space import Architecture, Band, BudgetError, CostTable, SearchSpace

# images (B, channels, H, W), architectures → logits (architectures, B, classes)
Forward = Callable[[torch.Tensor, Sequence[Architecture]], torch.Tensor]

DRAWN = 6  # architectures of a step that trains within a limit: about the MACs of a sandwich


class Sandwich:
    """Which architectures a supernet step trains: the largest, the smallest, and `students` drawn across MAC bands.

    Bands are of equal width from the cheapest to the dearest, so that small and large networks get equal shares
    whatever their numbers. Draws are keyed by (seed, step) alone: nothing to save, and the same on every process.

    within: a share of the dense network's cost. A step then trains `DRAWN` architectures across the bands up to
    there, all on labels, and neither the largest nor the smallest: what is not searched takes no part. It ranks better
    (results/trust), and says little of dearer ones, nor of the largest where it is 1. Raises BudgetError where nothing is so cheap.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: CostTable,
        seed: int,
        students: int = 2,
        bands: int = 8,
        within: float | None = None,
    ):
        self.space, self.seed, self.students, self.within = space, seed, students, within
        self.largest, self.smallest = space[0], space.cheapest(costs)
        low, high = costs.total(self.smallest), costs.total(space.most_expensive(costs))
        if within is not None:
            high = space.within(costs, None, int(within * costs.total(self.largest))).high
        borders = [low + (high + 1 - low) * index // bands for index in range(bands + 1)]
        self.bands: list[Band] = []
        for start, stop in pairwise(borders):
            try:
                self.bands.append(space.within(costs, start, stop - 1))
            except BudgetError:  # nothing costs so much: no band to draw from
                continue

    def at(self, step: int) -> list[Architecture]:
        """The architectures of one step; of a sandwich the largest first."""
        if self.within is not None:
            return self._draw(random.Random(f"drawn {self.seed} {step}"), DRAWN)
        drawn = self._draw(random.Random(f"sandwich {self.seed} {step}"), self.students)
        return [self.largest, self.smallest, *drawn]

    def _draw(self, rng: random.Random, count: int) -> list[Architecture]:
        return [rng.choice(self.bands).sample(rng) for _ in range(count)]

    def loss(
        self, supernet: Forward, images: torch.Tensor, labels: torch.Tensor, step: int, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """The loss of one step, a scalar; images and labels as `sandwich_loss` takes them."""
        architectures = self.at(step)
        if self.within is None:
            return sandwich_loss(supernet, images, labels, architectures, label_smoothing)
        every = supernet(images, architectures).unbind(0)  # each (B, classes)
        losses = [F.cross_entropy(logits, labels, label_smoothing=label_smoothing) for logits in every]
        return 2 * torch.stack(losses).mean()  # as much as the two parts of a sandwich, so clipping bites alike


def sandwich_loss(
    supernet: Forward,
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
