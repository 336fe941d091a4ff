"""Base models: timm ViTs checked on the meta device, where nothing is allocated, and only then made."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import timm
import torch
from timm.layers import HybridEmbed, PatchEmbed, RmsNorm, RmsNormFp32
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from poolshare.space import OPERATORS, ModelError

from .block import Attends, Blocks
from .heads.maps import head_map, tapped, with_map_head
from .operators.relative import RELATIVE, shared_bias
from .operators.rotary import unsupported_rotation
from .tokens import Carry, Tokens

if TYPE_CHECKING:
    TimmViT: TypeAlias = VisionTransformer
else:
    TimmViT = nn.Module  # the base of classes that stand before timm's own one

SUPPORTED = (VisionTransformer, VisionTransformerDistilled, Eva, Beit, VisionTransformerRelPos)
PARTS = (get_args(Blocks), get_args(Attends))  # of which they may consist
NORMS = (nn.LayerNorm, RmsNorm, RmsNormFp32)  # of one token at a time, and countable

# What unsupported models have instead of a chain of plain blocks over one sequence of tokens.
MISSING = {
    "Cait": "talking heads and class attention after the last block",
    "ConVit": "attention gated by position",
    "CrossVit": "two branches of tokens that attend to each other",
    "NaFlexVit": "a token count that changes from image to image",
    "TNT": "tokens within tokens",
    "VOLO": "outlook attention on the grid",
    "VisionTransformerSAM": "attention in windows of the grid, with relative positions",
    "Xcit": "attention between channels, which has no map over tokens",
    **{
        f"{family}{part}": "image sizes that change, as the encoder of a language model"
        for family in ("DeepseekVit", "Gemma4Vit", "Qwen3Vit")
        for part in ("Classifier", "Encoder")
    },
}
BLOCKS = {
    "DiffAttention": "differential attention, the difference of two maps",
    "DiffParallelScalingBlock": "blocks that run differential attention and MLP side by side",
    "ParallelScalingBlock": "blocks that run attention and MLP side by side, from one projection",
    "ParallelThingsBlock": "blocks of several attentions side by side, each with a map of its own",
}


def outline(name: str, options: dict[str, Any]) -> Any:
    """The same model on the meta device: modules and shapes, no memory. options: as `read_options` gives them.

    It is not to be changed: who asks again gets the same one, since checking it takes longer than making a small model.
    Raises ModelError for a model that timm does not know, that cannot be run faithfully, or that would not fit the
    machine's memory.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        close = difflib.get_close_matches(str(name).split(".")[0], timm.list_models(["vit_*", "deit*"]), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; `timm.list_models('vit*')` lists what there is"
        raise ModelError(f"timm knows no model {name!r}{hint}")
    return _outlined(name, timm.model_entrypoint(name), tuple(sorted(options.items())))


@lru_cache(64)
def _outlined(name: str, entrypoint: Any, sorted_options: tuple[tuple[str, Any], ...]) -> Any:
    """entrypoint: of that name now; another one may be registered later."""
    options = dict(sorted_options)
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
    options = dict(options)
    kind, blocks = options.pop("head", None), options.pop("head_blocks", None)
    if blocks is not None and kind is None:
        raise ModelError(f"head_blocks={blocks} belongs to a head for every pixel: give head=linear or head=conv too")
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # what odd options raise inside timm may be anything
        problem = str(error).strip() or type(error).__name__
        raise ModelError(f"timm cannot make model {name!r} with options {options!r:.200}: {problem:.300}") from None
    if getattr(model, "dynamic_img_size", False) and isinstance(getattr(model, "patch_embed", None), PatchEmbed):
        model.patch_embed.strict_img_size = True  # a space has one token count, so the model has one image size
    if isinstance(model, (Eva, *RELATIVE)):
        model.has_class_token = model.cls_token is not None  # as VisionTransformer says it
    if isinstance(model, RELATIVE):
        _complete(model)
    if kind is not None and type(model) in SUPPORTED:
        with_map_head(model, kind, blocks, options.get("num_classes", model.num_classes))
    return model


def _complete(model: Any) -> None:
    """Give a model with relative positions the attributes, without weights, that timm's other ViTs and attentions have."""
    model.norm_pre, model.attn_pool, model.patch_drop = nn.Identity(), None, None
    for block in model.blocks:
        attention = block.attn
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.norm, attention.gate = nn.Identity(), None
        if isinstance(model, Beit):
            attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()


def carry_of(model: Any, operators: Iterable[str | None]) -> Carry:
    """What a path of the model must know of its tokens, with these operators anywhere in it.

    A head for every pixel asks for sources, attention by rotary embeddings or relative positions for places.
    """
    if tapped(model):
        return Carry.SOURCES
    if isinstance(model, RELATIVE) or getattr(model, "rope", None) is not None:
        return Carry.PLACES
    return Carry.SIZES if any(name is not None and OPERATORS[name].weighs for name in operators) else Carry.NOTHING


def fc_norm_option(model: Any) -> dict[str, bool]:
    """The option of timm's that leaves a model's norms where they are under another global_pool."""
    name = "use_fc_norm" if isinstance(model, (Eva, Beit)) else "fc_norm"
    return {name: not isinstance(model.fc_norm, nn.Identity)}


def embed(model: Any, images: torch.Tensor) -> Tokens:
    """Everything before the first block: (B, channels, H, W) → (B, prefix + P, C). Raises ModelError for another size."""
    wanted = (model.in_chans, *model.patch_embed.img_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        raise ModelError(f"images are {tuple(images.shape)}, and must be (B, {', '.join(map(str, wanted))})")
    patches = model.patch_embed(images)
    embedded = _with_prefix(model, patches) if isinstance(model, RELATIVE) else model._pos_embed(patches)
    features = embedded[0] if isinstance(embedded, tuple) else embedded  # Eva's come with a rotation
    return Tokens(model.norm_pre(features), relative=shared_bias(model))


def _with_prefix(model: Beit | VisionTransformerRelPos, patches: torch.Tensor) -> torch.Tensor:
    """CLS, patches and their absolute positions, where there are any, as the `forward_features` of these models has it."""
    tokens = patches
    if model.cls_token is not None:
        tokens = torch.cat((model.cls_token.expand(patches.shape[0], -1, -1), patches), 1)
    if isinstance(model, VisionTransformerRelPos):
        return tokens
    return model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)


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
        kind = type(model).__name__
        needs = f" and needs {MISSING[kind]}, which poolshare does not have" if kind in MISSING else ""
        return f"it is a {kind}{needs}; {_SUPPORT}"
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
    if model.global_pool == "" and not tapped(model):
        return "it has no pooled head to classify with; choose global_pool='avg' or 'token'"
    if not isinstance(model.patch_drop, (nn.Identity, type(None))):
        return "patch dropout changes the token count in training; set patch_drop_rate=0"
    if any(getattr(part.attn, "num_kv_groups", 1) > 1 for part in model.blocks):
        return "it has heads that share keys and values, which poolshare cannot hand on"
    return unsupported_rotation(getattr(model, "rope", None)) or _grid_fault(model.patch_embed)


_SUPPORT = (
    "it runs timm's VisionTransformer, Eva, Beit and VisionTransformerRelPos with sequential blocks, hybrids and distilled "
    "DeiT among them"
)


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
    after = model.blocks[0](tokens.features)
    if taps := tapped(model):
        model.head([head_map(model, tokens._replace(features=after)) for _ in taps])
    else:
        model.forward_head(model.norm(after))
