"""Whether training images are those a run was begun with, and if not, which ones differ, by name."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from poolshare.space.files import write_whole

FileList = Callable[[], Iterable[tuple[str, str]]]  # names of files, and a word for the contents of each
_FINGERPRINT = re.compile(r"(\d+) images, (\w+)(?:, sizes (\w+))?(?:, contents (\w+))?")
_NAMED = 3  # files of each kind


def difference(now: str, then: str, mended: bool = False) -> str:
    """What differs between two fingerprints, in words; empty where nothing does that both of them know.

    mended: where not all was decoded then, what was broken may have been mended since, so sizes may differ.
    """
    here, there = _FINGERPRINT.fullmatch(now), _FINGERPRINT.fullmatch(then)
    if here is None or there is None:
        return "" if now == then else f"{now} now, {then} then"
    if here[1] != there[1]:
        return f"{int(here[1]):,} now, {int(there[1]):,} then"
    if here[2] != there[2]:
        return "other classes or labels"
    for number, word in ((3, "sizes of files"), (4, "contents")):
        if here[number] and there[number] and here[number] != there[number] and (there[4] or not mended):
            return f"other {word}"
    return ""


def write_images(path: Path, files: Iterable[tuple[str, str]]) -> None:
    """Write a table of file names and, for each, a word for its contents; none where there are no files."""
    rows = iter(files)
    first = next(rows, None)
    if first is None:
        return

    def write(temporary: Path) -> None:
        # names are bytes to the file system: those that are not UTF-8 come back as they were
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows(chain([("image", "contents"), first], rows))

    write_whole(path, write)


def changed_files(path: Path, now: Mapping[str, str]) -> str:
    """Which files differ from those that `write_images` wrote, in words; empty where none do, or none are known."""
    then: dict[str, str] = {}
    with (
        suppress(OSError, ValueError, csv.Error),  # names help, but the fingerprint decides
        open(path, encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        then = dict(csv.reader(file))
        then.pop("image", None)
    if not then or not now:
        return ""
    kinds = {
        "changed": [name for name, contents in now.items() if then.get(name, contents) != contents],
        "new": [name for name in now if name not in then],
        "missing": [name for name in then if name not in now],
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds.items() if names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
