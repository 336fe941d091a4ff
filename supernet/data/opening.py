"""Open a data set by name: find its images, split them into train, search and test, and check them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from poolshare.space.data_kind import DataKind
from poolshare.space.errors import DataError

from .folders import class_notes, find_layout, held_out, open_folder, read_folder, read_pictures
from .listing import some
from .named import open_digits, open_hub, open_torch
from .pictures import Progress
from .shards import open_shards, read_tests
from .sources import Found, Place, Split, whole
from .splits import Checking, Data
from .transforms import (
    DEFAULT_AUGMENTATION,
    Augmentation,
    ImageFormat,
    Prepare,
    digits_transform,
    picture_transform,
    random_numbers,
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
    splits, notes, full = {}, found.notes, found.train
    whole_count = len(full)
    if found.open_test is None and not training and (np.bincount(full.labels, minlength=len(found.classes)) < 2).any():
        notes += (
            f"{name}: none of its {whole_count} images were set aside as test, as some class has no two of them.",
        )
    elif found.open_test is None:
        count = round(test_fraction * len(full))
        splits["test"], full = full.cut(count, found.classes, random_numbers(seed, _TEST), f"{name}, test")
        notes += (
            f"{name} has no test images of its own: {len(splits['test'])} of its {whole_count} images were "
            f"set aside as test, class by class, with seed {seed}; another seed sets aside others.",
        )
    rng = random_numbers(seed, _SEARCH)
    if found.search is not None:
        search, train = found.search, full
        full = Split(train.source, np.concatenate([train.indices, search.indices]))
        if search_images is not None and len(search) > search_images:
            notes += (
                f"architectures are scored on {search_images:,} of these, drawn with seed {seed}: see --search-images",
            )
            search = search.drawn(search_images, found.classes, rng)
    elif training:
        count = round(search_fraction * len(full))
        if search_images is not None and count > search_images:
            notes += (f"architectures are scored on {search_images:,} training images: see --search-images",)
            count = search_images
        search, train = full.cut(count, found.classes, rng, f"{name}, search")
    else:
        search = train = full
    splits |= {"train": train, "search": search, "train_full": full}
    data = Data(name, found.classes, images.in_chans, images.size, seed, notes, splits, found.open_test, prepare)
    data.check(check, progress, when)
    return data


def open_pictures(
    place: Place, images: ImageFormat, *, seed: int = 0, when: Checking = "once", progress: Progress | None = None
) -> Data:
    """A folder of pictures, however deep, without labels: all of them are `search`, and every label is 0.

    Raises DataError where there are none, and BrokenDataError as `open_data`.
    """
    root = place.path
    if not root.is_dir():
        raise DataError(f"no folder of pictures at {str(root)!r}: images without labels are given as a folder")
    source, notes = read_pictures(root, place.scale_16bit)
    notes += (f"the {len(source)} images of {str(root)!r} are scored without labels, by the dense model's answers.",)
    prepare = _transform(place, images, Augmentation.none())
    splits = dict.fromkeys(("train", "search", "train_full"), whole(source))
    data = Data(
        place.name, ("unlabelled",), images.in_chans, images.size, seed, notes, splits, None, prepare, labelled=False
    )
    data.check(("train",), progress, when)
    return data


def open_tests(
    place: Place,
    classes: Sequence[str],
    images: ImageFormat,
    *,
    when: Checking = "once",
    progress: Progress | None = None,
) -> Data:
    """A folder of images or shards that a model was not trained on, as test images: those set aside for that, or else all.

    classes: the model's; the folder may lack some of them. There is no other split than `test`, whose images are decoded
    once, as a check. Raises DataError and BrokenDataError as `open_data`.
    """
    if place.kind is DataKind.SHARDS:
        folder = place.path
        source, notes = read_tests(place, classes)
    else:
        folder = _test_folder(place.path)
        _, source, notes = read_folder(folder, classes, place.scale_16bit)
        notes += class_notes(folder, classes)
    notes += (f"all {len(source)} images of {str(folder)!r} are test images.",)
    prepare, splits = _transform(place, images, Augmentation.none()), {"test": whole(source)}
    data = Data(place.name, tuple(classes), images.in_chans, images.size, 0, notes, splits, None, prepare)
    data.check(("test",), progress, when)
    return data


def _test_folder(root: Path) -> Path:
    """The part of a folder of images that is there to test on, or all of it."""
    layout = find_layout(root)
    if layout.test is None and layout.train != root:
        raise DataError(f"{str(root)!r} has images to train on and none to test on: give the folder of those alone")
    return layout.test or next(iter(held_out(root)), root)


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
    openers = {
        DataKind.DIGITS: open_digits,
        DataKind.FOLDER: open_folder,
        DataKind.SHARDS: open_shards,
        DataKind.HUB: open_hub,
        DataKind.TORCH: open_torch,
    }
    found = openers[kind](place)
    if len(found.classes) < 2:
        raise DataError(f"{name} has fewer than 2 classes ({some(found.classes)}): there is nothing to learn")
    return found


def _transform(place: Place, images: ImageFormat, augmentation: Augmentation) -> Prepare:
    if place.kind is DataKind.DIGITS:
        return digits_transform(images, augmentation.shift)
    return picture_transform(images, augmentation)
