"""Tokens that know where they come from: how many patches each stands for, where, and which token holds which patch."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F

from poolshare.space.operators import Grid, grid_of

from .operators.indexing import add_at, take

# Patches that a cluster without members stands for: 0 would have no logarithm, no place, no weight in a mean.
EMPTY = 1e-6


class Carry(IntEnum):
    """What a path must know of its tokens besides their features. Each includes those before it."""

    NOTHING = 0
    SIZES = 1
    PLACES = 2
    SOURCES = 3


class Tokens(NamedTuple):
    """The value that travels along a path.

    The three of bookkeeping are None while the patch tokens are cells of the whole grid, where they are constants (see
    `grid_sizes`, `grid_places`, `grid_sources`), and where nothing uses them. They carry no gradient.
    """

    features: torch.Tensor  # (B, prefix + P, C)
    sizes: torch.Tensor | None = None  # (B, P), at least float32: how many patches each patch token stands for
    places: torch.Tensor | None = None  # (B, P, 2): row and column of the mean of these patches, the first at (0, 0)
    sources: torch.Tensor | None = None  # (B, patches): index of the patch token that holds each patch
    lost: torch.Tensor | None = None  # (B, patches), with sources, where something was dropped: whether the patch was
    proportional: bool = False  # from here on attention counts a key as often as it has patches (ToMe)
    # (1, heads, N, N): what all blocks add to the scores of patches on the whole grid
    relative: torch.Tensor | None = None

    def log_sizes(self) -> torch.Tensor | None:
        """What proportional attention adds to the scores of each key; prefix tokens stand for themselves. (B, 1, 1, N)"""
        if not self.proportional:
            return None
        assert self.sizes is not None  # a proportional operator sets both
        return F.pad(self.sizes.log(), (self.features.shape[1] - self.sizes.shape[1], 0))[:, None, None]


def merge(tokens: Tokens, features: torch.Tensor, holders: torch.Tensor, whole: Grid, carry: Carry) -> Tokens:
    """The tokens after each joined the new one that `holders` names.

    features: of the new tokens, prefix included. holders: (B, P), which of the new patch tokens each old one became a
    part of. whole: the grid of the base model's patches.
    """
    sizes, places, sources = _known(tokens, int(holders.shape[1]), whole, carry)
    if sizes is None:
        return tokens._replace(features=features)
    after = int(features.shape[1] - tokens.features.shape[1] + holders.shape[1])
    joined = add_at(sizes.new_zeros(holders.shape[0], after, 1), holders, sizes[:, :, None]).clamp_min(EMPTY)
    if places is not None:
        places = add_at(joined.new_zeros(holders.shape[0], after, 2), holders, places * sizes[:, :, None]) / joined
    if sources is not None:
        sources = holders.gather(1, sources)
    return tokens._replace(features=features, sizes=joined[:, :, 0], places=places, sources=sources)


def keep(tokens: Tokens, features: torch.Tensor, kept: torch.Tensor, whole: Grid, carry: Carry) -> Tokens:
    """The tokens after the others were dropped. kept: (B, K), ascending, which of the patch tokens are left.

    Each stands for what it stood for, so that sizes no longer sum to the patches; `sources` names for a patch that was
    lost the token nearest to the one that held it.
    """
    count = int(tokens.features.shape[1] - features.shape[1] + kept.shape[1])
    sizes, places, sources = _known(tokens, count, whole, carry)
    if sizes is None:
        return tokens._replace(features=features)
    left = None if places is None else take(places, kept)
    lost = tokens.lost
    if places is not None and left is not None and sources is not None:
        dropped = torch.ones_like(sizes).scatter(1, kept, 0.0).gather(1, sources) == 1  # no bool is traced here
        lost = dropped if lost is None else lost | dropped
        distances = (places[:, :, None] - left[:, None]).square().sum(dim=3)  # (B, P, K)
        sources = distances.min(dim=2).indices.gather(1, sources)
    return tokens._replace(features=features, sizes=sizes.gather(1, kept), places=left, sources=sources, lost=lost)


def _known(
    tokens: Tokens, count: int, whole: Grid, carry: Carry
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Sizes, places and sources of `count` patch tokens as far as they are asked for, on the whole grid its constants."""
    if tokens.sizes is not None:
        return tokens[1:4]
    batch, device = tokens.features.shape[0], tokens.features.device
    constants = [make(count, whole, device) for make in (grid_sizes, grid_places, grid_sources)[: int(carry)]]
    known = [constant.expand(batch, *constant.shape) for constant in constants]
    return (*known, *[None] * (3 - len(known)))  # type: ignore[return-value]


def restore(tokens: Tokens, num_prefix_tokens: int, whole: Grid, bilinear: bool = False) -> torch.Tensor:
    """A map of the full grid: each patch gets the features of the token that holds it. (B, C, rows, columns)

    bilinear: cells of a smaller grid are interpolated between their centres instead; merged tokens have none.
    tokens: with their sources, which were asked for from the first block on. whole: the grid of all patches.
    """
    shape = grid_of(int(tokens.features.shape[1]) - num_prefix_tokens, whole)
    if bilinear and tokens.sources is None and shape != whole:
        cells = tokens.features[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, shape)
        return F.interpolate(cells, size=whole, mode="bilinear", align_corners=False)
    return spread(tokens, num_prefix_tokens, whole).transpose(1, 2).unflatten(2, whole).contiguous()


def spread(tokens: Tokens, num_prefix_tokens: int, whole: Grid) -> torch.Tensor:
    """For each patch the features of the token that holds it, as in `restore`. (B, patches, C)"""
    features = tokens.features[:, num_prefix_tokens:]
    if tokens.sources is not None:
        return take(features, tokens.sources)
    count = int(features.shape[1])
    if count == whole[0] * whole[1]:
        return features
    return features.index_select(1, grid_sources(count, whole, features.device))


def regions(tokens: Tokens, num_prefix_tokens: int, whole: Grid) -> torch.Tensor:
    """Which token stands for each part of the image, to be drawn; −1: it was dropped. (B, rows, columns), int64

    Parts are patches, or the cells of a smaller grid where the tokens are these. tokens, whole: as in `restore`.
    """
    if tokens.sources is not None:
        lost = torch.zeros_like(tokens.sources, dtype=torch.bool) if tokens.lost is None else tokens.lost
        return tokens.sources.masked_fill(lost, -1).unflatten(1, whole)
    count = int(tokens.features.shape[1]) - num_prefix_tokens
    return torch.arange(count).unflatten(0, _shape(count, whole)).expand(len(tokens.features), -1, -1)


def grid_sizes(count: int, whole: Grid, device: torch.device | None = None) -> torch.Tensor:
    """How many patches each of `count` cells of the whole grid stands for: equal shares of it. (count)"""
    return torch.full((count,), whole[0] * whole[1] / count, device=device)


def grid_places(count: int, whole: Grid, device: torch.device | None = None) -> torch.Tensor:
    """The centres of `count` equal cells that cover the grid of patches, in patches. (count, 2)"""
    lines = [
        (torch.arange(cells, device=device) + 0.5) * (length / cells) - 0.5
        for cells, length in zip(_shape(count, whole), whole, strict=True)
    ]
    return torch.cartesian_prod(*lines)


def grid_sources(count: int, whole: Grid, device: torch.device | None = None) -> torch.Tensor:
    """In which of `count` equal cells the centre of each patch lies. (patches)"""
    shape = _shape(count, whole)
    rows, columns = (
        (2 * torch.arange(length, device=device) + 1) * cells // (2 * length)
        for cells, length in zip(shape, whole, strict=True)
    )
    return (rows[:, None] * shape[1] + columns).flatten()


def _shape(count: int, whole: Grid) -> Grid:
    shape = grid_of(count, whole)
    assert shape is not None  # tokens without sources are cells of a grid
    return shape
