"""A folder of images is looked through once: what is remembered, what is decoded again, and what breaks later."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from opened import open_data
from test_sources import write_digits

from poolshare.search.config import checked_config
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.images import difference
from poolshare.space import BrokenDataError, RunError
from poolshare.supernet.data import pictures, seen
from poolshare.supernet.data.listing import Names
from poolshare.supernet.data.pictures import Files, Folder, Images, check_images
from poolshare.supernet.training.loop import train_model
from poolshare.supernet.training.recipe import Recipe

GREY: dict[str, Any] = {"img_size": 16, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """60 images in 10 classes, and a cache of their own."""
    monkeypatch.setenv(seen.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(seen, "_FRESH", 0)
    images = write_digits(tmp_path / "images", 6)
    time.sleep(0.01)  # the clock of files is coarser than the program's
    return images


@pytest.fixture
def decoded(monkeypatch):
    """The paths of images that are decoded."""
    paths: list[str] = []
    read = Images.read
    monkeypatch.setattr(Images, "read", lambda self, index: paths.append(self.items[index][0]) or read(self, index))
    return paths


def some_image(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("*/*.png"))[number]


def test_what_was_decoded_once_is_not_decoded_again_unless_it_has_changed(folder, decoded):
    first = open_data(str(folder), **GREY)
    assert len(decoded) == 60
    decoded.clear()
    again = open_data(str(folder), **GREY)
    assert (decoded, again.fingerprint, dict(again.files())) == ([], first.fingerprint, dict(first.files()))
    path = some_image(folder, 7)
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as long as before, of the same age
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = open_data(str(folder), **GREY)
    assert decoded == [str(path)]
    assert difference(changed.fingerprint_of("train_full"), first.fingerprint) in ("other contents", "")
    name = str(path.relative_to(folder))
    assert dict(changed.files())[name] != dict(first.files())[name]
    added = path.with_name("new.png")
    shutil.copy(path, added)
    decoded.clear()
    open_data(str(folder), **GREY)
    assert decoded == [str(added)]


def test_a_file_that_has_just_changed_is_not_trusted(folder, decoded, monkeypatch):
    monkeypatch.setattr(seen, "_FRESH", 10**12)
    for _ in range(2):
        open_data(str(folder), **GREY)
    assert len(decoded) == 120


def test_now_decodes_all_and_never_none(folder, decoded):
    unchecked = open_data(str(folder), **GREY, when="never")
    assert (decoded, "contents" in unchecked.fingerprint) == ([], False)
    for when, count in (("once", 60), ("now", 60), ("never", 0)):
        decoded.clear()
        data = open_data(str(folder), **GREY, when=when)
        assert (len(decoded), "contents" in data.fingerprint) == (count, True), when  # "never" knows by then
        assert not difference(data.fingerprint, unchecked.fingerprint)


def test_images_that_other_settings_took_are_decoded_again(folder, decoded, monkeypatch):
    open_data(str(folder), **GREY)
    decoded.clear()
    open_data(str(folder), **GREY, scale_16bit=True)
    assert len(decoded) == 60
    monkeypatch.setenv(pictures.PIXELS_VARIABLE, "30")
    with pytest.raises(BrokenDataError, match="60 of 60 images"):
        open_data(str(folder), **GREY)


def test_broken_images_are_named_every_time_until_they_are_mended(folder, decoded):
    path = some_image(folder, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    for count in (60, 1):
        decoded.clear()
        with pytest.raises(BrokenDataError, match=f"1 of {count} images .*{path.name}"):
            open_data(str(folder), **GREY)
        assert len(decoded) == count
    path.write_bytes(whole)
    decoded.clear()
    open_data(str(folder), **GREY)
    assert decoded == [str(path)]


def test_a_damaged_cache_is_made_again_and_one_that_cannot_be_written_is_no_error(
    folder, decoded, tmp_path, monkeypatch
):
    open_data(str(folder), **GREY)
    [kept] = (tmp_path / "cache" / "images").iterdir()
    kept.write_bytes(kept.read_bytes()[:500])
    for _ in range(2):
        open_data(str(folder), **GREY)
    assert len(decoded) == 120
    (tmp_path / "a file").touch()
    monkeypatch.setenv(seen.CACHE_VARIABLE, str(tmp_path / "a file" / "cache"))
    assert "contents" in open_data(str(folder), **GREY).fingerprint


def test_many_images_are_decoded_by_processes_to_the_same_digests(folder, monkeypatch):
    paths = [str(path.relative_to(folder)) for path in sorted(folder.glob("*/*.png"))]
    some_image(folder, 5).write_bytes(b"no image")
    read, indices, shown = Images(Files(Folder(str(folder), paths)), "test"), np.arange(59, -1, -1), list[int]()
    digests, broken = check_images(read, indices)
    assert (digests == 0).sum() == len(broken) == 1
    monkeypatch.setattr(pictures, "FEW", 1)
    before = torch.get_rng_state()
    together, same_broken = check_images(read, indices, shown.append)
    assert torch.equal(before, torch.get_rng_state())
    assert (list(together), same_broken, shown[0], shown[-1]) == (list(digests), broken, 0, 60)


def test_files_are_paths_put_together_when_asked_for():
    both = Files(Folder("a", ["x/1", "x/2"]), Folder("e", [])) + Files(Folder("b", ["y"]))
    assert [both[index] for index in range(len(both))] == [("a/x/1",), ("a/x/2",), ("b/y",)]
    for outside in (3, -1):
        with pytest.raises(IndexError):
            both[outside]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)))
def test_names_in_one_text_are_the_names(names):
    packed = Names.of(names)
    assert (list(packed), len(packed)) == (names, len(names))
    assert [packed[index] for index in range(-len(names), len(names))] == names * 2
    assert packed[1:] == names[1:]
    assert list(Names(packed.column.tobytes()).beginning("a/")) == [f"a/{name}" for name in names]
    assert list(Names.joined([packed, Names(b""), packed])) == names * 2
    assert all(name in packed for name in names)
    with pytest.raises(IndexError):
        packed[len(names)]
    assert list(Names.of([os.fsdecode(b"\xff.png")])) == [os.fsdecode(b"\xff.png")]  # no UTF-8, as file names may be


def test_an_image_that_breaks_while_training_stops_it_saved_and_the_same_call_goes_on(folder, tmp_path):
    def train(state: Path, progress=None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model("digits_vit", img_size=16, depth=1, embed_dim=16, num_heads=2)
        recipe = Recipe(epochs=2, batch_size=8, lr=1e-3)
        data = open_data(str(folder), **GREY, when="never")
        train_model(model, data, recipe, state=state, save_seconds=1e9, progress=progress)
        return model.state_dict()

    undisturbed = train(tmp_path / "whole.safetensors")
    data = open_data(str(folder), **GREY, when="never")
    source, indices = data.split("train").source, data.split("train").indices
    victim = Path(source.read.items[int(indices[4])][0])  # type: ignore[attr-defined]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:60])
    steps: list[int] = []
    with pytest.raises(
        BrokenDataError, match=rf"{victim.name}.*; ([0-9]+) of 8 steps are saved: mend it, then give the same"
    ):
        train(tmp_path / "state.safetensors", lambda done, _: steps.append(done))
    victim.write_bytes(whole)
    done = len(steps)
    mended = train(tmp_path / "state.safetensors", lambda now, _: steps.append(now))
    assert steps[done:] == ([done] if done else []) + [*range(done + 1, 9)]
    assert all(torch.equal(mended[name], value) for name, value in undisturbed.items())


def test_a_run_begun_unchecked_takes_a_mended_image_and_one_begun_checked_does_not(folder, tmp_path):
    path = some_image(folder, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    run = RunFolder(tmp_path / "run", checked_config(data=str(folder)))
    run.path.mkdir()
    run.write_config(open_data(str(folder), **GREY, when="never").fingerprint)
    path.write_bytes(whole)
    mended = open_data(str(folder), **GREY)
    run.check_images(mended.fingerprint, mended.files)
    run.write_config(mended.fingerprint)
    assert "contents" not in run.data_fingerprint  # the study is named after it
    other = RunFolder(tmp_path / "other", checked_config(data=str(folder)))
    other.path.mkdir()
    other.write_config(mended.fingerprint, files=mended.files)
    train = {
        item[0] for item in map(mended.split("train").source.read.items.__getitem__, mended.split("train").indices)
    }
    path = next(path for path in sorted(folder.glob("*/*.png")) if str(path) in train)
    path.write_bytes(path.read_bytes() + b"\0")
    changed = open_data(str(folder), **GREY)
    with pytest.raises(RunError, match=f"other sizes of files: changed: '{path.parent.name}/{path.name}'"):
        other.check_images(changed.fingerprint, changed.files)


def test_at_most_so_many_images_are_scored_on_drawn_class_by_class(folder, tmp_path):
    data = open_data(str(folder), **GREY, search_fraction=0.5, search_images=20)
    assert np.bincount(data.split("search").labels).tolist() == [2] * 10
    assert len(data.split("train")) + 20 == len(data.split("train_full")) == 48
    assert any("scored on 20 training images: see --search-images" in note for note in data.notes)
    share = open_data(str(folder), **GREY, search_fraction=0.5, search_images=1000)
    assert (len(share.split("search")), any("--search-images" in note for note in share.notes)) == (24, False)
    elsewhere = write_digits(tmp_path / "elsewhere", 5, first=10)
    data = open_data(str(folder), **GREY, search_data=elsewhere, search_images=30)
    assert np.bincount(data.split("search").labels).tolist() == [3] * 10
    assert len(data.split("train_full")) == len(data.split("train")) + 50
    assert any("scored on 30 of these, drawn with seed 0" in note for note in data.notes)
    shutil.rmtree(elsewhere / "3")
    assert len(open_data(str(folder), **GREY, search_data=elsewhere, search_images=30).split("search")) == 30
    assert len(open_data(str(folder), **GREY, search_images=5).split("search")) == 10  # no class is left out
