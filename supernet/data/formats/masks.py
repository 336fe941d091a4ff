"""Folders of images with a mask for each, which says the class of every pixel; masks are opened only to count classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from poolshare.space.errors import BrokenDataError, DataError
from poolshare.space.processes import usable_cores

from ..listing import Listing, Names, list_folder, readable, some
from ..pictures import Files, Folder, Pairs
from ..sources import Source
from .folders import Read, Reader
from .tables import CLASSES, class_names

IMAGES, MASKS = "images", "masks"  # the two folders of a part


def mask_reader(ignore_index: int) -> Reader:
    """Reads FOLDER/images and FOLDER/masks. ignore_index: the value of pixels that count for nothing."""
    read = partial(_read_masks, ignore_index)
    return Reader(read, lambda root: (root / MASKS).is_dir(), f"{IMAGES}/ and {MASKS}/")


def _read_masks(ignore_index: int, root: Path, known: Sequence[str] | None, scale_16bit: bool) -> Read:
    """Class names, images with their masks, and notes on what was passed over.

    A mask is called as its image, but for the ending. known: class names in order; None: a name a line in classes.txt, in
    ROOT or the folder that holds it, else numbers up to the highest in a mask. Raises DataError for what does not fit.
    """
    for name in (IMAGES, MASKS):
        if not (root / name).is_dir():
            raise DataError(
                f"{str(root)!r} has no folder {name}: segmentation reads ROOT/train/{IMAGES}/ and ROOT/train/{MASKS}/, and the "
                "same of val and test; a mask is called as its image"
            )
    images, masks = (list_folder(root / name) for name in (IMAGES, MASKS))
    if not images.paths:
        raise DataError(f"no image in {str(root / IMAGES)!r}: add some")
    rows = _rows(images, masks)
    notes = images.notes + masks.notes
    if unused := len(masks.paths) - len(rows):
        notes += (f"{unused} mask(s) in {masks.root!r} have no image and are not read.",)
    read = Pairs(
        Files(Folder(images.root, images.paths)),
        str(root),
        scale_16bit,
        masks=Files(Folder(masks.root, Names.of(masks.paths[row] for row in rows))),
        ignore_index=ignore_index,
    )
    known = known or class_names(root / CLASSES) or class_names(root.parent / CLASSES)
    if known is None:
        known = [str(index) for index in range(1 + _highest(read, len(rows)))]
        notes += (
            f"the masks of {str(root)!r} hold classes 0 to {len(known) - 1}; {CLASSES} beside it, a name a line in the order of "
            "the indices, names them.",
        )
    sizes, mask_sizes, times, mask_times = (
        np.frombuffer(column, dtype=np.int64) for column in (images.sizes, masks.sizes, images.times, masks.times)
    )
    # A pair counts as one file; its time is the later one, which every change of either moves.
    source = Source(
        replace(read, classes=len(known)),
        np.zeros(len(rows), dtype=np.int64),
        images.paths,
        sizes + mask_sizes[rows],
        np.zeros(len(rows), dtype=np.uint64),
        np.maximum(times, mask_times[rows]),
    )
    return tuple(known), source, notes


def _rows(images: Listing, masks: Listing) -> np.ndarray:
    """Of each image the row of its mask, (N,). Raises DataError where there are none, or two."""
    by_stem = dict[str, int]()
    for row, path in enumerate(masks.paths):
        stem = os.path.splitext(path)[0]
        if stem in by_stem:
            raise DataError(f"{masks.root!r} has two masks called {readable(stem)!r}: remove one")
        by_stem[stem] = row
    stems = [os.path.splitext(path)[0] for path in images.paths]
    missing = [path for path, stem in zip(images.paths, stems, strict=True) if stem not in by_stem]
    if missing:
        expected = os.path.join(masks.root, os.path.splitext(missing[0])[0] + ".png")
        raise DataError(
            f"{len(missing)} of {len(stems)} images in {images.root!r} have no mask ({some([*map(readable, missing)], 3)}): "
            f"put the mask of the first at {expected!r}"
        )
    if twice := len(stems) - len({*stems}):
        raise DataError(
            f"{twice} image(s) in {images.root!r} differ from others by their ending alone, and share a mask: rename them"
        )
    return np.array([by_stem[stem] for stem in stems])


def _highest(read: Pairs, count: int) -> int:
    """The highest class index in any mask. Raises BrokenDataError for one that is not a mask."""
    try:
        with ThreadPoolExecutor(usable_cores()) as pool:  # decoding lets other threads run
            return max(pool.map(read.highest, range(count)))
    except BrokenDataError as error:
        raise BrokenDataError(f"{error}; {Pairs.remedy}") from None
