"""Operators that keep some tokens and drop, fuse or merge the others: top-K, EViT, MSTM, ToMe.

Which tokens are kept is decided without gradient; what they become carries it. Ties go to the lower index, by stable
sorts (topk promises nothing about ties).
"""

from __future__ import annotations

import random

import torch
from torch import nn


def importance(attention: torch.Tensor, num_prefix_tokens: int, has_cls: bool) -> torch.Tensor:
    """How much the patch tokens matter: attention from CLS, averaged over heads; without CLS what they receive.

    (B, heads, N, N) → (B, P)
    """
    if not has_cls:
        return received(attention, num_prefix_tokens)
    return attention[:, :, 0, num_prefix_tokens:].mean(dim=1)


def received(attention: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Total attention each patch token receives, over heads and queries. (B, heads, N, N) → (B, P)"""
    return attention[:, :, :, num_prefix_tokens:].sum(dim=(1, 2))


def topk(patches: torch.Tensor, scores: torch.Tensor, after: int) -> torch.Tensor:
    """The highest-scored tokens in their original order. (B, P, C), (B, P) → (B, after, C)"""
    kept, _ = _split(scores, after)
    return _take(patches, kept)


def random_tokens(patches: torch.Tensor, after: int) -> torch.Tensor:
    """A fixed random choice of positions, the same for all images; the baseline. (B, P, C) → (B, after, C)"""
    P = patches.shape[1]
    positions = sorted(random.Random(f"{P} {after}").sample(range(P), after))
    return patches[:, torch.tensor(positions, device=patches.device)]


def evit(patches: torch.Tensor, scores: torch.Tensor, after: int) -> torch.Tensor:
    """The after - 1 highest-scored tokens, and one that fuses the rest, weighted by score (EViT, 2202.07800).

    (B, P, C), (B, P) → (B, after, C); the fused token comes last.
    """
    kept, rest = _split(scores, after - 1)
    shares = scores.gather(1, rest)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-12)
    fused = shares[:, None, :].to(patches.dtype) @ _take(patches, rest)  # (B, 1, C)
    return torch.cat([_take(patches, kept), fused], dim=1)


def mstm(patches: torch.Tensor, scores: torch.Tensor, after: int) -> torch.Tensor:
    """Each dropped token merges into the kept one it resembles most (MSTM style, 2306.04897).

    x ← (e·x + Σ e^cos·y) / (e + Σ e^cos) over the dropped y whose most cosine-similar kept token is x; kept tokens stay
    in order. (B, P, C), (B, P) → (B, after, C)
    """
    kept, rest = _split(scores, after)
    stay, leave = _take(patches, kept), _take(patches, rest)
    directions = nn.functional.normalize(patches.float(), dim=-1)
    similarity = _take(directions, rest) @ _take(directions, kept).transpose(1, 2)  # (B, P - K, K)
    best, target = similarity.max(dim=2)
    weights = best.exp()[:, :, None]  # (B, P - K, 1)
    where = target[:, :, None]
    added = torch.zeros_like(stay, dtype=torch.float32).scatter_add(1, where.expand_as(leave), weights * leave.float())
    mass = added.new_zeros(*stay.shape[:2], 1).scatter_add(1, where, weights)
    return ((torch.e * stay.float() + added) / (torch.e + mass)).to(patches.dtype)


class MultiScale(nn.Module):
    """x ← x + W·[3×3 depthwise ‖ 5×5 depthwise](grid); W is zero at first, so the model begins unchanged."""

    def __init__(self, channels: int):
        super().__init__()
        self.fine = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.coarse = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        nn.init.zeros_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)  # type: ignore[arg-type]  # a Conv2d has a bias unless told otherwise

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, C, g, g) → (B, C, g, g)"""
        return grid + self.fuse(torch.cat([self.fine(grid), self.coarse(grid)], dim=1))


def tome(patches: torch.Tensor, keys: torch.Tensor, after: int) -> torch.Tensor:
    """Bipartite merging of the most similar tokens (ToMe, 2210.09461), without proportional attention.

    keys: (B, P, head_dim), averaged over heads. Even tokens look for the most similar odd one; the best matched r merge
    into it by size-weighted mean. One step merges at most half of the tokens; more is done in repeated steps, in which
    keys merge like tokens and sizes are kept. (B, P, C) → (B, after, C), in the order of what was kept.
    """
    state = torch.cat([patches.float(), keys.detach().float()], dim=-1)
    sizes = state.new_ones(*state.shape[:2], 1)
    width = patches.shape[2]
    while state.shape[1] > after:
        state, sizes = _merge_step(state, sizes, width, min(state.shape[1] - after, state.shape[1] // 2))
    return state[:, :, :width].to(patches.dtype)


def _merge_step(state: torch.Tensor, sizes: torch.Tensor, width: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge r even tokens into odd ones. state: (B, P, width + head_dim), sizes: (B, P, 1)."""
    B, P, _ = state.shape
    directions = nn.functional.normalize(state.detach()[:, :, width:], dim=-1)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # (B, ⌈P/2⌉, ⌊P/2⌋)
    best, match = similarity.max(dim=2)
    order = best.sort(dim=1, descending=True, stable=True).indices
    merged = order[:, :r]  # (B, r) positions among the even tokens
    target = match.gather(1, merged) * 2 + 1  # (B, r) positions among all
    mass, weighted = sizes, state * sizes
    source = merged * 2
    weighted = weighted.scatter_add(1, _wide(target, state), _take(weighted, source))
    mass = mass.scatter_add(1, target[:, :, None], _take(mass, source))
    gone = torch.zeros(B, P, dtype=torch.long, device=state.device).scatter(1, source, 1)
    kept = gone.sort(dim=1, stable=True).indices[:, : P - r]  # the survivors, in order
    total = _take(mass, kept)
    return _take(weighted, kept) / total, total


def _split(scores: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the `kept` highest scores and of the rest, both ascending: (B, kept), (B, P - kept)."""
    order = scores.detach().float().sort(dim=1, descending=True, stable=True).indices
    return order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values


def _take(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, P, C), (B, K) → (B, K, C)"""
    return tokens.gather(1, _wide(indices, tokens))


def _wide(indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, K) → (B, K, C)"""
    return indices[:, :, None].expand(*indices.shape, like.shape[2])
