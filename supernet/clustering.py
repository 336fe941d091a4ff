"""Token Pooling (Marin et al., arXiv 2110.03860): the patch tokens that stand for all others best.

K output tokens are chosen that minimise Σᵢ wᵢ · minⱼ ‖fᵢ − f̂ⱼ‖². Everything is batched: no loop over images or
clusters, no data-dependent shape. Squared distances go by matmul, which fvcore counts, and are computed in float32.
"""

from __future__ import annotations

import torch

ROUNDS = 5  # the paper: no more are needed


def kmedoids(patches: torch.Tensor, after: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Cluster centres that are tokens themselves, in their original order. (B, P, C) → (B, after, C)

    weights: (B, P) significance of each token (the paper: total attention received); None: all alike. Starts from the
    `after` heaviest tokens, from evenly spaced ones without weights. A cluster's new medoid is the member j with the
    least Σ wᵢ·‖fᵢ − fⱼ‖² over its members i. Ties go to the lower index. Gradients reach the chosen tokens.
    """
    distances = squared_distances(patches)  # (B, P, P)
    medoids = _start(patches, after, weights)  # (B, K)
    weighted = distances if weights is None else weights.detach().float()[:, :, None] * distances  # row i: wᵢ·d(i, j)
    for _ in range(ROUNDS):
        cluster = _nearest(distances, medoids)  # (B, P)
        together = cluster[:, :, None] == cluster[:, None, :]  # (B, P, P)
        spread = torch.where(together, weighted, 0).sum(dim=1)  # (B, P): what it costs if j stands for its cluster
        medoids = _least_of_each(spread, cluster, after)
    order = medoids.sort(dim=1).values
    return patches.gather(1, order[:, :, None].expand(-1, -1, patches.shape[2]))


def kmeans(patches: torch.Tensor, after: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Cluster centres that are weighted means of their members. (B, P, C) → (B, after, C)

    weights and start: as in `kmedoids`. An empty cluster keeps its centre. Gradients reach all tokens.
    """
    B, P, C = patches.shape
    tokens = patches.detach().float()
    heavy = tokens.new_ones(B, P) if weights is None else weights.detach().float()
    medoids = _start(patches, after, weights)
    centres = tokens.gather(1, medoids[:, :, None].expand(B, after, C))
    for round_number in range(ROUNDS):
        last = round_number == ROUNDS - 1
        products = tokens @ centres.transpose(1, 2)  # (B, P, K)
        cluster = ((centres * centres).sum(-1)[:, None, :] - 2 * products).argmin(dim=2)
        share = (cluster[:, :, None] == torch.arange(after, device=patches.device)).float() * heavy[:, :, None]
        total = share.sum(dim=1)[:, :, None]  # (B, K, 1)
        means = share.transpose(1, 2) @ (patches.float() if last else tokens) / total.clamp_min(1e-12)
        centres = torch.where(total > 0, means, centres)
    return centres.to(patches.dtype)


def squared_distances(patches: torch.Tensor) -> torch.Tensor:
    """‖fᵢ − fⱼ‖² of all pairs, float32, without gradient. (B, P, C) → (B, P, P)"""
    tokens = patches.detach().float()
    tokens = tokens - tokens.mean(dim=1, keepdim=True)  # a common offset would only cost precision
    norms = (tokens * tokens).sum(dim=-1)
    return (norms[:, :, None] + norms[:, None, :] - 2 * tokens @ tokens.transpose(1, 2)).clamp_min(0)


def _start(patches: torch.Tensor, after: int, weights: torch.Tensor | None) -> torch.Tensor:
    """First medoids: (B, after) indices."""
    B, P, _ = patches.shape
    if weights is None:
        return (torch.arange(after, device=patches.device) * P // after).expand(B, after)
    # A stable sort gives ties to the lower index; topk promises nothing about them.
    return weights.detach().float().sort(dim=1, descending=True, stable=True).indices[:, :after]


def _nearest(distances: torch.Tensor, medoids: torch.Tensor) -> torch.Tensor:
    """Cluster of each token, (B, P) from 0 to K - 1; a medoid belongs to its own cluster even among equal tokens."""
    B, P, _ = distances.shape
    K = medoids.shape[1]
    cluster = distances.gather(2, medoids[:, None, :].expand(B, P, K)).argmin(dim=2)
    return cluster.scatter(1, medoids, torch.arange(K, device=medoids.device).expand(B, K))


def _least_of_each(spread: torch.Tensor, cluster: torch.Tensor, clusters: int) -> torch.Tensor:
    """For each cluster the member with the least spread, ties to the lower index: (B, clusters) indices."""
    B, P = spread.shape
    least = spread.new_full((B, clusters), torch.inf).scatter_reduce(1, cluster, spread, "amin")
    indices = torch.arange(P, device=spread.device).expand(B, P)
    candidates = torch.where(spread <= least.gather(1, cluster), indices, P)
    return indices.new_full((B, clusters), P).scatter_reduce(1, cluster, candidates, "amin")
