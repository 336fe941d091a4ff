"""Subnet: one architecture as a stand-alone timm model with only the weights it needs; registered "poolshare_vit"."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, get_args

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._pretrained import filter_pretrained_cfg
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from poolshare.space import OPERATORS, Architecture, ModelError, SearchSpace, SpaceError
from poolshare.space.operators import Grid, grid_of

from .base import TimmViT, carry_of, fc_norm_option, make_base, outline
from .block import SharedAttention, Sharing
from .heads.maps import head_map, tapped
from .model import SuperNet, check_fit, check_sharing, run_layers
from .operators.pooling import make_poolings
from .options import read_options
from .tokens import Carry, Tokens, restore

Maps = Literal["nearest", "bilinear", "reduced"]  # how NCHW features come: of the full grid, or as small as the tokens
# What only an attention that computes its own scores holds.
OWN = ("q_norm.", "k_norm.", "q_proj.", "k_proj.", "q_bias", "relative_position_bias_table", "rel_pos.")
OURS = ("base", "architecture", "sharing", "maps")  # arguments of the entry point that are not the base model's
default_cfgs = generate_default_cfgs({"poolshare_vit": {"first_conv": "patch_embed.proj", "classifier": "head"}})


class Subnet(TimmViT):
    """A timm ViT, of one of the `KINDS`, with the pooling and sharing of one architecture.

    Differs from timm's: blocks that share hold `attn.v` in place of `attn.qkv`, and tokens are pooled between blocks.
    Made by `from_supernet`, or by `timm.create_model("poolshare_vit", base=…, architecture=…)`, or from an exported
    folder; sharing="map" there gives the same function with the same weights by a written map, see `SuperNet`.

    maps: what NCHW features are. "nearest": of the full grid, each patch with the features of the token that holds it;
    "bilinear": the same, but cells of a smaller grid are interpolated; "reduced": of the grid that is left, if any.
    """

    architecture: Architecture
    sharing: Sharing
    maps: Maps
    carry: Carry  # what its operators ask to know of their tokens
    base: tuple[str, dict[str, Any]]  # timm name and options of the ViT it was made from

    @classmethod
    def from_supernet(cls, supernet: SuperNet, architecture: Architecture) -> Subnet:
        """The architecture with the supernet's weights, on its device, in its precision and its mode.

        Gives the logits of `supernet(images, [architecture])[0]`, bit for bit in float32 on a CPU.
        Raises ArchitectureError for an architecture outside the space.
        """
        supernet.space.check(architecture)
        base, options = supernet.base
        model = cls.from_base(base, str(architecture), supernet.sharing, **options)
        reference = next(supernet.parameters())
        model.to(reference.device, reference.dtype)
        model.load_state_dict(checkpoint_filter_fn(supernet.state_dict(), model))
        return model.train(supernet.training)

    @classmethod
    def from_base(
        cls, base: str, architecture: str, sharing: Sharing = "qk", maps: Maps = "nearest", **options: Any
    ) -> Subnet:
        """The architecture over timm's model `base`, freshly initialised.

        Raises ArchitectureError, ModelError or SpaceError where text, base model and options do not go together.
        """
        ours = {"base": base, "architecture": architecture, "sharing": sharing, "maps": maps}
        return timm.create_model("poolshare_vit", **ours, **options)  # type: ignore[return-value]

    @classmethod
    def _build(cls, base: str, architecture: str, sharing: Sharing, maps: Maps, **options: Any) -> Subnet:
        check_sharing(sharing)
        check_maps(maps)
        parsed, options = Architecture.parse(architecture), read_options(base, options)
        outlined = outline(base, options)
        check_fit(base, outlined, smallest_space(parsed, outlined.patch_embed.grid_size))
        model = make_base(base, options)
        for block, layer in zip(model.blocks, parsed.layers, strict=True):
            if layer.shared:
                block.attn = SharedAttention(block.attn)
        model.__class__ = KINDS[type(model)]
        model.architecture, model.sharing, model.maps, model.base = parsed, sharing, maps, (base, options)
        pairs = pairwise(parsed.layers)
        reductions = [(now.operator, before.tokens, now.tokens) for before, now in pairs if now.operator is not None]
        model.poolings = make_poolings(model, reductions)
        for info, layer in zip(model.feature_info, parsed.layers, strict=True):
            if maps == "reduced":
                info["reduction"] *= (parsed.layers[0].tokens / layer.tokens) ** 0.5
        model.carry = carry_of(model, (layer.operator for layer in parsed.layers))
        return model  # type: ignore[no-any-return]

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """(B, channels, H, W) → (B, classes), or with a head for every pixel (B, classes, H, W)."""
        _refuse_masks(attn_mask, is_causal)
        if not (taps := tapped(self)):
            return super().forward(x)
        tokens = run_layers(self, self.architecture.layers, x, wanted=taps)
        return self.head([head_map(self, after) for after in tokens])

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """(B, channels, H, W) → (B, prefix + last patch tokens, C), after the final norm."""
        _refuse_masks(attn_mask, is_causal)
        [tokens] = run_layers(self, self.architecture.layers, x, wanted=[len(self.blocks) - 1])
        return self.norm(tokens.features)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        *,
        maps: Maps | None = None,
    ) -> Any:
        """Tokens after chosen blocks, as timm gives them; see `VisionTransformer.forward_intermediates`.

        maps: see the class, whose own it is when None. "NLC" gives the tokens as they are. Raises ModelError for
        reduced maps after an operator that gave up the grid, for an unknown format and for a mask.
        """
        _refuse_masks(attn_mask, is_causal)
        maps = self.maps if maps is None else maps
        check_maps(maps)
        if output_fmt not in ("NCHW", "NLC"):
            raise ModelError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'")
        taken, last = feature_take_indices(len(self.blocks), indices)
        full = output_fmt == "NCHW" and maps != "reduced"
        if output_fmt == "NCHW" and not full:
            check_grid(self.architecture, last)
        wanted = sorted({*taken, last if stop_early else len(self.blocks) - 1})
        tokens = run_layers(self, self.architecture.layers, x, Carry.SOURCES if full else Carry.NOTHING, wanted)
        chosen = [after for index, after in zip(wanted, tokens, strict=True) if index in taken]
        if norm:
            chosen = [after._replace(features=self.norm(after.features)) for after in chosen]
        prefix = [after.features[:, : self.num_prefix_tokens] for after in chosen]
        images = [self._image(after, output_fmt, maps) for after in chosen]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens
        if output_dict:
            return {
                "image_intermediates": images,
                **({"image_intermediates_prefix": prefix} if with_prefix else {}),
                **({} if intermediates_only else {"image_features": self.norm(tokens[-1].features)}),
            }
        intermediates = list(zip(images, prefix, strict=True)) if with_prefix else images
        return intermediates if intermediates_only else (self.norm(tokens[-1].features), intermediates)

    def _image(self, tokens: Tokens, output_fmt: str, maps: Maps) -> torch.Tensor:
        """The patch tokens, (B, P, C) or as a map (B, C, rows, columns), see `forward_intermediates`."""
        grid = self.patch_embed.grid_size
        if output_fmt == "NCHW" and maps != "reduced":
            return restore(tokens, self.num_prefix_tokens, grid, maps == "bilinear")
        patches = tokens.features[:, self.num_prefix_tokens :]
        if output_fmt == "NLC":
            return patches
        return patches.transpose(1, 2).unflatten(2, grid_of(patches.shape[1], grid)).contiguous()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last chosen one, as timm does; the architecture becomes that much shorter."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.architecture = Architecture(self.architecture.layers[: len(self.blocks)])
        return taken

    def set_input_size(self, *args: Any, **options: Any) -> None:
        """Not supported: raises ModelError, as the architecture's token counts belong to one image size."""
        raise ModelError(f"'{self.architecture}' belongs to one image size; search again for another")


class PlainSubnet(Subnet, VisionTransformer):
    """A subnet of timm's VisionTransformer."""


class EvaSubnet(Subnet, Eva):
    """A subnet of timm's Eva."""


class DistilledSubnet(Subnet, VisionTransformerDistilled):
    """A subnet of a distilled DeiT; its logits are the mean of both heads'."""


class BeitSubnet(Subnet, Beit):
    """A subnet of timm's BEiT."""


class RelPosSubnet(Subnet, VisionTransformerRelPos):
    """A subnet of timm's ViT with relative positions."""


KINDS: dict[type, Any] = {
    VisionTransformer: PlainSubnet,
    VisionTransformerDistilled: DistilledSubnet,
    Eva: EvaSubnet,
    Beit: BeitSubnet,
    VisionTransformerRelPos: RelPosSubnet,
}


def check_maps(maps: Any) -> None:
    """Raise ModelError for an unknown kind of map."""
    if maps not in get_args(Maps):
        raise ModelError(f"maps={maps!r:.80} is unknown; it must be one of {', '.join(map(repr, get_args(Maps)))}")


def check_grid(
    architecture: Architecture, last: int, instead: str = "ask for maps='nearest', output_fmt='NLC' or layers"
) -> None:
    """Raise ModelError where the tokens after layer `last` form no grid, hence no map. instead: what may be asked for."""
    for index, layer in enumerate(architecture.layers[: last + 1]):
        if layer.operator is not None and not OPERATORS[layer.operator].keeps_grid:
            raise ModelError(
                f"after layer {index} ({layer.operator}) the tokens form no grid, so there is no reduced NCHW map of layer {last}; "
                f"{instead} before {index}"
            )


def _refuse_masks(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ModelError("a pooled model takes no attention mask: its token count changes from block to block")


def smallest_space(architecture: Architecture, grid: Grid) -> SearchSpace:
    """A space that holds this architecture, whose construction checks operators and reductions. grid: of all patches."""
    levels = sorted({layer.tokens for layer in architecture.layers}, reverse=True)
    operators = dict.fromkeys(layer.operator for layer in architecture.layers if layer.operator)
    longest = max(run.length for run in architecture.runs)
    fits = grid[0] * grid[1] == levels[0]  # else the space is refused for its first level
    space = SearchSpace(architecture.depth, tuple(levels), tuple(operators), longest, None, grid if fits else None)
    space.check(architecture)
    return space


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Weights of the base model, of a supernet or of this subnet → what this subnet holds."""
    shared = [i for i, layer in enumerate(model.architecture.layers) if layer.shared]
    kept = tuple(f"poolings.{name}." for name in model.poolings)
    filtered = {
        name: value for name, value in state_dict.items() if not name.startswith("poolings.") or name.startswith(kept)
    }
    if model.attn_pool is None:  # as timm's reset_classifier, which drops it under another global_pool
        filtered = {name: value for name, value in filtered.items() if not name.startswith("attn_pool.")}
    for index in shared:
        prefix = f"blocks.{index}.attn."
        for kind in ("weight", "bias"):
            full = filtered.pop(f"{prefix}qkv.{kind}", filtered.pop(f"{prefix}v_proj.{kind}", None))
            if full is not None:
                filtered[f"{prefix}v.{kind}"] = full[-model.blocks[index].attn.attn_dim :]
        if f"{prefix}v_bias" in filtered:
            filtered[f"{prefix}v.bias"] = filtered.pop(f"{prefix}v_bias")
        dropped = tuple(f"{prefix}{part}" for part in OWN)
        for name in [name for name in filtered if name.startswith(dropped)]:
            del filtered[name]
    return filtered


def _with_other_pool(base: str, written: dict[str, Any], pool: Any, fc_norm: Any) -> dict[str, Any]:
    """Options that load weights under another global_pool than they were written with: the norm stays where it was."""
    before = outline(base, written)
    if pool in ("map", "prr") and before.global_pool != pool:
        raise ModelError(
            f"global_pool={pool!r} has weights of its own, which this export with {before.global_pool!r} does not hold; "
            "take 'avg', 'max', 'avgmax' or 'token', or load it as it is"
        )
    return fc_norm_option(before) if fc_norm is None else {}


def _without_source(base: str) -> dict[str, Any]:
    """timm's configuration of the base model, without where its own weights come from."""
    config = timm.get_pretrained_cfg(base)
    return filter_pretrained_cfg(config.to_dict() if config else {}, remove_source=True, remove_null=True)


@register_model
def poolshare_vit(
    pretrained: bool = False,
    base: str = "",
    architecture: str = "",
    sharing: Sharing = "qk",
    maps: Maps = "nearest",
    **options: Any,
) -> Subnet:
    """A searched architecture over a timm ViT: base="deit_tiny_patch16_224", architecture="196*2 196 100@max2d*9"."""
    if not base or not architecture:
        raise SpaceError(
            'poolshare_vit needs base= (a timm ViT) and architecture= (such as "196*2 196 100@max2d*9"); '
            'an exported folder holds both: timm.create_model("local-dir:FOLDER", pretrained=True)'
        )
    from_file = dict(options.get("pretrained_model_args") or {})  # model_args of an exported folder's config.json
    from_file = read_options(base, {name: value for name, value in from_file.items() if name not in OURS})
    if from_file.get("global_pool") != options.get("global_pool") and options.get("pretrained_model_args"):
        options |= _with_other_pool(base, from_file, options["global_pool"], options.get("fc_norm"))
    if options.get("features_only") and maps == "reduced":
        parsed = Architecture.parse(architecture)
        _, last = feature_take_indices(parsed.depth, options.get("out_indices", 3))
        check_grid(parsed, last, "maps='nearest' gives one of the full grid; take that or out_indices")
    if not options.get("pretrained_cfg"):
        # Input size, statistics and number of classes are the base model's, whose weights this is not.
        options["pretrained_cfg"] = _without_source(base) | {"architecture": "poolshare_vit"}
    place = {name: options.pop(name, None) for name in ("device", "dtype")}  # where the caller wants it, as in timm
    model = build_model_with_cfg(
        lambda **settings: Subnet._build(base, architecture, sharing, maps, **settings),
        "poolshare_vit",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **options,
    )
    return model.to(**place)
