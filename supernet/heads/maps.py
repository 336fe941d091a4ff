"""Heads that give logits for every pixel, from maps of the full grid after the last or several blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed
from torch import nn

from poolshare.space import ModelError

from ..tokens import Tokens, spread

HeadKind = Literal["linear", "conv"]
BLOCKS = 4  # after so many blocks maps are taken where nothing else is said, as DINOv2's heads do
WIDTH = 128  # channels of a convolutional head on the patch grid; halved at each doubling of the resolution


class MapHead(nn.Module):
    """Maps of the grid of all patches, one after each of its `blocks` → logits (B, classes, H, W).

    "linear": each patch's features, from all maps, → classes. "conv": → WIDTH channels, smoothed by a 3×3 depthwise
    convolution, and twice doubled in resolution by transposed convolutions, as SAM's mask decoder does (2304.02643); then
    classes. Either way the logits are upsampled bilinearly to the image.
    """

    def __init__(
        self, kind: HeadKind, blocks: Sequence[int], embed_dim: int, num_classes: int, img_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.kind, self.blocks, self.embed_dim, self.img_size = kind, tuple(blocks), embed_dim, img_size
        channels = len(self.blocks) * embed_dim
        self.decode: nn.Module = nn.Identity()
        if kind == "conv":
            half, quarter = WIDTH // 2, WIDTH // 4
            self.decode = nn.Sequential(
                nn.Conv2d(channels, WIDTH, 1),
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
                LayerNorm2d(WIDTH),
                nn.GELU(),
                nn.ConvTranspose2d(WIDTH, half, 2, stride=2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
                nn.GELU(),
            )
            channels = quarter
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, embed_dim, rows, columns), in the order of the blocks → (B, classes, H, W)."""
        logits = self.classify(self.decode(torch.cat(tuple(maps), dim=1)))
        return F.interpolate(logits, size=self.img_size, mode="bilinear", align_corners=False)

    def renewed(self, num_classes: int) -> MapHead:
        """A fresh one for so many classes, where this one is."""
        reference = self.classify.weight
        head = MapHead(self.kind, self.blocks, self.embed_dim, num_classes, self.img_size)
        return head.to(reference.device, reference.dtype).train(self.training)


def with_map_head(model: Any, kind: HeadKind, count: int | None, num_classes: int) -> None:
    """Put a fresh head for every pixel in the place of a timm ViT's classifier and its pooling.

    count: after how many blocks maps are taken, evenly spaced, the last block among them; None: `BLOCKS`, or all of fewer.
    Raises ModelError where the model cannot have such a head.
    """
    if kind not in get_args(HeadKind):
        raise ModelError(f"head={kind!r:.80} is unknown; it must be one of {', '.join(map(repr, get_args(HeadKind)))}")
    depth, size, grid = len(model.blocks), model.patch_embed.img_size, model.patch_embed.grid_size
    count = min(BLOCKS, depth) if count is None else count
    if not 1 <= count <= depth:
        raise ModelError(f"head_blocks={count}: the model has {depth} blocks; take from 1 to {depth} of them")
    if num_classes < 2:
        raise ModelError(f"num_classes={num_classes}: a head for every pixel has at least 2")
    # A stem of convolutions makes cells of its own size.
    patch = model.patch_embed.patch_size if isinstance(model.patch_embed, PatchEmbed) else grid
    if any(side % length for side, length in zip(size, patch, strict=True)):
        raise ModelError(
            f"a head for every pixel needs patches that cover the image, and those of {patch[0]}×{patch[1]} pixels do not divide "
            f"{size[0]}×{size[1]}; take another --img-size"
        )
    model.reset_classifier(0, "")
    blocks = [depth * (index + 1) // count - 1 for index in range(count)]
    model.num_classes, model.head = num_classes, MapHead(kind, blocks, model.embed_dim, num_classes, size)


def tapped(model: Any) -> tuple[int, ...]:
    """The blocks after which the model's head takes maps; none: it classifies images."""
    return model.head.blocks if isinstance(model.head, MapHead) else ()


def head_map(model: Any, tokens: Tokens) -> torch.Tensor:
    """What the head takes after a block: the features of every patch, after the final norm. (B, C, rows, columns)"""
    grid = model.patch_embed.grid_size
    return normed_map(model, spread(tokens, model.num_prefix_tokens, grid))


def normed_map(model: Any, patches: torch.Tensor) -> torch.Tensor:
    """(B, patches, C) → (B, C, rows, columns). Models that pool before their norm have it as `fc_norm`."""
    features = model.fc_norm(model.norm(patches)).transpose(1, 2)
    return features.reshape(*features.shape[:2], *model.patch_embed.grid_size).contiguous()
