"""A base model's weights from a safetensors file: everything must fit, but for what timm adapts too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn

from poolshare.space import ModelError

HEADS = ("head", "head_dist")  # a distilled DeiT has two


def load_base_weights(model: Any, path: Path, name: str) -> tuple[str, ...]:
    """Put the weights of `path` into a timm ViT or a supernet over one; poolings keep theirs. Nothing is executed.

    As in timm, a head of another number of classes is left as it was made, the position embedding is resampled to
    another grid, patches to another size, and the patch embedding to other channels. Returns what was adapted, to be
    told. name: of the model, for messages. Raises ModelError listing what is missing, unknown or of another shape.
    """
    try:
        found = load_file(path)  # takes no more memory than the file has bytes
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"--weights {path} cannot be read ({error}); give a safetensors file, such as timm's model.safetensors"
        ) from None
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith("poolings.")}
    adapted, notes = _adapt(model, found, path)
    for key in (f"{head}.{kind}" for head in HEADS for kind in ("weight", "bias")):
        if key in wanted and (key not in adapted or adapted[key].shape != wanted[key].shape):
            if key == "head.weight":
                has = f"has {len(adapted[key])} classes" if key in adapted else "has no head"
                notes.append(f"{path.name} {has}, the data {len(wanted[key])}: the head is a new one")
            adapted[key] = wanted[key]
    _compare(
        path, name, {key: tuple(v.shape) for key, v in adapted.items()}, {k: tuple(v.shape) for k, v in wanted.items()}
    )
    model.load_state_dict(adapted, strict=False)  # only poolings can be missing
    return tuple(notes)


def _adapt(model: Any, found: dict[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What timm makes of a checkpoint: names of other releases, grid, patch size, channels; and notes of it."""
    stem = f"{model.pretrained_cfg['first_conv']}.weight"  # where the image's channels come in
    notes, weight, positions = [], found.get(stem), found.get("pos_embed")
    try:
        adapted = checkpoint_filter_fn(dict(found), model)
        if weight is not None and weight.ndim == 4 and weight.shape[1] != model.in_chans:
            adapted[stem] = adapt_input_conv(model.in_chans, adapted[stem])
            notes.append(
                f"{path.name} takes {weight.shape[1]} channels, the model {model.in_chans}: adapted as in timm"
            )
    except Exception as error:  # a stranger's tensors: timm's functions raise whatever they run into
        raise ModelError(
            f"--weights {path} cannot be adapted to this model ({type(error).__name__}: {str(error)[:100]}); give the "
            "--model it was made for"
        ) from None
    after = adapted.get("pos_embed")
    if positions is not None and after is not None and positions.shape != after.shape:
        notes.append(
            f"{path.name} has positions for {positions.shape[1]} tokens, the model {after.shape[1]}: resampled as in timm"
        )
    return adapted, notes


def _compare(path: Path, name: str, has: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    complaints = [
        ("lacks", sorted(wanted.keys() - has.keys())),
        ("has besides", sorted(has.keys() - wanted.keys())),
        (
            "has in another shape",
            [f"{key} {has[key]}, not {wanted[key]}" for key in wanted if key in has and has[key] != wanted[key]],
        ),
    ]
    told = [
        f"it {what} {', '.join(items[:3])}" + (f" and {len(items) - 3} more" if len(items) > 3 else "")
        for what, items in complaints
        if items
    ]
    if told:
        raise ModelError(f"--weights {path} does not fit {name}: {'; '.join(told)}; give the --model it was made for")
