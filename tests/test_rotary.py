"""timm's Eva family: rotary positions by place, and every kind of attention and block that it is made of."""

import random

import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file

from poolshare.space import Architecture, ModelError, SearchSpace
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs, measure_parameters
from poolshare.supernet.base import outline
from poolshare.supernet.operators.rotary import rotation
from poolshare.supernet.tokens import Tokens, grid_places

OPERATORS = ("max2d", "tome", "tome_prop", "topk", "mstm")
NAMES = (
    "eva02_small_patch14_224",  # fused qkv without a key bias, packed SwiGLU, cat
    "eva02_base_patch14_224",  # separate projections, SwiGLU with a norm
    "eva02_base_patch16_clip_224",  # a norm inside attention
    "eva_giant_patch14_224",  # no rotation
    "vit_small_patch16_dinov3",  # dinov3, registers, half rotation, layer scale
    "vit_huge_plus_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_patch16_rope_224",  # AttentionRope
    "vit_small_patch16_rope_mixed_ape_224",  # frequencies by layer and head
    "vit_base_patch16_rope_reg1_gap_256",  # no CLS
    "vit_pe_core_gigantic_patch14_448",  # no prefix tokens, attention pooling
    "vit_pe_spatial_base_patch16_512",
)


def options_of(name):
    patch = outline(name, {"depth": 1}).patch_embed.patch_size[0]
    return {"img_size": 4 * patch, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5}


def make(name, sharing="qk", levels=(16, 9, 4)):
    net = SuperNet.from_timm(name, SearchSpace(4, levels, OPERATORS), sharing=sharing, **options_of(name))
    randomise(net)
    return net.eval()


def images_for(net, count=2):
    side = net.patch_embed.img_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_eva_keeps_all_equalities(name, tmp_path):
    net = make(name)
    macs, parameters = measure_macs(net), measure_parameters(net)
    images = images_for(net)
    unmodified = timm.create_model(name, **options_of(name)).eval()
    unmodified.load_state_dict(
        {key: value for key, value in net.state_dict().items() if not key.startswith("poolings.")}
    )
    population = [net.space[0], *(net.space.sample(random.Random(seed)) for seed in range(6))]
    population.append(Architecture.parse("16*2 9@tome*2"))
    with torch.no_grad():
        together = net(images, population)
        assert torch.equal(together[0], unmodified(images))
        assert (together[0][0] - together[0][1]).abs().max() > 1e-4
        for architecture, logits in zip(population, together, strict=True):
            assert torch.equal(net(images, [architecture])[0], logits)
            model = Subnet.from_supernet(net, architecture)
            assert torch.equal(model(images), logits), architecture
            assert macs.total(architecture) == count_macs(model, (images[:1],)), architecture
            assert parameters.total(architecture) == sum(p.numel() for p in model.parameters())
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        ours = {"base": name, "architecture": str(architecture), **options_of(name)}
        again = timm.create_model("poolshare_vit", **ours, checkpoint_path=str(tmp_path / "weights.safetensors")).eval()
        assert set(load_file(tmp_path / "weights.safetensors")) == set(again.state_dict())
        assert torch.equal(again(images), logits)
        maps = model.forward_intermediates(images, intermediates_only=True)
        assert [tuple(found.shape[2:]) for found in maps] == [(4, 4)] * 4


@pytest.mark.parametrize(
    "name", ["eva02_base_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224"]
)
def test_written_maps_are_the_same_function(name):
    net = make(name)
    images, population = images_for(net), [Architecture.parse(text) for text in ("16*3 16", "16*2 9@tome_prop*2")]
    with torch.no_grad():
        expected = net(images, population)
        net.sharing = "map"
        torch.testing.assert_close(net(images, population), expected, rtol=1e-4, atol=1e-5)


ROTARY = [name for name in NAMES if "giant" not in name or "pe_core" in name]


@pytest.mark.parametrize("name", ROTARY)
def test_rotating_by_place_is_timms_table_where_nothing_was_pooled(name):
    net = make(name)
    tokens = net.embed(images_for(net))
    placed = tokens._replace(places=grid_places(16, (4, 4)).expand(2, -1, -1))
    _, table = net._pos_embed(net.patch_embed(images_for(net)))
    for index in range(4):
        timms = table[index] if net.rope_mixed else table
        assert torch.equal(rotation(net, index, tokens), timms)
        found = rotation(net, index, placed)  # (B, 1 or heads, P, 2·head_dim)
        torch.testing.assert_close(found, timms.expand(2, *found.shape[1:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["eva02_base_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224"]
)
def test_permuting_tokens_with_their_places_changes_nothing(name):
    net = make(name)
    tokens, layer = net.embed(images_for(net)), net.space[0].layers[0]
    order, prefix = torch.randperm(16, generator=torch.Generator().manual_seed(0)), net.num_prefix_tokens
    places = grid_places(16, (4, 4)).expand(2, -1, -1)
    features = torch.cat([tokens.features[:, :prefix], tokens.features[:, prefix:][:, order]], dim=1)
    with torch.no_grad():
        expected = net.run_layer(1, layer, tokens, None)[0].features
        moved = net.run_layer(1, layer, Tokens(features, torch.ones(2, 16), places[:, order]), None)[0].features
        lost = net.run_layer(1, layer, Tokens(features, torch.ones(2, 16), places), None)[0].features
    torch.testing.assert_close(moved[:, prefix:], expected[:, prefix:][:, order], rtol=1e-4, atol=1e-5)
    assert (lost[:, prefix:] - expected[:, prefix:][:, order]).abs().max() > 1e-2  # and places do matter


def test_a_smaller_grid_and_merged_cells_are_rotated_by_their_centres():
    net = make("vit_small_patch16_dinov3")
    # 2 × 2 cells of 4 × 4 patches: dinov3's coordinates of the centre are those of a grid of 2 × 2.
    tokens = Tokens(torch.zeros(1, net.num_prefix_tokens + 4, 32))
    torch.testing.assert_close(rotation(net, 0, tokens), net.rope.get_embed((2, 2)))


def test_what_cannot_be_rotated_by_place_is_refused():
    with pytest.raises(ModelError, match="change at random in training"):
        outline("vit_small_patch16_dinov3", {"rope_rescale_coords": 2.0})
    with pytest.raises(ModelError, match="norms after attention and MLP"):
        outline("eva02_enormous_patch14_clip_224", {"depth": 1})
