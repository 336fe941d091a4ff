"""Data given in Python, torch data sets or loaders of images and labels, as the splits that everything else reads.

A sample, or a batch, is a pair (images, labels), or a dictionary of them as Hugging Face data sets give it.

What is random in the transforms of a data set is keyed by (seed, epoch, index), as it is for every other source, so
that a stopped search continues with the same images in the same order; of loaders see `loaders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, IterableDataset

from poolshare.space.data_kind import DataKind
from poolshare.space.errors import BrokenDataError, DataError

from ..tasks.task import Targets
from . import samples
from .loaders import LoaderData, not_one_by_one, read_loader
from .pictures import Progress, advance
from .sources import Source, Split, whole
from .splits import Data
from .transforms import Draw, keyed_generators, seed_generators

SPLITS = ("train", "search")  # in the order in which they are given
_AGAIN = 2  # images that are read a second time, to see whether they are the same

Parts = Sequence[Any]  # training and validation images: two torch `Dataset`s, or two `DataLoader`s


def open_own(
    parts: Parts,
    name: str,
    *,
    classes: Sequence[str] | int | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
    targets: Targets = "class",
) -> Data:
    """The splits `train` and `search`; there is no test split; test images stay with the user.

    parts: two `Dataset`s with a length, or two `DataLoader`s; of float images (channels, H, W), all of one size, and
    class indices, or what else `targets` says, see `supernet.tasks`; or of dictionaries with `pixel_values` or `image`, and
    `label` or `labels`. All of them are read once:
    what breaks the contract is found before anything starts.
    name: how they are called in the record. classes: names in index order, or how many there are; None: what the training
    set calls `classes`, or numbers up to the highest label. workers: processes that read data sets; loaders have their own.
    progress: called with images read, and all of them.

    Raises DataError for what cannot be used, BrokenDataError for images that cannot be read.
    """
    if targets == "pixels":
        raise DataError(
            "images with masks are read from a folder: give ROOT with train/images/ and train/masks/ as data"
        )
    _check_parts(parts)
    found = _read_parts(parts, seed, workers, progress, targets)
    channels, height, width = _common_shape(found)
    of_loaders = isinstance(parts[0], DataLoader)
    labels = [part.split.labels for part in found.values()]
    both = Source(
        not_one_by_one if of_loaders else partial(_Item, ConcatDataset(parts)),
        np.concatenate(labels),
        digests=np.concatenate([part.split.source.digests for part in found.values()]),  # type: ignore[misc]
    )
    loaders = dict(zip(SPLITS, parts, strict=True))
    kind = partial(LoaderData, loaders=loaders, sizes=found["train"].sizes, targets=targets)
    return (kind if of_loaders else Data)(
        name=f"{DataKind.GIVEN.value}{name}",
        classes=() if targets == "dense" else _names(_dataset(parts[0]), classes, labels),
        in_chans=channels,
        img_size=(height, width),
        seed=seed,
        notes=tuple(
            f"{where} images differ from one reading to the next, though all generators are seeded alike: changed ones "
            "cannot be noticed."
            for where, part in found.items()
            if not part.repeatable
        ),
        _splits={where: part.split for where, part in found.items()} | {"train_full": whole(both)},
        _open_test=None,
        _prepare=_fetch,
        labelled=targets != "dense",
    )


def _dataset(part: Any) -> Any:
    return part.dataset if isinstance(part, DataLoader) else part


def _check_parts(parts: Any) -> None:
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        count = f" of {len(parts)}" if isinstance(parts, (tuple, list)) else ""
        raise DataError(
            f"data is a {type(parts).__name__}{count}: give a name that --data knows, or (train, validation), two "
            "torch Datasets or two DataLoaders; test images are yours to keep"
        )
    if len({isinstance(part, DataLoader) for part in parts}) > 1:
        raise DataError("one of the data is a loader and one is not: give two Datasets, or two DataLoaders")
    for where, part in zip(SPLITS, parts, strict=True):
        _check_kind(part, where)


def _read_parts(
    parts: Parts, seed: int, workers: int, progress: Progress | None, targets: Targets
) -> dict[str, samples.Part]:
    """What training and validation images are, by the name of the split; each is read once."""
    total, before, found = sum(len(_dataset(part)) for part in parts), 0, dict[str, samples.Part]()
    for where, part in zip(SPLITS, parts, strict=True):
        show = partial(advance, progress, before, total) if progress else None
        if isinstance(part, DataLoader):
            found[where] = read_loader(part, where, seed, show, targets)
        else:
            found[where] = _read_dataset(part, where, workers, show, targets)
        before += len(_dataset(part))
    return found


def _common_shape(found: Mapping[str, samples.Part]) -> tuple[int, ...]:
    """Channels, height and width of all images. Raises DataError where they differ or are empty."""
    shapes = {part.shape for part in found.values()}
    if len(shapes) > 1:
        raise DataError(
            f"training and validation images differ in size ({samples.listed(shapes)}): transform them alike"
        )
    channels, height, width = shape = shapes.pop()
    if min(channels, height, width) < 1:
        raise DataError(f"images are {channels}×{height}×{width}: give ones of at least one channel and one pixel")
    return shape


class _Item(NamedTuple):
    """An image that is still to be fetched from the user's data set."""

    dataset: Any
    position: int


def _fetch(place: _Item, draw: Draw) -> Tensor:
    """The image, with all that is random about it keyed; in evaluation by its index alone."""
    seed_generators(*(draw or (place.position,)))
    return samples.image_of(place.dataset[place.position]).float()  # type: ignore[no-any-return]


class _Checked(NamedTuple):
    label: Any
    shape: tuple[int, ...]
    problem: str  # empty where there is none
    broken: bool = False  # it could not be read at all
    digest: int = 0  # of the image


@dataclass(frozen=True, eq=False)
class _Checks(Dataset):
    """Checks every item of a data set."""

    dataset: Any
    targets: Targets

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Checked:
        try:
            with keyed_generators(index):
                item = self.dataset[index]
        except Exception as error:  # whatever the user's own code raises
            return _Checked(-1, (), f"{type(error).__name__}: {str(error)[:200]}", True)
        try:
            image, label = samples.pair(item, self.targets)
        except DataError as error:
            return _Checked(-1, (), str(error))
        problem = (
            samples.image_fault(image, 3) or samples.not_finite_fault(image) or samples.label_fault(label, self.targets)
        )
        if problem:
            return _Checked(-1, (), problem)
        label = np.asarray(label, dtype=np.uint8) if self.targets == "classes" else int(label)
        return _Checked(label, tuple(image.shape), "", digest=samples.image_digest(image))


def _read_dataset(
    dataset: Any, where: str, workers: int, progress: Callable[[int], None] | None, targets: Targets
) -> samples.Part:
    labels, digests = list[Any](), list[int]()
    shape: tuple[int, ...] | None = None
    generator = torch.Generator()  # the global one stays as it is
    checks = _Checks(dataset, targets)
    for items in DataLoader(checks, 256, num_workers=workers, collate_fn=list, generator=generator):
        for item in items:
            if item.problem:
                kind = BrokenDataError if item.broken else DataError
                raise kind(f"item {len(labels)} of the {where} data cannot be used ({item.problem}); mend or remove it")
            shape = shape or item.shape
            if item.shape != shape:
                here, first = samples.listed([item.shape]), samples.listed([shape])
                raise DataError(
                    f"item {len(labels)} of the {where} data is {here}, the first is {first}: resize and crop all images alike"
                )
            labels.append(item.label)
            digests.append(item.digest)
        if progress:
            progress(len(labels))
    assert shape is not None  # empty data sets are refused before
    again = [checks[index].digest for index in range(min(_AGAIN, len(digests)))]
    repeatable = again == digests[: len(again)]
    if len({np.shape(label) for label in labels}) > 1:
        raise DataError(f"labels of the {where} data differ in length: give a 0 or 1 for each class, of every image")
    table = np.array(labels, dtype=np.uint8 if targets == "classes" else np.int64)
    source = Source(partial(_Item, dataset), table, digests=samples.digest_column(digests, repeatable))
    return samples.Part(Split(source, np.arange(len(labels))), shape, repeatable)


def _check_kind(part: Any, where: str) -> None:
    if isinstance(part, DataLoader):
        if isinstance(part.dataset, IterableDataset):
            raise DataError(
                f"the {where} loader streams its images, which cannot be continued: give one over a Dataset"
            )
        if part.persistent_workers:
            raise DataError(f"the {where} loader has persistent_workers=True, which cannot be repeated: leave it off")
        if isinstance(part.sampler, DistributedSampler):
            raise DataError(f"the {where} loader has a DistributedSampler: leave it out, each batch is shared anyway")
    elif isinstance(part, IterableDataset) or not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
        raise DataError(
            f"the {where} data are {samples.described(part)}: give a Dataset with a length, or a DataLoader"
        )
    if not len(part):
        raise DataError(f"the {where} data are empty: give at least one image of each class")


def _names(dataset: Any, given: Sequence[str] | int | None, labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    hot = labels[0].ndim > 1
    if hot and labels[0].shape[1:] != labels[1].shape[1:]:
        raise DataError(
            f"training labels are of {labels[0].shape[1]} classes, validation labels of {labels[1].shape[1]}: give the same"
        )
    count = labels[0].shape[1] if hot else 1 + max(int(part.max()) for part in labels)
    stated = getattr(dataset, "classes", None) or _hub_names(dataset)
    if isinstance(given, int):
        given = tuple(map(str, range(given)))
    if isinstance(given, str):
        raise DataError(f"classes {given!r} is one text: give a list of names")
    if given is not None:
        names = tuple(map(str, given))
    else:
        names = tuple(map(str, stated if isinstance(stated, (tuple, list)) else range(count)))
    if hot and count != len(names):
        raise DataError(f"there are {len(names)} class names, and labels of {count} classes: name each")
    if count > len(names) or (len(names) < 2 and not hot):
        raise DataError(f"there are {len(names)} class names, and labels from 0 to {count - 1}: name 2 classes or more")
    seen = [{*np.flatnonzero(part.any(axis=0) if hot else np.bincount(part)).tolist()} for part in labels]
    untrained = sorted(seen[1] - seen[0])
    if untrained:
        raise DataError(f"class {names[untrained[0]]!r} has validation images and none to train on: add some")
    return names


def _hub_names(dataset: Any) -> Any:
    """The class names that a Hugging Face data set states among its features."""
    features = getattr(dataset, "features", None)
    found = [features[key] for key in samples.LABEL_KEYS if key in features] if isinstance(features, Mapping) else []
    return getattr(found[0], "names", None) if found else None
