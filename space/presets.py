"""Ready spaces for well-known timm models and the digits one; any other ViT gets levels from its patch grid."""

from __future__ import annotations

from itertools import pairwise
from math import isqrt, prod

from .errors import SpaceError
from .operators import OPERATORS, Grid, grid_of, grids, no_grid
from .search_space import SearchSpace

_VIT_224 = SearchSpace(depth=12, levels=(196, 100, 49), operators=("max2d",), max_run=3)

# PSViT style: the sequence is halved (196 → 98 → 49) or the grid shrinks (14 → 10 → 7), both after a convolution.
_PSVIT_1D = SearchSpace(depth=12, levels=(196, 98, 49), operators=("max1d_conv",), max_run=3, has_cls=True)
_PSVIT_2D = SearchSpace(depth=12, levels=(196, 100, 49), operators=("max2d_conv",), max_run=3, has_cls=False)

PRESETS: dict[str, SearchSpace] = {
    "vit_tiny_patch16_224": _VIT_224,
    "vit_small_patch16_224": _VIT_224,
    "vit_base_patch16_224": _VIT_224,
    "deit_tiny_patch16_224": _VIT_224,
    "deit_small_patch16_224": _VIT_224,
    "deit_base_patch16_224": _VIT_224,
    "psvit_1d_tiny": _PSVIT_1D,
    "psvit_1d_small": _PSVIT_1D,
    "psvit_2d_tiny": _PSVIT_2D,
    "psvit_2d_small": _PSVIT_2D,
    # Down to a single token, so that accuracy differs: 4 are nearly enough for the digits.
    "digits_vit": SearchSpace(depth=8, levels=(64, 16, 4, 1), operators=("max2d",), max_run=3),
}


# For models that were not trained with them; why tome_prop: results/operators, ImageNet without training.
UNTRAINED = ("tome_prop", "evit", "topk", "mstm", "kmeans")
# For pretrained models: merging and clustering keep most of their accuracy (results/operators). A search tries them on the
# tuned model and keeps those that harm it least.
WARM_OPERATORS = ("tome", "tome_prop", "kmeans", "evit", "avg2d")
EVEN_LEVELS = 10  # about so many token counts below a pretrained model's own
ALIGNMENT = 8  # tokens with prefix


def even_levels(tokens: int, count: int = EVEN_LEVELS, grid: Grid | None = None) -> tuple[int, ...]:
    """Patch-token counts from all to a twelfth, evenly spaced, on grids where one is near: 49, 44, 40, 36, …, 4.

    grid: of all patches; None: a square one.
    """
    least = max(1, tokens // 12)
    step = (tokens - least) / count
    counts = {tokens}
    smaller = [cells for cells in grids(grid or (isqrt(tokens),) * 2) if cells < tokens]
    for index in range(count):
        wanted = least + index * step
        nearest = min(smaller, key=lambda cells: abs(cells - wanted), default=0)
        counts.add(nearest if nearest and abs(nearest - wanted) <= step / 2 else round(wanted))
    return tuple(sorted(counts, reverse=True))


def aligned_levels(tokens: int, prefix: int, count: int = EVEN_LEVELS) -> tuple[int, ...]:
    """As `even_levels`, but each count makes a multiple of 8 with the prefix tokens: 196 with CLS → 196, 175, 159, …, 15.

    Attention is a matrix of tokens × tokens; vector units and tensor cores take its rows by eights, and the last one whole.
    """
    wanted = (tokens - index * (tokens - tokens / 12) / count for index in range(1, count + 1))
    counts = {ALIGNMENT * round((one + prefix) / ALIGNMENT) - prefix for one in wanted}
    return tuple(sorted({tokens} | {one for one in counts if 0 < one < tokens}, reverse=True))


def default_levels(tokens: int, operators: tuple[str, ...] = ("max2d",), grid: Grid | None = None) -> tuple[int, ...]:
    """Patch-token counts: a model's own, about half of them, a quarter: 196 → 196, 100, 49 on a grid.

    Where these operators cannot reach such grids, the counts of repeated halving: 196 → 196, 98, 49. grid: as in
    `even_levels`.
    """
    sides = grid_of(tokens, grid)
    if sides is not None:
        halves = (round(side / 2**0.5) for side in sides), (side // 2 for side in sides)
        cells = {prod(max(1, side) for side in half) for half in halves}
        levels = tuple(sorted({tokens} | cells, reverse=True))
        if _reach(operators, levels, grid):
            return levels
    half = (tokens - 1) // 2 + 1
    levels = tuple(sorted({tokens, half, (half - 1) // 2 + 1}, reverse=True))
    if _reach(operators, levels, grid):
        return levels
    raise SpaceError(
        f"{tokens} patch tokens suggest no levels for {', '.join(operators) or 'no operator'}; name the levels yourself"
        + ("" if sides else f"; {no_grid(tokens, grid)}")
    )


def _reach(operators: tuple[str, ...], levels: tuple[int, ...], grid: Grid | None) -> bool:
    """Whether some operator makes each of these reductions. A name that is unknown is the space's to refuse."""
    known = [OPERATORS[name] for name in operators if name in OPERATORS]
    steps = pairwise(levels)
    return len(known) < len(operators) or all(any(one.can_reduce(*step, grid) for one in known) for step in steps)


def space_for(
    model: str,
    depth: int,
    tokens: int,
    levels: tuple[int, ...] | None = None,
    operators: tuple[str, ...] | None = None,
    max_run: int | None = None,
    warm: bool = False,
    tried: bool = False,
    grid: Grid | None = None,
) -> SearchSpace:
    """The preset of a timm model where it fits the patch tokens, else a derived space; given parts stand.

    warm: the weights are pretrained ones, so that small steps of merging and clustering, and no sharing, harm least.
    tried: what harms will be left out after a trial, so that pairs of layers may share until then.
    grid: rows and columns of the patches; None: a square.
    Raises SpaceError where the parts make no space.
    """
    grid = None if grid is None or grid[0] == grid[1] else grid
    preset = PRESETS.get(model.split(".")[0])
    if warm and (preset is None or preset.operators == ("max2d",)):
        if operators is None:
            lattice = grid_of(tokens, grid) is not None
            operators = tuple(name for name in WARM_OPERATORS if lattice or not OPERATORS[name].needs_grid)
            levels = levels or even_levels(tokens, EVEN_LEVELS, grid)
        elif levels is None and not any(OPERATORS[name].needs_grid for name in operators if name in OPERATORS):
            levels = even_levels(tokens, EVEN_LEVELS, grid)
        max_run = max_run or (2 if tried else 1)
    operators = operators or (preset.operators if preset else ("max2d",))
    if levels is None and preset and preset.levels[0] == tokens and _reach(operators, preset.levels, grid):
        levels = preset.levels
    has_cls = preset.has_cls if preset else None
    return SearchSpace(depth, levels or default_levels(tokens, operators, grid), operators, max_run or 3, has_cls, grid)
