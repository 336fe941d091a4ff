"""Pooling between two blocks: one module per operator and reduction, over the mathematics of PSViT, PiT and the rest.

Grid and sequence pooling stand here; clustering.py and merging.py hold what chooses tokens by content.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from poolshare.space.operators import OPERATORS, Grid, grid_of, grid_stride

from ..block import Attended
from ..tokens import Carry, Tokens, keep, merge
from .clustering import kmeans, kmedoids
from .merging import MultiScale, evit, importance, mstm, random_tokens, received, tome, topk


def max2d(patches: torch.Tensor, after: int, whole: Grid | None = None) -> torch.Tensor:
    """Adaptive maximum over the patch grid (PSViT-2D style). (B, P, C) → (B, after, C), both grids of the shape of `whole`."""
    return _from_grid(F.adaptive_max_pool2d(_to_grid(patches, whole), grid_of(after, whole)))  # type: ignore[arg-type]


def avg2d(patches: torch.Tensor, after: int, whole: Grid | None = None) -> torch.Tensor:
    """Adaptive mean over the patch grid. (B, P, C) → (B, after, C), both grids of the shape of `whole`; None: squares."""
    return _from_grid(F.adaptive_avg_pool2d(_to_grid(patches, whole), grid_of(after, whole)))  # type: ignore[arg-type]


def max1d(patches: torch.Tensor, after: int) -> torch.Tensor:
    """Maximum over three neighbours of the sequence at every second one (PSViT-1D style), repeated down to `after`.

    (B, P, C) → (B, after, C); one step makes ⌊(P - 1) / 2⌋ + 1 of P tokens.
    """
    sequence = patches.transpose(1, 2)
    while sequence.shape[2] > after:
        sequence = F.max_pool1d(sequence, kernel_size=3, stride=2, padding=1)
    return sequence.transpose(1, 2)


class Pooling(nn.Module):
    """One operator at one reduction. Learned parts begin such that a pretrained model finds its own features again."""

    def __init__(self, operator: str, before: int, after: int, model: Any):
        super().__init__()
        self.operator, self.before, self.after = operator, before, after
        self.num_prefix_tokens, self.has_cls = model.num_prefix_tokens, model.has_class_token
        self.grid, channels = tuple(model.patch_embed.grid_size), model.embed_dim
        match operator:
            case "max2d_conv":
                self.conv: nn.Module = _dirac(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
            case "max1d_conv":
                self.conv = _dirac(nn.Conv1d(channels, channels, 3, padding=1, groups=channels))
            case "mstm" if before == model.patch_embed.num_patches:  # once, while the grid is whole
                self.multi_scale = MultiScale(channels)
            case "pit":
                stride = grid_stride(before, after, self.grid)
                assert stride is not None  # the operator's can_reduce says so
                self.conv = nn.Conv2d(channels, channels, stride + 1, stride, padding=stride // 2, groups=channels)
                nn.init.constant_(self.conv.weight, 1 / (stride + 1) ** 2)  # a mean
                nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
                if self.num_prefix_tokens:
                    self.prefix = nn.Linear(channels, channels)
                    nn.init.eye_(self.prefix.weight)
                    nn.init.zeros_(self.prefix.bias)

    def forward(self, tokens: torch.Tensor, attended: Attended | None) -> torch.Tensor:
        """Features alone, as in `pool`, of tokens on the whole grid. (B, prefix + before, C) → (B, prefix + after, C)"""
        return self.pool(Tokens(tokens), attended).features

    def pool(self, tokens: Tokens, attended: Attended | None, carry: Carry = Carry.NOTHING) -> Tokens:
        """`before` patch tokens → `after`. attended: what the block before left; carry: what the path must know of them.

        Prefix tokens pass by untouched, except that "pit" sends them through a Linear.
        """
        prefix = tokens.features[:, : self.num_prefix_tokens]
        patches = tokens.features[:, self.num_prefix_tokens :]
        reduced, which = self._reduce(patches, attended, tokens.sizes)
        if self.num_prefix_tokens:
            reduced = torch.cat([self.prefix(prefix) if self.operator == "pit" else prefix, reduced], dim=1)
        declared = OPERATORS[self.operator]
        if which is None or carry == Carry.NOTHING:
            return tokens._replace(features=reduced)
        after = (keep if declared.drops else merge)(tokens, reduced, which, self.grid, carry)
        return after._replace(proportional=True) if declared.proportional else after

    def _reduce(
        self, patches: torch.Tensor, attended: Attended | None, sizes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The new patch tokens, and which were kept or where the old ones went; None: the cells of a smaller grid."""
        after, grid = self.after, self.grid
        match self.operator:
            case "max2d":
                return max2d(patches, after, grid), None
            case "avg2d":
                return avg2d(patches, after, grid), None
            case "max2d_conv":
                return max2d(_from_grid(self.conv(_to_grid(patches, grid))), after, grid), None
            case "max1d":
                return max1d(patches, after), self._pairs(patches)
            case "max1d_conv":
                return max1d(self.conv(patches.transpose(1, 2)).transpose(1, 2), after), self._pairs(patches)
            case "pit":
                return _from_grid(self.conv(_to_grid(patches, grid))), None
            case "kmedoids":
                return kmedoids(patches, after, sizes=sizes)
            case "kmeans":
                return kmeans(patches, after, sizes)
            case "random":
                return random_tokens(patches, after)
        if attended is None:
            raise RuntimeError(f"{self.operator} needs the attention of the block before it")
        if self.operator in ("tome", "tome_prop"):
            return tome(patches, attended.keys[:, :, self.num_prefix_tokens :].mean(dim=1), after, sizes)
        if self.operator != "evit":  # the others' scores only choose
            attended = attended.detach()
        if self.operator == "wkmedoids":
            return kmedoids(patches, after, received(attended, self.num_prefix_tokens))
        scores = importance(attended, self.num_prefix_tokens, self.has_cls)
        match self.operator:
            case "mstm":
                if hasattr(self, "multi_scale"):
                    patches = _from_grid(self.multi_scale(_to_grid(patches, grid)))
                return mstm(patches, scores, after)
            case "evit":
                return evit(patches, scores, after)
            case "topk":
                return topk(patches, scores, after)
        raise NotImplementedError(f"operator {self.operator!r} of {', '.join(OPERATORS)} has no mathematics")

    def _pairs(self, patches: torch.Tensor) -> torch.Tensor:
        """Where tokens go when neighbours of the sequence become one, once or several times. (B, P)"""
        positions, count = torch.arange(self.before, device=patches.device), self.before
        while count > self.after:
            positions, count = positions // 2, (count + 1) // 2
        return positions.expand(patches.shape[0], -1)


def pooling_name(operator: str, before: int, after: int) -> str:
    """Under which name a supernet or subnet holds a reduction, and in its weights "poolings.<name>.…"."""
    return f"{operator}_{before}_{after}"


def make_poolings(model: Any, reductions: Iterable[tuple[str, int, int]]) -> nn.ModuleDict:
    """Freshly initialised operators for every (operator, tokens before, tokens after)."""
    return nn.ModuleDict({pooling_name(*reduction): Pooling(*reduction, model) for reduction in reductions})


def _dirac(conv: Any) -> nn.Module:
    """A depthwise convolution that begins as the identity."""
    nn.init.dirac_(conv.weight, groups=conv.groups)
    nn.init.zeros_(conv.bias)
    return conv


def _to_grid(patches: torch.Tensor, whole: Grid | None) -> torch.Tensor:
    """(B, rows·columns, C) → (B, C, rows, columns)"""
    B, P, C = patches.shape
    rows, columns = grid_of(int(P), whole)  # type: ignore[misc]  # grid operators get grids
    return patches.transpose(1, 2).reshape(B, C, rows, columns)


def _from_grid(grid: torch.Tensor) -> torch.Tensor:
    """(B, C, rows, columns) → (B, rows·columns, C)"""
    return grid.flatten(2).transpose(1, 2)
