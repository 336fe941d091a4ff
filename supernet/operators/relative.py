"""Relative position biases by place: what timm's BEiT and ViT-RelPos add to the scores of two patches, for any tokens."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from ..tokens import Tokens, grid_places

RELATIVE = (Beit, VisionTransformerRelPos)


def shared_bias(model: Any) -> torch.Tensor | None:
    """The bias that is the same in all blocks, on the whole grid; None: there is none. (1, heads, N, N)"""
    if isinstance(model, Beit):
        return None if model.rel_pos_bias is None else model.rel_pos_bias()[None]
    shared = getattr(model, "shared_rel_pos", None)
    return None if shared is None else shared.get_bias()


def relative_bias(model: Any, index: int, tokens: Tokens) -> torch.Tensor | None:
    """What block `index` adds to the scores of each pair of tokens; None: nothing. (1 or B, heads, N, N)

    timm's own bias where nothing was pooled; otherwise that of the patches nearest to the tokens' places.
    """
    if not isinstance(model, RELATIVE):
        return None
    bias = _own_bias(model.blocks[index].attn)
    if tokens.relative is not None:
        bias = tokens.relative if bias is None else bias + tokens.relative
    prefix, patches = model.num_prefix_tokens, model.patch_embed.num_patches
    count = int(tokens.features.shape[1]) - prefix
    if bias is None or (tokens.places is None and count == patches):
        return bias
    whole = model.patch_embed.grid_size
    places = grid_places(count, whole, tokens.features.device) if tokens.places is None else tokens.places
    row, column = (places + 0.5).floor().long().unbind(-1)  # between two patches: the later one, for all tokens alike
    nearest = prefix + row * whole[1] + column
    others = torch.arange(prefix, device=nearest.device).expand(*nearest.shape[:-1], prefix)
    nearest = torch.cat([others, nearest], dim=-1)  # (N) or (B, N)
    pairs = bias[0][:, nearest[..., :, None], nearest[..., None, :]]  # (heads, [B,] N, N)
    return pairs.transpose(0, 1) if nearest.ndim == 2 else pairs[None]


def _own_bias(attention: Any) -> torch.Tensor | None:
    """What this attention alone adds on the whole grid; one that reuses another's map has none. (1, heads, N, N)"""
    if getattr(attention, "relative_position_bias_table", None) is not None:
        return attention._get_rel_pos_bias()
    own = getattr(attention, "rel_pos", None)
    return None if own is None else own.get_bias()
