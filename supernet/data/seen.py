"""What was seen of image files, kept in the user's cache: no file is decoded twice as a check."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
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


class Seen:
    """Digests of the files of one store that could be decoded; each holds while size and time of change are the same.

    The time is that of the file's last change of any kind (ctime), which no program can set back.
    """

    def __init__(self, key: str, read: Images) -> None:
        self.path = cached("images", key, *map(str, read.how), os.environ.get(PIXELS_VARIABLE, ""))

    def recall(self, names: Sequence[str], sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Digests of files by name, bytes and nanoseconds of change, (N,) uint64; 0 where nothing is known."""
        with suppress(*_UNREADABLE), np.load(self.path, allow_pickle=False) as kept:
            # a column is read where it is named
            rows = _rows(kept["names"], Names.of(names))
            same = (kept["sizes"][rows] == sizes) & (kept["times"][rows] == times)
            if not isinstance(rows, slice):
                same &= rows >= 0
            return np.where(same, kept["digests"][rows], np.uint64(0))
        return np.zeros(len(names), dtype=np.uint64)

    def keep(self, names: Sequence[str], sizes: np.ndarray, times: np.ndarray, digests: np.ndarray) -> None:
        """Remember what is known of the files now, in place of what was; a cache that cannot be written is no error."""
        known = np.where(is_settled(times), digests, 0).astype(np.uint64)
        save(self.path, names=Names.of(names).column, sizes=sizes, times=times, digests=known)


def _rows(earlier: np.ndarray, names: Names) -> np.ndarray | slice:
    """Where names stand in a column of a file, -1 for new ones; all of it where they are the same, as they mostly are."""
    if hashlib.sha256(earlier.data).digest() == hashlib.sha256(names.text).digest():  # a copy to compare would be large
        return slice(None)
    place = {name: row for row, name in enumerate(earlier.tobytes().split(b"\0"))}
    return np.array([place.get(name, -1) for name in names.text.split(b"\0")], dtype=np.int64)


def recall(source: Source) -> None:
    """Put what is known of its files' contents into `digests`, where nothing stands yet."""
    assert source.digests is not None
    for seen, rows, columns in _parts(source):
        known = source.digests[rows]
        source.digests[rows] = np.where(known == 0, seen.recall(*columns), known)


def keep(source: Source) -> None:
    """Remember `digests` for the next time."""
    assert source.digests is not None
    for seen, rows, columns in _parts(source):
        seen.keep(*columns, source.digests[rows])


def _parts(source: Source) -> Iterator[tuple[Seen, slice, tuple[Sequence[str], np.ndarray, np.ndarray]]]:
    """What was seen of each store of a source, the rows of its files, and their names, sizes and times of change."""
    read = source.read
    assert isinstance(read, Images)
    assert isinstance(read.items, Files)
    assert source.sizes is not None
    assert source.times is not None
    start = 0
    for part in read.items.parts:
        rows = slice(start, start + len(part.names))
        yield Seen(part.key, read), rows, (part.names, source.sizes[rows], source.times[rows])
        start = rows.stop
