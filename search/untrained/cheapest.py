"""The least damaging path at every cost: exact dynamic programming over the graph, with the cost in the state.

A sum of numbers on edges has a best path for every budget, also where the frontier is not convex and no trade-off
damage + λ · cost would ever choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from poolshare.space import Architecture, BudgetError, CostTable, Layer, SearchSpace
from poolshare.space.search_space import Node

UNITS = 2000  # of cost, in the dense model: coarser ones would give paths away, finer ones take time

# (index of the layer, the layer before it or None, the layer) → damage of this edge; it may be negative. As in a cost
# table, of the layer before only its tokens and whether it shares are known.
EdgeDamage = Callable[[int, Layer | None, Layer], float]


class Path(NamedTuple):
    """An architecture, its exact cost, and the damage that the sum over its edges says."""

    architecture: Architecture
    cost: int
    damage: float


class CheapestPaths:
    """Least sums of damage from every node to the end, for every cost.

    Costs are counted in units of 1/2000 of the dense model's, exactly where those are below one; each edge is rounded
    to the nearest unit, so a path may be missed that is better by less than that.
    """

    def __init__(self, space: SearchSpace, costs: CostTable, damage: EdgeDamage, units: int = UNITS):
        self.space, self.costs, self._damage = space, costs, damage
        self.unit = max(1, costs.total(space[0]) // units)
        most = costs.total(space.most_expensive(costs)) - costs.source
        self._width = most // self.unit + space.depth + 2
        inner = [node for node in space.edges if node is not None]
        # [index of the layer][node before it] → its edges
        self._edges = [self._edges_at(index, inner if index else [None], damage) for index in range(space.depth)]
        # [index of the layer to come][node] → (width,): least damage of the rest, where it costs just so many units
        self._ahead: list[dict[Node | None, np.ndarray]] = [{node: self._end(node) for node in inner}]
        for edges in reversed(self._edges):
            self._ahead.insert(0, {node: self._least(out, self._ahead[0]) for node, out in edges.items()})

    def _edges_at(self, index: int, nodes: Sequence[Node | None], damage: EdgeDamage) -> dict[Node | None, list[_Edge]]:
        edges = {}
        for node in nodes:
            before = self.space.last_layer(node)
            edges[node] = [
                _Edge(layer, after, round(self.costs.edge(before, layer) / self.unit), damage(index, before, layer))
                for layer, after in self.space.edges[node].items()
            ]
        return edges

    def _end(self, node: Node) -> np.ndarray:
        end = np.full(self._width, np.inf)
        end[round(self.costs.head(self.space.levels[node.level]) / self.unit)] = 0.0
        return end

    def _least(self, edges: Sequence[_Edge], ahead: dict[Node | None, np.ndarray]) -> np.ndarray:
        least = np.full(self._width, np.inf)
        for edge in edges:
            longer = least[edge.units :]
            np.minimum(longer, ahead[edge.after][: self._width - edge.units] + edge.damage, out=longer)
        return least

    def best(self, limit: float) -> Path:
        """The least damaging path that costs at most `limit`, in the table's units; of equals a cheap one.

        Raises BudgetError where none costs so little.
        """
        least = self._ahead[0][None].copy()
        least[max(0, int(limit / self.unit) + self.space.depth + 2) :] = np.inf
        while np.isfinite(least).any():
            path = self._trace(int(least.argmin()))
            if path.cost <= limit:
                return path
            least[least.argmin()] = np.inf  # units are rounded: just below the limit they may be too few
        cheapest = self._whole(self.space.cheapest(self.costs))
        if cheapest.cost <= limit:  # a less damaging path of as many units is above the limit
            return cheapest
        raise BudgetError(f"no architecture costs {limit:,} or less; the cheapest costs {cheapest.cost:,}")

    def _whole(self, architecture: Architecture) -> Path:
        before = (None, *(layer._replace(operator=None) for layer in architecture.layers))
        edges = zip(range(self.space.depth), before, architecture.layers, strict=False)
        return Path(architecture, self.costs.total(architecture), sum(self._damage(*edge) for edge in edges))

    def _trace(self, units: int) -> Path:
        layers: list[Layer] = []
        node: Node | None = None
        left, total = units, 0.0
        for index, edges in enumerate(self._edges):
            ahead, wanted = self._ahead[index + 1], self._ahead[index][node][left]
            edge = next(
                edge
                for edge in edges[node]
                if edge.units <= left and ahead[edge.after][left - edge.units] + edge.damage == wanted
            )
            layers.append(edge.layer)
            node, left, total = edge.after, left - edge.units, total + edge.damage
        architecture = Architecture(tuple(layers))
        return Path(architecture, self.costs.total(architecture), total)


class _Edge(NamedTuple):
    layer: Layer
    after: Node
    units: int
    damage: float
