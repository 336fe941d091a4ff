"""Splits that share out everything, loaders against each other and against timm."""

import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opened import open_data
from PIL import Image
from sklearn.datasets import load_digits
from test_sources import write_digits
from timm.data import ImageDataset, create_transform

import poolshare.supernet.data.formats.named as named
import poolshare.supernet.data.splits as module
from poolshare.space.errors import BrokenDataError, DataError
from poolshare.supernet.data.transforms import Augmentation, keyed_generators

DIGITS: dict[str, Any] = {"img_size": 8, "in_chans": 1, "mean": (0.3,), "std": (0.4,)}
GREY: dict[str, Any] = {"img_size": 16, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}
COLOUR: dict[str, Any] = {"img_size": 32, "in_chans": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
STRONG = Augmentation(auto_augment="rand-m9-mstd0.5", re_prob=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("flat"), per_class=20)


@pytest.fixture(scope="module")
def real_data():
    root = os.environ.get("POOLSHARE_DATA", "")
    if not (Path(root, "eurosat").is_dir() and Path(root, "FashionMNIST").is_dir()):
        pytest.skip("POOLSHARE_DATA does not name a folder with eurosat/ and FashionMNIST/")
    return root


def gather(batches):
    batches = list(batches)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(gather(one), gather(other), strict=True))


# Splits


def test_digits_splits_are_disjoint_and_hold_everything():
    data = open_data("digits", **DIGITS)
    parts = {name: data.split(name) for name in ("train", "search", "test", "train_full")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1006,
        "search": 251,
        "test": 540,
        "train_full": 1257,
    }
    assert sorted([*parts["train"].indices, *parts["search"].indices]) == parts["train_full"].indices.tolist()
    everything = [
        (part.source.read(int(index)).flatten().tolist(), int(label))
        for part in (parts["train"], parts["search"], parts["test"])
        for index, label in zip(part.indices, part.labels, strict=True)
    ]
    images, labels = load_digits(return_X_y=True)
    assert sorted(everything) == sorted(zip(images.tolist(), labels.tolist(), strict=True))
    per_class = np.bincount(labels) * 540 / 1797
    assert (abs(np.bincount(parts["test"].labels) - per_class) < 1).all()


def test_the_seed_moves_search_but_not_the_digits_test_split():
    one, other = open_data("digits", **DIGITS), open_data("digits", **DIGITS, seed=1)
    assert same(one.eval_loader("test", 100), other.eval_loader("test", 100))
    assert one.split("search").indices.tolist() != other.split("search").indices.tolist()
    again = open_data("digits", **DIGITS)
    assert one.split("search").indices.tolist() == again.split("search").indices.tolist()


def test_a_folder_without_test_images_has_some_carved(folder):
    data = open_data(str(folder), **GREY, test_fraction=0.1, search_fraction=0.5)
    counts = {name: np.bincount(data.split(name).labels).tolist() for name in ("test", "search", "train")}
    assert counts == {"test": [2] * 10, "search": [9] * 10, "train": [9] * 10}
    indices = [data.split(name).indices for name in ("train", "search", "test")]
    assert sorted(np.concatenate(indices)) == list(range(200))
    (note,) = data.notes
    assert "20 of its 200 images" in note
    assert "seed 0" in note
    other = open_data(str(folder), **GREY, test_fraction=0.1, seed=3)
    assert other.split("test").indices.tolist() != data.split("test").indices.tolist()


# Images


def test_digits_are_divided_by_16_and_normalised():
    data = open_data("digits", **{**DIGITS, "in_chans": 3, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    images, _ = gather(data.eval_loader("test", 64))
    raw = torch.stack([data.split("test").source.read(index) for index in range(540)])
    for channel, (mean, std) in enumerate(((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))):
        torch.testing.assert_close(images[:, channel], (raw / 16 - mean) / std)


def test_digits_are_shifted_by_at_most_one_pixel_with_zeros():
    raw = {**DIGITS, "mean": (0.0,), "std": (1 / 16,)}
    shifted = gather(open_data("digits", **raw).train_loader(0, 64))[0]
    plain = gather(open_data("digits", **raw, augmentation=Augmentation.none()).train_loader(0, 64))[0]
    moves = []
    for before, after in zip(np.pad(plain[:, 0], ((0, 0), (1, 1), (1, 1))), shifted[:, 0].numpy(), strict=True):
        windows = {(top, left): before[top : top + 8, left : left + 8] for top in range(3) for left in range(3)}
        moves.append([move for move, window in windows.items() if np.array_equal(window, after)])
    assert all(moves)
    assert len({move for (move,) in moves}) == 9


def test_colour_and_grey_are_converted(tmp_path, folder):
    grey = open_data(str(folder), **{**COLOUR, "mean": (0.0,), "std": (1.0,)})
    images, _ = gather(grey.eval_loader("test", 50))
    assert torch.equal(images[:, 0], images[:, 2])
    for name, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / f"{number}.png")
    data = open_data(str(tmp_path), img_size=16, in_chans=1, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.75))
    images, labels = gather(data.eval_loader("test", 50))
    for image, label in zip(images, labels, strict=True):
        grey_value = np.asarray(Image.new("RGB", (1, 1), [(10, 10, 200), (200, 10, 10)][label]).convert("L"))[0, 0]
        torch.testing.assert_close(image, torch.full((1, 16, 16), (grey_value / 255 - 0.5) / 0.5))


def test_eurosat_looks_as_timm_makes_it(real_data):
    root = Path(real_data, "eurosat")
    progress = []
    data = open_data(
        str(root), **COLOUR, interpolation="bicubic", crop_pct=0.9, progress=lambda *at: progress.append(at)
    )
    assert np.bincount(data.split("search").labels).tolist() == [80] * 10
    assert (len(data.split("train")), len(data.split("test")), data.notes) == (3200, 1000, ())
    assert progress[-1] == (4000, 4000)  # test images wait until they are asked for
    assert progress == sorted(progress)
    transform = create_transform(32, mean=COLOUR["mean"], std=COLOUR["std"], interpolation="bicubic", crop_pct=0.9)
    reference = ImageDataset(str(root / "test"), transform=transform)
    images, labels = gather(data.eval_loader("test", 256))
    for index in range(0, 1000, 37):
        image, label = reference[index]
        assert torch.equal(images[index], image)
        assert labels[index] == label


def test_fashion_mnist_by_timms_name_opens_test_last(real_data, monkeypatch):
    opened = []
    create = named.create_dataset

    def create_and_note(*args, **options):
        opened.append(options["split"])
        return create(*args, **options)

    monkeypatch.setattr(named, "create_dataset", create_and_note)
    data = open_data("torch/fashion_mnist", data_dir=real_data, **{**GREY, "img_size": 28})
    images, labels = next(iter(data.train_loader(0, 32)))
    assert (images.shape, images.dtype, labels.dtype) == ((32, 1, 28, 28), torch.float32, torch.int64)
    assert np.bincount(data.split("search").labels).tolist() == [1200] * 10
    assert opened == ["train"]
    assert len(data.split("test")) == 10000
    assert opened == ["train", "validation"]
    assert data.classes[0] == "T-shirt/top"


# Loaders


@pytest.fixture(params=["digits", "folder"])
def data(request, folder):
    if request.param == "digits":
        return open_data("digits", **DIGITS)
    return open_data(str(folder), **GREY, augmentation=STRONG)


def test_workers_change_nothing(data):
    for epoch in (0, 1):
        assert same(data.train_loader(epoch, 32), data.train_loader(epoch, 32, workers=2))
    assert same(data.eval_loader("search", 7), open_like(data).eval_loader("search", 7, workers=2))


def open_like(data):
    arguments = DIGITS if data.name == "digits" else {**GREY, "augmentation": STRONG}
    return open_data(data.name, **arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_is_the_rest_of_it(data, workers):
    whole = list(data.train_loader(3, 32))
    resumed = open_like(data).train_loader(3, 32, start_step=2, workers=workers)
    assert len(resumed) == len(whole) - 2
    assert same(whole[2:], resumed)


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_an_epoch_early_does_not_touch_the_next(data, workers):
    for _ in data.train_loader(0, 16, workers=workers):
        break
    assert same(data.train_loader(1, 16, workers=workers), open_like(data).train_loader(1, 16))


def test_two_epochs_can_be_read_side_by_side(data):
    pairs = list(zip(data.train_loader(0, 32, workers=1), data.train_loader(1, 32, workers=1), strict=True))
    assert same([one for one, _ in pairs], data.train_loader(0, 32))
    assert same([other for _, other in pairs], data.train_loader(1, 32))


def test_the_shares_of_the_ranks_make_up_the_batch(data):
    shares = [data.train_loader(2, 24, rank=rank, world_size=3, start_step=1) for rank in range(3)]
    whole = data.train_loader(2, 24, start_step=1)
    assert {len(share) for share in shares} == {len(whole)}
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert all(len(labels) == 8 for _, labels in parts)
        assert same(parts, [batch])


def test_an_epoch_takes_each_image_once_and_drops_the_short_batch(folder):
    data = open_data(str(folder), **GREY, augmentation=Augmentation.none(), search_fraction=0.25)
    part = data.split("train")  # 120 images
    as_evaluated = {tuple(image.flatten().tolist()) for image in gather(data.eval_loader("train", 64))[0]}
    orders = []
    for epoch in range(2):
        loader = data.train_loader(epoch, 50)
        assert [len(labels) for _, labels in loader] == [50] * len(loader) == [50, 50]
        images = [tuple(image.flatten().tolist()) for image in gather(data.train_loader(epoch, 40))[0]]
        assert len(images) == len(part) == 120
        assert set(images) == as_evaluated
        orders.append(images)
    assert orders[0] != orders[1]
    full = gather(data.full.train_loader(0, 10_000))[1]
    assert sorted(full.tolist()) == sorted(data.split("train_full").labels.tolist())


def seen(folder, epoch, batch_size, **options):
    """Pixels by the image's index, for one epoch of strong augmentation."""
    data = open_data(str(folder), **GREY, augmentation=STRONG, **options)
    loader: Any = data.train_loader(epoch, batch_size)
    pixels: dict[int, list[float]] = {}
    for (images, _), row in zip(loader, loader.rows, strict=True):
        pixels |= zip((index for index, _ in row), images.flatten(1).tolist(), strict=True)
    return pixels


def test_augmentation_depends_on_seed_epoch_and_image_alone(folder):
    first = seen(folder, 0, 8)
    assert seen(folder, 0, 64) == {index: first[index] for index in seen(folder, 0, 64)}
    assert all(pixels != first[index] for index, pixels in seen(folder, 1, 64).items())
    fewer = seen(folder, 0, 8, search_fraction=0.6)
    assert len(first.keys() & fewer.keys()) > 20
    assert all(first[index] == fewer[index] for index in first.keys() & fewer.keys())
    other_seed = seen(folder, 0, 8, seed=1)
    assert all(first[index] != other_seed[index] for index in first.keys() & other_seed.keys())


def test_the_key_sets_all_three_generators():
    def draw(*key):
        with keyed_generators(*key):
            return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    one = draw(1, 2)
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    assert draw(1, 2) == one
    assert all(a != b for a, b in zip(one, draw(1, 3), strict=True))


def test_the_global_generators_are_left_alone(data):
    def states():
        numpy_state: Any = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    gather(data.train_loader(0, 32))
    gather(data.train_loader(0, 32, workers=1))
    gather(data.eval_loader("search", 32))
    assert states() == before


def test_evaluation_is_in_order_whole_and_kept(data, monkeypatch):
    loader = data.eval_loader("search", 17)
    images, labels = gather(loader)
    assert labels.tolist() == data.split("search").labels.tolist()
    assert [len(one) for _, one in loader] == [17] * (len(labels) // 17) + [len(labels) % 17] * bool(len(labels) % 17)
    monkeypatch.setattr(module._Items, "__getitems__", lambda *_: pytest.fail("decoded twice"))
    assert same(data.eval_loader("search", 40), [(images, labels)])


def test_evaluation_of_a_large_split_is_streamed(data, monkeypatch):
    kept = data.eval_loader("search", 17)
    monkeypatch.setattr(module, "CACHE_BYTES", 100)
    streamed = open_like(data).eval_loader("search", 17)
    assert len(streamed) == len(kept)
    assert same(streamed, kept)
    assert same(streamed, kept)  # a second time


def test_pillow_takes_the_usual_randaugment(folder):
    policy = Augmentation(auto_augment="rand-m10-n4-inc1")  # asks for 0 bits whenever it posterizes
    data = open_data(str(folder), **GREY, augmentation=policy)
    images, _ = gather(data.train_loader(0, 32))
    assert images.isfinite().all()


# Bad input


def test_a_class_too_small_to_be_cut(tmp_path):
    for image in sorted((write_digits(tmp_path / "train", 3) / "3").iterdir())[1:]:
        image.unlink()
    with pytest.raises(DataError, match=r"test: too few images of class '3' \(1\)"):
        open_data(str(tmp_path), **GREY)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_later_stops_the_epoch(tmp_path, workers):
    data = open_data(str(write_digits(tmp_path, 5)), **GREY)
    read: Any = data.split("train").source.read
    victim = read.items[int(data.split("train").indices[7])][0]
    whole = Path(victim).read_bytes()
    Path(victim).write_bytes(whole[:60])
    with pytest.raises(BrokenDataError, match=f"^cannot read '{victim}'"):
        gather(data.train_loader(0, 4, workers=workers))
    assert not multiprocessing.active_children()
    Path(victim).write_bytes(whole)
    assert same(data.train_loader(0, 4, workers=workers), data.train_loader(0, 4))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"img_size": 224}, r"8×8 pixels, img_size is \(224, 224\)"),
        ("digits", {"in_chans": 4}, "1 or 3 channels"),
        ("digits", {"mean": (0.1, 0.2)}, r"mean \(0.1, 0.2\) does not fit in_chans 1"),
        ("digits", {"seed": -1}, "seed of at least 0"),
        ("digits", {"search_fraction": 1.0}, "search_fraction 1.0"),
        ("anywhere", {"interpolation": "best"}, "interpolation 'best'"),
        ("anywhere", {"augmentation": Augmentation(auto_augment="more")}, "auto_augment 'more'"),
    ],
)
def test_bad_requests(name, options, message):
    with pytest.raises(DataError, match=message):
        open_data(name, **{**DIGITS, **options})


@pytest.mark.parametrize("value", [{"hflip": 2}, {"re_prob": -1}, {"scale": (0.5, 0.4)}, {"shift": 2}])
def test_bad_augmentation(value):
    with pytest.raises(DataError, match=next(iter(value))):
        Augmentation(**value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "world_size": 2}, "multiple of 2"),
        ({"batch_size": 0}, "batch of 0"),
        ({"batch_size": 64, "start_step": 16}, "epoch of 15 steps"),
    ],
)
def test_bad_batches(options, message):
    with pytest.raises(DataError, match=message):
        open_data("digits", **DIGITS).train_loader(0, **options)


def test_unknown_split_and_empty_evaluation_batch():
    data = open_data("digits", **DIGITS)
    with pytest.raises(DataError, match="no split 'validation' in digits: take train"):
        data.eval_loader("validation", 8)
    with pytest.raises(DataError, match="--batch-size 1 or more"):
        data.eval_loader("test", 0)
