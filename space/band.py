"""Band: the architectures of a space whose cost lies in a range; counted exactly, drawn uniformly."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from math import ceil, floor
from typing import TYPE_CHECKING

from .architecture import Architecture, Layer
from .cost import CostTable
from .errors import BudgetError

if TYPE_CHECKING:
    from .search_space import Node, SearchSpace

MAX_ENTRIES = 1_000_000  # distinct (node, sum) pairs that are counted exactly; past it, coarser units
_MAX_DRAWS = 100_000


class _Counts:
    """For each layer and node: how many ways to the end cost how much, in units of `unit`."""

    def __init__(self, space: SearchSpace, costs: CostTable, unit: int):
        self.unit = unit
        self.edges: dict[Node | None, list[tuple[Layer, Node, int]]] = {
            node: [(layer, after, costs.edge(space.last_layer(node), layer) // unit) for layer, after in out.items()]
            for node, out in space.edges.items()
        }
        # [layers to come][node] -> (sums, rising; how many ways cost less than each, and in the end all of them)
        self.ways: list[dict[Node | None, tuple[list[int], list[int]]]] = []
        ahead: dict[Node | None, dict[int, int]] = {
            node: {costs.head(space.levels[node.level]) // unit: 1} for node in self.edges if node is not None
        }
        entries = 0
        for remaining in range(space.depth + 1):
            if remaining:
                ahead = self._one_layer_more(ahead, whole=remaining == space.depth)
            entries += sum(map(len, ahead.values()))
            if entries > MAX_ENTRIES:
                raise OverflowError
            self.ways.append({node: _cumulative(ways) for node, ways in ahead.items()})

    def _one_layer_more(
        self, ahead: dict[Node | None, dict[int, int]], whole: bool
    ) -> dict[Node | None, dict[int, int]]:
        ways_from: dict[Node | None, dict[int, int]] = {}
        for node in [None] if whole else [node for node in self.edges if node is not None]:
            ways: dict[int, int] = {}
            for _, after, cost in self.edges[node]:
                for total, count in ahead[after].items():
                    ways[total + cost] = ways.get(total + cost, 0) + count
            ways_from[node] = ways
        return ways_from


def _cumulative(ways: dict[int, int]) -> tuple[list[int], list[int]]:
    sums = sorted(ways)
    return sums, [0, *accumulate(ways[total] for total in sums)]


@lru_cache(maxsize=8)
def _counts(space: SearchSpace, costs: CostTable) -> _Counts:
    for power in range(22):  # 8**21 is 2**63: any unit that could matter
        try:
            return _Counts(space, costs, 8**power)
        except OverflowError:
            continue
    raise BudgetError(
        f"this space has more than {MAX_ENTRIES:,} nodes, too many to count costs; use fewer levels or a smaller max_run"
    )


def _rounded(name: str, limit: float, rounding: Callable[[float], int]) -> int:
    try:
        return rounding(limit)
    except (TypeError, ValueError, OverflowError):
        raise BudgetError(f"{name} is {limit!r}; a limit is a number of the cost's units, or None") from None


class Band:
    """The architectures of `space` that cost from `low` to `high`, both included; None leaves a side open.

    Costs are whole numbers, so a broken limit (0.6 of a model's) is rounded into the band.

    The number and the draws are exact, found by counting paths with the cost in the state. Where a space has too
    many different costs for that (`exact` is then False), counting goes by coarser units over a slightly wider band
    and draws outside [low, high] are rejected: draws stay exactly uniform, `size` becomes an estimate from above.

    Raises BudgetError, naming the reachable range or the nearest costs, where no architecture qualifies.
    """

    def __init__(self, space: SearchSpace, costs: CostTable, low: float | None = None, high: float | None = None):
        self.space, self.costs = space, costs
        cheapest, dearest = costs.total(space.cheapest(costs)), costs.total(space.dearest(costs))
        self._reach = (
            f"this space reaches from {costs.format(cheapest)} ({cheapest:,}) to {costs.format(dearest)} ({dearest:,})"
        )
        self.low = cheapest if low is None else _rounded("low", low, ceil)
        self.high = dearest if high is None else _rounded("high", high, floor)
        if self.low > dearest or self.high < cheapest or self.low > self.high:
            wanted = f"at most {costs.format(self.high)} ({self.high:,})" if low is None else self._wanted()
            raise BudgetError(f"no architecture costs {wanted}: {self._reach}")
        self._counts = _counts(space, costs)
        unit = self._counts.unit
        rounding = 0 if unit == 1 else space.depth + 2  # each floor on the path loses less than one unit
        self._low = self.low // unit - rounding - costs.source // unit
        self._high = self.high // unit - costs.source // unit
        self.exact = unit == 1
        self.size = self._ways(self._low, self._high)
        if self.size == 0:
            raise BudgetError(f"no architecture costs {self._wanted()}; {self._nearest()}")
        if not self.exact:
            self.sample(random.Random(0))  # raises where only the wider band has members

    def _wanted(self) -> str:
        return f"from {self.costs.format(self.low)} ({self.low:,}) to {self.costs.format(self.high)} ({self.high:,})"

    def _nearest(self) -> str:
        if not self.exact:
            return self._reach
        sums = self._counts.ways[self.space.depth][None][0]
        position = bisect_left(sums, self._low)
        near = [total + self.costs.source for total in sums[max(0, position - 1) : position + 1]]
        return "the nearest that exist cost " + " and ".join(f"{total:,}" for total in near)

    def _ways(self, low: int, high: int) -> int:
        sums, below = self._counts.ways[self.space.depth][None]
        return below[bisect_right(sums, high)] - below[bisect_left(sums, low)]

    def __contains__(self, architecture: object) -> bool:
        return (
            isinstance(architecture, Architecture)
            and architecture in self.space
            and self.low <= self.costs.total(architecture) <= self.high
        )

    def sample(self, rng: random.Random) -> Architecture:
        """A uniform draw. Raises BudgetError where a coarsely counted band turns out to be empty."""
        for _ in range(_MAX_DRAWS):
            architecture = self._unrank(rng.randrange(self.size))
            if self.exact or self.low <= self.costs.total(architecture) <= self.high:
                return architecture
        raise BudgetError(f"none of {_MAX_DRAWS:,} draws costs {self._wanted()}; {self._nearest()}: widen the band")

    def __iter__(self) -> Iterator[Architecture]:
        """All members, in the order of their ranks in the space."""
        for position in range(self.size):
            architecture = self._unrank(position)
            if self.exact or architecture in self:
                yield architecture

    def _unrank(self, position: int) -> Architecture:
        layers: list[Layer] = []
        node: Node | None = None
        low, high = self._low, self._high
        for remaining in range(self.space.depth - 1, -1, -1):
            ways = self._counts.ways[remaining]
            for layer, after, cost in self._counts.edges[node]:
                sums, below = ways[after]
                count = below[bisect_right(sums, high - cost)] - below[bisect_left(sums, low - cost)]
                if position < count:
                    layers.append(layer)
                    node, low, high = after, low - cost, high - cost
                    break
                position -= count
        return Architecture(tuple(layers))
