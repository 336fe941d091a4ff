"""What each pooling operator needs, keeps and gives: declarations; the mathematics is in supernet/pooling.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt


def is_square(tokens: int) -> bool:
    """Whether so many patch tokens can form a square grid."""
    return isqrt(tokens) ** 2 == tokens


def _smaller_grid(before: int, after: int) -> bool:
    return after < before and is_square(before) and is_square(after)


@dataclass(frozen=True)
class Operator:
    """One way to go from `before` to `after` patch tokens between two blocks."""

    name: str
    summary: str
    can_reduce: Callable[[int, int], bool]  # (tokens before, tokens after) -> whether it can do exactly that
    needs_grid: bool = False  # works on the square grid of patches, so none but grid operators may come before it
    keeps_grid: bool = False  # its output is again a square grid
    needs_attention: bool = False  # reads the attention map, or the keys, that the block before it used
    changes_prefix: bool = False  # gives other CLS/register tokens than it got
    learned: bool = False  # has weights, one set per (operator, before, after)


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("max2d", "maximum over cells of the patch grid", _smaller_grid, needs_grid=True, keeps_grid=True),
        Operator("avg2d", "mean over cells of the patch grid", _smaller_grid, needs_grid=True, keeps_grid=True),
    )
}
