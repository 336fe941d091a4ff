"""The prefix tree of a population: layers that several architectures begin with are computed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .architecture import Architecture, Layer
from .cost import CostTable

if TYPE_CHECKING:
    from .search_space import SearchSpace


@dataclass(eq=False)
class PrefixTree:
    """What can follow a common beginning: the next layers, and the positions of architectures that end here."""

    children: dict[Layer, PrefixTree] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, architectures: Iterable[Architecture]) -> PrefixTree:
        """The tree of these architectures; `ends` hold their positions in the iterable."""
        root = cls()
        for position, architecture in enumerate(architectures):
            node = root
            for layer in architecture.layers:
                node = node.children.setdefault(layer, cls())
            node.ends.append(position)
        return root


@dataclass(frozen=True)
class Forecast:
    """What one walk over a prefix tree takes, for one image, beside scoring its architectures one by one."""

    architectures: int
    edges: int  # distinct (prefix, layer) pairs: blocks that are computed
    cost: int  # of the walk, in the cost table's quantity
    one_by_one: int  # the sum over the architectures, in the same quantity

    @property
    def share(self) -> float:
        """The walk's cost as a share of one-by-one scoring."""
        return self.cost / self.one_by_one


def forecast(architectures: Iterable[Architecture], costs: CostTable) -> Forecast:
    """Count what `SuperNet.forward` computes for this population (equal architectures are computed once)."""
    population = list(architectures)
    edges = cost = 0
    stack: list[tuple[Layer | None, PrefixTree]] = [(None, PrefixTree.of(population))]
    while stack:
        previous, tree = stack.pop()
        for layer, child in tree.children.items():
            edges += 1
            cost += costs.edge(previous, layer)
            stack.append((layer, child))
        if tree.ends and previous is not None:
            cost += costs.head(previous.tokens)
    total = costs.source + cost if population else 0
    return Forecast(len(population), edges, total, sum(map(costs.total, population)))


def forecast_space(space: SearchSpace, costs: CostTable) -> Forecast:
    """The same for a whole space, by counting paths instead of walking them."""
    arrivals: dict = {None: 1}  # node -> number of prefixes that end there
    edges, cost = 0, costs.source
    one_by_one = costs.source * space.size
    for remaining in range(space.depth - 1, -1, -1):
        ahead: dict = {}
        for node, prefixes in arrivals.items():
            for layer, after in space.edges[node].items():
                price = costs.edge(space.last_layer(node), layer)
                edges += prefixes
                cost += prefixes * price
                one_by_one += prefixes * price * space.completions[remaining][after]
                ahead[after] = ahead.get(after, 0) + prefixes
        arrivals = ahead
    heads = sum(prefixes * costs.head(space.levels[node.level]) for node, prefixes in arrivals.items())
    return Forecast(space.size, edges, cost + heads, one_by_one + heads)
