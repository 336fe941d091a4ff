"""Heads for every pixel: against timm's features, over any operator, in supernet, export and cost tables. Tiny models."""

import random
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import one_of_each, randomise
from reports import FACTS
from safetensors.torch import save_file

from poolshare.search.exported.export import load_export, save_export
from poolshare.space import OPERATORS, Architecture, ModelError, SearchSpace, SpaceError
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs, measure_parameters
from poolshare.supernet.heads.maps import MapHead
from poolshare.supernet.onnx import write_onnx
from poolshare.supernet.weights import load_base_weights, read_checkpoint

BASE = "vit_tiny_patch16_224"
WIDE = (4, 6)
TINY: dict[str, Any] = {"depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 3, "img_size": (64, 96)}
SPACE = SearchSpace(4, (24, 12, 6), ("max2d", "tome", "topk", "mstm"), 2, None, WIDE)
HEADS = {
    "linear": {"head": "linear", "head_blocks": 1},
    "conv": {"head": "conv"},
    "conv of two": {"head": "conv", "head_blocks": 2},
}
MODELS = {
    "cls": (BASE, {}),
    "pools before its norm": ("vit_base_patch16_gap_224", {}),
    "attention-pooled": ("vit_base_patch16_siglip_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "rotary": ("vit_small_patch16_dinov3", {}),
    "relative": ("beit_base_patch16_224", {}),
}


def make(head: str = "conv", kind: str = "cls", space: SearchSpace = SPACE, **more: Any) -> SuperNet:
    name, options = MODELS[kind]
    net = SuperNet.from_timm(name, space, **{**TINY, **options, **HEADS[head], **more})
    return randomise(net).eval()


def images_for(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def population(space: SearchSpace = SPACE, count: int = 5) -> list[Architecture]:
    return [space[0], *(space.sample(random.Random(seed)) for seed in range(count))]


@pytest.mark.parametrize("kind", one_of_each(MODELS, "cls", "pools before its norm", "rotary"))
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_supernet_export_and_one_by_one_agree_bit_for_bit(head: str, kind: str):
    net, images = make(head, kind), images_for()
    architectures = population()
    together = net(images, architectures)
    assert together.shape == (6, 2, 3, 64, 96)
    for architecture, maps in zip(architectures, together, strict=True):
        assert torch.equal(net(images, [architecture])[0], maps)
        assert torch.equal(Subnet.from_supernet(net, architecture)(images), maps)
    assert torch.equal(net(images), together[0])
    assert net(images, []).shape == (0, 2, 3, 64, 96)


@pytest.mark.parametrize("head", ["linear", "conv"])
@torch.no_grad()
def test_the_dense_model_is_its_head_on_timms_own_features(head: str):
    net, images = make(head), images_for()
    plain = timm.create_model(BASE, **TINY).eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    maps = plain.forward_intermediates(images, indices=list(net.head.blocks), norm=True, intermediates_only=True)
    assert torch.equal(net.head(maps), net(images))
    if head == "linear":  # by its definition
        weight, bias = net.head.classify.weight[:, :, 0, 0], net.head.classify.bias
        logits = torch.einsum("kc,bcrs->bkrs", weight, maps[0]) + bias[:, None, None]
        wanted = F.interpolate(logits, (64, 96), mode="bilinear")
        torch.testing.assert_close(net(images), wanted)


@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_the_head_takes_maps_of_the_full_grid_after_every_operator(operator: str):
    """What `forward_intermediates` gives, which test_tokens compares with a slow reference for every operator."""
    levels = (64, 32, 16) if "max1d" in operator else (64, 16, 4)
    space = SearchSpace(4, levels, (operator,), 1)
    net = make("conv", space=space, img_size=128)
    architecture = Architecture.parse(f"64 {levels[1]}@{operator} {levels[2]}@{operator} {levels[2]}")
    model, taken, images = Subnet.from_supernet(net, architecture), [], torch.randn(2, 3, 128, 128)
    model.head.register_forward_pre_hook(lambda module, given: taken.extend(given[0]))
    logits = model(images)
    maps = model.forward_intermediates(images, norm=True, intermediates_only=True)
    assert [tuple(one.shape) for one in taken] == [(2, 32, 8, 8)] * 4
    assert all(torch.equal(one, other) for one, other in zip(taken, maps, strict=True))
    assert logits.shape == (2, 3, 128, 128)
    assert torch.equal(logits, net(images, [architecture])[0])


@pytest.mark.parametrize("kind", one_of_each(MODELS, "cls", "rotary"))
@pytest.mark.parametrize("head", HEADS)
def test_the_tables_are_those_of_the_exported_model_head_included(head: str, kind: str):
    net = make(head, kind)
    macs, parameters = measure_macs(net), measure_parameters(net)
    for architecture in population(count=3):
        model = Subnet.from_supernet(net, architecture)
        assert macs.total(architecture) == count_macs(model, (images_for(1),)), str(architecture)
        assert parameters.total(architecture) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "head"), [("cls", "conv"), ("rotary", ""), ("relative", "")])
def test_levels_that_are_no_grids_are_counted_where_tokens_have_places(kind: str, head: str):
    """Parts of the table begin in the middle of a path, where only the path knows the places of its tokens."""
    name, options = MODELS[kind]
    space = SearchSpace(4, (24, 11, 5), ("tome", "evit"), 2, None, WIDE)
    net = SuperNet.from_timm(name, space, **{**TINY, **options, **HEADS.get(head, {})})
    macs = measure_macs(net)
    for text in ("24 11@tome 5@evit 5", "24 11@evit*2 5@tome"):
        architecture = Architecture.parse(text)
        assert macs.total(architecture) == count_macs(Subnet.from_supernet(net, architecture), (images_for(1),))


def test_a_head_costs_what_hand_arithmetic_says():
    pixels, patches, width = 64 * 96, 24, 32
    upsampling = 4 * 3 * pixels  # as fvcore has it, four per value
    norm = 5 * patches * width
    assert measure_macs(make("linear")).sink[6] == norm + patches * width * 3 + upsampling
    conv = patches * 4 * width * 128 + patches * 9 * 128 + 5 * patches * 128  # to 128 channels, smoothed, normed
    conv += 4 * patches * 128 * 64 + 5 * 4 * patches * 64 + 16 * patches * 64 * 32  # and twice doubled
    conv += 16 * patches * 32 * 3
    assert {*measure_macs(make("conv")).sink.values()} == {4 * norm + conv + upsampling}


@torch.no_grad()
def test_an_export_is_loaded_by_timm_with_its_head(tmp_path):
    net = make("conv")
    architecture = Architecture.parse("24 12@tome*2 6@topk")
    model = Subnet.from_supernet(net, architecture)
    facts = FACTS | {"task": "segmentation", "targets": "pixels", "metric": "mIoU"}
    config = {"input_size": (3, 64, 96), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0}
    save_export(tmp_path / "out", model, ("sky", "road", "car"), config, facts)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(loaded(images_for()), model(images_for()))
    assert torch.equal(load_export(tmp_path / "out").model.eval()(images_for()), model(images_for()))
    others = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5).eval()
    assert others(images_for()).shape == (2, 5, 64, 96)
    state = others.state_dict()
    fresh = {name for name, value in model.state_dict().items() if not torch.equal(state[name], value)}
    assert fresh == {"head.classify.weight", "head.classify.bias"}
    features = timm.create_model(
        f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True, out_indices=(1, 3)
    )
    assert [tuple(one.shape) for one in features.eval()(images_for())] == [(2, 32, 4, 6)] * 2


@pytest.mark.slow
@torch.no_grad()
def test_onnx_gives_the_same_maps(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Subnet.from_supernet(make("conv"), Architecture.parse("24 12@tome*2 6@topk"))
    write_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"images": images_for(3).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images_for(3)), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_part_of_the_space_gives_the_same_maps():
    net, images = make(), images_for()
    narrow = SearchSpace(4, (24, 12), ("max2d",), 1, None, WIDE)
    architectures = [narrow[0], Architecture.parse("24 24 12@max2d 12")]
    before = net(images, architectures)
    net.offer(narrow)
    assert torch.equal(net(images, architectures), before)
    with pytest.raises(SpaceError, match="is no part of"):
        net.offer(SPACE)


def test_a_head_is_trained_by_every_architecture_of_a_step():
    net = make("conv").train()
    net(images_for(), population(count=2)).square().mean().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in net.head.parameters())


@pytest.mark.parametrize("kind", one_of_each(MODELS, "cls", "attention-pooled"))
def test_a_classifiers_checkpoint_begins_a_model_with_a_fresh_head(kind: str, tmp_path):
    name, options = MODELS[kind]
    plain = randomise(timm.create_model(name, **{**TINY, **options, "num_classes": 11}))
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    net = make("conv", kind)
    head = {name: value.clone() for name, value in net.head.state_dict().items()}
    load_base_weights(net, read_checkpoint(str(tmp_path / "weights.safetensors")), name, fresh_head=True)
    state = net.state_dict()
    for key, value in plain.state_dict().items():
        if not key.startswith(("head", "attn_pool.")):
            assert torch.equal(state[key], value), key
    assert all(torch.equal(net.head.state_dict()[key], value) for key, value in head.items())


def test_a_new_head_is_of_the_same_kind():
    net = make("conv of two")
    net.reset_classifier(7)
    assert isinstance(net.head, MapHead)
    model = Subnet.from_supernet(net, SPACE[0])
    assert model(images_for()).shape == (2, 7, 64, 96)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "mlp"}, "head='mlp' of model"),
        ({"head_blocks": 2}, "head_blocks=2 belongs to a head for every pixel: give head=linear or head=conv too"),
        ({"head": "conv", "head_blocks": 5}, "head_blocks=5: the model has 4 blocks; take from 1 to 4 of them"),
        ({"head": "conv", "head_blocks": 0}, "head_blocks=0"),
        ({"head": "linear", "img_size": (72, 96)}, "those of 16×16 pixels do not divide 72×96"),
        ({"head": "linear", "num_classes": 1}, "num_classes=1: a head for every pixel has at least 2"),
    ],
)
def test_heads_that_cannot_be_made_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(ModelError) as refused:
        SuperNet.from_timm(BASE, SPACE, **{**TINY, **options})
    assert said in str(refused.value)
