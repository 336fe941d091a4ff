"""CostTable: integers on the edges of the graph; an architecture costs the sum along its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .architecture import Architecture, Layer
from .errors import SpaceError
from .operators import OPERATORS
from .quantities import COSTS, Cost


@dataclass(frozen=True)
class CostTable:
    """What each kind of edge costs, in one quantity, per image. Kinds never name a layer index.

    One multiply-add counts once in "macs": fvcore, the field's reference, calls that a flop. `first_shared` is for
    the latency of networks that share written maps (sharing="map"): an owner leaves the fused kernel for its followers,
    and the first of them costs what it takes itself and what its owner then takes more; so costs stay sums over edges.
    """

    quantity: str  # "macs", "parameters" or "latency": nanoseconds
    source: int  # patch and position embedding
    own: Mapping[int, int]  # patch tokens -> a block that attends with queries and keys of its own
    shared: Mapping[int, int]  # patch tokens -> a block that uses the previous block's
    pool: Mapping[tuple[str, int, int], int]  # (operator, tokens before, tokens after) -> the pooling alone
    sink: Mapping[int, int]  # patch tokens that reach it -> final norm, pooling and head
    first_shared: Mapping[int, int] = field(default_factory=dict)  # like `shared`, after an owner; absent: as `shared`
    _edges: dict[tuple[Layer | None, Layer], int] = field(default_factory=dict, repr=False, compare=False)

    def __hash__(self) -> int:
        parts = (self.own, self.shared, self.first_shared)
        return hash((self.quantity, self.source, *(frozenset(part.items()) for part in parts)))

    def edge(self, previous: Layer | None, layer: Layer) -> int:
        """Cost of one layer with the pooling before it. Raises SpaceError for a kind that was not measured."""
        try:
            cost = (self.shared if layer.shared else self.own)[layer.tokens]
            if self.first_shared and layer.shared and previous is not None and not previous.shared:
                cost = self.first_shared[layer.tokens]
            if layer.operator is not None and previous is not None:
                cost += self.pool[layer.operator, previous.tokens, layer.tokens]
        except KeyError as error:
            raise SpaceError(
                f"the {self.quantity} table has no entry for {error.args[0]}; measure it on this space"
            ) from None
        return cost

    def total(self, architecture: Architecture) -> int:
        """Cost of a whole network, for one image."""
        edges, previous, total = self._edges, None, self.source
        for layer in architecture.layers:
            try:
                total += edges[previous, layer]
            except KeyError:
                total += edges.setdefault((previous, layer), self.edge(previous, layer))
            previous = layer
        return total + self.head(previous.tokens)  # type: ignore[union-attr]  # an architecture has a layer

    def head(self, tokens: int) -> int:
        """Cost of final norm, pooling and head when so many patch tokens reach them."""
        if tokens not in self.sink:
            raise SpaceError(f"the {self.quantity} table has no entry for {tokens} tokens; measure it on this space")
        return self.sink[tokens]

    @property
    def cost(self) -> Cost:
        """The quantity, as people read it."""
        return COSTS[self.quantity]

    def value(self, total: float) -> float:
        """A total in the unit of records: milliseconds of latency."""
        return total if self.cost.scale == 1 else total / self.cost.scale

    def format(self, total: float) -> str:
        """A total with its unit, for people: "1.26 G MACs", "12.3 ms"."""
        return self.cost.format(self.value(total))

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        first = {str(tokens): cost for tokens, cost in self.first_shared.items()}
        return {
            "quantity": self.quantity,
            "source": self.source,
            "own": {str(tokens): cost for tokens, cost in self.own.items()},
            "shared": {str(tokens): cost for tokens, cost in self.shared.items()},
            "pool": {f"{name} {before} {after}": cost for (name, before, after), cost in self.pool.items()},
            "sink": {str(tokens): cost for tokens, cost in self.sink.items()},
            **({"first_shared": first} if first else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CostTable:
        """Read what `to_json` gave. Raises SpaceError where it is anything else."""
        try:
            own, shared, sink = (
                {int(tokens): _count(cost) for tokens, cost in value[name].items()}
                for name in ("own", "shared", "sink")
            )
            pool = {}
            for kind, cost in value["pool"].items():
                operator, before, after = kind.split()
                pool[operator, int(before), int(after)] = _count(cost)
            first = {int(tokens): _count(cost) for tokens, cost in value.get("first_shared", {}).items()}
            if value["quantity"] not in COSTS:
                raise ValueError(f"quantity is {value['quantity']!r:.40}, not one of {', '.join(COSTS)}")
            return cls(value["quantity"], _count(value["source"]), own, shared, pool, sink, first)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpaceError(f"this is not a cost table in JSON: {error!r}") from None


def needs_attention(layer: Layer) -> bool:
    """Whether a layer, or the pooling before it, uses the attention of the block before."""
    return layer.shared or (layer.operator is not None and OPERATORS[layer.operator].needs_attention)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a cost; costs are whole numbers from 0")
    return value
