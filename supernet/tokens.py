"""Tokens that know where they come from: how many patches each stands for, where, and which token holds which patch."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F

from poolshare.space.operators import OPERATORS

from .operators.indexing import add_at, take

EMPTY = (
    1e-6  # patches that a cluster without members stands for: 0 would have no logarithm, no place, no weight in a mean
)


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
    proportional: bool = False  # from here on attention counts a key as often as it has patches (ToMe)

    def log_sizes(self) -> torch.Tensor | None:
        """What proportional attention adds to the scores of each key; prefix tokens stand for themselves. (B, N)"""
        if not self.proportional:
            return None
        assert self.sizes is not None  # a proportional operator sets both
        return F.pad(self.sizes.log(), (self.features.shape[1] - self.sizes.shape[1], 0))


def carried(operators: Iterable[str | None], rotary: bool) -> Carry:
    """What these operators, anywhere in a path, and a model with or without rotary position embeddings ask for."""
    if rotary:
        return Carry.PLACES
    return Carry.SIZES if any(name is not None and OPERATORS[name].weighs for name in operators) else Carry.NOTHING


def merge(tokens: Tokens, features: torch.Tensor, holders: torch.Tensor, patches: int, carry: Carry) -> Tokens:
    """The tokens after each joined the new one that `holders` names.

    features: of the new tokens, prefix included. holders: (B, P), which of the new patch tokens each old one became a
    part of. patches: how many the base model has.
    """
    sizes, places, sources = _known(tokens, int(holders.shape[1]), patches, carry)
    if sizes is None:
        return Tokens(features)
    after = int(features.shape[1] - tokens.features.shape[1] + holders.shape[1])
    joined = add_at(sizes.new_zeros(len(holders), after, 1), holders, sizes[:, :, None]).clamp_min(EMPTY)
    if places is not None:
        places = add_at(joined.new_zeros(len(holders), after, 2), holders, places * sizes[:, :, None]) / joined
    if sources is not None:
        sources = holders.gather(1, sources)
    return Tokens(features, joined[:, :, 0], places, sources, tokens.proportional)


def keep(tokens: Tokens, features: torch.Tensor, kept: torch.Tensor, patches: int, carry: Carry) -> Tokens:
    """The tokens after the others were dropped. kept: (B, K), ascending, which of the patch tokens are left.

    Each stands for what it stood for, so that sizes no longer sum to the patches; `sources` names for a patch that was
    lost the token nearest to the one that held it.
    """
    count = int(tokens.features.shape[1] - features.shape[1] + kept.shape[1])
    sizes, places, sources = _known(tokens, count, patches, carry)
    if sizes is None:
        return Tokens(features)
    left = None if places is None else take(places, kept)
    if places is not None and left is not None and sources is not None:
        distances = (places[:, :, None] - left[:, None]).square().sum(dim=3)  # (B, P, K)
        sources = distances.min(dim=2).indices.gather(1, sources)
    return Tokens(features, sizes.gather(1, kept), left, sources, tokens.proportional)


def _known(
    tokens: Tokens, count: int, patches: int, carry: Carry
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Sizes, places and sources of `count` patch tokens as far as they are asked for, on the whole grid its constants."""
    if tokens.sizes is not None:
        return tokens[1:4]
    batch, device = tokens.features.shape[0], tokens.features.device
    constants = [make(count, patches, device) for make in (grid_sizes, grid_places, grid_sources)[: int(carry)]]
    known = [constant.expand(batch, *constant.shape) for constant in constants]
    return (*known, *[None] * (3 - len(known)))  # type: ignore[return-value]


def restore(tokens: Tokens, num_prefix_tokens: int, patches: int, bilinear: bool = False) -> torch.Tensor:
    """A map of the full grid: each patch gets the features of the token that holds it. (B, C, side, side)

    bilinear: cells of a smaller grid are interpolated between their centres instead; merged tokens have none.
    tokens: with their sources, which were asked for from the first block on.
    """
    features, side = tokens.features[:, num_prefix_tokens:], isqrt(patches)
    count = int(features.shape[1])
    if tokens.sources is not None:
        features = take(features, tokens.sources)
    elif bilinear and count != patches:
        cells = features.transpose(1, 2).unflatten(2, (isqrt(count),) * 2)
        return F.interpolate(cells, size=(side, side), mode="bilinear", align_corners=False)
    elif count != patches:
        features = features.index_select(1, grid_sources(count, patches, features.device))
    return features.transpose(1, 2).unflatten(2, (side, side)).contiguous()


def grid_sizes(count: int, patches: int, device: torch.device | None = None) -> torch.Tensor:
    """How many patches each of `count` cells of the whole grid stands for: equal shares of it. (count)"""
    return torch.full((count,), patches / count, device=device)


def grid_places(count: int, patches: int, device: torch.device | None = None) -> torch.Tensor:
    """The centres of `count` square cells that cover the grid of patches, in patches. (count, 2)"""
    side = isqrt(count)
    centres = (torch.arange(side, device=device) + 0.5) * (isqrt(patches) / side) - 0.5
    return torch.cartesian_prod(centres, centres)


def grid_sources(count: int, patches: int, device: torch.device | None = None) -> torch.Tensor:
    """In which of `count` square cells the centre of each patch lies. (patches)"""
    side, whole = isqrt(count), isqrt(patches)
    cells = (2 * torch.arange(whole, device=device) + 1) * side // (2 * whole)
    return (cells[:, None] * side + cells).flatten()
