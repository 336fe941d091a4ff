"""Match classes to the outputs of a trained head, by names from a card, a checkpoint, a class map or ImageNet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from poolshare.space.errors import DataError, ModelError

from .data.listing import some

Names = tuple[str, ...]


@dataclass(frozen=True)
class Head:
    """The classifier that weights bring.

    count: its outputs. names: of the classes, in order; None: unknown. said_by: where the names come from.
    """

    count: int
    source: str  # whose head it is, for messages
    names: Names | None = None
    said_by: str = ""

    @property
    def named(self) -> Head:
        """The same, with ImageNet's synsets as names where there are none and their number is that of an ImageNet set."""
        subset = infer_imagenet_subset({"num_classes": self.count})
        if self.names is not None or subset is None:
            return self
        names = tuple(ImageNetInfo(subset).label_names())
        return Head(self.count, self.source, names, f"{subset} in timm") if len(names) == self.count else self


@dataclass(frozen=True)
class Matched:
    """The classes of a model, and which of them the data's are.

    classes: names in the order of the head. indices: class i of the data is the model's class indices[i].
    fresh: no trained head is kept. notes: what was decided and why.
    """

    classes: Names
    indices: tuple[int, ...]
    fresh: bool
    notes: tuple[str, ...] = ()


def match_classes(
    classes: Sequence[str], head: Head | None, *, trained: bool = True, class_map: tuple[Names, str] | None = None
) -> Matched:
    """Match the classes of data to a head: by name where all are among its names, else by order where numbers agree.

    classes: of the data, in order. head: what the weights bring; None: nothing, the model is a new one. trained: whether
    a new head would be trained before it is used. class_map: names of the outputs in order, and the file they are from.

    Raises DataError where the class map or a head's names fit in part, ModelError where a head that is not trained would
    be a new one.
    """
    count = len(classes)
    if class_map is not None:
        return _by_class_map(classes, head, *class_map)
    by_order = partial(Matched, tuple(classes), tuple(range(count)))
    if head is None:
        return by_order(True)
    head = head.named
    foreign = [name for name in classes if head.names is None or name not in set(head.names)]
    if head.names is not None and not foreign:
        return _by_name(classes, head, False)
    partly = head.names is not None and len(foreign) < count
    if head.count == count:
        if partly:
            raise DataError(
                f"{count - len(foreign)} of the data's {count} classes are among the names of {head.said_by} for "
                f"the head of {head.source}, and {_some(foreign)} not: rename the class folders, or say with --class-map "
                "FILE which output is which class, one folder's name a line"
            )
        note = f"the head of {head.source} is taken to have the data's classes in their order: "
        return by_order(False, (f"{note}{_outputs(classes, range(count))}; if that is wrong, give --class-map FILE",))
    why = f"it has {head.count} classes, the data {count}"
    if partly:
        why += f", {len(foreign)} of them not among the names of {head.said_by}: {_some(foreign)}"
    elif head.names is not None:
        why += f", none of them among the names of {head.said_by}"
    remedy = "name the head's outputs with --class-map FILE (in Python also classes=), folders' names one a line"
    if not trained:
        raise ModelError(
            f"the head of {head.source} does not fit the data: {why}. Without training a new one would stay untrained: "
            f"{remedy}; or train (--epochs 1 or more), or score without labels (--no-training --unlabelled)"
        )
    note = f"warning: the trained head of {head.source} is dropped and a new one trained: {why}; to keep it, {remedy}."
    return by_order(True, (note,))


def _by_class_map(classes: Sequence[str], head: Head | None, names: Names, file: str) -> Matched:
    if head is not None and head.count != len(names):
        raise DataError(f"--class-map {file} names {len(names)} classes, the head of {head.source} has {head.count}")
    missing = [name for name in classes if name not in set(names)]
    if missing:
        raise DataError(
            f"--class-map {file} lacks {_some(missing)}, {len(missing)} of the data's {len(classes)} classes: name each "
            "class as its folder is called, one a line, in the order of the head's outputs"
        )
    named = Head(len(names), head.source if head else "", names, f"--class-map {file}")
    return _by_name(classes, named, head is None)


def _by_name(classes: Sequence[str], head: Head, fresh: bool) -> Matched:
    assert head.names is not None
    place = {name: index for index, name in enumerate(head.names)}
    indices = tuple(place[name] for name in classes)
    whose = f"the {head.count:,} outputs of {head.source}" if head.source else "the model's classes"
    some = "" if len(classes) == head.count else f" {len(classes):,} of"
    note = f"classes are matched by name to{some} {whose} ({head.said_by}): {_outputs(classes, indices)}"
    return Matched(head.names, indices, fresh, (note,))


def _outputs(names: Sequence[str], indices: Sequence[int]) -> str:
    """Three classes and the outputs that are theirs."""
    shown = ", ".join(f"{name!r} is output {index}" for name, index in zip(names[:3], indices[:3], strict=True))
    return shown + (", …" if len(names) > 3 else "")


def read_class_map(path: str | Path) -> tuple[Names, str]:
    """Class names in the order of a head's outputs, and the file's name.

    A text file has one name a line; a .json file what `names_of` reads. Raises DataError for anything else.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
        names = names_of(found[:-1] if isinstance(found, list) and found and found[-1] == "" else found)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"--class-map {path} cannot be read ({error}); give a text file with one class name a line, in the order of "
            "the head's outputs, or a JSON list of them"
        ) from None
    return names, str(path)


def names_of(value: Any) -> Names:
    """Names in index order from a list of them, {name: index} or {index: name}; other values raise ValueError.

    These are the forms of timm's label_names, torchvision's class_to_idx and transformers' id2label.
    """
    if isinstance(value, Mapping):
        if all(type(index) is int for index in value.values()):
            pairs = [(index, name) for name, index in value.items()]
        else:
            pairs = [(int(index), name) for index, name in value.items()]
        pairs.sort(key=lambda pair: pair[0])
        if [index for index, _ in pairs] != list(range(len(pairs))):
            raise ValueError(f"its indices are not 0 to {len(pairs) - 1}, each once")
        value = [name for _, name in pairs]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError("it is not a list of class names")
    twice = [name for name, count in Counter(value).items() if count > 1]
    if twice:
        raise ValueError(f"it names {_some(twice)} more than once")
    return tuple(value)


def _some(names: Sequence[str]) -> str:
    return some([*map(repr, names)], 3)
