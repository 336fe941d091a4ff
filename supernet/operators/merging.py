"""Operators that rank tokens and keep, merge or fuse them: MSTM style, ToMe, EViT, importance top-K, random.

As everywhere in the operators, patch tokens only: (B, P, C) → (B, after, C). Choices carry no gradient, values do.
What drops tokens also returns which it kept, (B, after); what merges, which of the new tokens holds each old one, (B, P).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..block import Attended
from .indexing import add_at, at_least_float32, best_and_rest, take, without_autocast


def importance(attended: Attended, num_prefix_tokens: int, has_cls: bool) -> torch.Tensor:
    """How much each patch token matters: head-mean attention from CLS, or what it receives where there is no CLS.

    Returns (B, P), at least float32. From CLS takes N·d MACs, received attention N²·d.
    """
    if not has_cls:
        return received(attended, num_prefix_tokens)
    return attended.class_row()[:, :, num_prefix_tokens:].mean(dim=1)


def received(attended: Attended, num_prefix_tokens: int) -> torch.Tensor:
    """Attention that each patch token receives, over all heads and queries, prefix tokens' included: (B, P).

    Token Pooling's weights; at least float32.
    """
    return attended.received()[:, num_prefix_tokens:]


def topk(patches: torch.Tensor, scores: torch.Tensor, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most important tokens, in their order; the others are dropped. scores: (B, P)."""
    kept, _ = best_and_rest(scores, after)
    return take(patches, kept), kept


def random_tokens(patches: torch.Tensor, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens at positions drawn once for each (P, after), the same in every image: the baseline to beat."""
    positions = torch.tensor(_drawn_positions(int(patches.shape[1]), after), device=patches.device)
    return patches.index_select(1, positions), positions.expand(patches.shape[0], -1)


def _drawn_positions(before: int, after: int) -> list[int]:
    """A Fisher-Yates draw, ascending. The generator (Knuth's MMIX) is spelled out: an exported model has to draw the
    same positions under every version of Python and torch."""
    positions, state = list(range(before)), before * 2**32 + after
    for last in range(before - 1, before - 1 - after, -1):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        chosen = (state >> 32) % (last + 1)
        positions[last], positions[chosen] = positions[chosen], positions[last]
    return sorted(positions[before - after :])


def evit(patches: torch.Tensor, scores: torch.Tensor, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """EViT (arXiv 2202.07800): keep the after − 1 most important tokens, in their order; the rest fuse into a last one.

    scores: (B, P), ≥ 0. The fused token is the mean of the rest, weighted by score.
    """
    kept, rest = best_and_rest(scores, after - 1)
    shares = at_least_float32(scores).gather(1, rest)[:, :, None]
    shares = shares + torch.finfo(shares.dtype).tiny  # all zero: a plain mean
    fused = (shares / shares.sum(dim=1, keepdim=True) * take(patches, rest)).sum(dim=1, keepdim=True)
    reduced = torch.cat([take(patches, kept), fused.to(patches.dtype)], dim=1)
    return reduced, _holders(kept, rest, torch.full_like(rest, after - 1))


def mstm(patches: torch.Tensor, scores: torch.Tensor, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token mergence in the style of MSTM (arXiv 2306.04897): each unimportant token joins the kept one most like it.

    scores: (B, P). Kept tokens stay in order; with its dropped ones y, x becomes (e·x + Σ e^cos·y) / (e + Σ e^cos),
    cos the similarity of x and y: x itself enters with cos = 1.
    """
    kept, dropped = best_and_rest(scores, after)
    tokens = at_least_float32(patches)
    crucial, others = take(tokens, kept), take(tokens, dropped)
    similarity, match = _most_similar(others, crucial)
    shares = similarity.exp()[:, :, None]  # (B, P − after, 1)
    sums = add_at(math.e * crucial, match, shares * others)
    totals = add_at(torch.full_like(crucial[:, :, :1], math.e), match, shares)
    return (sums / totals).to(patches.dtype), _holders(kept, dropped, match)


def _holders(kept: torch.Tensor, others: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
    """Which new token holds each old one: the kept ones follow each other, the others joined those. (B, P)"""
    positions = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.cat([positions, joined], dim=1).gather(1, torch.cat([kept, others], dim=1).sort(dim=1).indices)


class MultiScale(nn.Module):
    """MSTM style: x + W·[DWConv3×3 ‖ DWConv5×5](grid), once, while the grid is whole. (B, C, rows, columns) → the same

    W and its bias are zero at first, so a pretrained model's function is unchanged.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fine = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.coarse = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        nn.init.zeros_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)  # type: ignore[arg-type]  # a Conv2d has a bias unless told otherwise

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return grid + self.fuse(torch.cat([self.fine(grid), self.coarse(grid)], dim=1))


def tome(
    patches: torch.Tensor, keys: torch.Tensor, after: int, sizes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token Merging (arXiv 2210.09461): the best-matched pairs of tokens become their mean, in one step or several.

    keys: (B, P, head_dim), averaged over heads. sizes: (B, P), how many patches each token stands for, which is what it
    weighs; None: all as many. A step merges at most ⌊P/2⌋ pairs, so fewer than half the tokens take more steps; between
    them keys merge like their tokens. Survivors stay in order.
    """
    width = patches.shape[2]
    keys = at_least_float32(keys.detach())
    weights = torch.ones_like(keys[:, :, :1]) if sizes is None else sizes[:, :, None].to(keys.dtype)
    held = torch.cat([at_least_float32(patches), keys], dim=2)
    held = torch.cat([held if sizes is None else held * weights, weights], dim=2)  # sums, and sizes last
    holders: torch.Tensor | None = None
    for merges in _merges_per_step(int(patches.shape[1]), after):
        held, joined = _merge_pairs(held, held[:, :, width:-1].detach(), merges)
        holders = joined if holders is None else joined.gather(1, holders)
    assert holders is not None  # there is a pair to merge
    return (held[:, :, :width] / held[:, :, -1:]).to(patches.dtype), holders


def _merges_per_step(before: int, after: int) -> list[int]:
    steps = []
    while before > after:
        steps.append(min(before - after, before // 2))
        before -= steps[-1]
    return steps


def _merge_pairs(held: torch.Tensor, keys: torch.Tensor, merges: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One step: tokens at even places (A) are matched to the most similar at odd places (B); the best `merges` of A merge.

    (B, P, columns) → (B, P − merges, columns), and (B, P): which of these holds each token. Keys may be sums: their
    direction is that of their mean.
    """
    B, P, _ = held.shape
    similarity, match = _most_similar(keys[:, 0::2], keys[:, 1::2])
    merged, kept = best_and_rest(similarity, merges)
    partners = 2 * match.gather(1, merged) + 1
    held = add_at(held, partners, take(held, 2 * merged))
    odd = torch.arange(1, P, 2, device=held.device).expand(B, -1)
    survivors = torch.cat([2 * kept, odd], dim=1).sort(dim=1).values
    position = torch.arange(P - merges, device=held.device).expand(B, -1)
    holders = torch.zeros_like(torch.cat([survivors, merged], dim=1)).scatter(1, survivors, position)
    return take(held, survivors), holders.scatter(1, 2 * merged, holders.gather(1, partners))


def _most_similar(tokens: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarity of each token to the candidate most like it, and that one's index. Both (B, tokens)."""
    tokens, candidates = F.normalize(tokens, dim=2), F.normalize(candidates, dim=2)
    with without_autocast(tokens):
        similarity = tokens @ candidates.transpose(1, 2)
    best = similarity.max(dim=2)
    return best.values, best.indices
