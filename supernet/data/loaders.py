"""Loaders given in Python, as splits: their batches are the user's own, whatever batch size is asked for.

What is random in them is keyed by (seed, epoch, step), so that a stopped training continues with the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from poolshare.space.errors import DataError

from ..tasks.task import Targets
from . import samples
from .sources import Source, Split
from .splits import Anew, Batches, Data
from .transforms import keyed_generators

_EPOCH = 29  # sets a loader's draws apart from others of the same seed


@dataclass(eq=False)
class LoaderData(Data):
    """Splits whose batches are the user's own loaders'; the methods' `batch_size` has no effect on training."""

    loaders: dict[str, DataLoader] = field(kw_only=True, repr=False)
    sizes: tuple[int, ...] = field(kw_only=True)  # images of its training batches, each number once, rising
    places: tuple[int, ...] | None = field(default=None, kw_only=True)  # of the loaders' labels among `classes`
    targets: Targets = field(default="class", kw_only=True)

    def relabelled(self, classes: Sequence[str], indices: Sequence[int]) -> Data:
        """The same under the classes of a model; the loaders' labels are translated as they come."""
        data = super().relabelled(classes, indices)
        assert isinstance(data, LoaderData)
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
        epochs: int = 1,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin: bool = False,
    ) -> Batches:
        """Epochs of the user's training loader, which has workers of its own; each rank takes its share of every batch."""
        for images in self.sizes:
            _check_share(images, world_size)
        parts = [
            self._epoch("train", (self.seed, _EPOCH, now), start_step if now == epoch else 0, rank, world_size)
            for now in range(epoch, epoch + epochs)
        ]
        return Anew(lambda: chain.from_iterable(parts), sum(map(len, parts)))

    def eval_share(self, split: str, batch_size: int, rank: int, world_size: int, *, workers: int = 0) -> Batches:
        """Every so manieth batch; the loader gives no ranges, so each process draws them all."""
        batches = self.eval_loader(split, batch_size, workers=workers)
        count = len(range(rank, len(batches), world_size))
        return Anew(lambda: islice(batches, rank, None, world_size), count)

    def _batches(self, split: str, batch_size: int, workers: int, start: int = 0, stop: int | None = None) -> Batches:
        if (start, stop) != (0, None):
            raise DataError(f"{self.name} came as loaders, which give no range of their images: give Datasets")
        if split not in self.loaders:
            raise DataError(f"no loader of {split} images was given for {self.name}")
        return self._epoch(split, (self.seed, _EPOCH))

    def _epoch(self, split: str, key: tuple[int, ...], start: int = 0, rank: int = 0, world_size: int = 1) -> _Epoch:
        translate = partial(_translated, self.places, len(self.classes)) if self.places and self.labelled else None
        return _Epoch(self.loaders[split], split, key, start, rank, world_size, self.targets, translate)


@dataclass(frozen=True, eq=False)
class _Epoch:
    """One pass over a loader from `start` on; what comes before is drawn too, so that the rest is the same."""

    loader: DataLoader
    where: str  # train or search
    key: tuple[int, ...]
    start: int = 0
    rank: int = 0
    world_size: int = 1
    targets: Targets = "class"
    translate: Callable[[Tensor], Tensor] | None = None  # the loader's labels to the model's; None: they are the same

    def __len__(self) -> int:
        return len(self.loader) - self.start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader, steps = self.loader, len(self.loader)
        seed = int(np.random.SeedSequence(self.key).generate_state(1)[0])
        with _seeded(_generators(loader), seed):
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
                images, labels = _batch(batch, f"batch {step} of the {self.where} loader", self.targets)
                _check_share(len(images), self.world_size)  # other epochs may have other batches than the first
                share = len(images) // self.world_size
                mine = slice(self.rank * share, (self.rank + 1) * share)
                labels = labels[mine].to(torch.uint8 if self.targets == "classes" else torch.int64)
                yield images[mine].float(), labels if self.translate is None else self.translate(labels)


def _translated(places: tuple[int, ...], classes: int, labels: Tensor) -> Tensor:
    """Labels under the names of a model: class i of the loader is its class `places[i]`, of so many."""
    if labels.ndim == 1:
        return torch.tensor(places)[labels]
    found = labels.new_zeros(len(labels), classes)
    found[:, list(places)] = labels
    return found


def _generators(loader: DataLoader) -> list[torch.Generator]:
    """Those that a loader and its samplers draw from, each once."""
    holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


@contextmanager
def _seeded(generators: Sequence[torch.Generator], seed: int) -> Iterator[None]:
    """Have the user's generators draw from `seed`; afterwards they are where they were."""
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def read_loader(
    loader: DataLoader, where: str, seed: int, progress: Callable[[int], None] | None, targets: Targets
) -> samples.Part:
    """Labels in the order of the first epoch, so that another sampler shows in the fingerprint."""
    labels: list[Tensor] = []
    digests: list[int] = []
    shapes: set[tuple[int, ...]] = set()
    epoch = _Epoch(loader, where, (seed, _EPOCH, 0) if where == "train" else (seed, _EPOCH), targets=targets)
    for index, (images, some) in enumerate(epoch):
        if problem := samples.not_finite_fault(images):
            raise DataError(f"batch {index} of the {where} loader cannot be used ({problem})")
        labels.append(some)
        digests += map(samples.image_digest, images)
        shapes.add(tuple(images.shape[1:]))
        if progress:
            progress(sum(map(len, labels)))
    if len(shapes) != 1:
        raise DataError(
            f"images of the {where} loader differ in size ({samples.listed(shapes)}): resize and crop all alike"
        )
    together = torch.cat(labels).numpy()
    if (together < 0).any():
        raise DataError(f"the {where} loader gives label {together.min()}: labels are class indices, 0, 1, 2 …")
    again = list(map(samples.image_digest, next(iter(epoch))[0]))
    repeatable = again == digests[: len(again)]
    source = Source(not_one_by_one, together, digests=samples.digest_column(digests, repeatable))
    sizes = tuple(sorted({*map(len, labels)}))
    return samples.Part(Split(source, np.arange(len(together))), shapes.pop(), repeatable, sizes)


def _batch(batch: Any, which: str, targets: Targets) -> tuple[Tensor, Tensor]:
    """Images (B, channels, H, W) and labels (B,) of a loader's batch, as they are. Raises DataError for anything else."""
    try:
        images, labels = samples.pair(batch, targets)
    except DataError as error:
        raise DataError(f"{which} cannot be used ({error})") from None
    problem = samples.image_fault(images, 4)
    if problem and isinstance(images, Tensor) and images.ndim == 3:
        problem += "; give the loader a batch_size"
    if not problem and targets == "classes":
        if samples.hot_fault(labels, 2) or len(labels) != len(images):
            problem = f"its labels are {samples.described(labels)}, and must be a 0 or 1 for each image and class"
    elif not problem and (
        not isinstance(labels, Tensor) or labels.shape != (len(images),) or not samples.whole_numbers(labels)
    ):
        problem = f"its labels are {samples.described(labels)}, and must be class indices of shape ({len(images)},)"
    if problem:
        raise DataError(f"{which} cannot be used ({problem})")
    return images, labels


def not_one_by_one(index: int) -> Any:
    """Reads of loaders are refused."""
    raise DataError("images of a loader cannot be read one by one: give a Dataset")


def _check_share(images: int, processes: int) -> None:
    if images % processes:
        raise DataError(
            f"a batch of {images} images cannot be shared equally among {processes} processes: give a "
            f"loader with drop_last=True whose batch size is a multiple of {processes}"
        )


def loader_batch(data: Any) -> int | None:
    """Images of one training batch, where the data were given as loaders."""
    return data.sizes[-1] if isinstance(data, LoaderData) else None
