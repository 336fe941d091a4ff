"""The classes of the model: those of the head that its weights bring, of the data, or of the run that goes on."""

from __future__ import annotations

from collections.abc import Sequence

import timm

from poolshare.space import DataError, ModelError
from poolshare.supernet.classes import Head, Matched, match_classes, read_class_map
from poolshare.supernet.data import Data
from poolshare.supernet.weights import Checkpoint

from ..config import SearchConfig


def matched_classes(
    config: SearchConfig, data: Data, found: Checkpoint | None, classes: Sequence[str] | None
) -> Matched:
    """The classes of the model and which of them the data's are; see `match_classes`."""
    head = (found.map_head if config.head else found.head) if found else _pretrained_head(config)
    trained = config.trains
    if config.warm and head is None and not trained:
        if found and not any(name.endswith("patch_embed.proj.weight") for name in found.tensors):
            raise ModelError(
                f"{found.name} is not a checkpoint of {config.model}: it has no patch_embed.proj.weight; give weights of that "
                "model"
            )
        raise ModelError(
            f"{found.name if found else config.model} brings weights without a head for classes, and without training a new one "
            "would stay untrained; train (--epochs 1 or more), or give weights with their head"
        )
    if not data.labelled:
        return _unmatched(config, head, classes)
    if classes is None:
        class_map = None if config.class_map is None else read_class_map(config.class_map)
        return match_classes(data.classes, head, trained=trained, class_map=class_map)
    missing = [name for name in data.classes if name not in set(classes)]
    if missing:
        raise DataError(
            f"the classes of {config.data} are not those the run was begun with ({missing[0]!r} is new, {classes[0]!r} and others "
            "there); restore the data, or search into a new folder"
        )
    fresh = head is None or head.count != len(classes)
    if config.warm and fresh and not trained:
        match_classes(data.classes, head, trained=False)  # says why a new head is refused
    return Matched(tuple(classes), tuple(list(classes).index(name) for name in data.classes), fresh)


def _unmatched(config: SearchConfig, head: Head | None, classes: Sequence[str] | None) -> Matched:
    """The head's own classes, for images without labels."""
    if classes is None:
        assert head is not None  # of a run that has begun, its classes are known
        if config.class_map is not None:
            names = match_classes((), head, class_map=read_class_map(config.class_map)).classes
        else:
            names = head.named.names or tuple(map(str, range(head.count)))
    else:
        names = tuple(classes)
    return Matched(names, (0,), False)


def _pretrained_head(config: SearchConfig) -> Head | None:
    """The head of the weights that --pretrained takes; None without it, or where they have none, as none has one for maps."""
    if not config.pretrained or config.head:
        return None
    known = timm.get_pretrained_cfg(config.model)
    if known is None or not known.num_classes:
        return None
    names = known.label_names
    named = tuple(map(str, names)) if isinstance(names, (list, tuple)) and len(names) == known.num_classes else None
    return Head(known.num_classes, config.model, named, "timm" if named else "")
