"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

COSTS = {"macs": "MACs", "parameters": "parameters", "latency_ms": "latency"}  # column → what people call it


def human(count: float) -> str:
    """A count in three digits and a unit: 1_261_000_000 → "1.26 G"."""
    divisor, letter = unit(count)
    value = count / divisor
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {letter}" if letter else f"{count:,.0f}"


def amount(value: float, cost: str) -> str:
    """A cost in short: "1.26 G" of MACs or parameters, "12.3 ms"."""
    return f"{value:.3g} ms" if cost == "latency_ms" else human(value)


def quantity(value: float, cost: str) -> str:
    """A cost with its name: "1.26 G MACs", "5.72 M parameters", "12.3 ms"."""
    return amount(value, cost) if cost == "latency_ms" else f"{human(value)} {COSTS[cost]}"


def axis_unit(dense: float, cost: str) -> tuple[float, str]:
    """Divisor and name of the unit of an axis that reaches to the dense network's cost."""
    return (1.0, "ms") if cost == "latency_ms" else unit(dense)


def axis_label(cost: str, letter: str) -> str:
    """What stands along an axis."""
    return f"{COSTS[cost]} ({letter})" if cost == "parameters" else f"{COSTS[cost]} per image ({letter})"


def unit(count: float) -> tuple[float, str]:
    """Divisor and letter of the unit in which a count reads best."""
    for divisor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * divisor:  # 999.6 million reads as 1.00 G, not as 1000 M
            return divisor, letter
    return 1.0, ""
