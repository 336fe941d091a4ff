"""The three splits of a data set, train, search and test, and loaders that are functions of the seed.

What an image looks like in training depends on (seed, epoch, index) alone, its place in the epoch on
(seed, epoch) alone: neither the number of workers nor a resumed run changes either.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from poolshare.space.errors import BrokenDataError, DataError

from .sources import Progress, Source, Split, StrPath, open_source
from .transforms import DEFAULT_AUGMENTATION, Augmentation, Prepare, digits_transform, picture_transform, random_numbers

CACHE_BYTES = 2**30  # evaluation splits of up to this size, as float32, are kept decoded

_SEARCH, _TEST, _ORDER, _AUGMENT = range(4)  # one stream of random numbers for each use of the seed


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
    _open_test: Callable[[], Split] | None = field(repr=False)
    _prepare: Prepare = field(repr=False)
    _tensors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def split(self, name: str) -> Split:
        """`train`, `search`, `train_full` (both of them, for retraining) or `test`, opened on first demand."""
        if name == "test" and name not in self._splits and self._open_test:
            self._splits[name] = self._open_test()
        if name not in self._splits:
            raise DataError(f"no split {name!r} in {self.name}: take train, search, train_full or test")
        return self._splits[name]

    @property
    def fingerprint(self) -> str:
        """Tells whether two openings gave the same classes and training images, by their labels in order."""
        full = self.split("train_full")
        text = "\n".join(self.classes).encode() + full.indices.tobytes() + full.labels.tobytes()
        return f"{len(full)} images, {hashlib.sha256(text).hexdigest()[:16]}"

    def batch_sizes(self, batch_size: int, full: bool = False) -> tuple[int, ...]:
        """Images, of all processes together, of the batches that an epoch of `train_loader` has; each number once."""
        return (min(batch_size, len(self.split("train_full" if full else "train"))),)

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
    ) -> Batches:
        """The shuffled, augmented batches of one epoch over `train`, or over `train_full` if `full`.

        `batch_size` counts the images of all ranks together; a rank gets its contiguous share of each batch.
        A last short batch is dropped, but a split smaller than one batch is one batch. `start_step` leaves
        out the steps already taken. Raises DataError for a batch that the ranks cannot share equally.
        """
        split = self.split("train_full" if full else "train")
        whole = self.batch_sizes(batch_size, full)[0]
        if whole < 1 or whole % world_size:
            raise DataError(
                f"a batch of {whole} images cannot be shared equally among {world_size} process(es): "
                f"give a --batch-size, at most {len(split)}, that is a multiple of {world_size}"
            )
        steps = len(split) // whole
        if not 0 <= start_step <= steps:
            raise DataError(f"start_step {start_step} is not in an epoch of {steps} steps of {whole} images")
        order = split.indices[random_numbers(self.seed, _ORDER, epoch).permutation(len(split))]
        share = whole // world_size
        rows = order[: steps * whole].reshape(steps, whole)[start_step:, rank * share : (rank + 1) * share]
        return _Loader(_Items(split.source, self._prepare, self.seed, epoch), rows.tolist(), workers)

    def eval_loader(self, split: str, batch_size: int, *, workers: int = 0) -> Batches:
        """All images of a split in fixed order, as evaluation sees them; the last batch may be short.

        A split of up to CACHE_BYTES is decoded once and kept: its batches are views, not to be written to.
        """
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size} is not a number of images: give --batch-size 1 or more")
        if split not in self._tensors:
            batches = self._batches(split, batch_size, workers)
            if 4 * len(self.split(split)) * self.in_chans * math.prod(self.img_size) > CACHE_BYTES:
                return batches
            images, labels = zip(*batches, strict=True)
            self._tensors[split] = torch.cat(images), torch.cat(labels)
        images, labels = (kept.split(batch_size) for kept in self._tensors[split])
        return list(zip(images, labels, strict=True))

    def _batches(self, split: str, batch_size: int, workers: int) -> Batches:
        part = self.split(split)
        rows = [part.indices[at : at + batch_size].tolist() for at in range(0, len(part), batch_size)]
        return _Loader(_Items(part.source, self._prepare, self.seed, None), rows, workers)


@dataclass(frozen=True, eq=False)
class _Items(Dataset):
    """Images and labels by index, as `epoch` augments them; without an epoch, as evaluation sees them."""

    source: Source
    prepare: Prepare
    seed: int
    epoch: int | None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draw = None if self.epoch is None else (self.seed, _AUGMENT, self.epoch, index)
        return self.prepare(self.source.read(index), draw), int(self.source.labels[index])


@dataclass(frozen=True, eq=False)
class _Loader:
    """The items at the indices in `rows`, a batch for each row; every iteration has workers of its own."""

    items: _Items
    rows: list[list[int]]
    workers: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()  # or each iteration would draw from the global one
        try:
            yield from DataLoader(self.items, batch_sampler=self.rows, num_workers=self.workers, generator=generator)
        except BrokenDataError as error:
            # A worker's error is told inside a traceback; torch's frames behind it would hold the workers too.
            message = str(error).rpartition("BrokenDataError: ")[2].strip()
            raise BrokenDataError(message) from error.with_traceback(None)


def open_data(
    name: str,
    *,
    img_size: int | tuple[int, int],
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float | None = None,
    data_dir: StrPath | None = None,
    search_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
    download: bool = False,
    progress: Progress | None = None,
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
    progress: called as `progress(done, total)` while all images of a folder are decoded once, as a check.

    Raises DataError for data that are missing or of no use here, BrokenDataError for files no one can read.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
    if in_chans not in (1, 3):
        raise DataError(
            f"image files are read with 1 or 3 channels, and the model takes in_chans {in_chans}: give images of other "
            "channels in Python, as poolshare.search.search(data=(train, validation))"
        )
    if seed < 0 or not (0 < search_fraction < 1 and 0 < test_fraction < 1):
        raise DataError(
            f"seed {seed}, search_fraction {search_fraction}, test_fraction {test_fraction}: "
            "take a seed of at least 0, and fractions between 0 and 1"
        )
    wanted: dict[str, Any] = {"img_size": size, "in_chans": in_chans, "mean": mean, "std": std}
    prepare: Prepare
    if name == "digits":
        prepare = digits_transform(**wanted, shift=augmentation.shift)
    else:
        prepare = picture_transform(**wanted, interpolation=interpolation, crop_pct=crop_pct, augmentation=augmentation)

    found = open_source(
        name, data_dir=data_dir, download=download, image_key=image_key, label_key=label_key, progress=progress
    )
    splits, notes, full = {}, found.notes, found.train
    if found.open_test is None:
        images = len(full)
        splits["test"], full = full.cut(test_fraction, found.classes, random_numbers(seed, _TEST), f"{name}, test")
        notes += (
            f"{name} has no test images of its own: {len(splits['test'])} of its {images} images were "
            f"set aside as test, class by class, with seed {seed}; another seed sets aside others.",
        )
    search, train = full.cut(search_fraction, found.classes, random_numbers(seed, _SEARCH), f"{name}, search")
    splits |= {"train": train, "search": search, "train_full": full}
    return Data(name, found.classes, in_chans, size, seed, notes, splits, found.open_test, prepare)
