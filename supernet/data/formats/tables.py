"""Folders of images with a table of their labels, any number for each: ROOT/labels.csv; nothing is decoded here."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from poolshare.space.errors import DataError

from ..listing import Names, list_folder, readable, some
from .folders import Read, Reader, source_of

TABLE, CLASSES = "labels.csv", "classes.txt"
HEADER = ["file", "labels"]
BETWEEN = "|"  # labels of one image
_HOW = (
    f"a first line {','.join(HEADER)}, then a line for each image, its labels separated by {BETWEEN}, as in "
    f"a/1.jpg,cat{BETWEEN}dog"
)


def read_table(root: Path, known: Sequence[str] | None, scale_16bit: bool) -> Read:
    """Class names, images with a 0 or 1 for each class, (N, classes) uint8, and notes on what was passed over.

    ROOT/labels.csv names images by their path below ROOT. known: class names in order; None: those of ROOT/classes.txt, one
    a line, or else all that occur, sorted. Raises DataError for a table that names a missing image, or an unknown class.
    """
    rows = _rows(root / TABLE)
    stated = known if known is not None else class_names(root / CLASSES)
    classes = tuple(
        stated if stated is not None else sorted({label for _, labels in rows.values() for label in labels})
    )
    if not classes:
        raise DataError(f"{str(root / TABLE)!r} has no image with a label: add some")
    listing = list_folder(root)
    place = {path.replace("\\", "/"): index for index, path in enumerate(listing.paths)}
    column = {name: index for index, name in enumerate(classes)}
    chosen, targets = np.zeros(len(rows), np.int64), np.zeros((len(rows), len(classes)), np.uint8)
    for row, (file, (line, labels)) in enumerate(rows.items()):
        where = f"line {line} of {str(root / TABLE)!r}"
        if file not in place:
            raise DataError(
                f"{where} names {file!r}, and there is no such image below {str(root)!r}: restore or remove it"
            )
        for label in labels:
            if label not in column:
                known_by = str(root / CLASSES) if known is None else "the classes trained on"
                raise DataError(
                    f"{where} has the label {label!r}, which is not among {known_by}: {some(list(classes))}"
                )
            targets[row, column[label]] = 1
        chosen[row] = place[file]
    order = np.argsort(chosen)
    chosen, targets = chosen[order], targets[order]
    notes = listing.notes
    if left := len(listing.paths) - len(chosen):
        first = next(path for index, path in enumerate(listing.paths) if index not in set(chosen.tolist()))
        notes += (f"{left} image(s) in {str(root)!r} are not in {TABLE} ({readable(first)}) and are not read.",)
    absent = [repr(classes[index]) for index in np.flatnonzero(~targets.any(axis=0)).tolist()]
    if absent:
        notes += (f"no image of {str(root / TABLE)!r} has the label {some(absent)}.",)
    paths = Names.of(listing.paths[index] for index in chosen)
    return classes, source_of(root, paths, targets, listing, chosen, scale_16bit), notes


def _rows(path: Path) -> dict[str, tuple[int, list[str]]]:
    """Line and labels by file. Raises DataError for a table that cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read ({error}): write {_HOW}") from None
    if not lines or [cell.strip().lower() for cell in lines[0]] != HEADER:
        begins = ",".join(lines[0]) if lines else ""
        raise DataError(f"{str(path)!r} begins with {begins!r:.60}: write {_HOW}")
    found: dict[str, tuple[int, list[str]]] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        if len(cells) != 2 or not cells[0].strip():
            raise DataError(f"line {number} of {str(path)!r} has {len(cells)} cells: write {_HOW}")
        name = cells[0].strip().replace("\\", "/")
        if name in found:
            raise DataError(f"{str(path)!r} names {name!r} on lines {found[name][0]} and {number}: remove one")
        found[name] = number, [label.strip() for label in cells[1].split(BETWEEN) if label.strip()]
    if not found:
        raise DataError(f"{str(path)!r} names no image: write {_HOW}")
    return found


def class_names(path: Path) -> list[str] | None:
    """The names in a file, in the order of their indices; None where there is no such file."""
    if not path.is_file():
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if len({*names}) < len(names) or not names:
        raise DataError(f"{str(path)!r} names {len(names)} classes, {len({*names})} of them different: one name a line")
    return names


LABEL_TABLES = Reader(read_table, lambda root: (root / TABLE).is_file(), f"{TABLE}")
