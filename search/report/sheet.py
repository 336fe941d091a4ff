"""Images with the parts that are one token, as a PNG: each part in its mean colour, with an edge around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL, GAP, HEADING, PANELS = 320, 12, 44, 6  # pixels: longer side of a picture, between them, above; at most in a line
INK, FAINT, PAPER, DROPPED, HATCH = (31, 41, 51), (107, 119, 133), (255, 255, 255), (236, 239, 242), (164, 173, 183)
BRIGHT, TO_WHITE, TO_BLACK = (
    150,
    0.55,
    0.3,
)  # edges of darker colours go so far to white, those of brighter ones to black
SMALL = 64  # images of fewer pixels are enlarged to squares, not smoothed


class Step(NamedTuple):
    """The tokens after one reduction."""

    layer: int
    operator: str
    tokens: int
    regions: np.ndarray  # (images, rows, columns), which token stands for each part of an image; −1: it was dropped

    @property
    def lost(self) -> bool:
        return bool((self.regions < 0).any())


def sheet(photos: np.ndarray, steps: Sequence[Step]) -> Image.Image:
    """One line for each image, or more where there are many steps: the photo, then its tokens after each of `steps`.

    photos: (images, H, W, 3), uint8, of which the tokens cover all.
    """
    height, width = (max(1, round(PANEL * side / max(photos.shape[1:3]))) for side in photos.shape[1:3])
    lines = -(-(len(steps) + 1) // PANELS)
    columns = min(PANELS, len(steps) + 1)
    foot = 30 if any(step.lost for step in steps) else 0
    size = GAP + columns * (width + GAP), len(photos) * lines * (HEADING + height) + GAP + foot
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, photo in enumerate(photos):
        smooth = Image.Resampling.LANCZOS if min(photo.shape[:2]) >= SMALL else Image.Resampling.NEAREST
        large = np.asarray(Image.fromarray(photo).resize((width, height), smooth))
        panels = [("photo", "as the model sees it", large)]
        for step in steps:
            text = f"{step.tokens} token{'s' * (step.tokens > 1)}, {step.operator}"
            panels.append((f"from layer {step.layer} on", text, coloured(large, step.regions[number])))
        for place, (title, text, picture) in enumerate(panels):
            line, column = divmod(place, PANELS)
            left, top = GAP + column * (width + GAP), (number * lines + line) * (HEADING + height)
            draw.text((left, top + 6), title, INK, _font(15))
            draw.text((left, top + 24), text, FAINT, _font(13))
            canvas.paste(Image.fromarray(picture), (left, top + HEADING))
    if foot:
        draw.text((GAP, size[1] - foot), "hatched: dropped", FAINT, _font(13))
    return canvas


def coloured(photo: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The photo with each region in its mean colour and edges between regions; what was dropped is hatched.

    photo: (H, W, 3), uint8. regions: (rows, columns), see `Step`. Parts of one token that do not touch have one colour.
    """
    height, width = photo.shape[:2]
    rows, columns = (
        np.arange(side) * parts // side for side, parts in zip((height, width), regions.shape, strict=True)
    )
    region = regions[rows[:, None], columns] + 1  # (H, W), from 0: dropped
    counts = np.bincount(region.ravel())
    sums = [np.bincount(region.ravel(), photo[:, :, channel].ravel()) for channel in range(3)]
    colours = np.stack(sums, axis=1) / np.maximum(counts, 1)[:, None]
    colours[0] = DROPPED
    picture = colours[region]
    diagonal = (np.arange(height)[:, None] + np.arange(width)) % 9 == 0
    picture[(region == 0) & diagonal] = HATCH
    edge = np.zeros((height, width), dtype=bool)
    for axis in (0, 1):
        change = np.diff(region, axis=axis) != 0
        edge[:-1, :] |= change if axis == 0 else False
        edge[:, :-1] |= change if axis == 1 else False
    beside = picture[edge]
    bright = beside.mean(axis=1, keepdims=True) > BRIGHT
    picture[edge] = np.where(bright, beside * (1 - TO_BLACK), beside + TO_WHITE * (255 - beside))
    return picture.round().astype(np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
