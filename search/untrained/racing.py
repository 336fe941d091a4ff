"""Racing: candidates see more images only as long as they may still be the best at their cost.

All see the same images in the same order, so two are compared image by image; F. Yang et al. and O. Maron's "Hoeffding
races" compare means instead, which takes many times as many images where losses are correlated, as they are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from poolshare.space import Architecture, CostTable, forecast

from ..counts import MICRONATS
from ..scoring import ImageScores, paired

# Architectures and the range of images, start and stop → their losses on these. Images have a fixed order.
ScoreImages = Callable[[Sequence[Architecture], int, int], ImageScores]


@dataclass
class Race:
    """What was scored so far: each architecture on the first so many of `images`, the dense one on as many as any."""

    dense: Architecture
    costs: CostTable
    images: int
    score: ScoreImages
    losses: dict[Architecture, ImageScores] = field(default_factory=dict)
    spent: int = 0  # in units of cost: what all walks took

    def run(self, architectures: Sequence[Architecture], images: int) -> None:
        """Score all of them, and the dense one, on the first so many images, by one walk for each range they lack."""
        lacking: dict[int, list[Architecture]] = {}
        for architecture in dict.fromkeys([self.dense, *architectures]):
            start = self.losses[architecture].images if architecture in self.losses else 0
            if start < images:
                lacking.setdefault(start, []).append(architecture)
        for start, members in sorted(lacking.items()):
            found = self.score(members, start, images)
            for index, architecture in enumerate(members):
                new = found.of(index)
                known = self.losses.get(architecture)
                self.losses[architecture] = known.followed_by(new) if known else new
            walked = [self.dense, *members]  # the dense model is always walked, for the answers that are wanted
            self.spent += (images - start) * forecast(dict.fromkeys(walked), self.costs).cost

    def loss(self, architecture: Architecture, images: int | None = None) -> float:
        """Mean loss in nats, on all of its images or the first so many."""
        return float(self.losses[architecture].loss[0, :images].mean()) / MICRONATS

    def damage(self, architecture: Architecture, images: int) -> tuple[float, float]:
        """How much more than the dense model's the loss is on the first so many images, and its standard error; nats."""
        more = self.losses[architecture].loss[0, :images] - self.losses[self.dense].loss[0, :images]
        error = more.std(ddof=1) / np.sqrt(len(more)) if len(more) > 1 else np.inf
        return float(more.mean()) / MICRONATS, float(error) / MICRONATS

    def beaten(self, architecture: Architecture, others: Sequence[Architecture], images: int) -> bool:
        """Whether one of the others costs no more and has a lower loss, with 95 % confidence, on the first so many images."""
        mine, cost = self.losses[architecture], self.costs.total(architecture)
        for other in others:
            if other == architecture or self.costs.total(other) > cost:
                continue
            theirs = self.losses[other]
            more = mine.loss[0, :images] - theirs.loss[0, :images]
            if more.sum() > 0 and paired(mine.loss[0, :images], theirs.loss[0, :images]).low > 0:
                return True
        return False

    def survivors(self, architectures: Sequence[Architecture], most: int, images: int) -> list[Architecture]:
        """Those that none of them beats on the first so many images, at most `most`, spread over their costs.

        Costs are divided into equal cells; each gives those that lack least to the frontier at their cost, of equals the
        least damaging, and the most expensive cell, where damage is smallest, comes first.
        """
        left = [one for one in architectures if not self.beaten(one, architectures, images)]
        left.sort(key=lambda a: (self.costs.total(a), self.loss(a, images)))
        costs = [self.costs.total(architecture) for architecture in left]
        width = (costs[-1] - costs[0]) // max(1, most // 2) + 1
        cells: dict[int, list[tuple[float, float, Architecture]]] = {}
        least = np.inf
        for architecture, cost in zip(left, costs, strict=True):
            loss = self.loss(architecture, images)
            least = min(least, loss)
            cells.setdefault((costs[-1] - cost) // width, []).append((loss - least, loss, architecture))
        queues = [sorted(cells[cell], key=lambda member: member[:2]) for cell in sorted(cells)]
        turns = zip_longest(*queues)
        return [member[2] for turn in turns for member in turn if member is not None][:most]
