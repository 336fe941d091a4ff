"""Every pooling operator under one contract, inside the supernet and exported; their rules in the graph."""

import random
from itertools import pairwise

import pytest
import timm
import torch
from conftest import one_of_each

from poolshare.space import OPERATORS, Architecture, ArchitectureError, ModelError, SearchSpace, SpaceError
from poolshare.space.operators import grid_stride
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs, measure_parameters
from poolshare.supernet.training.sandwich import sandwich_loss

KINDS = {
    "cls": ("vit_tiny_patch16_224", {"img_size": 128, "embed_dim": 32, "num_heads": 2, "num_classes": 5}),
    "no cls": ("vit_base_patch16_gap_224", {"img_size": 128, "embed_dim": 32, "num_heads": 2, "num_classes": 5}),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 112, "embed_dim": 32, "num_heads": 2, "num_classes": 5},
    ),
}
LEVELS = (64, 32, 16, 4)  # squares, and what max1d makes


def make(kind, operators, levels=LEVELS, depth=4, sharing="qk"):
    torch.manual_seed(0)
    name, options = KINDS[kind]
    space = SearchSpace(depth, levels, operators)
    net = SuperNet.from_timm(name, space, sharing=sharing, **options, depth=depth).eval()
    with torch.no_grad():  # away from identities and zeros, so that equalities mean something
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


def images_for(net, count=3):
    side = net.patch_embed.img_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [
        pytest.param("cls", "qk", marks=pytest.mark.slow),
        pytest.param("cls", "map", marks=pytest.mark.slow),
        pytest.param("no cls", "qk", marks=pytest.mark.slow),
        ("registers", "qk"),
        pytest.param("registers", "map", marks=pytest.mark.slow),
    ],
)
def test_mixed_operators_in_one_supernet_keep_all_equalities(kind, sharing):
    net = make(kind, tuple(OPERATORS), sharing=sharing)
    macs, parameters = measure_macs(net), measure_parameters(net)
    population = [net.space.sample(random.Random(seed)) for seed in range(16)]
    used = {layer.operator for architecture in population for layer in architecture.layers}
    assert len(used) > 8
    images = images_for(net)
    with torch.no_grad():
        together = net(images, population)
        for architecture, logits in zip(population, together, strict=True):
            assert torch.equal(net(images, [architecture])[0], logits)
            model = Subnet.from_supernet(net, architecture)
            assert torch.equal(model(images), logits), architecture
            assert macs.total(architecture) == count_macs(model, (images[:1],)), architecture
            assert parameters.total(architecture) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", ["cls", "no cls"])
def test_an_operator_gives_its_exact_count_and_spares_the_prefix(operator, kind):
    net = make(kind, tuple(OPERATORS))
    declared = OPERATORS[operator]
    reductions = [(before, after) for name, before, after in net.space.reductions if name == operator]
    assert reductions
    tokens, used = net.run_layer(0, net.space[0].layers[0], net.embed(images_for(net)), None)
    tokens = tokens.features
    prefix = net.num_prefix_tokens
    for before, after in reductions:
        if before != 64:
            continue
        pooled = net.poolings[f"{operator}_{before}_{after}"](tokens, used)
        assert pooled.shape == (3, prefix + after, 32)
        assert torch.equal(pooled[:, :prefix], tokens[:, :prefix]) == (not declared.changes_prefix or prefix == 0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_image_leaks_into_another_and_gradients_reach_the_stem(operator):
    net = make("cls", (operator,), levels=(64, 16) if operator != "max1d" else (64, 32))
    architecture = next(a for a in net.space if a.layers[2].operator and not a.layers[1].shared)
    images = images_for(net)
    with torch.no_grad():
        alone = net(images[:1], [architecture])[0]
        torch.testing.assert_close(net(images, [architecture])[0][:1], alone, rtol=1e-5, atol=1e-5)
    model = Subnet.from_supernet(net, architecture)
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # the model holds no weight it does not use
        if not name.endswith(("qkv.bias", "fuse.bias")):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("operator", [name for name in OPERATORS if OPERATORS[name].learned])
def test_learned_operators_start_from_what_needs_no_learning(operator):
    plain = {"max2d_conv": "max2d", "max1d_conv": "max1d", "mstm": "mstm"}
    torch.manual_seed(0)
    options = {"img_size": 128, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "depth": 2}
    model = timm.create_model("poolshare_vit", base="vit_tiny_patch16_224", architecture=f"64 16@{operator}", **options)
    pooling = model.poolings[f"{operator}_64_16"]
    tokens = torch.randn(2, 65, 32)
    if operator == "pit":  # interior cells are plain means, prefix tokens pass
        out = pooling(tokens, None)
        grid = tokens[:, 1:].transpose(1, 2).reshape(2, 32, 8, 8)
        torch.testing.assert_close(out[:, 1 + 5], grid[:, :, 1:4, 1:4].mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[:, :1], tokens[:, :1])
    elif operator == "mstm":
        grid = torch.randn(2, 32, 8, 8)
        assert torch.equal(pooling.multi_scale(grid), grid)
    else:
        base = make("cls", (plain[operator],), levels=(64, 16)).poolings[f"{plain[operator]}_64_16"]
        assert torch.equal(pooling(tokens, None), base(tokens, None))


def test_sandwich_training_reaches_every_learned_operator():
    net = make("cls", ("max2d_conv", "mstm", "pit"), levels=(64, 16, 4))
    texts = ["64*2 64 64", "64 16@max2d_conv 4@pit*2", "64 16@mstm*3", "64 4@mstm*3", "64 16@pit*2 16"]
    labels = torch.tensor([0, 1, 2])
    sandwich_loss(net, images_for(net), labels, [Architecture.parse(text) for text in texts]).backward()
    reached = {name.split(".")[1] for name, p in net.named_parameters() if "poolings" in name and p.grad is not None}
    assert reached == {"max2d_conv_64_16", "pit_16_4", "mstm_64_16", "mstm_64_4", "pit_64_16"}


def test_no_grid_operator_follows_one_that_gives_the_grid_up():
    space = SearchSpace(5, (64, 36, 16, 4), tuple(OPERATORS))
    for seed in range(500):
        alive = True
        for before, layer in pairwise(space.sample(random.Random(seed)).layers):
            if layer.operator is None:
                continue
            declared = OPERATORS[layer.operator]
            assert declared.can_reduce(before.tokens, layer.tokens)
            assert alive or not declared.needs_grid
            alive = alive and declared.keeps_grid
    with pytest.raises(ArchitectureError, match="needs a square grid that no earlier operator gave up"):
        space.check(Architecture.parse("64 36@wkmedoids 16@max2d 16 16"))


def test_what_an_operator_cannot_reach_is_no_edge():
    reach = {name: {n for n in range(1, 197) if OPERATORS[name].can_reduce(196, n)} for name in OPERATORS}
    assert reach["max1d"] == reach["max1d_conv"] == {98, 49, 25, 13, 7, 4, 2, 1}
    assert reach["max2d"] == reach["avg2d"] == {side**2 for side in range(1, 14)}
    assert reach["evit"] == set(range(2, 196))
    assert reach["tome"] == reach["wkmedoids"] == reach["topk"] == set(range(1, 196))
    for side in reach["pit"]:
        stride = grid_stride(196, side)
        conv = torch.nn.Conv2d(1, 1, stride + 1, stride, padding=stride // 2)
        assert conv(torch.zeros(1, 1, 14, 14)).shape[-1] ** 2 == side
    with pytest.raises(SpaceError, match="level 50 cannot be reached"):
        SearchSpace(12, (196, 50), ("max1d",))
    assert SearchSpace(12, (196, 138, 97, 68), ("tome",)).size > 1000


@pytest.mark.parametrize("operator", [name for name in OPERATORS if OPERATORS[name].needs_attention])
@pytest.mark.parametrize("sharing", ["qk", "map"])
@pytest.mark.usefixtures("kernel")
def test_what_scores_by_attention_is_the_same_after_a_follower_and_an_owner_and_exported(operator, sharing):
    net = make("no cls", (operator,), levels=(64, 16), sharing=sharing)
    images, texts = images_for(net), (f"64*2 16@{operator} 16", f"64 64 16@{operator}*2", f"64 16@{operator}*3")
    population = [Architecture.parse(text) for text in texts]
    with torch.no_grad():
        for architecture, logits in zip(population, net(images, population), strict=True):
            assert torch.equal(net(images, [architecture])[0], logits)
            assert torch.equal(Subnet.from_supernet(net, architecture)(images), logits)


@pytest.mark.parametrize("operator", one_of_each(OPERATORS, "max2d", "wkmedoids"))
def test_exported_programs_and_half_precision(operator):
    net = make("cls", (operator,), levels=(64, 16) if "max1d" not in operator else (64, 32), depth=2)
    model = Subnet.from_supernet(net, net.space[net.space.size - 1]).eval()
    images = images_for(net, 2)
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(model.to(torch.bfloat16)(images.to(torch.bfloat16))).all()


def test_reduced_maps_exist_as_long_as_the_grid_does():
    net = make("cls", ("max2d", "tome"), levels=(64, 36, 9))
    model = Subnet.from_supernet(net, Architecture.parse("64 36@max2d 9@tome*2"))
    images = images_for(net)
    with torch.no_grad():
        maps = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True, maps="reduced")
        assert [tuple(features.shape) for features in maps] == [(3, 32, 8, 8), (3, 32, 6, 6)]
        with pytest.raises(ModelError, match=r"after layer 2 \(tome\) the tokens form no grid.*output_fmt='NLC'"):
            model.forward_intermediates(images, indices=[1, 3], maps="reduced")
        tokens = model.forward_intermediates(images, indices=[3], output_fmt="NLC", intermediates_only=True)
        assert tokens[0].shape == (3, 9, 32)
