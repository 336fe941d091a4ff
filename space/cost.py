"""CostTable: integers on the edges of the graph; an architecture costs the sum along its path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .architecture import Architecture, Layer
from .errors import BudgetError, SpaceError

_UNITS = {"macs": "MACs", "parameters": "parameters", "nanoseconds": "ns"}


@dataclass(frozen=True)
class CostTable:
    """What each kind of edge costs, in one quantity, per image. Kinds never name a layer index.

    One multiply-add counts once in "macs": fvcore, the field's reference, calls that a flop.
    """

    quantity: str  # "macs", "parameters" or "nanoseconds"
    source: int  # patch and position embedding
    own: Mapping[int, int]  # patch tokens -> a block that computes its own attention map
    shared: Mapping[int, int]  # patch tokens -> a block that uses the previous block's map
    pool: Mapping[tuple[str, int, int], int]  # (operator, tokens before, tokens after) -> the pooling alone
    sink: Mapping[int, int]  # patch tokens that reach it -> final norm, pooling and head
    _edges: dict[tuple[Layer | None, Layer], int] = field(default_factory=dict, repr=False, compare=False)

    def __hash__(self) -> int:
        return hash((self.quantity, self.source, frozenset(self.own.items()), frozenset(self.shared.items())))

    def edge(self, previous: Layer | None, layer: Layer) -> int:
        """Cost of one layer with the pooling before it. Raises SpaceError for a kind that was not measured."""
        try:
            cost = (self.shared if layer.shared else self.own)[layer.tokens]
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
        """A value with its unit, for people: "1.26 G MACs"."""
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
        return {
            "quantity": self.quantity,
            "source": self.source,
            "own": {str(tokens): cost for tokens, cost in self.own.items()},
            "shared": {str(tokens): cost for tokens, cost in self.shared.items()},
            "pool": {f"{name} {before} {after}": cost for (name, before, after), cost in self.pool.items()},
            "sink": {str(tokens): cost for tokens, cost in self.sink.items()},
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
            if not isinstance(value["quantity"], str):
                raise TypeError(f"quantity is {value['quantity']!r}, not a name such as 'macs'")
            return cls(value["quantity"], _count(value["source"]), own, shared, pool, sink)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpaceError(f"this is no cost table in JSON: {error!r}") from None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no cost; costs are whole numbers from 0")
    return value


def parse_budget(text: str, dense: int) -> int:
    """A MAC budget in words: "60%" of the dense model's, "0.7G", "350M" or a plain number of MACs per image.

    Raises BudgetError for anything else.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[kMG]?)", text.strip())
    if match is None:
        hint = "; latency budgets are not supported yet" if text.strip().endswith("ms") else ""
        raise BudgetError(f"budget {text!r} is not understood; write 60% (of the dense MACs), 0.7G or 350M{hint}")
    number, unit = Fraction(match[1]), match[2]
    if not unit and number < 1000:
        raise BudgetError(
            f"budget {text!r} has no unit; write {match[1]}% (of the dense MACs), {match[1]}G or {match[1]}M"
        )
    units = {
        "%": Fraction(dense, 100),
        "": Fraction(1),
        "k": Fraction(10**3),
        "M": Fraction(10**6),
        "G": Fraction(10**9),
    }
    return int(number * units[unit])
