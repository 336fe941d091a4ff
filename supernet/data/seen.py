"""What was seen of image files, kept in the user's cache: no file is decoded twice as a check."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from platformdirs import user_cache_path

from poolshare.space.errors import RunError
from poolshare.space.files import write_whole

from .listing import Names
from .pictures import PIXELS_VARIABLE, Files, Images
from .sources import Source

CACHE_VARIABLE = "POOLSHARE_CACHE"  # a folder; unset: the platform's place for caches
_UNREADABLE = OSError, ValueError, KeyError, BadZipFile  # what reading a damaged file of the cache, or none, raises
_FRESH = 2 * 10**9  # nanoseconds: a file that young may change again without its time of change telling


def load(path: Path) -> dict[str, np.ndarray]:
    """The columns in a file of the cache; empty where there is none, or a damaged one: it is made again."""
    with suppress(*_UNREADABLE), np.load(path, allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}
    return {}


def save(path: Path, **columns: np.ndarray) -> None:
    """Put columns into a file of the cache; one that cannot be written is no error."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]

    with suppress(OSError, RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)


def cached(kind: str, *key: str) -> Path:
    """The file of the cache for what is known by `key`."""
    place = os.environ.get(CACHE_VARIABLE) or user_cache_path("poolshare")
    return Path(place, kind, f"{hashlib.sha256(Names.of(key).text).hexdigest()[:32]}.npz")


def is_settled(times: Any) -> Any:
    """Whether files whose last changes were at `times`, in nanoseconds, can be known again by them."""
    return times < time.time_ns() - _FRESH


def _rows(earlier: np.ndarray, names: Names) -> np.ndarray | slice:
    """Where names stand in a column of a file, -1 for new ones; all of it where they are the same, as they mostly are."""
    if hashlib.sha256(earlier.data).digest() == hashlib.sha256(names.text).digest():  # a copy to compare would be large
        return slice(None)
    place = {name: row for row, name in enumerate(earlier.tobytes().split(b"\0"))}
    return np.array([place.get(name, -1) for name in names.text.split(b"\0")], dtype=np.int64)


def recall(source: Source) -> None:
    """Put what is known of its files' contents into `digests`, where nothing stands yet.

    What was kept of a file holds while its size and the time of its last change are the same. The change is one of any
    kind (ctime), whose time no program can set back.
    """
    for path, names, sizes, times, digests in _stores(source):
        with suppress(*_UNREADABLE), np.load(path, allow_pickle=False) as kept:
            # a column is read where it is named
            rows = _rows(kept["names"], names)
            same = (kept["sizes"][rows] == sizes) & (kept["times"][rows] == times)
            if not isinstance(rows, slice):
                same &= rows >= 0
            digests[:] = np.where(same & (digests == 0), kept["digests"][rows], digests)


def keep(source: Source) -> None:
    """Remember `digests`, in place of what was; a cache that cannot be written is no error."""
    for path, names, sizes, times, digests in _stores(source):
        known = np.where(is_settled(times), digests, 0).astype(np.uint64)
        save(path, names=names.column, sizes=sizes, times=times, digests=known)


def _stores(source: Source) -> Iterator[tuple[Path, Names, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each store: where it is remembered, and of its files the names, and views of sizes, times of change and digests."""
    read, columns = source.read, (source.sizes, source.times, source.digests)
    assert isinstance(read, Images)
    assert isinstance(read.items, Files)
    how = *map(str, read.how), os.environ.get(PIXELS_VARIABLE, "")
    start = 0
    for part in read.items.parts:
        stop = start + len(part.names)
        sizes, times, digests = (column[start:stop] for column in columns if column is not None)
        yield cached("images", part.key, *how), Names.of(part.names), sizes, times, digests
        start = stop
