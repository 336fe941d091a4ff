"""The pooling operators: fewer patch tokens from many, as pure functions; declared in space/operators.py."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .block import Attended


def max2d(patches: torch.Tensor, after: int) -> torch.Tensor:
    """Adaptive maximum over the patch grid (PSViT-2D style). (B, P, C) → (B, after, C), both square grids."""
    return _from_grid(F.adaptive_max_pool2d(_to_grid(patches), isqrt(after)))


def avg2d(patches: torch.Tensor, after: int) -> torch.Tensor:
    """Adaptive mean over the patch grid. (B, P, C) → (B, after, C), both square grids."""
    return _from_grid(F.adaptive_avg_pool2d(_to_grid(patches), isqrt(after)))


class Pooling(nn.Module):
    """One operator at one reduction: patch tokens go in and come out fewer; prefix tokens pass by untouched."""

    def __init__(self, operator: str, before: int, after: int, model: Any):
        super().__init__()
        self.operator, self.before, self.after = operator, before, after
        self.num_prefix_tokens, self.has_cls = model.num_prefix_tokens, model.has_class_token

    def forward(self, tokens: torch.Tensor, attended: Attended | None) -> torch.Tensor:
        """(B, prefix + before, C) → (B, prefix + after, C). attended: what the block before left."""
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        reduced = FUNCTIONS[self.operator](patches, self.after)
        return torch.cat([prefix, reduced], dim=1) if self.num_prefix_tokens else reduced


FUNCTIONS = {"max2d": max2d, "avg2d": avg2d}


def pooling_name(operator: str, before: int, after: int) -> str:
    """Under which name a supernet or subnet holds a reduction, and in its weights "poolings.<name>.…"."""
    return f"{operator}_{before}_{after}"


def make_poolings(model: Any, reductions: Iterable[tuple[str, int, int]]) -> nn.ModuleDict:
    """Freshly initialised operators for every (operator, tokens before, tokens after)."""
    return nn.ModuleDict({pooling_name(*reduction): Pooling(*reduction, model) for reduction in reductions})


def _to_grid(patches: torch.Tensor) -> torch.Tensor:
    """(B, g·g, C) → (B, C, g, g)"""
    B, P, C = patches.shape
    side = isqrt(P)
    return patches.transpose(1, 2).reshape(B, C, side, side)


def _from_grid(grid: torch.Tensor) -> torch.Tensor:
    """(B, C, g, g) → (B, g·g, C)"""
    return grid.flatten(2).transpose(1, 2)
