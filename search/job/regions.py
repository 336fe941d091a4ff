"""Which parts of an image are one token: asked of a model, and kept for some images and the frontier of a run."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.layers import PatchEmbed

from poolshare.space import Architecture
from poolshare.space.data_kind import DataKind
from poolshare.supernet.data import ImageFormat
from poolshare.supernet.data.loaders import LoaderData
from poolshare.supernet.measure import evaluating
from poolshare.supernet.model import run_layers
from poolshare.supernet.tokens import Carry, regions

from ..report.report import load_report
from ..report.sheet import SMALL, Step
from .folder import RunFolder
from .prepare import Job, image_format, input_config
from .records import FORMAT, write_json

IMAGES, STEPS = 3, 4  # how many are kept of a run's images, and of an architecture's reductions
SIDE, LIMIT = 160, 250_000  # pixels of a kept image, and characters of all kept regions: the page is to stay small


@torch.inference_mode()
def trace(model: Any, architecture: Architecture, images: torch.Tensor) -> list[Step]:
    """The tokens of `images` after each reduction of an architecture. model: a supernet, or its subnet.

    images: (B, channels, H, W) as the model takes them.
    """
    layers = architecture.layers
    place = next(model.parameters())
    with evaluating(model):
        outputs = run_layers(model, layers, images.to(place.device, place.dtype), Carry.SOURCES)
    prefix, grid = model.num_prefix_tokens, tuple(model.patch_embed.grid_size)
    return [
        Step(index, layer.operator, layer.tokens, regions(tokens, prefix, grid).cpu().numpy())
        for index, (layer, tokens) in enumerate(zip(layers, outputs, strict=True))
        if layer.operator is not None
    ]


def photos(model: Any, images: torch.Tensor, shown: ImageFormat | None) -> np.ndarray:
    """What a model's patches cover of its images, to be looked at: (B, H, W, 3), uint8.

    shown: how the images were normalised; None: it is not known, so the brightest value becomes white.
    """
    patches = model.patch_embed
    if isinstance(patches, PatchEmbed):
        height, width = (cells * side for cells, side in zip(patches.grid_size, patches.patch_size, strict=True))
        images = images[:, :, :height, :width]
    images = images.cpu().float()
    if shown is None:
        low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-6)
    else:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in shown.statistics)
        images = images * std + mean
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


def write_regions(job: Job, folder: RunFolder) -> None:
    """Keep regions.json: some search-validation images, and their tokens in the picks and other points of the frontier."""
    folder.regions.unlink(missing_ok=True)  # of other weights, or damaged
    report = load_report(folder)
    frontier = [*(pick.architecture for pick in report.picks()), *report.by(report.cost)["architecture"]]
    images, names = _some_images(job)
    shown = None
    if DataKind.of(job.config.data) is not DataKind.GIVEN:
        shown = image_format(input_config(job.config))
    found: dict[str, list[dict[str, Any]]] = {}
    size = 0
    for text in dict.fromkeys(frontier):
        kept = [_record(step) for step in _spread(trace(job.supernet, Architecture.parse(text), images))]
        size += sum(len(regions) for step in kept for regions in step["regions"])
        if size > LIMIT:
            break
        if kept:
            found[text] = kept
    pictures = [_encoded(photo) for photo in photos(job.supernet, images, shown)]
    record = {"format": FORMAT, "names": names, "images": pictures, "architectures": found}
    write_json(folder.regions, record)


def _some_images(job: Job) -> tuple[torch.Tensor, list[str]]:
    """A few search-validation images of different classes, and what these are called; without labels, numbers."""
    labels = job.data.split("search").labels
    named = job.data.labelled and labels.ndim == 1 and bool(job.data.classes) and not job.data.of_pixels
    _, first = np.unique(labels, return_index=True)
    if len(first) < IMAGES or not named:
        first = np.arange(len(labels))
    places = first[np.linspace(0, len(first) - 1, min(IMAGES, len(first))).round().astype(int)]
    if isinstance(job.data, LoaderData):  # whose images come in their own batches alone
        images = next(iter(job.data.eval_loader("search", IMAGES)))[0][:IMAGES]
        places = np.arange(len(images))
    else:
        [(images, _)] = job.data.drawn("search", places).eval_loader("search", IMAGES)
    return images, [job.data.classes[labels[place]] if named else f"image {place}" for place in places]


def _spread(steps: list[Step]) -> Iterable[Step]:
    """Of many reductions a few, the last among them."""
    chosen = {round(place) for place in np.linspace(0, len(steps) - 1, min(STEPS, len(steps)))}
    return (step for index, step in enumerate(steps) if index in chosen)


def _record(step: Step) -> dict[str, Any]:
    _, rows, columns = step.regions.shape
    record = {"layer": step.layer, "operator": step.operator, "tokens": step.tokens, "rows": rows, "columns": columns}
    return record | {"regions": [" ".join(map(str, one.ravel())) for one in step.regions]}


def _encoded(photo: np.ndarray) -> str:
    """A small JPEG in base64; of a tiny image a PNG, which keeps its pixels."""
    image, file = Image.fromarray(photo), BytesIO()
    if min(image.size) < SMALL:
        image.save(file, "PNG")
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(file, "JPEG", quality=88)
    return base64.b64encode(file.getvalue()).decode()
