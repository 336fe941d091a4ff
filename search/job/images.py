"""Whether training images are those a run was begun with, and if not, which ones differ, by name."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from poolshare.space.files import write_whole

_FINGERPRINT = re.compile(r"(\d+) images, (\w+)(?:, contents (\w+))?")
_NAMED = 3  # files of each kind


def difference(now: str, then: str) -> str:
    """What differs between two fingerprints, in words; empty where nothing does that both of them know."""
    here, there = _FINGERPRINT.fullmatch(now), _FINGERPRINT.fullmatch(then)
    if here is None or there is None:
        return "" if now == then else f"{now} now, {then} then"
    if here[1] != there[1]:
        return f"{int(here[1]):,} now, {int(there[1]):,} then"
    if here[2] != there[2]:
        return "other classes, labels or sizes of files"
    return "other contents" if here[3] and there[3] and here[3] != there[3] else ""


def write_images(path: Path, files: Mapping[str, str]) -> None:
    """Write a table of file names and, for each, a word for its contents; whole or not at all."""

    def write(temporary: Path) -> None:
        # names are bytes to the file system: those that are not UTF-8 come back as they were
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([("image", "contents"), *files.items()])

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
