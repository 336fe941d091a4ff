"""Base models: timm ViTs checked on the meta device, where nothing is allocated, and only then made."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import Attention, AttentionRope, HybridEmbed, PatchEmbed, RmsNorm, RmsNormFp32
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from poolshare.space import ModelError

from .operators.rotary import unsupported_rotation
from .tokens import Tokens

SUPPORTED = (VisionTransformer, VisionTransformerDistilled, Eva)
PARTS = ((Block, EvaBlock), (Attention, EvaAttention, AttentionRope))  # of which their blocks may consist
NORMS = (nn.LayerNorm, RmsNorm, RmsNormFp32)  # of one token at a time, and countable

# What unsupported models have instead of a chain of plain blocks over one sequence of tokens.
MISSING = {
    "Cait": "talking heads and class attention after the last block",
    "ConVit": "attention gated by position",
    "CrossVit": "two branches of tokens that attend to each other",
    "Gemma4VitClassifier": "rotary position embeddings of another kind",
    "NaFlexVit": "a token count that changes from image to image",
    "TNT": "tokens within tokens",
    "VOLO": "outlook attention on the grid",
    "VisionTransformerSAM": "attention in windows of the grid, with relative positions",
    "Xcit": "attention between channels, which has no map over tokens",
}
BLOCKS = {
    "DiffAttention": "differential attention, the difference of two maps",
    "DiffParallelScalingBlock": "blocks that run differential attention and MLP side by side",
    "ParallelScalingBlock": "blocks that run attention and MLP side by side, from one projection",
    "ParallelThingsBlock": "blocks of several attentions side by side, each with a map of its own",
    "EvaBlockPostNorm": "blocks with norms after attention and MLP",
    "ResPostBlock": "blocks with norms after attention and MLP",
}


def outline(name: str, options: dict[str, Any]) -> VisionTransformer:
    """The same model on the meta device: modules and shapes, no memory. options: as `read_options` gives them.

    Raises ModelError for a model that timm does not know, that cannot be run faithfully, or that would not fit the
    machine's memory.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        close = difflib.get_close_matches(str(name).split(".")[0], timm.list_models(["vit_*", "deit*"]), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; `timm.list_models('vit*')` lists what there is"
        raise ModelError(f"timm knows no model {name!r}{hint}")
    with torch.device("meta"):
        model = make_base(name, options)
    reason = unsupported_part(model)
    if reason:
        raise ModelError(f"model {name!r} cannot be searched: {reason}")
    _check_memory(name, model, options)
    try:
        _check_shapes(model)
    except Exception as error:  # options that fit one by one, and not together: torch may raise anything
        raise ModelError(
            f"model {name!r} with options {options!r:.200} cannot run: {type(error).__name__}: {error!s:.300}"
        ) from None
    return model


def make_base(name: str, options: dict[str, Any], pretrained: bool = False) -> Any:
    """timm's model, on the default device. Raises ModelError where timm cannot make it."""
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # what odd options raise inside timm may be anything
        problem = str(error).strip() or type(error).__name__
        raise ModelError(f"timm cannot make model {name!r} with options {options!r:.200}: {problem:.300}") from None
    if getattr(model, "dynamic_img_size", False) and isinstance(getattr(model, "patch_embed", None), PatchEmbed):
        model.patch_embed.strict_img_size = True  # a space has one token count, so the model has one image size
    if isinstance(model, Eva):
        model.has_class_token = model.cls_token is not None  # as VisionTransformer says it
    return model


def embed(model: Any, images: torch.Tensor) -> Tokens:
    """Everything before the first block: (B, channels, H, W) → (B, prefix + P, C). Raises ModelError for another size."""
    wanted = (model.in_chans, *model.patch_embed.img_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        raise ModelError(f"images are {tuple(images.shape)}, and must be (B, {', '.join(map(str, wanted))})")
    embedded = model._pos_embed(model.patch_embed(images))
    return Tokens(
        model.norm_pre(embedded[0] if isinstance(embedded, tuple) else embedded)
    )  # Eva's come with a rotation


def cropped(model: VisionTransformer) -> tuple[str, ...]:
    """A note where the patches do not cover the images: as in timm, the rest is not seen."""
    if not isinstance(model.patch_embed, PatchEmbed):
        return ()
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    rows, columns = rests = [side % length for side, length in zip(size, patch, strict=True)]
    if not any(rests):
        return ()
    fewer = [side - rest for side, rest in zip(size, rests, strict=True)]
    more = [less + length * (rest > 0) for less, length, rest in zip(fewer, patch, rests, strict=True)]
    last = f"{rows} rows and columns" if rows == columns else f"{rows} rows and {columns} columns"
    return (
        f"Patches of {sides_text(patch)} pixels do not divide images of {sides_text(size)}: the last {last} of pixels are not "
        f"seen; {sides_text(fewer)} or {sides_text(more)} would use all.",
    )


def sides_text(sides: Sequence[int]) -> str:
    """Height and width as people write them: one number for a square."""
    height, width = sides
    return str(height) if height == width else f"{height}×{width}"


def unsupported_part(model: Any) -> str | None:
    """Why poolshare cannot run this model faithfully, or None where it can."""
    if type(model) not in SUPPORTED:
        return _missing(model)
    for part in model.blocks:
        for found, expected in zip((part, getattr(part, "attn", None)), PARTS, strict=True):
            if type(found) not in expected:
                kind = type(found).__name__
                return f"it has {BLOCKS.get(kind, kind)}, which poolshare cannot pool or share; {_SUPPORT}"
        kind = type(part.norm1).__name__
        if not isinstance(part.norm1, NORMS) or kind.endswith("2d"):
            return f"its norms are {kind}; only layernorm and rmsnorm are supported"
    if not isinstance(model.patch_embed, (PatchEmbed, HybridEmbed)):
        return (
            f"its patch embedding is {type(model.patch_embed).__name__}; only PatchEmbed and HybridEmbed are supported"
        )
    if model.global_pool == "":
        return "it has no pooled head to classify with; choose global_pool='avg' or 'token'"
    if not isinstance(model.patch_drop, (nn.Identity, type(None))):
        return "patch dropout changes the token count in training; set patch_drop_rate=0"
    if any(getattr(part.attn, "num_kv_groups", 1) > 1 for part in model.blocks):
        return "several of its heads share keys and values, which poolshare cannot hand on"
    reason = unsupported_rotation(getattr(model, "rope", None))
    if reason is not None:
        return f"{reason}, which poolshare cannot compute for pooled tokens"
    return _grid_fault(model.patch_embed)


_SUPPORT = (
    "it runs timm's VisionTransformer and Eva with plain sequential blocks, hybrids and distilled DeiT among them"
)


def _missing(model: nn.Module) -> str:
    kind = type(model).__name__
    names = " ".join(name for name, _ in [*model.named_modules(), *model.named_parameters()]).lower()
    modules = " ".join({type(module).__name__ for module in model.modules()}).lower()
    if kind in MISSING:
        missing = MISSING[kind]
    elif "rope" in names or "rotary" in modules or "ropeattention" in modules:
        missing = "rotary position embeddings of another kind"
    elif "rel_pos" in names or "relative_position" in names:
        missing = "relative position biases, which belong to the full grid"
    else:
        return f"it is a {kind}; {_SUPPORT}"
    return f"it is a {kind} and needs {missing}, which poolshare does not have; {_SUPPORT}"


def _grid_fault(patches: PatchEmbed | HybridEmbed) -> str | None:
    if 0 in patches.grid_size:
        return f"its images of {patches.img_size} are smaller than its patches of {patches.patch_size}"
    size = patches.img_size if isinstance(patches, PatchEmbed) else patches.feature_size
    if patches.dynamic_img_pad and any(side % patch for side, patch in zip(size, patches.patch_size, strict=True)):
        return (
            f"dynamic_img_pad would pad {size} to a multiple of its patches of {patches.patch_size}, so that the tokens "
            "are more than its grid says; take an image size that they divide"
        )
    return None


def _check_memory(name: str, model: nn.Module, options: dict[str, Any]) -> None:
    """Raise ModelError where the weights would not fit the machine."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights > memory:
        raise ModelError(
            f"model {name!r} with options {options!r:.200} has {weights / 1e9:,.1f} GB of weights, more than this "
            f"machine's memory of {memory / 1e9:,.1f} GB"
        )


@torch.no_grad()
def _check_shapes(model: VisionTransformer) -> None:
    """Run one image through stem, one block and head, on the meta device: what does not fit together raises."""
    model.eval()
    tokens = embed(model, torch.empty(1, model.in_chans, *model.patch_embed.img_size, device="meta"))
    wanted = (1, model.num_prefix_tokens + model.patch_embed.num_patches, model.embed_dim)
    if tuple(tokens.features.shape) != wanted:
        raise ValueError(f"its stem gives tokens of shape {tuple(tokens.features.shape)} where {wanted} are expected")
    model.forward_head(model.norm(model.blocks[0](tokens.features)))
