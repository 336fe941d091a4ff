"""A base model's weights from a file: as timm adapts them, and a clear report of what does not fit."""

import argparse
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from poolshare.space import ModelError, SearchSpace
from poolshare.supernet import SuperNet
from poolshare.supernet.weights import Card, Head, load_base_weights, read_card, read_checkpoint

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
        ({"num_classes": 3, "img_size": 64}, []),
        ({"num_classes": 7, "img_size": 96}, ["has positions for 17 tokens, the model 37: resampled as in timm"]),
        ({"num_classes": 7, "img_size": 64, "in_chans": 1}, ["takes 3 channels, the model 1: adapted as in timm"]),
        ({"num_classes": 7, "img_size": 64, "patch_size": 8}, ["has positions for 17 tokens, the model 65"]),
    ],
)
def test_weights_are_adapted_as_timm_adapts_its_own(options, notes, file):
    model = timm.create_model(NAME, **options, **SMALL)
    head = model.head.weight.clone()
    told = load_base_weights(model, file, NAME, fresh_head=options["num_classes"] != 7)
    assert torch.equal(model.head.weight, head) == (options["num_classes"] != 7)
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
        (lambda t: [t.pop(key) for key in list(t)[:-1]], r"it lacks blocks.0.attn.proj.bias, .* and \d+ more"),
        (lambda t: t.update({"head.weight": torch.ones(9, 24)}), r"head.weight \(9, 24\), not \(7, 24\)"),
        (lambda t: t.clear(), "holds no tensors by name"),
        (
            lambda t: t["blocks.1.mlp.fc2.bias"].fill_(float("nan")),
            r"blocks.1.mlp.fc2.bias holds values that are not finite",
        ),
        (lambda t: t["norm.weight"][0].fill_(float("inf")), r"norm.weight holds values that are not finite"),
        (lambda t: t.update({"blocks.1.attn.v.weight": torch.ones(2)}), "layers share attention.*--architecture dense"),
        (lambda t: t.update({"a.lora_A.weight": torch.ones(2)}), "merge_and_unload"),
        (lambda t: t.update({"vit.embeddings.patch_embeddings.x": torch.ones(2)}), "transformers' own ViT"),
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


class Opaque:
    """Something only pickle can keep."""


def wrapped(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("ending", "hide"),
    [
        (".pth", lambda w: w),
        (".pth.tar", lambda w: {"model": wrapped(w, "module."), "epoch": 3, "args": argparse.Namespace(lr=0.1)}),
        (".bin", lambda w: {"state_dict": wrapped(w, "_orig_mod.module."), "classes": list("gfedcba")}),
        (".pt", lambda w: {"model_state_dict": wrapped(w, "module._orig_mod."), "optimizer": {"state": [1, 2]}}),
        (".ckpt", lambda w: {"state_dict": {**wrapped(w, "model."), "loss.weight": torch.ones(2)}}),
        (".pth", lambda w: {"state_dict": wrapped(w, "old."), "state_dict_ema": w}),
        (".pth", lambda w: {"model": {**wrapped(w, "module."), "n_averaged": torch.tensor(5)}}),
    ],
)
def test_what_training_scripts_save_is_read_to_the_same_weights(ending, hide, file, tmp_path):
    weights = load_file(file)
    torch.save(hide(weights), tmp_path / f"saved{ending}")
    found = read_checkpoint(str(tmp_path / f"saved{ending}"))
    assert found.tensors.keys() == weights.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in weights.items())
    assert found.head == Head(7, f"saved{ending}", *((tuple("gfedcba"), "saved.bin") if ending == ".bin" else ()))
    if "state_dict_ema" in hide({}):
        assert "the moving average of its weights (state_dict_ema) is taken" in found.notes[0]
    if ending == ".ckpt":
        assert found.notes == ("saved.ckpt: the weights below 'model' are taken, loss.weight left aside",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Opaque(), r"holds pickled code \(.*Opaque\), which is not run here.*torch.save\(model.state_dict"),
        ({"model": {}, "extra": Opaque()}, "holds pickled code"),
        ([torch.ones(2)], "holds a list, not weights by name"),
        ({"epoch": 3}, "holds no tensors by name"),
    ],
)
def test_a_torch_file_without_weights_or_with_code_is_refused_and_nothing_is_run(content, says, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ModelError, match=says):
        read_checkpoint(str(tmp_path / "model.pth"))


def test_a_folder_that_timm_saved_brings_its_names_and_its_input(tmp_path, file):
    model = timm.create_model(NAME, num_classes=7, img_size=64, **SMALL)
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.1, 0.2, 0.3), input_size=(3, 64, 64))
    load_base_weights(model, file, NAME)
    names = tuple(f"kind {index}" for index in range(7))
    save_for_hf(
        model, tmp_path / "own", model_config={"label_names": list(names)}, model_args=SMALL, safe_serialization=True
    )
    args = SMALL | {"global_pool": "token"}
    for name in (str(tmp_path / "own"), f"local-dir:{tmp_path / 'own'}"):
        card, found = read_card(name), read_checkpoint(name)
        assert (card.model, card.model_args, card.img_size, card.in_chans, card.names) == (NAME, args, 64, 3, names)
        assert card.preprocessing["mean"] == [0.1, 0.2, 0.3]
        assert found.head == Head(7, name, names, f"{name}/config.json")
        assert torch.equal(found.tensors["head.weight"], model.head.weight)
    again = timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True)
    assert torch.equal(again.norm.weight, found.tensors["norm.weight"])


def test_a_card_of_an_exported_model_names_what_it_was_made_from(tmp_path):
    args = {"base": NAME, "architecture": "16 4@max2d", "img_size": 64, "depth": 2}
    config = {
        "architecture": "poolshare_vit",
        "model_args": args,
        "num_classes": 7,
        "pretrained_cfg": {"crop_pct": 1.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_card(str(tmp_path)) == Card(NAME, {"depth": 2}, 64, None, {"crop_pct": 1.0})


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no model.safetensors or pytorch_model.bin: give the weights' file as --weights"),
        ({"a.pth": b"", "b.pth": b""}, "holds a.pth, b.pth: give one of these files"),
        ({"a.pth": b"", "config.json": b'{"model_type": "vit"}'}, "no timm architecture of transformers .vit."),
        ({"model.safetensors": b""}, "cannot be read"),
        ({"model.npz": b""}, "holds no model.safetensors"),
    ],
)
def test_a_folder_without_weights_of_timm_is_refused_with_what_to_give(files, says, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=says):
        read_card(str(tmp_path)) if "config.json" in files else read_checkpoint(str(tmp_path))


def test_names_that_are_nowhere_are_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no folder"):
        read_checkpoint(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(ModelError, match="NumPy archive"):
        read_checkpoint(str(tmp_path / "augreg.npz"))
    with pytest.raises(ModelError, match="download its folder, and give that as local-dir:FOLDER"):
        read_checkpoint("hf-hub:no name of a repository")


@pytest.mark.skipif("POOLSHARE_DATA" not in os.environ, reason="POOLSHARE_DATA names no folder with ViT-Tiny's weights")
def test_the_published_vit_tiny_fits_another_image_size_and_other_classes():
    model = timm.create_model(NAME, num_classes=10, img_size=112)
    path = Path(os.environ["POOLSHARE_DATA"]) / "vit_tiny_patch16_224.safetensors"
    assert len(load_base_weights(model, path, NAME, fresh_head=True)) == 1
    assert read_checkpoint(str(path)).head.named.names[:2] == ("n01440764", "n01443537")
    assert torch.equal(model.blocks[5].attn.qkv.weight, load_file(path)["blocks.5.attn.qkv.weight"])
