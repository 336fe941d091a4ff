"""Base models that timm does not have, registered with it: the ViT of the digits, and PSViT-style ones."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

PSVIT = ("psvit_1d_tiny", "psvit_1d_small", "psvit_2d_tiny", "psvit_2d_small")

default_cfgs = generate_default_cfgs(
    {
        "digits_vit": {
            "input_size": (1, 8, 8),
            "num_classes": 10,
            "mean": (0.5,),
            "std": (0.5,),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **{
            name: {
                "input_size": (3, 224, 224),
                "num_classes": 1000,
                "mean": IMAGENET_DEFAULT_MEAN,
                "std": IMAGENET_DEFAULT_STD,
                "crop_pct": 0.9,
                "interpolation": "bicubic",
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            }
            for name in PSVIT
        },
    }
)


class OverlappingPatchEmbed(PatchEmbed):
    """One token per pixel, each seeing its 3×3 surroundings; without that overlap tiny pictures are hard to learn."""

    def __init__(self, *args: Any, in_chans: int = 3, embed_dim: int = 32, bias: bool = True, **options: Any):
        super().__init__(*args, in_chans=in_chans, embed_dim=embed_dim, bias=bias, **options)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=3, padding=1, bias=bias)


@register_model
def digits_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """64 tokens, width 32, depth 8, 2 heads, MLP ratio 2, mean-of-tokens head; for 8×8 grey pictures."""
    settings: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 1,
        "in_chans": 1,
        "embed_dim": 32,
        "depth": 8,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "class_token": False,
        "global_pool": "avg",
        "embed_layer": OverlappingPatchEmbed,
    }
    return build_model_with_cfg(VisionTransformer, "digits_vit", pretrained, **(settings | options))


# PSViT style (arXiv 2108.03428): DeiT's sizes; along the sequence CLS is kept, on the grid the head takes the mean of
# the tokens. What pools and shares in them is the space's: `poolshare.space.presets` has one for each.


def _psvit(name: str, pretrained: bool, with_cls: bool, width: int, options: dict[str, Any]) -> VisionTransformer:
    settings: dict[str, Any] = {"patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": width // 64}
    if not with_cls:
        settings |= {"class_token": False, "global_pool": "avg"}
    return build_model_with_cfg(VisionTransformer, name, pretrained, **(settings | options))


@register_model
def psvit_1d_tiny(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The base of PSViT-1D-style searches at DeiT-Tiny's size: 196 patch tokens and CLS, width 192."""
    return _psvit("psvit_1d_tiny", pretrained, True, 192, options)


@register_model
def psvit_1d_small(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The base of PSViT-1D-style searches at DeiT-Small's size: 196 patch tokens and CLS, width 384."""
    return _psvit("psvit_1d_small", pretrained, True, 384, options)


@register_model
def psvit_2d_tiny(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The base of PSViT-2D-style searches at DeiT-Tiny's size: 196 patch tokens, no CLS, width 192."""
    return _psvit("psvit_2d_tiny", pretrained, False, 192, options)


@register_model
def psvit_2d_small(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The base of PSViT-2D-style searches at DeiT-Small's size: 196 patch tokens, no CLS, width 384."""
    return _psvit("psvit_2d_small", pretrained, False, 384, options)
