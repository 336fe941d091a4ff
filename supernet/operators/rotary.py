"""Rotary position embeddings by place: the tables of timm's `Eva` for tokens that stand anywhere on the patch grid."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.layers.pos_embed_sincos import _rope_layout, get_mixed_freqs

from ..tokens import Tokens, grid_places

KINDS = (RotaryEmbeddingCat, RotaryEmbeddingMixed, RotaryEmbeddingDinoV3)


def unsupported_rotation(rope: Any) -> str | None:
    """Why tokens cannot be rotated by their places, or None where they can, or where there is no rotation."""
    if rope is None:
        return None
    if type(rope) not in KINDS:
        return f"its rotary position embedding is {type(rope).__name__}"
    if rope.shift_coords or (rope.jitter_coords or 1) != 1 or (rope.rescale_coords or 1) != 1:
        return (
            "it has rotary coordinates that change at random in training; rope_shift_coords=0, rope_jitter_coords=1 and "
            "rope_rescale_coords=1 leave them as they are"
        )
    if isinstance(rope, RotaryEmbeddingCat) and rope.grid_type != "index":
        return f"its rotary coordinates are of the kind {rope.grid_type!r}"
    if isinstance(rope, RotaryEmbeddingDinoV3) and rope.normalize_coords != "separate":
        return f"its rotary coordinates are normalised by {rope.normalize_coords!r}"
    return None


def rotation(model: Any, index: int, tokens: Tokens) -> torch.Tensor | None:
    """What block `index` rotates queries and keys of the patch tokens by, sines beside cosines; None: by nothing.

    (P, 2·head_dim), or with heads and images before: what timm's blocks take as `rope`. timm's own table where nothing
    was pooled; otherwise the same function at the tokens' places: the centres of cells on a grid, and the means of
    their patches for merged tokens.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    whole = model.patch_embed.grid_size
    count = int(tokens.features.shape[1]) - model.num_prefix_tokens
    if tokens.places is None and count == whole[0] * whole[1] and not isinstance(rope, RotaryEmbeddingMixed):
        table: torch.Tensor = rope.get_embed() if rope.feat_shape is not None else rope.get_embed(whole)
        return table.to(tokens.features.device)
    places = grid_places(count, whole, tokens.features.device) if tokens.places is None else tokens.places
    if isinstance(rope, RotaryEmbeddingMixed):
        first, second = _ordered(places, rope).unbind(-1)
        if places.ndim == 3:
            first, second = first[:, None], second[:, None]  # heads
        return get_mixed_freqs(rope.freqs[:, index], first, second)
    grid = torch.tensor(whole, device=places.device)
    if isinstance(rope, RotaryEmbeddingCat):
        coordinates = places + rope.grid_offset
        if rope.ref_feat_shape is not None:
            coordinates = coordinates / grid * torch.tensor(rope.ref_feat_shape, device=places.device)
        angles = _ordered(coordinates, rope)[..., None] * rope.bands
    else:
        coordinates = 2 * ((places + 0.5 + rope.grid_offset) / grid) - 1
        angles = 2 * torch.pi * _ordered(coordinates, rope)[..., None] / rope.periods
    angles = angles.flatten(-2)  # (…, P, head_dim / 2)
    found = torch.cat(
        [_rope_layout(angles.sin(), rope.rotate_half), _rope_layout(angles.cos(), rope.rotate_half)], dim=-1
    )
    return found[:, None] if places.ndim == 3 else found


def _ordered(coordinates: torch.Tensor, rope: Any) -> torch.Tensor:
    """Row and column in the order of the embedding's channels."""
    return coordinates if rope.grid_indexing == "ij" else coordinates.flip(-1)
