"""What an opened data set is made of: sources of images, splits of them, and how they are cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from poolshare.space.data_kind import DataKind, split_name
from poolshare.space.errors import DataError

from .listing import Names, some

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Place:
    """Where images are.

    name: `digits` (scikit-learn's 1,797 images of 8×8, 540 of them test whatever the seed); timm's `torch/…`,
        found, or with `download` put, in `data_dir`; timm's `hfds/…`, cached in `data_dir`, its columns
        `image_key` and `label_key`, or the same of a folder, `hfds//home/me/birds`; `wds/PATH`, see `shards`; or a path,
        below `data_dir` if that is given, to ROOT with
        ROOT/CLASS/*.png, or with ROOT/train/CLASS/*.png and the same in ROOT/test or ROOT/val; of both, those in
        ROOT/val are scored on. A folder whose name is like one of the others is reached as ./digits.
    search_data: a folder of class folders whose images are scored on; nothing is set aside for that then.
    scale_16bit: take 16-bit grey images, 65,535 as white.
    """

    name: str
    data_dir: StrPath | None = None
    download: bool = False
    image_key: str = "image"
    label_key: str = "label"
    search_data: StrPath | None = None
    scale_16bit: bool = False

    @property
    def kind(self) -> DataKind:
        """What the name says of it."""
        return DataKind.of(self.name)

    @property
    def path(self) -> Path:
        """Of a folder of images or shards."""
        return Path(self.data_dir or "", split_name(self.name)[1]).expanduser()


@dataclass(frozen=True, eq=False)
class Source:
    """Images that are read one at a time, and `labels`, their class indices: (N,) int64.

    names: of the files, "cat/1.jpg", where they lie in folders. sizes: their bytes, (N,) int64. times: of their last
    change, (N,) int64 nanoseconds. digests: hashes of the contents, (N,) uint64, each 0 until it is known. None: there is
    no such thing here.
    """

    read: Callable[[int], Any]
    labels: np.ndarray
    names: Sequence[str] | None = None
    sizes: np.ndarray | None = None
    digests: np.ndarray | None = None
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of `source` at `indices`, (n,) int64 in ascending order."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """Class indices, (n,) int64."""
        return self.source.labels[self.indices]

    def cut(
        self, count: int, classes: Sequence[str], generator: np.random.Generator, where: str
    ) -> tuple[Split, Split]:
        """About `count` images, `stratified`, and the rest."""
        chosen, rest = stratified(self.labels, classes, count, generator, where)
        return Split(self.source, self.indices[chosen]), Split(self.source, self.indices[rest])

    def drawn(self, count: int, classes: Sequence[str], generator: np.random.Generator) -> Split:
        """About `count` of the images, `stratified` where every class has two."""
        if np.bincount(self.labels, minlength=len(classes)).min() > 1:
            return self.cut(count, classes, generator, "")[0]
        return Split(self.source, np.sort(generator.permutation(self.indices)[:count]))


def stratified(
    labels: np.ndarray, classes: Sequence[str], count: int, generator: np.random.Generator, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of about `count` labels, drawn class by class in proportion, and of the rest; both ascending.

    Shares are rounded by largest remainder to `count` in all, but no class is taken whole or left out.
    Raises DataError, which says `where`, for classes of fewer than two images.
    """
    sizes = np.bincount(labels, minlength=len(classes))
    rare = [f"{classes[index]!r} ({sizes[index]})" for index in np.flatnonzero(sizes < 2).tolist()]
    if rare:
        raise DataError(
            f"{where}: too few images of class {some(rare)}, where each side of the split needs one: "
            "add images, or remove the class"
        )
    taken, remainder = np.divmod(sizes * count, len(labels))
    taken[np.argsort(-remainder, kind="stable")[: count - taken.sum()]] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for index, number in enumerate(taken.clip(1, sizes - 1)):
        chosen[generator.permutation(np.flatnonzero(labels == index))[:number]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def whole(source: Source) -> Split:
    """All images of a source."""
    return Split(source, np.arange(len(source)))


def known(split: Split, classes: Sequence[str], place: Place) -> Split:
    """The same. Raises DataError for labels that are none of the classes."""
    labels = split.labels
    foreign = labels[(labels < 0) | (labels >= len(classes))]
    if len(foreign):
        raise DataError(
            f"{place.name} has images labelled {foreign[0]}, which is not a class: take data that are labelled"
        )
    return split


@dataclass(frozen=True, eq=False)
class Found:
    """A data set as it was found; without `open_test` it has no test images of its own.

    search: images that are there to score on, in the same source as `train`; None: they are to be cut from `train`.
    """

    classes: tuple[str, ...]
    train: Split
    open_test: Callable[[], Split] | None
    search: Split | None = None
    notes: tuple[str, ...] = ()


def scored_on(
    classes: tuple[str, ...],
    train: Source,
    search: Source,
    open_test: Callable[[], Split] | None,
    notes: tuple[str, ...],
) -> Found:
    """A data set whose images to score on are files of their own, as those to train on are; they become one source."""
    columns: list[Any] = [(one.labels, one.sizes, one.digests, one.times) for one in (train, search)]
    labels, sizes, digests, times = map(np.concatenate, zip(*columns, strict=True))
    read: Any = replace(train.read, items=train.read.items + search.read.items)  # type: ignore[attr-defined,type-var]
    names = Names.joined(Names.of(one.names or ()) for one in (train, search))
    joint = Source(read, labels, names, sizes, digests, times)
    rows, count = np.arange(len(joint)), len(train)
    return Found(classes, Split(joint, rows[:count]), open_test, Split(joint, rows[count:]), notes)
