"""The operators under one contract; pooling on the grid and the sequence against loops, PiT against its arithmetic."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import one_of_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poolshare.space import OPERATORS
from poolshare.space.operators import grid_of
from poolshare.supernet import count_macs
from poolshare.supernet.block import Attended
from poolshare.supernet.operators.clustering import kmeans, kmedoids
from poolshare.supernet.operators.merging import evit, mstm, random_tokens, tome, topk
from poolshare.supernet.operators.pooling import Pooling, avg2d, max1d, max2d

CHANNELS, HEADS, HEAD_DIM = 8, 2, 4
# What they make of a set of patches depends on the set alone; where a patch stands matters to all others: to those of
# the grid and the sequence, to the plain clusterings (evenly spaced start), to tome (even and odd), to random.
BLIND_TO_POSITION = {"wkmedoids", "mstm", "evit", "topk"}
# Each output token is one input token; all other operators mix.
CHOOSES = {"wkmedoids", "kmedoids", "topk", "random"}


def before_and_after(operator: str) -> tuple[int, int]:
    return (16, 8) if OPERATORS[operator].can_reduce(16, 8) else (16, 4)


def make(operator: str, before: int, after: int, prefix: int = 1, has_cls: bool = True) -> Pooling:
    """The operator as it stands in a model; its learned parts are away from zeros and identities."""
    model = SimpleNamespace(
        num_prefix_tokens=prefix,
        has_class_token=has_cls,
        embed_dim=CHANNELS,
        patch_embed=SimpleNamespace(num_patches=before, grid_size=grid_of(before) or (1, before)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # or the parameters' own initial values would differ with the order of the tests
        pooling = Pooling(operator, before, after, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return pooling


def inputs(before: int, prefix: int = 1, count: int = 2, seed: int = 0) -> tuple[torch.Tensor, Attended]:
    generator = torch.Generator().manual_seed(seed)
    N = prefix + before
    queries, keys = (1.5 * torch.randn(count, HEADS, N, HEAD_DIM, generator=generator) for _ in range(2))
    return torch.randn(count, N, CHANNELS, generator=generator), Attended(queries, keys)


def row_by_row(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of each image sorted by their first channel: equal for equal sets."""
    return torch.stack([image[image[:, 0].argsort()] for image in tokens])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_gives_exactly_what_it_says_it_can(operator, data):
    side, prefix = data.draw(st.integers(2, 7)), data.draw(st.integers(0, 3))
    before = side * side if OPERATORS[operator].needs_grid else data.draw(st.integers(3, 50))
    if operator == "mstm":
        before = side * side  # the model's own grid, on which the multi-scale features are made
    counts = [after for after in range(before + 1) if OPERATORS[operator].can_reduce(before, after)]
    after = data.draw(st.sampled_from(counts))
    tokens, attended = inputs(before, prefix, seed=data.draw(st.integers(0, 99)))
    with torch.no_grad():
        pooled = make(operator, before, after, prefix, has_cls=prefix > 0)(tokens, attended)
    assert pooled.shape == (2, prefix + after, CHANNELS)
    assert pooled.dtype == torch.float32
    assert pooled.isfinite().all()
    if not OPERATORS[operator].changes_prefix:
        assert torch.equal(pooled[:, :prefix], tokens[:, :prefix])
    if operator in CHOOSES:
        chosen = (pooled[:, prefix:, None] == tokens[:, None, prefix:]).all(-1)  # (B, after, before)
        assert (chosen.sum(-1) == 1).all()
        assert (chosen.int().argmax(-1).diff(dim=1) > 0).all()  # distinct, in their order


@pytest.mark.parametrize("operator", OPERATORS)
def test_permuted_patches_give_the_same_set_only_where_position_is_not_looked_at(operator):
    before, after = before_and_after(operator)
    tokens, attended = inputs(before)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(before, generator=torch.Generator())])
    moved = Attended(attended.queries[:, :, order], attended.keys[:, :, order])
    pooling = make(operator, before, after)
    if operator == "mstm":
        del pooling.multi_scale  # it does look at positions; the mergence after it does not
    with torch.no_grad():
        first, second = pooling(tokens, attended)[:, 1:], pooling(tokens[:, order], moved)[:, 1:]
    same = torch.allclose(row_by_row(first), row_by_row(second), atol=1e-5)
    assert same == (operator in BLIND_TO_POSITION)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_input_gives_the_same_bits_whatever_the_other_images_are(operator):
    before, after = before_and_after(operator)
    pooling = make(operator, before, after)
    tokens, attended = inputs(before, count=3)
    others, other_attended = inputs(before, count=3, seed=1)
    pairs = zip((tokens, *attended[:2]), (others, *other_attended[:2]), strict=True)
    mixed = [torch.cat([mine[:1], other[1:]]) for mine, other in pairs]
    with torch.no_grad():
        expected = pooling(tokens, attended)
        assert torch.equal(pooling(tokens, attended), expected)
        assert torch.equal(pooling(mixed[0], Attended(*mixed[1:]))[0], expected[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_reach_the_chosen_tokens_or_all_that_were_mixed(operator):
    before, after = before_and_after(operator)
    pooling = make(operator, before, after)
    tokens, attended = inputs(before)
    pooled = pooling(tokens.requires_grad_(), attended)
    (pooled * torch.linspace(1, 2, pooled.numel()).view_as(pooled)).sum().backward()
    assert tokens.grad is not None
    reached = (tokens.grad[:, 1:].abs().sum(-1) > 0).sum(-1)
    assert tokens.grad[:, :1].abs().min() > 0
    if operator in CHOOSES:
        assert (reached == after).all()
    elif "max" in operator:
        assert (reached >= after).all()
    else:
        assert (reached == before).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pooling.parameters())


@pytest.mark.parametrize(
    "run",
    [
        lambda x, s: kmedoids(x, 3)[0],
        lambda x, s: kmedoids(x, 3, s)[0],
        lambda x, s: kmeans(x, 3)[0],
        lambda x, s: kmeans(x, 3, s.detach())[0],
        lambda x, s: topk(x, s, 3)[0],
        lambda x, s: evit(x, s, 3)[0],
        lambda x, s: mstm(x, s, 3)[0],
        lambda x, s: tome(x, x[:, :, :2], 3)[0],
        lambda x, s: max1d(x, 4),
    ],
    ids=["kmedoids", "wkmedoids", "kmeans", "weighted kmeans", "topk", "evit", "mstm", "tome", "max1d"],
)
def test_derivatives_are_those_of_the_function_in_float64(run):
    """Choices are constant around almost every input, so finite differences see what the gradient must be."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    scores = torch.rand(2, 7, generator=generator, dtype=torch.float64) + 0.1
    assert run(patches, scores).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: run(x, scores), (patches,))


@pytest.mark.parametrize("operator", OPERATORS)
def test_bfloat16_decides_as_float32_does_and_rounds_only_the_result(operator):
    before, after = before_and_after(operator)
    tokens, attended = inputs(before)
    tokens = 4 + tokens  # a common offset is what makes narrow distances useless
    half = tokens.bfloat16(), Attended(*(tensor.bfloat16() for tensor in attended[:2]))
    full = half[0].float(), Attended(*(tensor.float() for tensor in half[1][:2]))
    pooling = make(operator, before, after).bfloat16()
    with torch.no_grad():
        pooled, expected = pooling(*half), pooling.float()(*full)
    assert pooled.dtype == torch.bfloat16
    if OPERATORS[operator].learned:  # convolutions round in between
        torch.testing.assert_close(pooled.float(), expected, rtol=0.05, atol=0.05)
    else:
        assert torch.equal(pooled, expected.bfloat16())


@pytest.mark.parametrize("operator", sorted(OPERATORS.keys() - {"max2d_conv", "max1d_conv", "pit", "mstm"}))
def test_autocast_does_not_narrow_what_decides(operator):
    after = 32 if OPERATORS[operator].can_reduce(64, 32) else 16
    tokens, attended = inputs(64)
    tokens, keys = 1 + 0.2 * tokens, 1 + 0.2 * attended.keys  # all alike at first sight
    pooling = make(operator, 64, after)
    with torch.no_grad():
        expected = pooling(tokens, Attended(attended.queries, keys))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pooling(tokens, Attended(attended.queries, keys)), expected)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_numbers_of_a_diverged_run_raise_nothing_and_stay_in_their_image(operator, value):
    """An index out of range would end a process on CUDA, where a training loop could have reported the loss."""
    before, after = before_and_after(operator)
    tokens, attended = inputs(before)
    pooling = make(operator, before, after)
    with torch.no_grad():
        expected = pooling(tokens, attended)
        tokens[1] *= value
        attended.queries[1] *= value
        assert torch.equal(pooling(tokens, attended)[0], expected[0])


class Exportable(nn.Module):
    def __init__(self, pooling: Pooling):
        super().__init__()
        self.pooling = pooling

    def forward(self, tokens: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.pooling(tokens, Attended(queries, keys))


@pytest.mark.parametrize("operator", one_of_each(OPERATORS, "max2d", "kmeans", "tome"))
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non-strict", "strict"])
def test_exported_programs_take_any_batch_size(operator, strict):
    before, after = before_and_after(operator)
    module = Exportable(make(operator, before, after)).eval()
    (tokens, attended), (more, more_attended) = inputs(before), inputs(before, count=3, seed=1)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(module, (tokens, *attended[:2]), dynamic_shapes=(batch,) * 3, strict=strict)
    with torch.no_grad():
        expected = module(more, *more_attended[:2])
        torch.testing.assert_close(program.module()(more, *more_attended[:2]), expected, rtol=1e-5, atol=1e-5)


P, K, C = 196, 49, 192  # ViT-Tiny, 14 → 7


@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda x, s: max2d(x, K), 0),
        (lambda x, s: avg2d(x, K), P * C),  # fvcore counts input elements
        (lambda x, s: max1d(x, K), 0),
        (lambda x, s: kmedoids(x, K)[0], P * P * C),
        (lambda x, s: kmedoids(x, K, s)[0], P * P * C),
        (lambda x, s: kmeans(x, K)[0], 5 * P * K * C),
        (lambda x, s: mstm(x, s, K)[0], K * (P - K) * C),
        (lambda x, s: tome(x, x[:, :, :64], 100)[0], 98 * 98 * 64),
        (lambda x, s: tome(x, x[:, :, :64], 97)[0], (98 * 98 + 49 * 49) * 64),  # one pair more than a step can merge
        (lambda x, s: tome(x[:, :25], x[:, :25, :64], 13)[0], 13 * 12 * 64),
        (lambda x, s: tome(x[:, :25], x[:, :25, :64], 12)[0], (13 * 12 + 7 * 6) * 64),  # 12 of 25, then 1 of 13
        (lambda x, s: evit(x, s, K)[0], 0),
        (lambda x, s: topk(x, s, K)[0], 0),
        (lambda x, s: random_tokens(x, K)[0], 0),
    ],
)
def test_fvcore_counts_the_formula_of_each_function(run, macs):
    class Wrapped(nn.Module):
        def forward(self, patches: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return run(patches, scores)

    assert count_macs(Wrapped(), (torch.randn(1, P, C), torch.rand(1, P))) == macs


def test_grid_pooling_equals_loops_over_cells():
    patches = torch.randn(2, 49, 3)
    grid = patches.reshape(2, 7, 7, 3)
    for after in (4, 9, 16, 25, 36):
        side = math.isqrt(after)
        edges = [(i * 7 // side, -(-(i + 1) * 7 // side)) for i in range(side)]
        cells = [grid[:, top:bottom, left:right].flatten(1, 2) for top, bottom in edges for left, right in edges]
        assert torch.equal(max2d(patches, after), torch.stack([cell.amax(1) for cell in cells], 1))
        torch.testing.assert_close(avg2d(patches, after), torch.stack([cell.mean(1) for cell in cells], 1))


def test_max1d_equals_a_loop_over_neighbours_and_repeats():
    patches = torch.randn(2, 13, 3)
    expected = patches
    for after in (7, 4, 2, 1):
        count = expected.shape[1]
        steps = [expected[:, max(i - 1, 0) : i + 2].amax(1) for i in range(0, count, 2)]
        expected = torch.stack(steps, 1)
        assert torch.equal(max1d(patches, after), expected)


@pytest.mark.parametrize(("side", "smaller", "stride"), [(14, 7, 2), (7, 4, 2), (14, 5, 3), (14, 4, 4)])
def test_pit_is_one_strided_convolution_and_one_linear(side, smaller, stride):
    pooling = make("pit", side**2, smaller**2)
    tokens, _ = inputs(side**2)
    prefix, patches = tokens[:, :1], tokens[:, 1:]
    kernel, padding = stride + 1, stride // 2
    padded = F.pad(patches.reshape(2, side, side, CHANNELS), (0, 0, padding, padding, padding, padding))
    weight, bias = pooling.conv.weight, pooling.conv.bias
    assert weight.shape == (CHANNELS, 1, kernel, kernel)
    expected = [
        (padded[:, y : y + kernel, x : x + kernel] * weight[:, 0].permute(1, 2, 0)).sum((1, 2)) + bias
        for y in range(0, smaller * stride, stride)
        for x in range(0, smaller * stride, stride)
    ]
    pooled = pooling(tokens, None)
    torch.testing.assert_close(pooled[:, 1:], torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled[:, :1], prefix @ pooling.prefix.weight.T + pooling.prefix.bias)


@pytest.mark.parametrize("side", range(2, 15))
def test_pit_looks_at_every_patch(side):
    """A stride that reaches the right count may still leave out the last rows, as 4 does from 8 rows to 2."""
    for after in range(1, side**2):
        if OPERATORS["pit"].can_reduce(side**2, after):
            tokens = torch.ones(1, 1 + side**2, CHANNELS, requires_grad=True)
            grid = SimpleNamespace(num_patches=side**2, grid_size=(side, side))
            model = SimpleNamespace(num_prefix_tokens=1, has_class_token=True, embed_dim=CHANNELS, patch_embed=grid)
            Pooling("pit", side**2, after, model)(tokens, None).sum().backward()
            assert tokens.grad is not None
            assert tokens.grad.min() > 0, (side**2, after)
