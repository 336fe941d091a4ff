"""Importance, and what ranks, fuses and merges: cases worked by hand, with the arithmetic shown."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poolshare.supernet.block import QUERIES_AT_ONCE, Attended
from poolshare.supernet.operators.merging import MultiScale, evit, importance, mstm, random_tokens, received, tome, topk


def attended_by(attention: torch.Tensor) -> Attended:
    """Queries and keys whose map is this one: the logarithms as queries, and unit vectors as keys."""
    keys = torch.eye(attention.shape[-1], dtype=attention.dtype).expand_as(attention)
    return Attended(attention.log(), keys, scale=1.0)


def test_importance_is_the_mean_over_heads_from_cls_or_what_a_token_receives():
    attention = torch.tensor([[[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.4, 0.0]]] * 2], dtype=torch.float64)
    attention[0, 1, 0] = torch.tensor([1e-9, 0.9, 0.1])
    attended = attended_by(attention.clamp_min(1e-9))
    assert importance(attended, 1, has_cls=True)[0].tolist() == pytest.approx([0.7, 0.2])
    # Over both heads: 0.5 + 0.1 + 0.4 and 0.9 + 0.1 + 0.4; 0.3 + 0.8 + 0.0 and 0.1 + 0.8 + 0.0.
    assert received(attended, 1)[0].tolist() == pytest.approx([2.4, 2.0])
    assert importance(attended, 1, has_cls=False)[0].tolist() == pytest.approx([2.4, 2.0])
    assert importance(attended, 0, has_cls=False)[0].tolist() == pytest.approx([1.6, 2.4, 2.0])


@pytest.mark.parametrize("N", [1, 64, 65, 197])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_scores_are_rows_and_columns_of_the_whole_map(N, scale):
    generator = torch.Generator().manual_seed(N)
    queries, keys = (torch.randn(2, 3, N, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    attention = (queries @ keys.transpose(2, 3) * (scale or 8**-0.5)).softmax(-1)  # (B, heads, N, N)
    attended = Attended(queries, keys, scale)
    torch.testing.assert_close(attended.class_row(), attention[:, :, 0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(attended.received(), attention.sum(dim=(1, 2)), rtol=1e-12, atol=1e-15)


def test_attention_received_never_holds_more_rows_of_the_map_than_a_block(monkeypatch):
    largest = []

    def seen(scores, *arguments, **options):
        largest.append(scores.shape[2])
        return softmax(scores, *arguments, **options)

    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", seen)
    Attended(torch.randn(1, 2, 500, 4), torch.randn(1, 2, 500, 4)).received()
    assert max(largest) == QUERIES_AT_ONCE
    assert sum(largest) == 500


def test_scores_of_bfloat16_queries_and_keys_are_not_rounded_to_bfloat16():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, 3, 51, 8, generator=generator).bfloat16() for _ in range(2))
    for has_cls in (True, False):
        expected = importance(Attended(queries.double(), keys.double()), 1, has_cls)
        found = importance(Attended(queries, keys), 1, has_cls)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_equal_scores_go_to_the_lower_index():
    patches = torch.arange(40.0).reshape(1, 40, 1)
    scores = torch.zeros(1, 40)
    scores[0, 30] = 1
    assert topk(patches, scores, 4)[0].flatten().tolist() == [0, 1, 2, 30]
    assert evit(patches, scores, 4)[0].flatten().tolist()[:3] == [0, 1, 30]
    assert evit(patches, scores * 0, 4)[0].flatten().tolist()[:3] == [0, 1, 2]


def test_random_positions_are_spread_and_the_same_for_all_images_and_calls():
    positions = torch.arange(196, dtype=torch.float32).reshape(1, 196, 1).expand(3, -1, -1)
    chosen = random_tokens(positions, 49)[0]
    assert torch.equal(chosen, random_tokens(positions, 49)[0])
    assert (chosen == chosen[:1]).all()
    assert (chosen.diff(dim=1) > 0).all()
    draws = [random_tokens(positions[:1, :count], count // 4)[0].flatten() / count for count in range(60, 196)]
    assert 0.48 < torch.cat(draws).mean() < 0.52
    assert 0.27 < torch.cat(draws).std() < 0.31  # uniform: 0.289


def test_multi_scale_is_the_identity_at_first_and_its_formula_later():
    channels = 8
    module, grid = MultiScale(channels), torch.randn(2, channels, 5, 5)
    assert torch.equal(module(grid), grid)
    with torch.no_grad():
        nn.init.normal_(module.fuse.weight)
    near = F.conv2d(grid, module.fine.weight, module.fine.bias, padding=1, groups=channels)
    wide = F.conv2d(grid, module.coarse.weight, module.coarse.bias, padding=2, groups=channels)
    projected = (module.fuse.weight[:, :, 0, 0] @ torch.cat([near, wide], 1).flatten(2)).view_as(grid)
    torch.testing.assert_close(module(grid), grid + projected, rtol=1e-4, atol=1e-5)


def column(*values):
    return torch.tensor([[[float(value)] for value in values]])


def test_evit_by_hand():
    """Kept: the two highest, 20 and 50. Fused: (0.1·10 + 0.2·30 + 0.05·40) / 0.35 = 9 / 0.35."""
    pooled = evit(column(10, 20, 30, 40, 50), torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25]]), 3)[0]
    assert pooled.flatten().tolist() == pytest.approx([20, 50, 9 / 0.35])
    # Nothing to weigh by: finite, whatever it is.
    assert evit(column(10, 20, 30, 40, 50), torch.zeros(1, 5), 3)[0].isfinite().all()


def test_mstm_by_hand():
    """Kept: (1, 0) and (0, 2). (3, 0) is parallel to the first, cos 1. (1, 1) is as like the one as the other, cos √½:
    the first gets it. First: (e·(1, 0) + e·(3, 0) + e^√½·(1, 1)) / (2e + e^√½). The second gets nothing and stays."""
    patches = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]], dtype=torch.float64)
    pooled = mstm(patches, torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)[0]
    e, diagonal = math.e, math.exp(math.sqrt(0.5))
    assert pooled[0, 0].tolist() == pytest.approx(
        [(4 * e + diagonal) / (2 * e + diagonal), diagonal / (2 * e + diagonal)]
    )
    assert pooled[0, 1].tolist() == pytest.approx([0, 2])


def test_tome_by_hand_one_pair():
    """A: tokens 0, 2; B: tokens 1, 3. Best of 0 is 1 (cos 1), best of 2 is 3 (cos √½): one merge makes (10 + 20) / 2."""
    keys = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    assert tome(column(10, 20, 30, 40), keys, 3)[0].flatten().tolist() == pytest.approx([15, 30, 40])
    assert tome(column(10, 20, 30, 40), keys, 2)[0].flatten().tolist() == pytest.approx([15, 35])


def test_tome_by_hand_in_two_steps():
    """Six tokens to two take a step of three merges and one of one.

    First step, A: 0, 2, 4; B: 1, 3, 5. Keys by angle: 0 → 1 (0° and 0°), 2 → 1 (10°), 4 → 5 (80° and 90°). Left:
    tokens 1: (10 + 20 + 30) / 3 = 20, size 3, mean key near 3°; 3: 40, size 1, 50°; 5: (50 + 60) / 2 = 55, size 2, 85°.
    Second step, A: 20 and 55; B: 40. cos(85° − 50°) > cos(50° − 3°): 55 joins 40: (1·40 + 2·55) / 3 = 50.
    """
    angles = torch.tensor([0.0, 0, 10, 50, 80, 90]) * math.pi / 180
    keys = torch.stack([angles.cos(), angles.sin()], -1)[None]
    assert tome(column(10, 20, 30, 40, 50, 60), keys, 3)[0].flatten().tolist() == pytest.approx([20, 40, 55])
    assert tome(column(10, 20, 30, 40, 50, 60), keys, 2)[0].flatten().tolist() == pytest.approx([20, 50])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.data())
def test_tome_down_to_one_token_is_the_mean_of_all(count, data):
    """However the pairs are chosen, sizes make every token count once."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    patches = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(tome(patches, keys, 1)[0][:, 0], patches.mean(1))
