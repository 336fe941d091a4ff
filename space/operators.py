"""What each pooling operator needs, keeps and gives: declarations; the mathematics is in supernet/operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isqrt

Grid = tuple[int, int]  # rows and columns


@cache
def grids(whole: Grid) -> dict[int, Grid]:
    """The grids that `whole` is pooled to, itself among them, by rising number of cells.

    They are what is left when both sides are scaled by the same factor and rounded. So those of a square are the squares,
    each fits into the next one, and a number of cells says which one is meant.
    """

    def rounded(half: int, side: int) -> Grid:
        """At the scale `half` / 2·`side`."""
        rows, columns = (max(1, (half * length + side) // (2 * side)) for length in whole)
        return rows, columns

    shapes = {rounded(half, side) for side in whole for half in range(1, 2 * side, 2)}
    return {rows * columns: (rows, columns) for rows, columns in sorted(shapes)}


def grid_of(tokens: int, whole: Grid | None = None) -> Grid | None:
    """Rows and columns of so many patch tokens, or None where they form no grid.

    whole: the grid of all patches; None: a square one.
    """
    if whole is not None and whole[0] != whole[1]:
        return grids(whole).get(tokens)
    side = isqrt(tokens)
    return (side, side) if side * side == tokens else None


def no_grid(tokens: int, whole: Grid | None = None) -> str:
    """What is wrong with a number of tokens that are no grid, in words."""
    if whole is None:
        return f"{tokens} is not a square grid, which 2-D pooling needs"
    nearest = min(grids(whole), key=lambda cells: abs(cells - tokens))
    rows, columns = grids(whole)[nearest]
    return (
        f"{tokens} is not a grid of the shape of {whole[0]}×{whole[1]}, which 2-D pooling needs; the nearest is "
        f"{nearest} ({rows}×{columns})"
    )


def _smaller(before: int, after: int, whole: Grid | None = None) -> bool:
    return 1 <= after < before


def _smaller_grid(before: int, after: int, whole: Grid | None = None) -> bool:
    return _smaller(before, after) and None not in (grid_of(before, whole), grid_of(after, whole))


def _halved(before: int, after: int, whole: Grid | None = None) -> bool:
    """Stride-2 pooling of a sequence, once or several times: P → ⌊(P - 1) / 2⌋ + 1 → …"""
    while before > max(after, 1):
        before = (before - 1) // 2 + 1
        if before == after:
            return True
    return False


def grid_stride(before: int, after: int, whole: Grid | None = None) -> int | None:
    """The stride s with which a convolution of kernel s + 1 and padding ⌊s / 2⌋ goes from one grid to the other."""
    sides, wanted = grid_of(before, whole), grid_of(after, whole)
    if sides is None or wanted is None or after >= before:
        return None

    def leads(stride: int, side: int, wanted: int) -> bool:
        reached = (side + 2 * (stride // 2) - stride - 1) // stride + 1
        # The last window must reach the last row, or patches would be left out.
        return reached == wanted and wanted * stride - stride // 2 >= side - 1

    strides = range(2, max(sides) + 1)
    return next((s for s in strides if all(leads(s, *pair) for pair in zip(sides, wanted, strict=True))), None)


def _strided(before: int, after: int, whole: Grid | None = None) -> bool:
    return grid_stride(before, after, whole) is not None


def _leaves_room_for_the_fused(before: int, after: int, whole: Grid | None = None) -> bool:
    return _smaller(before, after) and after >= 2


@dataclass(frozen=True)
class Operator:
    """One way to go from `before` to `after` patch tokens between two blocks."""

    name: str
    summary: str
    can_reduce: Callable[
        ..., bool
    ]  # (tokens before, tokens after, grid of all patches) -> whether it can do exactly that
    needs_grid: bool = False  # works on the grid of patches, so none but grid operators may come before it
    keeps_grid: bool = False  # its output is again a grid
    needs_attention: bool = False  # reads the queries and keys that the block before it used
    changes_prefix: bool = False  # gives other CLS/register tokens than it got
    weighs: bool = False  # counts a token as often as it stands for patches
    drops: bool = False  # loses the tokens it does not keep
    proportional: bool = False  # from here on attention counts a key as often as it stands for patches
    learned: bool = False  # has weights, one set per (operator, before, after)

    @property
    def chooses(self) -> bool:
        """Whether the tokens' contents decide which become one; else it is the same in every image."""
        return self.needs_attention or self.weighs


# Papers: PSViT 2108.03428, Token Pooling 2110.03860, MSTM 2306.04897, ToMe 2210.09461, EViT 2202.07800, PiT 2103.16302.
OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            "max2d", "PSViT-2D style: maximum over cells of the grid", _smaller_grid, needs_grid=True, keeps_grid=True
        ),
        Operator("avg2d", "mean over cells of the grid", _smaller_grid, needs_grid=True, keeps_grid=True),
        Operator(
            "max2d_conv",
            "PSViT-2D style: 3×3 depthwise convolution, then max2d",
            _smaller_grid,
            needs_grid=True,
            keeps_grid=True,
            learned=True,
        ),
        Operator("max1d", "PSViT-1D style: maximum along the sequence, stride 2", _halved),
        Operator("max1d_conv", "PSViT-1D style: depthwise convolution of 3, then max1d", _halved, learned=True),
        Operator(
            "wkmedoids", "Token Pooling: K-Medoids weighted by attention received", _smaller, needs_attention=True
        ),
        Operator("kmedoids", "Token Pooling: plain K-Medoids", _smaller, weighs=True),
        Operator("kmeans", "Token Pooling: K-Means", _smaller, weighs=True),
        Operator(
            "mstm",
            "MSTM style: multi-scale features once, then the unimportant merge into their most similar",
            _smaller,
            needs_attention=True,
            learned=True,
        ),
        Operator("tome", "ToMe: bipartite merging by keys, size-weighted", _smaller, needs_attention=True, weighs=True),
        Operator(
            "tome_prop",
            "ToMe with proportional attention in all blocks that follow",
            _smaller,
            needs_attention=True,
            weighs=True,
            proportional=True,
        ),
        Operator(
            "evit",
            "EViT: most attended tokens and one fused of the rest",
            _leaves_room_for_the_fused,
            needs_attention=True,
        ),
        Operator("topk", "most attended tokens", _smaller, needs_attention=True, drops=True),
        Operator("random", "a fixed random choice of positions: the baseline", _smaller, drops=True),
        Operator(
            "pit",
            "PiT style: strided depthwise convolution; prefix tokens through a Linear",
            _strided,
            needs_grid=True,
            keeps_grid=True,
            changes_prefix=True,
            learned=True,
        ),
    )
}
