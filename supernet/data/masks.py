"""Folders of images with a mask for each, which says the class of every pixel: found, read and checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from poolshare.space.errors import BrokenDataError, DataError
from poolshare.space.processes import usable_cores

from .folders import both, find_layout, held_out
from .listing import Listing, list_folder, readable, some
from .pictures import Files, Pairs
from .sources import Found, Place, Source, Split, whole

IMAGES, MASKS = "images", "masks"  # the two folders of a part
NAMES = "classes.txt"


def open_masks(place: Place, classes: Sequence[str] | None = None) -> Found:
    """The parts of ROOT/{train,val,test}/{images,masks}; masks are opened only to count classes where no names are given.

    classes: of a model that knows them; None: a name a line in ROOT/classes.txt, else numbers up to the highest in a mask to
    train on. Raises DataError for a folder that cannot be used.
    """
    layout = find_layout(place.path, None if place.search_data is None else Path(place.search_data).expanduser())
    train, notes = _read_part(layout.train, place)
    names = tuple(classes) if classes is not None else _named(place.path)
    if names is None:
        names = tuple(map(str, range(1 + _highest(train))))
        notes += (
            f"the masks of {str(layout.train)!r} have classes 0 to {len(names) - 1}; {NAMES} in {str(place.path)!r}, a name a "
            "line in the order of the indices, names them.",
        )
    count = len(names)
    train = _of_classes(train, count)
    test = layout.test
    open_test = None if test is None else lambda: whole(_of_classes(_read_part(test, place)[0], count))
    notes = layout.notes + notes
    if layout.search is None:
        return Found(names, whole(train), open_test, None, notes)
    extra, more = _read_part(layout.search, place)
    together, images = both(train, _of_classes(extra, count), layout.search.name), len(train)
    notes += (
        *more,
        f"architectures are scored on the {len(extra)} images of {str(layout.search)!r}, and trained on all "
        f"{images} of {str(layout.train)!r}.",
    )
    rows = np.arange(len(together))
    return Found(names, Split(together, rows[:images]), open_test, Split(together, rows[images:]), notes)


def open_test_masks(place: Place, classes: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """The images of a folder that has masks/ beside images/, or of its test folder, and notes."""
    layout = find_layout(place.path)
    if layout.test is None and layout.train != place.path:
        raise DataError(
            f"{str(place.path)!r} has images to train on and none to test on: give the folder of those alone"
        )
    folder = layout.test or next(iter(held_out(place.path)), place.path)
    source, notes = _read_part(folder, place)
    return _of_classes(source, len(classes)), (*notes, f"all {len(source)} images of {str(folder)!r} are test images.")


def _read_part(folder: Path, place: Place) -> tuple[Source, tuple[str, ...]]:
    """The images of FOLDER/images, each with the mask of its name in FOLDER/masks, and notes on what was passed over."""
    for name in (IMAGES, MASKS):
        if not (folder / name).is_dir():
            raise DataError(
                f"{str(folder)!r} has no folder {name}: segmentation reads ROOT/train/{IMAGES}/ and ROOT/train/{MASKS}/, and the "
                "same of val and test; a mask is called as its image"
            )
    images, masks = (list_folder(folder / name) for name in (IMAGES, MASKS))
    if not images.paths:
        raise DataError(f"no image in {str(folder / IMAGES)!r}: add some")
    by_stem = _by_stem(masks)
    stems = [os.path.splitext(path)[0] for path in images.paths]
    missing = [path for path, stem in zip(images.paths, stems, strict=True) if stem not in by_stem]
    if missing:
        expected = os.path.join(masks.root, os.path.splitext(missing[0])[0] + ".png")
        raise DataError(
            f"{len(missing)} of {len(stems)} images in {images.root!r} have no mask ({some([*map(readable, missing)], 3)}): "
            f"put the mask of the first at {expected!r}"
        )
    twice = len(stems) - len(set(stems))
    if twice:
        raise DataError(
            f"{twice} image(s) in {images.root!r} differ from others by their ending alone, and share a mask: rename them"
        )
    rows = np.array([by_stem[stem] for stem in stems])
    notes = images.notes + masks.notes
    if unused := len(masks.paths) - len(rows):
        notes += (f"{unused} mask(s) in {masks.root!r} have no image and are not read.",)
    read = Pairs(
        Files(((images.root, images.paths),)),
        str(folder),
        place.scale_16bit,
        masks=Files(((masks.root, [masks.paths[row] for row in rows]),)),
        ignore_index=place.ignore_index,
    )
    sizes, mask_sizes, times, mask_times = (
        np.frombuffer(column, dtype=np.int64) for column in (images.sizes, masks.sizes, images.times, masks.times)
    )
    # A pair counts as one file; its time is the later one, which every change of either moves.
    source = Source(
        read,
        np.zeros(len(rows), dtype=np.int64),
        images.paths,
        sizes + mask_sizes[rows],
        np.zeros(len(rows), dtype=np.uint64),
        np.maximum(times, mask_times[rows]),
    )
    return source, notes


def _by_stem(masks: Listing) -> dict[str, int]:
    """Rows of the masks by their paths without ending. Raises DataError for two of one."""
    found = dict[str, int]()
    for row, path in enumerate(masks.paths):
        stem = os.path.splitext(path)[0]
        if stem in found:
            raise DataError(f"{masks.root!r} has two masks called {readable(stem)!r}: remove one")
        found[stem] = row
    return found


def _of_classes(source: Source, count: int) -> Source:
    return replace(source, read=replace(source.read, classes=count))  # type: ignore[type-var]


def _named(root: Path) -> tuple[str, ...] | None:
    """The classes in ROOT/classes.txt; None: there is no such file."""
    file = root / NAMES
    if not file.is_file():
        return None
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(file)!r} cannot be read ({error}): write a class name a line, in the order of the indices"
        ) from None
    if len(set(names)) < len(names):
        raise DataError(f"{str(file)!r} names a class twice: give each index a name of its own, one a line")
    return names


def _highest(source: Source) -> int:
    """The highest class index in any mask. Raises BrokenDataError for one that is not a mask."""
    try:
        with ThreadPoolExecutor(usable_cores()) as pool:  # decoding lets other threads run
            return max(pool.map(source.read.highest, range(len(source))))  # type: ignore[attr-defined]
    except BrokenDataError as error:
        raise BrokenDataError(f"{error}; {Pairs.remedy}") from None
