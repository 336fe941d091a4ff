"""Band: the architectures of a space whose cost lies in a range; counted exactly where feasible, drawn uniformly."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from math import ceil, floor
from typing import TYPE_CHECKING

from .architecture import Architecture, Layer
from .cost import CostTable
from .counting import CoarseWays, ExactWays, paths_of
from .errors import BudgetError

if TYPE_CHECKING:
    from .search_space import Node, SearchSpace

FEW = 2000  # coarsely counted architectures that are checked one by one, and so counted exactly
_MAX_DRAWS = 20_000


def _rounded(name: str, limit: float, rounding: Callable[[float], int]) -> int:
    try:
        return rounding(limit)
    except (TypeError, ValueError, OverflowError):
        raise BudgetError(f"{name} is {limit!r}; a limit is a number of the cost's units, or None") from None


class Band:
    """The architectures of `space` that cost from `low` to `high`, both included; None leaves a side open.

    Costs are whole numbers, so a broken limit (0.6 of a model's) is rounded into the band.

    Draws are uniform. `size` is exact where `exact` says so: counted with the cost in the state, or member by member
    where they are few. Where a space has too many different costs for that, counting goes by coarser units over a
    slightly wider band and draws outside [low, high] are rejected; `size` is then an estimate.

    Raises BudgetError, naming the reachable range or the nearest costs, where no architecture qualifies.
    """

    def __init__(self, space: SearchSpace, costs: CostTable, low: float | None = None, high: float | None = None):
        self.space, self.costs = space, costs
        self._paths = paths = paths_of(space, costs)
        self.low = paths.cheapest if low is None else _rounded("low", low, ceil)
        self.high = paths.most_expensive if high is None else _rounded("high", high, floor)
        if self.low > paths.most_expensive or self.high < paths.cheapest or self.low > self.high:
            wanted = f"at most {costs.format(self.high)} ({self.high:,})" if low is None else self._wanted()
            raise BudgetError(f"no architecture costs {wanted}: {self._reach()}")
        self.exact, self._members = True, None
        self._open = self.low <= paths.cheapest and self.high >= paths.most_expensive
        if self._open:
            self.size = space.size
            return
        self._ways = paths.ways
        low_cost, high_cost = self.low - costs.source, self.high - costs.source
        if isinstance(self._ways, ExactWays):
            self._below, self._high = low_cost - 1, high_cost
            self.size = self._proposals = self._count(self._below, self._high)
        else:
            # Each cost along a path is rounded to the nearest unit, so a sum is off by half a unit for each at most.
            unit, slack = self._ways.unit, (space.depth + 1) * self._ways.unit
            self._below = -((slack - 2 * low_cost) // (2 * unit)) - 1
            self._high = (2 * high_cost + slack) // (2 * unit)
            self._proposals = self._count(self._below, self._high)
            if self._proposals <= FEW:
                found = map(self._unrank, range(self._proposals))
                self._members = [architecture for architecture in found if self._within(architecture)]
                self.size = len(self._members)
            else:
                self.exact = False
                estimate = _estimated(self._ways, space.depth, high_cost)
                self.size = max(1, estimate - _estimated(self._ways, space.depth, low_cost - 1))
        if self.size == 0:
            raise BudgetError(f"no architecture costs {self._wanted()}; {self._nearest()}")
        if not self.exact:
            self.sample(random.Random(0))  # raises where only the wider band has members

    @property
    def size_text(self) -> str:
        """The size for people: "31,294", or "about 628,000" where it is an estimate."""
        if self.exact:
            return f"{self.size:,}"
        step = 10 ** max(0, len(str(self.size)) - 3)
        return f"about {(self.size + step // 2) // step * step:,}"

    def _wanted(self) -> str:
        return f"from {self.costs.format(self.low)} ({self.low:,}) to {self.costs.format(self.high)} ({self.high:,})"

    def _reach(self) -> str:
        low, high = self._paths.cheapest, self._paths.most_expensive
        return f"this space reaches from {self.costs.format(low)} ({low:,}) to {self.costs.format(high)} ({high:,})"

    def _nearest(self) -> str:
        if not isinstance(self._ways, ExactWays):
            return self._reach()
        below = self._ways.at_most(self.space.depth, None, self._below)
        near = [self._first_cost(count) for count in (below, below + 1) if 0 < count <= self.space.size]
        return "the nearest that exist cost " + " and ".join(f"{cost:,}" for cost in near)

    def _first_cost(self, count: int) -> int:
        """The least cost that so many architectures do not exceed."""
        low, high = self._paths.cheapest, self._paths.most_expensive
        while low < high:
            middle = (low + high) // 2
            if self._ways.at_most(self.space.depth, None, middle - self.costs.source) >= count:
                high = middle
            else:
                low = middle + 1
        return low

    def _count(self, below: int, high: int) -> int:
        depth = self.space.depth
        return self._ways.at_most(depth, None, high) - self._ways.at_most(depth, None, below)

    def _within(self, architecture: Architecture) -> bool:
        return self.low <= self.costs.total(architecture) <= self.high

    def __contains__(self, architecture: object) -> bool:
        return isinstance(architecture, Architecture) and architecture in self.space and self._within(architecture)

    def sample(self, rng: random.Random) -> Architecture:
        """A uniform draw. Raises BudgetError where a coarsely counted band turns out to be empty."""
        if self._open:
            return self.space.sample(rng)
        if self.exact:
            position = rng.randrange(self.size)
            return self._unrank(position) if self._members is None else self._members[position]
        for _ in range(_MAX_DRAWS):
            architecture = self._unrank(rng.randrange(self._proposals))
            if self._within(architecture):
                return architecture
        raise BudgetError(f"none of {_MAX_DRAWS:,} draws costs {self._wanted()}; {self._reach()}: widen the band")

    def __iter__(self) -> Iterator[Architecture]:
        """All members, in the order of their ranks in the space."""
        if self._open:
            return iter(self.space)
        if self._members is not None:
            return iter(self._members)
        found = map(self._unrank, range(self._proposals))
        return found if self.exact else filter(self._within, found)

    def _unrank(self, position: int) -> Architecture:
        layers: list[Layer] = []
        node: Node | None = None
        below, high, at_most = self._below, self._high, self._ways.at_most
        for remaining in range(self.space.depth - 1, -1, -1):
            for layer, after, cost in self._ways.edges[node]:
                count = at_most(remaining, after, high - cost) - at_most(remaining, after, below - cost)
                if position < count:
                    layers.append(layer)
                    node, below, high = after, below - cost, high - cost
                    break
                position -= count
        return Architecture(tuple(layers))


def _estimated(ways: CoarseWays, depth: int, limit: int) -> int:
    """How many paths cost at most `limit`: those of a rounded cost of k units are spread evenly over k ± ½."""
    units, part = divmod(2 * limit + ways.unit, 2 * ways.unit)
    before, until = ways.at_most(depth, None, units - 1), ways.at_most(depth, None, units)
    return before + (until - before) * part // (2 * ways.unit)


def even_borders(low: int, high: int, count: int) -> list[int]:
    """`count` bands of equal width over the whole numbers from low to high: where each begins, and high + 1."""
    return [low + (high + 1 - low) * index // count for index in range(count + 1)]
