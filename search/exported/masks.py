"""Predicted masks as files: class indices to go on with, in colours to look at, and these over their image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from poolshare.space import RunError

OPACITY = 0.5  # of a mask over its image


class MaskWriter:
    """Writes DIR/masks/NAME.png, palette images that hold class indices, and DIR/overlays/NAME.jpg.

    names: of all images, as paths; equal ones without their folders get a number. Raises RunError where `out` cannot be made.
    """

    def __init__(self, out: Path, paths: Sequence[str]) -> None:
        self.masks, self.overlays = out / "masks", out / "overlays"
        seen = Counter[str]()
        self.names = list[str]()
        for path in paths:
            stem = Path(path).stem
            seen[stem] += 1
            self.names.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
        try:
            for folder in (self.masks, self.overlays):
                folder.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{out} cannot be written ({error}): choose another --out") from None

    def write(self, index: int, logits: torch.Tensor, image: Image.Image) -> dict[str, str]:
        """The mask of one image, at its size, and the paths of both files. logits: (classes, H, W)."""
        size = image.height, image.width
        found = F.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        mask = Image.fromarray(found.cpu().numpy().astype(np.uint8), "P")
        mask.putpalette(PALETTE.tobytes())
        overlay = Image.blend(image.convert("RGB"), mask.convert("RGB"), OPACITY)
        paths = self.masks / f"{self.names[index]}.png", self.overlays / f"{self.names[index]}.jpg"
        try:
            mask.save(paths[0])
            overlay.save(paths[1], quality=90)
        except OSError as error:
            raise RunError(f"{paths[0]} or {paths[1]} cannot be written ({error})") from None
        return {"mask": str(paths[0]), "overlay": str(paths[1])}


def _palette() -> np.ndarray:
    """A colour for each of 256 classes, (256, 3) uint8: those of PASCAL VOC, whose bits are the index's in reverse."""
    index, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


PALETTE = _palette()
