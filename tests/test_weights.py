"""A base model's weights from a file: as timm adapts them, and a clear report of what does not fit."""

import os
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file

from poolshare.space import ModelError, SearchSpace
from poolshare.supernet import SuperNet
from poolshare.supernet.weights import load_base_weights

NAME = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of a small ViT at 64 pixels with 7 classes."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = randomise(timm.create_model(NAME, num_classes=7, img_size=64, **SMALL))
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"num_classes": 7, "img_size": 64}, []),
        ({"num_classes": 3, "img_size": 64}, ["has 7 classes, the data 3: the head is a new one"]),
        ({"num_classes": 7, "img_size": 96}, ["has positions for 17 tokens, the model 37: resampled as in timm"]),
        ({"num_classes": 7, "img_size": 64, "in_chans": 1}, ["takes 3 channels, the model 1: adapted as in timm"]),
        ({"num_classes": 7, "img_size": 64, "patch_size": 8}, ["has positions for 17 tokens, the model 65"]),
    ],
)
def test_weights_are_adapted_as_timm_adapts_its_own(options, notes, file):
    model = timm.create_model(NAME, **options, **SMALL)
    told = load_base_weights(model, file, NAME)
    assert len(told) == len(notes)
    for one, text in zip(told, notes, strict=True):
        assert f"model.safetensors {text}" in one
    overlay = {"file": str(file), "num_classes": 7, "input_size": (3, 64, 64)}
    expected = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **options, **SMALL)
    for name, value in expected.state_dict().items():
        if not (name.startswith("head.") and options["num_classes"] != 7):
            assert torch.equal(model.state_dict()[name], value), name


def test_a_supernet_keeps_its_own_poolings(file):
    space = SearchSpace(depth=2, levels=(16, 4), operators=("max2d_conv",))
    net = randomise(SuperNet.from_timm(NAME, space, num_classes=7, img_size=64, **SMALL), seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert load_base_weights(net, file, NAME) == ()
    saved = load_file(file)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("poolings.") else saved[name]), name


def changed(path, file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("blocks.1.norm1.weight"), "it lacks blocks.1.norm1.weight; give the --model"),
        (lambda t: t.update({"neck.weight": torch.ones(2)}), "it has besides neck.weight; give"),
        (
            lambda t: t.update({"blocks.0.mlp.fc1.bias": torch.ones(5)}),
            r"it has in another shape blocks.0.mlp.fc1.bias \(5,\), not \(96,\)",
        ),
        (lambda t: t.update({"pos_embed": torch.ones(3, 4)}), "cannot be adapted to this model"),
        (lambda t: t.update({"pos_embed": torch.ones(1, 17, 5)}), r"pos_embed \(1, 17, 5\), not \(1, 17, 24\)"),
        (lambda t: t.clear(), r"it lacks blocks.0.attn.proj.bias, .* and \d+ more"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, says, file, tmp_path):
    model = timm.create_model(NAME, num_classes=7, img_size=64, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=says):
        load_base_weights(model, changed(tmp_path / "other.safetensors", file, change), NAME)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_is_none_is_refused(tmp_path):
    model = timm.create_model(NAME, num_classes=7, img_size=64, **SMALL)
    for content in (b"", b"\x80\x04pickle", b"\xff" * 64):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.safetensors cannot be read"):
            load_base_weights(model, tmp_path / "bad.safetensors", NAME)
    with pytest.raises(ModelError, match=r"none\.safetensors cannot be read"):
        load_base_weights(model, tmp_path / "none.safetensors", NAME)


@pytest.mark.skipif("POOLSHARE_DATA" not in os.environ, reason="POOLSHARE_DATA names no folder with ViT-Tiny's weights")
def test_the_published_vit_tiny_fits_another_image_size_and_other_classes():
    model = timm.create_model(NAME, num_classes=10, img_size=112)
    path = Path(os.environ["POOLSHARE_DATA"]) / "vit_tiny_patch16_224.safetensors"
    assert len(load_base_weights(model, path, NAME)) == 2
    assert torch.equal(model.blocks[5].attn.qkv.weight, load_file(path)["blocks.5.attn.qkv.weight"])
