"""Where images come from: the digits, folders of class folders, or timm's names; checked when opened."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils import natural_key

from poolshare.space.errors import BrokenDataError, DataError

DIGITS_TEST = 540  # of 1,797 images
TRAIN_FOLDERS = ("train", "training")
GIVEN = "python/"  # begins the name of data that were given in Python
TEST_FOLDERS = ("test", "val", "valid", "validation")

StrPath = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True, eq=False)
class Source:
    """Images that are read one at a time, and `labels`, their class indices: (N,) int64."""

    read: Callable[[int], Any]
    labels: np.ndarray


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
            f"{where}: too few images of class {_some(rare)}, where each side of the split needs one: "
            "add images, or remove the class"
        )
    taken, remainder = np.divmod(sizes * count, len(labels))
    taken[np.argsort(-remainder, kind="stable")[: count - taken.sum()]] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for index, number in enumerate(taken.clip(1, sizes - 1)):
        chosen[generator.permutation(np.flatnonzero(labels == index))[:number]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _whole(read: Callable[[int], Any], labels: np.ndarray) -> Split:
    return Split(Source(read, labels), np.arange(len(labels)))


@dataclass(frozen=True, eq=False)
class Found:
    """A data set as it was found; without `open_test` it has no test images of its own."""

    classes: tuple[str, ...]
    train: Split
    open_test: Callable[[], Split] | None
    notes: tuple[str, ...] = ()


def open_source(
    name: str,
    *,
    data_dir: StrPath | None = None,
    download: bool = False,
    image_key: str = "image",
    label_key: str = "label",
    progress: Progress | None = None,
) -> Found:
    """Find the data set `name`; the arguments and the errors are those of `open_data`."""
    if name == "digits":
        found = _open_digits()
    elif name.startswith(("torch/", "hfds/")):
        found = _open_timm(name, data_dir, download, image_key, label_key)
    elif name.startswith(GIVEN):
        raise DataError(
            f"{name}: these data were given in Python: go on with what `poolshare.search.search` returned, or give them to "
            "`poolshare.search.work`; of exported models --data FOLDER"
        )
    else:
        found = _open_folder(Path(data_dir or "", name).expanduser(), progress)
    if len(found.classes) < 2:
        raise DataError(f"{name} has fewer than 2 classes ({_some(found.classes)}): there is nothing to learn")
    return found


def _some(items: Sequence[str], most: int = 10) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _open_digits() -> Found:
    from sklearn.datasets import load_digits  # slow to import, and only the digits need it

    images, labels = load_digits(return_X_y=True)
    classes = tuple(str(digit) for digit in range(10))
    test, train = stratified(labels, classes, DIGITS_TEST, np.random.default_rng(0), "digits")

    def part(chosen: np.ndarray) -> Split:
        pixels = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 8, 8)
        return _whole(pixels.__getitem__, labels[chosen].astype(np.int64))

    return Found(classes, part(train), lambda: part(test))


def _open_timm(name: str, data_dir: StrPath | None, download: bool, image_key: str, label_key: str) -> Found:
    hub = name.startswith("hfds/")
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
        return _whole(Images(items, name), _class_indices(labels, num_classes, name))

    items, labels = open_part("train")
    names: Any = items.class_to_idx if hub else getattr(items, "classes", None) or getattr(items, "all_categories", ())
    train = split(items, labels, len(names) or None)
    names = names or range(int(train.labels.max()) + 1)
    classes = tuple(", ".join(one) if isinstance(one, tuple) else str(one) for one in names)
    # "validation" is timm's word for the test images of torchvision's sets
    known = (items.dataset.info.splits or ()) if hub else ("validation",)
    part = next((one for one in TEST_FOLDERS if one in known), None)
    open_test = None if part is None else lambda: split(*open_part(part), len(classes))
    return Found(classes, train, open_test)


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


@dataclass(frozen=True, eq=False)
class Images:
    """Reads the images of `items`, by index (a path, an open file or an image, …)."""

    items: Any
    name: str

    def __call__(self, index: int) -> Image.Image:
        item = None
        try:
            item = self.items[index][0]
            with item if isinstance(item, Image.Image) else Image.open(item) as image:
                image.load()
        except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error …
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        else:
            if not image.mode.startswith(("I", "F")):
                return image
            reason = f"mode {image.mode}, whose values would be clipped: save with 8 bits per channel"
        where = repr(item) if isinstance(item, str) else f"{self.name}, image {index}"
        raise BrokenDataError(f"cannot read {where} ({reason})")


def _open_folder(root: Path, progress: Progress | None) -> Found:
    if not root.is_dir():
        raise DataError(f"no data at {str(root)!r}: give digits, a folder of images, or timm's torch/… or hfds/…")
    top = next((root / one for one in TRAIN_FOLDERS if _subfolders(root / one)), root)
    others = [root / one for one in TEST_FOLDERS if top != root and (root / one).is_dir()]
    classes, samples, notes = _list_images(top)
    tests: list[tuple[str, int]] = []
    if others:
        test_classes, tests, test_notes = _list_images(others[0])
        if test_classes != classes:
            missing, foreign = (sorted({*a} - {*b}) for a, b in ((classes, test_classes), (test_classes, classes)))
            raise DataError(
                f"{str(others[0])!r} has other classes than {str(top)!r} (missing: {_some(missing) or 'none'}; "
                f"only there: {_some(foreign) or 'none'}): give both the same class folders"
            )
        notes += test_notes
    notes += tuple(f"{str(one)!r} is not used: test images come from {str(others[0])!r}." for one in others[1:])
    check_images(Images(samples + tests, str(root)), progress)
    train, test = (
        _whole(Images(part, str(root)), np.array([label for _, label in part], dtype=np.int64))
        for part in (samples, tests)
    )
    return Found(classes, train, (lambda: test) if tests else None, notes)


def _subfolders(root: Path) -> list[Path]:
    """The folders in `root` that are not hidden, in timm's order: the class indices are then timm's too."""
    folders = [one for one in root.iterdir() if one.is_dir()] if root.is_dir() else []
    return sorted((one for one in folders if one.name[0] != "."), key=lambda one: natural_key(one.name))


def _list_images(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]], tuple[str, ...]]:
    """Class names, (path, class index) of all images, and notes on what was passed over."""
    folders, samples, passed_over = _subfolders(root), [], list[str]()
    endings = get_img_extensions()
    if not folders:
        raise DataError(f"no class folders in {str(root)!r}: images go into ROOT/CLASS/, a folder for each class")
    for label, folder in enumerate(folders):
        if nested := _subfolders(folder):
            raise DataError(f"{str(nested[0])!r} lies in a class folder: put images directly into ROOT/CLASS/")
        files = [one.path for one in os.scandir(folder) if one.is_file()]
        images = [path for path in files if os.path.splitext(path)[1].lower() in endings]
        if not images:
            raise DataError(f"no image ({' '.join(endings)}) in class folder {str(folder)!r}: add some, or remove it")
        samples += [(path, label) for path in sorted(images, key=natural_key)]
        passed_over += sorted(os.path.relpath(path, root) for path in {*files} - {*images})
    return tuple(folder.name for folder in folders), samples, passed_over_note(root, passed_over)


def passed_over_note(root: Path, files: Sequence[str]) -> tuple[str, ...]:
    """A note on the files of a folder that are no images by their names; none where there are none."""
    endings = " ".join(get_img_extensions())
    note = f"{len(files)} file(s) in {str(root)!r} were passed over ({_some(files, 3)}): images end in {endings}."
    return (note,) * bool(files)


def check_images(read: Images, progress: Progress | None) -> None:
    """Decode every image, in threads, and raise one BrokenDataError for all that cannot be."""

    def fault(index: int) -> str:
        try:
            read(index)
            return ""
        except BrokenDataError as error:
            return str(error).removeprefix("cannot read ")

    total, broken = len(read.items), []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, total, 256):  # in pieces: a queue of a million futures is memory, not speed
            stop = min(start + 256, total)
            broken += [message for message in pool.map(fault, range(start, stop)) if message]
            if progress:
                progress(stop, total)
    if broken:
        raise BrokenDataError(
            f"{len(broken)} of {total} images in {read.name!r} cannot be read: {_some(broken)}; replace or remove them"
        )
