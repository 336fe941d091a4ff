"""Data sets known by name: scikit-learn's digits, and those that timm opens; nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset

from poolshare.space.data_kind import DataKind
from poolshare.space.errors import DataError

from .folders import TEST_FOLDERS, VALIDATION_FOLDERS
from .pictures import Images, digest
from .sources import Found, Place, Source, Split, stratified, whole

DIGITS_TEST = 540  # of 1,797 images


def open_digits(place: Place) -> Found:
    """The digits; which of them are test images never changes."""
    from sklearn.datasets import load_digits  # slow to import, and only the digits need it

    images, labels = load_digits(return_X_y=True)
    classes = tuple(str(digit) for digit in range(10))
    test, train = stratified(labels, classes, DIGITS_TEST, np.random.default_rng(0), "digits")

    def part(chosen: np.ndarray) -> Split:
        pixels = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 8, 8)
        return whole(Source(pixels.__getitem__, labels[chosen].astype(np.int64), digests=_digests(images[chosen])))

    return Found(classes, part(train), lambda: part(test))


def open_timm(place: Place) -> Found:
    """A data set of torchvision or the Hugging Face hub, as timm opens it. Raises DataError where it cannot be used."""
    name, parts = place.name, _Parts(place)
    items, found = parts.open("train")
    names: Any = getattr(items, "classes", None) or getattr(items, "all_categories", ())
    if parts.of_hub:
        names = items.class_to_idx
    train = parts.split(items, found, len(names) or None)
    names = names or range(int(train.labels.max()) + 1)
    classes = tuple(", ".join(one) if isinstance(one, tuple) else str(one) for one in names)
    # "validation" is timm's word for the test images of torchvision's sets
    known = (items.dataset.info.splits or ()) if parts.of_hub else ("validation",)
    others = [one for one in TEST_FOLDERS + VALIDATION_FOLDERS if one in known]
    open_test = (lambda: parts.split(*parts.open(others[0]), len(classes))) if others else None
    if len(others) == 1 or others[:1] != ["test"]:
        return Found(classes, train, open_test)
    search = parts.split(*parts.open(others[1]), len(classes))
    sources, count = (train.source, search.source), len(train)
    both = Source(
        _Joined(*sources),  # neither is decoded yet
        np.concatenate([one.labels for one in sources]),
        sizes=_column([one.sizes for one in sources]),
        digests=_column([one.digests for one in sources]),
    )
    note = f"{name}: architectures are scored on its {len(search)} {others[1]} images."
    return Found(classes, Split(both, np.arange(count)), open_test, Split(both, np.arange(count, len(both))), (note,))


@dataclass(frozen=True)
class _Parts:
    """Opens the parts of a data set that timm knows, by name."""

    place: Place

    @property
    def of_hub(self) -> bool:
        return self.place.kind is DataKind.HUB

    def open(self, part: str) -> tuple[Any, Sequence[Any]]:
        """Images by index, at [index][0], and their labels."""
        name, data_dir = self.place.name, self.place.data_dir
        if name in ("torch/folder", "torch/image_folder"):
            raise DataError(f"{name} is a folder of images: give the path of the folder itself instead")
        if data_dir is None and not self.of_hub:
            raise DataError(f"{name}: no folder to find it in: give --data-dir, and --download to fetch it to there")
        root = None if data_dir is None else str(Path(data_dir).expanduser())
        columns = {"input_key": self.place.image_key, "target_key": self.place.label_key} if self.of_hub else {}
        try:
            dataset = create_dataset(name, root=root, split=part, download=self.place.download, **columns)
            if self.of_hub:  # timm's data set would put a neighbour in the place of a broken image, its reader does not
                dataset.reader[0]  # an image column that is missing shows only here
                return dataset.reader, list(dataset.reader.dataset[self.place.label_key])
            labels = getattr(dataset, "targets", None)
            if labels is None or np.ndim(labels[0]) != np.ndim(dataset[0][1]):  # QMNIST's are 8 to an image
                labels = [dataset[index][1] for index in range(len(dataset))]
            return dataset, labels
        except AssertionError as error:
            raise DataError(f"timm does not know {name} ({error}): torch/cifar10 is one that it does") from error
        except Exception as error:  # whatever a download, an archive or a library that is missing raises
            raise DataError(
                f"{name}, {part} images, could not be opened in {root or 'the default cache'} ({error}): give the "
                "folder that holds it as --data-dir or have it fetched with --download; hfds/ needs `datasets`"
            ) from error

    def split(self, items: Any, labels: Sequence[Any], num_classes: int | None) -> Split:
        """All images of a part."""
        read, indices = (
            Images(items, self.place.name, self.place.scale_16bit),
            _indices(labels, num_classes, self.place),
        )
        count = len(indices)
        if self.of_hub:  # Hugging Face's own hash of what a data set was made from
            made_from = getattr(items.dataset, "_fingerprint", None)
            digests = None if made_from is None else np.full(count, digest(str(made_from).encode()), dtype=np.uint64)
        else:
            digests = _digests(getattr(items, "data", None), count)
        return whole(Source(read, indices, sizes=_sizes(items, count), digests=digests))


@dataclass(frozen=True, eq=False)
class _Joined:
    """Reads from two sources, the second one after the first."""

    first: Source
    second: Source

    def __call__(self, index: int) -> Any:
        count = len(self.first)
        return self.first.read(index) if index < count else self.second.read(index - count)


def _column(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """One after the other; None where one of them is unknown."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _sizes(items: Any, count: int) -> np.ndarray | None:
    """Bytes of each image file, (N,) int64, where a data set of torchvision keeps their paths; None elsewhere."""
    for kept in getattr(items, "__dict__", {}).values():
        if isinstance(kept, (list, tuple)) and len(kept) == count:
            paths = [one[0] if isinstance(one, tuple) and one else one for one in kept]
            if isinstance(paths[0], (str, os.PathLike)) and os.path.isfile(paths[0]):
                return np.array([os.path.getsize(path) for path in paths], dtype=np.int64)
    return None


def _digests(rows: Any, count: int | None = None) -> np.ndarray | None:
    """Hashes of images that are all in memory, (N,) uint64; None where they are not."""
    if not isinstance(rows, (np.ndarray, torch.Tensor)) or len(rows) != (count or len(rows)):
        return None
    return np.array([digest(np.ascontiguousarray(row).tobytes()) for row in np.asarray(rows)], dtype=np.uint64)


def _indices(labels: Sequence[Any], num_classes: int | None, place: Place) -> np.ndarray:
    """Labels as class indices, (N,) int64. Raises DataError for anything else."""
    if any(np.ndim(label) for label in labels):
        raise DataError(f"{place.name} is multi-label (its labels are lists): take data with one class for each image")
    indices = np.asarray(labels)
    if indices.dtype.kind not in "iu":
        raise DataError(f"{place.name} has labels such as {labels[0]!r}: they must be class indices, 0, 1, 2 …")
    foreign = indices[(indices < 0) | (indices >= (num_classes or np.inf))]
    if len(foreign):
        raise DataError(
            f"{place.name} has images labelled {foreign[0]}, which is not a class: take data that are labelled"
        )
    return indices.astype(np.int64)
