"""A timm block run with an attention map of its own, or with the previous block's."""

from __future__ import annotations

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


def run_block(
    block: Block, tokens: torch.Tensor, shared_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pre-norm transformer block on the explicit (unfused) attention path.

    tokens: (B, N, C). shared_map: (B, heads, N, N), the post-softmax map of the block that owns it; None: compute
    one. Returns the new tokens (B, N, C) and the map that was used, not detached. With a map of its own the block
    computes what timm does with fused attention off, bit for bit; with a shared one only the V rows of `qkv` run.
    """
    attention = block.attn
    normed = block.norm1(tokens)
    if shared_map is None:
        values, used_map = _own_map(attention, normed)
    else:
        values, used_map = _values(attention, normed), shared_map
    update = block.ls1(_mix(attention, normed, used_map, values))
    tokens = tokens + block.drop_path1(update)
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), used_map


def _own_map(attention: Attention, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (B, heads, N, head_dim) and post-softmax map (B, heads, N, N)."""
    B, N, _ = normed.shape
    qkv = attention.qkv(normed).reshape(B, N, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv.unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    scores = (queries * attention.scale) @ keys.transpose(-2, -1)
    return values, attention.attn_drop(scores.softmax(dim=-1))


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
