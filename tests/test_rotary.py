"""timm's Eva, BEiT and ViT-RelPos: attention by place, and every kind of attention and block that they are made of."""

import random

import pytest
import timm
import torch
from conftest import one_of_each, randomise
from reports import FACTS
from safetensors.torch import save_file
from timm.models import beit

from poolshare.search.exported.export import save_export
from poolshare.space import Architecture, ModelError, SearchSpace
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs, measure_parameters
from poolshare.supernet.base import outline
from poolshare.supernet.onnx import write_onnx
from poolshare.supernet.operators.relative import relative_bias
from poolshare.supernet.operators.rotary import rotation
from poolshare.supernet.tokens import Tokens, grid_places
from poolshare.supernet.weights import load_base_weights

OPERATORS = ("max2d", "tome_prop", "topk")
EVA = (
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
    "eva02_enormous_patch14_clip_224",  # norms after attention and MLP
    "vit_base_patch16_sapiens2",  # RMSNorm, also of queries and keys; layer scale of attention alone
)
ASKED = {"vit_base_patch16_sapiens2": {"num_kv_heads": 2, "rope_rescale_coords": 1.0}}
RELATIVE = (
    "beit_base_patch16_224",  # a table in every block, biases as in Eva
    "vit_relpos_base_patch16_clsgap_224",  # an MLP of logarithmic coordinates in every block, CLS
    "vit_relpos_small_patch16_rpn_224",  # norms after attention and MLP, no prefix tokens
    "vit_srelpos_small_patch16_224",  # one bias for all blocks
)
ONE_OF_EACH_ROPE = ("eva02_base_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224")
NAMES = (*EVA, *RELATIVE, "vit_base_patch16_rpn_224")
# Of the others each differs from one of these in a part that a test of its own covers, or that is timm's alone.
KINDS = (*ONE_OF_EACH_ROPE, "vit_pe_core_gigantic_patch14_448", "eva02_enormous_patch14_clip_224")
KINDS += ("vit_base_patch16_sapiens2", "beit_base_patch16_224", "vit_srelpos_small_patch16_224")


def options_of(name):
    asked = ASKED.get(name, {})
    patch = 16 if asked else outline(name, {"depth": 1}).patch_embed.patch_size[0]
    return {"img_size": 4 * patch, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5} | asked


def make(name, sharing="qk", levels=(16, 9, 4)):
    net = SuperNet.from_timm(name, SearchSpace(4, levels, OPERATORS), sharing=sharing, **options_of(name))
    randomise(net)
    return net.eval()


def images_for(net, count=2):
    side = net.patch_embed.img_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", one_of_each(NAMES, *KINDS))
def test_every_kind_keeps_all_equalities(name, tmp_path):
    net = make(name)
    macs, parameters = measure_macs(net), measure_parameters(net)
    images = images_for(net)
    unmodified = timm.create_model(name, **options_of(name)).eval()
    unmodified.load_state_dict(
        {key: value for key, value in net.state_dict().items() if not key.startswith("poolings.")}
    )
    population = [net.space[0], *(net.space.sample(random.Random(seed)) for seed in range(3))]
    population.append(Architecture.parse("16*2 9@tome_prop*2"))
    with torch.no_grad():
        together = net(images, population)
        assert torch.equal(together[0], unmodified(images))
        assert macs.total(net.space[0]) == count_macs(unmodified, (images[:1],))
        assert (together[0][0] - together[0][1]).abs().max() > 1e-4
        for architecture, logits in zip(population, together, strict=True):
            assert torch.equal(net(images, [architecture])[0], logits)
            model = Subnet.from_supernet(net, architecture)
            assert torch.equal(model(images), logits), architecture
            assert macs.total(architecture) == count_macs(model, (images[:1],)), architecture
            assert parameters.total(architecture) == sum(p.numel() for p in model.parameters())
        maps = model.forward_intermediates(images, intermediates_only=True)
        assert [tuple(found.shape[2:]) for found in maps] == [(4, 4)] * 4
        facts = FACTS | {"macs": macs.total(architecture), "dense_macs": 10**7, "parameters": 1}
        data = {"input_size": (3, *net.patch_embed.img_size), "interpolation": "bicubic", "crop_pct": 1.0}
        save_export(tmp_path / "out", model, tuple("abcde"), data | {"mean": (0.5,) * 3, "std": (0.5,) * 3}, facts)
        again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(again(images), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_torch_export_and_onnx_give_the_same_logits(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install '.[onnx]'")
    model = Subnet.from_supernet(make(name), Architecture.parse("16*2 9@tome_prop*2"))
    images = images_for(model, 5)
    with torch.inference_mode():
        expected = model(images)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-4)
    write_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*ONE_OF_EACH_ROPE, *RELATIVE])
def test_written_maps_are_the_same_function(name):
    net = make(name)
    images, population = images_for(net), [Architecture.parse(text) for text in ("16*3 16", "16*2 9@tome_prop*2")]
    with torch.no_grad():
        expected = net(images, population)
        net.sharing = "map"
        torch.testing.assert_close(net(images, population), expected, rtol=1e-4, atol=1e-5)


ROTARY = [name for name in EVA if ("giant" not in name and "enormous" not in name) or "pe_core" in name]


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


@pytest.mark.parametrize("name", [*ONE_OF_EACH_ROPE, *RELATIVE])
def test_permuting_tokens_with_their_places_changes_nothing(name):
    net = make(name)
    tokens, layer = net.embed(images_for(net)), net.space[0].layers[0]
    order, prefix = torch.randperm(16, generator=torch.Generator().manual_seed(0)), net.num_prefix_tokens
    places = grid_places(16, (4, 4)).expand(2, -1, -1)
    features = torch.cat([tokens.features[:, :prefix], tokens.features[:, prefix:][:, order]], dim=1)
    with torch.no_grad():
        expected = net.run_layer(1, layer, tokens, None)[0].features
        known = tokens._replace(features=features, sizes=torch.ones(2, 16))
        moved = net.run_layer(1, layer, known._replace(places=places[:, order]), None)[0].features
        lost = net.run_layer(1, layer, known._replace(places=places), None)[0].features
    torch.testing.assert_close(moved[:, prefix:], expected[:, prefix:][:, order], rtol=1e-4, atol=1e-5)
    assert (lost[:, prefix:] - expected[:, prefix:][:, order]).abs().max() > 1e-2  # and places do matter


def test_a_smaller_grid_and_merged_cells_are_rotated_by_their_centres():
    net = make("vit_small_patch16_dinov3")
    # 2 × 2 cells of 4 × 4 patches: dinov3's coordinates of the centre are those of a grid of 2 × 2.
    tokens = Tokens(torch.zeros(1, net.num_prefix_tokens + 4, 32))
    torch.testing.assert_close(rotation(net, 0, tokens), net.rope.get_embed((2, 2)))


@pytest.mark.parametrize("name", RELATIVE)
def test_a_bias_by_place_is_timms_between_the_nearest_patches(name):
    """By hand: pairs of timm's own bias of a model whose grid is whole, CLS and shared part included."""
    net, prefix = make(name), make(name).num_prefix_tokens
    tokens = net.embed(images_for(net))
    with torch.no_grad():
        whole = relative_bias(net, 1, tokens)
        placed = tokens._replace(places=grid_places(16, (4, 4)).expand(2, -1, -1))
        assert torch.equal(relative_bias(net, 1, placed), whole.expand(2, -1, -1, -1))
        # 2 × 2 cells of 4 × 4 patches: their centres, (½, ½), (½, 2½), …, lie nearest to patches 5, 7, 13 and 15.
        cells = relative_bias(net, 1, tokens._replace(features=torch.zeros(1, prefix + 4, 32)))
        at = [*range(prefix), *(prefix + patch for patch in (5, 7, 13, 15))]
        assert torch.equal(cells, whole[:, :, at][:, :, :, at])
        # A token at (0, 1.4) is nearest to patch 1, one at (2.6, 3) to patch 15.
        places = torch.tensor([[[0.0, 1.4], [2.6, 3.0]]])
        two = Tokens(torch.zeros(1, prefix + 2, 32), torch.ones(1, 2), places, relative=tokens.relative)
        pair = relative_bias(net, 1, two)
        at = [*range(prefix), prefix + 1, prefix + 15]
        assert torch.equal(pair, whole[:, :, at][:, :, :, at])


@pytest.mark.parametrize("name", RELATIVE)
def test_importance_counts_the_bias(name):
    """What a token receives, and what CLS attends to, are sums of the written map, whose scores hold the bias."""
    net = make(name, "map")
    tokens, layer = net.embed(images_for(net)), net.space[0].layers[0]
    with torch.no_grad():
        _, attended = net.run_layer(0, layer, tokens, None, "map")
        torch.testing.assert_close(attended.received(), attended.written.sum(dim=(1, 2)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attended.class_row(), attended.written[:, :, 0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(attended._replace(written=None).detach().received(), attended.received())
        assert (attended._replace(bias=None).received() - attended.received()).abs().max() > 1e-3


def test_weights_of_another_image_size_bring_their_relative_positions(tmp_path):
    """timm's resizing of BEiT's tables, by the same function that timm loads its own checkpoints with."""
    large = timm.create_model("beit_base_patch16_224", **options_of("beit_base_patch16_224") | {"img_size": 96})
    randomise(large)
    save_file(large.state_dict(), tmp_path / "large.safetensors")
    net = make("beit_base_patch16_224")
    load_base_weights(net, tmp_path / "large.safetensors", "beit_base_patch16_224")
    expected = beit.checkpoint_filter_fn(
        large.state_dict(), timm.create_model("beit_base_patch16_224", **options_of("beit_base_patch16_224"))
    )
    table = "blocks.1.attn.relative_position_bias_table"
    assert large.state_dict()[table].shape != expected[table].shape
    assert torch.equal(net.state_dict()[table], expected[table])


def test_what_cannot_be_rotated_by_place_is_refused():
    with pytest.raises(ModelError, match=r"change at random in training; .*rope_rescale_coords=1"):
        outline("vit_small_patch16_dinov3", {"rope_rescale_coords": 2.0})
    with pytest.raises(ModelError, match="heads that share keys and values"):
        outline("vit_large_patch16_sapiens2", {})
