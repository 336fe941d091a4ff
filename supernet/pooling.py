"""The pooling operators: fewer patch tokens from many, as pure functions; declared in space/operators.py."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F


def max2d(patches: torch.Tensor, after: int) -> torch.Tensor:
    """Adaptive maximum over the patch grid (PSViT-2D style). (B, P, C) → (B, after, C), both square grids."""
    return _from_grid(F.adaptive_max_pool2d(_to_grid(patches), isqrt(after)))


def avg2d(patches: torch.Tensor, after: int) -> torch.Tensor:
    """Adaptive mean over the patch grid. (B, P, C) → (B, after, C), both square grids."""
    return _from_grid(F.adaptive_avg_pool2d(_to_grid(patches), isqrt(after)))


_FUNCTIONS = {"max2d": max2d, "avg2d": avg2d}


def pool(tokens: torch.Tensor, operator: str, after: int, num_prefix_tokens: int) -> torch.Tensor:
    """Apply one operator to the patch tokens; prefix tokens (CLS, registers) pass by untouched.

    (B, prefix + P, C) → (B, prefix + after, C)
    """
    patches = _FUNCTIONS[operator](tokens[:, num_prefix_tokens:], after)
    return torch.cat([tokens[:, :num_prefix_tokens], patches], dim=1) if num_prefix_tokens else patches


def _to_grid(patches: torch.Tensor) -> torch.Tensor:
    """(B, g·g, C) → (B, C, g, g)"""
    B, P, C = patches.shape
    side = isqrt(P)
    return patches.transpose(1, 2).reshape(B, C, side, side)


def _from_grid(grid: torch.Tensor) -> torch.Tensor:
    """(B, C, g, g) → (B, g·g, C)"""
    return grid.flatten(2).transpose(1, 2)
