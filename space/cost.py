"""CostTable: integers on the edges of the graph; an architecture costs the sum along its path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .architecture import Architecture, Layer
from .errors import BudgetError, SpaceError
from .operators import OPERATORS

_UNITS = {"macs": "MACs", "parameters": "parameters", "nanoseconds": "ms"}


@dataclass(frozen=True)
class CostTable:
    """What each kind of edge costs, in one quantity, per image. Kinds never name a layer index.

    One multiply-add counts once in "macs": fvcore, the field's reference, calls that a flop. `first_shared` is for
    nanoseconds of networks that share written maps (sharing="map"): an owner leaves the fused kernel for its followers,
    and the first of them costs what it takes itself and what its owner then takes more; so costs stay sums over edges.
    """

    quantity: str  # "macs", "parameters" or "nanoseconds"
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

    def format(self, value: float) -> str:
        """A value with its unit, for people: "1.26 G MACs", "12.3 ms"."""
        if self.quantity == "nanoseconds":
            return f"{value / 1e6:.4g} ms"
        for scale, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
            if abs(value) >= scale:
                return f"{value / scale:.4g}{prefix} {self.unit}"
        return f"{value:.4g} {self.unit}"

    @property
    def unit(self) -> str:
        """Name of the unit, for labels."""
        return _UNITS.get(self.quantity, self.quantity)

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
            if not isinstance(value["quantity"], str):
                raise TypeError(f"quantity is {value['quantity']!r}, not a name such as 'macs'")
            return cls(value["quantity"], _count(value["source"]), own, shared, pool, sink, first)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpaceError(f"this is no cost table in JSON: {error!r}") from None


def needs_attention(layer: Layer) -> bool:
    """Whether a layer, or the pooling before it, uses the attention of the block before."""
    return layer.shared or (layer.operator is not None and OPERATORS[layer.operator].needs_attention)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no cost; costs are whole numbers from 0")
    return value


_SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "ms": 10**6}


def budget_quantity(text: str) -> str | None:
    """What a budget in words limits: "nanoseconds" for "12ms", None for a percentage, else "macs"."""
    text = text.strip()
    return "nanoseconds" if text.endswith("ms") else None if text.endswith("%") else "macs"


def parse_budget(text: str, dense: int, quantity: str = "macs") -> int:
    """A budget in words, per image: "60%" of the dense model's cost, "0.7G", "350M" or a plain number of MACs, "12ms".

    dense: what the dense model costs, in units of `quantity`, "macs" or "nanoseconds"; so is the answer. Raises
    BudgetError for anything else, and for a budget in another quantity.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|ms|[kMG]?)", text.strip())
    if match is None:
        raise BudgetError(
            f"budget {text!r} is not understood; write 60% (of the dense model's), 0.7G or 350M (MACs), or 12ms, per image"
        )
    number, unit = Fraction(match[1]), match[2]
    if unit == "%":
        return int(number * Fraction(dense, 100))
    if not unit and number < 1000:
        raise BudgetError(
            f"budget {text!r} has no unit; write {match[1]}% (of the dense model's), {match[1]}G or {match[1]}M (MACs), "
            f"or {match[1]}ms, per image"
        )
    if budget_quantity(text) != quantity:
        limited = "latency" if unit == "ms" else "MACs"
        wanted = "60% or 12ms" if quantity == "nanoseconds" else "60% or 0.7G"
        raise BudgetError(
            f"budget {text!r} limits {limited}, which is not what is counted here; write for example {wanted}"
        )
    return int(number * _SCALES[unit])
