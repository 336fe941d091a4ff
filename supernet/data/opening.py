"""Open a data set by name: find its images, split them into train, search and test, and check them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from poolshare.space.data_kind import DataKind
from poolshare.space.errors import DataError

from .formats.folders import (
    CLASS_FOLDERS,
    PICTURES,
    Reader,
    class_notes,
    find_layout,
    held_out,
    open_folder,
    read_pictures,
)
from .formats.masks import mask_reader
from .formats.named import open_digits, open_hub, open_torch
from .formats.shards import open_shards, read_tests
from .formats.tables import LABEL_TABLES
from .listing import some
from .pictures import Progress
from .sources import Found, Place, Split, whole
from .splits import Checking, Data
from .transforms import (
    DEFAULT_AUGMENTATION,
    Augmentation,
    ImageFormat,
    Prepare,
    digits_transform,
    mask_transform,
    picture_transform,
)

_SEARCH, _TEST = range(2)  # one stream of random numbers for each cut; `splits` has others of the same seed


def open_data(
    place: Place,
    images: ImageFormat,
    *,
    search_fraction: float = 0.2,
    search_images: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
    check: Sequence[str] = ("train",),
    when: Checking = "once",
    progress: Progress | None = None,
    training: bool = True,
) -> Data:
    """Open a data set and cut it into train, search and test; no test image is used until asked for.

    images: what the model takes.
    search_fraction: share of the training images set aside to score architectures on, where none are there for that.
    search_images: how many are scored on, at most; the others are trained on, or left out where they are there for that.
    test_fraction: share of all images set aside where the data have no test images of their own (`Data.notes` says so).
    check, when: whose images are decoded, as a check: `train`, which comprises search-validation, and `test`, see
        `Data.check`. progress: called as `progress(done, total)` meanwhile.
    training: False: nothing will be trained, so all images but those of test are scored on; where a class has one image,
        none are set aside as test either.

    Raises DataError for data that are missing or of no use here, BrokenDataError for files that cannot be read.
    """
    name = place.name
    if images.in_chans not in (1, 3):
        raise DataError(
            f"image files are read with 1 or 3 channels, and the model takes in_chans {images.in_chans}: give images of "
            "other channels in Python, as poolshare.search.search(data=(train, validation))"
        )
    if seed < 0 or not (0 < search_fraction < 1 and 0 < test_fraction < 1):
        raise DataError(
            f"seed {seed}, search_fraction {search_fraction}, test_fraction {test_fraction}: "
            "take a seed of at least 0, and fractions between 0 and 1"
        )
    prepare = _transform(place, images, augmentation)
    found = open_source(place)
    labelled = place.targets != "dense"
    classes = found.classes if labelled else ()
    strata = () if place.targets == "pixels" else classes  # what cuts keep the shares of
    splits, notes, full = dict[str, Split](), found.notes, found.train
    if found.open_test is None:
        note, test, full = _without_tests(name, full, strata, test_fraction, seed, training)
        notes += (note,)
        if test is not None:
            splits["test"] = test
    train = search = full
    if found.search is not None:
        more, search = _scored(found.search, strata, search_images, seed)
        full = Split(full.source, np.concatenate([full.indices, found.search.indices]))
        notes += more
    elif training:
        more, train, search = _set_aside(name, full, strata, search_fraction, search_images, seed)
        notes += more
    splits |= {"train": train, "search": search, "train_full": full}
    if full.labels.ndim > 1:
        unseen = ~search.labels.any(axis=0) & full.labels.any(axis=0)
        absent = [repr(classes[index]) for index in np.flatnonzero(unseen).tolist()]
        if absent:
            notes += (
                f"warning: no search-validation image has the label {some(absent)}: its share of the score is 0.",
            )
    data = Data(name, classes, images.in_chans, images.size, seed, notes, splits, found.open_test, prepare, labelled)
    data.check(check, progress, when)
    return data


def _without_tests(
    name: str, images: Split, strata: Sequence[str], fraction: float, seed: int, training: bool
) -> tuple[str, Split | None, Split]:
    """Of data that have no test images of their own: a note, those that are set aside, if any, and the rest."""
    if not training and _too_rare(images, strata):
        note = f"{name}: none of its {len(images)} images were set aside as test, as some class has no two of them."
        return note, None, images
    count, rng = round(fraction * len(images)), np.random.default_rng((seed, _TEST))
    how = "class by class" if images.labels.ndim == 1 and strata else "at random"
    test, rest = images.cut(count, strata, rng, f"{name}, test")
    note = (
        f"{name} has no test images of its own: {len(test)} of its {len(images)} images were "
        f"set aside as test, {how}, with seed {seed}; another seed sets aside others."
    )
    return note, test, rest


def _scored(images: Split, strata: Sequence[str], most: int | None, seed: int) -> tuple[tuple[str, ...], Split]:
    """Of images that are there to score on: notes, and at most so many of them."""
    if most is None or len(images) <= most:
        return (), images
    note = f"architectures are scored on {most:,} of these, drawn with seed {seed}: see --search-images"
    return (note,), images.drawn(most, strata, np.random.default_rng((seed, _SEARCH)))


def _set_aside(
    name: str, images: Split, strata: Sequence[str], fraction: float, most: int | None, seed: int
) -> tuple[tuple[str, ...], Split, Split]:
    """Of data without images to score on: notes, those to train on, and a share, at most so many, set aside to score on."""
    count, notes = round(fraction * len(images)), tuple[str, ...]()
    if most is not None and count > most:
        notes = (f"architectures are scored on {most:,} training images: see --search-images",)
        count = most
    search, train = images.cut(count, strata, np.random.default_rng((seed, _SEARCH)), f"{name}, search")
    return notes, train, search


def open_pictures(
    place: Place, images: ImageFormat, *, seed: int = 0, when: Checking = "once", progress: Progress | None = None
) -> Data:
    """A folder of pictures, however deep, without labels: all of them are `search`, and every label is 0.

    Raises DataError where there are none, and BrokenDataError as `open_data`.
    """
    root = place.path
    if not root.is_dir():
        raise DataError(f"no folder of pictures at {str(root)!r}: images without labels are given as a folder")
    _, source, notes = read_pictures(root, None, place.scale_16bit)
    notes += (f"the {len(source)} images of {str(root)!r} are scored without labels, by the dense model's answers.",)
    prepare = _transform(place, images, Augmentation.none())
    splits = dict.fromkeys(("train", "search", "train_full"), whole(source))
    data = Data(
        place.name, ("unlabelled",), images.in_chans, images.size, seed, notes, splits, None, prepare, labelled=False
    )
    data.check(("train",), progress, when)
    return data


def open_tests(place: Place, classes: Sequence[str], images: ImageFormat, *, progress: Progress | None = None) -> Data:
    """A folder of images or shards that a model was not trained on, as test images: those set aside for that, or else all.

    classes: the model's; the folder may lack some of them. There is no other split than `test`, whose images are decoded
    once, as a check. Raises DataError and BrokenDataError as `open_data`.
    """
    if place.kind is DataKind.SHARDS:
        folder = place.path
        source, notes = read_tests(place, classes)
    else:
        reader = reader_of(place)
        folder = _test_folder(place.path, reader)
        _, source, notes = reader.read(folder, classes, place.scale_16bit)
        notes += class_notes(folder, classes, reader)
    notes += (f"all {len(source)} images of {str(folder)!r} are test images.",)
    prepare, splits = _transform(place, images, Augmentation.none()), {"test": whole(source)}
    data = Data(place.name, tuple(classes), images.in_chans, images.size, 0, notes, splits, None, prepare)
    data.check(("test",), progress)
    return data


def _test_folder(root: Path, reader: Reader) -> Path:
    """The part of a folder of images that is there to test on, or all of it."""
    layout = find_layout(root, reader)
    if layout.test is None and layout.train != root:
        raise DataError(f"{str(root)!r} has images to train on and none to test on: give the folder of those alone")
    return layout.test or next(iter(held_out(root, reader)), root)


def open_source(place: Place) -> Found:
    """Find a data set, decoding nothing. Raises DataError where it is missing or of no use here."""
    name, kind = place.name, place.kind
    if place.search_data is not None and kind is not DataKind.FOLDER:
        raise DataError(
            f"--search-data {str(place.search_data)!r} goes with a folder of images, and the data are {name}: leave it out"
        )
    if kind is DataKind.GIVEN:
        raise DataError(
            f"{name}: these data were given in Python: go on with what `poolshare.search.search` returned, or give them to "
            "`poolshare.search.work`; of exported models --data FOLDER"
        )
    if kind is DataKind.FOLDER:
        found = open_folder(place, reader_of(place))
    elif place.targets == "classes":
        raise DataError(
            f"{name} has one class per image, and this task needs any number of them: give a folder with labels.csv, or data "
            "in Python"
        )
    elif place.targets == "pixels":
        raise DataError(f"{name} has no masks: give a folder with train/images and train/masks")
    else:
        openers = {
            DataKind.DIGITS: open_digits,
            DataKind.SHARDS: open_shards,
            DataKind.HUB: open_hub,
            DataKind.TORCH: open_torch,
        }
        found = openers[kind](place)
    if place.targets in ("class", "pixels") and len(found.classes) < 2:
        raise DataError(f"{name} has fewer than 2 classes ({some(found.classes)}): there is nothing to learn")
    return found


def reader_of(place: Place) -> Reader:
    """How a folder is read, by what its images need."""
    if place.targets == "pixels":
        return mask_reader(place.ignore_index)
    return {"class": CLASS_FOLDERS, "classes": LABEL_TABLES, "dense": PICTURES}[place.targets]


def _too_rare(split: Split, classes: Sequence[str]) -> bool:
    """Whether some class has too few images for a test image to be set aside."""
    return split.labels.ndim == 1 and bool((np.bincount(split.labels, minlength=len(classes)) < 2).any())


def _transform(place: Place, images: ImageFormat, augmentation: Augmentation) -> Prepare:
    if place.targets == "pixels":
        return mask_transform(images, augmentation)
    if place.kind is DataKind.DIGITS:
        return digits_transform(images, augmentation.shift)
    return picture_transform(images, augmentation)
