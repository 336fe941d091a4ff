"""Data of one job: a named set cut into train, search and test, and loaders that are functions of the seed.

What an image looks like in training depends on (seed, epoch, index) alone, its place in the epoch on
(seed, epoch) alone: neither the number of workers nor a resumed run changes either.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset, create_transform
from timm.data.auto_augment import posterize
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils import natural_key
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from poolshare.space.errors import BrokenDataError, DataError

CACHE_BYTES = 256 * 2**20  # evaluation splits of up to this size, as float32, are kept decoded
DIGITS_TEST = 540  # of 1,797 images
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "val", "valid", "validation")

_SEARCH, _TEST, _ORDER, _AUGMENT = range(4)  # one stream of random numbers for each use of the seed

Draw = tuple[int, ...] | None  # what keys an image's augmentation; None: as evaluation sees it


@dataclass(frozen=True)
class Augmentation:
    """How training images vary. `shift` concerns only the digits, the rest only pictures.

    hflip, re_prob: probabilities of a mirror image and of random erasing.
    scale: least and greatest share of the image's area that a random crop keeps.
    color_jitter: greatest relative change of brightness, contrast and saturation.
    auto_augment: one of timm's policies, such as "rand-m9-mstd0.5"; it takes the place of color_jitter.
    shift: greatest move in pixels, vertical and horizontal; zeros (black) come in.

    Raises DataError for a value out of its range.
    """

    hflip: float = 0.5
    scale: tuple[float, float] = (0.35, 1.0)
    color_jitter: float = 0.3
    auto_augment: str | None = None
    re_prob: float = 0.0
    shift: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.hflip <= 1 and 0 <= self.re_prob <= 1):
            raise DataError(f"{self}: hflip and re_prob are probabilities, from 0 to 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DataError(f"{self}: scale takes the least and the greatest area, 0 < least ≤ greatest ≤ 1")
        if self.color_jitter < 0 or self.shift not in (0, 1):
            raise DataError(f"{self}: color_jitter is at least 0, shift is 0 or 1")

    @classmethod
    def none(cls) -> "Augmentation":
        """Training images exactly as evaluation sees them."""
        return cls(hflip=0, scale=(1, 1), color_jitter=0, auto_augment=None, re_prob=0, shift=0)


DEFAULT_AUGMENTATION = Augmentation()


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


def _whole(source: Source) -> Split:
    return Split(source, np.arange(len(source.labels)))


class Batches(Protocol):
    """What a loader gives: (images float32 (B, C, H, W), labels int64 (B,)), the same at every iteration."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(eq=False)
class Data:
    """The splits of a data set, and loaders over them; made by `open_data`.

    classes: class names in index order. They come from strangers: text to show, never to run.
    img_size: (H, W) in pixels. notes: what the user should know of how the splits came about.
    """

    name: str
    classes: tuple[str, ...]
    in_chans: int
    img_size: tuple[int, int]
    seed: int
    notes: tuple[str, ...]
    _splits: dict[str, Split] = field(repr=False)
    _open_test: Callable[[], Source] | None = field(repr=False)
    _prepare: Callable[[Any, Draw], Tensor] = field(repr=False)
    _tensors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _idle: dict[tuple[Source, int, bool], list[DataLoader]] = field(default_factory=dict, init=False, repr=False)

    def split(self, name: str) -> Split:
        """`train`, `search`, `train_full` (both of them, for retraining) or `test`, opened on first demand."""
        if name == "test" and name not in self._splits and self._open_test:
            self._splits[name] = _whole(self._open_test())
        if name not in self._splits:
            raise DataError(f"no split {name!r} in {self.name}: take train, search, train_full or test")
        return self._splits[name]

    def train_loader(
        self,
        epoch: int,
        batch_size: int,
        *,
        full: bool = False,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Batches:
        """The shuffled, augmented batches of one epoch over `train`, or over `train_full` if `full`.

        `batch_size` counts the images of all ranks together; a rank gets its contiguous share of each batch.
        A last short batch is dropped, but a split smaller than one batch is one batch. `start_step` leaves
        out the steps already taken. Raises DataError for a batch that the ranks cannot share equally.
        """
        split = self.split("train_full" if full else "train")
        whole = min(batch_size, len(split))
        if whole < 1 or whole % world_size:
            raise DataError(
                f"a batch of {whole} images cannot be shared equally among {world_size} process(es): "
                f"give a --batch-size, at most {len(split)}, that is a multiple of {world_size}"
            )
        steps = len(split) // whole
        if not 0 <= start_step <= steps:
            raise DataError(f"start_step {start_step} is not in an epoch of {steps} steps of {whole} images")
        order = split.indices[_generator(self.seed, _ORDER, epoch).permutation(len(split))]
        share = whole // world_size
        rows = order[: steps * whole].reshape(steps, whole)[start_step:, rank * share : (rank + 1) * share]
        return self._batches(split.source, list(rows), epoch, workers, pin_memory)

    def eval_loader(self, split: str, batch_size: int, *, workers: int = 0, pin_memory: bool = False) -> Batches:
        """All images of a split in fixed order, as evaluation sees them; the last batch may be short.

        A split of up to CACHE_BYTES is decoded once and kept: its batches are views, not to be written to.
        """
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size} is not a number of images: give --batch-size 1 or more")
        if split not in self._tensors:
            part = self.split(split)
            rows = [part.indices[at : at + batch_size] for at in range(0, len(part), batch_size)]
            batches = self._batches(part.source, rows, None, workers, pin_memory)
            if 4 * len(part) * self.in_chans * math.prod(self.img_size) > CACHE_BYTES:
                return batches
            images, labels = zip(*batches, strict=True)
            self._tensors[split] = torch.cat(images), torch.cat(labels)
            self._idle.pop((part.source, workers, pin_memory), None)  # ends workers that have nothing left to do
        images, labels = (kept.split(batch_size) for kept in self._tensors[split])
        return list(zip(images, labels, strict=True))

    def _batches(
        self, source: Source, rows: Sequence[np.ndarray], epoch: int | None, workers: int, pin_memory: bool
    ) -> Batches:
        def start() -> DataLoader:
            return DataLoader(
                _Items(source, self._prepare, self.seed),
                batch_sampler=_Relay(),
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # or each iteration would draw from the global one
            )

        return _LoadedBatches(rows, epoch, start, self._idle.setdefault((source, workers, pin_memory), []))


class _Relay:
    """A batch sampler that reads out the batches last handed to it, so that workers can outlive an epoch."""

    batches: Iterator[list[tuple[int | None, int]]]

    def __iter__(self) -> Iterator[list[tuple[int | None, int]]]:
        return self.batches


@dataclass(frozen=True, eq=False)
class _LoadedBatches:
    """Batches from a DataLoader that is borrowed from `idle`, or started, and put back for the next epoch."""

    rows: Sequence[np.ndarray]
    epoch: int | None
    start: Callable[[], DataLoader]
    idle: list[DataLoader]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = self.idle.pop() if self.idle else self.start()
        relay = loader.batch_sampler
        assert isinstance(relay, _Relay)
        relay.batches = _keys(self.rows, self.epoch)
        try:
            yield from loader
        except BrokenDataError as error:
            # A worker's error is told inside a traceback; torch's frames behind it would hold the workers too.
            message = str(error).rpartition("BrokenDataError: ")[2].strip()
            raise BrokenDataError(message) from error.with_traceback(None)
        finally:
            self.idle.append(loader)


def _keys(rows: Sequence[np.ndarray], epoch: int | None) -> Iterator[list[tuple[int | None, int]]]:
    # Not a method: held by a loader that waits in `idle`, it would close a cycle, and workers freed by
    # the cycle collector end only after torch's timeouts.
    for row in rows:
        yield [(epoch, index) for index in row.tolist()]


@dataclass(frozen=True, eq=False)
class _Items(Dataset):
    """Images and labels by (epoch, index); without an epoch, the image as evaluation sees it."""

    source: Source
    prepare: Callable[[Any, Draw], Tensor]
    seed: int

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int]:
        epoch, index = key
        draw = None if epoch is None else (self.seed, _AUGMENT, epoch, index)
        return self.prepare(self.source.read(index), draw), int(self.source.labels[index])


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@contextmanager
def keyed_generators(*key: int) -> Iterator[None]:
    """Seed from `key` the three global generators that timm's transforms draw from, and afterwards undo it."""
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - RandAugment draws there
    with torch.random.fork_rng(devices=[]):
        random.seed(seeds[0])
        np.random.seed(seeds[1])  # noqa: NPY002
        torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would reach the accelerators too
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@dataclass(frozen=True, eq=False)
class _Pictures:
    """PIL image to (C, H, W) by timm's transforms, the training one keyed."""

    mode: str
    train: Callable[[Image.Image], Tensor]
    evaluate: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image, draw: Draw) -> Tensor:
        image = image.convert(self.mode)
        if draw is None:
            return self.evaluate(image)
        with keyed_generators(*draw):
            return self.train(image)


@dataclass(frozen=True, eq=False)
class _Digits:
    """(8, 8) values from 0 to 16 to (C, 8, 8), shifted in training; mean and std are (C, 1, 1)."""

    mean: Tensor
    std: Tensor
    shift: int

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        if draw is not None and self.shift:
            top, left = _generator(*draw).integers(0, 2 * self.shift + 1, size=2).tolist()
            image = pad(image, (self.shift,) * 4)[top : top + 8, left : left + 8]
        return (image / 16 - self.mean) / self.std


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


def open_data(
    name: str,
    *,
    img_size: int | tuple[int, int],
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    search_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
    download: bool = False,
    check: bool = True,
    progress: Callable[[int, int], None] | None = None,
    image_key: str = "image",
    label_key: str = "label",
) -> Data:
    """Open the data set `name` and cut it into train, search and test; no test image is used until asked for.

    name: `digits` (scikit-learn's 1,797 images of 8×8, 540 of them test whatever the seed); timm's `torch/…`,
        found, or with `download` put, in `data_dir`; timm's `hfds/…`, cached in `data_dir`, its columns
        `image_key` and `label_key`; or a path, below `data_dir` if that is given, to ROOT with
        ROOT/CLASS/*.png, or with ROOT/train/CLASS/*.png and the same in ROOT/test or ROOT/val. A folder
        whose name is like one of the others is reached as ./digits.
    img_size, in_chans, mean, std, interpolation, crop_pct: what the model wants, in timm's terms.
    search_fraction: share of the training images set aside to score architectures. test_fraction: share of
        all images set aside where the data have no test images of their own (`Data.notes` says so).
    check, progress: decode all images of a folder once, calling `progress(done, total)` meanwhile.

    Raises DataError for data that are missing or of no use here, BrokenDataError for files no one can read.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
    if in_chans not in (1, 3) or seed < 0 or not (0 < search_fraction < 1 and 0 < test_fraction < 1):
        raise DataError(
            f"in_chans {in_chans}, seed {seed}, search_fraction {search_fraction}, test_fraction {test_fraction}: "
            "take 1 or 3 channels, a seed of at least 0, and fractions between 0 and 1"
        )
    means, stds = _per_channel("mean", mean, in_chans), _per_channel("std", std, in_chans)
    prepare: _Digits | _Pictures
    if name == "digits":
        found = _open_digits(size)
        mean_column, std_column = (torch.tensor(values).view(-1, 1, 1) for values in (means, stds))
        prepare = _Digits(mean_column, std_column, augmentation.shift)
    else:
        prepare = _picture_transforms(size, in_chans, means, stds, interpolation, crop_pct, augmentation)
        if name.startswith(("torch/", "hfds/")):
            found = _open_timm(name, data_dir, download, image_key, label_key)
        else:
            found = _open_folder(Path(data_dir or "", name).expanduser(), check, progress)
    if len(found.classes) < 2:
        raise DataError(f"{name} has fewer than 2 classes ({_some(found.classes)}): there is nothing to learn")

    splits, notes, full = {}, found.notes, _whole(found.train)
    if found.open_test is None:
        count = round(test_fraction * len(full))
        test, rest = stratified(full.labels, found.classes, count, _generator(seed, _TEST), f"{name}, test")
        splits["test"], full = Split(found.train, test), Split(found.train, rest)
        notes += (
            f"{name} has no test images of its own: {len(test)} of its {len(found.train.labels)} images were "
            f"set aside as test, class by class, with seed {seed}; another seed sets aside others.",
        )
    count = round(search_fraction * len(full))
    search, train = stratified(full.labels, found.classes, count, _generator(seed, _SEARCH), f"{name}, search")
    splits["train"] = Split(found.train, full.indices[train])
    splits["search"] = Split(found.train, full.indices[search])
    splits["train_full"] = full
    return Data(name, found.classes, in_chans, size, seed, notes, splits, found.open_test, prepare)


def _per_channel(what: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    if in_chans == 1 and len(values) == 3:  # timm keeps the three values of a colour model made grey
        return (sum(values) / 3,)
    if len(values) not in (1, in_chans):
        raise DataError(f"{what} {tuple(values)} does not fit in_chans {in_chans}: give one value per channel")
    return tuple(values) * (in_chans // len(values))


def _picture_transforms(
    size: tuple[int, int],
    in_chans: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_pct: float | None,
    augmentation: Augmentation,
) -> _Pictures:
    common: dict[str, Any] = {"input_size": size, "mean": mean, "std": std, "interpolation": interpolation}
    try:
        train = evaluate = create_transform(**common, crop_pct=crop_pct)
        if augmentation != Augmentation.none():
            train = create_transform(
                **common,
                is_training=True,
                hflip=augmentation.hflip,
                scale=augmentation.scale,
                color_jitter=augmentation.color_jitter or None,
                auto_augment=augmentation.auto_augment,
                re_prob=augmentation.re_prob,
            )
            _keep_a_bit(train)
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(
            f"timm has no transforms of interpolation {interpolation!r} and auto_augment "
            f"{augmentation.auto_augment!r} ({error}): take for instance 'bicubic' and 'rand-m9-mstd0.5'"
        ) from error
    return _Pictures("RGB" if in_chans == 3 else "L", train, evaluate)


def _keep_a_bit(transforms: Any) -> None:
    """timm's posterize can ask for 0 bits, "rand-m9-mstd0.5-inc1" does; newer Pillows refuse: make it 1."""
    for step in transforms.transforms:
        policy = getattr(step, "ops", None) or [op for pair in getattr(step, "policy", ()) for op in pair]
        for op in policy:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    return posterize(image, max(bits, 1), **options)


@dataclass(frozen=True, eq=False)
class _Found:
    """A data set as it was found; without `open_test` it has no test images of its own."""

    classes: tuple[str, ...]
    train: Source
    open_test: Callable[[], Source] | None
    notes: tuple[str, ...] = ()


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")


def _open_digits(size: tuple[int, int]) -> _Found:
    from sklearn.datasets import load_digits  # slow to import, and only the digits need it

    if size != (8, 8):
        raise DataError(f"the digits are 8×8 pixels, img_size is {size}: take a model made for 8×8, or other data")
    images, labels = load_digits(return_X_y=True)
    classes = tuple(str(digit) for digit in range(10))
    test, train = stratified(labels, classes, DIGITS_TEST, _generator(0), "digits")

    def part(chosen: np.ndarray) -> Source:
        pixels = torch.tensor(images[chosen], dtype=torch.float32).view(-1, 8, 8)
        return Source(pixels.__getitem__, labels[chosen].astype(np.int64))

    return _Found(classes, part(train), lambda: part(test))


def _open_timm(
    name: str, data_dir: str | os.PathLike[str] | None, download: bool, image_key: str, label_key: str
) -> _Found:
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

    def source(items: Any, labels: Sequence[Any], num_classes: int | None) -> Source:
        return Source(_Images(items, name), _class_indices(labels, num_classes, name))

    items, labels = open_part("train")
    names: Any = items.class_to_idx if hub else getattr(items, "classes", None) or getattr(items, "all_categories", ())
    train = source(items, labels, len(names) or None)
    names = names or range(int(train.labels.max()) + 1)
    classes = tuple(", ".join(one) if isinstance(one, tuple) else str(one) for one in names)
    # "validation" is timm's word for the test images of torchvision's sets
    known = (items.dataset.info.splits or ()) if hub else ("validation",)
    part = next((one for one in TEST_FOLDERS if one in known), None)
    open_test = None if part is None else lambda: source(*open_part(part), len(classes))
    return _Found(classes, train, open_test)


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
class _Images:
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


def _open_folder(root: Path, check: bool, progress: Callable[[int, int], None] | None) -> _Found:
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
    if check:
        _check_images(_Images(samples + tests, str(root)), root, progress)
    train, test = (
        Source(_Images(part, str(root)), np.array([label for _, label in part], dtype=np.int64))
        for part in (samples, tests)
    )
    return _Found(classes, train, (lambda: test) if tests else None, notes)


def _subfolders(root: Path) -> list[Path]:
    """The folders in `root` that are not hidden, in timm's order: the class indices are then timm's too."""
    folders = [one for one in root.iterdir() if one.is_dir()] if root.is_dir() else []
    return sorted((one for one in folders if one.name[0] != "."), key=lambda one: natural_key(one.name))


def _list_images(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]], tuple[str, ...]]:
    """Class names, (path, class index) of all images, and notes on what was passed over."""
    folders, samples, passed_over = _subfolders(root), [], 0
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
        passed_over += len(files) - len(images)
    note = f"{passed_over} file(s) in {str(root)!r} were passed over: images end in {' '.join(endings)}."
    return tuple(folder.name for folder in folders), samples, (note,) * bool(passed_over)


def _check_images(read: _Images, root: Path, progress: Callable[[int, int], None] | None) -> None:
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
            f"{len(broken)} of {total} images in {str(root)!r} cannot be read: {_some(broken)}; replace or remove them"
        )
