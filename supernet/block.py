"""A timm block that attends with queries and keys of its own, or with those of an earlier block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import nn

from poolshare.space import Layer
from poolshare.space.cost import needs_attention

from .operators.indexing import at_least_float32, without_autocast

Sharing = Literal["qk", "map"]  # what an owner hands to its followers: queries and keys, or a written map


class Attended(NamedTuple):
    """What a block's attention leaves for those after it: queries and keys, which say what the map is.

    Followers attend with them (or read the map, where one was written), pooling operators score tokens by them. Queries
    and keys may have other widths than values; `scale` None is timm's, one over the root of their width.
    """

    queries: torch.Tensor  # (B, heads, N, head_dim), after their norm, not detached
    keys: torch.Tensor  # (B, heads, N, head_dim), likewise
    scale: float | None = None  # of the scores
    written: torch.Tensor | None = None  # (B, heads, N, N), post-softmax: the map, where sharing is "map"
    bias: torch.Tensor | None = None  # (1 or B, 1 or heads, 1 or N, N), added to the scores; None: nothing is

    def class_row(self) -> torch.Tensor:
        """The map's first row, what the first token (CLS) attends to. (B, heads, N)"""
        return self._rows(0, 1)[:, :, 0]

    def received(self) -> torch.Tensor:
        """The map's column sums: attention that each token receives over all heads and queries. (B, N)

        Computed by blocks of queries, so that memory is linear in N (what a backward pass needs is not).
        """
        total = self._rows(0, QUERIES_AT_ONCE).sum(dim=(1, 2))
        for first in range(QUERIES_AT_ONCE, int(self.queries.shape[2]), QUERIES_AT_ONCE):
            total = total + self._rows(first, first + QUERIES_AT_ONCE).sum(dim=(1, 2))
        return total

    def _rows(self, first: int, end: int) -> torch.Tensor:
        """Rows of the map, at least float32, for they decide which tokens stay. (B, heads, end − first, N)"""
        queries, keys = at_least_float32(self.queries[:, :, first:end]), at_least_float32(self.keys)
        with without_autocast(queries):
            scores = (queries * _factor(queries, self.scale)) @ keys.transpose(-2, -1)
        if self.bias is not None:
            scores = scores + (self.bias if self.bias.shape[2] == 1 else self.bias[:, :, first:end])
        return scores.softmax(dim=-1)

    def detach(self) -> Attended:
        """The same values without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(queries=self.queries.detach(), keys=self.keys.detach(), written=None, bias=bias)


QUERIES_AT_ONCE = 64


def _factor(queries: torch.Tensor, scale: float | None) -> float:
    return int(queries.shape[-1]) ** -0.5 if scale is None else scale


def left_for(layers: Iterable[Layer], sharing: Sharing) -> Sharing | None:
    """What a block must leave where one of these layers may come next."""
    layers = list(layers)
    if sharing == "map" and any(layer.shared for layer in layers):
        return "map"
    return "qk" if any(map(needs_attention, layers)) else None


Attends: TypeAlias = Attention | EvaAttention | AttentionRope | BeitAttention | RelPosAttention
Blocks: TypeAlias = Block | ResPostBlock | EvaBlock | EvaBlockPostNorm | BeitBlock | RelPosBlock | ResPostRelPosBlock
POST_NORM = (ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock)  # their norms come after attention and MLP


class SharedAttention(nn.Module):
    """What is left of a timm attention that uses another block's queries and keys: values and output projection.

    Differs from timm's: `qkv` has become `v` (its last third of rows), and there are no query and key norms.
    """

    def __init__(self, attention: Attends):
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.attn_dim = attention.num_heads * attention.head_dim
        self.fused_attn, self.attn_drop = attention.fused_attn, attention.attn_drop
        weight, bias = _value_rows(attention)
        self.v = nn.Linear(
            weight.shape[1], self.attn_dim, bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.v.weight.copy_(weight)
            if bias is not None:
                self.v.bias.copy_(bias)
        self.norm, self.gate = attention.norm, attention.gate
        self.proj, self.proj_drop = attention.proj, attention.proj_drop


def run_block(
    block: Blocks,
    tokens: torch.Tensor,
    shared: Attended | None = None,
    leave: Sharing | None = None,
    bias: torch.Tensor | None = None,
    turned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Attended | None]:
    """One transformer block as timm runs it, with its fused attention on or off.

    tokens: (B, N, C). shared: what the owner of the queries and keys left, for a follower: only the V rows of `qkv` run.
    leave: what those after an owner need; None: the block is timm's own forward and leaves nothing. Only an owner that
    must write its map leaves the fused kernel. bias: what an owner adds to the scores, as a mask, which fused kernels take,
    see `Attended`. turned: by what an owner rotates queries and keys of the patch tokens, see `operators.rotary`.
    Returns the new tokens (B, N, C) and, where something is to be left, what the block attended with.

    With dropout on the map, each block draws a mask of its own under "qk"; a written map is dropped out once for all.
    """
    if shared is None and leave is None and bias is None:
        return block(tokens) if turned is None else block(tokens, rope=turned), None
    post = isinstance(block, POST_NORM)
    mixed, used = _mixed(block.attn, tokens if post else block.norm1(tokens), shared, leave, bias, turned)
    tokens = tokens + block.drop_path1(_scaled(block, 1, mixed))
    mixed = block.mlp(tokens if post else block.norm2(tokens))
    return tokens + block.drop_path2(_scaled(block, 2, mixed)), used if leave else None


def _mixed(
    attention: Attends | SharedAttention,
    normed: torch.Tensor,
    shared: Attended | None,
    leave: Sharing | None,
    bias: torch.Tensor | None,
    turned: torch.Tensor | None,
) -> tuple[torch.Tensor, Attended]:
    """What attention gives (B, N, C), and what it attended with. Values and the like are free before the MLP needs memory."""
    if shared is None:
        used, values = _own(attention, normed, turned)
        used = used._replace(bias=bias)
        if leave == "map":
            used = used._replace(written=_write(attention, used))
    else:
        used, values = shared, _values(attention, normed)
    return _project(attention, normed, _attend(attention, used, values)), used


def _scaled(block: Blocks, part: int, mixed: torch.Tensor) -> torch.Tensor:
    """What attention (part 1) or MLP (2) add to the tokens: scaled by layer, or normed by post-norm blocks."""
    if isinstance(block, POST_NORM):
        return getattr(block, f"norm{part}")(mixed)
    if isinstance(block, (EvaBlock, BeitBlock)):
        gamma = getattr(block, f"gamma_{part}")
        return mixed if gamma is None else gamma * mixed
    return getattr(block, f"ls{part}")(mixed)


def _own(attention: Attends, normed: torch.Tensor, turned: torch.Tensor | None) -> tuple[Attended, torch.Tensor]:
    """Queries and keys, and values (B, heads, N, head_dim)."""
    B, N, _ = normed.shape
    shape = B, N, attention.num_heads, attention.head_dim
    if attention.qkv is None:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = (part(normed).reshape(shape).transpose(1, 2) for part in parts)
    else:
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            separate = attention.qkv_bias_separate
            qkv = attention.qkv(normed) + bias if separate else F.linear(normed, attention.qkv.weight, bias)
        else:
            qkv = attention.qkv(normed)
        queries, keys, values = qkv.reshape(B, N, 3, *shape[2:]).permute(2, 0, 3, 1, 4).unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if turned is not None:
        queries, keys = (_rotate(attention, half, turned).type_as(values) for half in (queries, keys))
    return Attended(queries, keys), values


def _rotate(attention: EvaAttention | AttentionRope, vectors: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """Queries or keys (B, heads, N, head_dim), those of patch tokens rotated, as timm does it."""
    prefix = attention.num_prefix_tokens
    patches = apply_rot_embed_cat(vectors[:, :, prefix:], turned, half=attention.rotate_half)
    return torch.cat([vectors[:, :, :prefix], patches], dim=2)


def _value_rows(attention: Attends) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the values' projection."""
    if attention.qkv is None:
        return attention.v_proj.weight, attention.v_proj.bias
    width = attention.num_heads * attention.head_dim
    if isinstance(attention, (EvaAttention, BeitAttention)):
        return attention.qkv.weight[-width:], attention.v_bias
    return attention.qkv.weight[-width:], None if attention.qkv.bias is None else attention.qkv.bias[-width:]


def _values(attention: Attends | SharedAttention, normed: torch.Tensor) -> torch.Tensor:
    """Values alone, (B, heads, N, head_dim)."""
    B, N, _ = normed.shape
    own = not isinstance(attention, SharedAttention)
    values = F.linear(normed, *_value_rows(attention)) if own else attention.v(normed)
    return values.reshape(B, N, attention.num_heads, attention.head_dim).transpose(1, 2)


def _attend(attention: Attends | SharedAttention, used: Attended, values: torch.Tensor) -> torch.Tensor:
    """Map times values, by the kernel that timm would take. (B, heads, N, head_dim)"""
    if used.written is not None:
        return used.written @ values
    if attention.fused_attn:
        dropped = attention.attn_drop.p if attention.training else 0.0
        mask = None if used.bias is None else used.bias.to(used.queries.dtype)
        return F.scaled_dot_product_attention(
            used.queries, used.keys, values, attn_mask=mask, dropout_p=dropped, scale=used.scale
        )
    return _write(attention, used) @ values


def _write(attention: Attends | SharedAttention, used: Attended) -> torch.Tensor:
    """The map itself, (B, heads, N, N), as timm computes it with fused attention off."""
    scores = (used.queries * _factor(used.queries, used.scale)) @ used.keys.transpose(-2, -1)
    if used.bias is not None:
        scores = scores + used.bias.to(scores.dtype)
    return attention.attn_drop(scores.softmax(dim=-1))


def _project(attention: Attends | SharedAttention, normed: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """What timm does with mixed values (B, heads, N, head_dim): norm, gate and output projection. (B, N, C)"""
    B, N, _ = normed.shape
    mixed = attention.norm(mixed.transpose(1, 2).reshape(B, N, attention.num_heads * attention.head_dim))
    if attention.gate is not None:
        mixed = mixed * attention.gate(normed).sigmoid()
    return attention.proj_drop(attention.proj(mixed))
