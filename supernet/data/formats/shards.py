"""WebDataset shards, tar files of samples: read in any order, by a table of what each holds that is made once and kept.

A sample is what lies together under one key, as WebDataset has it: bird/7.jpg and bird/7.cls, which holds the class index,
or bird/7.json, which has it as "label".
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from poolshare.space.errors import DataError

from ..listing import Names, natural_key, some
from ..pictures import Files, Images
from ..seen import cached, is_settled, load, save
from ..sources import Found, Place, Source, known, scored_on, whole
from .folders import TEST_FOLDERS, TRAIN_FOLDERS, VALIDATION_FOLDERS

INFO = ("_info.json", "info.json")  # where timm looks for which shard belongs to what
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_PARTS = {"train": TRAIN_FOLDERS, "test": TEST_FOLDERS, "validation": VALIDATION_FOLDERS}
_IMAGES = ("jpg", "png", "webp", "jpeg", "bmp", "tif", "tiff")  # the first of a sample's; timm's three, then others
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # WebDataset's rule: key, and what comes after its first dot
_META = re.compile(r"__[^/]*__($|/)")  # what WebDataset passes over


@dataclass(frozen=True, eq=False)
class Shard:
    """The images in one tar file, in its order.

    names: of the files in it. offsets: where in the shard each begins, (N,) int64. sizes: their bytes, (N,) int64. labels:
    class indices, (N,) int64. time: of the shard's last change, in nanoseconds.
    """

    path: str
    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    time: int

    @property
    def key(self) -> str:
        return os.path.realpath(self.path)

    def place(self, index: int) -> str:
        return os.path.join(self.path, self.names[index])

    def content(self, index: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(int(self.offsets[index]))
            return file.read(int(self.sizes[index]))


class Part(NamedTuple):
    """The shards of a part of the data, and the field of each sample's JSON that holds its label; None: as is usual."""

    shards: Sequence[Path]
    field: str | None = None


def open_shards(place: Place) -> Found:
    """The samples of a folder of shards on this machine, no image decoded; which are which, `find_parts` says.

    Classes are called by their indices. Raises DataError for what cannot be used.
    """
    parts, notes = find_parts(place.path)
    if "train" not in parts:
        raise DataError(f"no training shards in {str(place.path)!r}: there are those of {', '.join(parts)} alone")
    train, passed_over = _source(place, parts["train"])
    classes = tuple(map(str, range(int(train.labels.max(initial=-1)) + 1)))
    notes += passed_over
    tests = [parts[name] for name in ("test", "validation") if name in parts]
    open_test = (lambda: known(whole(_source(place, tests[0])[0]), classes, place)) if tests else None
    if "test" in parts and "validation" in parts:
        search, passed_over = _source(place, parts["validation"])
        notes += (*passed_over, f"{place.name}: architectures are scored on its {len(search)} validation images.")
        return scored_on(classes, train, known(whole(search), classes, place).source, open_test, notes)
    if tests and "test" not in parts:
        notes += (f"the validation shards in {str(place.path)!r} hold the test images: there are none of test.",)
    return Found(classes, whole(train), open_test, None, notes)


def read_tests(place: Place, classes: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """The images in a folder of shards that are there to test on, and notes: those of test, else validation, else all."""
    parts, notes = find_parts(place.path)
    source, passed_over = _source(place, next(parts[name] for name in ("test", "validation", "train") if name in parts))
    return known(whole(source), classes, place).source, notes + passed_over


def find_parts(root: Path) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Which shards in a folder are train, validation and test, and notes; each part has some.

    timm's _info.json says so, or else the words in the shards' names and in those of the folders that they lie in, the last
    one first; where none is called train, those without such a word are.
    """
    if not root.is_dir():
        raise DataError(
            f"no folder of shards at {str(root)!r}: wds/ takes a folder of this machine that holds tar files"
        )
    info = next((root / name for name in INFO if (root / name).is_file()), None)
    if info is not None:
        return _listed(info), ()
    found: dict[str, list[Path]] = {}
    for path in sorted(_tar_files(root), key=lambda path: natural_key(str(path.relative_to(root)))):
        found.setdefault(_part_of(str(path.relative_to(root))), []).append(path)
    if not found:
        packed = [path.name for path in root.iterdir() if path.name.endswith(COMPRESSED)]
        remedy = "unpack them to .tar, whose samples can be reached" if packed else "shards end in .tar"
        raise DataError(
            f"no shards in {str(root)!r}{f' but compressed ones ({some(packed, 3)})' * bool(packed)}: {remedy}"
        )
    unnamed = found.pop("", [])
    notes: tuple[str, ...] = ()
    if unnamed and "train" not in found:
        found["train"] = unnamed
    elif unnamed:
        notes = (
            f"{len(unnamed)} shard(s) in {str(root)!r} are not read ({some([path.name for path in unnamed], 3)}).",
        )
    return {name: Part(shards) for name, shards in found.items()}, notes


def _tar_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if name[0] != "."]
        yield from (Path(folder, name) for name in names if name.endswith(".tar") and name[0] != ".")


def _part_of(name: str) -> str:
    """The part that a shard's path speaks of; "" where it speaks of none."""
    words = reversed(re.findall("[a-z]+", name.lower()))
    return next((part for word in words for part, known in _PARTS.items() if word in known), "")


def _listed(info: Path) -> dict[str, Part]:
    """What timm's file says."""
    parts: dict[str, Part] = {}
    try:
        for name, split in json.loads(info.read_text(encoding="utf-8"))["splits"].items():
            shards = [info.parent / shard for shard in split["filenames"]]
            missing = [shard.name for shard in shards if not shard.is_file()]
            part = _part_of(name)
            if part and missing:
                raise DataError(
                    f"{info} names shards that are not there ({some(missing, 3)}): restore them, or mend it"
                )
            if part and shards:
                parts[part] = Part(shards, split.get("alt_label") or None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{info} does not list shards as timm has it ({error!r}): mend it, or remove it and name shards train-…, test-…"
        ) from None
    if not parts:
        raise DataError(f"{info} names no shards of train, validation or test: mend it")
    return parts


def _source(place: Place, part: Part) -> tuple[Source, tuple[str, ...]]:
    """The images of shards, one shard after the other, and notes."""
    found = [read_shard(path, part.field) for path in part.shards]
    shards, without = [shard for shard, _ in found], sum(number for _, number in found)
    names = Names.joined(one.names.beginning(f"{os.path.relpath(one.path, place.path)}/") for one in shards)
    if not names:
        raise DataError(f"no images ({' '.join(_IMAGES)}) in {some([str(path) for path in part.shards], 3)}: add some")
    notes = (f"{without} sample(s) in the shards of {str(place.path)!r} have no image and are passed over.",) * bool(
        without
    )
    labels, sizes = (
        np.concatenate(columns) for columns in zip(*((one.labels, one.sizes) for one in shards), strict=True)
    )
    times = np.repeat(np.array([shard.time for shard in shards]), [len(shard.names) for shard in shards])
    read = Images(Files(*shards), place.name, place.scale_16bit)
    return Source(read, labels, names, sizes, np.zeros(len(names), dtype=np.uint64), times), notes


def read_shard(path: Path, field: str | None = None) -> tuple[Shard, int]:
    """The images of a shard, and how many samples in it have none; the table is read again only where the shard has changed.

    field: of each sample's JSON that holds the label; None: its .cls does, or "label" of the JSON.
    Raises DataError for a file that is no tar file, and for a sample without a class.
    """
    try:
        status = path.stat()
        file, stamp = cached("shards", os.path.realpath(path), field or ""), [status.st_size, status.st_ctime_ns]
        kept = load(file)
        if not kept or kept["stamp"].tolist() != stamp:
            kept = _table(path, field) | {"stamp": np.array(stamp)}
            if is_settled(status.st_ctime_ns):
                save(file, **kept)
    except (OSError, tarfile.TarError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(
            f"shard {str(path)!r} cannot be read ({reason}): shards are whole tar files, not compressed"
        ) from None
    names, offsets, sizes, labels = (kept[name] for name in ("names", "offsets", "sizes", "labels"))
    shard = Shard(str(path), Names(names.tobytes()), offsets, sizes, labels, status.st_ctime_ns)
    return shard, int(kept["without"])


def _table(path: Path, field: str | None) -> dict[str, np.ndarray]:
    """What is kept of a shard, see `Shard`; and `without`, how many samples have no image."""
    rows: list[tuple[str, int, int, int]] = []
    without = 0
    with tarfile.open(path, "r:") as tar:
        for key, pairs in groupby(_members(tar), key=lambda member: member[0]):
            sample = {ending: member for _, ending, member in pairs}
            image = next((sample[ending] for ending in _IMAGES if ending in sample), None)
            if image is None:
                without += 1
                continue
            try:
                label = _label(tar, sample, field)
            except (KeyError, TypeError, ValueError):
                wanted = f"{key}.json with {field!r}" if field else f"{key}.cls, or {key}.json with 'label'"
                raise DataError(
                    f"shard {str(path)!r}, sample {key!r} has no class: put a class index, 0, 1, 2 …, into {wanted}"
                ) from None
            rows.append((image.name, image.offset_data, image.size, label))
    columns = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 3).T
    kept = dict(zip(("offsets", "sizes", "labels"), np.ascontiguousarray(columns), strict=True))
    return kept | {"names": Names.of(name for name, *_ in rows).column, "without": np.array(without)}


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, ending and place of every file that WebDataset reads."""
    for member in tar:
        if member.isreg() and not _META.match(member.name) and (found := _MEMBER.fullmatch(member.name)):
            yield found[1], found[2].lower(), member


def _label(tar: tarfile.TarFile, sample: Mapping[str, tarfile.TarInfo], field: str | None) -> int:
    """Raises KeyError, TypeError or ValueError where there is none."""
    own = field is None and "cls" in sample
    file = tar.extractfile(sample["cls" if own else "json"])
    assert file is not None  # a regular file
    text = file.read()
    label = int(text) if own else int(str(json.loads(text)[field or "label"]))
    if label < 0:
        raise ValueError(label)
    return label
