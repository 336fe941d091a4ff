"""Images with masks: folders, splits, joint augmentation, resumption, and masks that cannot be used. Files of a few pixels."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from poolshare.space.errors import BrokenDataError, DataError
from poolshare.supernet.data import ImageFormat, Place, open_data, open_tests
from poolshare.supernet.data.pictures import IGNORED
from poolshare.supernet.data.transforms import Augmentation

FORMAT = ImageFormat((24, 32), 3, (0.5,), (0.5,), "bilinear")
SHADES = np.array([0, 100, 200], dtype=np.uint8)  # the grey of each class


def write_part(folder, count, seed=0, size=(48, 64), void=255):
    """Images of 8×8 blocks of three greys, and masks that say which; a column of blocks is void."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        blocks = rng.integers(0, 3, (size[0] // 8, size[1] // 8)).astype(np.uint8)
        shades = np.kron(SHADES[blocks], np.ones((8, 8), np.uint8))
        mask = np.kron(blocks, np.ones((8, 8), np.uint8))
        mask[:, :8] = void
        Image.fromarray(shades).convert("RGB").save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("streets")
    for seed, (part, count) in enumerate({"train": 6, "val": 3, "test": 2}.items()):
        write_part(root / part, count, seed)
    return root


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(written, tmp_path / "streets")


def opened(root, **options):
    return open_data(Place(str(root), targets="pixels"), FORMAT, **options)


def test_a_folder_of_images_and_masks_is_read_as_it_lies(written):
    data = opened(written)
    assert {part: len(data.split(part)) for part in ("train", "search", "test", "train_full")} == {
        "train": 6,
        "search": 3,
        "test": 2,
        "train_full": 9,
    }
    assert data.classes == ("0", "1", "2")
    assert data.of_pixels
    [(images, masks)] = data.eval_loader("test", 8)
    assert images.shape == (2, 3, 24, 32)
    assert images.dtype == torch.float32
    assert masks.shape == (2, 24, 32)
    assert masks.dtype == torch.int64
    for index in range(2):
        raw = np.asarray(Image.open(written / "test" / "masks" / f"{index}.png")).astype(np.int64)[::2, ::2]
        assert np.array_equal(masks[index], np.where(raw == 255, IGNORED, raw))
    # What is read of a mask is what its image shows, whatever becomes of both.
    assert agreement(images, masks) > 0.9


def agreement(images, masks):
    """The share of labelled pixels whose grey is nearest to that of their class."""
    grey = (images.mean(dim=1) * 0.5 + 0.5) * 255
    nearest = (grey[..., None] - torch.from_numpy(SHADES.astype(np.float32))).abs().argmin(dim=-1)
    return float((nearest == masks)[masks != IGNORED].float().mean())


def test_image_and_mask_are_augmented_alike(written):
    augmentation = Augmentation(hflip=0.5, scale=(0.35, 1.0), color_jitter=0)
    data, plain = opened(written, augmentation=augmentation), opened(written, augmentation=Augmentation.none())
    moved = set()
    for epoch in range(4):
        [(images, masks)], [(_, still)] = data.train_loader(epoch, 6), plain.train_loader(epoch, 6)
        for image, mask, before in zip(images, masks, still, strict=True):
            assert agreement(image[None], mask[None]) > 0.75  # blocks are small, their borders many
            assert agreement(image[None].flip(3), mask[None]) < 0.75
            assert agreement(image[None].flip(2), mask[None]) < 0.75
            moved.add(bool((mask != before).any()))
    assert moved == {True}


def test_colours_change_in_the_image_alone(written):
    jitter = Augmentation(hflip=0, scale=(1, 1), color_jitter=0.4)
    [(images, masks)], [(plain, still)] = (
        opened(written, augmentation=one).train_loader(0, 6) for one in (jitter, Augmentation.none())
    )
    assert torch.equal(masks, still)
    assert not torch.equal(images, plain)


def test_what_is_random_depends_on_seed_epoch_and_image_alone(written):
    data = opened(written)
    whole = list(data.train_loader(0, 2, epochs=2))
    again = list(opened(written).train_loader(0, 2, epochs=2, start_step=1))
    elsewhere = list(opened(written).train_loader(1, 2, workers=1))
    for one, other in ((whole[1:], again), (whole[3:], elsewhere)):
        assert len(one) == len(other)
        for (images, masks), (same, likewise) in zip(one, other, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(masks, likewise)
    assert any(
        not torch.equal(a[1], b[1]) for a, b in zip(whole, opened(written, seed=1).train_loader(0, 2), strict=False)
    )


def test_parts_that_are_missing_are_cut_from_the_training_images(tmp_path):
    write_part(tmp_path / "train", 10)
    data = opened(tmp_path, search_fraction=0.25, test_fraction=0.2)
    parts = [set(data.split(name).indices.tolist()) for name in ("train", "search", "test")]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert set.union(*parts) == set(range(10))
    assert any("set aside as test" in note for note in data.notes)


def test_names_stand_in_a_file_and_decide_how_many_classes_there_are(root):
    (root / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    assert opened(root).classes == ("sky", "road", "tree", "car")
    (root / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(BrokenDataError, match=r"it holds 2, which is neither one of the 2 classes 0 to 1 nor ignored"):
        opened(root)
    (root / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(DataError, match="2 classes, 1 of them different"):
        opened(root)


def test_palettes_and_wide_masks_hold_indices(root):
    path = root / "test" / "masks" / "0.png"
    values = np.asarray(Image.open(path))
    wanted = next(iter(opened(root).eval_loader("test", 1)))[1]
    palette = Image.fromarray(values, "P")
    palette.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    for image in (palette, Image.fromarray(values.astype(np.uint16))):
        image.save(path)
        assert torch.equal(next(iter(opened(root).eval_loader("test", 1)))[1], wanted)


def test_a_changed_mask_is_other_data_and_is_looked_at_again(root):
    (root / "classes.txt").write_text("a\nb\nc\n")
    before, path = opened(root), root / "train" / "masks" / "0.png"
    values = np.asarray(Image.open(path)).copy()
    values[0, -1] = 1 - values[0, -1] % 2
    Image.fromarray(values).save(path)
    after = opened(root)
    assert after.fingerprint != before.fingerprint
    assert opened(root).fingerprint == after.fingerprint
    values[0, -1] = 77
    Image.fromarray(values).save(path)
    with pytest.raises(BrokenDataError, match="holds 77"):
        opened(root)


def test_masks_follow_the_classes_of_a_model(written):
    data = opened(written)
    [(_, before)] = data.eval_loader("test", 2)
    model = data.relabelled(("two", "nought", "more", "one"), (1, 3, 0))
    [(_, after)] = model.eval_loader("test", 2)
    assert torch.equal(after == IGNORED, before == IGNORED)
    assert torch.equal(after[before != IGNORED], torch.tensor([1, 3, 0])[before[before != IGNORED]])


def test_a_folder_of_other_images_is_tested_whole(written):
    place = Place(str(written / "val"), targets="pixels")
    data = open_tests(place, ("a", "b", "c"), FORMAT)
    assert len(data.split("test")) == 3
    assert len(open_tests(Place(str(written), targets="pixels"), ("a", "b", "c"), FORMAT).split("test")) == 2
    with pytest.raises(BrokenDataError, match="2 classes 0 to 1"):
        open_tests(place, ("a", "b"), FORMAT)


def spoil_size(mask):
    Image.open(mask).resize((32, 24)).save(mask)


def spoil_colour(mask):
    Image.open(mask).convert("RGB").save(mask)


def spoil_all(mask):
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(mask)


def spoil_bytes(mask):
    mask.write_bytes(mask.read_bytes()[:60])


def spoil_jpeg(mask):
    Image.open(mask).save(mask, "JPEG")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_size, "32×24 pixels, its image has 64×48"),
        (spoil_colour, "colours, mode RGB, in place of class indices"),
        (spoil_all, "all of its pixels are ignored, being 255"),
        (spoil_bytes, "read"),
        (spoil_jpeg, "a JPEG, which changes values"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_mask_that_cannot_be_used_is_named_before_anything_starts(root, spoil, said, part):
    mask = root / part / "masks" / "1.png"
    spoil(mask)
    with pytest.raises(BrokenDataError) as refused:
        opened(root)
    assert said in str(refused.value)
    assert repr(str(mask)) in str(refused.value)
    assert "a PNG" in str(refused.value)


def test_the_remedy_for_colours_makes_the_mask_that_was_meant(root):
    """What the message says is run."""
    path = root / "train" / "masks" / "0.png"
    wanted = np.asarray(Image.open(path))
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    mask = colours[np.minimum(wanted, 2)]
    spoil_colour(path)
    with pytest.raises(BrokenDataError) as refused:
        opened(root)
    recipe = str(refused.value).partition("Image.fromarray(")[2].rpartition(") with colours")[0]
    assert np.array_equal(eval(recipe, {"colours": colours, "mask": mask}), np.minimum(wanted, 2))


def test_other_faults_of_folders_are_said(root):
    os.remove(root / "train" / "masks" / "3.png")
    with pytest.raises(DataError, match=r"1 of 6 images in .*images' have no mask \(3.png\): put .*masks/3.png"):
        opened(root)
    shutil.copy(root / "train" / "masks" / "2.png", root / "train" / "masks" / "3.png")
    shutil.copy(root / "train" / "masks" / "2.png", root / "train" / "masks" / "of none.png")
    assert any("1 mask(s)" in note and "have no image" in note for note in opened(root).notes)
    Image.open(root / "train" / "images" / "3.png").save(root / "train" / "images" / "3.jpg")
    with pytest.raises(DataError, match="share a mask"):
        opened(root)
    os.remove(root / "train" / "images" / "3.jpg")
    shutil.rmtree(root / "val" / "masks")
    assert any("val' is not read" in note for note in opened(root).notes)
    shutil.rmtree(root / "train" / "masks")
    with pytest.raises(DataError, match="has no folder images: segmentation reads"):
        opened(root)
    with pytest.raises(DataError, match="digits has no masks"):
        open_data(Place("digits", targets="pixels"), FORMAT)
    with pytest.raises(DataError, match="would move the image and not its mask"):
        opened(root, augmentation=Augmentation(auto_augment="rand-m9-mstd0.5"))
    with pytest.raises(DataError, match="no interpolation 'random'"):
        open_data(Place(str(root), targets="pixels"), ImageFormat(24, 3, (0.5,), (0.5,), "random"))
