"""SearchSpace: every architecture as one path of a layered graph; count, draw, rank, change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .architecture import MAX_DEPTH, Architecture, Layer, Run
from .band import Band
from .cost import CostTable
from .errors import ArchitectureError, SpaceError
from .operators import OPERATORS, Grid, grid_of, no_grid


class Node(NamedTuple):
    """Where a path stands after some layers (the layer index itself is the caller's)."""

    level: int  # index into the space's levels
    run: int  # layers so far that use the current attention map, its owner included
    grid: bool  # whether the patch tokens still form a grid


@dataclass(frozen=True)
class SearchSpace:
    """All ways to drop tokens and share attention maps in a ViT of `depth` blocks.

    depth: number of blocks.
    levels: patch-token counts, falling; the first is the base model's own. Perfect squares are grids, or what `grid` has.
    operators: names from `OPERATORS` that may pool between two blocks.
    max_run: how many blocks at most use one attention map, its owner included (1: no sharing).
    has_cls: whether the base model has a CLS token; None leaves it to the model.
    grid: rows and columns of its patches where they are no square, see `operators.grids`; a square one becomes None.

    Size, draws and ranks are exact: they count paths. The order of ranks is fixed: at each layer first an own map,
    then a shared one, then reductions by falling token count and in the order of `operators`; rank 0 is the base
    model itself. Raises SpaceError where the space cannot exist.
    """

    depth: int
    levels: tuple[int, ...]
    operators: tuple[str, ...] = ("max2d",)
    max_run: int = 3
    has_cls: bool | None = None
    grid: Grid | None = None

    def __post_init__(self) -> None:
        for name, example in (("levels", (196, 100, 49)), ("operators", ("max2d",))):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise SpaceError(f"{name} is a tuple such as {example}, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("depth", "max_run"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_DEPTH:
                raise SpaceError(f"{name} is {value!r}; it must be a whole number from 1 to {MAX_DEPTH}")
        if not self.levels or any(type(level) is not int or level < 1 for level in self.levels):
            raise SpaceError(f"levels are {self.levels!r}; they must be positive whole numbers such as (196, 100, 49)")
        if any(later >= earlier for earlier, later in zip(self.levels, self.levels[1:], strict=False)):
            raise SpaceError(
                f"levels are {self.levels!r}; they must fall strictly, beginning with the model's own count"
            )
        for operator in self.operators:
            if not isinstance(operator, str) or operator not in OPERATORS:
                raise SpaceError(f"operator {operator!r} is unknown; known are {', '.join(OPERATORS)}")
        if len(set(self.operators)) != len(self.operators):
            raise SpaceError(f"operators are {self.operators!r}; name each one once")
        if self.has_cls not in (True, False, None):
            raise SpaceError(f"has_cls is {self.has_cls!r}; it must be True, False or None (as the model has it)")
        self._read_grid()
        reachable = {node.level for node in self.edges if node is not None}
        for index, level in enumerate(self.levels):
            if index not in reachable:
                odd = next((count for count in (level, self.levels[0]) if grid_of(count, self.grid) is None), None)
                raise SpaceError(
                    f"level {level} cannot be reached from {self.levels[:index]} by {self.operators or 'no operator'}"
                    + ("" if odd is None else f"; {no_grid(odd, self.grid)}")
                )

    def _read_grid(self) -> None:
        if self.grid is None:
            return
        sides = tuple(self.grid) if isinstance(self.grid, (tuple, list)) else ()
        if len(sides) != 2 or any(type(side) is not int for side in sides) or sides[0] * sides[1] != self.levels[0]:
            raise SpaceError(
                f"grid is {self.grid!r}; it must be the rows and columns of the {self.levels[0]} patches that the levels begin with"
            )
        object.__setattr__(self, "grid", None if sides[0] == sides[1] else sides)

    # The graph

    @cached_property
    def edges(self) -> dict[Node | None, dict[Layer, Node]]:
        """Node (None before the first layer) -> its edges in rank order: the layer taken and where it leads."""
        start = Node(0, 1, grid_of(self.levels[0], self.grid) is not None)
        edges: dict[Node | None, dict[Layer, Node]] = {None: {Layer(self.levels[0]): start}}
        unseen = [start]
        while unseen:
            node = unseen.pop()
            if node not in edges:
                edges[node] = self._edges_from(node)
                unseen += edges[node].values()
        return edges

    def _edges_from(self, node: Node) -> dict[Layer, Node]:
        tokens = self.levels[node.level]
        edges = {Layer(tokens): Node(node.level, 1, node.grid)}
        if node.run < min(self.max_run, self.depth):
            edges[Layer(tokens, None, True)] = Node(node.level, node.run + 1, node.grid)
        for level in range(node.level + 1, len(self.levels)):
            for name in self.operators:
                operator, possible = OPERATORS[name], OPERATORS[name].can_reduce(tokens, self.levels[level], self.grid)
                if possible and (node.grid or not operator.needs_grid):
                    edges[Layer(self.levels[level], name)] = Node(level, 1, node.grid and operator.keeps_grid)
        return edges

    def follow(self, node: Node | None, layers: tuple[Layer, ...]) -> Node | None:
        """Where these layers lead from a node; None where they are not all edges."""
        for layer in layers:
            node = self.edges[node].get(layer)
            if node is None:
                return None
        return node

    @cached_property
    def completions(self) -> list[dict[Node | None, int]]:
        """[layers still to come][node] -> number of ways to go on to the end."""
        completions: list[dict[Node | None, int]] = [dict.fromkeys(self.edges, 1)]
        for _ in range(self.depth):
            ahead = completions[-1]
            completions.append({n: sum(ahead[after] for after in out.values()) for n, out in self.edges.items()})
        return completions

    @cached_property
    def reductions(self) -> tuple[tuple[str, int, int], ...]:
        """Every (operator, tokens before, tokens after) that occurs on an edge."""
        found = {
            (edge.operator, self.levels[node.level], edge.tokens): None
            for node, out in self.edges.items()
            for edge in out
            if node is not None and edge.operator is not None
        }
        return tuple(found)

    @property
    def size(self) -> int:
        """Number of architectures, exactly."""
        return self.completions[self.depth][None]

    def __contains__(self, architecture: object) -> bool:
        return isinstance(architecture, Architecture) and self._first_misfit(architecture.layers) is None

    def check(self, architecture: Architecture) -> Architecture:
        """The architecture itself. Raises ArchitectureError with layer and reason where the space does not hold it."""
        if not isinstance(architecture, Architecture):
            raise ArchitectureError(
                f"{architecture!r:.80} is not an Architecture; Architecture.parse reads the text of one"
            )
        misfit = self._first_misfit(architecture.layers)
        if misfit is None:
            return architecture
        if architecture.depth != self.depth:
            raise ArchitectureError(f"'{architecture}' has {architecture.depth} layers; this space has {self.depth}")
        layer = architecture.layers[misfit]
        run = sum(1 for earlier in architecture.layers[:misfit] if earlier.tokens == layer.tokens)
        if layer.tokens not in self.levels or misfit == 0:
            reason = f"the levels are {', '.join(map(str, self.levels))}, beginning with the first"
        elif layer.operator is not None and layer.operator not in self.operators:
            reason = f"the operators of this space are {', '.join(self.operators)}"
        elif layer.shared and run >= self.max_run:
            reason = f"at most {self.max_run} layers in a row may use one attention map"
        else:
            before = architecture.layers[misfit - 1].tokens
            reason = f"{layer.operator} cannot go from {before} to {layer.tokens} tokens here"
            if layer.operator is not None and OPERATORS[layer.operator].needs_grid:
                reason += f", as it needs a {'' if self.grid else 'square '}grid that no earlier operator gave up"
        raise ArchitectureError(
            f"layer {misfit} ({Run(layer.tokens, layer.operator, 1)}) of '{architecture}': {reason}"
        )

    def _first_misfit(self, layers: tuple[Layer, ...]) -> int | None:
        """Index of the first layer that is not an edge of the graph; the depth where there are too few or too many."""
        node: Node | None = None
        for index, layer in enumerate(layers):
            if index == self.depth or (after := self.edges[node].get(layer)) is None:
                return index
            node = after
        return None if len(layers) == self.depth else len(layers)

    # Ranks and draws

    def rank(self, architecture: Architecture) -> int:
        """Position of the architecture in the fixed order, from 0. Raises ArchitectureError outside the space."""
        self.check(architecture)
        rank, node = 0, None
        for ahead, layer in zip(reversed(self.completions[: self.depth]), architecture.layers, strict=True):
            for edge, after in self.edges[node].items():
                if edge == layer:
                    node = after
                    break
                rank += ahead[after]
        return rank

    def __getitem__(self, rank: int) -> Architecture:
        """The architecture of a rank. Raises IndexError outside 0 … size - 1."""
        if not 0 <= rank < self.size:
            raise IndexError(f"rank {rank} is outside 0 … {self.size - 1}")
        layers: list[Layer] = []
        node: Node | None = None
        for ahead in reversed(self.completions[: self.depth]):
            for edge, after in self.edges[node].items():
                if rank < ahead[after]:
                    layers.append(edge)
                    node = after
                    break
                rank -= ahead[after]
        return Architecture(tuple(layers))

    def __iter__(self) -> Iterator[Architecture]:
        """All architectures in the order of their ranks."""

        def walk(node: Node | None, layers: tuple[Layer, ...]) -> Iterator[Architecture]:
            if len(layers) == self.depth:
                yield Architecture(layers)
            else:
                for edge, after in self.edges[node].items():
                    yield from walk(after, (*layers, edge))

        return walk(None, ())

    def sample(self, rng: random.Random) -> Architecture:
        """A uniform draw."""
        return self[rng.randrange(self.size)]

    # Change

    def neighbours(self, architecture: Architecture) -> list[Architecture]:
        """All that differ from the architecture in one layer or in two adjacent ones, without repetition.

        Two, because a token drop that moves by one layer touches two.
        """
        self.check(architecture)
        window = min(2, self.depth)
        found = {
            other: None
            for start in range(self.depth - window + 1)
            for other in self._detours(architecture, start, start + window)
        }
        return list(found)

    def mutate(self, architecture: Architecture, rng: random.Random) -> Architecture:
        """Leave the path at a random layer and rejoin it one to three layers later, or more where nothing else exists.

        Raises SpaceError where the space has no other architecture.
        """
        self.check(architecture)
        if self.size == 1:
            raise SpaceError(f"'{architecture}' is the only architecture of this space; there is nothing to search")
        for window in range(min(rng.randint(1, 3), self.depth), self.depth + 1):
            starts = list(range(self.depth - window + 1))
            rng.shuffle(starts)
            for start in starts:
                detours = list(self._detours(architecture, start, start + window))
                if detours:
                    return rng.choice(detours)
        raise AssertionError("two paths of one graph leave each other and meet again")

    def crossover(self, first: Architecture, second: Architecture, rng: random.Random) -> Architecture:
        """The beginning of one parent and the end of the other, spliced at a random layer where that is legal.

        Where no splice gives anything but a parent, a mutation of the first.
        """
        self.check(first)
        self.check(second)
        cuts = list(range(1, self.depth))
        rng.shuffle(cuts)
        for cut in cuts:
            node = self.follow(None, first.layers[:cut])
            assert node is not None
            wanted = second.layers[cut]
            joins = [layer for layer in self.edges[node] if layer.tokens == wanted.tokens]
            for join in [wanted] if wanted in joins else joins:
                layers = (*first.layers[:cut], join, *second.layers[cut + 1 :])
                if layers not in (first.layers, second.layers) and self._first_misfit(layers) is None:
                    return Architecture(layers)
        return self.mutate(first, rng)

    def _detours(self, architecture: Architecture, start: int, stop: int) -> Iterator[Architecture]:
        """All other paths that leave this one at layer `start` and follow it again from layer `stop` on."""
        head, tail = architecture.layers[:start], architecture.layers[stop:]

        def walk(node: Node | None, middle: tuple[Layer, ...]) -> Iterator[Architecture]:
            if len(middle) < stop - start:
                for edge, after in self.edges[node].items():
                    yield from walk(after, (*middle, edge))
            elif self.follow(node, tail) is not None or not tail:
                layers = head + middle + tail
                if layers != architecture.layers:
                    yield Architecture(layers)

        return walk(self.follow(None, head), ())

    # Costs

    def within(self, costs: CostTable, low: float | None = None, high: float | None = None) -> Band:
        """The architectures that cost from `low` to `high` (both included; None: open), to count and draw from.

        Raises BudgetError, naming the reachable range, where there are none.
        """
        return Band(self, costs, low, high)

    def cheapest(self, costs: CostTable) -> Architecture:
        """The shortest path: the architecture of least cost; of equals the one of lowest rank."""
        return self._extreme(costs, sign=1)

    def most_expensive(self, costs: CostTable) -> Architecture:
        """The longest path: the architecture of highest cost; of equals the one of lowest rank."""
        return self._extreme(costs, sign=-1)

    def _extreme(self, costs: CostTable, sign: int) -> Architecture:
        best = {node: (sign * costs.head(self.levels[node.level]), ()) for node in self.edges if node is not None}
        for _ in range(self.depth - 1):
            ahead = best
            best = {node: self._best_edge(node, costs, sign, ahead) for node in ahead}
        first, start = next(iter(self.edges[None].items()))
        return Architecture((first, *best[start][1]))

    def _best_edge(self, node: Node, costs: CostTable, sign: int, ahead: dict[Node, Any]) -> Any:
        options = [
            (sign * costs.edge(self.last_layer(node), edge) + ahead[after][0], (edge, *ahead[after][1]))
            for edge, after in self.edges[node].items()
        ]
        return min(options, key=lambda option: option[0])

    def last_layer(self, node: Node | None) -> Layer | None:
        """What an edge cost may know of the layer before a node: its tokens and whether it shared."""
        return None if node is None else Layer(self.levels[node.level], None, node.run > 1)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `SearchSpace(**object)` reads it back."""
        return {
            "depth": self.depth,
            "levels": list(self.levels),
            "operators": list(self.operators),
            "max_run": self.max_run,
            "has_cls": self.has_cls,
            "grid": self.grid and list(self.grid),
        }
