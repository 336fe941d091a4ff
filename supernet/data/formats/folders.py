"""Folders of images: which part is which, and what is in class folders and others; nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from poolshare.space.errors import DataError

from ..listing import ENDINGS, Listing, Names, class_name, list_folder, readable, some, subfolders
from ..pictures import Files, Folder, Images
from ..sources import Found, Place, Source, scored_on, whole

TRAIN_FOLDERS = ("train", "training")  # in upper or lower case, like the two below
TEST_FOLDERS = ("test", "testing")
VALIDATION_FOLDERS = ("val", "valid", "validation")


@dataclass(frozen=True)
class Layout:
    """The parts of a folder of images. test, search: None where there is none."""

    train: Path
    test: Path | None
    search: Path | None
    notes: tuple[str, ...]


Read = tuple[tuple[str, ...], Source, tuple[str, ...]]  # class names, images, and notes on what was passed over


@dataclass(frozen=True)
class Reader:
    """How images with their targets are read from a folder.

    read: the folder, class names whose indices hold or None, and `Place.scale_16bit` → what was read.
    holds: whether a folder has such images. form: what it holds then.
    """

    read: Callable[[Path, Sequence[str] | None, bool], Read]
    holds: Callable[[Path], bool]
    form: str


def _named(folders: Sequence[Path], names: Sequence[str], reader: Reader) -> list[Path]:
    """Those of a name, in the order of the names, that hold what is read."""
    return [one for name in names for one in folders if one.name.lower() == name and reader.holds(one)]


def find_layout(root: Path, reader: Reader, search_data: Path | None = None) -> Layout:
    """Which folder is which, by name; every one that is not read is named. Raises DataError where there is no folder."""
    for folder in (root, search_data):
        if folder is not None and not folder.is_dir():
            raise DataError(
                f"no data at {str(folder)!r}: give digits, a folder of images, or timm's torch/… or hfds/…"
                if folder is root
                else f"--search-data {str(folder)!r} is not there: give a folder with {reader.form}"
            )
    folders, notes = subfolders(root), list[str]()

    train = next(iter(_named(folders, TRAIN_FOLDERS, reader)), None)
    if train is None:
        return Layout(root, None, search_data, ())
    given = [one for one in folders if search_data is not None and one.samefile(search_data)]
    tests, validations = (
        [one for one in _named(folders, names, reader) if one not in given]
        for names in (TEST_FOLDERS, VALIDATION_FOLDERS)
    )
    candidates = tests + validations
    test = candidates[0] if candidates else None
    search = search_data or next((one for one in validations if tests), None)
    if test is not None and not tests:
        notes.append(f"{str(test)!r} holds the test images: there is no test folder beside it.")
    for one in folders:
        if one.name.lower() in TEST_FOLDERS and not reader.holds(one):
            notes.append(f"{str(one)!r} is not used: it has no {reader.form}, so its images have no labels.")
        elif one not in (train, test, search, *given):
            notes.append(f"{str(one)!r} is not read.")
    return Layout(train, test, search, tuple(notes))


def held_out(root: Path, reader: Reader) -> list[Path]:
    """Folders of test and validation images, where `root` has no others; test comes first."""
    folders = subfolders(root)
    found = _named(folders, TEST_FOLDERS + VALIDATION_FOLDERS, reader)
    return found if len(found) == len(folders) else []


def open_folder(place: Place, reader: Reader) -> Found:
    """The parts of a folder of images, nothing decoded. Raises DataError for one that cannot be used."""
    root, scale_16bit = place.path, place.scale_16bit
    layout = find_layout(root, reader, None if place.search_data is None else Path(place.search_data).expanduser())
    if layout.train == root and (alone := held_out(root, reader)):
        raise DataError(
            f"{str(root)!r} holds {some([one.name for one in alone])} and no folder to train on: put train/CLASS/ beside "
            "it; `poolshare evaluate` takes it as it is"
        )
    classes, parts, notes = reader.read(layout.train, None, scale_16bit)
    notes = layout.notes + notes
    test = layout.test
    open_test = None if test is None else lambda: whole(reader.read(test, classes, scale_16bit)[1])
    if test is not None:
        notes += class_notes(test, classes, reader)
    if layout.search is None:
        return Found(classes, whole(parts), open_test, None, notes)
    _, extra, more = reader.read(layout.search, classes, scale_16bit)
    notes += class_notes(layout.search, classes, reader) + more
    notes += (
        f"architectures are scored on the {len(extra)} images of {str(layout.search)!r}, and trained on all "
        f"{len(parts)} of {str(layout.train)!r}.",
    )
    extra = replace(extra, names=Names.of(extra.names or ()).beginning(f"{layout.search.name}/"))
    return scored_on(classes, parts, extra, open_test, notes)


def list_classes(root: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Names and folders of the classes in `root`, in the order of their indices, which is timm's."""
    folders = tuple(subfolders(root))
    names = tuple(class_name(folder.name) for folder in folders)
    if len({*names}) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(f"two class folders in {str(root)!r} have the same name, {twice!r}: rename one")
    return names, folders


def class_notes(root: Path, classes: Sequence[str], reader: Reader) -> tuple[str, ...]:
    """Notes on the class folders of test or search-validation images, where they are not those of training."""
    if reader is not CLASS_FOLDERS:
        return ()
    here = list_classes(root)[0]
    if {*here} - {*classes}:
        return (f"{_foreign(root, classes)}.",)
    missing = [repr(name) for name in classes if name not in here]
    return (f"{str(root)!r} has no images of {some(missing)}.",) * bool(missing)


def _foreign(root: Path, classes: Sequence[str]) -> str:
    here = list_classes(root)[0]
    missing, foreign = (sorted({*a} - {*b}) for a, b in ((classes, here), (here, classes)))
    return (
        f"{str(root)!r} has other classes than those trained on (missing: {some(missing) or 'none'}; "
        f"only there: {some(foreign) or 'none'}): rename or remove folders"
    )


def read_folder(root: Path, known: Sequence[str] | None, scale_16bit: bool) -> Read:
    """Class names, images, and notes on what was passed over.

    known: class names whose indices hold; some of them may be missing here. None: those found here, each with images.
    """
    names, folders = list_classes(root)
    if not folders:
        other = ", but a labels.csv: --task multilabel reads that" if (root / "labels.csv").is_file() else ""
        raise DataError(
            f"no class folders in {str(root)!r}{other or ': images go into ROOT/CLASS/, a folder for each class'}"
        )
    if known is not None and not {*names} <= {*known}:
        raise DataError(_foreign(root, known))
    listing = list_folder(root, depth=1)
    if listing.deeper:
        nested = os.path.join(root, listing.deeper[0])
        raise DataError(f"{nested!r} is inside a class folder: put images directly into ROOT/CLASS/")
    index_of = {name: index for index, name in enumerate(known or names)}
    label_of = {folder.name: index_of[name] for folder, name in zip(folders, names, strict=True)}
    labels = np.repeat(np.array([label_of.get(home, -1) for home in listing.homes], dtype=np.int64), listing.counts)
    empty = [folder for folder in folders if folder.name not in set(listing.homes)]
    if empty and known is None:
        raise DataError(f"no image ({' '.join(ENDINGS)}) in class folder {str(empty[0])!r}: add some, or remove it")
    inside = np.flatnonzero(labels >= 0)
    notes = listing.notes
    if loose := len(labels) - len(inside):
        first = listing.paths[int(np.argmin(labels))]
        notes += (
            f"{loose} image(s) in {str(root)!r} are outside the class folders ({readable(first)}) and are not read.",
        )
    if not len(inside):
        raise DataError(f"no image ({' '.join(ENDINGS)}) in the class folders of {str(root)!r}: add some")
    paths = Names.of(listing.paths[index] for index in inside) if loose else listing.paths
    source = source_of(root, paths, labels[inside], listing, inside, scale_16bit)
    return names if known is None else tuple(known), source, notes


def read_pictures(root: Path, known: Sequence[str] | None, scale_16bit: bool) -> Read:
    """No classes, all images in a folder, however deep, each with the label 0, and notes on what was passed over."""
    listing = list_folder(root)
    if not listing.paths:
        raise DataError(f"no image ({' '.join(ENDINGS)}) in {str(root)!r}: add some")
    rows = np.arange(len(listing.paths))
    return (), source_of(root, listing.paths, np.zeros_like(rows), listing, rows, scale_16bit), listing.notes


def source_of(
    root: Path, paths: Names, labels: np.ndarray, listing: Listing, rows: np.ndarray, scale_16bit: bool
) -> Source:
    """The images at `rows` of a listing, whose paths and labels these are; nothing is known of their contents."""
    sizes, times = (np.frombuffer(column, dtype=np.int64) for column in (listing.sizes, listing.times))
    if len(rows) < len(sizes):
        sizes, times = sizes[rows], times[rows]
    read = Images(Files(Folder(str(root), paths)), str(root), scale_16bit)
    return Source(read, labels, paths, sizes, np.zeros(len(rows), dtype=np.uint64), times)


CLASS_FOLDERS = Reader(read_folder, lambda root: bool(subfolders(root)), "class folders")
PICTURES = Reader(read_pictures, lambda root: bool(list_folder(root).paths), "images")
