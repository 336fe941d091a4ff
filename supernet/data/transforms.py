"""What an image becomes before a model sees it: varied as a key says in training, always the same in evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import v2

from poolshare.space.errors import DataError

Draw = tuple[int, ...] | None  # what keys an image's augmentation; None: as evaluation sees it
# What a source reads → (C, H, W); of an image with its mask also (H, W) int64. May seed the global generators.
Prepare = Callable[[Any, Draw], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ImageFormat:
    """What images a model takes, in timm's terms. img_size: pixels, of both sides or (H, W)."""

    img_size: int | tuple[int, int]
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"
    crop_pct: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def statistics(self) -> tuple[tuple[float, ...], ...]:
        """Mean and standard deviation, one value per channel. Raises DataError for another number of them."""
        found, in_chans = [], self.in_chans
        for what, values in (("mean", self.mean), ("std", self.std)):
            if in_chans == 1 and len(values) == 3:  # timm keeps the three values of a colour model made grey
                values = (sum(values) / 3,)
            if len(values) not in (1, in_chans):
                raise DataError(f"{what} {tuple(values)} does not fit in_chans {in_chans}: give one value per channel")
            found.append(tuple(values) * (in_chans // len(values)))
        return tuple(found)


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
    def none(cls) -> Augmentation:
        """Training images exactly as evaluation sees them."""
        return cls(hflip=0, scale=(1, 1), color_jitter=0, auto_augment=None, re_prob=0, shift=0)


DEFAULT_AUGMENTATION = Augmentation()


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leave the three global generators that timm's transforms draw from afterwards as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - RandAugment draws there
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def seed_generators(*key: int) -> None:
    """Seed these three from `key`; a tenth of the time that keeping them takes."""
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would reach the accelerators too


@contextmanager
def keyed_generators(*key: int) -> Iterator[None]:
    """Have these three draw from `key`, and leave them as they were."""
    with kept_generators():
        seed_generators(*key)
        yield


def digits_transform(images: ImageFormat, shift: int) -> Prepare:
    """For the digits, shifted by up to `shift` pixels in training. Raises DataError for another size than theirs."""
    means, stds = images.statistics
    if images.size != (8, 8):
        raise DataError(
            f"the digits are 8×8 pixels, img_size is {images.size}: take a model made for 8×8, or other data"
        )
    mean_column, std_column = (torch.tensor(values).view(-1, 1, 1) for values in (means, stds))
    return _Digits(mean_column, std_column, shift)


def picture_transform(images: ImageFormat, augmentation: Augmentation) -> Prepare:
    """For pictures, by timm's transforms; in training they vary by `augmentation`, from global generators seeded by the key.

    Raises DataError for means that do not fit the channels, or names that timm does not know.
    """
    means, stds = images.statistics
    options: dict[str, Any] = {"input_size": images.size, "mean": means, "std": stds, "crop_pct": images.crop_pct}
    options |= {"interpolation": images.interpolation}
    try:
        train = evaluate = create_transform(**options)
        if augmentation != Augmentation.none():
            train = create_transform(
                **options,
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
            f"timm has no transforms of interpolation {images.interpolation!r} and auto_augment "
            f"{augmentation.auto_augment!r} ({error}): take for instance 'bicubic' and 'rand-m9-mstd0.5'"
        ) from error
    return _Pictures("RGB" if images.in_chans == 3 else "L", train, evaluate)


@dataclass(frozen=True, eq=False)
class _Pictures:
    """PIL image to (C, H, W) by timm's transforms, the training one keyed."""

    mode: str
    train: Callable[[Image.Image], Tensor]
    evaluate: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image, draw: Draw) -> Tensor:
        image = image if image.mode == self.mode else image.convert(self.mode)  # which would copy it
        if draw is None:
            return self.evaluate(image)
        seed_generators(*draw)
        return self.train(image)


def mask_transform(images: ImageFormat, augmentation: Augmentation) -> Prepare:
    """For images with masks, by torchvision's v2 transforms, which treat both alike; whole images in evaluation.

    Of `augmentation` crops keep the shape of the images, within a third; colours change in the image alone. Masks take the
    nearest pixel. Raises DataError for policies, which know nothing of masks.
    """
    means, stds = images.statistics
    if augmentation.auto_augment is not None:
        raise DataError(
            f"auto_augment {augmentation.auto_augment!r} would move the image and not its mask: leave it out where there are "
            "masks, and vary hflip, crop_scale, color_jitter and re_prob"
        )
    modes = {mode.value: mode for mode in v2.InterpolationMode}
    if images.interpolation not in modes:
        raise DataError(f"torchvision has no interpolation {images.interpolation!r}: take for instance 'bicubic'")
    mode, (height, width) = modes[images.interpolation], images.size
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(means, stds)]
    evaluate = v2.Compose([v2.Resize(images.size, mode), *to_tensor])
    train = evaluate
    if augmentation != Augmentation.none():
        shape, jitter = width / height, augmentation.color_jitter
        train = v2.Compose(
            [
                v2.RandomResizedCrop(images.size, augmentation.scale, (shape * 3 / 4, shape * 4 / 3), mode),
                v2.RandomHorizontalFlip(augmentation.hflip),
                *([v2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
                *to_tensor,
                *([v2.RandomErasing(augmentation.re_prob)] if augmentation.re_prob else []),
            ]
        )
    return _Masked("RGB" if images.in_chans == 3 else "L", train, evaluate)


@dataclass(frozen=True, eq=False)
class _Masked:
    """PIL image and (H, W) classes → (C, H, W) and (H, W), by v2 transforms, the training one keyed.

    An image without a mask is one of evaluation, → (C, H, W).
    """

    mode: str
    train: Callable[..., Any]
    evaluate: Callable[..., Any]

    def __call__(self, pair: Any, draw: Draw) -> Tensor | tuple[Tensor, Tensor]:
        if not isinstance(pair, tuple):
            return self.evaluate(pair.convert(self.mode)).as_subclass(Tensor)  # type: ignore[no-any-return]
        image, mask = pair[0].convert(self.mode), tv_tensors.Mask(torch.from_numpy(pair[1]))
        if draw is None:
            image, mask = self.evaluate(image, mask)
        else:
            seed_generators(*draw)
            image, mask = self.train(image, mask)
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


@dataclass(frozen=True, eq=False)
class _Digits:
    """(8, 8) values from 0 to 16 to (C, 8, 8), shifted in training; mean and std are (C, 1, 1)."""

    mean: Tensor
    std: Tensor
    shift: int

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        if draw is not None and self.shift:
            top, left = np.random.default_rng(draw).integers(0, 2 * self.shift + 1, size=2).tolist()
            image = pad(image, (self.shift,) * 4)[top : top + 8, left : left + 8]
        return (image / 16 - self.mean) / self.std


def _keep_a_bit(transforms: Any) -> None:
    """timm's posterize can ask for 0 bits, "rand-m9-mstd0.5-inc1" does; newer Pillows refuse: make it 1."""
    for step in transforms.transforms:
        policy = getattr(step, "ops", None) or [op for pair in getattr(step, "policy", ()) for op in pair]
        for op in policy:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    return posterize(image, max(bits, 1), **options)
