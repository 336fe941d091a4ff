"""Image files as they are meant to be seen: upright, on white where they are transparent, 8 bits per channel."""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from poolshare.space.errors import BrokenDataError, DataError
from poolshare.space.processes import usable_cores

PIXELS_VARIABLE = "POOLSHARE_MAX_PIXELS"  # unset: Pillow's own limit, 179 million
PILLOWS_PIXELS = Image.MAX_IMAGE_PIXELS
IGNORED = -100  # the class of a pixel that counts for nothing: what torch's losses leave out
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of Pillow's, those with one whole number per pixel
_ORIENTATION = 0x0112  # of EXIF; 1 is upright

Progress = Callable[[int, int], None]  # images done, images in all


class Store(Protocol):
    """Image files that lie together. key: what they are remembered by. names: of the files, among themselves."""

    @property
    def key(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    def place(self, index: int) -> str:
        """Where a file is, for messages."""

    def content(self, index: int) -> bytes:
        """The bytes of a file. Raises OSError."""


@dataclass(frozen=True, eq=False)
class Folder:
    """Files by their paths below `root`; whole paths are put together when they are asked for: a million take much memory."""

    root: str
    names: Sequence[str]

    @property
    def key(self) -> str:
        return os.path.realpath(self.root)

    def place(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def content(self, index: int) -> bytes:
        with open(self.place(index), "rb") as file:
            return file.read()


class Files(Sequence[tuple[str]]):
    """Image files of several stores, one after the other; where each is, as (place,), by its index."""

    def __init__(self, *parts: Store) -> None:
        self.parts = parts
        self.starts = [0, *accumulate(len(part.names) for part in parts)]

    def __add__(self, other: Files) -> Files:
        return Files(*self.parts, *other.parts)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Any) -> Any:
        part, position = self._find(index)
        return (part.place(position),)

    def content(self, index: int) -> bytes:
        """The bytes of a file. Raises OSError."""
        part, position = self._find(index)
        return part.content(position)

    def _find(self, index: int) -> tuple[Store, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.starts, index) - 1
        return self.parts[number], index - self.starts[number]


@dataclass(frozen=True, eq=False)
class Images:
    """Reads the images of `items`, by index, each upright, on white and with 8 bits per channel.

    items: `Files`; or a path, an open file or an image at [index][0]. name: of the data, for messages.
    scale_16bit: scale 16-bit grey images to 8 bits, 65,535 to white; otherwise they are refused, since how
    many of the bits they use is unknown.
    """

    items: Any
    name: str
    scale_16bit: bool = False
    remedy: ClassVar[str] = "replace or remove them"  # where some are broken

    @property
    def how(self) -> tuple[object, ...]:
        """What decides, beside the files, whether they can be used."""
        return (self.scale_16bit,)

    def joined(self, other: Self) -> Self:
        """The images of both, as files, the other's after these."""
        return replace(self, items=self.items + other.items)

    def __call__(self, index: int) -> Any:
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Any, bytes]:
        """The image, and the bytes of its file where the items are `Files`.

        Raises BrokenDataError for what cannot be decoded.
        """
        item, content = None, b""
        try:
            item = opened = self.items[index][0]
            if isinstance(self.items, Files):
                content = self.items.content(index)
                opened = io.BytesIO(content)
            _set_limit()
            with item if isinstance(item, Image.Image) else Image.open(opened) as image:
                image.load()
                return as_seen(image, self.scale_16bit), content
        except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error …
            reason = _reason(error, item)
        where = repr(item) if isinstance(item, str) else f"{self.name}, image {index}"
        raise BrokenDataError(f"cannot read {where} ({reason})")


@dataclass(frozen=True, eq=False)
class Pairs(Images):
    """Reads images and, for each, its mask: (H, W) int64, the class of each pixel, or IGNORED.

    masks: their files, by the same indices. classes: how many there are; an index from there on is a fault. ignore_index:
    the value of pixels that count for nothing. table: (classes,) what each index is called by a model that has others.
    """

    masks: Any = None
    ignore_index: int = 255
    classes: int = 0
    table: np.ndarray | None = None
    remedy: ClassVar[str] = (
        "mend them: a mask is a PNG of its image's size that holds the class index of each pixel, 0, 1, 2 …, or "
        "--ignore-index; of colours make indices, as in Image.fromarray((colours[:, None, None] == mask[None])"
        ".all(-1).argmax(0).astype('uint8')) with colours (classes, 3) and mask (H, W, 3)"
    )

    @property
    def how(self) -> tuple[object, ...]:
        return (*super().how, "masks", self.classes, self.ignore_index)

    def joined(self, other: Self) -> Self:
        return replace(super().joined(other), masks=self.masks + other.masks)

    def relabelled(self, indices: Sequence[int]) -> Self:
        """The same under the classes of a model, of which class i of these is the one at `indices[i]`."""
        table = np.asarray(indices, dtype=np.int64)
        return replace(self, table=table if self.table is None else table[self.table])

    def read(self, index: int) -> tuple[tuple[Image.Image, np.ndarray], bytes]:
        """Image and mask, and the bytes of both files. Raises BrokenDataError for what cannot be decoded or used."""
        image, content = super().read(index)
        path = self.masks[index][0]
        mask, of_mask = _read_mask(path)
        ignored = mask == self.ignore_index
        labelled = mask[~ignored]
        fault = ""
        if mask.shape != (image.height, image.width):
            fault = f"{mask.shape[1]}×{mask.shape[0]} pixels, its image has {image.width}×{image.height}"
        elif not len(labelled):
            fault = f"all of its pixels are ignored, being {self.ignore_index}"
        elif labelled.min() < 0 or labelled.max() >= self.classes:
            value = labelled.min() if labelled.min() < 0 else labelled.max()
            fault = f"it holds {value}, which is neither one of the {self.classes} classes 0 to {self.classes - 1} nor ignored"
        if fault:
            raise BrokenDataError(f"cannot read {path!r} ({fault})")
        mask[ignored] = 0
        mask = mask if self.table is None else self.table[mask]
        mask[ignored] = IGNORED
        return (image, mask), content + of_mask

    def highest(self, index: int) -> int:
        """The highest class index in a mask; −1 where all is ignored."""
        mask, _ = _read_mask(self.masks[index][0])
        return int(mask[mask != self.ignore_index].max(initial=-1))


def _read_mask(path: str) -> tuple[np.ndarray, bytes]:
    """The values of a mask, (H, W) int64, and the bytes of its file. Raises BrokenDataError for colours."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        _set_limit()
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "JPEG":
                raise DataError("a JPEG, which changes values: save masks as PNG")
            if image.mode not in INDEX_MODES:
                raise DataError(f"colours, mode {image.mode}, in place of class indices")
            return np.array(image, dtype=np.int64), content
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error …
        reason = _reason(error, path)
    raise BrokenDataError(f"cannot read {path!r} ({reason})")


def as_seen(image: Image.Image, scale_16bit: bool = False) -> Image.Image:
    """The decoded image turned as its EXIF orientation says, put on white where it is transparent, with 8 bits per channel.

    Raises DataError for values that do not fit into 8 bits.
    """
    if image.mode.startswith("I;16") and scale_16bit:
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode.startswith(("I", "F")):
        remedy = ", or search with --scale-16bit" if image.mode.startswith("I;16") else ""
        raise DataError(f"mode {image.mode}, whose values would be clipped: save with 8 bits per channel{remedy}")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(coloured)
        image = white.convert("L" if image.mode in ("L", "LA", "La") else "RGB")
    return image


def _set_limit() -> None:
    """Have Pillow refuse images of more pixels than the user's limit, or than its own where there is none."""
    text = os.environ.get(PIXELS_VARIABLE)
    if text is not None and (not text.isdecimal() or int(text) < 2):
        raise DataError(f"{PIXELS_VARIABLE}={text!r} is not a number of pixels")
    # Where it warns; it refuses twice as many.
    Image.MAX_IMAGE_PIXELS = PILLOWS_PIXELS if text is None else int(text) // 2


def _reason(error: Exception, item: Any) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels: set {PIXELS_VARIABLE}=N to allow N"
    if isinstance(error, FileNotFoundError) and isinstance(item, str) and os.path.islink(item):
        return f"a link to {os.readlink(item)!r}, which is not there"
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__


def advance(progress: Progress, before: int, total: int, done: int) -> None:
    """Show the progress of a part, before which others were done."""
    progress(before + done, total)


@dataclass(frozen=True, eq=False)
class _Looks(Dataset):
    """Of each image at `indices` the digest of its file's contents and "", or 0 and what is wrong with it."""

    read: Images
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, str]:
        try:
            return digest(self.read.read(int(self.indices[position]))[1]), ""
        except BrokenDataError as error:
            return 0, str(error).removeprefix("cannot read ")


FEW = 512  # images that are not worth a process


def check_images(
    read: Images, indices: np.ndarray, progress: Callable[[int], None] | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode the images at `indices` once: digests of their files' contents, (n,) uint64, and what is broken.

    Many are shared among as many processes as there are cores.
    The broken ones are messages by index, which name the file and say why; their digest is 0.
    """
    processes = 0 if len(indices) < FEW else usable_cores()
    digests, broken = np.zeros(len(indices), dtype=np.uint64), dict[int, str]()
    looks, generator = _Looks(read, indices), torch.Generator()  # a loader would draw from the global one
    loader = DataLoader(looks, 64, num_workers=processes, collate_fn=list, generator=generator)
    if progress:
        progress(0)
    position = 0
    for part in loader:
        for found, message in part:
            digests[position] = found
            if message:
                broken[int(indices[position])] = message
            position += 1
        if progress:
            progress(position)
    return digests, broken


def digest(content: bytes) -> int:
    """A hash of some bytes, 64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) or 1
