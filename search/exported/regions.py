"""Which parts of photos are one token, drawn for an exported model, or for an architecture over any base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from poolshare.space import OPERATORS, Architecture, ArchitectureError, ConfigError, ModelError, RunError
from poolshare.space.files import write_whole
from poolshare.supernet import SuperNet
from poolshare.supernet.data import ImageFormat
from poolshare.supernet.data.pictures import Images
from poolshare.supernet.data.transforms import Augmentation, mask_transform, picture_transform
from poolshare.supernet.heads.maps import tapped
from poolshare.supernet.subnet import smallest_space
from poolshare.supernet.weights import load_base_weights, read_checkpoint

from ..config import checked_config
from ..job.prepare import image_format, input_config, model_options, with_card
from ..job.regions import photos, trace
from ..report.sheet import sheet
from .export import load_export


def draw_regions(
    what: str | Path, images: Sequence[str | Path], out: str | Path | None = None, **model: Any
) -> Image.Image:
    """A picture of each image beside its tokens after each reduction, as a PNG in `out` where that is given.

    what: an exported folder, with its own weights and preprocessing; or an architecture.
    images: files.
    model: of an architecture: model, pretrained, weights, img_size, in_chans, model_args, as `search` takes them. Without
    weights only operators can be drawn that do not look at the contents of tokens.

    Raises a PoolshareError, before anything is written, for an architecture that reduces nothing, a file that is no image,
    an `out` that exists, and whatever does not fit the model.
    """
    if out is not None:
        _check_out(Path(out))
    if not images:
        raise ConfigError("there is no image to draw: give at least one file")
    net, architecture, shown, scale_16bit = _exported(what, model) if os.path.isdir(what) else _built(str(what), model)
    read = Images([(str(path),) for path in images], "the images", scale_16bit)
    # a head for every pixel takes whole images
    transform: Any = (mask_transform if tapped(net) else picture_transform)(shown, Augmentation.none())
    inputs = torch.stack([transform(read(index), None) for index in range(len(images))])
    drawn = sheet(photos(net, inputs, shown), trace(net, architecture, inputs))
    if out is not None:
        file = BytesIO()
        drawn.save(file, "PNG", optimize=True)
        write_whole(Path(out), lambda part: part.write_bytes(file.getvalue()))
    return drawn


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} does not end in .png")
    if os.path.lexists(out):
        raise RunError(f"{out} exists already; choose another --out, nothing is ever overwritten")
    if not out.absolute().parent.is_dir():
        raise RunError(f"there is no folder {out.absolute().parent} for {out.name}; make it, or choose another --out")


def _exported(folder: str | Path, model: dict[str, Any]) -> tuple[Any, Architecture, ImageFormat, bool]:
    given = [name for name, value in model.items() if value]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} goes with an architecture; {folder} has its own: leave it out"
        )
    found = load_export(folder)
    _check_reduces(found.model.architecture)
    return found.model, found.model.architecture, image_format(found.data_config), found.facts.get("scale_16bit", False)


def _built(text: str, model: dict[str, Any]) -> tuple[Any, Architecture, ImageFormat, bool]:
    """A supernet of this one architecture."""
    architecture = Architecture.parse(text)
    _check_reduces(architecture)
    config = checked_config(**with_card({"data": "", **model}))
    choosing = [layer.operator for layer in architecture.layers if layer.operator and _chooses(layer.operator)]
    if choosing and not config.warm:
        raise ModelError(
            f"{choosing[0]} chooses tokens by their contents, and random weights would make that a random choice: give "
            "--pretrained, or --weights FILE"
        )
    found = None if config.weights is None else read_checkpoint(config.weights)
    net = SuperNet.from_timm(
        config.model,
        lambda base: smallest_space(architecture, base.patch_embed.grid_size),
        config.pretrained,
        **model_options(config),
    )
    if found is not None:
        load_base_weights(net, found, config.model, fresh_head=True)
    return net, architecture, image_format(input_config(config)), False


def _chooses(operator: str) -> bool:
    return operator in OPERATORS and OPERATORS[operator].chooses


def _check_reduces(architecture: Architecture) -> None:
    if all(layer.operator is None for layer in architecture.layers):
        raise ArchitectureError(f"'{architecture}' keeps all tokens, so each patch is one: there is nothing to draw")
