"""Choosing, taking and adding up tokens: what the operators that look at content have in common.

Every tie goes to the lower index, so that an image has one answer on every run and at every batch size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def best_and_rest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the `count` highest scores and of the others, both ascending. (B, P) → (B, count), (B, P − count)

    By a stable sort: torch.topk promises nothing about which of several equal scores it takes.
    """
    order = scores.detach().sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def take(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows of each image that its indices name. (B, P, C), (B, K) → (B, K, C)"""
    rows = tokens.flatten(0, 1).index_select(0, _flat(indices, tokens.shape[1]))  # a tenth of the time of gather
    return rows.reshape(*indices.shape, tokens.shape[2])


def add_at(base: torch.Tensor, indices: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Add each token to the row of `base` that its index names. (B, K, C), (B, R), (B, R, C) → (B, K, C)"""
    sums = base.flatten(0, 1).index_add(0, _flat(indices, base.shape[1]), tokens.flatten(0, 1))
    return sums.reshape(base.shape)


def _flat(indices: torch.Tensor, length: int) -> torch.Tensor:
    """Indices into each image as indices into the batch laid end to end. (B, K) → (B·K)"""
    first = torch.arange(indices.shape[0], device=indices.device) * length
    return (indices + first[:, None]).flatten()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """float64 as it is, anything narrower as float32: bfloat16 has 8 bits, too few to distinguish similar tokens."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Keeps autocast from narrowing a matmul whose result decides something. Where it is off, nothing is entered."""
    device = tensor.device.type
    narrowed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # meta has none
    return torch.autocast(device, enabled=False) if narrowed else nullcontext()
