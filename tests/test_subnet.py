"""Exported models against the supernet they come from, and the dense one against unmodified timm."""

import copy
import inspect
import random
from math import isqrt
from typing import Any

import pytest
import timm
import torch
from conftest import one_of_each, randomise
from timm.layers import DropPath
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from poolshare.space import OPERATORS, Architecture, ArchitectureError, ModelError, Operator, SearchSpace, SpaceError
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.subnet import checkpoint_filter_fn

TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 7, "img_size": 64}
BASE = "vit_tiny_patch16_224"
SPACE = SearchSpace(4, (16, 9, 4), ("max2d", "avg2d"), 3)
DENSE = "16 16 16 16"
POOLED = "16*2 9@max2d 4@avg2d"  # an owner with a follower, two that nobody follows
TEXTS = [DENSE, POOLED, "16*3 16", "16 9@avg2d*3", "16 4@max2d*2 4", "16*2 9@avg2d*2"]
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "cls": (BASE, {}),
    "registers, no cls": ("vit_base_patch16_reg4_gap_256", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "query-key norm": (BASE, {"qk_norm": True}),
    "scale norms": (BASE, {"scale_attn_norm": True}),
    "no bias in qkv": (BASE, {"qkv_bias": False}),
    "attention-pooled": ("vit_base_patch16_siglip_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "RMSNorm": (BASE, {"norm_layer": "rmsnorm", "dynamic_img_size": True}),
}


def supernet(kind: str = "cls", space: SearchSpace = SPACE, **more: Any) -> SuperNet:
    name, options = VITS[kind]
    net = SuperNet.from_timm(name, space, **{**TINY, **options, **more})
    randomise(net)
    return net.eval()


def exported(text: str = POOLED, kind: str = "cls", **more: Any) -> Subnet:
    return Subnet.from_supernet(supernet(kind, **more), Architecture.parse(text))


def images_for(batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


# The supernet's logits


@pytest.mark.parametrize("kind", one_of_each(VITS, "cls", "registers, no cls", "query-key norm", "attention-pooled"))
@pytest.mark.usefixtures("kernel")
def test_logits_are_the_supernets_bit_for_bit(kind: str):
    net, images = supernet(kind), images_for()
    population = [Architecture.parse(text) for text in TEXTS] + [SPACE.sample(random.Random(seed)) for seed in (1, 2)]
    with torch.no_grad():
        expected = net(images, population)
        for architecture, logits in zip(population, expected, strict=True):
            model = Subnet.from_supernet(net, architecture)
            assert not model.training
            assert torch.equal(model(images), logits), str(architecture)


def test_the_weights_are_a_copy_in_the_supernets_precision_and_mode():
    net = supernet().double().train()
    architecture = Architecture.parse(POOLED)
    model = Subnet.from_supernet(net, architecture)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    images = images_for().double()
    with torch.no_grad():
        expected = net(images, [architecture])[0]
        torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)  # no detour over float32
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(net(images, [architecture])[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_run_and_agree_as_far_as_they_can(dtype: torch.dtype):
    model, images = exported(), images_for()
    with torch.no_grad():
        expected = model(images)
        found = model.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    error = (found.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_a_supernets_new_head_is_exported_too():
    for pool in (None, "avg"):
        net = supernet()
        net.reset_classifier(3, pool)
        randomise(net, seed=4)
        model = Subnet.from_supernet(net, Architecture.parse(POOLED))
        with torch.no_grad():
            logits = model(images_for())
            torch.testing.assert_close(logits, net(images_for(), [model.architecture])[0], rtol=1e-4, atol=1e-4)
        assert logits.shape == (3, 3)


def test_a_copy_is_the_same_model():
    model = exported()
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert twin.architecture == model.architecture
    assert torch.equal(twin(images_for()), model(images_for()))


# Only the weights it needs


@pytest.mark.parametrize("kind", VITS)
def test_every_weight_is_used_and_none_is_missing(kind: str):
    model = exported("16*2 16 9@max2d", kind).train()
    (model(images_for()) * torch.randn(3, 7, generator=torch.Generator().manual_seed(0))).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("text", TEXTS)
def test_followers_hold_values_and_no_queries_or_keys(text: str):
    model, net = exported(text, "query-key norm"), supernet("query-key norm")
    names = set(model.state_dict())
    for index, layer in enumerate(Architecture.parse(text).layers):
        of_block = {name.removeprefix(f"blocks.{index}.attn.") for name in names if f"blocks.{index}.attn." in name}
        proj = {"proj.weight", "proj.bias"}
        norms = {f"{which}_norm.{part}" for which in "qk" for part in ("weight", "bias")}
        if layer.shared:
            assert of_block == proj | {"v.weight", "v.bias"}
            full = net.blocks[index].attn.qkv
            assert torch.equal(model.blocks[index].attn.v.weight, full.weight[64:])
            assert torch.equal(model.blocks[index].attn.v.bias, full.bias[64:])
        else:
            assert of_block == proj | norms | {"qkv.weight", "qkv.bias"}
    outside = {name for name in names if ".attn." not in name}
    assert outside == {name for name in net.state_dict() if ".attn." not in name}


@pytest.mark.parametrize("kind", VITS)
def test_the_base_models_own_state_dict_fits(kind: str):
    name, options = VITS[kind]
    base = randomise(timm.create_model(name, **{**TINY, **options}), seed=6)
    state = base.state_dict()
    kept = {key: tensor.clone() for key, tensor in state.items()}
    model = timm.create_model("poolshare_vit", base=name, architecture=POOLED, **{**TINY, **options}).eval()
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    assert set(state) == set(kept)
    net = SuperNet.from_timm(name, SPACE, **{**TINY, **options}).eval()
    net.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(images_for()), net(images_for(), [model.architecture])[0])
    again = checkpoint_filter_fn(model.state_dict(), model)  # its own: nothing to do
    assert {key: tensor.data_ptr() for key, tensor in again.items()} == {
        key: tensor.data_ptr() for key, tensor in model.state_dict().items()
    }


# timm's interface: intermediates and features


INTERMEDIATES: list[dict[str, Any]] = [
    {},
    {"indices": 2},
    {"indices": [0, 2]},
    {"indices": [2, 0]},
    {"indices": [-1]},
    {"norm": True},
    {"return_prefix_tokens": True, "indices": 3},
    {"output_fmt": "NLC", "return_prefix_tokens": True},
    {"intermediates_only": True, "norm": True},
    {"indices": [1], "stop_early": True},
    {"output_dict": True},
    {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True, "output_fmt": "NLC"},
]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.shape == expected.shape and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    return (
        type(found) is type(expected)
        and len(found) == len(expected)
        and all(same(f, e) for f, e in zip(found, expected, strict=True))
    )


@pytest.mark.parametrize("options", INTERMEDIATES, ids=str)
@pytest.mark.parametrize("kind", ["cls", "registers, no cls", "layer scale"])
def test_intermediates_of_the_dense_architecture_are_timms(kind: str, options: dict[str, Any]):
    name, more = VITS[kind]
    model = exported(DENSE, kind)
    base = timm.create_model(name, **{**TINY, **more}).eval()
    base.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model.forward_intermediates(images_for(), **options)
        expected = base.forward_intermediates(images_for(), **options)
    assert same(found, expected)


def test_intermediates_take_every_argument_of_timms():
    ours, timms = (inspect.signature(cls.forward_intermediates).parameters for cls in (Subnet, VisionTransformer))
    assert [*timms, "maps"] == list(ours)
    assert {name: ours[name].default for name in timms} == {name: p.default for name, p in timms.items()}


@pytest.mark.parametrize("norm", [False, True])
def test_intermediates_of_a_pooled_architecture_are_its_tokens_on_shrinking_maps(norm: bool):
    net = supernet("registers, no cls")
    architecture = Architecture.parse("16*2 9@max2d 4@avg2d")
    model = Subnet.from_supernet(net, architecture)
    with torch.no_grad():
        tokens, last_map = net.embed(images_for()), None
        expected = []
        for index, layer in enumerate(architecture.layers):
            tokens, last_map = net.run_layer(index, layer, tokens, last_map)
            expected.append(net.norm(tokens.features) if norm else tokens.features)
        final, pairs = model.forward_intermediates(images_for(), return_prefix_tokens=True, norm=norm, maps="reduced")
        flat = model.forward_intermediates(images_for(), norm=norm, output_fmt="NLC", intermediates_only=True)
    assert [grid.shape for grid, _ in pairs] == [(3, 32, side, side) for side in (4, 4, 3, 2)]
    for (grid, prefix), sequence, whole in zip(pairs, flat, expected, strict=True):
        assert torch.equal(prefix, whole[:, :4])
        assert torch.equal(sequence, whole[:, 4:])
        side = isqrt(sequence.shape[1])
        for row in range(side):
            for column in range(side):
                assert torch.equal(grid[:, :, row, column], sequence[:, row * side + column])
    assert torch.equal(final, net.norm(tokens.features))
    assert torch.equal(model.forward_head(final), model(images_for()))


def test_older_access_to_intermediates_works_too():
    model = exported()
    layers = model.get_intermediate_layers(images_for(), n=[0, 3])
    expected = model.forward_intermediates(images_for(), [0, 3], output_fmt="NLC", intermediates_only=True)
    assert same(layers, expected)


def test_a_feature_extractor_of_the_dense_architecture_is_timms():
    options = {**TINY, "features_only": True, "out_indices": (0, 2)}
    ours = timm.create_model("poolshare_vit", base=BASE, architecture=DENSE, **options).eval()
    base = timm.create_model(BASE, **options).eval()
    base.load_state_dict(ours.state_dict())
    assert ours.feature_info.channels() == base.feature_info.channels()
    assert ours.feature_info.reduction() == base.feature_info.reduction()
    with torch.no_grad():
        assert same(ours(images_for()), base(images_for()))


@pytest.mark.parametrize("out_indices", [(0, 1), (1, 2, 3), [-1], (0, 3)])
@pytest.mark.parametrize("maps", ["nearest", "reduced"])
def test_a_feature_extractor_of_a_pooled_architecture_gives_its_maps(out_indices: Any, maps: str):
    extractor = timm.create_model(
        "poolshare_vit", base=BASE, architecture=POOLED, features_only=True, out_indices=out_indices, maps=maps, **TINY
    ).eval()
    sides = [4, 4, 3, 2] if maps == "reduced" else [4, 4, 4, 4]
    whole = timm.create_model("poolshare_vit", base=BASE, architecture=POOLED, **TINY).eval()
    state = whole.state_dict()
    state.update({key.removeprefix("model."): tensor for key, tensor in extractor.state_dict().items()})
    whole.load_state_dict(state)
    with torch.no_grad():
        features = extractor(images_for())
        expected = whole.forward_intermediates(images_for(), list(out_indices), intermediates_only=True, maps=maps)
    assert [found.shape[-1] for found in features] == [sides[index] for index in out_indices]
    assert [16 * 4 / sides[index] for index in out_indices] == extractor.feature_info.reduction()
    for found, tokens in zip(features, expected, strict=True):
        torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)


def test_pruning_drops_later_blocks_from_the_architecture_too():
    model = exported("16*2 9@max2d*2")
    with torch.no_grad():
        expected = model.forward_intermediates(images_for(), [2], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([0, 2]) == [0, 2]
        assert str(model.architecture) == "16*2 9@max2d"
        assert len(model.blocks) == 3
        found = model.forward_intermediates(images_for(), [2], intermediates_only=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_grid_that_an_operator_gave_up_has_no_map(monkeypatch: pytest.MonkeyPatch):
    lossy = Operator("max2d", "as if it lost the grid", OPERATORS["max2d"].can_reduce, needs_grid=True)
    model = exported("16*2 9@max2d*2")
    monkeypatch.setitem(OPERATORS, "max2d", lossy)
    assert len(model.forward_intermediates(images_for(), [0, 1], intermediates_only=True, maps="reduced")) == 2
    with pytest.raises(
        ModelError,
        match=r"after layer 2 \(max2d\).*layer 3; ask for maps='nearest', output_fmt='NLC' or layers before 2",
    ):
        model.forward_intermediates(images_for(), [3], maps="reduced")
    assert model.forward_intermediates(images_for(), [3], output_fmt="NLC")[1][0].shape == (3, 9, 32)
    with pytest.raises(ModelError, match="output_fmt is 'NHWC'; it must be 'NCHW' or 'NLC'"):
        model.forward_intermediates(images_for(), output_fmt="NHWC")


# timm's interface: everything else


def test_a_new_head_changes_nothing_else():
    model, images = exported(), images_for()
    with torch.no_grad():
        features, before = model.forward_features(images), model.forward_head(model.forward_features(images), True)
        assert features.shape == (3, 1 + 4, 32)
        model.reset_classifier(3)
        assert model(images).shape == (3, 3)
        assert model.num_classes == model.get_classifier().out_features == 3
        model.reset_classifier(0)
        assert torch.equal(model(images), before)
        model.reset_classifier(5, "avg")
        mean = model.head(model.fc_norm(features[:, 1:].mean(1)))
        torch.testing.assert_close(model(images), mean, rtol=1e-5, atol=1e-5)


def test_drop_path_is_timms_and_works_in_training_alone():
    base = timm.create_model(BASE, drop_path_rate=0.6, **TINY)
    model = timm.create_model("poolshare_vit", base=BASE, architecture=POOLED, drop_path_rate=0.6, **TINY)
    randomise(model)

    def rates(vit: VisionTransformer) -> list[float]:
        return [path.drop_prob for b in vit.blocks for path in (b.drop_path1, b.drop_path2) if type(path) is DropPath]

    assert rates(model) == rates(base)
    assert max(rates(model)) == pytest.approx(0.6)
    images = images_for(batch=8)
    with torch.no_grad():
        plain = timm.create_model("poolshare_vit", base=BASE, architecture=POOLED, **TINY).eval()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(images), plain(images))
        torch.manual_seed(0)
        model.train()
        assert not torch.allclose(model(images), model(images))


@pytest.mark.parametrize("text", one_of_each([DENSE, POOLED, "16*3 4@max2d"], POOLED))
def test_torch_export_gives_the_same_logits(text: str):
    model, images = exported(text), images_for()
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)


def test_it_carries_the_base_models_data_configuration_and_no_source_of_weights():
    for base in (BASE, "vit_base_patch16_siglip_224"):
        model = timm.create_model("poolshare_vit", base=base, architecture=POOLED, **TINY)
        original = timm.create_model(base, **TINY)
        ours, theirs = (timm.data.resolve_model_data_config(m) for m in (model, original))
        assert ours == theirs
        assert model.pretrained_cfg["architecture"] == "poolshare_vit"
        assert not {"url", "hf_hub_id", "file"} & {key for key, value in model.pretrained_cfg.items() if value}


def test_it_is_registered_with_timm():
    assert timm.is_model("poolshare_vit")
    model = timm.create_model("poolshare_vit", base=BASE, architecture=POOLED, **TINY)
    assert isinstance(model, Subnet)
    assert isinstance(model, VisionTransformer)
    assert str(model.architecture) == POOLED
    assert model.no_weight_decay() == timm.create_model(BASE, **TINY).no_weight_decay()


@pytest.mark.parametrize(
    ("error", "arguments", "fragments"),
    [
        (SpaceError, {}, ["needs base=", "architecture=", "local-dir:FOLDER"]),
        (SpaceError, {"base": BASE}, ["needs base=", "architecture="]),
        (SpaceError, {"architecture": POOLED}, ["needs base="]),
        (ArchitectureError, {"base": BASE, "architecture": "16 x"}, ["run 2", "'x'"]),
        (ArchitectureError, {"base": BASE, "architecture": "16 9*3"}, ["layer 1 (9)", "needs an operator"]),
        (SpaceError, {"base": BASE, "architecture": "16*3 16*2"}, ["depth 5", f"{BASE} has 4 blocks"]),
        (SpaceError, {"base": BASE, "architecture": "25*4"}, ["25 patch tokens", "(64, 64) has 16"]),
        (SpaceError, {"base": BASE, "architecture": "16*2 9@foo*2"}, ["operator 'foo' is unknown", "max2d"]),
        (SpaceError, {"base": BASE, "architecture": "16*2 8@max2d*2"}, ["level 8 cannot be reached", "not a square"]),
        (ModelError, {"base": "vit_tiny_patch16_22", "architecture": POOLED}, ["no model 'vit_tiny_patch16_22'"]),
        (ModelError, {"base": BASE, "architecture": POOLED, "shape": 3}, [BASE, "shape=3"]),
        (ModelError, {"base": BASE, "architecture": POOLED, "patch_drop_rate": 0.5}, ["patch_drop_rate=0"]),
    ],
)
def test_what_cannot_be_created_is_refused_clearly(error: type[Exception], arguments: Any, fragments: list[str]):
    with pytest.raises(error) as caught:
        timm.create_model("poolshare_vit", **{**TINY, **arguments})
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_unsupported_base_is_refused_by_name():
    with pytest.raises(ModelError, match=r"'cait_xxs24_224' cannot be searched: .*talking heads"):
        timm.create_model("poolshare_vit", base="cait_xxs24_224", architecture=POOLED, num_classes=7)
    with pytest.raises(ModelError, match="'resnet18' cannot be searched: it is a ResNet"):
        timm.create_model("poolshare_vit", base="resnet18", architecture=POOLED, num_classes=7)


def test_an_architecture_outside_the_space_is_not_exported():
    with pytest.raises(ArchitectureError, match=r"layer 3 \(16\) of '16\*4': at most 3 layers in a row"):
        Subnet.from_supernet(supernet(), Architecture.parse("16*4"))


def test_what_pooling_forbids_is_refused():
    model, images = exported(), images_for()
    mask = torch.ones(17, 17, dtype=torch.bool)
    for refuse in (model.forward, model.forward_features, model.forward_intermediates):
        for options in ({"attn_mask": mask}, {"is_causal": True}):
            with pytest.raises(ModelError, match="takes no attention mask"):
                refuse(images, **options)
    with pytest.raises(ModelError, match=r"'16\*2 9@max2d 4@avg2d' belongs to one image size"):
        model.set_input_size(img_size=128)


# Wrong uses


FREE = "16*2 9@tome*2"  # tome gives up the grid


def test_features_only_after_an_operator_without_a_grid_is_refused_when_the_model_is_made():
    options = {"base": BASE, "architecture": FREE, "features_only": True, "maps": "reduced", **TINY}
    with pytest.raises(ModelError, match=r"after layer 2 \(tome\).*maps='nearest'.*take that or out_indices before 2"):
        timm.create_model("poolshare_vit", **options)
    model = timm.create_model("poolshare_vit", **options, out_indices=(0, 1)).eval()
    assert [found.shape[-1] for found in model(images_for())] == [4, 4]
    whole = timm.create_model("poolshare_vit", **(options | {"maps": "nearest"})).eval()
    assert [found.shape[-1] for found in whole(images_for())] == [4, 4, 4]
    with pytest.raises(ModelError, match="maps='small' is unknown; it must be one of 'nearest', 'bilinear', 'reduced'"):
        timm.create_model("poolshare_vit", **(options | {"maps": "small"}))


@pytest.mark.parametrize("operator", ["tome", "kmedoids", "kmeans", "mstm"])
def test_a_forward_on_the_meta_device_gives_shapes(operator: str):
    with torch.device("meta"):
        model = Subnet.from_base(BASE, f"16*2 9@{operator}*2", **TINY).eval()
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_a_model_made_from_its_base_can_be_saved_as_timm_does_and_loaded(tmp_path):
    model = Subnet.from_base(BASE, POOLED, **{**TINY, "qkv_bias": "False"}).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(again, Subnet)
    assert str(again.architecture) == POOLED
    assert torch.equal(again(images_for()), model(images_for()))


def test_another_global_pool_at_loading_leaves_the_norm_where_it_was(tmp_path):
    model = Subnet.from_base(BASE, POOLED, **TINY).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, global_pool="avg").eval()
    model.reset_classifier(7, "avg")  # timm's own way to another pool
    model.head.load_state_dict(again.head.state_dict())
    assert torch.equal(again(images_for()), model(images_for()))
    with pytest.raises(ModelError, match="global_pool='map' has weights of its own, which this export with 'token'"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, global_pool="map")
