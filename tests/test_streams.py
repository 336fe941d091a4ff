"""Images in WebDataset shards and in Hugging Face tables, against a folder of the same files; training on each, resumed.

Tiny images and models; the heavier combinations are slow tests.
"""

import io
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import call
from opened import open_data, open_source
from PIL import Image
from test_sources import write_digits
from torch.utils.data import DataLoader, TensorDataset

from poolshare.search.config import checked_config, moved, short_name
from poolshare.search.job.folder import RunFolder
from poolshare.space import BrokenDataError, DataError, RunError
from poolshare.supernet.data import Data, seen
from poolshare.supernet.data.formats.shards import find_parts, read_shard
from poolshare.supernet.data.given import open_own
from poolshare.supernet.training.loop import train_model
from poolshare.supernet.training.recipe import Recipe

GREY: dict[str, Any] = {"img_size": 16, "in_chans": 1, "mean": (0.5,), "std": (0.5,)}
KINDS = ("folder", "wds", "hfds")


def files_of(folder: Path) -> list[tuple[int, Path]]:
    """Labels and paths in the order in which a folder is read."""
    classes = sorted(folder.iterdir(), key=lambda path: int(path.name))
    return [
        (label, path)
        for label, one in enumerate(classes)
        for path in sorted(one.iterdir(), key=lambda path: int(path.stem))
    ]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(root: Path, folder: Path, title: str = "photos-train", per_shard: int = 25, by: str = "cls") -> Path:
    """The files of a folder of class folders in tar files, in order. by: where labels are: "cls", "json"."""
    root.mkdir(parents=True, exist_ok=True)
    files = files_of(folder)
    for start in range(0, len(files), per_shard):
        with tarfile.open(root / f"{title}-{start // per_shard:04d}.tar", "w") as tar:
            for label, path in files[start : start + per_shard]:
                key, other = f"{label}/{path.stem}", {"label": label, "width": 8}
                add(tar, f"{key}.png", path.read_bytes())
                add(tar, f"{key}.{by}", (str(label) if by == "cls" else json.dumps(other)).encode())
    return root


def write_table(root: Path, folder: Path, part: str = "train") -> Path:
    """The files of a folder of class folders as a Parquet file, in order."""
    datasets = pytest.importorskip("datasets", reason="pip install '.[hfds]'")
    labels, paths = zip(*files_of(folder), strict=True)
    names = datasets.ClassLabel(names=sorted({path.parent.name for path in paths}, key=int))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    content = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths], "label": list(labels)}
    datasets.Dataset.from_dict(content, features=features).to_parquet(root / f"{part}-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Sixty digits, the same files each: what --data calls them."""
    root = tmp_path_factory.mktemp("streams")
    folder = write_digits(root / "folder", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(seen.CACHE_VARIABLE, str(root / "cache"))
        yield {"folder": str(folder), "wds": f"wds/{write_shards(root / 'shards', folder)}", "root": str(root)}


def place_of(kind: str, places: dict[str, str]) -> str:
    """Makes tables when they are asked for, so that tests without them run where `datasets` is missing."""
    if kind.startswith("hf") and "table" not in places:
        Path(places["root"], "table").mkdir(exist_ok=True)
        places["table"] = str(write_table(Path(places["root"], "table"), Path(places["folder"])))
    return f"{kind}/{places['table']}" if kind.startswith("hf") else places[kind]


def opened(kind: str, places: dict[str, str], **options: Any) -> Data:
    hub = Path(places["root"], "hub") if kind.startswith("hf") else None  # for what `datasets` makes of it
    return open_data(place_of(kind, places), data_dir=hub, **GREY, **options)


@pytest.mark.parametrize("kind", ["wds", "hfds", "hfids"])
def test_the_same_files_are_the_same_data_whatever_holds_them(kind, places):
    for options in ({}, {"search_images": 20, "search_fraction": 0.5}, {"training": False}):
        folder, other = (opened(one, places, **options) for one in ("folder", kind))
        assert other.fingerprint == folder.fingerprint
        assert "contents" in other.fingerprint
        for split in ("train", "search", "test"):
            assert other.fingerprint_of(split) == folder.fingerprint_of(split)
    batches = [next(iter(data.train_loader(1, 16))) for data in (folder, other)]
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))
    assert any("12 of its 60 images were" in note for note in other.notes)
    if kind != "wds":  # a table is known by what it was made from, however young it is: no image is decoded again
        assert "contents" in opened(kind, places, when="never").fingerprint


def test_shards_give_what_timms_reader_gives(places, tmp_path):
    pytest.importorskip("webdataset", reason="pip install '.[test]'")
    folder = Path(places["folder"])
    write_shards(tmp_path, folder, "some", by="json")
    add_to = next(tmp_path.glob("*.tar"))
    with tarfile.open(
        add_to, "a"
    ) as tar:  # a picture in two forms, upper case, more than one dot, and what is passed over
        content = files_of(folder)[0][1].read_bytes()
        for name in ("x/odd.one.PNG", "x/odd.PNG", "x/odd.jpg", "__meta__/no.png", "nothing"):
            add(tar, name, content)
        add(tar, "x/odd.json", b'{"label": 7}')
    for root, key in ((Path(places["wds"][4:]), None), (tmp_path, "label")):
        names = sorted(path.name for path in root.glob("*.tar"))
        title = names[0].removesuffix("0000.tar")
        split = f"{title}{{0000..{len(names) - 1:04d}}}.tar|100"
        theirs = list(timm.data.create_dataset("wds/some", str(root), split, input_img_mode="L", target_key=key))
        train = open_source(f"wds/{root}").train
        ours = [(train.source.read(index), int(train.labels[index])) for index in range(len(train))]
        assert [label for _, label in ours] == [label for _, label in theirs]
        assert all(
            np.array_equal(*images) for images in zip(*([i for i, _ in each] for each in (ours, theirs)), strict=True)
        )
    assert len(theirs) == 61


@pytest.mark.parametrize("how", ["names", "folders", "info"])
def test_parts_are_known_by_names_by_folders_or_by_timms_info(how, tmp_path):
    counts = {"train": (0, 6), "validation": (6, 3), "test": (9, 2)}
    for part, (first, count) in counts.items():
        folder = write_digits(tmp_path / "files" / part, count, first=first)
        title = {"names": f"digits-{part}", "folders": f"{part}/some", "info": f"s{first}"}[how]
        (tmp_path / "shards" / part).mkdir(parents=True) if how == "folders" else None
        write_shards(tmp_path / "shards", folder, title, per_shard=40)
    if how == "info":
        splits = {
            part: {"name": part, "filenames": [path.name for path in sorted((tmp_path / "shards").glob(f"s{first}-*"))]}
            for part, (first, _) in counts.items()
        }
        (tmp_path / "shards" / "_info.json").write_text(json.dumps({"splits": splits}))
    (tmp_path / "shards" / ".hidden.tar").touch()
    data = open_data(f"wds/{tmp_path / 'shards'}", **GREY)
    folder = open_data(str(tmp_path / "files"), **GREY)
    sizes = {"train": 60, "search": 30, "test": 20, "train_full": 90}
    for split, size in sizes.items():
        assert (len(data.split(split)), data.fingerprint_of(split)) == (size, folder.fingerprint_of(split))
    assert any("scored on its 30 validation images" in note for note in data.notes)
    for path in (tmp_path / "shards").rglob("*.tar"):
        if "test" in str(path.relative_to(tmp_path)) or path.name.startswith("s9"):
            path.unlink()
    if how == "info":
        (tmp_path / "shards" / "_info.json").write_text(
            json.dumps({"splits": {part: splits[part] for part in ("train", "validation")}})
        )
    assert len(dict(data.files())) == 90
    data = open_data(f"wds/{tmp_path / 'shards'}", **GREY)
    assert (len(data.split("test")), len(data.split("train_full"))) == (30, 60)
    assert any("hold the test images" in note for note in data.notes)


def test_shards_without_a_word_for_their_part_are_trained_on_unless_others_are(places, tmp_path):
    root = write_shards(tmp_path, Path(places["folder"]), "some")
    parts, notes = find_parts(root)
    assert ({name: len(part.shards) for name, part in parts.items()}, notes) == ({"train": 3}, ())
    shutil.copy(root / "some-0000.tar", root / "train-0.tar")
    parts, notes = find_parts(root)
    assert {name: len(part.shards) for name, part in parts.items()} == {"train": 1}
    assert notes[0].startswith("3 shard(s)")
    assert "are not read (some-0000.tar" in notes[0]


def test_a_shard_is_looked_through_once_until_it_changes(places, tmp_path, monkeypatch):
    root = write_shards(tmp_path / "shards", Path(places["folder"]))
    first, second, _ = sorted(root.iterdir())
    monkeypatch.setenv(seen.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(seen, "_FRESH", 0)
    time.sleep(0.01)
    looked, decoded = list[str](), list[int]()
    whole, read = tarfile.open, seen.Images.read
    monkeypatch.setattr(tarfile, "open", lambda path, *how: looked.append(Path(path).name) or whole(path, *how))
    monkeypatch.setattr(seen.Images, "read", lambda self, index: decoded.append(index) or read(self, index))
    data = open_data(f"wds/{root}", **GREY)
    assert (len(looked), len(decoded)) == (3, 60)
    looked.clear(), decoded.clear()
    assert open_data(f"wds/{root}", **GREY).fingerprint == data.fingerprint
    assert (looked, decoded) == ([], [])
    content, place = second.read_bytes(), read_shard(second)[0].offsets[3]
    second.write_bytes(content[: place + 12] + bytes(4) + content[place + 16 :])  # as long as before, at another time
    with pytest.raises(BrokenDataError, match=rf"1 of 25 images .*{second.name}/4/"):
        open_data(f"wds/{root}", **GREY)
    assert looked == [second.name]
    second.write_bytes(content)
    assert open_data(f"wds/{root}", **GREY).fingerprint == data.fingerprint
    run = RunFolder(tmp_path / "run", checked_config(data=f"wds/{root}"))
    run.path.mkdir()
    run.write_config(data.fingerprint, files=data.files)
    shutil.copytree(places["folder"], tmp_path / "other")
    files = [path for _, path in files_of(tmp_path / "other")]
    one = files[int(data.split("train").indices[0])]
    shutil.copy(files[30], one)
    shutil.copy(next(iter(sorted(write_shards(tmp_path / "changed", tmp_path / "other").iterdir()))), first)
    changed = open_data(f"wds/{root}", **GREY)
    with pytest.raises(RunError, match=f"are not those .* changed: '{first.name}/0/{one.name}'"):
        run.check_images(changed.fingerprint, changed.files)


def broken_tar(root: Path, folder: Path) -> None:
    (root / "train-0.tar").write_bytes(b"not a tar file" * 100)


def cut_short(root: Path, folder: Path) -> None:
    [shard] = write_shards(root, folder, per_shard=60).glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:9000])


def compressed(root: Path, folder: Path) -> None:
    tarfile.open(root / "train-0.tar.gz", "w:gz").close()


def compressed_under_another_name(root: Path, folder: Path) -> None:
    with tarfile.open(root / "train-0.tar", "w:gz") as tar:
        add(tar, "a.png", b"")


def no_label(root: Path, folder: Path) -> None:
    with tarfile.open(root / "train-0.tar", "w") as tar:
        add(tar, "bird/7.png", files_of(folder)[0][1].read_bytes())


def a_name_for_a_label(root: Path, folder: Path) -> None:
    no_label(root, folder)
    with tarfile.open(root / "train-0.tar", "a") as tar:
        add(tar, "bird/7.cls", b"bird")


def unlabelled(root: Path, folder: Path) -> None:
    no_label(root, folder)
    with tarfile.open(root / "train-0.tar", "a") as tar:
        add(tar, "bird/7.json", b'{"label": -1}')


def no_image(root: Path, folder: Path) -> None:
    with tarfile.open(root / "train-0.tar", "w") as tar:
        add(tar, "7.cls", b"1")


def only_test(root: Path, folder: Path) -> None:
    write_shards(root, folder, "test")


def more_classes_to_test_on(root: Path, folder: Path) -> None:
    write_shards(root, folder, "test", per_shard=100)
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for label, path in files_of(folder)[:30]:
            add(tar, f"{path.stem}.png", path.read_bytes())
            add(tar, f"{path.stem}.cls", str(label).encode())


def a_shard_that_is_gone(root: Path, folder: Path) -> None:
    (root / "info.json").write_text('{"splits": {"train": {"filenames": ["a.tar"]}}}')


def another_info(root: Path, folder: Path) -> None:
    (root / "info.json").write_text('["a.tar"]')


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda root, folder: None, "no shards in .*: shards end in .tar"),
        (lambda root, folder: root.rmdir(), "no folder of shards at .*: wds/ takes a folder of this machine"),
        (broken_tar, r"train-0.tar' cannot be read \(.*: shards are whole tar files, not compressed"),
        (cut_short, r"photos-train-0000.tar' cannot be read \(.*unexpected end"),
        (compressed, r"but compressed ones \(train-0.tar.gz\): unpack them"),
        (compressed_under_another_name, "cannot be read .* not compressed"),
        (
            no_label,
            "train-0.tar', sample 'bird/7' has no class: put a class index, .* into bird/7.cls, or bird/7.json with 'label'",
        ),
        (a_name_for_a_label, "sample 'bird/7' has no class"),
        (unlabelled, "sample 'bird/7' has no class"),
        (no_image, "no images .* in .*train-0.tar: add some"),
        (only_test, "no training shards .*: there are those of test alone"),
        (more_classes_to_test_on, "images labelled 5, which is not a class"),
        (a_shard_that_is_gone, r"names shards that are not there \(a.tar\)"),
        (another_info, "info.json does not list shards as timm has it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shards_of_no_use_are_named(arrange, message, places, tmp_path):
    (tmp_path / "shards").mkdir()
    arrange(tmp_path / "shards", Path(places["folder"]))
    with pytest.raises(DataError, match=message):
        open_data(f"wds/{tmp_path / 'shards'}", **GREY, check=("test",))


def test_a_table_whose_images_have_paths_alone_and_one_with_validation_images(places, tmp_path):
    (tmp_path / "table").mkdir()
    for part, first, count in (("train", 0, 6), ("validation", 6, 3), ("test", 9, 2)):
        write_table(tmp_path / "table", write_digits(tmp_path / "files" / part, count, first), part)
    folder = open_data(str(tmp_path / "files"), **GREY)
    for place in (
        f"hfds/{tmp_path / 'table'}",
        f"hfds/{tmp_path / 'files'}",
    ):  # the latter is their imagefolder, of paths
        data = open_data(place, data_dir=tmp_path / "hub", **GREY)
        for split, size in {"train": 60, "search": 30, "test": 20}.items():
            assert (len(data.split(split)), data.split(split).labels.tolist()) == (
                size,
                folder.split(split).labels.tolist(),
            )
        assert sorted(word for _, word in data.files()) == sorted(word for _, word in folder.files())
        assert any("scored on its 30 validation images" in note for note in data.notes)


def test_broken_images_of_a_table_are_named_by_their_row(places, tmp_path):
    folder = tmp_path / "files"
    shutil.copytree(places["folder"], folder)
    files_of(folder)[7][1].write_bytes(b"no image")
    (tmp_path / "table").mkdir()
    with pytest.raises(BrokenDataError, match=r"1 of 60 images in .*: 'hfds/.*table, train, row 7'.*not an image"):
        open_data(f"hfds/{write_table(tmp_path / 'table', folder)}", data_dir=tmp_path / "hub", **GREY)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.readers.reader_hfds", None)
    with pytest.raises(DataError, match=r"hfds/some needs Hugging Face's datasets, .*: pip install '\.\[hfds\]'"):
        open_source("hfds/some")


def test_a_place_is_written_one_way_and_may_change(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds").mkdir()
    for prefix in ("wds/", "hfds/", "hfids/"):
        config = checked_config(data=f"{prefix}birds")
        assert (config.data, short_name(config.data)) == (f"{prefix}{tmp_path / 'birds'}", "birds")
    assert checked_config(data="wds/birds", data_dir=str(tmp_path)).data == f"wds/{tmp_path / 'birds'}"
    assert checked_config(data="hfds/user/birds").data == "hfds/user/birds"  # a name of the hub
    assert moved(places["wds"], None, "wds/birds", None) == (f"wds/{tmp_path / 'birds'}", None)
    run = RunFolder(tmp_path / "run", checked_config(data=places["wds"]))
    run.path.mkdir()
    run.write_config("a fingerprint")
    RunFolder.check(run.path, checked_config(data="wds/birds"))
    with pytest.raises(ValueError, match="data: "):
        RunFolder.check(run.path, checked_config(data="torch/cifar10"))


def own_data(folder: Path) -> Data:
    """The digits of a folder, given in Python; what is random in their transform is keyed."""

    class Digits(torch.utils.data.Dataset):
        def __init__(self, files: list[tuple[int, Path]]) -> None:
            self.files = files

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            label, path = self.files[index]
            image = torch.from_numpy(np.array(Image.open(path))).float()[None] / 128 - 1
            return image.repeat_interleave(2, 1).repeat_interleave(2, 2) + 0.1 * torch.randn(1, 16, 16), label

    files = files_of(folder)
    return open_own((Digits(files[::2]), Digits(files[1::2])), "digits")


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        pytest.param(kind, workers, marks=() if workers == 0 or kind == "wds" else pytest.mark.slow)
        for kind in (*KINDS, "own")
        for workers in (0, 2)
    ],
)
def test_a_training_stopped_and_resumed_is_bit_for_bit_one_that_was_not(kind, workers, places, tmp_path):
    """With workers, the undisturbed training has none: their number has no say."""
    recipe = Recipe(epochs=2, batch_size=8, lr=1e-3)

    class Stopped(Exception):
        pass

    def train(state: Path, workers: int, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model("digits_vit", img_size=16, depth=1, embed_dim=16, num_heads=2)
        data = own_data(Path(places["folder"])) if kind == "own" else opened(kind, places)

        def progress(step: int, loss: float | None) -> None:
            if step == stop_at:
                raise Stopped

        train_model(model, data, recipe, state=state, workers=workers, save_seconds=0, progress=progress)
        return model.state_dict()

    whole, state = train(tmp_path / "whole.safetensors", 0), tmp_path / "state.safetensors"
    for stop_at in (2, 6):  # in the first epoch, and in the second
        with pytest.raises(Stopped):
            train(state, workers, stop_at)
    resumed = train(state, workers)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_processs_share_of_a_loaders_batches_is_drawn_and_not_kept(monkeypatch):
    drawn: list[int] = []

    class Counted(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            drawn.append(index)
            return super().__getitem__(index)

    images, labels = torch.randn(20, 1, 4, 4), torch.arange(20) % 2
    loaders = [DataLoader(Counted(images, labels), 4) for _ in range(2)]
    data = open_own(loaders, "own")
    monkeypatch.setattr("poolshare.supernet.data.splits.CACHE_BYTES", 0)
    whole = list(data.eval_loader("search", 4))
    for count in (1, 2, 3):
        shares = [data.eval_share("search", 4, rank, count) for rank in range(count)]
        assert sum(map(len, shares)) == len(whole) == 5
        for rank, share in enumerate(shares):
            for _ in range(2):  # architectures come in several turns
                drawn.clear()
                batches = iter(share)
                assert torch.equal(next(batches)[0], whole[rank][0])
                assert len(drawn) == 4 * (rank + 1)  # no further ones are there yet
                assert [*map(len, (pair[1] for pair in batches))] == [4] * (len(share) - 1)
            assert all(torch.equal(pair[0], other[0]) for pair, other in zip(share, whole[rank::count], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wds", "hfds"])
def test_every_verb_takes_them(kind, places, tmp_path):
    place, hub = place_of(kind, places), ("--data-dir", str(Path(places["root"], "hub"))) * (kind == "hfds")
    words = (
        "search",
        "--data",
        place,
        *hub,
        "--model",
        "digits_vit",
        "--model-args",
        "depth=2,embed_dim=16,num_heads=2",
    )
    words += (
        "--img-size",
        "16",
        "--in-chans",
        "1",
        "--epochs",
        "1",
        "--sampler",
        "evolution",
        "--trials",
        "8",
        "--device",
        "cpu",
    )
    run, export = tmp_path / "run", tmp_path / "export"
    assert call(*words, "--out", run)[0] == 0
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(place.partition("/")[2], elsewhere)
    moved_words = [f"{kind}/{elsewhere}" if word == place else word for word in words]
    assert call(*moved_words, "--out", run)[0] == 0
    assert call("trust", run, "--architectures", "6", "--epochs", "1")[0] == 0
    assert call("finalists", run, "--count", "1", "--epochs", "1")[0] == 0
    assert call("export", run, "--out", export)[0] == 0
    assert call("retrain", export, "--epochs", "1", "--out", tmp_path / "again")[0] == 0
    status, out, error = call("evaluate", tmp_path / "again", "--data", place, *hub)
    assert (status, "on 12 test images" in out) == (0, True), error
    tests = write_digits(tmp_path / "more", 2 if kind == "wds" else 8, first=12)  # of a data set some are set aside
    (tmp_path / "held").mkdir()
    held = write_shards(tmp_path / "held", tests, "val") if kind == "wds" else write_table(tmp_path / "held", tests)
    status, out, error = call("evaluate", tmp_path / "again", "--data", f"{kind}/{held}", *hub)
    assert status == 0, error
    assert kind == "hfds" or "on 20 test images" in out
