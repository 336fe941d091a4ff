"""How many paths lead from a node of the graph to its end at a cost of at most so much: exactly, or in coarse units."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from .architecture import Layer
from .cost import CostTable

if TYPE_CHECKING:
    from .search_space import Node, SearchSpace

MAX_BEGINNINGS = 30_000  # (node, cost so far) pairs in the middle of the graph that an exact count visits
MAX_SUMS = 600_000  # (node, cost to the end) pairs that it holds; with more, counting goes by coarse units
MEMORY = 2**25  # bytes that a coarse count may take
_REMEMBERED = 500_000  # answers of an exact count

Steps = list[tuple["Node", int, int]]  # where an edge leads, what it costs, how many such edges there are


class Paths:
    """A space's graph with a cost on every edge, and the range of costs from each node to the end."""

    def __init__(self, space: SearchSpace, costs: CostTable):
        self.space, self.source = space, costs.source
        self.edges: dict[Node | None, list[tuple[Layer, Node, int]]] = {
            node: [(layer, after, costs.edge(space.last_layer(node), layer)) for layer, after in out.items()]
            for node, out in space.edges.items()
        }
        self.heads = {node: costs.head(space.levels[node.level]) for node in space.edges if node is not None}
        self.steps = merged(self.edges)
        # [layers still to come] -> the nodes where a path may stand then
        self.reached: list[list[Node | None]] = [[None]]
        for _ in range(space.depth):
            self.reached.insert(0, list({after: None for node in self.reached[0] for after, _, _ in self.steps[node]}))
        self.least, self.most = self.extremes(min), self.extremes(max)
        self.cheapest = self.source + self.least[-1][None]
        self.most_expensive = self.source + self.most[-1][None]

    def extremes(self, choose: Callable[[Iterable[int]], int]) -> list[dict[Node | None, int]]:
        """[layers still to come][node] -> the least or the most that a path from there to the end costs."""
        found: list[dict[Node | None, int]] = [{node: self.heads[node] for node in self.reached[0]}]  # type: ignore[index]
        for nodes in self.reached[1:]:
            found.append({n: choose(cost + found[-1][after] for after, cost, _ in self.steps[n]) for n in nodes})
        return found

    @cached_property
    def ways(self) -> ExactWays | CoarseWays:
        """The counts themselves, made when they are first asked for."""
        try:
            return ExactWays(self)
        except OverflowError:
            return CoarseWays(self)


@lru_cache(maxsize=4)
def paths_of(space: SearchSpace, costs: CostTable) -> Paths:
    """The graph with these costs; the last few are remembered."""
    return Paths(space, costs)


def merged(edges: dict[Node | None, list[tuple[Layer, Node, int]]]) -> dict[Node | None, Steps]:
    """Edges that lead to one node at one cost are one step, taken in several ways."""
    steps: dict[Node | None, Steps] = {}
    for node, out in edges.items():
        times: dict[tuple[Node, int], int] = {}
        for _, after, cost in out:
            times[after, cost] = times.get((after, cost), 0) + 1
        steps[node] = [(after, cost, count) for (after, cost), count in times.items()]
    return steps


class ExactWays:
    """Counts to the unit, meeting in the middle: sums of costs are tabulated near the end, and followed before that.

    Raises OverflowError where there are too many different sums.
    """

    unit = 1

    def __init__(self, paths: Paths):
        self.paths, self.edges = paths, paths.edges
        self.completions = paths.space.completions
        self.tables: list[dict[Node | None, tuple[list[int], list[int]]]] = []  # [layers to come][node] -> see `_table`
        self._known: dict[tuple[int, Node | None, int], int] = {}
        ahead: dict[Node | None, dict[int, int]] = {node: {paths.heads[node]: 1} for node in paths.reached[0]}  # type: ignore[index]
        self._tabulate(ahead)
        beginnings: set[tuple[Node | None, int]] = {(None, 0)}
        begun, sums = 0, len(ahead)
        while begun + len(self.tables) <= paths.space.depth:
            further = self._further(beginnings) if len(beginnings) <= sums else None
            if further is not None:
                beginnings, begun = further, begun + 1
            else:
                ahead = self._one_layer_more(ahead, MAX_SUMS - sums)
                sums += sum(map(len, ahead.values()))
                self._tabulate(ahead)

    def _further(self, beginnings: set[tuple[Node | None, int]]) -> set[tuple[Node | None, int]] | None:
        """The beginnings that are one layer longer; None where they are too many."""
        further: set[tuple[Node | None, int]] = set()
        for node, spent in beginnings:
            further.update((after, spent + cost) for after, cost, _ in self.paths.steps[node])
            if len(further) > MAX_BEGINNINGS:
                return None
        return further

    def _one_layer_more(self, ahead: dict[Node | None, dict[int, int]], room: int) -> dict[Node | None, dict[int, int]]:
        ways_from: dict[Node | None, dict[int, int]] = {}
        for node in self.paths.reached[len(self.tables)]:
            ways: dict[int, int] = {}
            for after, cost, times in self.paths.steps[node]:
                for total, count in ahead[after].items():
                    ways[total + cost] = ways.get(total + cost, 0) + times * count
            ways_from[node] = ways
            room -= len(ways)
            if room < 0:
                raise OverflowError
        return ways_from

    def _tabulate(self, ahead: dict[Node | None, dict[int, int]]) -> None:
        """Keep, for each node, the sums, rising, and how many ways cost less than each, and in the end all of them."""
        tables = {}
        for node, ways in ahead.items():
            sums = sorted(ways)
            tables[node] = sums, [0, *accumulate(ways[total] for total in sums)]
        self.tables.append(tables)

    def at_most(self, remaining: int, node: Node | None, limit: int) -> int:
        """How many ways from the node, `remaining` layers before the end, cost no more than `limit`."""
        if limit >= self.paths.most[remaining][node]:
            return self.completions[remaining][node]
        if limit < self.paths.least[remaining][node]:
            return 0
        if remaining < len(self.tables):
            sums, below = self.tables[remaining][node]
            return below[bisect_right(sums, limit)]
        key = remaining, node, limit
        found = self._known.get(key)
        if found is None:
            found = 0
            for after, cost, times in self.paths.steps[node]:
                found += times * self.at_most(remaining - 1, after, limit - cost)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = found
        return found


class CoarseWays:
    """Counts of the same, each cost rounded to units so coarse that the counts of all costs fit into `MEMORY`.

    The counts by cost are a polynomial, held as one long integer with a fixed number of bits for each coefficient: to
    go along an edge is a shift, to choose between edges a sum.
    """

    def __init__(self, paths: Paths):
        self.paths, space = paths, paths.space
        self.completions = space.completions
        self._width = space.size.bit_length() // 8 + 1  # bytes of a coefficient
        spans = sum(paths.most[r][node] - least for r, row in enumerate(paths.least) for node, least in row.items())
        self.unit = max(1, -(-spans * self._width // MEMORY))
        self.edges = {
            node: [(layer, after, self._rounded(cost)) for layer, after, cost in out]
            for node, out in paths.edges.items()
        }
        steps = merged(self.edges)
        self._counts: list[dict[Node | None, tuple[int, bytes]]] = []  # least cost, ways that cost at most each
        least: dict[Node | None, int] = {node: self._rounded(paths.heads[node]) for node in paths.reached[0]}  # type: ignore[index]
        ways: dict[Node | None, int] = dict.fromkeys(least, 1)
        self._counts.append({node: (least[node], self._at_most(1)) for node in least})
        bits = 8 * self._width
        for nodes in paths.reached[1:]:
            further: dict[Node | None, int] = {}
            start = {node: min(cost + least[after] for after, cost, _ in steps[node]) for node in nodes}
            for node in nodes:
                further[node] = sum(
                    times * (ways[after] << bits * (cost + least[after] - start[node]))
                    for after, cost, times in steps[node]
                )
            least, ways = start, further
            self._counts.append({node: (least[node], self._at_most(ways[node])) for node in nodes})

    def _rounded(self, cost: int) -> int:
        return (2 * cost + self.unit) // (2 * self.unit)

    def _at_most(self, ways: int) -> bytes:
        """Sums of the coefficients up to each one."""
        bits = 8 * self._width
        length = -(-ways.bit_length() // bits)
        step = 1
        while step < length:  # times (1 + x)(1 + x²)(1 + x⁴)… = 1 + x + x² + x³ + …
            ways += ways << bits * step
            step *= 2
        return (ways & ((1 << bits * length) - 1)).to_bytes(length * self._width, "little")

    def at_most(self, remaining: int, node: Node | None, limit: int) -> int:
        """How many ways from the node, `remaining` layers before the end, cost no more than `limit` units."""
        least, counts = self._counts[remaining][node]
        start = (limit - least) * self._width
        if start < 0:
            return 0
        if start >= len(counts):
            return self.completions[remaining][node]
        return int.from_bytes(counts[start : start + self._width], "little")
