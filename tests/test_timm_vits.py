"""All of timm's ViTs: what is accepted computes what timm does, what is refused says in one line what is missing."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from torch import nn

from poolshare.space import ModelError, SearchSpace
from poolshare.supernet import Subnet, SuperNet, base

# Modules of timm whose models are transformers on patches of an image. First those that classify by blocks of
# self-attention over one sequence of tokens, as many for each image; "the others" are in `OTHERS`.
SEQUENCE = (
    "vision_transformer", "vision_transformer_hybrid", "deit", "vitamin", "eva", "beit", "vision_transformer_relpos",
    "cait", "convit",
)  # fmt: skip
OTHERS = (
    "naflexvit", "deepseek_vit", "gemma4_vit", "qwen3_vit", "vision_transformer_sam", "crossvit", "tnt", "volo", "xcit",
)  # fmt: skip
UNSUPPORTED = ("cait", "convit", *OTHERS)  # whole modules, for their one class


@pytest.fixture(autouse=True)
def _any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_check_memory", lambda *_: None)  # a small machine refuses the largest for that alone


def structure(model: Any) -> tuple[Any, ...]:
    """What makes a difference to how a model is run: kinds of its parts, not their sizes."""
    known = ("has_class_token", "num_prefix_tokens", "no_embed_class", "global_pool", "pool_include_prefix")
    values = tuple(getattr(model, name, None) for name in (*known, "dynamic_img_size", "rope_mixed"))
    kinds = tuple(type(getattr(model, name, None)) for name in ("fc_norm", "norm", "norm_pre", "rope", "pos_embed"))
    stem = type(getattr(model.patch_embed, "backbone", None)), type(model.patch_embed)
    block = tuple((name, type(part).__name__) for name, part in model.blocks[0].named_modules())
    weights = tuple(name for name, _ in model.blocks[0].named_parameters())
    return type(model), values, kinds, stem, block, weights


def small(model: Any) -> dict[str, Any]:
    """Options of the same structure at a small size."""
    options: dict[str, Any] = {"depth": 2, "num_classes": 5}
    if isinstance(model.patch_embed, HybridEmbed):
        options["img_size"] = tuple(4 * model.patch_embed.feat_ratio(as_scalar=False)[0] for _ in range(2))
        if isinstance(model.patch_embed.proj, nn.Identity):
            return options
    else:
        options["img_size"] = 4 * model.patch_embed.patch_size[0]
    return options | {"embed_dim": 96, "num_heads": 2}  # of which a third is whole: MLPs of ⅔ · 4 times the width


def agree(name: str, options: dict[str, Any]) -> None:
    """Dense path and timm's forward, on the same weights and images; and a pooled, shared one as stand-alone model."""
    torch.manual_seed(0)
    net = SuperNet.from_timm(name, SearchSpace(2, (16, 4), ("max2d",), 2), **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # no zero is left where timm begins with one
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
        unmodified = timm.create_model(name, **options).eval()
        unmodified.load_state_dict(net.state_dict())
        images = torch.randn(2, net.in_chans, *net.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
        expected = unmodified(images)
        assert (expected[0] - expected[1]).abs().max() > 1e-2, name  # the images matter
        torch.testing.assert_close(net(images, [net.space[0]])[0], expected, rtol=1e-4, atol=1e-4)
        cheapest = net.space[net.space.size - 1]
        pooled = net(images, [cheapest])[0]
        torch.testing.assert_close(Subnet.from_supernet(net, cheapest)(images), pooled, rtol=1e-4, atol=1e-4)


def refusal(name: str, **options: Any) -> str:
    """Why a model is refused: what follows its name in the message, which is one line."""
    with pytest.raises(ModelError) as caught:
        base.outline(name, options)
    message = str(caught.value)
    assert "\n" not in message
    begin = f"model {name!r} cannot be searched: "
    assert message.startswith(begin)
    return message.removeprefix(begin)


def shortened(reason: str) -> str:
    """A refusal as the README has it."""
    return re.sub(r"^it (has|is a \w+ and needs) ", "", re.split(r", which poolshare|; ", reason)[0])


def table(refusals: dict[str, dict[str, str]]) -> list[str]:
    """The rows of the README: for each module of timm how many models are accepted, and why others are not.

    refusals: of each module its entry points with the reason, "" for those that are accepted.
    """
    rows = []
    for module, found in refusals.items():
        reasons = Counter(shortened(reason) for reason in found.values() if reason)
        why = "; ".join(f"{count}: {reason}" for reason, count in sorted(reasons.items(), key=lambda one: -one[1]))
        accepted = sum(not reason for reason in found.values())
        rows.append(f"| `{module}` | {accepted} of {len(found)} | {why} |")
    return rows


def probe(name: str, **options: Any) -> str:
    """Why a model is refused; "" where it is accepted."""
    try:
        base.outline(name, options)
    except ModelError:
        return refusal(name, **options)
    return ""


def test_the_readmes_table_holds_for_one_of_each_module():
    """The slow test makes all of it; here its totals, and what it says of one model of each with one block."""
    text = (Path(__file__).parents[1] / "supernet" / "README.md").read_text(encoding="utf-8")
    for module in (*SEQUENCE, *OTHERS):
        names = timm.list_models(module=module)
        row = re.search(rf"^\| `{module}` \| (\d+) of {len(names)} \| (.*) \|$", text, re.MULTILINE)
        assert row, module
        name = names[len(names) // 2]
        reason = probe(name, **({} if module in UNSUPPORTED or "sapiens2" in name else {"depth": 1}))
        assert shortened(reason) in row[2], name
        assert reason or row[1] != "0", name


def compared_with_readme(refusals: dict[str, dict[str, str]]) -> None:
    text = (Path(__file__).parents[1] / "supernet" / "README.md").read_text(encoding="utf-8")
    written = re.findall(rf"^\| `(?:{'|'.join((*SEQUENCE, *OTHERS))})` \|.*$", text, re.MULTILINE)
    assert written == table(refusals)
    reasons = [reason for module in SEQUENCE for reason in refusals[module].values()]
    assert reasons.count("") >= 0.9 * len(reasons)
    assert f"{reasons.count('')} of {len(reasons)}" in text
    everything = [reason for found in refusals.values() for reason in found.values()]
    assert f"{everything.count('')} of {len(everything)}" in text


@pytest.mark.slow
def test_every_vit_of_timm_is_run_faithfully_or_says_what_is_missing():
    modules = (*SEQUENCE, *OTHERS)
    refusals = {module: {name: probe(name) for name in timm.list_models(module=module)} for module in modules}
    compared_with_readme(refusals)
    structures: dict[Any, tuple[str, dict[str, Any]]] = {}
    for found in refusals.values():
        for name in (name for name, reason in found.items() if not reason):
            model = base.outline(name, {})
            structures.setdefault(structure(model), (name, small(model)))
    assert len(structures) > 50
    for name, options in structures.values():
        agree(name, options)


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("samvit_base_patch16", {"depth": 1}, "attention in windows"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "attention and MLP side by side"),
        ("vit_dlittle_patch16_reg1_gap_256", {"depth": 1}, "differential attention"),
        ("naflexvit_base_patch16_gap", {}, "a token count that changes"),
    ],
)
def test_what_a_model_needs_that_is_not_there_is_said(name: str, options: dict[str, Any], missing: str):
    assert missing in refusal(name, **options)
