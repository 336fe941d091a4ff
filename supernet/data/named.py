"""Data sets known by name: scikit-learn's digits, and those that timm opens; nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset

from poolshare.space.data_kind import DataKind, split_name
from poolshare.space.errors import DataError

from .folders import TEST_FOLDERS, VALIDATION_FOLDERS
from .listing import Names
from .pictures import Files, Images, digest
from .sources import Found, Place, Source, Split, known, scored_on, stratified, whole

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


def open_torch(place: Place) -> Found:
    """A data set of torchvision, as timm opens it. Raises DataError where it cannot be used."""

    def part(which: str) -> tuple[Any, Split]:
        items, labels = _torch_part(place, which)
        read, indices = Images(items, place.name, place.scale_16bit), _indices(labels, place)
        count = len(indices)
        digests = _digests(getattr(items, "data", None), count)
        return items, whole(Source(read, indices, sizes=_sizes(items, count), digests=digests))

    items, train = part("train")
    names: Any = getattr(items, "classes", None) or getattr(items, "all_categories", None)
    names = names or range(int(train.labels.max()) + 1)
    classes = tuple(", ".join(one) if isinstance(one, tuple) else str(one) for one in names)
    # "validation" is timm's word for the test images of torchvision's sets
    return Found(classes, known(train, classes, place), lambda: known(part("validation")[1], classes, place))


def _torch_part(place: Place, part: str) -> tuple[Any, Sequence[Any]]:
    """Images by index, at [index][0], and their labels."""
    name = place.name
    if name in ("torch/folder", "torch/image_folder"):
        raise DataError(f"{name} is a folder of images: give the path of the folder itself instead")
    if place.data_dir is None:
        raise DataError(f"{name}: no folder to find it in: give --data-dir, and --download to fetch it to there")
    with _opening(place, part):
        dataset = create_dataset(name, root=_root(place), split=part, download=place.download)
        labels = getattr(dataset, "targets", None)
        if labels is None or np.ndim(labels[0]) != np.ndim(dataset[0][1]):  # QMNIST's are 8 to an image
            labels = [dataset[index][1] for index in range(len(dataset))]
        return dataset, labels


def open_hub(place: Place) -> Found:
    """A data set of the Hugging Face hub, or of a form of theirs in a folder, as timm opens it, by index: hfids/ as hfds/.

    Raises DataError where it cannot be used.
    """
    reader, train = _hub_part(place, "train")
    classes = tuple(reader.class_to_idx) or tuple(map(str, range(int(train.labels.max()) + 1)))
    train, there = known(train, classes, place), reader.dataset.info.splits or ()
    tests, searches = (
        next((name for name in names if name in there), None) for names in (TEST_FOLDERS, VALIDATION_FOLDERS)
    )

    def part(name: str) -> Split:
        return known(_hub_part(place, name)[1], classes, place)

    test = tests or searches
    open_test = partial(part, test) if test else None
    if tests is None or searches is None:
        return Found(classes, train, open_test)
    search = part(searches)
    note = f"{place.name}: architectures are scored on its {len(search)} {searches} images."
    return scored_on(classes, train.source, search.source, open_test, (note,))


def _hub_part(place: Place, part: str) -> tuple[Any, Split]:
    """timm's reader of a part, and its images with what is known of them."""
    with _opening(place, part):
        # timm's data set would put a neighbour in the place of a broken image, its reader does not
        columns = {"input_key": place.image_key, "target_key": place.label_key}
        name = f"hfds/{split_name(place.name)[1]}"
        reader = create_dataset(name, root=_root(place), split=part, **columns).reader
        labels = _indices(list(reader.dataset[place.label_key]), place)
        sizes, times = _stored(reader)
    rows = Rows(place.name, part, reader)
    read = Images(Files(rows), place.name, place.scale_16bit)
    return reader, whole(Source(read, labels, rows.names, sizes, np.zeros(len(labels), dtype=np.uint64), times))


@dataclass(frozen=True, eq=False)
class Rows:
    """The image files in a table of Hugging Face's, called by their row."""

    data: str
    part: str
    reader: Any  # timm's

    @property
    def key(self) -> str:
        """What the table was made from, and how, by Hugging Face's own hash."""
        return f"{self.data}, {self.part}, {self.reader.dataset._fingerprint}"

    @cached_property
    def names(self) -> Names:
        return Names.of(f"{self.part}, row {row}" for row in range(len(self.reader)))

    def place(self, index: int) -> str:
        return f"{self.data}, {self.names[index]}"

    def content(self, index: int) -> bytes:
        with self.reader[index][0] as file:
            return file.read()


def _stored(reader: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the images in a table, (N,) int64, and when they changed: 0, or of those that it has the paths of alone,
    nanoseconds."""
    from pyarrow import compute

    column = reader.dataset.data.column(reader.image_key)
    sizes = compute.binary_length(compute.struct_field(column, "bytes")).fill_null(0).to_numpy().astype(np.int64)
    times, paths = np.zeros_like(sizes), compute.struct_field(column, "path")
    for row in np.flatnonzero(sizes == 0).tolist():
        status = os.stat(paths[row].as_py())
        sizes[row], times[row] = status.st_size, status.st_ctime_ns
    return sizes, times


def _root(place: Place) -> str | None:
    return None if place.data_dir is None else str(Path(place.data_dir).expanduser())


@contextmanager
def _opening(place: Place, part: str) -> Iterator[None]:
    """Raise DataError for whatever a download, an archive or a library raises, or where that library is missing."""
    name = place.name
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        if place.kind is not DataKind.HUB:
            raise
        raise DataError(
            f"{name} needs Hugging Face's datasets, which is not installed: pip install '.[hfds]'"
        ) from error
    except AssertionError as error:
        raise DataError(f"timm does not know {name} ({error}): torch/cifar10 is one that it does") from error
    except Exception as error:
        raise DataError(
            f"{name}, {part} images, could not be opened in {_root(place) or 'the default cache'} ({error}): give the "
            "folder that holds it as --data-dir or have it fetched with --download"
        ) from error


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


def _indices(labels: Sequence[Any], place: Place) -> np.ndarray:
    """Labels as class indices, (N,) int64. Raises DataError for anything else."""
    if any(np.ndim(label) for label in labels):
        raise DataError(f"{place.name} is multi-label (its labels are lists): take data with one class for each image")
    indices = np.asarray(labels)
    if indices.dtype.kind not in "iu":
        raise DataError(f"{place.name} has labels such as {labels[0]!r}: they must be class indices, 0, 1, 2 …")
    return indices.astype(np.int64)
