"""The splits of a data set, train, search and test, and loaders that are functions of the seed.

What an image looks like in training depends on (seed, epoch, index) alone, its place in the epoch on
(seed, epoch) alone: neither the number of workers nor a resumed run changes either.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from poolshare.space.errors import BrokenDataError, DataError

from .listing import some
from .pictures import Files, Images, Pairs, Progress, advance, check_images
from .seen import keep, recall
from .sources import Source, Split
from .transforms import Prepare, kept_generators

T = TypeVar("T")
Checking = Literal["once", "now", "never"]  # when images are decoded as a check
CACHE_BYTES = 2**30  # evaluation splits of up to this size, as float32, are kept decoded

_ORDER, _AUGMENT = 2, 3  # one stream of random numbers for each use of the seed; `opening` has 0 and 1


class Batches(Protocol):
    """What a loader gives: (images float32 (B, C, H, W), labels), the same at every iteration.

    Labels are int64 (B,), or uint8 (B, classes); of images with masks int64 (B, H, W), the class of each pixel or IGNORED.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(eq=False)
class Data:
    """The splits of a data set, and loaders over them; made by `open_data`.

    classes: class names in index order. They are untrusted text: shown, never run.
    img_size: (H, W) in pixels. notes: for the user, on how the splits were made. labelled: whether the labels mean
    anything.
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
    labelled: bool = True
    answering: nn.Module | None = field(default=None, repr=False)  # whose outputs are the targets in evaluation
    _tensors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def split(self, name: str) -> Split:
        """`train`, `search`, `train_full` (both of them, for retraining) or `test`, opened on first demand."""
        if name == "test" and name not in self._splits and self._open_test:
            self._splits[name] = self._open_test()
        if name not in self._splits:
            raise DataError(f"no split {name!r} in {self.name}: take train, search, train_full or test")
        return self._splits[name]

    @property
    def of_pixels(self) -> bool:
        """Whether every pixel has a class of its own."""
        return isinstance(self.split("train_full" if "train_full" in self._splits else "test").source.read, Pairs)

    def check(self, parts: Sequence[str], progress: Progress | None = None, when: Checking = "once") -> None:
        """Decode all images of files that `train` (with it `search`, and what was set aside) or `test` consist of.

        So broken ones are found before anything starts, and the fingerprint covers contents from then on. when: "once",
        those that were decoded before and have not changed are left out; "now", none is; "never", all are.
        Raises one BrokenDataError that names all that are broken.
        """
        wanted: dict[int, tuple[Source, np.ndarray]] = {}
        for part in parts:
            split = self.split("train_full" if part == "train" else part)
            source, indices = split.source, np.arange(len(split.source)) if part == "train" else split.indices
            if isinstance(source.read, Images) and isinstance(source.read.items, Files):
                if when != "now":
                    recall(source)
                new = indices if when == "now" else indices[source.digests[indices] == 0]  # type: ignore[index]
                wanted.setdefault(id(source), (source, new))
        if when == "never":
            return
        total, done, broken = sum(len(indices) for _, indices in wanted.values()), 0, list[str]()
        for source, indices in wanted.values():
            if not len(indices):
                continue
            show = partial(advance, progress, done, total) if progress else None
            source.digests[indices], faults = check_images(source.read, indices, show)  # type: ignore[arg-type,index]
            keep(source)
            broken += faults.values()
            done += len(indices)
        if broken:
            what = f"{len(broken)} of {total} images in {self.name!r} cannot be read"
            raise BrokenDataError(f"{what}: {some(broken)}; {source.read.remedy}")  # type: ignore[attr-defined]

    def relabelled(self, classes: Sequence[str], indices: Sequence[int]) -> "Data":
        """The same images under the classes of a model, of which class i of these is the one at `indices[i]`."""
        table, open_test = np.asarray(indices, dtype=np.int64), self._open_test

        @cache  # splits share their source
        def moved_to(source: Source) -> Source:
            if isinstance(source.read, Pairs):
                return replace(source, read=source.read.relabelled(indices))
            if source.labels.ndim == 1:
                return replace(source, labels=table[source.labels] if self.labelled else source.labels)
            labels = np.zeros((len(source), len(classes)), source.labels.dtype)
            labels[:, table] = source.labels
            return replace(source, labels=labels)

        def translated(split: Split) -> Split:
            return Split(moved_to(split.source), split.indices)

        return replace(
            self,
            classes=tuple(classes),
            _splits={name: translated(split) for name, split in self._splits.items()},
            _open_test=open_test and (lambda: translated(open_test())),
        )

    def drawn(self, split: str, positions: np.ndarray) -> "Data":
        """The same, but of one split these images alone, (n,) positions in it, in this order."""
        part = self.split(split)
        return replace(self, _splits=self._splits | {split: Split(part.source, part.indices[positions])})

    def answered_by(self, model: nn.Module) -> "Data":
        """The same, but in evaluation the targets are a model's outputs; in training they are as they were."""
        return replace(self, labelled=True, answering=model.eval())

    def _answered(self, batches: Batches) -> Batches:
        if (model := self.answering) is None:
            return batches

        @torch.no_grad()
        def answers() -> Iterator[tuple[Tensor, Tensor]]:
            device = next(model.parameters()).device
            for images, _ in batches:
                yield images, model(images.to(device)).cpu()

        return Anew(answers, len(batches))

    @property
    def fingerprint(self) -> str:
        """Tells whether two openings gave the same classes and training images, in order; see search/job/images.py.

        It holds how many there are, a hash of labels, of files one of their sizes, and one of their contents, which is
        missing where not all were decoded. Names and times of change have no say: a copy is the same data.
        """
        return self.fingerprint_of("train_full")

    def fingerprint_of(self, split: str) -> str:
        """The same of any split, for instance of test images that might be those of a training."""
        part = self.split(split)
        source, rows = part.source, part.indices
        classes = "\n".join(self.classes).encode()
        text = f"{len(part)} images, {_hash(classes, rows, part.labels)}"
        if source.sizes is not None:
            text += f", sizes {_hash(source.sizes[rows])}"
        if source.digests is not None and source.digests[rows].all():
            text += f", contents {_hash(source.digests[rows])}"
        return text

    def files(self) -> Iterator[tuple[str, str]]:
        """Of the images that `check("train")` reads: the name of each, "cat/1.jpg", and a word for its contents.

        Those that were set aside as test are among them, since a file more or less sets aside others.
        """
        source = self.split("train_full").source
        if source.names is not None and source.sizes is not None and source.digests is not None:
            for name, size, digest in zip(source.names, source.sizes, source.digests, strict=True):
                yield name, f"{size}-{digest:016x}"

    @property
    def full(self) -> "Data":
        """The same for retraining: its `train` is `train_full`."""
        return replace(self, _splits=self._splits | {"train": self.split("train_full")})

    def batch_sizes(self, batch_size: int) -> tuple[int, ...]:
        """Images, of all processes together, of the batches that an epoch of `train_loader` has; each number once."""
        return (min(batch_size, len(self.split("train"))),)

    def train_loader(
        self,
        epoch: int,
        batch_size: int,
        *,
        epochs: int = 1,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin: bool = False,
    ) -> Batches:
        """The shuffled, augmented batches of `epochs` epochs over `train`, beginning with `epoch`.

        `batch_size` counts the images of all ranks together; a rank gets its contiguous share of each batch.
        A last short batch is dropped, but a split smaller than one batch is one batch. `start_step` leaves
        out the steps of the first epoch already taken. The workers live until the last epoch. pin: into memory from which
        a GPU copies while it computes. Raises DataError for a batch that the ranks cannot share equally.
        """
        split = self.split("train")
        whole = self.batch_sizes(batch_size)[0]
        if whole < 1 or whole % world_size:
            raise DataError(
                f"a batch of {whole} images cannot be shared equally among {world_size} process(es): "
                f"give a --batch-size, at most {len(split)}, that is a multiple of {world_size}"
            )
        steps = len(split) // whole
        if not 0 <= start_step <= steps:
            raise DataError(f"start_step {start_step} is not in an epoch of {steps} steps of {whole} images")
        share = whole // world_size

        def rows() -> Iterator[list[_Row]]:
            for now in range(epoch, epoch + epochs):
                order = split.indices[np.random.default_rng((self.seed, _ORDER, now)).permutation(len(split))]
                first = start_step if now == epoch else 0
                batches = order[: steps * whole].reshape(steps, whole)[first:, rank * share : (rank + 1) * share]
                for batch in batches:
                    yield [(index, now) for index in batch.tolist()]

        items = _Items(split.source, self._prepare, self.seed)
        return _Loader(items, Anew(rows, epochs * steps - start_step), workers, pin)

    def eval_loader(
        self, split: str, batch_size: int, *, workers: int = 0, start: int = 0, stop: int | None = None
    ) -> Batches:
        """The images of a split in fixed order, as evaluation sees them; the last batch may be short.

        start, stop: a range of them; by default all.
        A split of up to CACHE_BYTES is decoded once and kept: its batches are views, not to be written to.
        """
        if batch_size < 1:
            raise DataError(f"batch_size {batch_size} is not a number of images: give --batch-size 1 or more")
        if split not in self._tensors:
            channels = self.in_chans + 2 * self.of_pixels  # a mask takes 8 bytes per pixel
            if 4 * len(self.split(split)) * channels * math.prod(self.img_size) > CACHE_BYTES:
                return self._answered(self._batches(split, batch_size, workers, start, stop))
            images, labels = zip(*self._answered(self._batches(split, batch_size, workers)), strict=True)
            self._tensors[split] = torch.cat(images), torch.cat(labels)
        images, labels = (kept[start:stop].split(batch_size) for kept in self._tensors[split])
        return list(zip(images, labels, strict=True))

    def eval_share(self, split: str, batch_size: int, rank: int, world_size: int, *, workers: int = 0) -> Batches:
        """The part of `eval_loader`'s batches that one of so many processes answers for; none may be left for some."""
        if world_size == 1:
            return self.eval_loader(split, batch_size, workers=workers)
        count = len(self.split(split))
        whole = -(-count // batch_size)
        first, last = (batch_size * (whole * part // world_size) for part in (rank, rank + 1))
        mine = np.arange(count)[first:last]
        return self.drawn(split, mine).eval_loader(split, batch_size, workers=workers) if len(mine) else []

    def _batches(self, split: str, batch_size: int, workers: int, start: int = 0, stop: int | None = None) -> Batches:
        part = self.split(split)
        indices = part.indices[start:stop]
        starts = range(0, len(indices), batch_size)

        def rows() -> Iterator[list[_Row]]:
            for at in starts:
                yield [(index, None) for index in indices[at : at + batch_size].tolist()]

        return _Loader(_Items(part.source, self._prepare, self.seed), Anew(rows, len(starts)), workers)


_Row = tuple[int, int | None]  # an image, and the epoch that augments it; None: as evaluation sees it


@dataclass(frozen=True, eq=False)
class Anew(Generic[T]):
    """`count` items, which every iteration has `make` give anew; none is kept."""

    make: Callable[[], Iterator[T]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[T]:
        return self.make()


def _hash(*parts: bytes | np.ndarray) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return whole.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Items(Dataset):
    """Images and labels, each as its epoch augments it."""

    source: Source
    prepare: Prepare
    seed: int

    def __getitems__(self, rows: list[_Row]) -> list[tuple[Tensor, Any]]:
        """A batch, which leaves the global generators as they were."""
        with kept_generators():
            return [self._item(*row) for row in rows]

    def _item(self, index: int, epoch: int | None) -> tuple[Tensor, Any]:
        draw = None if epoch is None else (self.seed, _AUGMENT, epoch, index)
        prepared, label = self.prepare(self.source.read(index), draw), self.source.labels[index]
        if isinstance(prepared, tuple):  # an image with its mask
            return prepared
        return prepared, int(label) if label.ndim == 0 else torch.from_numpy(label)


@dataclass(frozen=True, eq=False)
class _Loader:
    """The items of `rows`, a batch for each. Its workers live as long as it does."""

    items: _Items
    rows: Anew[list[_Row]]
    workers: int
    pin: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _loader(self) -> DataLoader:
        generator = torch.Generator()  # or each iteration would draw from the global one
        keep: dict[str, Any] = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(
            self.items,
            batch_sampler=self.rows,
            generator=generator,
            pin_memory=self.pin,
            **keep,  # type: ignore[arg-type]
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self._loader
        except BrokenDataError as error:
            # A worker's message comes inside a traceback, whose frames would keep the workers alive.
            message = str(error).rpartition("BrokenDataError: ")[2].strip()
            raise BrokenDataError(message) from error.with_traceback(None)
