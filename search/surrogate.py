"""An additive model of accuracy: a weight for every edge of the graph, an architecture's score the sum along its path.

Bayesian ridge regression: weights and noise are normal, their ratio is the one of highest evidence (D. MacKay,
"Bayesian interpolation", Neural Computation 4, 1992). What the sum cannot say counts as noise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr

from poolshare.space import Architecture, SearchSpace

_RATIOS = np.logspace(-2, 3, 21)  # noise variance / weight variance


class EdgeModel:
    """Fitted to architectures and their accuracies; predicts others, and how far it may be wrong."""

    def __init__(self, space: SearchSpace, architectures: Sequence[Architecture], top1: Sequence[float]):
        self.space = space
        self._columns: dict[tuple, int] = {}
        values = np.asarray(top1, float)
        self.mean = float(values.mean())
        design = self.design(architectures)  # (n, features)
        left, self._sizes, self._axes = np.linalg.svd(design, full_matrices=False)
        along = left.T @ (values - self.mean)  # (r,)
        rest = max(float(((values - self.mean) ** 2).sum() - (along**2).sum()), 0.0)
        gains = 1 + self._sizes**2 / _RATIOS[:, None]  # (ratios, r)
        noise = np.maximum(((along**2 / gains).sum(1) + rest) / len(values), 1e-6)
        best = int(np.argmin(len(values) * np.log(noise) + np.log(gains).sum(1)))
        self.noise = float(np.sqrt(noise[best]))  # standard deviation, in points of accuracy
        self._ratio = _RATIOS[best]
        self._along = along

    def design(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """(architectures, features): which edges a path takes, at its layer and at any.

        An edge that was not met before gets a new column; its weight is as the prior has it.
        """
        rows = [[self._column(feature) for feature in self._features(a)] for a in architectures]
        matrix = np.zeros((len(rows), len(self._columns)))
        for row, columns in zip(matrix, rows, strict=True):
            np.add.at(row, columns, 1.0)
        return matrix

    def _column(self, feature: tuple) -> int:
        return self._columns.setdefault(feature, len(self._columns))

    def _features(self, architecture: Architecture) -> list[tuple]:
        found: list[tuple] = []
        node = None
        for index, layer in enumerate(architecture.layers):
            if node is not None:
                found += [(index, node.level, layer), (index, layer.tokens), (node.level, layer)]
            node = self.space.edges[node][layer]
        return found

    def draw(self, design: np.ndarray, rng: random.Random) -> np.ndarray:
        """Accuracies under weights drawn from their posterior: (n, features) → (n,); without noise."""
        generator = np.random.default_rng(rng.getrandbits(64))
        width = design.shape[1]
        axes = np.zeros((len(self._sizes), width))
        axes[:, : self._axes.shape[1]] = self._axes
        spread = generator.standard_normal(width)
        shrink = 1 - np.sqrt(self._ratio / (self._sizes**2 + self._ratio))
        mean = self._along * self._sizes / (self._sizes**2 + self._ratio)
        scale = self.noise / np.sqrt(self._ratio)
        weights = axes.T @ mean + scale * (spread - axes.T @ (shrink * (axes @ spread)))
        return self.mean + design @ weights


def expected_gain(mean: np.ndarray, spread: float, best: np.ndarray) -> np.ndarray:
    """E[max(0, x - best)] of normal x, elementwise: D. Jones et al., "Efficient global optimization", 1998, eq. 15."""
    distance = (mean - best) / spread
    density = np.exp(-0.5 * distance**2) / np.sqrt(2 * np.pi)
    return spread * (distance * ndtr(distance) + density)
