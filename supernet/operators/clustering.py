"""Token Pooling (Marin et al., arXiv 2110.03860): K tokens that stand for all, Σᵢ wᵢ · minⱼ ‖fᵢ − f̂ⱼ‖² made small.

Both clusterings run a fixed number of rounds for a whole batch at once; no step depends on what another image holds.
Weights and distances only steer: gradients reach the tokens that come out (K-Medoids) or go in (K-Means). Both also
return which of the new tokens each of the old ones became a part of.
"""

from __future__ import annotations

import torch

from .indexing import add_at, at_least_float32, best_and_rest, take, without_autocast

ROUNDS = 5  # the paper: no more are needed


def kmedoids(
    patches: torch.Tensor, after: int, weights: torch.Tensor | None = None, sizes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`after` of the tokens themselves, in their order, around which the others lie close.

    (B, P, C) → (B, after, C), and (B, P): the cluster of each token.
    weights: (B, P), ≥ 0, what each token's distance counts; None: sizes, and without these 1. Starts from the heaviest
    tokens, without weights from evenly spaced ones. The new medoid of a cluster is the member j with the least Σ over
    members i of wᵢ·d(i, j), d the squared distance.
    """
    distances, weight = _squared_distances(_points(patches)), sizes if weights is None else weights
    weighted = distances if weight is None else distances * at_least_float32(weight.detach())[:, :, None]
    medoids = _evenly_spaced(patches, after) if weights is None else best_and_rest(weights, after)[0]
    for _ in range(ROUNDS):
        clusters = _nearest_medoid(distances, medoids)
        medoids = _central_members(weighted, clusters, after)
    order = medoids.sort(dim=1)
    return take(patches, order.values), order.indices.sort(dim=1).indices.gather(1, clusters)


def kmeans(patches: torch.Tensor, after: int, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of `after` clusters, in the order of the tokens they began as, which were evenly spaced.

    (B, P, C) → (B, after, C), and (B, P): the cluster of each token. sizes: (B, P), ≥ 0, what each token weighs; None: 1.
    A cluster that loses all its members, or all their weight, keeps its centre.
    """
    points = _points(patches)
    weight = torch.ones_like(points[:, :, :1]) if sizes is None else at_least_float32(sizes.detach())[:, :, None]
    centres = take(points, _evenly_spaced(patches, after))
    weighted = weight * points
    for _ in range(ROUNDS):
        clusters = _nearest_centre(points, centres)
        centres = _means(weighted, weight, clusters, centres)
    # The last means once more, of the tokens as they came: these carry gradients.
    weighted = weight * at_least_float32(patches)
    return _means(weighted, weight, clusters, centres + _mean_token(patches)).to(patches.dtype), clusters


def _points(patches: torch.Tensor) -> torch.Tensor:
    """Tokens for measuring distances: no gradient, enough bits, and the mean taken away, whose square would drown them."""
    return at_least_float32(patches.detach()) - _mean_token(patches)


def _mean_token(patches: torch.Tensor) -> torch.Tensor:
    return at_least_float32(patches.detach()).mean(dim=1, keepdim=True)


def _evenly_spaced(patches: torch.Tensor, after: int) -> torch.Tensor:
    """Ascending indices of tokens, (B, after)."""
    B, P, _ = patches.shape
    return (torch.arange(after, device=patches.device) * P // after).expand(B, -1)


def _squared_distances(points: torch.Tensor) -> torch.Tensor:
    """‖a‖² + ‖b‖² − 2ab, never negative. (B, P, C) → (B, P, P)"""
    with without_autocast(points):
        products = points @ points.transpose(1, 2)
    # Symmetric to the bit, which a product need not be, and 0 on the diagonal: the two members of a pair cost the same,
    # and it is the rule for ties that chooses between them, not the rounding of this batch size.
    squares = products.diagonal(dim1=1, dim2=2)
    return (squares[:, :, None] + squares[:, None, :] - (products + products.transpose(1, 2))).clamp_min(0)


def _nearest_medoid(distances: torch.Tensor, medoids: torch.Tensor) -> torch.Tensor:
    """Each token's cluster; a medoid stays in its own, even where another is equal to it. (B, P)"""
    clusters = take(distances, medoids).min(dim=1).indices
    return clusters.scatter(1, medoids, torch.arange(medoids.shape[1], device=medoids.device).expand_as(medoids))


def _central_members(weighted: torch.Tensor, clusters: torch.Tensor, after: int) -> torch.Tensor:
    """The member of each cluster that is nearest to all its members together. (B, P, P), (B, P) → (B, after)

    weighted: [b, i, j] is what token i pays if j is its medoid. Adding up rows makes the costs of all candidates for
    all clusters in P² additions: no product, and nothing larger than what came in.
    """
    B, P = clusters.shape
    costs = add_at(weighted.new_zeros(B, after, P), clusters, weighted)  # [b, k, j]: what cluster k pays for j
    members = torch.arange(after, device=clusters.device)[:, None] == clusters[:, None, :]  # (B, after, P)
    return torch.where(members, costs, torch.inf).min(dim=2).indices


def _nearest_centre(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Each token's cluster by ‖c‖² − 2xc, the squared distance less ‖x‖², which decides nothing. (B, P)"""
    with without_autocast(points):
        products = points @ centres.transpose(1, 2)  # (B, P, after)
    return torch.sub((centres * centres).sum(dim=2)[:, None, :], products, alpha=2).min(dim=2).indices


def _means(
    weighted: torch.Tensor, weight: torch.Tensor, clusters: torch.Tensor, otherwise: torch.Tensor
) -> torch.Tensor:
    """Weighted mean of each cluster's members; `otherwise` where there is no weight. Adds rows up: no MACs."""
    totals = add_at(torch.zeros_like(otherwise[:, :, :1]), clusters, weight)
    sums = add_at(torch.zeros_like(otherwise), clusters, weighted)
    return torch.where(totals > 0, sums / totals.clamp_min(torch.finfo(totals.dtype).tiny), otherwise)
