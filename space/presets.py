"""Ready spaces for well-known timm models and the digits one; any other ViT gets levels from its patch grid."""

from __future__ import annotations

from math import isqrt

from .errors import SpaceError
from .operators import is_square
from .search_space import SearchSpace

_VIT_224 = SearchSpace(depth=12, levels=(196, 100, 49), operators=("max2d",), max_run=3)

PRESETS: dict[str, SearchSpace] = {
    "vit_tiny_patch16_224": _VIT_224,
    "vit_small_patch16_224": _VIT_224,
    "vit_base_patch16_224": _VIT_224,
    "deit_tiny_patch16_224": _VIT_224,
    "deit_small_patch16_224": _VIT_224,
    "deit_base_patch16_224": _VIT_224,
    # Down to a single token, so that there is something to lose: digits hardly mind being left with 4.
    "digits_vit": SearchSpace(depth=8, levels=(64, 16, 4, 1), operators=("max2d",), max_run=3),
}


def default_levels(tokens: int) -> tuple[int, ...]:
    """Patch-token counts for a square grid: its own, about half of them, a quarter: 196 → 196, 100, 49."""
    if not is_square(tokens):
        raise SpaceError(f"{tokens} patch tokens form no square grid; name the levels yourself")
    side = isqrt(tokens)
    sides = {side, round(side / 2**0.5), side // 2}
    return tuple(s * s for s in sorted(sides, reverse=True) if s > 0)


def space_for(
    model: str,
    depth: int,
    tokens: int,
    levels: tuple[int, ...] | None = None,
    operators: tuple[str, ...] | None = None,
    max_run: int | None = None,
) -> SearchSpace:
    """The preset of a timm model where it fits the patch tokens, else a derived space; given parts stand.

    Raises SpaceError where the parts make no space.
    """
    preset = PRESETS.get(model.split(".")[0])
    if preset is None or preset.levels[0] != tokens:  # unknown, or at another image size
        preset = SearchSpace(depth, levels or default_levels(tokens), operators or ("max2d",))
    return SearchSpace(depth, levels or preset.levels, operators or preset.operators, max_run or preset.max_run)
