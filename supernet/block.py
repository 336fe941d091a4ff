"""A timm block run with an attention map of its own, or with the previous block's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn


class SharedAttention(nn.Module):
    """What is left of a timm `Attention` that uses another block's map: values and output projection.

    Differs from timm's: `qkv` has become `v` (its last third of rows), and there are no query and key norms.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = attention.num_heads, attention.head_dim, attention.attn_dim
        full = attention.qkv
        self.v = nn.Linear(
            full.in_features,
            self.attn_dim,
            bias=full.bias is not None,
            device=full.weight.device,
            dtype=full.weight.dtype,
        )
        with torch.no_grad():
            self.v.weight.copy_(full.weight[-self.attn_dim :])
            if full.bias is not None:
                self.v.bias.copy_(full.bias[-self.attn_dim :])
        self.norm, self.gate = attention.norm, attention.gate
        self.proj, self.proj_drop = attention.proj, attention.proj_drop


class Attended(NamedTuple):
    """What a block's attention leaves for those after it: followers use its map, some pooling operators its keys."""

    attention: torch.Tensor  # (B, heads, N, N), post-softmax, not detached
    keys: torch.Tensor  # (B, heads, N, head_dim)


def run_block(block: Block, tokens: torch.Tensor, shared: Attended | None = None) -> tuple[torch.Tensor, Attended]:
    """One pre-norm transformer block on the explicit (unfused) attention path.

    tokens: (B, N, C). shared: what the owner of the map left; None: compute a map. Returns the new tokens (B, N, C)
    and the attention that was used. With a map of its own the block computes what timm does with fused attention off,
    bit for bit; with a shared one only the V rows of `qkv` run.
    """
    attention = block.attn
    normed = block.norm1(tokens)
    if shared is None:
        values, used = _own_attention(attention, normed)
    else:
        values, used = _values(attention, normed), shared
    tokens = tokens + block.drop_path1(block.ls1(_mix(attention, normed, used.attention, values)))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), used


def _own_attention(attention: Attention, normed: torch.Tensor) -> tuple[torch.Tensor, Attended]:
    """Values (B, heads, N, head_dim), and map and keys."""
    B, N, _ = normed.shape
    qkv = attention.qkv(normed).reshape(B, N, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv.unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    scores = (queries * attention.scale) @ keys.transpose(-2, -1)
    return values, Attended(attention.attn_drop(scores.softmax(dim=-1)), keys)


def _values(attention: Attention | SharedAttention, normed: torch.Tensor) -> torch.Tensor:
    """Values alone, (B, heads, N, head_dim)."""
    B, N, _ = normed.shape
    if isinstance(attention, SharedAttention):
        values = attention.v(normed)
    else:
        bias = None if attention.qkv.bias is None else attention.qkv.bias[-attention.attn_dim :]
        values = F.linear(normed, attention.qkv.weight[-attention.attn_dim :], bias)
    return values.reshape(B, N, attention.num_heads, attention.head_dim).transpose(1, 2)


def _mix(
    attention: Attention | SharedAttention, normed: torch.Tensor, used_map: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Map times values, then the output projection as timm does it. (B, N, C)"""
    B, N, _ = normed.shape
    mixed = attention.norm((used_map @ values).transpose(1, 2).reshape(B, N, attention.attn_dim))
    if attention.gate is not None:
        mixed = mixed * attention.gate(normed).sigmoid()
    return attention.proj_drop(attention.proj(mixed))
