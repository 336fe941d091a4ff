"""Tables of costs against fvcore on the exported model, the hand formulas, and the parameters that are there."""

import random
import time
import warnings
from math import prod
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import nn

from poolshare.space import Architecture, CostTable, ModelError, SearchSpace
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_latency, measure_macs, measure_parameters
from poolshare.supernet.measure import FREE_OPERATORS

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
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total = analysis.total()
    assert total == int(total)
    return int(total)


@pytest.mark.parametrize("case", CASES)
def test_the_table_is_fvcore_on_the_exported_model_to_the_integer(case: str):
    net = make(case)
    table = measure_macs(net)
    for architecture in some_architectures(net.space):
        model = Subnet.from_supernet(net, architecture)
        assert table.total(architecture) == raw_fvcore(model, image_for(net)), str(architecture)
        assert table.total(architecture) == count_macs(model, (image_for(net),)), str(architecture)


@pytest.mark.parametrize("case", ["cls", "attention-pooled", "digits"])
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


@pytest.mark.parametrize("case", CASES)
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
    """ALGORITHMS section 6, r = 4, a head on CLS after a norm over all tokens.

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


# What cannot be counted


class Distances(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, x)


class Einsum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bnc,bmc->bnm", x, x)


class PlainPooling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x[None], 2)


class Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.norm(x, dim=-1).cumsum(-1)


@pytest.mark.parametrize(
    ("module", "names"),
    [(Distances(), ["cdist"]), (PlainPooling(), ["avg_pool2d"]), (Sorting(), ["cumsum", "linalg_vector_norm"])],
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


def test_a_supernet_with_an_uncountable_part_is_refused_by_name():
    net = make("cls")
    net.blocks[0].mlp = nn.Sequential(nn.Hardtanh())
    with pytest.raises(ModelError, match="fvcore cannot exactly count hardtanh"):
        measure_macs(net)


def test_nothing_that_fvcore_counts_is_called_free():
    counted = {name.removeprefix("aten::") for name, handle in _DEFAULT_SUPPORTED_OPS.items() if handle is not None}
    assert "matmul" in counted
    assert counted.isdisjoint(FREE_OPERATORS)


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
