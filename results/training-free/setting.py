"""What the scripts of this folder have in common: two models with their images, and losses that are computed once.

imagenet: timm's vit_tiny_patch16_224 and a folder with one sub-folder of pictures for each of the 1,000 classes, in the
order of their synsets; of the 1,000 images a split takes 300 to search and 700 to test.
eurosat, eurosat-224: the same model at 112 and 224 pixels, tuned on 3,200 of 4,000 training images (see README.md); the
other 800 are there to search, and the 1,000 test images to test, with --more-test further ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from poolshare.search.counts import MICRONATS
from poolshare.search.losses import ImageLosses, image_losses
from poolshare.space import Architecture, SearchSpace
from poolshare.space.presets import UNTRAINED, even_levels
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.data import ImageFormat, Place, open_data

MODEL, DEPTH, WIDTH = "vit_tiny_patch16_224", 12, 192
SIDE = {"imagenet": 224, "eurosat": 112, "eurosat-224": 224}
SEARCHED = {"imagenet": 300, "eurosat": 800, "eurosat-224": 800}  # images; the others are for testing
LEVELS = {"imagenet": tuple(range(196, 15, -12)), "eurosat": even_levels(49), "eurosat-224": tuple(range(196, 15, -12))}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SIDE)
    parser.add_argument("folder", type=Path, metavar="IMAGES")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument("--work", type=Path, default=Path("runs/training-free"), help="decoded images, losses so far")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--more-test", type=Path, metavar="FOLDER", help="of EuroSAT: a folder of classes, tested on too"
    )
    parser.add_argument("--operators", nargs="+", default=UNTRAINED)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--loss", default="divergence", choices=("divergence", "cross-entropy"))
    parser.add_argument("--searched", type=int, help="of the images to search with; default: all of them")
    parser.add_argument("--tested", type=int, help="of the images to test with; default: all of them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=25)
    return parser


@dataclass
class Setting:
    """A model's weights and images, in a fixed order: (n, 3, side, side) and (n,)."""

    options: argparse.Namespace
    images: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def open(cls, options: argparse.Namespace) -> Setting:
        """Decode the images, or take them from an earlier call."""
        options.work.mkdir(exist_ok=True, parents=True)
        cache = options.work / f"{options.setting}.pt"
        if not cache.exists():
            side = SIDE[options.setting]
            torch.save(_imagenet(options.folder) if options.setting == "imagenet" else _eurosat(options, side), cache)
        return cls(options, *torch.load(cache, weights_only=True, mmap=True))

    @property
    def patches(self) -> int:
        """Of an image."""
        return (SIDE[self.options.setting] // 16) ** 2

    def space(self) -> SearchSpace:
        """The one that is searched."""
        return SearchSpace(DEPTH, LEVELS[self.options.setting], tuple(self.options.operators), 1, has_cls=True)

    def places(self, split: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the images to search with, and of those to test with."""
        count, searched = len(self.labels), SEARCHED[self.options.setting]
        if self.options.setting == "imagenet":
            order = np.random.default_rng(split).permutation(count)
        else:
            order = np.r_[np.random.default_rng(split).permutation(searched), searched:count]
        return order[:searched][: self.options.searched], order[searched:][: self.options.tested]


def _imagenet(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    half = (0.5, 0.5, 0.5)
    transform = create_transform((3, 224, 224), mean=half, std=half, interpolation="bicubic", crop_pct=0.9)
    data = ImageFolder(str(folder), transform)
    order = np.random.default_rng(0).permutation(len(data))
    labels = torch.tensor([data.targets[index] for index in order])
    return torch.stack([data[index][0] for index in order]), labels


def _eurosat(options: argparse.Namespace, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Those that `poolshare search` sets aside with seed 0, then the test images; as its tuning saw images."""
    half = (0.5, 0.5, 0.5)
    form = ImageFormat((side, side), 3, half, half, "bicubic", 0.9)
    data = open_data(Place(str(options.folder)), form, search_fraction=0.2, check=())
    batches = [batch for split in ("search", "test") for batch in data.eval_loader(split, 100)]
    if options.more_test:
        transform = create_transform(
            (3, side, side), mean=half, std=half, interpolation="bicubic", crop_pct=form.crop_pct
        )
        batches += DataLoader(ImageFolder(str(options.more_test), transform), 100)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


class Losses:
    """Losses of architectures on images, each computed once; kept in a file, so a stopped script goes on."""

    def __init__(self, setting: Setting):
        self.setting, self.options = setting, setting.options
        self.path = self.options.work / f"{self.options.setting}-{self.options.loss}.npz"
        self.loss: dict[str, np.ndarray] = {}  # micronats; -1 where it is not known
        self.right: dict[str, np.ndarray] = {}
        if self.path.exists():
            with np.load(self.path) as kept:
                for name, loss, right in zip(kept["names"], kept["loss"], kept["right"], strict=True):
                    self.loss[str(name)], self.right[str(name)] = loss, right

    def add(self, architectures: Sequence[Architecture], places: np.ndarray, found: ImageLosses) -> None:
        """Remember and save what a walk found."""
        for row, name in enumerate(map(str, architectures)):
            self.loss.setdefault(name, np.full(len(self.setting.labels), -1, np.int64))[places] = found.loss[row]
            self.right.setdefault(name, np.zeros(len(self.setting.labels), bool))[places] = found.right[row]
        names = list(self.loss)
        part = self.path.with_suffix(".part.npz")
        np.savez(part, names=names, loss=[self.loss[n] for n in names], right=[self.right[n] for n in names])
        part.rename(self.path)

    def of(self, architectures: Sequence[Architecture], places: np.ndarray) -> ImageLosses:
        """What is known already."""
        names = list(map(str, architectures))
        return ImageLosses(
            np.stack([self.loss[n][places] for n in names]), np.stack([self.right[n][places] for n in names])
        )

    def lacking(self, architecture: Architecture, places: np.ndarray) -> np.ndarray:
        """The places where it was not scored yet."""
        known = self.loss.get(str(architecture))
        return places if known is None else places[known[places] < 0]


def make_net(setting: Setting, space: SearchSpace) -> SuperNet:
    """With random weights."""
    side, classes = SIDE[setting.options.setting], int(setting.labels.max()) + 1
    return SuperNet.from_timm(MODEL, space, img_size=side, num_classes=classes)


class Scorer:
    """Losses of a space's architectures on images, named by their places; costs in MACs."""

    def __init__(self, space: SearchSpace, setting: Setting, losses: Losses):
        self.setting, self.losses, self.options = setting, losses, setting.options
        self.net = make_net(setting, space)
        self.net.load_state_dict(self.net.state_dict() | load_file(self.options.weights))
        self.costs = measure_macs(self.net)
        self.net.to(self.options.device)

    def __call__(self, architectures: Sequence[Architecture], places: np.ndarray) -> ImageLosses:
        groups: dict[bytes, list[Architecture]] = {}
        for architecture in dict.fromkeys(architectures):
            lacking = self.losses.lacking(architecture, places)
            if len(lacking):
                groups.setdefault(lacking.tobytes(), []).append(architecture)
        for key, group in groups.items():
            lacking = np.frombuffer(key, places.dtype)
            parts = torch.from_numpy(lacking.copy()).split(self.options.batch)
            batches = [(self.setting.images[part], self.setting.labels[part]) for part in parts]
            self.losses.add(group, lacking, image_losses(self.net, group, batches, loss=self.options.loss))
        return self.losses.of(architectures, places)


def nats(losses: ImageLosses) -> np.ndarray:
    """Mean loss of each architecture."""
    return losses.loss.mean(1) / MICRONATS
