"""What is counted: the quantities of cost, how people read them, and budgets in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from .errors import BudgetError, ConfigError


@dataclass(frozen=True)
class Cost:
    """One quantity that an image costs. Cost tables count it in whole numbers, records hold it in `column`."""

    quantity: str  # the name in options and cost tables
    column: str  # the name in candidates frames and JSON
    label: str  # for people
    scale: int = 1  # how many of a table's units make one of the column's: nanoseconds in a millisecond

    def short(self, value: float) -> str:
        """A value of the column in three digits: "1.26 G", "12.3 ms"."""
        return f"{value:.3g} ms" if self is LATENCY else human(value)

    def format(self, value: float) -> str:
        """The same with its name: "1.26 G MACs", "5.72 M parameters", "12.3 ms"."""
        return self.short(value) if self is LATENCY else f"{human(value)} {self.label}"

    def axis(self, most: float) -> tuple[float, str]:
        """Divisor and label of an axis whose values reach to `most`."""
        divisor, letter = (1.0, "ms") if self is LATENCY else unit(most)
        return divisor, f"{self.label}{'' if self is PARAMETERS else ' per image'} ({letter})"


MACS = Cost("macs", "macs", "MACs")
PARAMETERS = Cost("parameters", "parameters", "parameters")
LATENCY = Cost("latency", "latency_ms", "latency", 1_000_000)
COSTS = {cost.quantity: cost for cost in (MACS, PARAMETERS, LATENCY)}
BY_COLUMN = {cost.column: cost for cost in COSTS.values()}


def check_whole(least: int, **values: int | None) -> None:
    """Raise ConfigError for the first of the named values that is no whole number from `least`; None passes."""
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"{name}={value!r}: give a whole number from {least}")


def human(count: float) -> str:
    """A count in three digits and a unit: 1_261_000_000 → "1.26 G"."""
    divisor, letter = unit(count)
    value = count / divisor
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {letter}" if letter else f"{count:,.0f}"


def unit(count: float) -> tuple[float, str]:
    """Divisor and letter of the unit in which a count reads best."""
    for divisor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * divisor:  # 999.6 million reads as 1.00 G, not as 1000 M
            return divisor, letter
    return 1.0, ""


_SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "ms": LATENCY.scale}


def budget_quantity(text: str, objective: str = "macs") -> str:
    """What a budget in words limits: "latency" for "12ms", the objective for a percentage, else "macs"."""
    text = text.strip()
    return "latency" if text.endswith("ms") else objective if text.endswith("%") else "macs"


def parse_budget(text: str, dense: int, quantity: str = "macs") -> int:
    """A budget in words, per image: "60%" of the dense model's cost, "0.7G", "350M" or a plain number of MACs, "12ms".

    dense: what the dense model costs, in a table's units of `quantity`, "macs" or "latency" (nanoseconds); so is the
    answer. Raises BudgetError for anything else, and for a budget in another quantity.
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
    if (limited := budget_quantity(text)) != quantity:
        wanted = "60% or 12ms" if quantity == "latency" else "60% or 0.7G"
        raise BudgetError(
            f"budget {text!r} limits {COSTS[limited].label}, which is not what is counted here; write for example {wanted}"
        )
    return int(number * _SCALES[unit])
