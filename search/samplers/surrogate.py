"""A Gaussian process of accuracy over architectures: predictions with their uncertainty.

C. Rasmussen and C. Williams, "Gaussian Processes for Machine Learning", 2006, algorithm 2.1. Two architectures are as
alike as exp(-rate · distance), their distance the token levels between them and the layers that share or pool in
another way. Rate, spread and noise are those of a grid under which each score is likeliest given all others (section 5.4.2):
they make the model less sure of itself than the evidence of all scores together does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import solve_triangular
from scipy.special import ndtr

from poolshare.space import Architecture, SearchSpace

_RATES = (0.06, 0.12, 0.25, 0.5)  # per step of distance
_RATIOS = np.logspace(-1, 1.5, 11)  # noise variance / variance of the process; scores of few images are never exact


class Surrogate:
    """Fitted to architectures and their accuracies; knows the accuracies of a pool, and can take members as scored."""

    def __init__(
        self,
        space: SearchSpace,
        architectures: Sequence[Architecture],
        scores: Sequence[float],
        pool: list[Architecture],
    ):
        known, self._pool = _coordinates(space, architectures), _coordinates(space, pool)
        values = np.asarray(scores, float)
        middle, between = float(values.mean()), _distance(known, known)
        self._rate, ratio, variance = max(_left_out(between, values - middle), key=lambda fit: fit[0])[1:]
        root = np.linalg.cholesky(np.exp(-self._rate * between) + ratio * np.eye(len(values)))
        # (scored, pool): explained of each member's variance
        self._explained = solve_triangular(root, np.exp(-self._rate * _distance(known, self._pool)), lower=True)
        self.mean = middle + solve_triangular(root, values - middle, lower=True) @ self._explained  # (pool,)
        self._left = np.maximum(1 - (self._explained**2).sum(0), 0)  # (pool,) of the process's variance
        self._ratio, self._variance = ratio, variance

    @property
    def spread(self) -> np.ndarray:
        """(pool,): standard deviation of what each member would score, in points of accuracy."""
        return np.sqrt(self._variance * (self._left + self._ratio))

    def expect(self, member: int) -> None:
        """Take a member of the pool as scored, with what is expected of it: what is like it holds less surprise."""
        alike = np.exp(-self._rate * _distance(self._pool[member : member + 1], self._pool))[0]
        row = (alike - self._explained[:, member] @ self._explained) / np.sqrt(self._left[member] + self._ratio)
        self._explained = np.vstack([self._explained, row])
        self._left = np.maximum(self._left - row**2, 0)


def _coordinates(space: SearchSpace, architectures: Sequence[Architecture]) -> np.ndarray:
    """(architectures, layers, 2): token level, and the way a layer shares or pools."""
    level = {tokens: index for index, tokens in enumerate(space.levels)}
    ways: dict[tuple[bool, str | None], int] = {(False, None): 0, (True, None): 1}
    ways |= {(False, name): 2 + index for index, name in enumerate(space.operators)}
    rows = [[(level[layer.tokens], ways[layer.shared, layer.operator]) for layer in a.layers] for a in architectures]
    return np.array(rows, np.int8).reshape(len(architectures), space.depth, 2)


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, layers, 2), (m, layers, 2) → (n, m)."""
    total = np.zeros((len(first), len(second)), np.int16)
    for layer in range(first.shape[1]):
        total += np.abs(first[:, None, layer, 0] - second[None, :, layer, 0])
        total += first[:, None, layer, 1] != second[None, :, layer, 1]
    return total


def _left_out(between: np.ndarray, values: np.ndarray) -> list[tuple[float, float, float, float]]:
    """(log likelihood, rate, ratio, variance of the process), for each rate and ratio with its likeliest variance.

    The likelihood is that of each value given all others.
    """
    fits = []
    for rate in _RATES:
        sizes, axes = np.linalg.eigh(np.exp(-rate * between))
        along = axes.T @ values  # (n,)
        for ratio in _RATIOS:
            total = np.maximum(sizes, 0) + ratio
            precision = (axes**2) @ (1 / total)  # (n,)
            missed = axes @ (along / total)
            variance = max(float((missed**2 / precision).mean()), 1e-6)
            likelihood = 0.5 * (float(np.log(precision).sum()) - len(values) * np.log(variance))
            fits.append((likelihood, rate, float(ratio), variance))
    return fits


def expected_gain(mean: np.ndarray, spread: np.ndarray, best: np.ndarray) -> np.ndarray:
    """E[max(0, x - best)] of normal x, elementwise: D. Jones et al., "Efficient global optimization", 1998, eq. 15."""
    distance = (mean - best) / spread
    density = np.exp(-0.5 * distance**2) / np.sqrt(2 * np.pi)
    return spread * (distance * ndtr(distance) + density)
