"""A run is known by what it depends on: images, weights and resolved options, wherever they lie and however they are spelled."""

import io
import json
import logging
import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from poolshare.search import SearchResult, cli, search
from poolshare.search.config import SearchConfig
from poolshare.search.exported.export import check_new, load_supernet
from poolshare.search.exported.retrain import retrain
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.records import read_json, write_json
from poolshare.space import ConfigError, DamagedError, DataError, RunError, presets
from poolshare.space.files import write_whole
from poolshare.supernet.training.checkpoint import load_state, save_tensors, state_before

SMALL = {"depth": 2, "embed_dim": 16, "num_heads": 1, "patch_size": 8}
OPTIONS = {"model": "vit_tiny_patch16_224", "model_args": SMALL, "img_size": 16, "epochs": 1, "batch_size": 8}
OPTIONS |= {"trials": 4, "sampler": "random", "device": "cpu", "quiet": True}


def make_photos(root: Path, seed: int = 0, each: int = 10) -> Path:
    rng = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(each + (name == "dog") * seed):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with photos, weights to begin with, a finished run on both and an export of it."""
    folder = tmp_path_factory.mktemp("identity")
    make_photos(folder / "photos")
    torch.manual_seed(0)
    save_file(
        timm.create_model(OPTIONS["model"], num_classes=2, img_size=16, **SMALL).state_dict(),
        folder / "start.safetensors",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before = os.umask(0o022)
        found = search("photos", out="run", weights="start.safetensors", **OPTIONS)
        found.export("dense", "export")
        os.umask(before)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of it all, where the test stands."""
    here = tmp_path / "here"
    shutil.copytree(made, here)
    config, facts = here / "run" / "config.json", here / "export" / "architecture.json"
    content = read_json(config)
    content["search"] |= {"data": str(here / "photos"), "weights": str(here / "start.safetensors")}
    write_json(config, content)
    write_json(facts, read_json(facts) | {"data": str(here / "photos")})
    monkeypatch.chdir(here)
    return here


def test_one_place_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    spelled = ["base", "base/", "./base", "../" + tmp_path.name + "/base", tmp_path / "base", "~/base"]
    found = [SearchConfig(data=str(one), weights=str(one)) for one in spelled]
    found.append(SearchConfig(data="base", data_dir=str(tmp_path), weights="base"))
    assert {(one.data, one.data_dir, one.weights) for one in found} == {
        (str(tmp_path / "base"), None, str(tmp_path / "base"))
    }
    assert SearchConfig(data="digits", data_dir="x").data_dir is None
    named = SearchConfig(data="torch/cifar10", data_dir="base")
    assert (named.data, named.data_dir) == ("torch/cifar10", str(tmp_path / "base"))
    assert named.at(data_dir="other").data_dir == str(tmp_path / "other")
    assert named.at("base").data_dir is None
    with pytest.raises(ConfigError, match="--data-dir other belongs to torch"):
        found[0].at(data_dir="other")


def test_a_run_keeps_what_it_was_resolved_to(made):
    config = RunFolder.open(made / "run").config
    assert (config.data, config.weights) == (str(made / "photos"), str(made / "start.safetensors"))
    assert (config.levels, config.in_chans) == ((4, 3, 2, 1), 3)
    assert set(config.operators) < set(presets.WARM_OPERATORS)  # what harms least, which is kept too
    assert config.model == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert config.title == "vit_tiny_patch16_224 on photos"


def unchanged(run: Path, *names: str) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("supernet.safetensors", "study.journal", "candidates.csv")}


def test_a_run_goes_on_under_other_spellings_with_defaults_spelled_out_and_when_all_has_moved(place, monkeypatch):
    before, config = unchanged(place / "run"), RunFolder.open(place / "run").config
    spelled = {name: getattr(config, name) for name in ("levels", "operators", "max_run", "in_chans")}
    spelled |= {"search_fraction": 0.2, "lr": 3e-4}
    spelled |= {"recipe": {"mixup": 0.0}, "download": True, "model": "vit_tiny_patch16_224.augreg_in21k_ft_in1k"}
    search("./photos/", out=place / "run", weights=place / "start.safetensors", **OPTIONS | spelled)
    assert RunFolder.open(place / "run").config.recipe == {}
    (place / "photos").rename(place / "moved")
    (place / "start.safetensors").rename(place / "weights.safetensors")
    search(place / "moved", out="run", weights="weights.safetensors", **OPTIONS)
    assert RunFolder.open("run").config.data == str(place / "moved")
    (place / "weights.safetensors").unlink()  # the supernet lies in the run
    search(place / "moved", out="run", weights="weights.safetensors", **OPTIONS)
    monkeypatch.chdir(place.parent)
    assert unchanged(place / "run") == before


def test_other_images_weights_or_options_are_another_run(place):
    make_photos(place / "others", seed=1)
    with pytest.raises(RunError, match=r"training images of .*others are not those"):
        search("others", out="run", weights="start.safetensors", **OPTIONS)
    (place / "start.safetensors").write_bytes((place / "start.safetensors").read_bytes() + b" ")
    with pytest.raises(RunError, match=r"start\.safetensors are not those .* was begun with"):
        search("photos", out="run", weights="start.safetensors", **OPTIONS)
    max_run = RunFolder.open(place / "run").config.max_run
    for changes, says in (
        ({"levels": (4,)}, r"levels: \(4, 3, 2, 1\) there, \(4,\) now"),
        ({"max_run": 3 - max_run}, f"max_run: {max_run} there, {3 - max_run} now"),
        ({"recipe": {"mixup": 0.5}}, "recipe: {} there"),
        ({"weights": None, "lr": 3e-4}, "weights: '.*start.safetensors' there, None now"),
    ):
        with pytest.raises(RunError, match=says):
            search("photos", out="run", **{"weights": place / "start.safetensors"} | OPTIONS | changes)


def test_weights_in_a_folder_are_known_by_their_contents_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "own" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    config = SearchConfig(data="digits", weights="local-dir:own")
    assert config.weights == f"local-dir:{tmp_path / 'own'}"
    run = RunFolder(tmp_path / "run", config)
    run.path.mkdir()
    run.write_config("some images")
    (tmp_path / "own").rename(tmp_path / "moved")
    for weights in ("moved", "local-dir:moved"):
        moved = SearchConfig(data="digits", weights=weights)
        RunFolder.check(run.path, moved)
        assert run.check_weights(moved)
    save_file({"x": torch.ones(1)}, tmp_path / "moved" / "model.safetensors")
    with pytest.raises(RunError, match=r"are not those .* was begun with"):
        run.check_weights(moved)


def test_a_changed_preset_breaks_no_run_begun_with_the_old_one(place, monkeypatch):
    monkeypatch.setattr(presets, "even_levels", lambda *arguments: (4,))
    folder = search("photos", out="run", weights="start.safetensors", **OPTIONS).run
    assert folder.config.levels == load_supernet(folder).space.levels == (4, 3, 2, 1)
    assert "levels" in folder.defaults
    # Where they were asked for, leaving them out asks for others.
    content = read_json(folder.path / "config.json")
    write_json(
        folder.path / "config.json", content | {"defaults": [name for name in content["defaults"] if name != "levels"]}
    )
    with pytest.raises(RunError, match=r"levels: \(4, 3, 2, 1\) there, \(4,\) now"):
        search("photos", out="run", weights="start.safetensors", **OPTIONS)


def test_trust_and_finalists_find_images_and_weights_that_moved(place, verb):
    (place / "photos").rename(place / "moved")
    (place / "start.safetensors").rename(place / "weights.safetensors")
    plan = ("trust", "run", "--architectures", "2", "--twice", "0", "--bands", "1", "--epochs", "1", "-q")
    status, _, err = verb(*plan)
    assert (status, "start.safetensors cannot be read" in err) == (2, True), err
    status, _, err = verb(*plan, "--weights", "weights.safetensors")
    assert (status, "no data at" in err) == (2, True), err
    status, _, err = verb(*plan, "--data", "moved", "--weights", "weights.safetensors")
    assert status == 0, err
    status, _, err = verb("finalists", "run", "--count", "1", "--epochs", "1", "--data", "moved", "-q")
    assert status == 0, err
    make_photos(place / "others", seed=1)
    status, _, err = verb("finalists", "run", "--count", "2", "--epochs", "1", "--data", "others", "-q")
    assert (status, "are not those" in err) == (1, True), err
    Path("weights.safetensors").write_bytes(Path("weights.safetensors").read_bytes() + b" ")
    status, _, err = verb(*plan, "--data", "moved", "--weights", "weights.safetensors")
    assert (status, "weights.safetensors are not those" in err) == (1, True), err


def test_a_retraining_on_other_data_keeps_a_path_that_holds_from_anywhere(place, verb, monkeypatch):
    assert json.loads((place / "export" / "architecture.json").read_text())["data_dir"] is None
    make_photos(place / "others", seed=1)
    status, out, err = verb("retrain", "export", "--data", "others/", "--epochs", "1", "--json", "-q")
    assert status == 0, err
    facts = json.loads(out)
    assert (facts["data"], facts["data_dir"]) == (str(place / "others"), None)
    monkeypatch.chdir(place.parent)
    status, out, err = verb("evaluate", place / "export-retrained", "--json", "-q")
    assert (status, json.loads(out)["details"]["correct"]) == (0, facts["test_details"]["correct"]), err
    # However it is spelled, it is what the model was trained on, and noticed where its images are others.
    (place / "others" / "cat" / "0.png").rename(place / "others" / "dog" / "more.png")
    with pytest.raises(DataError, match="are not those the model was searched on"):
        retrain(place / "export-retrained", place / "again", data=os.path.relpath(place / "others"))


def test_an_export_fills_an_empty_folder_and_the_one_it_stands_in(place, verb, monkeypatch):
    run = place / "run"
    for name in ("a", "b"):
        (place / name).mkdir()
    (place / "a" / ".git").mkdir()
    monkeypatch.chdir(place / "a")
    status, _, err = verb("export", run, "--architecture", "dense", "--out", ".")
    assert status == 0, err
    assert Path.cwd() == place / "a"
    assert {path.name for path in Path().iterdir()} == {
        ".git", "README.md", "architecture.json", "config.json", "model.safetensors",
    }  # fmt: skip
    monkeypatch.chdir(place / "b")
    status, _, err = verb("retrain", place / "a", "--epochs", "1", "--out", ".", "-q")
    assert status == 0, err
    assert verb("evaluate", ".", "-q")[0] == 0
    for words in (("export", run, "--architecture", "dense", "--out", "."), ("retrain", place / "a", "--out", ".")):
        status, _, err = verb(*words)
        assert (status, "exists already" in err) == (1, True), err


def test_a_stopped_retraining_is_begun_anew_by_an_option_that_says_what_is_lost(place, verb, monkeypatch):
    words = ("retrain", "export", "--epochs", "4", "--out", "out", "-q")

    def stop(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("poolshare.search.exported.retrain.answers_on_test", stop)  # all is trained, nothing is written
        with pytest.raises(MemoryError):
            verb(*words)
    status, _, err = verb(*words, "--lr", "0.01")
    assert (status, "lr: 0.0003 there, 0.01 now" in err, "4 epochs of which are done" in err) == (1, True, True), err
    assert "give --restart" in err
    assert "delete" not in err
    status, _, err = verb(*words, "--lr", "0.01", "--restart")
    assert status == 0, err
    assert json.loads(Path("out/architecture.json").read_text())["recipe"]["lr"] == 0.01
    assert not Path(".out.retraining").exists()


def test_files_have_the_permissions_that_the_umask_asks_for(made, tmp_path):
    for path in [*(made / "run").iterdir(), *(made / "export").iterdir()]:
        assert oct(stat.S_IMODE(path.stat().st_mode)) == "0o644", path
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", lambda path: save_file({"x": torch.zeros(1)}, path))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "name",
    [
        "candidates.csv",
        "summary.json",
        "latency.json",
        "trust.json",
        "finalists.csv",
        "supernet.safetensors",
    ],
)
def test_what_cannot_be_read_is_not_called_damaged(name, place):
    path = place / "run" / name
    path.unlink(missing_ok=True)
    path.mkdir()  # as unreadable, even for root, as a file of another user

    def read() -> None:
        found = RunFolder.open("run")
        found.read_latency()
        _ = SearchResult("run").report
        load_supernet(found)

    with pytest.raises(RunError) as raised:
        read()
    assert str(raised.value).startswith(f"{Path('run', name)} "), raised.value
    assert "cannot be read (Is a directory); check the path and its permissions" in str(raised.value)
    assert not isinstance(raised.value, DamagedError)
    assert not any(word in str(raised.value) for word in ("damaged", "delete", "remove"))


def test_a_state_that_cannot_be_read_is_not_replaced_by_the_one_before_it(tmp_path, monkeypatch):
    path = tmp_path / "training.safetensors"
    for step in (1, 2):
        save_tensors(path, {"x": torch.full((2,), float(step))}, {"step": step}, state_before(path))
    whole = path.read_bytes()

    def refused(name, *arguments, **options):
        if Path(name) == path:
            raise PermissionError(13, "Permission denied")
        return real(name, *arguments, **options)

    real = open
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refused)
        with pytest.raises(RunError, match=r"cannot be read \(Permission denied"):
            load_state(path, {"x": (2,)}, print)
    with pytest.raises(RunError, match="is of another model"):
        load_state(path, {"x": (3,)}, print)
    assert path.read_bytes() == whole
    assert state_before(path).exists()
    assert load_state(path, {"x": (2,)}, print)[1]["step"] == 2


def test_refusals_name_what_is_wrong_before_anything_is_read(place, verb):
    (place / "file").touch()
    search_words = (
        "search",
        "--data",
        "photos",
        "--img-size",
        "16",
        "--model-args",
        "depth=2,embed_dim=16,num_heads=1,patch_size=8",
    )
    for words, says in (
        ((*search_words, "--out", "file/x"), "file is a file; --out needs a folder"),
        (("export", "run", "--architecture", "dense", "--out", "file/x"), "file is a file; --out needs a folder"),
        (("retrain", "export", "--out", "file/x"), "file is a file; --out needs a folder"),
        ((*search_words, "--out", "photos/run"), "would count as a class"),
        (("export", "run", "--architecture", "dense", "--out", "photos/export"), "would count as a class"),
        (("retrain", "export", "--out", "photos/cat/out"), "would count as a class"),
    ):
        status, _, err = verb(*words)
        assert (status, says in err) == (1, True), (words, err)
        assert sorted(path.name for path in (place / "photos").iterdir()) == ["cat", "dog"]
    assert verb("show", "64 " * 200)[0] == 0
    status, _, err = verb("show", "9" * 300)
    assert (status, err.startswith("error: ")) == (2, True), err
    status, _, err = verb("evaluate", "export", "--device", "mps")
    assert (status, "device 'mps' cannot be used here" in err, len(err) < 300) == (2, True, True), err
    (place / "split" / "train").mkdir(parents=True)
    RunFolder.check(place / "split" / "run", SearchConfig(data=str(place / "split")))  # no class there
    with pytest.raises(RunError, match="count as a class"):
        RunFolder.check(place / "split" / "train" / "run", SearchConfig(data=str(place / "split")))
    check_new(place / "new" / "deeper")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_shows_what_it_can(encoding, monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "argv", ["poolshare", "show", "64*2 16@max2d"])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
    stream.flush()
    assert not leaving.value.code
    text = written.getvalue().decode(encoding)
    assert ("█" if encoding == "utf-8" else "####") in text
    assert ("64 → 16" if encoding == "utf-8" else "64 > 16") in text


def test_every_verb_prints_what_a_terminal_without_unicode_can_show(place, monkeypatch):
    """One place prepares standard output and error for all verbs: `main`."""
    shutil.copytree("photos", "Bilder → ß")
    small = ["--model-args", ",".join(f"{name}={value}" for name, value in SMALL.items()), "--img-size", "16"]
    search_again = ["search", "--data", "photos", "--weights", "start.safetensors", "--out", "run", *small]
    search_again += ["--model", OPTIONS["model"], "--epochs", "1", "--batch-size", "8", "--trials", "4"]
    written = {}
    for words in (
        ["space", *small, "--budget", "95%"],
        [*search_again, "--sampler", "random", "--device", "cpu"],
        ["worker", "run"],
        ["pareto", "run", "--png", "Bild → ß.png"],
        ["show", "export"],
        ["export", "run", "--architecture", "dense", "--out", "new → ß"],
        ["retrain", "export", "--epochs", "1", "--out", "again → ß"],
        ["evaluate", "export", "--data", "Bilder → ß"],
        ["predict", "export", "Bilder → ß"],
        ["trust", "run", "--architectures", "2", "--twice", "0", "--bands", "1", "--epochs", "1"],
        ["finalists", "run", "--count", "1", "--epochs", "1"],
        ["show", "64*2 16@→"],  # refused
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2)]
        with monkeypatch.context() as patch:
            for name, stream in zip(("stdout", "stderr"), streams, strict=True):
                patch.setattr(sys, name, stream)
            patch.setattr(sys, "argv", ["poolshare", *words])
            status = 0
            try:
                cli.main()
            except SystemExit as leaving:
                status = leaving.code or 0
        out, err = written[" ".join(words)] = tuple(stream.buffer.getvalue().decode("ascii") for stream in streams)
        assert (status, bool(out or err)) == (2 if "@→" in words[-1] else 0, True), (words, err)
    everything = "".join(map("".join, written.values()))
    assert "Bilder > ?" in everything  # letters that there are not are replaced
    assert "error: " in written["show 64*2 16@→"][1]


def test_a_quiet_verb_silences_timm_too(place, verb):
    logger = logging.getLogger("timm")
    before = logger.level
    try:
        assert verb("evaluate", "export", "-q")[0] == 0
        assert not logging.getLogger("timm.models._builder").isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)
