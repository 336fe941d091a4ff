"""Data given in Python, torch data sets or loaders of images and labels, as the splits that everything else reads.

A sample, or a batch, is a pair (images, labels), or a dictionary of them as Hugging Face data sets give it.

What is random in the user's own transforms is keyed as it is for every other source: in a data set by (seed, epoch,
index), in a loader by (seed, epoch, step). So a stopped search continues with the same images in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, IterableDataset

from poolshare.space.data_kind import DataKind
from poolshare.space.errors import BrokenDataError, DataError

from .pictures import Progress, digest
from .sources import Source, Split
from .splits import Batches, Data
from .transforms import Draw, keyed_generators

SPLITS = ("train", "search")  # in the order in which they are given
_EPOCH = 29  # sets a loader's draws apart from others of the same seed
_AGAIN = 2  # images that are read a second time, to see whether they are the same

IMAGE_KEYS, LABEL_KEYS = ("pixel_values", "image"), ("label", "labels")  # of samples that are dictionaries

Parts = Sequence[Any]  # training and validation images: two torch `Dataset`s, or two `DataLoader`s


def open_own(
    parts: Parts,
    name: str,
    *,
    classes: Sequence[str] | int | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
) -> Data:
    """The splits `train` and `search`; there is no test split, those images are the user's to keep.

    parts: two `Dataset`s with a length, or two `DataLoader`s; of float images (channels, H, W), all of one size, and
    class indices; or of dictionaries with `pixel_values` or `image`, and `label` or `labels`. All of them are read once:
    what breaks the contract is found before anything starts.
    name: how they are called in the record. classes: names in index order, or how many there are; None: what the training
    set calls `classes`, or numbers up to the highest label. workers: processes that read data sets; loaders have their own.
    progress: called with images read, and all of them.

    Raises DataError for what cannot be used, BrokenDataError for images that cannot be read.
    """
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        raise DataError(
            f"data is a {type(parts).__name__}{_count(parts)}: give a name that --data knows, or (train, validation), two "
            "torch Datasets or two DataLoaders; test images are yours to keep"
        )
    loaders = [isinstance(part, DataLoader) for part in parts]
    if any(loaders) and not all(loaders):
        raise DataError("one of the data is a loader and one is not: give two Datasets, or two DataLoaders")
    for where, part in zip(SPLITS, parts, strict=True):
        _check_kind(part, where)
    sizes = [len(_dataset(part)) for part in parts]
    found: list[_Read] = []
    for where, part in zip(SPLITS, parts, strict=True):
        show = partial(_advance, progress, sum(sizes[: len(found)]), sum(sizes)) if progress else None
        found.append(_read_loader(part, where, seed, show) if loaders[0] else _read_all(part, where, workers, show))
    shapes = {one.shape for one in found}
    if len(shapes) > 1:
        raise DataError(f"training and validation images differ in size ({_listed(shapes)}): transform them alike")
    channels, height, width = found[0].shape
    if channels < 1 or height != width or height < 1:
        raise DataError(f"images are {channels}×{height}×{width}: take square ones of at least one channel")
    names = _names(_dataset(parts[0]), classes, found)
    splits = {where: one.split for where, one in zip(SPLITS, found, strict=True)}
    both = np.concatenate([one.split.labels for one in found])
    digests = np.concatenate([one.split.source.digests for one in found])  # type: ignore[misc]
    options: dict[str, Any] = {
        "name": f"{DataKind.GIVEN.value}{name}",
        "classes": names,
        "in_chans": channels,
        "img_size": (height, width),
        "seed": seed,
        "notes": tuple(
            f"{where} images differ from one reading to the next, though all generators are seeded alike: changed ones "
            "cannot be noticed."
            for where, one in zip(SPLITS, found, strict=True)
            if not one.repeatable
        ),
        "_open_test": None,
        "_prepare": _fetch,
    }
    if loaders[0]:
        whole = Split(Source(_no_full, both, digests=digests), np.arange(len(both)))
        given = dict(zip(SPLITS, parts, strict=True))
        return _LoaderData(**options, _splits={**splits, "train_full": whole}, loaders=given, sizes=found[0].sizes)
    whole = Split(Source(partial(_Place, ConcatDataset(parts)), both, digests=digests), np.arange(len(both)))
    return Data(**options, _splits={**splits, "train_full": whole})


def _dataset(part: Any) -> Any:
    return part.dataset if isinstance(part, DataLoader) else part


def loader_batch(data: Data) -> int | None:
    """Images of one training batch, where the data came as loaders."""
    return data.sizes[-1] if isinstance(data, _LoaderData) else None


# Data sets


class _Place(NamedTuple):
    """An image that is still to be fetched from the user's data set."""

    dataset: Any
    position: int


def _fetch(place: _Place, draw: Draw) -> Tensor:
    """The image, with all that is random about it keyed; in evaluation by its index alone."""
    with keyed_generators(*(draw or (place.position,))):
        image, _ = _pair(place.dataset[place.position])
        return image.float()  # type: ignore[no-any-return]


class _Read(NamedTuple):
    """What one part held."""

    split: Split
    shape: tuple[int, ...]  # of all its images
    repeatable: bool  # whether a second reading with the same seeds gives the same images
    sizes: tuple[int, ...] = ()  # images of its batches, each number once, rising; where it is a loader


class _Checked(NamedTuple):
    label: int
    shape: tuple[int, ...]
    problem: str  # empty where there is none
    broken: bool = False  # it could not be read at all
    digest: int = 0  # of the image


@dataclass(frozen=True, eq=False)
class _Checks(Dataset):
    """Every item of a data set looked at."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Checked:
        try:
            with keyed_generators(index):
                item = self.dataset[index]
        except Exception as error:  # whatever the user's own code raises
            return _Checked(-1, (), f"{type(error).__name__}: {str(error)[:200]}", True)
        try:
            image, label = _pair(item)
        except DataError as error:
            return _Checked(-1, (), str(error))
        problem = _image_fault(image, 3) or _not_finite(image) or _label_fault(label)
        if problem:
            return _Checked(-1, (), problem)
        return _Checked(int(label), tuple(image.shape), "", digest=_image_digest(image))


def _read_all(dataset: Any, where: str, workers: int, progress: Callable[[int], None] | None) -> _Read:
    labels, digests = list[int](), list[int]()
    shape: tuple[int, ...] | None = None
    generator = torch.Generator()  # the global one stays as it is
    for items in DataLoader(_Checks(dataset), 256, num_workers=workers, collate_fn=list, generator=generator):
        for item in items:
            if item.problem:
                kind = BrokenDataError if item.broken else DataError
                raise kind(f"item {len(labels)} of the {where} data cannot be used ({item.problem}); mend or remove it")
            shape = shape or item.shape
            if item.shape != shape:
                raise DataError(
                    f"item {len(labels)} of the {where} data is {_listed([item.shape])}, the first is {_listed([shape])}: "
                    "resize and crop all images alike"
                )
            labels.append(item.label)
            digests.append(item.digest)
        if progress:
            progress(len(labels))
    assert shape is not None  # empty data sets are refused before
    repeatable = [_Checks(dataset)[index].digest for index in range(min(_AGAIN, len(digests)))] == digests[:_AGAIN]
    source = Source(
        partial(_Place, dataset), np.array(labels, dtype=np.int64), digests=_digest_column(digests, repeatable)
    )
    return _Read(Split(source, np.arange(len(labels))), shape, repeatable)


def _image_digest(image: Tensor) -> int:
    return digest(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _digest_column(digests: list[int], repeatable: bool) -> np.ndarray:
    """(N,) uint64; all 1, which says nothing, where the images are others each time."""
    return np.array(digests, dtype=np.uint64) if repeatable else np.ones(len(digests), dtype=np.uint64)


# Loaders


@dataclass(eq=False)
class _LoaderData(Data):
    """Splits whose batches are the user's own loaders'; `batch_size` of the methods has no say in training."""

    loaders: dict[str, DataLoader] = field(kw_only=True, repr=False)
    sizes: tuple[int, ...] = field(kw_only=True)  # images of its training batches, each number once, rising
    places: tuple[int, ...] | None = field(default=None, kw_only=True)  # of the loaders' labels among `classes`

    def relabelled(self, classes: Sequence[str], indices: Sequence[int]) -> Data:
        """The same under the classes of a model; the loaders' labels are translated as they come."""
        data = super().relabelled(classes, indices)
        assert isinstance(data, _LoaderData)
        earlier = range(len(self.classes)) if self.places is None else self.places
        return replace(data, places=tuple(indices[place] for place in earlier))

    @property
    def full(self) -> Data:
        raise DataError(f"{self.name} came as loaders, which cannot be put together for retraining: give Datasets")

    def batch_sizes(self, batch_size: int) -> tuple[int, ...]:
        """Those of the training loader, whatever is asked for."""
        return self.sizes

    def train_loader(
        self,
        epoch: int,
        batch_size: int,
        *,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> Batches:
        """One epoch of the user's training loader; each rank takes its share of every batch."""
        for images in self.sizes:
            _check_share(images, world_size)
        key = self.seed, _EPOCH, epoch
        return _Epoch(self.loaders["train"], "train", key, start_step, rank, world_size, self.places)

    def _batches(self, split: str, batch_size: int, workers: int) -> Batches:
        if split not in self.loaders:
            raise DataError(f"no loader of {split} images was given for {self.name}")
        return _Epoch(self.loaders[split], split, (self.seed, _EPOCH), places=self.places)


@dataclass(frozen=True, eq=False)
class _Epoch:
    """One pass over a loader from `start` on; what comes before is drawn too, so that the rest is the same."""

    loader: DataLoader
    where: str  # train or search
    key: tuple[int, ...]
    start: int = 0
    rank: int = 0
    world_size: int = 1
    places: tuple[int, ...] | None = None  # what the loader's labels are called, by label; None: as they are

    def __len__(self) -> int:
        return len(self.loader) - self.start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader, steps = self.loader, len(self.loader)
        seed = int(np.random.SeedSequence(self.key).generate_state(1)[0])
        for holder in (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        with keyed_generators(*self.key):
            batches = iter(loader)
        for step in range(steps):
            with keyed_generators(*self.key, step):
                try:
                    batch = next(batches)
                except StopIteration:
                    raise DataError(f"a loader said it has {steps} batches and ended after {step}") from None
            if step < self.start:
                continue
            images, labels = _batch(batch, f"batch {step} of the {self.where} loader")
            _check_share(len(images), self.world_size)  # other epochs may have other batches than the first
            share = len(images) // self.world_size
            mine = slice(self.rank * share, (self.rank + 1) * share)
            labels = labels[mine].long()
            yield images[mine].float(), labels if self.places is None else torch.tensor(self.places)[labels]


def _read_loader(loader: DataLoader, where: str, seed: int, progress: Callable[[int], None] | None) -> _Read:
    """Labels in the order of the first epoch, so that another sampler shows in the fingerprint."""
    labels: list[Tensor] = []
    digests: list[int] = []
    shapes: set[tuple[int, ...]] = set()
    epoch = _Epoch(loader, where, (seed, _EPOCH, 0) if where == "train" else (seed, _EPOCH))
    for index, item in enumerate(epoch):
        images, some = item
        if problem := _not_finite(images):
            raise DataError(f"batch {index} of the {where} loader cannot be used ({problem})")
        labels.append(some)
        digests += map(_image_digest, images)
        shapes.add(tuple(images.shape[1:]))
        if progress:
            progress(sum(map(len, labels)))
    if len(shapes) != 1:
        raise DataError(f"images of the {where} loader differ in size ({_listed(shapes)}): resize and crop all alike")
    together = torch.cat(labels).numpy()
    if (together < 0).any():
        raise DataError(f"the {where} loader gives label {together.min()}: labels are class indices, 0, 1, 2 …")
    again = list(map(_image_digest, next(iter(epoch))[0]))
    repeatable = again == digests[: len(again)]
    source = Source(_no_full, together, digests=_digest_column(digests, repeatable))
    sizes = tuple(sorted({*map(len, labels)}))
    return _Read(Split(source, np.arange(len(together))), shapes.pop(), repeatable, sizes)


def _batch(batch: Any, which: str) -> tuple[Tensor, Tensor]:
    """Images (B, channels, H, W) and labels (B,) of a loader's batch, as they are. Raises DataError for anything else."""
    try:
        images, labels = _pair(batch)
    except DataError as error:
        raise DataError(f"{which} cannot be used ({error})") from None
    problem = _image_fault(images, 4)
    if problem and isinstance(images, Tensor) and images.ndim == 3:
        problem += "; give the loader a batch_size"
    if not problem and (not isinstance(labels, Tensor) or labels.shape != (len(images),) or not _whole(labels)):
        problem = f"its labels are {_described(labels)}, and must be class indices of shape ({len(images)},)"
    if problem:
        raise DataError(f"{which} cannot be used ({problem})")
    return images, labels


def _no_full(index: int) -> Any:
    raise DataError("images of a loader cannot be read one by one: give a Dataset")


# What is wrong, in words


def _check_share(images: int, processes: int) -> None:
    if images % processes:
        raise DataError(
            f"a batch of {images} images cannot be shared equally among {processes} processes: give a "
            f"loader with drop_last=True whose batch size is a multiple of {processes}"
        )


def _check_kind(part: Any, where: str) -> None:
    if isinstance(part, DataLoader):
        if isinstance(part.dataset, IterableDataset):
            raise DataError(
                f"the {where} loader streams its images, which cannot be continued: give one over a Dataset"
            )
        if part.persistent_workers:
            raise DataError(f"the {where} loader has persistent_workers=True, which cannot be repeated: leave it off")
        if isinstance(part.sampler, DistributedSampler):
            raise DataError(f"the {where} loader has a DistributedSampler: leave it out, each batch is shared anyway")
    elif isinstance(part, IterableDataset) or not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
        raise DataError(f"the {where} data are {_described(part)}: give a Dataset with a length, or a DataLoader")
    if not len(part):
        raise DataError(f"the {where} data are empty: give at least one image of each class")


def _pair(item: Any) -> tuple[Any, Any]:
    """Image and label of a sample, or images and labels of a batch. Raises DataError for anything else."""
    if isinstance(item, Mapping):
        found = [[item[key] for key in keys if key in item][:1] for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if all(found):
            return found[0][0], found[1][0]
        raise DataError(
            f"it is a dictionary of {', '.join(map(repr, item))}, and must have {' or '.join(map(repr, IMAGE_KEYS))}, and "
            f"{' or '.join(map(repr, LABEL_KEYS))}"
        )
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"it is {_described(item)}, and must be (image tensor, label)")
    return item[0], item[1]


def _image_fault(image: Any, dimensions: int) -> str:
    wanted = "(channels, H, W)" if dimensions == 3 else "(B, channels, H, W)"
    if not isinstance(image, Tensor):
        return f"its image is {_described(image)}, and must be a float tensor {wanted}: end its transform in a tensor"
    if image.ndim != dimensions or not image.is_floating_point():
        return f"its image is {_described(image)}, and must be a float tensor {wanted}"
    return ""


def _not_finite(image: Tensor) -> str:
    return "" if bool(torch.isfinite(image).all()) else "its image holds values that are not finite"


def _whole(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex())


def _label_fault(label: Any) -> str:
    whole = isinstance(label, (int, np.integer)) or (isinstance(label, Tensor) and label.ndim == 0 and _whole(label))
    return (
        "" if whole and int(label) >= 0 else f"its label is {_described(label)}, and must be a class index, 0, 1, 2 …"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of {value.dtype} and shape {value.shape}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.40}" if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def _names(dataset: Any, given: Sequence[str] | int | None, found: Sequence[_Read]) -> tuple[str, ...]:
    labels = [one.split.labels for one in found]
    count = 1 + max(int(part.max()) for part in labels)
    stated = getattr(dataset, "classes", None) or _hub_names(dataset)
    if isinstance(given, int):
        given = tuple(map(str, range(given)))
    if isinstance(given, str):
        raise DataError(f"classes {given!r} is one text: give a list of names")
    if given is not None:
        names = tuple(map(str, given))
    else:
        names = tuple(map(str, stated if isinstance(stated, (tuple, list)) else range(count)))
    if count > len(names) or len(names) < 2:
        raise DataError(f"there are {len(names)} class names, and labels from 0 to {count - 1}: name 2 classes or more")
    untrained = sorted({*labels[1].tolist()} - {*labels[0].tolist()})
    if untrained:
        raise DataError(f"class {names[untrained[0]]!r} has validation images and none to train on: add some")
    return names


def _hub_names(dataset: Any) -> Any:
    """The class names that a Hugging Face data set states among its features."""
    features = getattr(dataset, "features", None)
    found = [features[key] for key in LABEL_KEYS if key in features] if isinstance(features, Mapping) else []
    return getattr(found[0], "names", None) if found else None


def _count(parts: Any) -> str:
    return f" of {len(parts)}" if isinstance(parts, (tuple, list)) else ""


def _listed(shapes: Any) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in sorted(shapes))


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)
