"""What was seen of image files, kept in the user's cache: no file is decoded twice as a check."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from platformdirs import user_cache_path

from poolshare.space.errors import RunError
from poolshare.space.files import write_whole

from .pictures import PIXELS_VARIABLE, Files, Images
from .sources import Source

CACHE_VARIABLE = "POOLSHARE_CACHE"  # a folder; unset: the platform's place for caches
_FRESH = 2 * 10**9  # nanoseconds: a file that young may change again without its time of change telling


class Seen:
    """Digests of the files of one folder that could be decoded; each holds while size and time of change are the same.

    The time is that of the file's last change of any kind (ctime), which no program can set back.
    """

    def __init__(self, root: str, read: Images) -> None:
        how = "\0".join((os.path.realpath(root), *map(str, read.how), os.environ.get(PIXELS_VARIABLE, "")))
        place = os.environ.get(CACHE_VARIABLE) or user_cache_path("poolshare")
        self.path = Path(place, "images", f"{hashlib.sha256(os.fsencode(how)).hexdigest()[:32]}.npz")

    def recall(self, names: Sequence[str], sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Digests of files by name, bytes and nanoseconds of change, (N,) uint64; 0 where nothing is known."""
        digests = np.zeros(len(names), dtype=np.uint64)
        with suppress(OSError, ValueError, KeyError, BadZipFile):  # none, or a damaged one: it is made again
            with np.load(self.path, allow_pickle=False) as kept:
                columns = [kept[name] for name in ("names", "sizes", "times", "digests")]
            blob, *columns = columns
            if blob.tobytes() == _joined(names):
                rows = np.arange(len(names))
            else:
                place = {name: row for row, name in enumerate(blob.tobytes().split(b"\0"))}
                rows = np.array([place.get(os.fsencode(name), -1) for name in names], dtype=np.int64)
            old_sizes, old_times, old_digests = (column[rows] for column in columns)
            same = (rows >= 0) & (old_sizes == sizes) & (old_times == times)
            digests[same] = old_digests[same]
        return digests

    def keep(self, names: Sequence[str], sizes: np.ndarray, times: np.ndarray, digests: np.ndarray) -> None:
        """Remember what is known of the files now, in place of what was; a cache that cannot be written is no error."""
        known = np.where(times < time.time_ns() - _FRESH, digests, 0)
        column = np.frombuffer(_joined(names), dtype=np.uint8)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, names=column, sizes=sizes, times=times, digests=known.astype(np.uint64))

        with suppress(OSError, RunError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, write)


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
    """What was seen of each folder of a source, the rows of its files, and their names, sizes and times of change."""
    read = source.read
    assert isinstance(read, Images)
    assert isinstance(read.items, Files)
    assert source.sizes is not None
    assert source.times is not None
    start = 0
    for root, names in read.items.parts:
        rows = slice(start, start + len(names))
        yield Seen(root, read), rows, (names, source.sizes[rows], source.times[rows])
        start = rows.stop


def _joined(names: Sequence[str]) -> bytes:
    return b"\0".join(map(os.fsencode, names))
