"""Attention shared as queries and keys, and as a written map: the same function, by the kernels it is said to run."""

import random
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise
from reports import FACTS
from safetensors.torch import load_file

from poolshare.search.exported.export import load_export, save_export
from poolshare.space import Architecture, ModelError, SearchSpace
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs
from poolshare.supernet.training.loop import memory_of
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.sandwich import sandwich_loss

BASE = "vit_tiny_patch16_224"
TINY = {"depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 7, "img_size": 64}
SPACE = SearchSpace(4, (16, 9, 4), ("max2d", "tome", "topk"), 3)
# Followed by a follower, by a pooling that scores, by one that does not; and in one tree an owner with all of these.
TEXTS = ["16*2 9@tome 9", "16*3 16", "16 9@topk*3", "16 16*2 4@max2d", "16 16 16 16"]
SHARINGS = ["qk", "map"]


def make(sharing: Any = "qk", **more: Any) -> SuperNet:
    net = SuperNet.from_timm(BASE, SPACE, sharing=sharing, **{**TINY, **more})
    randomise(net)
    return net.eval()


def images_for(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def population() -> list[Architecture]:
    return [*map(Architecture.parse, TEXTS), *(SPACE.sample(random.Random(seed)) for seed in range(8))]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """What PyTorch's fused attention is called with: number of keys, and rate of dropout on the map."""
    calls, kernel = [], F.scaled_dot_product_attention

    def counted(queries: torch.Tensor, keys: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if keys.device.type != "meta":  # there a model is looked at before it is made
            calls.append((keys.shape[-2], options.get("dropout_p", 0.0)))
        return kernel(queries, keys, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.usefixtures("kernel")
def test_a_tree_one_by_one_and_the_exported_model_agree_bit_for_bit(sharing):
    net, images = make(sharing), images_for()
    with torch.no_grad():
        together = net(images, population())
        for architecture, logits in zip(population(), together, strict=True):
            assert torch.equal(net(images, [architecture])[0], logits), architecture
            assert torch.equal(Subnet.from_supernet(net, architecture)(images), logits), architecture


@pytest.mark.usefixtures("kernel")
def test_both_sharings_are_one_function_with_the_same_weights_and_gradients():
    images, weight = images_for(), torch.randn(len(population()), 3, 7, generator=torch.Generator().manual_seed(2))
    found = {}
    for sharing in SHARINGS:
        net = make(sharing)
        logits = net(images, population())
        (logits * weight).sum().backward()
        found[sharing] = logits, {name: parameter.grad for name, parameter in net.named_parameters()}
    torch.testing.assert_close(*(found[sharing][0] for sharing in SHARINGS), rtol=1e-4, atol=1e-4)
    for name, gradient in found["qk"][1].items():
        torch.testing.assert_close(gradient, found["map"][1][name], rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize(
    ("text", "qk", "written"),
    [
        ("16*2 9@max2d 4@max2d", [17, 17, 10, 5], [10, 5]),
        ("16*3 16", [17] * 4, [17]),
        ("16 16 9@tome 9", [17, 17, 10, 10], [17, 17, 10, 10]),  # it scores by keys: no map
    ],
)
def test_who_shares_queries_and_keys_stays_in_the_fused_kernel(fused, text, qk, written):
    for sharing, expected in (("qk", qk), ("map", written)):
        fused.clear()
        Subnet.from_supernet(make(sharing), Architecture.parse(text))(images_for())
        assert [keys for keys, _ in fused] == expected, sharing


def test_a_block_that_neither_follows_nor_is_followed_is_timms_own_forward():
    net, called = make(), []
    for index, block in enumerate(net.blocks):
        block.register_forward_hook(lambda *_, index=index: called.append(index))
    with torch.no_grad():
        net(images_for(), [Architecture.parse("16*2 16 9@max2d")])
    assert called == [2, 3]


def test_another_kind_of_sharing_is_refused():
    for make_it in (
        lambda: SuperNet.from_timm(BASE, SPACE, sharing="maps", **TINY),
        lambda: timm.create_model("poolshare_vit", base=BASE, architecture=TEXTS[0], sharing="maps", **TINY),
    ):
        with pytest.raises(ModelError, match=r"sharing='maps' is unknown; it must be 'qk' .* or 'map'"):
            make_it()


# Exported


def test_the_sharing_of_an_exported_folder_is_kept_and_can_be_changed_when_it_is_loaded(tmp_path):
    net = make("map")
    architecture = Architecture.parse("16*2 9@max2d*2")
    model = Subnet.from_supernet(net, architecture)
    data_config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    data_config |= {"interpolation": "bicubic"}
    facts = FACTS | {"macs": measure_macs(net).total(architecture)}
    save_export(tmp_path / "out", model, tuple("abcdefg"), data_config, facts)
    written = load_export(tmp_path / "out").model.eval()
    changed = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, sharing="qk").eval()
    assert (written.sharing, changed.sharing) == ("map", "qk")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(changed.state_dict())
    images = images_for(1)
    with torch.no_grad():
        assert torch.equal(written(images), model(images))
        torch.testing.assert_close(changed(images), model(images), rtol=1e-4, atol=1e-5)
    net.sharing = "qk"
    assert count_macs(written, (images,)) == facts["macs"]
    assert (
        count_macs(changed, (images,)) == measure_macs(net).total(architecture) == facts["macs"] + 17**2 * 32 + 100 * 32
    )


@pytest.mark.parametrize("sharing", SHARINGS)
def test_torch_export_takes_what_shares_and_any_batch(sharing):
    model = Subnet.from_supernet(make(sharing), Architecture.parse("16*2 9@topk*2"))
    program = torch.export.export(
        model, (images_for(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images_for()), model(images_for()), rtol=1e-5, atol=1e-5)


def test_torch_compile_traces_what_shares_as_one_graph():
    model = Subnet.from_supernet(make(), Architecture.parse("16*2 9@topk*2"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the tracing; inductor needs a compiler
    with torch.no_grad():
        torch.testing.assert_close(compiled(images_for()), model(images_for()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # an exported model that shares by queries and keys goes to ONNX in test_elsewhere
@pytest.mark.parametrize("sharing", SHARINGS)
def test_onnx_takes_what_shares(sharing, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra: pip install '.[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install '.[onnx]'")
    from poolshare.supernet.onnx import write_onnx

    model = Subnet.from_supernet(make(sharing), Architecture.parse("16*3 4@max2d"))
    write_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"images": images_for().numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images_for()), rtol=1e-4, atol=1e-4)


# Training


@pytest.mark.parametrize(("sharing", "drawn"), [("qk", 4), ("map", 1)])
def test_dropout_on_the_map_is_drawn_by_each_block_or_once_for_a_written_map(fused, sharing, drawn):
    model = Subnet.from_supernet(make(sharing, attn_drop_rate=0.5), Architecture.parse("16*3 16")).train()
    on_maps = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda *_: on_maps.append(1))
    model(images_for())
    assert [rate for _, rate in fused] == [0.5] * drawn
    assert len(on_maps) == (sharing == "map")  # the owner's; its followers take the map as it is
    fused.clear()
    model.eval()(images_for())
    assert [rate for _, rate in fused] == [0.0] * drawn


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("space", [SPACE, SearchSpace(4, (16, 9, 4), ("kmeans", "max2d_conv", "evit"), 4)])
def test_checkpointing_changes_no_gradient(sharing, space):
    net = SuperNet.from_timm(BASE, space, sharing=sharing, drop_path_rate=0.3, proj_drop_rate=0.1, **TINY)
    randomise(net)
    net.train()
    architectures = [space[0], *(space.sample(random.Random(seed)) for seed in range(4))]
    labels, found = torch.tensor([0, 1, 2]), []
    for checkpoint in (False, True):
        net.zero_grad()
        torch.manual_seed(0)
        with memory_of(Recipe(checkpoint=checkpoint), net):
            loss = sandwich_loss(net, images_for(), labels, architectures)
            loss.backward()
        found.append((loss, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}))
    assert not net.grad_checkpointing
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_checkpointing_an_exported_model_runs_its_blocks_twice():
    model = Subnet.from_supernet(make(), Architecture.parse("16*2 9@topk*2")).train()
    runs = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        runs.clear()
        model(images_for()).square().sum().backward()
        assert len(runs) == 1 + enable
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
