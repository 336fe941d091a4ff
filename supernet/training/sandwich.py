"""Which architectures a supernet step trains, the sandwich or draws within a limit, and their loss in one forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from poolshare.space import Architecture, Band, BudgetError, CostTable, SearchSpace
from poolshare.space.band import even_borders

from ..tasks import CLASSIFICATION, Task

# images (B, channels, H, W), architectures → outputs (architectures, B, …)
Forward = Callable[[torch.Tensor, Sequence[Architecture]], torch.Tensor]

BANDS = 8  # of equal width, from the cheapest to the most expensive
DRAWN = 6  # architectures of a step that trains within a limit: about the MACs of a sandwich
GUIDED = 3  # architectures of a step that learns from a teacher
LEAST = 0.3  # share of the dense MACs below which such a step trains nothing, unless the limit is below twice that


class Sandwich:
    """Which architectures a supernet step trains: the largest, the smallest, and `students` drawn across MAC bands.

    Bands are of equal width from the cheapest to the most expensive, so that small and large networks get equal shares
    whatever their numbers. Draws are keyed by (seed, step) alone: nothing to save, and the same on every process.

    within: a share of the dense network's cost. A step then trains `DRAWN` architectures across the bands up to
    there, all on labels, and neither the largest nor the smallest: what is not searched takes no part. It ranks better
    (results/trust), but says little about more expensive ones, nor about the largest where it is 1. Raises BudgetError where
    nothing is so cheap.

    guided: a teacher's outputs take part in the loss: the dense model that the supernet began as. A step then trains
    `GUIDED` architectures across the bands from a `LEAST` share of the dense cost, or half of the limit, to the limit, and
    not the largest, which the teacher is. What is far below would only undo what the others learn.
    """

    def __init__(
        self,
        space: SearchSpace,
        costs: CostTable,
        seed: int,
        students: int = 2,
        within: float | None = None,
        guided: bool = False,
    ):
        self.space, self.seed, self.students, self.within, self.guided = space, seed, students, within, guided
        self.largest, self.smallest = space[0], space.cheapest(costs)
        low, high = costs.total(self.smallest), costs.total(space.most_expensive(costs))
        if within is not None:
            high = space.within(costs, None, int(within * costs.total(self.largest))).high
        if guided:
            low = min(max(low, int(min(LEAST * costs.total(self.largest), high / 2))), high)
        borders = even_borders(low, high, BANDS)
        self.bands: list[Band] = []
        for start, stop in pairwise(borders):
            try:
                self.bands.append(space.within(costs, start, stop - 1))
            except BudgetError:  # nothing costs so much: no band to draw from
                continue

    def at(self, step: int) -> list[Architecture]:
        """The architectures of one step; of a sandwich the largest first."""
        if self.guided:
            return self._draw(random.Random(f"guided {self.seed} {step}"), GUIDED)
        if self.within is not None:
            return self._draw(random.Random(f"drawn {self.seed} {step}"), DRAWN)
        drawn = self._draw(random.Random(f"sandwich {self.seed} {step}"), self.students)
        return [self.largest, self.smallest, *drawn]

    def _draw(self, rng: random.Random, count: int) -> list[Architecture]:
        return [rng.choice(self.bands).sample(rng) for _ in range(count)]

    def loss(
        self,
        supernet: Forward,
        images: torch.Tensor,
        targets: torch.Tensor,
        step: int,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distill: float = 0.5,
        task: Task = CLASSIFICATION,
    ) -> torch.Tensor:
        """The loss of one step, a scalar; images (B, channels, H, W), targets as the task has them.

        teacher: of a guided training: images → outputs. distill: its share of the loss, see `taught_loss`.
        """
        architectures = self.at(step)
        if self.within is None and not self.guided:
            return sandwich_loss(supernet, images, targets, architectures, label_smoothing, task)
        every = supernet(images, architectures).unbind(0)  # each (B, …)
        taught = answers_of(teacher, images)
        losses = [taught_loss(task, outputs, targets, taught, distill, label_smoothing) for outputs in every]
        return 2 * torch.stack(losses).mean()  # as much as the two parts of a sandwich, so clipping bites alike


def sandwich_loss(
    supernet: Forward,
    images: torch.Tensor,
    targets: torch.Tensor,
    architectures: Sequence[Architecture],
    label_smoothing: float = 0.0,
    task: Task = CLASSIFICATION,
) -> torch.Tensor:
    """The first architecture on the targets, the others on its detached outputs, in one forward (BigNAS, 2003.11142).

    images (B, channels, H, W), targets as the task has them. The students' losses are averaged, so all of them together
    weigh as much as the teacher's.
    """
    teacher, *students = supernet(images, architectures).unbind(0)  # each (B, …)
    loss = task.loss(teacher, targets, label_smoothing)
    if not students:
        return loss
    return loss + torch.stack([task.follow(student, teacher.detach()) for student in students]).mean()


def answers_of(teacher: nn.Module | None, images: torch.Tensor) -> torch.Tensor | None:
    """A teacher's outputs, (B, …), without a gradient; None without a teacher."""
    if teacher is None:
        return None
    with torch.no_grad():
        return teacher(images)  # type: ignore[no-any-return]


def taught_loss(
    task: Task,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    taught: torch.Tensor | None,
    distill: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of outputs by targets, and by a teacher's outputs, whose share is `distill`; (): the mean over the images.

    Where the dense model's outputs are the targets there are no others.
    """
    if task.targets == "dense":
        assert taught is not None
        return task.follow(outputs, taught)
    by_targets = task.loss(outputs, targets, label_smoothing)
    return by_targets if taught is None else (1 - distill) * by_targets + distill * task.follow(outputs, taught)
