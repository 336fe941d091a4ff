"""What reductions do to a model that is not trained for them, as a sum over the edges of its path.

Damage is nearly additive over replacements (Puzzle, arXiv 2411.19146). Here single reductions are measured: dense up
to a layer, then at some token count to the end. D(layer, tokens) rises with earlier layers and fewer tokens, smoothly,
so a few layers and counts say what lies between. A step of a longer schedule, from `before` to `after` tokens, is guessed to do
D(after) − ½ D(before). How much of D(before) the earlier step has done depends on the operator: means of alike tokens get
worse with each merging, while dropping the least important ones bit by bit does less than dropping them at once. So
whatever is scored afterwards corrects the guess, by a ridge regression whose terms stay on edges: the best path remains
a shortest path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from poolshare.space import Architecture, Layer, SearchSpace

from .cheapest import EdgeDamage

EARLIER = 0.5  # the share of D(before) that a step from `before` does not do again
PROBES = 3  # token counts that are measured for each operator and layer; those between are interpolated
LAYERS = 5  # that single reductions are measured at, likewise
LEAST = 1e-6  # nats: no edge that does anything does less, so damage stays positive

_MISFIT = 0.1  # of an architecture's damage: what a sum over edges cannot say of it, as a standard deviation
_STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8)  # how far the terms may correct the first guess, as factors


def single_reductions(space: SearchSpace, probes: int = PROBES) -> list[Architecture]:
    """The dense model with one change: a reduction that stays to the end, or one layer that shares its map.

    At most `LAYERS` layers, and `probes` token counts for each operator there: first and last, largest and smallest among
    them.
    """
    dense = space[0]
    node = space.follow(None, dense.layers[:1])
    changes = [layer for layer in space.edges[node] if layer != dense.layers[0]]
    chosen = [layer for layer in changes if layer.shared]
    for operator in space.operators:
        reached = [layer for layer in changes if layer.operator == operator]
        chosen += [reached[place] for place in _spread(0, len(reached) - 1, probes)]
    return [
        Architecture((*dense.layers[:index], layer, *[Layer(layer.tokens)] * (space.depth - index - 1)))
        for index in _spread(1, space.depth - 1, LAYERS)
        for layer in chosen
    ]


def _spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` whole numbers from first to last, evenly spread."""
    return [] if last < first else np.unique(np.linspace(first, last, count).round().astype(int)).tolist()


def steps(architecture: Architecture) -> Iterator[tuple[int, Layer, Layer]]:
    """(index of the layer, the layer before it, the layer) where tokens fall or a map is shared."""
    for index, (before, layer) in enumerate(zip(architecture.layers, architecture.layers[1:], strict=False), start=1):
        if layer.operator is not None or layer.shared:
            yield index, before, layer


class DamageModel:
    """Damage of every path of a space in nats, fitted to `single_reductions`, corrected by what else is scored."""

    def __init__(self, space: SearchSpace, singles: Mapping[Architecture, float]):
        """singles: those of `single_reductions` with the damage of each."""
        self.space = space
        measured: dict[tuple[str | None, int], dict[int, float]] = {}
        for architecture, damage in singles.items():
            ((index, _, layer),) = steps(architecture)
            measured.setdefault((layer.operator, index), {})[layer.tokens] = max(damage, LEAST)
        # name of the operator, or None for sharing → index of a measured layer → √damage over token counts
        self._curves: dict[str | None, dict[int, Any]] = {}
        for (name, index), points in sorted(measured.items(), key=lambda item: item[0][1]):
            curve = _curve(space.levels[0], points) if name else _constant(points)
            self._curves.setdefault(name, {})[index] = curve
        self._singles: dict[tuple[str | None, int, int], float] = {}
        self._terms: dict[tuple, int] = {}
        self._mean: np.ndarray = np.zeros(0)
        self._root: np.ndarray = np.zeros((0, 0))
        self._edges: dict[tuple[int, Layer, Layer], tuple[float, np.ndarray, np.ndarray]] = {}

    def single(self, operator: str | None, index: int, tokens: int) -> float:
        """D: damage of going from all tokens to so many before layer `index`, and staying there; or of sharing there (None)."""
        key = operator, index, tokens
        if key not in self._singles:
            curves = self._curves[operator]
            roots = [max(float(curve(tokens)), LEAST**2) for curve in curves.values()]  # all tokens: 0
            self._singles[key] = float(np.exp(2 * np.interp(index, list(curves), np.log(roots))))
        return self._singles[key]

    def typical(self) -> dict[str, float]:
        """Damage of each operator's single reductions, the geometric mean over the measured layers and the token counts that every
        operator was measured down to; the least first."""
        curves = {name: found for name, found in self._curves.items() if name is not None}
        least = max((float(curve.x[0]) for found in curves.values() for curve in found.values()), default=0.0)
        counts = [tokens for tokens in self.space.levels[1:] if tokens >= least]
        nats = {
            name: [self.single(name, at, count) for at in found for count in counts] for name, found in curves.items()
        }
        means = {name: float(np.exp(np.log(np.maximum(found, LEAST)).mean())) for name, found in nats.items()}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def guess(self, index: int, before: Layer, layer: Layer) -> float:
        """What an edge does by the single reductions alone; 0 where nothing changes."""
        if layer.operator is None:
            return self.single(None, index, layer.tokens) if layer.shared else 0.0
        whole = self.single(layer.operator, index, layer.tokens)
        return max(whole - EARLIER * self.single(layer.operator, index, before.tokens), LEAST)

    def __call__(self, index: int, before: Layer | None, layer: Layer) -> float:
        """What an edge does by all that was scored."""
        return self._edge(index, before, layer, self._mean)

    def drawn(self, rng: np.random.Generator) -> EdgeDamage:
        """Damages of edges as they may also be, drawn from what is not known about them (Thompson sampling)."""
        noise = rng.standard_normal(len(self._mean))
        terms = self._mean + (solve_triangular(self._root, noise, trans="T", lower=True) if len(noise) else noise)
        return lambda index, before, layer: self._edge(index, before, layer, terms)

    def total(self, architecture: Architecture) -> float:
        """The sum along a path."""
        return sum(self(*step) for step in steps(architecture))

    def fit(self, architectures: Sequence[Architecture], damages: Sequence[float], errors: Sequence[float]) -> None:
        """Correct the guesses by scored architectures. damages and their standard errors: nats."""
        for architecture in architectures:
            for step in steps(architecture):
                for name in self._corrections(*step):
                    self._terms.setdefault(name, len(self._terms))
        self._edges.clear()
        design = np.zeros((len(architectures), len(self._terms)))
        guesses = np.zeros(len(architectures))
        for row, architecture in enumerate(architectures):
            for step in steps(architecture):
                guesses[row] += self.guess(*step)
                for name, nats in self._corrections(*step).items():
                    design[row, self._terms[name]] += nats
        found = np.asarray(damages, float)
        noise = np.hypot(errors, _MISFIT * np.maximum(found, guesses)) + LEAST
        rows, wanted = design / noise[:, None], (found - guesses) / noise
        strength = min(_STRENGTHS, key=lambda strength: _left_out(rows * strength, wanted))
        precision = rows.T @ rows + np.eye(rows.shape[1]) / strength**2
        self._mean = cho_solve(cho_factor(precision), rows.T @ wanted)
        self._root = np.linalg.cholesky(precision)

    def _edge(self, index: int, before: Layer | None, layer: Layer, terms: np.ndarray) -> float:
        if before is None or (layer.operator is None and not layer.shared):
            return 0.0
        step = index, before, layer
        if step not in self._edges:
            known = {self._terms[name]: nats for name, nats in self._corrections(*step).items() if name in self._terms}
            self._edges[step] = self.guess(*step), np.fromiter(known, int), np.fromiter(known.values(), float)
        guess, places, nats = self._edges[step]
        return max(guess + float(terms[places] @ nats), LEAST)

    def _corrections(self, index: int, before: Layer, layer: Layer) -> dict[tuple, float]:
        """What an edge's correction is a weighted sum of: name → nats, larger where more may be wrong."""
        name, after = layer.operator, layer.tokens
        shares = {
            ("all",): 2.0,
            ("layer", index): 1.0,
            ("operator", name): 2.0,
            ("before", before.tokens): 1.0,
            ("after", after): 1.0,
            ("layer and operator", index, name): 0.5,
            ("layer and after", index, after): 0.5,
            ("layer and before", index, before.tokens): 0.5,
            ("edge", index, before.tokens, after, name): 0.5,
        }
        guess = self.guess(index, before, layer)
        corrections = {name: share * guess for name, share in shares.items()}
        if name is not None:
            corrections["earlier", name] = 2.0 * self.single(name, index, before.tokens)
        return corrections


def _left_out(rows: np.ndarray, wanted: np.ndarray) -> float:
    """Mean squared error of ridge regression on each row, fitted without it (in closed form)."""
    kernel = rows @ rows.T
    inverse = np.linalg.inv(kernel + np.eye(len(rows)))
    return float(np.mean((inverse @ wanted / np.diag(inverse)) ** 2))


def _curve(dense: int, points: Mapping[int, float]) -> PchipInterpolator:
    """√damage over token counts, falling to 0 at the dense model's; made monotone first, as more tokens harm less."""
    tokens = sorted(points)
    heights = np.sqrt(np.maximum.accumulate([points[count] for count in reversed(tokens)]))[::-1]
    return PchipInterpolator([*tokens, dense], [*heights, 0.0])


def _constant(points: Mapping[int, float]) -> Callable[[int], float]:
    """√damage of what has no token count of its own."""
    root = next(iter(points.values())) ** 0.5
    return lambda tokens: root
