"""List the images in a folder, the same way for every verb; nothing is decoded here."""

from __future__ import annotations

import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from poolshare.space.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_NUMBERS = re.compile(r"(\d+)")  # `isdigit` accepts characters that are not decimal


class Names(Sequence[str]):
    """Many names in little memory: a million strings take 150 MB, and processes that read them would copy them.

    text: all of them as the file system has them, with zeros between; no name is empty.
    """

    def __init__(self, text: bytes) -> None:
        self.text = text

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Those of any sequence."""
        return names if isinstance(names, Names) else cls(os.fsencode("\0".join(names)))

    @property
    def column(self) -> np.ndarray:
        """The text as numbers, for a file of arrays."""
        return np.frombuffer(self.text, dtype=np.uint8)

    @classmethod
    def joined(cls, parts: Iterable[Names]) -> Names:
        """Those of several, one after the other."""
        return cls(b"\0".join(part.text for part in parts if part.text))

    def beginning(self, prefix: str) -> Names:
        """The same names with something before each of them."""
        first = os.fsencode(prefix)
        return Names(first + self.text.replace(b"\0", b"\0" + first)) if self.text else self

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each name ends, (N,) int64."""
        zeros = np.flatnonzero(self.column == 0)
        return np.append(zeros, len(self.text)) if self.text else zeros

    def __len__(self) -> int:
        return self.text.count(b"\0") + 1 if self.text else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return os.fsdecode(self.text[int(self._ends[at - 1]) + 1 if at else 0 : int(self._ends[at])])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.text.split(b"\0") if self.text else ())


@dataclass(eq=False)
class Listing:
    """The files of a folder; paths are relative to `root`, as the file system gives them.

    paths: images, the folder's own before those of its folders, each in natural order. A link to an image that is not
    there is one of them, of -1 bytes: it is reported with those that cannot be decoded.
    homes: the folders that images lie in, in this order. counts: how many in each. sizes: bytes of each image. times: of its
    last change, in nanoseconds. deeper: folders below the depth asked for.
    passed_over: files that are not images by their names.
    """

    root: str
    homes: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))  # a list of a million numbers is much larger
    times: array[int] = field(default_factory=lambda: array("q"))
    deeper: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    _names: list[Names] = field(default_factory=list)  # of the images in each home

    @cached_property
    def paths(self) -> Names:
        joined = Names.joined(self._names)
        self._names.clear()  # a million names once are enough
        return joined

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on what was passed over; none where nothing was."""
        what = f"{len(self.passed_over)} file(s) in {self.root!r} were passed over ({some([*map(readable, self.passed_over)], 3)})"
        return (f"{what}: images end in {' '.join(ENDINGS)}.",) * bool(self.passed_over)

    def enter(self, relative: str, above: frozenset[tuple[int, int]], depth: int | None) -> None:
        """Add what lies in the folder `relative`. above: the folders it lies in, so that links in a ring end."""
        here = os.path.join(self.root, relative)
        below, images = [], list[tuple[str, int, int]]()  # name, size, time
        for entry in _entries(here):
            name = entry.name
            image = is_image(name)
            if image and name[0] != "." and _is(entry.is_file):  # as most are, so of these no more is asked
                found = entry.stat()
                images.append((name, found.st_size, found.st_ctime_ns))
                continue
            path = os.path.join(relative, name)
            if name[0] == ".":
                self.passed_over += [path] * image
            elif _is(entry.is_dir):
                below.append((path, entry.path))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                if image:
                    images.append((name, -1, 0))
                elif depth and not os.path.splitext(entry.name)[1]:  # where folders stand: a class would be lost
                    target = os.readlink(entry.path)
                    raise DataError(f"{entry.path!r} is a link to {target!r}, which is not there: mend or remove it")
                else:
                    self.passed_over.append(path)
            else:
                self.passed_over.append(path)
        if images:
            names, sizes, times = zip(*images, strict=True)
            self.homes.append(relative)
            self.counts.append(len(images))
            self._names.append(Names.of(names).beginning(os.path.join(relative, "")))
            self.sizes.extend(sizes)
            self.times.extend(times)
        for path, absolute in below:
            if depth == 0:
                self.deeper.append(path)
                continue
            status = os.stat(absolute)
            place = status.st_dev, status.st_ino
            if place not in above:
                self.enter(path, above | {place}, None if depth is None else depth - 1)


def list_folder(root: str | Path, depth: int | None = None) -> Listing:
    """All images in `root` and in folders up to `depth` below it (None: however deep); links are followed.

    Hidden files and folders are left out, but a hidden file that is named like an image is passed over by name.
    Raises DataError for a folder that cannot be listed, and for a link where a folder should be.
    """
    listing = Listing(str(root))
    listing.enter("", frozenset(), depth)
    return listing


def subfolders(root: str | Path) -> list[Path]:
    """The folders in `root` that are not hidden, in natural order; none where there is no such folder."""
    folders = [one for one in _entries(str(root)) if one.name[0] != "." and one.is_dir()] if os.path.isdir(root) else []
    return [Path(one.path) for one in folders]


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise DataError(f"{folder!r} cannot be listed ({error.strerror}): check its permissions") from None


def _is(asked: object) -> bool:
    try:
        return bool(asked())  # type: ignore[operator]
    except OSError:  # links in a ring
        return False


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(ENDINGS)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts as timm does, "9" before "10", so that class indices are timm's; names that are equal so far by themselves."""
    parts: list[str | int] = [*_NUMBERS.split(name.lower())]  # text and numbers in turn
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def class_name(folder: str) -> str:
    """A folder's name as text that can be written anywhere, the same on every system."""
    return unicodedata.normalize("NFC", readable(folder))


def readable(name: str) -> str:
    """A name from the file system as text that can be written anywhere, whatever its encoding is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def some(items: Sequence[str], most: int = 10) -> str:
    """The first few of some names, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
