"""All of timm's ViTs: what is accepted computes what timm does, what is refused says in one line what is missing."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from torch import nn

from poolshare.space import ModelError, SearchSpace
from poolshare.supernet import Subnet, SuperNet, base

# Modules of timm whose models are transformers on patches of an image.
MODULES = (
    "vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva", "beit", "vision_transformer_relpos",
    "vision_transformer_sam", "naflexvit", "cait", "convit", "crossvit", "tnt", "volo", "xcit", "deepseek_vit",
    "gemma4_vit", "qwen3_vit",
)  # fmt: skip
PLAIN = {"vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva"}


def structure(model: Any) -> tuple[Any, ...]:
    """What makes a difference to how a model is run: kinds of its parts, not their sizes."""
    tokens = (model.has_class_token, model.reg_token is not None, model.no_embed_class, model.pos_embed is None)
    head = (
        model.global_pool,
        getattr(model, "pool_include_prefix", None),
        type(model.fc_norm),
        type(model.norm),
        type(model.norm_pre),
    )
    stem = type(getattr(model.patch_embed, "backbone", None)), type(model.patch_embed), model.dynamic_img_size
    block = tuple((name, type(part).__name__) for name, part in model.blocks[0].named_modules())
    biases = tuple(name for name, _ in model.blocks[0].named_parameters())
    return type(model), tokens, head, stem, block, biases


def small(name: str, model: Any) -> dict[str, Any]:
    """Options of the same structure at a small size."""
    options: dict[str, Any] = {"depth": 2, "num_classes": 5}
    if isinstance(model.patch_embed, HybridEmbed):
        options["img_size"] = tuple(4 * model.patch_embed.feat_ratio(as_scalar=False)[0] for _ in range(2))
        if isinstance(model.patch_embed.proj, nn.Identity):
            return options
    else:
        options["img_size"] = 4 * model.patch_embed.patch_size[0]
    return options | {"embed_dim": 64, "num_heads": 2}


def agree(name: str, options: dict[str, Any]) -> None:
    """Dense path and timm's forward, on the same weights and images; and a pooled, shared one as stand-alone model."""
    net = SuperNet.from_timm(name, SearchSpace(2, (16, 4), ("max2d",), 2), **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # no zero is left where timm begins with one
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
        unmodified = timm.create_model(name, **options).eval()
        unmodified.load_state_dict(net.state_dict())
        images = torch.randn(2, net.in_chans, *net.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
        expected = unmodified(images)
        assert (expected[0] - expected[1]).abs().max() > 1e-4  # the images matter
        torch.testing.assert_close(net(images, [net.space[0]])[0], expected, rtol=1e-4, atol=1e-4)
        cheapest = net.space[net.space.size - 1]
        pooled = net(images, [cheapest])[0]
        torch.testing.assert_close(Subnet.from_supernet(net, cheapest)(images), pooled, rtol=1e-4, atol=1e-4)


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        base.outline(name, options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"model {name!r} cannot be searched: it ")
    return message


@pytest.mark.slow
def test_every_vit_of_timm_is_run_faithfully_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_check_memory", lambda *_: None)  # a small machine refuses the largest for that alone
    structures: dict[Any, tuple[str, dict[str, Any]]] = {}
    accepted, reasons = [], {}
    for module in MODULES:
        for name in timm.list_models(module=module):
            try:
                model = base.outline(name, {})
            except ModelError:
                reasons[name] = refusal(name)
                expected = (
                    {**base.BLOCKS, "": "share keys and values"}
                    if module in PLAIN
                    else {**base.MISSING, "": "rotary", "-": "relative"}
                )
                assert any(part in reasons[name] for part in expected.values()) or "it is a" in reasons[name], name
            else:
                accepted.append(name)
                assert module in PLAIN
                structures.setdefault(structure(model), (name, small(name, model)))
    assert len(accepted) > 200
    assert 0 < sum(name.startswith(("vit_", "deit")) for name in reasons) < len(accepted) / 4
    for name, options in structures.values():
        agree(name, options)


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("beit_base_patch16_224", {"depth": 1}, "relative position biases"),
        ("vit_relpos_small_patch16_224", {"depth": 1}, "relative position biases"),
        ("samvit_base_patch16", {"depth": 1}, "attention in windows"),
        ("vit_base_patch16_rpn_224", {"depth": 1}, "norms after attention and MLP"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "attention and MLP side by side"),
        ("vit_dlittle_patch16_reg1_gap_256", {"depth": 1}, "differential attention"),
        ("eva02_enormous_patch14_clip_224", {"depth": 1}, "norms after attention and MLP"),
        ("naflexvit_base_patch16_gap", {}, "a token count that changes"),
    ],
)
def test_what_a_model_needs_that_is_not_there_is_said(name: str, options: dict[str, Any], missing: str):
    assert missing in refusal(name, **options)
