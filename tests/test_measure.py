"""Tables of costs against fvcore on the exported model, the hand formulas, and the parameters that are there."""

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from conftest import one_of_each, randomise
from timm.layers import RmsNorm, get_act_layer
from torch import nn

import poolshare.supernet.measure as measure_module
from poolshare.space import OPERATORS, Architecture, CostTable, ModelError, SearchSpace
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_latency, measure_macs, measure_parameters
from poolshare.supernet.counting import counted, reduction_class, reduction_terms
from poolshare.supernet.measure import FREE_OPERATORS, Parts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS

TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 7, "img_size": 64}
GRID = SearchSpace(4, (16, 9, 4), ("max2d", "avg2d"), 3)
CASES: dict[str, tuple[str, SearchSpace, dict[str, Any]]] = {
    "cls": ("deit_tiny_patch16_224", GRID, TINY),
    "no sharing": ("vit_tiny_patch16_224", SearchSpace(4, (16, 4, 1), ("avg2d",), 1), TINY),
    "registers": ("vit_base_patch16_reg4_gap_256", GRID, TINY),
    "query-key norm": ("vit_tiny_patch16_224", GRID, {**TINY, "qk_norm": True}),
    "no bias in qkv": ("vit_tiny_patch16_224", GRID, {**TINY, "qkv_bias": False}),
    "scale norms": ("vit_tiny_patch16_224", GRID, {**TINY, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "layer scale": ("deit3_small_patch16_224", GRID, TINY),
    "attention-pooled": ("vit_base_patch16_siglip_224", GRID, TINY),
    "max of tokens": ("vit_tiny_patch16_224", GRID, {**TINY, "global_pool": "avgmax"}),
    "no head": ("vit_tiny_patch16_224", GRID, {**TINY, "num_classes": 0}),
    "wide MLP, grey": ("vit_tiny_patch16_224", GRID, {**TINY, "mlp_ratio": 3.0, "in_chans": 1}),
    "distilled": ("deit_tiny_distilled_patch16_224", GRID, TINY),
    "hybrid, stem alone": ("vit_tiny_r_s16_p8_224", GRID, {**TINY, "patch_size": 4}),
    "hybrid, averages in its ResNet": ("vit_small_resnet50d_s16_224", GRID, TINY),
    "RMSNorm": ("vit_tiny_patch16_224", GRID, {**TINY, "norm_layer": "rmsnorm", "qk_norm": True}),
    "dynamic size, padding": (
        "vit_tiny_patch16_224",
        GRID,
        {**TINY, "dynamic_img_size": True, "dynamic_img_pad": True},
    ),
    "12 channels": ("vit_tiny_patch16_224", GRID, {**TINY, "in_chans": 12}),
    "digits": ("digits_vit", SearchSpace(8, (64, 36, 16, 4), ("max2d",), 3), {}),
}


def make(case: str, sharing: str = "qk") -> SuperNet:
    name, space, options = CASES[case]
    return SuperNet.from_timm(name, space, sharing=sharing, **options)


def image_for(net: SuperNet) -> torch.Tensor:
    return torch.zeros(1, net.in_chans, *net.patch_embed.img_size)


def some_architectures(space: SearchSpace) -> list[Architecture]:
    drawn = [space.sample(random.Random(seed)) for seed in range(3)]
    return [space[0], space[space.size - 1], *drawn]


def raw_fvcore(model: nn.Module, images: torch.Tensor) -> int:
    """fvcore on the model as it is, with one handle, written here: a fused product of (N, D) queries and M keys."""

    def fused(inputs: list[Any], outputs: list[Any]) -> int:
        queries, keys = inputs[0].type().sizes(), inputs[1].type().sizes()
        return prod(queries) * keys[-2] + prod(queries[:-1]) * keys[-2] * keys[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model.eval(), images)
        analysis.set_op_handle("aten::scaled_dot_product_attention", fused)
        analysis.set_op_handle("aten::rms_norm", lambda inputs, _: prod(inputs[0].type().sizes()) * 3)
        # ResNet-D's averages halve an even map: each pixel is added once.
        analysis.set_op_handle("aten::avg_pool2d", lambda inputs, _: prod(inputs[0].type().sizes()))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total = analysis.total()
    assert total == int(total)
    return int(total)


SOME = (
    "cls",
    "registers",
    "query-key norm",
    "layer scale",
    "attention-pooled",
    "hybrid, stem alone",
    "RMSNorm",
    "digits",
)
SLOW_CASES = one_of_each(CASES, *SOME)


@pytest.mark.parametrize("case", SLOW_CASES)
def test_the_table_is_fvcore_on_the_exported_model_to_the_integer(case: str):
    net = make(case)
    table = measure_macs(net)
    for architecture in some_architectures(net.space):
        model = Subnet.from_supernet(net, architecture)
        assert table.total(architecture) == raw_fvcore(model, image_for(net)), str(architecture)
        assert table.total(architecture) == count_macs(model, (image_for(net),)), str(architecture)


@pytest.mark.parametrize("case", one_of_each(("cls", "attention-pooled", "digits"), "cls"))
@pytest.mark.parametrize("sharing", ["qk", "map"])
def test_the_table_is_fvcore_in_both_sharings_with_fused_attention_and_without(case: str, sharing: str, kernel: str):
    net = make(case, sharing)
    table = measure_macs(net)
    for architecture in some_architectures(net.space):
        model = Subnet.from_supernet(net, architecture)
        fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
        assert set(fused) == {kernel == "fused"}
        assert table.total(architecture) == raw_fvcore(model, image_for(net)), str(architecture)


def test_fused_attention_is_there_to_be_missed():
    """Else the tests above would compare unfused with unfused: plain fvcore counts a fused model too low."""
    net = make("cls")
    model = Subnet.from_supernet(net, net.space[0]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missed = FlopCountAnalysis(model, image_for(net))
        missed.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        assert measure_macs(net).total(net.space[0]) - missed.total() == 4 * 2 * 17 * 17 * 32


@pytest.mark.parametrize("case", SLOW_CASES)
def test_parameters_are_those_of_the_exported_model(case: str):
    net = make(case)
    table = measure_parameters(net)
    for architecture in some_architectures(net.space):
        model = Subnet.from_supernet(net, architecture)
        assert table.total(architecture) == sum(parameter.numel() for parameter in model.parameters())
    assert table.quantity == "parameters"


def by_hand(
    width: int, prefix: int, levels: tuple[int, ...], patch: int, channels: int, classes: int, of_follower: int = 2
) -> CostTable:
    """MACs by hand, r = 4, a head on CLS after a norm over all tokens.

    of_follower: N²d products of a block that shares: QKᵀ and the map times V, or the latter alone.
    """

    def block(tokens: int, products: int, inputs: int) -> int:
        return (inputs + 1 + 8) * tokens * width**2 + products * tokens**2 * width + 10 * tokens * width

    n = {level: level + prefix for level in levels}
    return CostTable(
        "macs",
        source=patch**2 * channels * width * levels[0],
        own={level: block(n[level], 2, 3) for level in levels},
        shared={level: block(n[level], of_follower, 1) for level in levels},
        pool={
            (operator, before, after): 0 if operator == "max2d" else width * before
            for before in levels
            for after in levels
            if after < before
            for operator in ("max2d", "avg2d")
        },
        sink={level: 5 * n[level] * width + width * classes for level in levels},
    )


@pytest.mark.parametrize(("sharing", "of_follower"), [("qk", 2), ("map", 1)])
def test_every_edge_costs_what_the_hand_formulas_say(sharing: str, of_follower: int):
    assert measure_macs(make("cls", sharing)) == by_hand(32, 1, (16, 9, 4), 16, 3, 7, of_follower)


def test_deit_tiny_has_the_published_numbers():
    space = SearchSpace(12, (196, 100, 49), ("max2d", "avg2d"), 3)
    net = SuperNet.from_timm("deit_tiny_patch16_224", space)
    macs, parameters = measure_macs(net), measure_parameters(net)
    assert macs == by_hand(192, 1, (196, 100, 49), 16, 3, 1000)
    assert macs.own[196] == 102_427_392
    assert macs.shared[196] == 87_902_976  # 2Nd² less; a follower that reads a written map takes N²d less again
    assert macs.total(space[0]) == 1_258_411_200
    assert parameters.total(space[0]) == sum(p.numel() for p in net.parameters()) == 5_717_416
    assert parameters.own[196] - parameters.shared[196] == 2 * 192**2 + 2 * 192
    architecture = Architecture.parse("196*2 100@avg2d*3 100*2 49@max2d*3 49*2")
    model = Subnet.from_supernet(net, architecture)
    assert macs.total(architecture) == raw_fvcore(model, torch.zeros(1, 3, 224, 224))
    assert parameters.total(architecture) == sum(p.numel() for p in model.parameters())
    net.sharing = "map"
    assert measure_macs(net).shared[196] == 80_451_648


# Many sizes from few traces

GRIDS, SEQUENCES = (64, 49, 36, 25, 16, 9, 4), (64, 49, 32, 31, 16, 13, 8, 4, 2)  # parities, halves


# One of each law: clusters cost alike by any distance, and so does matching, whatever attention does with sizes.
@pytest.mark.parametrize(
    "operator", one_of_each(OPERATORS, *(OPERATORS.keys() - {"kmedoids", "wkmedoids", "tome_prop"}))
)
def test_every_reduction_costs_what_fvcore_traces_though_few_are_traced(operator: str):
    levels = GRIDS if OPERATORS[operator].needs_grid else SEQUENCES
    reached = [levels[0], *(level for level in levels[1:] if OPERATORS[operator].can_reduce(levels[0], level))]
    options = {"depth": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 3, "img_size": 128}
    net = SuperNet.from_timm("vit_tiny_patch16_224", SearchSpace(2, tuple(reached), (operator,)), **options)
    table, part = measure_macs(net), Parts(net)
    with torch.no_grad():
        for reduction in random.Random(0).sample(net.space.reductions, min(5, len(net.space.reductions))):
            assert table.pool[reduction] == count_macs(*part(("pool", *reduction))), reduction
        level = reached[len(reached) // 2 + 1 :][0] if len(reached) > 3 else reached[-1]
        assert table.own[level] == count_macs(*part(("own", level)))
        assert table.shared[level] == count_macs(*part(("shared", level)))
        assert table.sink[level] == count_macs(*part(("sink", level)))


def test_thirty_levels_and_two_operators_are_measured_by_some_dozens_of_traces(monkeypatch: pytest.MonkeyPatch):
    levels = tuple(range(196, 46, -5))
    space = SearchSpace(2, levels, ("tome", "topk"))
    net = SuperNet.from_timm("vit_tiny_patch16_224", space, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    traced = []
    monkeypatch.setattr(measure_module, "_TRACED", {})
    monkeypatch.setattr(measure_module, "count_macs", lambda *given: traced.append(given) or count_macs(*given))
    table = measure_macs(net)
    assert len(levels) == 30
    assert len(table.pool) == 2 * 30 * 29 // 2
    assert len(traced) < 75
    for seed in range(2):
        architecture = space.sample(random.Random(seed))
        assert table.total(architecture) == raw_fvcore(Subnet.from_supernet(net, architecture), image_for(net))


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("a term that is not known", lambda before, after: before**3),
        ("a break", lambda before, after: before * after + (7 if after < 5 else 0)),
        ("one that is different in the middle", lambda before, after: 5 * before + (before == 11)),
        ("the pairs of the first halving alone", lambda before, after: (before // 2) * (before - before // 2)),
        ("halves of units", lambda before, after: before * after // 2),
    ],
)
def test_what_does_not_follow_from_a_few_sizes_is_counted_at_every_one(name: str, cost: Callable[[int, int], int]):
    sizes = [(before, after) for before in range(1, 14) for after in range(1, before)]
    asked = Counter()

    def count(size: tuple[int, int]) -> int:
        asked[size] += 1
        return cost(*size)

    expected = {size: cost(*size) for size in sizes}
    found = counted(sizes, lambda size: reduction_terms(*size), count, lambda size: reduction_class(*size))
    assert set(asked.values()) == {1}
    if name != "one that is different in the middle":
        assert found == expected
        assert set(asked) == set(sizes)


def test_what_follows_is_counted_at_a_few_sizes_alone():
    sizes = [(before, after) for before in range(1, 40) for after in range(1, before)]
    asked = []

    def cost(size: tuple[int, int]) -> int:
        before, after = size
        total = 3 + 2 * before + 7 * before * after
        while before > after:
            total += (before // 2) * (before - before // 2)
            before -= before // 2
        return total

    for given in (sizes, sizes[:5], sizes[:1], []):
        asked.clear()
        found = counted(
            given,
            lambda size: reduction_terms(*size),
            lambda size: asked.append(size) or cost(size),
            lambda size: reduction_class(*size),
        )
        assert found == {size: cost(size) for size in given}
        assert list(found) == given
        assert len(asked) == len(set(asked)) <= min(len(given), 40)


# What cannot be counted


class Distances(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, x)


class Einsum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnc,bmc->bnm", x, x)


class Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.norm(x, dim=-1).cumsum(-1)


@pytest.mark.parametrize(
    ("module", "names"),
    [(Distances(), ["cdist"]), (Sorting(), ["cumsum", "linalg_vector_norm"])],
)
def test_an_operator_that_is_neither_counted_nor_free_is_an_error_naming_it(module: nn.Module, names: list[str]):
    with pytest.raises(ModelError) as caught:
        count_macs(module, (torch.zeros(2, 8, 4),))
    message = str(caught.value)
    assert type(module).__name__ in message
    assert "matmul" in message
    assert "FREE_OPERATORS" in message
    assert any(name in message for name in names)


class Matmul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.transpose(1, 2)


@pytest.mark.parametrize(("tokens", "width"), [(8, 4), (17, 32), (197, 192)])
def test_distances_count_exactly_as_matmul_and_are_refused_as_einsum(tokens: int, width: int):
    images = (torch.zeros(1, tokens, width),)
    assert count_macs(Matmul(), images) == tokens**2 * width
    with pytest.raises(ModelError, match="cannot exactly count einsum in Einsum"):
        count_macs(Einsum(), images)


def test_a_supernet_with_an_uncountable_part_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure_module, "_TRACED", {})  # what its base model was counted as
    net = make("cls")
    net.blocks[0].mlp = nn.Sequential(nn.Softplus())
    with pytest.raises(ModelError, match="fvcore cannot exactly count softplus"):
        measure_macs(net)


def test_nothing_that_fvcore_counts_is_called_free():
    counted = {name.removeprefix("aten::") for name, handle in _DEFAULT_SUPPORTED_OPS.items() if handle is not None}
    assert "matmul" in counted
    assert counted.isdisjoint(FREE_OPERATORS)


# What fvcore does not count by itself, against hand arithmetic


ACTIVATIONS = (
    "mish", "hard_swish", "elu", "tanh", "leaky_relu", "relu6", "hard_sigmoid", "celu", "selu", "prelu", "relu", "silu",
    "sigmoid", "gelu_tanh", "quick_gelu",
)  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_free_and_the_layers_around_it_count_as_ever(name: str):
    layers = nn.Sequential(nn.Linear(8, 32), get_act_layer(name)(), nn.Linear(32, 8))
    assert count_macs(layers, (torch.zeros(1, 5, 8),)) == 5 * 8 * 32 * 2


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(1, 17, 32), (2, 3, 5, 8)])
def test_rms_norm_counts_its_squares_its_scaling_and_its_weight(shape: tuple[int, ...], affine: bool):
    norm = nn.RMSNorm(shape[-1], elementwise_affine=affine)
    squares, scaled, weighted = prod(shape), prod(shape), prod(shape) if affine else 0
    assert count_macs(norm, (torch.zeros(shape),)) == squares + scaled + weighted
    assert count_macs(RmsNorm(shape[-1], affine=affine), (torch.zeros(shape),)) == squares + scaled + weighted


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding", "ceil"),
    [(8, 2, 2, 0, False), (7, 2, 2, 0, True), (7, 3, 2, 1, False), (9, 3, 1, 1, True), (8, 3, None, 0, False)],
)
def test_an_average_counts_the_pixels_in_its_windows(
    side: int, kernel: int, stride: int | None, padding: int, ceil: bool
):
    images = torch.ones(2, 3, side, side)
    windows = nn.functional.avg_pool2d(images, kernel, stride, padding, ceil, divisor_override=1)  # their sizes
    module = nn.AvgPool2d(kernel, stride, padding, ceil, count_include_pad=False)
    assert count_macs(module, (images,)) == windows.sum()


class Moves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wider = nn.functional.pad(x, (0, 1, 0, 1))
        return nn.functional.max_pool2d(wider, 2).flatten().reshape_as(wider[:, :, ::2, ::2])


def test_choices_padding_and_reshaping_cost_nothing():
    assert count_macs(nn.Sequential(Moves(), nn.Linear(4, 4)), (torch.zeros(1, 2, 7, 7),)) == 2 * 4 * 4 * 4


# What scores by attention


def test_a_score_by_attention_counts_its_products_as_the_poolings_own():
    operators = ("topk", "evit", "wkmedoids", "tome")
    space = SearchSpace(2, (16, 8), operators)
    cls = measure_macs(SuperNet.from_timm("vit_tiny_patch16_224", space, **TINY | {"depth": 2})).pool
    no_cls = measure_macs(SuperNet.from_timm("vit_base_patch16_gap_224", space, **TINY | {"depth": 2})).pool
    clustering, matching = 16 * 16 * 32, 8 * 8 * 16  # distances of all pairs; half of the keys with the other half
    assert [cls[name, 16, 8] for name in operators] == [17 * 32, 17 * 32, clustering + 17 * 17 * 32, matching]
    assert [no_cls[name, 16, 8] for name in operators] == [16 * 16 * 32] * 2 + [clustering + 16 * 16 * 32, matching]


# Measuring leaves everything as it was


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_neither_modes_nor_weights_nor_gradients(training: bool):
    net = make("cls").train(training)
    randomise(net)
    net.blocks[2].eval()  # a frozen part
    net.head.train()
    modes = {name: module.training for name, module in net.named_modules()}
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    measure_macs(net)
    measure_parameters(net)
    count_macs(net, (image_for(net),))
    measure_latency(net, image_for(net), repeats=1)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_dropout_is_measured_as_in_evaluation():
    rates = {"drop_path_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5}
    noisy = SuperNet.from_timm("deit_tiny_patch16_224", GRID, **TINY, **rates)
    assert measure_macs(noisy.train()) == measure_macs(make("cls"))


def test_modes_come_back_when_counting_fails():
    module = nn.Sequential(Distances(), nn.Dropout())
    module[1].eval()
    with pytest.raises(ModelError):
        count_macs(module, (torch.zeros(2, 8, 4),))
    assert [module.training, module[0].training, module[1].training] == [True, True, False]


# Latency


class Sleeper(nn.Module):
    """Sleeps for the given milliseconds, one after the other, and remembers its mode and whether gradients were on."""

    def __init__(self, *milliseconds: float):
        super().__init__()
        self.milliseconds, self.seen = list(milliseconds), []  # type: ignore[var-annotated]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, torch.is_grad_enabled()))
        time.sleep(self.milliseconds.pop(0) / 1e3)
        return images


def test_latency_is_the_median_in_milliseconds_after_a_warm_up():
    sleeper = Sleeper(200, 200, 30, 1, 30, 30, 200)  # two to warm up, then five whose median is 30
    assert 30 <= measure_latency(sleeper, torch.zeros(1), repeats=5) < 150
    assert sleeper.milliseconds == []
    assert set(sleeper.seen) == {(False, False)}
    assert sleeper.training
