"""The example model: a small ViT for 8×8 pictures, registered with timm as "digits_vit"."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

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
        }
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
