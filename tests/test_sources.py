"""Splits against closed forms, and every way a folder or a set of timm's can be bad."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from opened import open_data, open_source
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageDataset

import poolshare.supernet.data.named as named
from poolshare.space.errors import BrokenDataError, DataError
from poolshare.supernet.data.sources import stratified

GREY: dict[str, Any] = {"img_size": 16, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}


def write_digits(root: Path, per_class: int, first: int = 0) -> Path:
    """ROOT/0 … ROOT/9, each with `per_class` of the real digits as 8×8 grey PNG files."""
    images, labels = load_digits(return_X_y=True)
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
        for number in np.flatnonzero(labels == digit)[first : first + per_class]:
            picture = Image.fromarray((images[number].reshape(8, 8) * 15).astype(np.uint8))
            picture.save(root / str(digit) / f"{number}.png")
    return root


# Cutting class by class


def test_stratified_rounds_by_largest_remainder():
    generator = np.random.default_rng(0)
    for _ in range(50):
        sizes = generator.integers(40, 200, size=generator.integers(2, 12))
        labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
        count = int(generator.integers(len(labels) // 10, len(labels) // 2))
        chosen, rest = stratified(labels, [str(c) for c in range(len(sizes))], count, generator, "here")
        quotas = [Fraction(int(size) * count, len(labels)) for size in sizes]
        taken = [int(quota) for quota in quotas]
        for index in sorted(range(len(sizes)), key=lambda c: taken[c] - quotas[c])[: count - sum(taken)]:
            taken[index] += 1
        assert np.bincount(labels[chosen]).tolist() == taken
        assert sorted([*chosen, *rest]) == list(range(len(labels)))


def test_stratified_leaves_every_class_on_both_sides():
    labels = np.array([0] * 2 + [1] * 100)
    for count in (1, 50, 101):
        sides = stratified(labels, "ab", count, np.random.default_rng(0), "here")
        assert all(set(labels[side]) == {0, 1} for side in sides)


def test_stratified_names_the_classes_that_are_too_small():
    with pytest.raises(DataError, match=r"somewhere: .*'b' \(1\), 'c' \(0\).*add images"):
        stratified(np.array([0, 0, 0, 1]), "abc", 2, np.random.default_rng(0), "somewhere")


# Folders


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_folder_with_its_own_test_images(tmp_path, held_out):
    write_digits(tmp_path / "train", 6)
    write_digits(tmp_path / held_out, 3, first=6)
    found = open_source(tmp_path.name, data_dir=tmp_path.parent)
    assert found.open_test is not None
    assert (len(found.train), len(found.open_test()), found.search) == (60, 30, None)
    said = [f"{str(tmp_path / 'val')!r} holds the test images: there is no test folder beside it."]
    assert list(found.notes) == said * (held_out == "val")


def test_folders_that_are_not_read_and_foreign_files_are_noted(tmp_path):
    for name in ("train", "test", "more"):
        write_digits(tmp_path / name, 3)
    (tmp_path / "train" / "0" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    second, first = open_source(str(tmp_path)).notes
    assert first.startswith(
        f"1 file(s) in {str(tmp_path / 'train')!r} were passed over ({Path('0', 'notes.txt')}): images end in"
    )
    assert second == f"{str(tmp_path / 'more')!r} is not read."


def test_class_names_are_only_text_and_in_timms_order(tmp_path):
    names = ["10", "9", "{0.__class__}", "%s%n", "train", "$(id)"]
    for name in names:
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{number}.PNG")
    classes = open_source(str(tmp_path)).classes
    assert sorted(classes) == sorted(names)
    assert classes == tuple(ImageDataset(str(tmp_path)).reader.class_to_idx)


def empty(root):
    pass


def empty_class(root):
    (root / "one").mkdir()


def no_folders(root):
    (root / "a.png").touch()


def too_deep(root):
    write_digits(root / "deeper", 1)


def a_class_without_images(root):
    for image in (write_digits(root / "train", 2) / "3").iterdir():
        image.unlink()


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (empty, "no class folders in .*ROOT/CLASS/"),
        (no_folders, "no class folders"),
        (empty_class, r"no image \(\.png .*one': add some"),
        (too_deep, "deeper/0' is inside a class folder: put images directly into ROOT/CLASS"),
        (a_class_without_images, "no image .*train/3'"),
    ],
)
def test_bad_folders(tmp_path, arrange, message):
    arrange(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


def test_one_class_is_refused(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "only" / "a.png")
    with pytest.raises(DataError, match=r"fewer than 2 classes \(only\)"):
        open_source(str(tmp_path))


def test_all_broken_images_are_reported_at_once(tmp_path):
    good = sorted(write_digits(tmp_path, 3).glob("*/*.png"))
    good[0].write_bytes(good[0].read_bytes()[:60])
    good[1].with_suffix(".jpg").write_text("a text called an image")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(good[2])
    progress = []
    with pytest.raises(BrokenDataError, match="3 of 31 images") as caught:
        open_data(str(tmp_path), **GREY, progress=lambda *at: progress.append(at))
    assert str(good[0]) in str(caught.value)
    assert f"{good[1].with_suffix('.jpg')}' (not an image)" in str(caught.value)
    assert "clipped" in str(caught.value)
    assert progress == [(0, 31), (31, 31)]
    for image in good[3:15]:
        image.write_bytes(b"")
    with pytest.raises(BrokenDataError, match=r"15 of 31 .* and 5 more; replace or remove"):
        open_data(str(tmp_path), **GREY)


# timm's names


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/such/place", {}, r"no data at 'no/such/place': give digits, a folder"),
        ("torch/no_such_set", {"data_dir": "."}, "timm does not know torch/no_such_set"),
        ("torch/fashion_mnist", {}, "--data-dir, and --download"),
        ("torch/fashion_mnist", {"data_dir": "no/such/place"}, "--data-dir or .* --download"),
        ("torch/image_folder", {"data_dir": "."}, "path of the folder itself"),
    ],
)
def test_data_that_are_not_there(name, options, message):
    with pytest.raises(DataError, match=message):
        open_source(name, **options)


class Labelled(SimpleNamespace):
    """A torchvision-like set: a black image and its label, by index."""

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.new("L", (8, 8)), self.labels[index]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1], [1]] * 5, "multi-label"),
        (torch.eye(4)[[0, 1, 2, 3] * 3], "multi-label"),
        ([0, 1, -1] * 5, "labelled -1"),
        ([0, 1, 2] * 5, "labelled 2"),
        (["a", "b"] * 5, "labels such as 'a'"),
        ([0.5, 1.0] * 5, "labels such as 0.5"),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_labels_of_no_use(monkeypatch, labels, message, listed):
    dataset = Labelled(labels=labels, classes=["a", "b"], **({"targets": labels} if listed else {}))
    monkeypatch.setattr(named, "create_dataset", lambda *_, **__: dataset)
    with pytest.raises(DataError, match=message):
        open_source("torch/some", data_dir=".")


def test_a_set_that_keeps_more_than_its_label(monkeypatch):
    labels = [0, 1] * 10
    dataset = Labelled(labels=labels, targets=torch.zeros(20, 8))  # as QMNIST does
    monkeypatch.setattr(named, "create_dataset", lambda *_, **__: dataset)
    found = open_source("torch/some", data_dir=".")
    assert found.open_test is not None
    assert (found.classes, found.open_test().labels.tolist()) == (("0", "1"), labels)


def test_a_changed_file_of_a_torchvision_set_that_is_not_in_memory_changes_its_fingerprint(tmp_path, monkeypatch):
    files = [tmp_path / f"{index}.png" for index in range(12)]
    for index, file in enumerate(files):
        Image.new("L", (8, 8), index).save(file)
    dataset = Labelled(labels=[0, 1] * 6, targets=[0, 1] * 6, classes=["a", "b"])
    dataset._image_files = files  # as Food101, Flowers102 and others keep them
    monkeypatch.setattr(named, "create_dataset", lambda *_, **__: dataset)
    before = open_data("torch/some", data_dir=".", **GREY).fingerprint
    assert open_data("torch/some", data_dir=".", **GREY).fingerprint == before
    Image.effect_noise((8, 8), 90).save(files[3])
    assert open_data("torch/some", data_dir=".", **GREY).fingerprint != before


@pytest.mark.parametrize("multi_label", [False, True])
def test_hugging_face_sets(tmp_path, multi_label):
    datasets = pytest.importorskip("datasets")
    images, labels = load_digits(return_X_y=True)
    one_class = datasets.ClassLabel(names=[f"digit {digit}" for digit in range(10)])
    features = {"image": datasets.Image(), "label": datasets.Sequence(one_class) if multi_label else one_class}
    content: dict[str, list[Any]] = {
        "image": [Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)) for image in images[:200]],
        "label": [[int(label)] if multi_label else int(label) for label in labels[:200]],
    }
    whole = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    whole.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    options: dict[str, Any] = {"data_dir": tmp_path / "cache"}
    if multi_label:
        with pytest.raises(DataError, match="multi-label"):
            open_source(f"hfds/{tmp_path / 'set'}", **options)
        return
    found = open_source(f"hfds/{tmp_path / 'set'}", **options)
    assert found.classes[3] == "digit 3"
    assert (len(found.train), found.open_test) == (200, None)
    assert found.train.labels.tolist() == labels[:200].tolist()
    assert np.array_equal(found.train.source.read(7), content["image"][7])
    for wrong in ("image_key", "label_key"):
        with pytest.raises(DataError, match="could not be opened"):
            open_source(f"hfds/{tmp_path / 'set'}", **{**options, wrong: "absent"})
