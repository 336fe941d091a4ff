"""Folders of images as people have them: names, links, test images, changed ones, and how a picture is read."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from opened import open_data, open_source
from PIL import Image, ImageOps
from reports import FACTS
from rich.console import Console
from test_sources import write_digits

from poolshare.search.config import checked_config
from poolshare.search.exported import retrain as retraining
from poolshare.search.exported.export import save_export
from poolshare.search.exported.retrain import evaluate, retrain
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.prepare import prepare
from poolshare.space.errors import BrokenDataError, DataError, RunError
from poolshare.supernet import Subnet
from poolshare.supernet.data import pictures
from poolshare.supernet.data.given import open_own
from poolshare.supernet.data.listing import list_folder, natural_key
from poolshare.supernet.data.pictures import PIXELS_VARIABLE, Images

GREY: dict[str, Any] = {"img_size": 16, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}


@pytest.fixture
def flat(tmp_path):
    """100 images in 10 classes, nothing set aside."""
    return write_digits(tmp_path / "flat", 10)


def written(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def read(path: Path, scale_16bit: bool = False) -> Image.Image:
    return Images([(str(path),)], "test", scale_16bit)(0)


# What a folder holds


def test_one_walker_finds_images_links_and_what_is_passed_over(tmp_path):
    blank = Image.new("L", (4, 4))
    for name in ("a/10.png", "a/9.PNG", "b/deep/x.tif", "top.webp", ".hidden/y.png"):
        written(tmp_path / name, blank)
    (tmp_path / "a" / "notes.txt").write_text("text")
    (tmp_path / "a" / "._9.png").write_text("of another system")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "b" / "ring").symlink_to(tmp_path / "b")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    listing = list_folder(tmp_path)
    inside = ["9.PNG", "10.png", "gone.jpg"]
    assert list(listing.paths) == [
        "top.webp", *(f"a/{name}" for name in inside), "b/deep/x.tif", *(f"linked/{name}" for name in inside)
    ]  # fmt: skip
    assert listing.sizes[3] == -1
    assert listing.sizes[0] == (tmp_path / "top.webp").stat().st_size
    assert list(listing.passed_over) == ["a/._9.png", "a/notes.txt", "linked/._9.png", "linked/notes.txt"]
    shallow = list_folder(tmp_path, depth=1)
    assert "b/deep/x.tif" not in shallow.paths
    assert "b/deep" in shallow.deeper


def test_names_sort_naturally_whatever_digits_they_hold():
    names = ["10", "9", "²", "a10²", "a9²", "٣"]
    assert sorted(names, key=natural_key) == ["٣", "9", "10", "a9²", "a10²", "²"]
    assert sorted(["a", "A"], key=natural_key) == sorted(["A", "a"], key=natural_key) == ["A", "a"]


def test_dangling_links_are_named_with_the_broken_images(flat):
    victims = sorted(flat.glob("3/*.png"))[:4]
    for image in victims:
        image.unlink()
        image.symlink_to("gone.png")
    with pytest.raises(BrokenDataError, match=r"4 of 100 images .* which is not there") as caught:
        open_data(str(flat), **GREY)
    assert all(str(image) in str(caught.value) for image in victims)


def test_a_class_that_is_a_dangling_link_is_not_lost(flat):
    (flat / "eleven").symlink_to("nowhere")
    with pytest.raises(DataError, match="'nowhere', which is not there: mend or remove it"):
        open_source(str(flat))


def test_names_in_any_encoding(tmp_path):
    latin = os.fsdecode("caf\xe9".encode("latin-1"))
    for folder in (latin, "cafe\u0301", "plain"):
        for number in range(5):
            written(tmp_path / folder / f"{number}²{latin}.png", Image.new("L", (8, 8), 40 * number))
    (tmp_path / latin / f"{latin}.txt").touch()
    data = open_data(str(tmp_path), **GREY)
    "\n".join(data.notes).encode()
    assert set(data.classes) == {"caf\\xe9", "caf\xe9", "plain"}
    "\n".join(data.classes).encode()  # can be written anywhere
    run = RunFolder(tmp_path / "run", checked_config(data=str(tmp_path)))
    run.path.mkdir()
    run.write_config(data.fingerprint, files=data.files)
    name = next(data.files())[0]
    changed = {**dict(data.files()), name: "other"}.items()
    with pytest.raises(RunError) as caught:
        run.check_images("5 images, 0", lambda: changed)
    assert repr(name) in str(caught.value)


# Which folder is which


@pytest.mark.parametrize(("train", "test"), [("train", "Test"), ("training", "testing"), ("Train", "TEST")])
def test_test_folders_are_found_by_any_usual_name(tmp_path, train, test):
    write_digits(tmp_path / train, 6)
    write_digits(tmp_path / test, 3, first=6)
    data = open_data(str(tmp_path), **GREY)
    assert (len(data.split("train_full")), len(data.split("test")), data.notes) == (60, 30, ())


def test_validation_images_beside_test_images_are_scored_on(tmp_path):
    for name, count, first in (("train", 6, 0), ("val", 2, 6), ("test", 3, 8)):
        write_digits(tmp_path / name, count, first)
    data = open_data(str(tmp_path), **GREY)
    assert {name: len(data.split(name)) for name in ("train", "search", "train_full", "test")} == {
        "train": 60, "search": 20, "train_full": 80, "test": 30
    }  # fmt: skip
    [note] = data.notes
    assert "scored on the 20 images" in note
    paths = {split: [item[0] for item in items_of(data, split)] for split in ("train", "search", "test")}
    for split, folder in (("train", "train"), ("search", "val"), ("test", "test")):
        assert {Path(path).parent.parent.name for path in paths[split]} == {folder}
        assert [data.classes[label] for label in data.split(split).labels] == [
            Path(p).parent.name for p in paths[split]
        ]


def items_of(data, split):
    part = data.split(split)
    return [part.source.read.items[index] for index in part.indices]


def test_search_data_may_lie_anywhere_and_lack_a_class(flat, tmp_path):
    elsewhere = write_digits(tmp_path / "elsewhere", 2, first=10)
    shutil.rmtree(elsewhere / "3")
    data = open_data(str(flat), **GREY, search_data=elsewhere)
    assert set(data.split("search").labels) == {*range(10)} - {3}
    assert len(data.split("train")) + len(data.split("test")) == 100
    assert any("has no images of '3'" in note for note in data.notes)
    (elsewhere / "4").rename(elsewhere / "four")
    with pytest.raises(DataError, match="only there: four"):
        open_data(str(flat), **GREY, search_data=elsewhere)
    with pytest.raises(DataError, match=r"--search-data .* not there"):
        open_data(str(flat), **GREY, search_data=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"--search-data .* the data are digits"):
        open_data("digits", img_size=8, in_chans=1, mean=(0,), std=(1,), search_data=elsewhere)


def test_an_unlabelled_test_folder_does_not_stop_a_search(tmp_path):
    write_digits(tmp_path / "train", 10)
    written(tmp_path / "test" / "1.png", Image.new("L", (8, 8)))
    data = open_data(str(tmp_path), **GREY)
    assert (len(data.split("train_full")), len(data.split("test"))) == (80, 20)
    unlabelled, set_aside = data.notes
    assert f"{str(tmp_path / 'test')!r} is not used: it has no class folders" in unlabelled
    assert "20 of its 100 images were set aside" in set_aside


def test_foreign_classes_in_test_are_said_and_refused_when_tested(tmp_path):
    write_digits(tmp_path / "train", 6)
    (write_digits(tmp_path / "test", 1) / "3").rename(tmp_path / "test" / "three")
    data = open_data(str(tmp_path), **GREY)
    assert "only there: three" in data.notes[0]
    with pytest.raises(DataError, match="missing: 3; only there: three"):
        data.split("test")


# Changed images


def check(images: Path, run: RunFolder) -> None:
    data = open_data(str(images), **GREY)
    run.check_images(data.fingerprint, data.files)


def test_changed_images_are_refused_by_name_and_copies_are_not(flat, tmp_path):
    run = RunFolder(tmp_path / "run", checked_config(data=str(flat)))
    run.path.mkdir()
    first = open_data(str(flat), **GREY)
    run.write_config(first.fingerprint, files=first.files)
    copy = tmp_path / "on another disk"
    shutil.copytree(flat, copy, copy_function=shutil.copyfile)  # with new times of change
    check(copy, run)
    tested = {item[0] for item in items_of(first, "test")}
    one, two, three, *_ = (path for path in sorted(flat.glob("*/*.png")) if str(path) not in tested)
    content = one.read_bytes()
    with Image.open(one) as image:
        inverted = ImageOps.invert(image)
    inverted.save(one)
    one.write_bytes(one.read_bytes()[: len(content)].ljust(len(content), b"\0"))  # as many bytes as before
    status = two.stat()
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(RunError, match=rf"other contents: changed: '{one.parent.name}/{one.name}'\); restore"):
        check(flat, run)
    one.write_bytes(content)
    check(flat, run)
    two.rename(two.with_name("zz.png"))
    renamed = rf"new: '{two.parent.name}/zz.png'; missing: '{two.parent.name}/{two.name}'\)"
    with pytest.raises(RunError, match=renamed):
        check(flat, run)
    two.with_name("zz.png").rename(two)
    three.unlink()
    with pytest.raises(RunError, match=rf"79 now, 80 then: missing: '{three.parent.name}/{three.name}'\)"):
        check(flat, run)


def test_changed_images_given_in_python_are_refused():
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 4

    def opened(pixels, loaders=False):
        parts: Any = [torch.utils.data.TensorDataset(pixels[rows], labels[rows]) for rows in (slice(30), slice(30, 40))]
        parts = [torch.utils.data.DataLoader(part, batch_size=10) for part in parts] if loaders else parts
        return open_own(parts, "rand")

    other = images.clone()
    other[35, 0, 0, 0] += 0.1
    for loaders in (False, True):
        assert opened(images, loaders).fingerprint == opened(images.clone(), loaders).fingerprint
        assert opened(images, loaders).fingerprint != opened(other, loaders).fingerprint
        assert opened(images, loaders).notes == ()


def test_images_that_no_seed_repeats_are_said_and_can_be_continued_with():
    own = np.random.default_rng(0)

    class Restless(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return torch.tensor(own.random((1, 8, 8)), dtype=torch.float32), index % 2

    steady = torch.utils.data.TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10) % 2)
    first, second = (open_own((Restless(), steady), "restless") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert "train images differ from one reading to the next" in first.notes[0]


# Test images of exported models

SMALL = {"depth": 1, "embed_dim": 8, "num_heads": 1, "img_size": 16, "in_chans": 1, "num_classes": 10}


def exported(out: Path, data: Path, architecture: str = "1", **options: Any) -> Path:
    """A tiny untrained model with the facts of a search on `data`."""
    torch.manual_seed(0)
    opened = open_data(str(data), **GREY)
    model = randomise(Subnet.from_base("vit_tiny_patch16_224", architecture, **SMALL | options)).eval()
    config = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0}
    facts = FACTS | {"data": str(data), "data_fingerprint": opened.fingerprint, "batch_size": 8}
    save_export(out, model, opened.classes, config, facts)
    return out


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed."""
    monkeypatch.setattr(retraining, "measure_latency", lambda *_: 1.0)


def test_a_folder_of_other_images_is_tested_on_as_a_whole(flat, tmp_path, quick):
    model = exported(tmp_path / "model", flat)
    assert evaluate(model)["total"] == 20
    moved = tmp_path / "moved"
    shutil.copytree(flat, moved)
    assert evaluate(model, data=str(moved))["total"] == 20  # the same fifth, wherever it lies
    others = write_digits(tmp_path / "others" / "test", 6, first=10)
    shutil.rmtree(others / "7")
    for folder in (others, others.parent):  # the test folder itself, and what holds nothing else
        result = evaluate(model, data=str(folder))
        assert result["total"] == 54
        assert f"all 54 images of {str(others)!r} are test images." in result["notes"]
        assert f"{str(others)!r} has no images of '7'." in result["notes"]
    write_digits(tmp_path / "others" / "train", 1, first=20)
    assert evaluate(model, data=str(others.parent))["total"] == 54


def test_the_images_of_the_search_are_no_test_images(tmp_path, quick):
    write_digits(tmp_path / "both" / "train", 6)
    write_digits(tmp_path / "both" / "test", 3, first=6)
    model = exported(tmp_path / "model", tmp_path / "both")
    with pytest.raises(DataError, match=r"the images that .* was searched on"):
        evaluate(model, data=str(tmp_path / "both" / "train"))


def test_evaluate_decodes_test_images_alone_and_shows_progress(tmp_path, quick, verb, monkeypatch):
    write_digits(tmp_path / "both" / "train", 6)
    test = write_digits(tmp_path / "both" / "test", 3, first=6)
    model = exported(tmp_path / "model", tmp_path / "both")
    seen = set[str]()
    before = Images.read

    def noting(self, index):
        seen.add(str(Path(self.items[index][0]).parent.parent))
        return before(self, index)

    monkeypatch.setattr(Images, "read", noting)
    status, out, error = verb("evaluate", model)
    assert (status, seen) == (0, {str(test)})
    assert "checking images: 100%" in error
    assert "on 30 test images" in out


def test_few_images_are_retrained_for_250_steps_where_no_epochs_are_given(flat, tmp_path, monkeypatch, verb):
    def stop(model, data, recipe, **_):
        raise RunError(f"{recipe.epochs} epochs")

    monkeypatch.setattr(retraining, "train_model", stop)
    model = exported(tmp_path / "model", flat)  # of 80 training images, in batches of 8
    for words, epochs in (((), 25), (("--epochs", 3), 3)):
        status, _, err = verb("retrain", model, "-q", *words)
        assert (status, err) == (1, f"error: {epochs} epochs\n")
    with pytest.raises(RunError, match="25 epochs"):
        retrain(model, tmp_path / "out")


def test_a_retraining_from_scratch_shares_attention_as_the_export_does(flat, tmp_path, monkeypatch):
    def stop(model, *_, **__):
        raise RunError(model.sharing)

    monkeypatch.setattr(retraining, "train_model", stop)
    for sharing in ("qk", "map"):
        model = exported(tmp_path / sharing, flat, "1*2", depth=2, sharing=sharing)
        for from_scratch in (False, True):
            with pytest.raises(RunError, match=sharing):
                retrain(model, tmp_path / "out", from_scratch=from_scratch)


def test_what_was_set_aside_is_said_even_when_quiet(flat, tmp_path, quick, verb):
    model = exported(tmp_path / "model", flat)
    status, out, _ = verb("evaluate", model, "--quiet")
    assert status == 0
    assert "20 of its 100 images were set aside as test" in out


def test_a_retraining_shows_that_images_are_checked_and_says_what_it_tests_on_even_when_quiet(flat, tmp_path, verb):
    words = ("retrain", exported(tmp_path / "model", flat), "--epochs", "1", "--batch-size", "40")
    status, _, error = verb(*words)
    assert status == 0, error
    assert "checking images: 100%" in error
    status, out, error = verb(*words, "--out", tmp_path / "quiet", "--quiet")
    assert (status, "checking" in error) == (0, False), error
    assert "20 of its 100 images were set aside as test" in out


def test_every_opening_of_a_folder_shows_progress(flat):
    args = {"depth": 1, "embed_dim": 8, "num_heads": 1}
    size = {"img_size": 16, "in_chans": 1, "levels": (1,)}
    config = checked_config(data=str(flat), model="vit_tiny_patch16_224", model_args=args, epochs=0, **size)
    console = Console(file=io.StringIO(), record=True)
    job = prepare(config, console)
    assert "checking images: 100%" in console.export_text()
    assert len(job.data.split("train_full")) == 80


# How a picture is read


def test_exif_orientation_is_followed(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    for orientation, turn in (
        (6, Image.Transpose.ROTATE_90),
        (3, Image.Transpose.ROTATE_180),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ):
        exif[0x0112] = orientation
        for ending in ("png", "tif", "webp"):
            options = {"lossless": True} if ending == "webp" else {}
            path = written(tmp_path / f"{orientation}.{ending}", upright.transpose(turn), exif=exif, **options)
            assert np.array_equal(read(path), upright), path


def test_transparent_parts_are_white_and_the_rest_keeps_its_colour(tmp_path):
    hidden = Image.new("RGBA", (2, 2), (200, 10, 10, 0))
    hidden.putpixel((0, 0), (1, 2, 3, 255))
    hidden.putpixel((1, 0), (0, 0, 0, 51))  # a fifth of black
    for ending in ("png", "webp", "tif"):
        options = {"lossless": True, "exact": True} if ending == "webp" else {}
        seen = read(written(tmp_path / f"a.{ending}", hidden, **options))
        assert seen.mode == "RGB"
        assert [seen.getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [(1, 2, 3), (204,) * 3, (255,) * 3]
    grey = Image.new("LA", (1, 1), (7, 0))
    assert read(written(tmp_path / "grey.png", grey)).getpixel((0, 0)) == 255
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 8, 7, 100, 101, 102])
    palette.putpixel((1, 0), 1)
    seen = read(written(tmp_path / "palette.png", palette, transparency=0)).convert("RGB")
    assert [seen.getpixel(at) for at in ((0, 0), (1, 0))] == [(255, 255, 255), (100, 101, 102)]


def test_search_and_predict_take_the_usual_formats(tmp_path):
    for number, ending in enumerate((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".TIF")):
        for name in ("one", "two"):
            written(tmp_path / name / f"{number}{ending}", Image.new("RGB", (8, 8), (20, 90, 30)))
    assert len(open_data(str(tmp_path), **GREY).split("train_full")) == 13  # of 16, a fifth for test


def test_16_bit_grey_is_scaled_on_request_only(tmp_path):
    values = np.array([[0, 257, 65535, 32896]], dtype=np.uint16)
    for ending in ("png", "tif"):
        path = written(tmp_path / f"a.{ending}", Image.fromarray(values))
        assert np.asarray(read(path, scale_16bit=True)).tolist() == [[0, 1, 255, 128]]
        with pytest.raises(BrokenDataError, match=r"clipped.*--scale-16bit"):
            read(path)


def test_the_limit_of_pixels_can_be_moved(tmp_path, monkeypatch):
    path = written(tmp_path / "large.png", Image.new("1", (100, 100)))
    monkeypatch.setattr(pictures, "PILLOWS_PIXELS", 4000)  # as a huge image under Pillow's own
    with pytest.raises(BrokenDataError, match=f"more than 8,000 pixels: set {PIXELS_VARIABLE}=N"):
        read(path)
    monkeypatch.setenv(PIXELS_VARIABLE, "20000")
    assert read(path).size == (100, 100)
    monkeypatch.setenv(PIXELS_VARIABLE, "many")
    with pytest.raises(BrokenDataError, match="'many' is not a number of pixels"):
        read(path)
