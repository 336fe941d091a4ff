"""The supernet against unmodified timm, and against a plain reference written without it."""

import inspect
import os
import random
from math import isqrt
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from poolshare.search.cli.options import model_args_of, settings_of
from poolshare.search.config import checked_config
from poolshare.search.job.prepare import make_supernet
from poolshare.space import (
    Architecture,
    ArchitectureError,
    CostTable,
    ModelError,
    PoolshareError,
    SearchSpace,
    SpaceError,
    forecast,
)
from poolshare.space.presets import PRESETS
from poolshare.supernet import Subnet, SuperNet, base, measure_macs
from poolshare.supernet import model as supernet_model
from poolshare.supernet.operators.pooling import Pooling, avg2d, max2d
from poolshare.supernet.options import model_option_types, read_value

TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "cls": ("deit_tiny_patch16_224", {"img_size": 64}),
    "no cls": ("vit_base_patch16_gap_224", {"img_size": 64}),
    "cls and registers": ("vit_base_patch14_reg4_dinov2", {"img_size": 56}),
    "registers, no cls": ("vit_base_patch16_reg4_gap_256", {"img_size": 64}),
    "layer scale": ("deit3_small_patch16_224", {"img_size": 64}),
    "query-key norm": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True}),
    "scale norms": ("vit_tiny_patch16_224", {"img_size": 64, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "attention-pooled": ("vit_base_patch16_siglip_224", {"img_size": 64}),
    "no bias in qkv": ("vit_tiny_patch16_224", {"img_size": 64, "qkv_bias": False}),
    "norm before": ("vit_base_patch16_clip_224", {"img_size": 64}),
    "digits": ("digits_vit", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
    "hybrid, stem alone": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "patch_size": 4}),
    "hybrid, ResNet with batch norm": ("vit_small_resnet50d_s16_224", {"img_size": 64}),
    "RMSNorm and SwiGLU": ("aimv2_large_patch14_224", {"img_size": 56}),
    "dynamic size": ("vit_intern300m_patch14_448", {"img_size": 56}),
    "mish, 12 channels": ("vit_tiny_patch16_224", {"img_size": 64, "act_layer": "mish", "in_chans": 12}),
}
OPERATORS = ("max2d", "avg2d")


def space_of(kind: str, max_run: int = 3) -> SearchSpace:
    return SearchSpace(4, (64, 25, 4) if kind == "digits" else (16, 9, 4), OPERATORS, max_run)


def make(kind: str, **more: Any) -> SuperNet:
    name, options = VITS[kind]
    net = SuperNet.from_timm(name, space_of(kind), **{**TINY, **options, **more})
    randomise(net)
    return net.eval()


def images_for(net: SuperNet, batch: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, net.in_chans, *net.patch_embed.img_size, generator=generator)


def base_of(kind: str, net: SuperNet) -> Any:
    """Unmodified timm with the supernet's weights; strict, so names and shapes are exactly the base model's."""
    name, options = VITS[kind]
    base = timm.create_model(name, **{**TINY, **options})
    base.load_state_dict(net.state_dict())
    return base.eval()


def dense(space: SearchSpace) -> Architecture:
    return Architecture.parse(" ".join([str(space.levels[0])] * space.depth))


# timm's own logits


@pytest.mark.parametrize("kind", VITS)
def test_all_tokens_and_no_sharing_is_timm_bit_for_bit(kind: str, kernel: str):
    net = make(kind)
    base, images = base_of(kind, net), images_for(net)
    assert base.blocks[0].attn.fused_attn == (kernel == "fused")
    with torch.no_grad():
        expected = base(images)
        assert expected.std(0).min() > 1e-3  # the images matter
        assert torch.equal(net(images, [dense(net.space)])[0], expected)
        assert torch.equal(net(images), expected)


def test_deit_tiny_at_full_size_is_timm_bit_for_bit():
    space = SearchSpace(12, (196, 100, 49), ("max2d",), 3)
    net = SuperNet.from_timm("deit_tiny_patch16_224", space).eval()
    base = timm.create_model("deit_tiny_patch16_224").eval()
    base.load_state_dict(net.state_dict())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net(images, [space[0]])[0], base(images))


@pytest.mark.usefixtures("kernel")
def test_in_training_dropout_and_drop_path_are_timms():
    options = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_rate": 0.2, "img_size": 64}
    net = SuperNet.from_timm("vit_tiny_patch16_224", space_of("cls"), **TINY, **options)
    base = timm.create_model("vit_tiny_patch16_224", **TINY, **options)
    randomise(net)
    base.load_state_dict(net.state_dict())
    images = images_for(net)
    torch.manual_seed(5)
    expected = base.train()(images)
    torch.manual_seed(5)
    found = net.train()(images, [dense(net.space)])[0]
    assert torch.equal(found, expected)
    assert not torch.equal(expected, base(images))


# The reference: an architecture in plain tensor operations


def reference_logits(
    weights: dict[str, torch.Tensor],
    images: torch.Tensor,
    architecture: Architecture,
    *,
    num_heads: int,
    stride: int,
    padding: int = 0,
    prefix_has_position: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Logits of one architecture from a timm ViT's weights, one image, one head, one cell at a time."""
    return torch.stack(
        [
            _reference_image(weights, image, architecture, num_heads, stride, padding, prefix_has_position, eps)
            for image in images
        ]
    )


def _reference_image(
    w: dict[str, torch.Tensor],
    image: torch.Tensor,
    architecture: Architecture,
    num_heads: int,
    stride: int,
    padding: int,
    prefix_has_position: bool,
    eps: float,
) -> torch.Tensor:
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.weight" not in w:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str, rows: slice = slice(None)) -> torch.Tensor:
        out = x @ w[f"{name}.weight"][rows].T
        return out + w[f"{name}.bias"][rows] if f"{name}.bias" in w else out

    projected = F.conv2d(image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride, padding)[0]
    width = projected.shape[0]
    patches = projected.reshape(width, -1).T
    prefix = torch.cat([w[name][0] for name in ("cls_token", "reg_token") if name in w] or [patches[:0]])
    if prefix_has_position:
        x = torch.cat([prefix, patches]) + w["pos_embed"][0]
    else:
        x = torch.cat([prefix, patches + w["pos_embed"][0]])
    maps: list[torch.Tensor] = []
    for index, layer in enumerate(architecture.layers):
        if layer.operator is not None:
            x = torch.cat([x[: len(prefix)], reference_pool(x[len(prefix) :], layer.operator, layer.tokens)])
        block = f"blocks.{index}"
        normed = norm(x, f"{block}.norm1")
        size = width // num_heads
        values = linear(normed, f"{block}.attn.qkv", slice(2 * width, 3 * width))
        if not layer.shared:
            queries = linear(normed, f"{block}.attn.qkv", slice(0, width))
            keys = linear(normed, f"{block}.attn.qkv", slice(width, 2 * width))
            maps = []
            for head in range(num_heads):
                part = slice(head * size, (head + 1) * size)
                q = norm(queries[:, part], f"{block}.attn.q_norm")
                k = norm(keys[:, part], f"{block}.attn.k_norm")
                scores = (q @ k.T) / size**0.5
                exponentials = (scores - scores.max(-1, keepdim=True).values.detach()).exp()
                maps.append(exponentials / exponentials.sum(-1, keepdim=True))
        mixed = torch.cat([maps[h] @ values[:, h * size : (h + 1) * size] for h in range(num_heads)], dim=-1)
        update = linear(norm(mixed, f"{block}.attn.norm"), f"{block}.attn.proj")
        x = x + update * w.get(f"{block}.ls1.gamma", 1)
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        update = linear(norm(hidden, f"{block}.mlp.norm"), f"{block}.mlp.fc2")
        x = x + update * w.get(f"{block}.ls2.gamma", 1)
    x = norm(x, "norm")
    pooled = x[0] if "cls_token" in w else x[len(prefix) :].mean(0)
    return linear(norm(pooled, "fc_norm"), "head")


def reference_pool(patches: torch.Tensor, operator: str, after: int) -> torch.Tensor:
    """Adaptive pooling: cell i of g' covers rows ⌊i·g/g'⌋ to ⌈(i+1)·g/g'⌉ of g, columns likewise."""
    before_side, after_side = round(len(patches) ** 0.5), round(after**0.5)
    cells = []
    for row in range(after_side):
        for column in range(after_side):
            rows = range(row * before_side // after_side, -(-(row + 1) * before_side // after_side))
            columns = range(column * before_side // after_side, -(-(column + 1) * before_side // after_side))
            members = torch.stack([patches[r * before_side + c] for r in rows for c in columns])
            cells.append(members.max(0).values if operator == "max2d" else members.mean(0))
    return torch.stack(cells)


REFERENCE: dict[str, dict[str, Any]] = {
    "cls": {"stride": 16},
    "no cls": {"stride": 16},
    "cls and registers": {"stride": 14, "prefix_has_position": False},
    "registers, no cls": {"stride": 16, "prefix_has_position": False},
    "layer scale": {"stride": 16, "prefix_has_position": False},
    "query-key norm": {"stride": 16},
    "scale norms": {"stride": 16},
    "no bias in qkv": {"stride": 16},
    "digits": {"stride": 1, "padding": 1},
}
TEXTS = ["{0}*3 {0}", "{0} {1}@max2d*3", "{0}*2 {2}@avg2d*2", "{0} {1}@avg2d*2 {2}@max2d", "{0} {1}@max2d {2}@avg2d*2"]


@pytest.mark.parametrize("kind", REFERENCE)
def test_pooling_and_sharing_are_those_of_the_reference(kind: str):
    net = make(kind).double()
    images = images_for(net, batch=2).double()
    weights = dict(net.named_parameters())
    texts = [text.format(*net.space.levels) for text in TEXTS]
    population = [Architecture.parse(text) for text in texts] + [net.space.sample(random.Random(i)) for i in range(4)]
    with torch.no_grad():
        found = net(images, population)
        for architecture, logits in zip(population, found, strict=True):
            expected = reference_logits(
                weights, images, architecture, num_heads=net.blocks[0].attn.num_heads, **REFERENCE[kind]
            )
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9, msg=str(architecture))
    assert torch.unique(found[:, 0, 0]).numel() == len(set(population))  # each architecture is another function


@pytest.mark.parametrize("text", ["16*3 16", "16*2 4@avg2d*2"])
@pytest.mark.parametrize("kind", ["cls", "query-key norm"])
@pytest.mark.parametrize("sharing", ["qk", "map"])
@pytest.mark.usefixtures("kernel")
def test_gradients_of_pooling_and_sharing_are_those_of_the_reference(kind: str, text: str, sharing: str):
    net = make(kind, sharing=sharing).double()
    images, architecture = images_for(net, batch=2).double(), Architecture.parse(text)
    weight = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (net(images, [architecture])[0] * weight).sum().backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    (reference_logits(leaves, images, architecture, num_heads=2, **REFERENCE[kind]) * weight).sum().backward()
    for name, parameter in net.named_parameters():
        expected = leaves[name].grad if leaves[name].grad is not None else torch.zeros_like(parameter)
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9, msg=name)


def rows_of(tensor: torch.Tensor, part: str) -> torch.Tensor:
    return tensor.chunk(3)["qkv".index(part)]


def test_followers_feed_the_owners_queries_and_keys_and_none_of_their_own():
    net = make("cls")
    architecture = Architecture.parse("16*3 16")
    with torch.no_grad():
        net.blocks[0].attn.proj.weight.zero_()  # the owner does not use its map itself: only its followers do
    net(images_for(net), [architecture]).square().sum().backward()
    for part in "qk":
        assert rows_of(net.blocks[0].attn.qkv.weight.grad, part).abs().max() > 1e-3
        for follower in (1, 2):
            assert torch.count_nonzero(rows_of(net.blocks[follower].attn.qkv.weight.grad, part)) == 0
            assert torch.count_nonzero(rows_of(net.blocks[follower].attn.qkv.bias.grad, part)) == 0
    for owner_or_follower in range(1, 4):
        assert rows_of(net.blocks[owner_or_follower].attn.qkv.weight.grad, "v").abs().max() > 1e-3
    assert rows_of(net.blocks[3].attn.qkv.weight.grad, "q").abs().max() > 1e-3


def test_a_followers_own_queries_and_keys_change_nothing_and_its_owners_change_it():
    net, architecture = make("cls"), Architecture.parse("16*2 16 9@max2d")
    images = images_for(net)
    with torch.no_grad():
        before = net(images, [architecture])
        net.blocks[1].attn.qkv.weight[:64].normal_()
        assert torch.equal(net(images, [architecture]), before)
        net.blocks[0].attn.proj.weight.zero_()
        before = net(images, [architecture])
        net.blocks[0].attn.qkv.weight[:64].normal_()
        assert not torch.allclose(net(images, [architecture]), before)


# The operators


@pytest.mark.parametrize(("before", "after"), [(16, 9), (16, 4), (196, 100), (100, 49), (25, 1), (49, 36)])
def test_pooling_operators_by_their_cells(before: int, after: int):
    patches = torch.randn(2, before, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, function in (("max2d", max2d), ("avg2d", avg2d)):
        expected = torch.stack([reference_pool(image, name, after) for image in patches])
        torch.testing.assert_close(function(patches, after), expected, rtol=1e-12, atol=1e-12)
        for prefix in (0, 1, 5):
            tokens = torch.cat([torch.full((2, prefix, 5), 99.0, dtype=torch.float64), patches], dim=1)
            grid = SimpleNamespace(num_patches=before, grid_size=(isqrt(before), isqrt(before)))
            model = SimpleNamespace(num_prefix_tokens=prefix, has_class_token=prefix > 0, embed_dim=5, patch_embed=grid)
            pooled = Pooling(name, before, after, model)(tokens, None)
            assert pooled.shape == (2, prefix + after, 5)
            assert torch.equal(pooled[:, :prefix], tokens[:, :prefix])
            assert torch.equal(pooled[:, prefix:], function(patches, after))


# The prefix tree


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.sampled_from(["cls", "registers, no cls"]))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_population_gives_the_logits_of_one_by_one_bit_for_bit(
    nets: dict[str, SuperNet], ranks: list[int], kind: str
):
    net = nets[kind]
    population = [net.space[rank % net.space.size] for rank in [*ranks, ranks[0]]]
    images = images_for(net)
    with torch.no_grad():
        together = net(images, population)
        alone = torch.stack([net(images, [architecture])[0] for architecture in population])
        leaves = {position: logits for positions, logits in net.leaves(images, population) for position in positions}
    assert together.shape == (len(population), 3, 7)
    assert torch.equal(together, alone)
    assert all(torch.equal(logits, leaves[position]) for position, logits in enumerate(together))


@pytest.fixture(scope="module")
def nets() -> dict[str, SuperNet]:
    return {kind: make(kind) for kind in ("cls", "registers, no cls")}


def test_bits_do_not_depend_on_company_where_several_threads_share_the_work(nets: dict[str, SuperNet]):
    net, images = nets["cls"], images_for(nets["cls"], batch=32)
    population = [net.space.sample(random.Random(seed)) for seed in range(6)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            together = net(images, population)
            assert all(torch.equal(net(images, [a])[0], logits) for a, logits in zip(population, together, strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_walk_runs_as_many_blocks_as_the_forecast_says(nets: dict[str, SuperNet], monkeypatch: pytest.MonkeyPatch):
    net = nets["cls"]
    population = [net.space.sample(random.Random(seed)) for seed in range(12)]
    calls, run_layer = [], SuperNet.run_layer

    def counted(self: SuperNet, index: int, *arguments: Any) -> Any:
        calls.append(index)
        return run_layer(self, index, *arguments)

    monkeypatch.setattr(SuperNet, "run_layer", counted)
    with torch.no_grad():
        net(images_for(net), population)
    levels = dict.fromkeys(net.space.levels, 1)
    table = CostTable("macs", 0, levels, levels, dict.fromkeys(net.space.reductions, 0), levels)
    assert len(calls) == forecast(population, table).edges < 12 * 4


def test_gradients_of_a_population_are_the_sum_of_one_by_one():
    net = make("cls").train()
    images = images_for(net)
    population = [net.space.sample(random.Random(seed)) for seed in (1, 2, 3, 4, 1)]
    net(images, population).square().sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    for architecture in population:
        net(images, [architecture]).square().sum().backward()
    for name, parameter in net.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


def test_the_answer_does_not_depend_on_who_called_last(nets: dict[str, SuperNet]):
    net = nets["cls"]
    images, one, other = images_for(net), net.space[7], net.space[70]
    with torch.no_grad():
        before = net(images, [one])
        net(images, [other])
        net(images)
        assert torch.equal(net(images, [one]), before)


def test_no_architecture_gives_no_logits(nets: dict[str, SuperNet]):
    assert nets["cls"](images_for(nets["cls"]), []).shape == (0, 3, 7)


def test_an_architecture_outside_the_space_is_refused_before_anything_runs(
    nets: dict[str, SuperNet], monkeypatch: pytest.MonkeyPatch
):
    net = nets["cls"]
    monkeypatch.setattr(SuperNet, "embed", lambda *_: pytest.fail("ran"))
    for outside in ("16*3", "16*4", "16*2 8@max2d*2", "16*2 9@tome*2"):
        with pytest.raises(ArchitectureError, match=r"levels are|layers|operators of this space"):
            net(images_for(net), [net.space[0], Architecture.parse(outside)])
    with pytest.raises(ArchitectureError, match=r"is not an Architecture; Architecture\.parse"):
        net(images_for(net), ["16*2 16*2"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_run_and_agree_as_far_as_they_can(dtype: torch.dtype):
    net = make("cls")
    images, population = images_for(net), [net.space[0], Architecture.parse("16*2 9@avg2d*2")]
    with torch.no_grad():
        expected = net(images, population)
        found = net.to(dtype)(images.to(dtype), population)
    assert found.dtype == dtype
    error = (found.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


# What cannot be built


def refused(error: type[PoolshareError], fragments: list[str], name: Any, space: SearchSpace, **options: Any) -> None:
    with pytest.raises(error) as caught:
        SuperNet.from_timm(name, space, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "fragments"),
    [
        ("vit_tiny_patch16_24", {}, ["timm knows no model 'vit_tiny_patch16_24'", "did you mean vit_tiny_patch16_224"]),
        ("no such thing", {}, ["'no such thing'", "timm.list_models('vit*')"]),
        ("", {}, ["timm knows no model ''", "timm.list_models"]),
        (None, {}, ["timm knows no model None", "timm.list_models"]),
        ("vit_tiny_patch16_224.nonsense", {}, ["'vit_tiny_patch16_224.nonsense'", "Invalid pretrained tag"]),
        ("cait_xxs24_224", {}, ["'cait_xxs24_224'", "it is a Cait", "needs talking heads"]),
        ("vit_tiny_patch16_224", {"global_pool": ""}, ["no pooled head"]),
        ("vit_tiny_patch16_224", {"img_size": 15}, ["(15, 15)", "smaller than its patches"]),
        (
            "vit_small_patch16_18x2_224",
            {},
            ["'vit_small_patch16_18x2_224'", "blocks of several attentions side by side"],
        ),
        ("resnet18", {}, ["'resnet18'", "it is a ResNet"]),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, ["differential attention"]),
        ("vit_tiny_patch16_224", {"dynamic_img_pad": True, "img_size": 60}, ["dynamic_img_pad", "(60, 60)"]),
        ("vit_tiny_patch16_224", {"norm_layer": "layernorm2d"}, ["LayerNorm2d", "only layernorm and rmsnorm"]),
        ("vit_tiny_patch16_224", {"norm_layer": "batchnorm2d"}, ["BatchNorm2d", "only layernorm and rmsnorm"]),
        ("vit_tiny_patch16_224", {"in_chans": 0}, ["in_chans=0", "at least 1"]),
        ("vit_tiny_patch16_224", {"qkv_bias": "maybe"}, ["qkv_bias='maybe'", "valid boolean"]),
        ("vit_tiny_patch16_224", {"depth": True}, ["depth=True", "a number is wanted"]),
        ("vit_tiny_patch16_224", {"init_values": float("nan")}, ["init_values=nan", "finite"]),
        ("vit_tiny_patch16_224", {"block_fn": "Block"}, ["block_fn='Block'", "only Python can give"]),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, ["patch_drop_rate=0"]),
        ("vit_tiny_patch16_224", {"colour": "red"}, ["'vit_tiny_patch16_224'", "colour='red'"]),
        ("vit_tiny_patch16_224", {"global_pool": "most"}, ["global_pool='most'", "'avgmax'"]),
        ("vit_tiny_patch16_224", {"embed_dim": 31}, ["{'embed_dim': 31}", "divisible by num_heads"]),
    ],
)
def test_a_model_that_cannot_be_searched_is_refused_by_name(name: Any, options: dict[str, Any], fragments: list[str]):
    refused(ModelError, fragments, name, SearchSpace(2, (16, 9)), **options)


OPTIONS = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("qkv_bias=False", False), ("qkv_bias=false", False), ("qkv_bias=no", False), ("qkv_bias=0", False),
        ("qk_norm=no", False), ("qk_norm=True", True), ("qk_norm=off", False),
        ("class_token=False,global_pool=avg", False), ("fc_norm=None", None), ("fc_norm=no", False),
        ("init_values=1e-5", 1e-5), ("init_values=none", None), ("pos_embed=none", "none"), ("reg_tokens=4.0", 4),
        ("norm_layer=rmsnorm", "rmsnorm"), ("act_layer=None", None),
    ],
)  # fmt: skip
def test_an_option_is_read_by_the_type_that_timms_signature_has(text: str, value: Any):
    found = model_args_of("vit_tiny_patch16_224", settings_of(text))
    name, _, written = text.split(",")[0].partition("=")
    assert type(found[name]) is type(value)
    assert found[name] == value
    expected = timm.create_model("vit_tiny_patch16_224", **OPTIONS, **{**found, name: value})
    given = {**found, name: written}  # as from Python: the same text, read at the same place
    net = SuperNet.from_timm("vit_tiny_patch16_224", SearchSpace(2, (4, 1)), **OPTIONS, **given)
    assert {key: t.shape for key, t in net.state_dict().items()} == {
        key: t.shape for key, t in expected.state_dict().items()
    }
    assert net.base[1][name] == value  # what an export will write down


def test_types_are_those_of_timms_signature_and_all_can_be_read():
    types = dict(model_option_types())
    assert types["qkv_bias"] is bool
    assert types["depth"] is int
    head = types.pop("head"), types.pop("head_blocks")  # ours, for every pixel
    assert head == (Literal["linear", "conv"] | None, int | None)
    defaults = {
        name: parameter.default
        for kind in (VisionTransformerRelPos, Beit, Eva, VisionTransformer)
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
    }
    assert {name: read_value(wanted, defaults[name]) for name, wanted in types.items()} == {
        name: defaults[name] for name in types
    }


def test_a_model_is_refused_before_any_weight_is_allocated(monkeypatch: pytest.MonkeyPatch):
    made, create = [], timm.create_model

    def recorded(name: str, **options: Any) -> Any:
        model = create(name, **options)
        made.append((name, next(model.parameters()).device.type))
        return model

    monkeypatch.setattr(timm, "create_model", recorded)
    base._outlined.cache_clear()
    refused(ModelError, ["talking heads"], "cait_xxs24_224", SearchSpace(2, (16, 9)), depth=1)
    refused(SpaceError, ["depth 2"], "vit_tiny_patch16_224", SearchSpace(2, (196, 49)))
    assert made == [("cait_xxs24_224", "meta"), ("vit_tiny_patch16_224", "meta")]
    base._outlined.cache_clear()
    monkeypatch.setattr(os, "sysconf", lambda name: 1024)  # a machine of 1 MB
    refused(
        ModelError,
        ["GB of weights", "more than this machine's memory"],
        "vit_tiny_patch16_224",
        SearchSpace(12, (196, 49)),
    )
    assert {device for _, device in made} == {"meta"}


def test_a_base_model_is_allocated_once():
    made: list[str] = []
    create = base.make_base

    def recorded(*arguments: Any) -> Any:
        model = create(*arguments)
        made.append(next(model.parameters()).device.type)
        return model

    with pytest.MonkeyPatch.context() as patch:
        for module in (base, supernet_model):
            patch.setattr(module, "make_base", recorded)
        config = checked_config(data="digits", model="digits_vit", model_args={"depth": 2}, levels=(64, 16))
        assert make_supernet(config, None).space.levels == (64, 16)
    assert made == ["meta", "cpu"]


@pytest.mark.parametrize(("kind", "shape"), [("dynamic size", (3, 70, 70)), ("cls", (3, 32, 32)), ("cls", (1, 64, 64))])
def test_images_of_another_size_or_channels_are_refused(kind: str, shape: tuple[int, ...]):
    net = make(kind)
    for model in (net, Subnet.from_supernet(net, net.space[0])):
        with pytest.raises(ModelError, match=r"images are \(2, .*and must be \(B, 3, "):
            model(torch.zeros(2, *shape), *([[net.space[0]]] if model is net else []))
    with pytest.raises(ModelError, match="belongs to one image size"):
        net.set_input_size(img_size=128)


def test_pixels_that_no_patch_covers_are_named():
    def of(**options: Any) -> tuple[str, ...]:
        return base.cropped(base.outline("vit_tiny_patch16_224", {**OPTIONS, **options}))

    assert of() == of(img_size=64) == ()
    (note,) = of(img_size=70)
    assert "16 pixels do not divide images of 70: the last 6 rows and columns" in note
    assert "64 or 80 would use all" in note


@pytest.mark.parametrize(
    ("space", "fragments"),
    [
        (SearchSpace(5, (16, 9)), ["depth 5", "vit_tiny_patch16_224 has 4 blocks"]),
        (SearchSpace(4, (25, 9)), ["begin with 25 patch tokens", "at (64, 64) has 16", "choose another image size"]),
        (SearchSpace(4, (16, 9), has_cls=False), ["has_cls=False", "vit_tiny_patch16_224 has a CLS token"]),
    ],
)
def test_a_space_that_does_not_fit_the_model_is_refused(space: SearchSpace, fragments: list[str]):
    refused(SpaceError, fragments, "vit_tiny_patch16_224", space, img_size=64, **TINY)


def test_a_space_with_cls_does_not_fit_a_model_without():
    options = {**TINY, "img_size": 64}
    refused(
        SpaceError,
        ["has_cls=True", "vit_base_patch16_gap_224 has no CLS token"],
        "vit_base_patch16_gap_224",
        SearchSpace(4, (16, 9), has_cls=True),
        **options,
    )
    for has_cls in (None, False):
        SuperNet.from_timm("vit_base_patch16_gap_224", SearchSpace(4, (16, 9), has_cls=has_cls), **options)


def test_registers_are_no_cls():
    refused(
        SpaceError,
        ["has_cls=True", "has no CLS token"],
        "vit_base_patch16_reg4_gap_256",
        SearchSpace(4, (16, 9), has_cls=True),
        img_size=64,
        **TINY,
    )


@pytest.mark.parametrize("name", ["psvit_1d_tiny", "psvit_2d_tiny"])
def test_psvit_style_bases_run_their_preset_and_the_dense_path_is_timms(name):
    net = SuperNet.from_timm(name, PRESETS[name], num_classes=10).eval()
    randomise(net)
    images = torch.randn(1, 3, 224, 224)
    smallest = net.space.cheapest(measure_macs(net))
    dense, pooled = net(images, [net.space[0], smallest])
    assert torch.equal(dense, net(images))
    assert torch.equal(pooled, Subnet.from_supernet(net, smallest).eval()(images))
    assert net.has_class_token == name.startswith("psvit_1d")
