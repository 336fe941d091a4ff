"""Where images come from: the digits, folders of class folders, or timm's names; what they hold, not decoded yet."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset

from poolshare.space.data_kind import DataKind
from poolshare.space.errors import DataError

from .listing import ENDINGS, class_name, list_folder, readable, some, subfolders
from .pictures import Images, digest

DIGITS_TEST = 540  # of 1,797 images
TRAIN_FOLDERS = ("train", "training")  # in any case of letters, as the two below
TEST_FOLDERS = ("test", "testing")
VALIDATION_FOLDERS = ("val", "valid", "validation")

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Source:
    """Images that are read one at a time, and `labels`, their class indices: (N,) int64.

    names: of the files, "cat/1.jpg", where they lie in folders. sizes: their bytes, (N,) int64. digests: hashes of the
    contents, (N,) uint64, each 0 until it is known. None: there is no such thing here.
    """

    read: Callable[[int], Any]
    labels: np.ndarray
    names: Sequence[str] | None = None
    sizes: np.ndarray | None = None
    digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of `source` at `indices`, (n,) int64 in ascending order."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """Class indices, (n,) int64."""
        return self.source.labels[self.indices]

    def cut(
        self, fraction: float, classes: Sequence[str], generator: np.random.Generator, where: str
    ) -> tuple["Split", "Split"]:
        """A `stratified` share of the images, and the rest."""
        chosen, rest = stratified(self.labels, classes, round(fraction * len(self)), generator, where)
        return Split(self.source, self.indices[chosen]), Split(self.source, self.indices[rest])


def stratified(
    labels: np.ndarray, classes: Sequence[str], count: int, generator: np.random.Generator, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of about `count` labels, drawn class by class in proportion, and of the rest; both ascending.

    Shares are rounded by largest remainder to `count` in all, but no class is taken whole or left out.
    Raises DataError, which says `where`, for classes of fewer than two images.
    """
    sizes = np.bincount(labels, minlength=len(classes))
    rare = [f"{classes[index]!r} ({sizes[index]})" for index in np.flatnonzero(sizes < 2).tolist()]
    if rare:
        raise DataError(
            f"{where}: too few images of class {some(rare)}, where each side of the split needs one: "
            "add images, or remove the class"
        )
    taken, remainder = np.divmod(sizes * count, len(labels))
    taken[np.argsort(-remainder, kind="stable")[: count - taken.sum()]] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for index, number in enumerate(taken.clip(1, sizes - 1)):
        chosen[generator.permutation(np.flatnonzero(labels == index))[:number]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def whole(source: Source) -> Split:
    """All images of a source."""
    return Split(source, np.arange(len(source)))


@dataclass(frozen=True, eq=False)
class Found:
    """A data set as it was found; without `open_test` it has no test images of its own.

    search: images that are there to score on, in the same source as `train`; None: they are to be cut from `train`.
    """

    classes: tuple[str, ...]
    train: Split
    open_test: Callable[[], Split] | None
    search: Split | None = None
    notes: tuple[str, ...] = ()


def open_source(
    name: str,
    *,
    data_dir: StrPath | None = None,
    download: bool = False,
    image_key: str = "image",
    label_key: str = "label",
    search_data: StrPath | None = None,
    scale_16bit: bool = False,
) -> Found:
    """Find the data set `name`, decoding nothing; the arguments and the errors are those of `open_data`."""
    kind = DataKind.of(name)
    if search_data is not None and kind is not DataKind.FOLDER:
        raise DataError(
            f"--search-data {str(search_data)!r} goes with a folder of images, and the data are {name}: leave it out"
        )
    if kind is DataKind.DIGITS:
        found = _open_digits()
    elif kind.by_timm:
        found = _open_timm(name, data_dir, download, image_key, label_key, scale_16bit)
    elif kind is DataKind.GIVEN:
        raise DataError(
            f"{name}: these data were given in Python: go on with what `poolshare.search.search` returned, or give them to "
            "`poolshare.search.work`; of exported models --data FOLDER"
        )
    else:
        extra = None if search_data is None else Path(search_data).expanduser()
        found = _open_folder(folder_path(name, data_dir), extra, scale_16bit)
    if len(found.classes) < 2:
        raise DataError(f"{name} has fewer than 2 classes ({some(found.classes)}): there is nothing to learn")
    return found


def folder_path(name: str, data_dir: StrPath | None) -> Path:
    """Where a folder of images lies that is called `name`."""
    return Path(data_dir or "", name).expanduser()


def _open_digits() -> Found:
    from sklearn.datasets import load_digits  # slow to import, and only the digits need it

    images, labels = load_digits(return_X_y=True)
    classes = tuple(str(digit) for digit in range(10))
    test, train = stratified(labels, classes, DIGITS_TEST, np.random.default_rng(0), "digits")

    def part(chosen: np.ndarray) -> Split:
        pixels = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 8, 8)
        return whole(Source(pixels.__getitem__, labels[chosen].astype(np.int64), digests=_digests(images[chosen])))

    return Found(classes, part(train), lambda: part(test))


def _open_timm(
    name: str, data_dir: StrPath | None, download: bool, image_key: str, label_key: str, scale_16bit: bool
) -> Found:
    hub = DataKind.of(name) is DataKind.HUB
    if name in ("torch/folder", "torch/image_folder"):
        raise DataError(f"{name} is a folder of images: give the path of the folder itself instead")
    if data_dir is None and not hub:
        raise DataError(f"{name}: no folder to find it in: give --data-dir, and --download to fetch it to there")
    root = None if data_dir is None else str(Path(data_dir).expanduser())
    columns = {"input_key": image_key, "target_key": label_key} if hub else {}

    def open_part(part: str) -> tuple[Any, Sequence[Any]]:
        try:
            dataset = create_dataset(name, root=root, split=part, download=download, **columns)
            if hub:  # timm's data set would put a neighbour in the place of a broken image, its reader does not
                dataset.reader[0]  # an image column that is missing shows only here
                return dataset.reader, list(dataset.reader.dataset[label_key])
            labels = getattr(dataset, "targets", None)
            if labels is None or np.ndim(labels[0]) != np.ndim(dataset[0][1]):  # QMNIST's are 8 to an image
                labels = [dataset[index][1] for index in range(len(dataset))]
            return dataset, labels
        except AssertionError as error:
            raise DataError(f"timm does not know {name} ({error}): torch/cifar10 is one that it does") from error
        except Exception as error:  # whatever a download, an archive or a library that is missing raises
            raise DataError(
                f"{name}, {part} images, could not be opened in {root or 'the default cache'} ({error}): give the "
                "folder that holds it as --data-dir or have it fetched with --download; hfds/ needs `datasets`"
            ) from error

    def split(items: Any, labels: Sequence[Any], num_classes: int | None) -> Split:
        return whole(
            Source(
                Images(items, name, scale_16bit),
                _class_indices(labels, num_classes, name),
                digests=_digests(getattr(items, "data", None), len(labels)),
            )
        )

    items, labels = open_part("train")
    names: Any = items.class_to_idx if hub else getattr(items, "classes", None) or getattr(items, "all_categories", ())
    train = split(items, labels, len(names) or None)
    names = names or range(int(train.labels.max()) + 1)
    classes = tuple(", ".join(one) if isinstance(one, tuple) else str(one) for one in names)
    # "validation" is timm's word for the test images of torchvision's sets
    known = (items.dataset.info.splits or ()) if hub else ("validation",)
    parts = [one for one in TEST_FOLDERS + VALIDATION_FOLDERS if one in known]
    open_test = (lambda: split(*open_part(parts[0]), len(classes))) if parts else None
    if len(parts) == 1 or parts[:1] != ["test"]:
        return Found(classes, train, open_test)
    search = split(*open_part(parts[1]), len(classes))
    both = _joined(train.source, search.source)
    count = len(train)
    note = f"{name}: architectures are scored on its {len(search)} {parts[1]} images."
    return Found(classes, Split(both, np.arange(count)), open_test, Split(both, np.arange(count, len(both))), (note,))


def _digests(rows: Any, count: int | None = None) -> np.ndarray | None:
    """Hashes of images that are all in memory, (N,) uint64; None where they are not."""
    if not isinstance(rows, (np.ndarray, torch.Tensor)) or len(rows) != (count or len(rows)):
        return None
    return np.array([digest(np.ascontiguousarray(row).tobytes()) for row in np.asarray(rows)], dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class _Joined:
    """Reads from two sources, the second one after the first."""

    first: Source
    second: Source

    def __call__(self, index: int) -> Any:
        count = len(self.first)
        return self.first.read(index) if index < count else self.second.read(index - count)


def _joined(first: Source, second: Source) -> Source:
    """The images of both, of which neither has been looked at yet."""
    return Source(_Joined(first, second), np.concatenate([first.labels, second.labels]))


def _class_indices(labels: Sequence[Any], num_classes: int | None, name: str) -> np.ndarray:
    if any(np.ndim(label) for label in labels):
        raise DataError(f"{name} is multi-label (its labels are lists): take data with one class for each image")
    indices = np.asarray(labels)
    if indices.dtype.kind not in "iu":
        raise DataError(f"{name} has labels such as {labels[0]!r}: they must be class indices, 0, 1, 2 …")
    foreign = indices[(indices < 0) | (indices >= (num_classes or np.inf))]
    if len(foreign):
        raise DataError(f"{name} has images labelled {foreign[0]}, which is no class: take data that are labelled")
    return indices.astype(np.int64)


# Folders


@dataclass(frozen=True)
class Layout:
    """The parts of a folder of images. test, search: None where there is none."""

    train: Path
    test: Path | None
    search: Path | None
    notes: tuple[str, ...]

    @property
    def flat(self) -> bool:
        """Whether there is one folder of class folders, and nothing beside it."""
        return self.test is None and self.search is None


def _named(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Those of a name, in the order of the names, that hold class folders."""
    return [one for name in names for one in folders if one.name.lower() == name and subfolders(one)]


def find_layout(root: Path, search_data: Path | None = None) -> Layout:
    """Which folder is which, by name; every one that is not read is named. Raises DataError where there is no folder."""
    for folder in (root, search_data):
        if folder is not None and not folder.is_dir():
            raise DataError(
                f"no data at {str(folder)!r}: give digits, a folder of images, or timm's torch/… or hfds/…"
                if folder is root
                else f"--search-data {str(folder)!r} is not there: give a folder of class folders"
            )
    folders, notes = subfolders(root), list[str]()

    train = next(iter(_named(folders, TRAIN_FOLDERS)), None)
    if train is None:
        return Layout(root, None, search_data, ())
    given = [one for one in folders if search_data is not None and one.samefile(search_data)]
    tests, validations = (
        [one for one in _named(folders, names) if one not in given] for names in (TEST_FOLDERS, VALIDATION_FOLDERS)
    )
    candidates = tests + validations
    test = candidates[0] if candidates else None
    search = search_data or next((one for one in validations if tests), None)
    if test is not None and not tests:
        notes.append(f"{str(test)!r} holds the test images: there is no test folder beside it.")
    for one in folders:
        if one.name.lower() in TEST_FOLDERS and not subfolders(one):
            notes.append(f"{str(one)!r} is not used: it has no class folders, so its images have no labels.")
        elif one not in (train, test, search, *given):
            notes.append(f"{str(one)!r} is not read.")
    return Layout(train, test, search, tuple(notes))


def held_out(root: Path) -> list[Path]:
    """Folders of test and validation images, where `root` has no others; test comes first."""
    folders = subfolders(root)
    found = _named(folders, TEST_FOLDERS + VALIDATION_FOLDERS)
    return found if len(found) == len(folders) else []


def _open_folder(root: Path, search_data: Path | None, scale_16bit: bool) -> Found:
    layout = find_layout(root, search_data)
    if layout.train == root and (alone := held_out(root)):
        raise DataError(
            f"{str(root)!r} holds {some([one.name for one in alone])} and no folder to train on: put train/CLASS/ beside "
            "it; `poolshare evaluate` takes it as it is"
        )
    classes, parts, notes = read_folder(layout.train, None, scale_16bit)
    notes = layout.notes + notes
    test = layout.test
    open_test = None if test is None else lambda: whole(read_folder(test, classes, scale_16bit)[1])
    if test is not None:
        notes += class_notes(test, classes)
    if layout.search is None:
        return Found(classes, whole(parts), open_test, None, notes)
    _, extra, more = read_folder(layout.search, classes, scale_16bit)
    both, count = _both(parts, extra, layout.search.name), len(parts)
    notes += class_notes(layout.search, classes) + more
    notes += (
        f"architectures are scored on the {len(extra)} images of {str(layout.search)!r}, and trained on all "
        f"{count} of {str(layout.train)!r}.",
    )
    train, search = Split(both, np.arange(count)), Split(both, np.arange(count, len(both)))
    return Found(classes, train, open_test, search, notes)


def _both(first: Source, second: Source, prefix: str) -> Source:
    """The images of two folders as those of one; `prefix` comes before the second one's names."""
    reads: list[Any] = [first.read, second.read]
    columns: list[Any] = [
        [one.labels for one in (first, second)],
        [one.sizes for one in (first, second)],
        [one.digests for one in (first, second)],
    ]
    labels, sizes, digests = map(np.concatenate, columns)
    names = [*(first.names or ()), *(f"{prefix}/{name}" for name in second.names or ())]
    return Source(replace(reads[0], items=reads[0].items + reads[1].items), labels, names, sizes, digests)


def list_classes(root: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Names and folders of the classes in `root`, in the order of their indices, which is timm's."""
    folders = tuple(subfolders(root))
    names = tuple(class_name(folder.name) for folder in folders)
    if len({*names}) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(f"two class folders in {str(root)!r} have the same name, {twice!r}: rename one")
    return names, folders


def class_notes(root: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Notes on the class folders of test or search-validation images, where they are not those of training."""
    here = list_classes(root)[0]
    if {*here} - {*classes}:
        return (f"{_foreign(root, classes)}.",)
    missing = [repr(name) for name in classes if name not in here]
    return (f"{str(root)!r} has no images of {some(missing)}.",) * bool(missing)


def _foreign(root: Path, classes: Sequence[str]) -> str:
    here = list_classes(root)[0]
    missing, foreign = (sorted({*a} - {*b}) for a, b in ((classes, here), (here, classes)))
    return (
        f"{str(root)!r} has other classes than those trained on (missing: {some(missing) or 'none'}; "
        f"only there: {some(foreign) or 'none'}): rename or remove folders"
    )


def read_folder(
    root: Path, known: Sequence[str] | None, scale_16bit: bool
) -> tuple[tuple[str, ...], Source, tuple[str, ...]]:
    """Class names, images, and notes on what was passed over.

    known: class names whose indices hold; some of them may be missing here. None: those found here, each with images.
    """
    names, folders = list_classes(root)
    if not folders:
        raise DataError(f"no class folders in {str(root)!r}: images go into ROOT/CLASS/, a folder for each class")
    if known is not None and not {*names} <= {*known}:
        raise DataError(_foreign(root, known))
    listing = list_folder(root, depth=1)
    if listing.deeper:
        nested = os.path.join(root, listing.deeper[0])
        raise DataError(f"{nested!r} lies in a class folder: put images directly into ROOT/CLASS/")
    label_of = {folder.name: (known or names).index(name) for folder, name in zip(folders, names, strict=True)}
    homes = [os.path.dirname(path) for path in listing.paths]
    empty = [folder for folder in folders if folder.name not in {*homes}]
    if empty and known is None:
        raise DataError(f"no image ({' '.join(ENDINGS)}) in class folder {str(empty[0])!r}: add some, or remove it")
    inside = np.flatnonzero([home != "" for home in homes])
    notes = listing.notes
    if loose := len(homes) - len(inside):
        first = next(path for path, home in zip(listing.paths, homes, strict=True) if not home)
        notes += (f"{loose} image(s) in {str(root)!r} lie in no class folder ({readable(first)}) and are not read.",)
    if not len(inside):
        raise DataError(f"no image ({' '.join(ENDINGS)}) in the class folders of {str(root)!r}: add some")
    items = [(os.path.join(root, listing.paths[index]), label_of[homes[index]]) for index in inside]
    source = Source(
        Images(items, str(root), scale_16bit),
        np.array([label for _, label in items], dtype=np.int64),
        [listing.paths[index] for index in inside],
        listing.sizes[inside],
        np.zeros(len(items), dtype=np.uint64),
    )
    return names if known is None else tuple(known), source, notes
