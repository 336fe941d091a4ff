"""The verbs from end to end on real digits: search → pareto → export → retrain → evaluate, and what they refuse."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import typer
from conftest import Forked
from opened import open_data
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from poolshare.search.cli.app import app
from poolshare.search.config import SearchConfig, checked_config
from poolshare.search.job.classes import matched_classes
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.prepare import model_options, prepare, space_of
from poolshare.search.job.records import read_json, write_json
from poolshare.space import OPERATORS, Architecture, ModelError, RunError, SearchSpace, band, counting
from poolshare.supernet import SuperNet, count_macs, measure_macs
from poolshare.supernet.base import outline
from poolshare.supernet.training.checkpoint import load_tensors

SMALL = [
    "--data",
    "digits",
    "--model-args",
    "depth=3,embed_dim=16,num_heads=2",
    "--batch-size",
    "128",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def run(digits_run):
    """A finished search over digits with a small model."""
    return digits_run.folder, digits_run


def test_search_announces_its_time_shows_progress_and_ends_with_frontier_report_and_export_command(run):
    folder, finished = run
    assert "training the supernet for 2 epochs takes about" in finished.stderr
    assert "scoring all of them on 377 images" in finished.stderr
    assert "training the supernet: 100%" in finished.stderr
    assert f"report: {folder}/report.html" in finished.stdout
    assert f"export: poolshare export {folder}" in finished.stdout
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "supernet.safetensors", "training.safetensors", "candidates.csv", "pareto.csv", "report.html",
    }  # fmt: skip


def test_the_whole_space_was_scored_with_the_supernets_own_accuracy(run):
    folder, _ = run
    config = RunFolder.open(folder).config
    job = prepare(config)
    tensors, facts = load_tensors(folder / "supernet.safetensors")
    assert facts["epochs"] == 2
    job.supernet.load_state_dict(tensors)
    job.supernet.eval()
    table = pd.read_csv(folder / "candidates.csv")
    assert list(table["architecture"]) == list(map(str, job.supernet.space))
    [(images, labels)] = job.data.eval_loader("search", 1000)
    for row in table.sample(5, random_state=0).itertuples():
        with torch.inference_mode():
            logits = job.supernet(images, [Architecture.parse(row.architecture)])[0]
        assert row.correct == int((logits.argmax(-1) == labels).sum())
        assert row.total == len(labels) == 377


def test_pareto_gives_what_the_table_says(run, verb):
    folder, _ = run
    status, out, _ = verb("pareto", folder, "--json")
    found = json.loads(out)
    table = pd.read_csv(folder / "candidates.csv")
    assert status == 0
    for point in found["frontier"]:
        better = (table["top1"] >= point["top1"]) & (table["macs"] <= point["macs"])
        assert (table[better][["top1", "macs"]] == [point["top1"], point["macs"]]).all(axis=None)
    status, out, _ = verb("pareto", folder, "--budget", "50%", "--json")
    assert all(point["macs"] <= found["dense"]["macs"] / 2 for point in json.loads(out)["frontier"])
    status, _, err = verb("pareto", folder, "--budget", "1%")
    assert status == 2
    assert "ask for at least" in err


def test_pareto_names_a_point_and_writes_what_it_is_asked_for(run, verb, tmp_path):
    folder, _ = run
    table = pd.read_csv(folder / "candidates.csv")
    files = {"png": tmp_path / "out.png", "csv": tmp_path / "frontier.csv"}
    folder = shutil.copytree(folder, tmp_path / "run")
    for name in ("report.html", "pareto.png", "layers.csv", "progress.csv"):
        (folder / name).unlink()
    words = [part for name, path in files.items() for part in (f"--{name}", path)]
    status, out, err = verb("pareto", folder, "--cost", "parameters", "--pick", "half-point", *words, "--refresh")
    assert (status, err) == (0, "")
    assert all((folder / name).exists() for name in ("report.html", "pareto.png", "layers.csv", "progress.csv"))
    assert max(len(line) for line in out.splitlines() if str(folder) not in line and str(tmp_path) not in line) <= 80
    assert "parameters (k)" in out
    assert all(path.exists() for path in files.values())
    assert len(pd.read_csv(tmp_path / "out.csv")) == len(table)
    frontier = pd.read_csv(files["csv"])
    assert frontier["parameters"].is_monotonic_increasing
    dense = json.loads((folder / "summary.json").read_text())["dense"]
    close = frontier[frontier["top1"] >= dense["top1"] - 0.5].iloc[0]
    assert f"half-point: {close['architecture']}\n" in out
    assert "why: the least parameters that loses at most half a point" in " ".join(out.split())
    assert f"--architecture '{close['architecture']}'" in out

    status, out, _ = verb("pareto", folder, "--pick", "knee", "--compare", folder, "--compare", folder, "--json")
    found = json.loads(out)
    assert len(found["compared"]) == 3
    assert found["pick"]["architecture"] in set(table["architecture"])
    assert 0 < found["hypervolume"] < 1
    for words, problem in (
        (["--pick", "budget"], "needs a budget"),
        (["--cost", "latency"], "has no latency"),
        (["--csv", tmp_path / "early.csv", "--png", tmp_path / "figure.jpg"], "does not end in .png"),
        (["--pick", "cheap"], "cheap"),
    ):
        status, _, err = verb("pareto", folder, *words)
        assert status in (1, 2), words
        assert problem in err
    assert not (tmp_path / "early.csv").exists()


def test_the_walk_through_of_the_readme_works_as_written(run, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "search" / "README.md").read_text(encoding="utf-8")
    code = readme.split("<!-- walk-through -->\n```python\n")[1].split("```")[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run[0])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    row = names["candidates"].set_index("architecture").loc[names["choice"].architecture]
    assert row["top1"] >= names["report"].dense["top1"] - 0.5
    # The model rebuilt from the run answers as the search counted.
    job = prepare(names["found"].run.config)
    [(images, labels)] = job.data.eval_loader("search", 1000)
    with torch.inference_mode():
        assert int((names["model"].eval()(images).argmax(-1) == labels).sum()) == row["correct"]


def test_no_name_of_a_file_reaches_the_terminal_raw(verb, tmp_path):
    hostile = tmp_path / "\x1b[31m[red]x"
    for words in (["pareto", hostile], ["search", "--data", hostile, "--out", tmp_path / "run"], ["show", "9\x1b[2J"]):
        status, out, err = verb(*words)
        assert (status in (1, 2), "\x1b" in out + err, r"\x1b[" in err) == (True, False, True), err


def test_show_draws_a_text_or_an_export(run, verb, tmp_path):
    folder, _ = run
    status, out, _ = verb("show", "64*2 16@max2d")
    assert (status, out.count("█") > 10, "max2d 64 → 16" in out) == (0, True, True)
    layers = json.loads(verb("show", "64*2 16@max2d", "--json")[1])["layers"]
    assert [layer["tokens"] for layer in layers] == [64, 64, 16]
    assert verb("export", folder, "--pick", "half-point", "--out", tmp_path / "export")[0] == 0
    status, out, _ = verb("show", tmp_path / "export")
    assert status == 0
    assert "% of dense" in out
    status, _, err = verb("show", "64 16")
    assert (status, "needs an operator" in err) == (2, True)
    status, _, err = verb("show", folder)
    assert (status, "is not an exported folder" in err) == (1, True)


def test_an_export_loads_in_a_fresh_process_and_gives_the_supernets_logits(run, verb, tmp_path):
    folder, _ = run
    text = "64*2 4@max2d"
    status, _, err = verb("export", folder, "--architecture", text, "--out", tmp_path / "export", "--json")
    assert status == 0, err
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    script = (
        "import sys, numpy, timm, torch, poolshare.supernet\n"
        "timm.layers.set_fused_attn(False)\n"
        "model = timm.create_model(f'local-dir:{sys.argv[1]}/export', pretrained=True).eval()\n"
        "images = torch.from_numpy(numpy.load(sys.argv[1] + '/images.npy'))\n"
        "with torch.no_grad(): numpy.save(sys.argv[1] + '/logits.npy', model(images).numpy())\n"
        "print(model.pretrained_cfg['label_names'], model.pretrained_cfg['mean'], model.pretrained_cfg['input_size'])\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert fresh.stdout.strip() == f"{[str(digit) for digit in range(10)]} [0.5] (1, 8, 8)"

    space = RunFolder.open(folder).read_summary()["space"]
    from poolshare.space import SearchSpace

    net = SuperNet.from_timm("digits_vit", SearchSpace(**space), depth=3, embed_dim=16, num_heads=2)
    net.load_state_dict(load_tensors(folder / "supernet.safetensors")[0])
    with torch.no_grad():
        expected = net.eval()(images, [Architecture.parse(text)])[0]
    assert np.array_equal(np.load(tmp_path / "logits.npy"), expected.numpy())

    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert "blocks.1.attn.v.weight" in weights
    assert "blocks.1.attn.qkv.weight" not in weights
    facts = json.loads((tmp_path / "export" / "architecture.json").read_text())
    assert facts["architecture"] == text
    assert facts["parameters"] == sum(value.numel() for value in weights.values())


def test_retrain_and_evaluate_agree_and_overwrite_nothing(run, verb, tmp_path):
    folder, _ = run
    export = tmp_path / "export"
    assert verb("export", folder, "--budget", "60%", "--out", export)[0] == 0
    status, out, err = verb("retrain", export, "--data", "digits", "--epochs", "2", "--lr", "5e-3", "--json", "-q")
    assert status == 0, err
    facts = json.loads(out)
    assert facts["test_total"] == 540
    status, out, _ = verb("evaluate", tmp_path / "export-retrained", "--json", "-q")
    result = json.loads(out)
    assert (result["details"]["correct"], result["total"]) == (facts["test_details"]["correct"], 540)
    assert result["macs"] == facts["macs"] <= 0.6 * facts["dense_macs"]
    assert result["interval"][0] < result["score"] < result["interval"][1]
    before = (tmp_path / "export-retrained" / "model.safetensors").read_bytes()
    for words in (("retrain", export), ("export", folder, "--out", tmp_path / "export-retrained")):
        status, _, err = verb(*words)
        assert status == 1
        assert "exists already; choose another --out" in err
    assert (tmp_path / "export-retrained" / "model.safetensors").read_bytes() == before
    status, _, err = verb("evaluate", folder)
    assert status == 1
    assert "is not an exported folder" in err


def test_retraining_depends_on_its_seed_alone(run, verb, tmp_path):
    folder, _ = run
    export = tmp_path / "export"
    assert verb("export", folder, "--budget", "60%", "--out", export)[0] == 0
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ("retrain", export, "--epochs", "1", "--seed", seed, "--out", tmp_path / name, "-q")
        assert verb(*words)[0] == 0
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def test_the_same_command_again_finds_everything_done(run, verb):
    folder, _ = run
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    status, _, err = verb("search", *SMALL, "--epochs", "2", "--out", folder)
    assert status == 0
    assert "has been trained for its 2 epochs" in err
    assert {path.name: path.read_bytes() for path in folder.glob("*.csv")} == before


def test_continuing_with_more_epochs_trains_on_and_keeps_the_old_scores(verb, tmp_path):
    folder = tmp_path / "run"
    assert verb("search", *SMALL, "--epochs", "1", "--sampler", "evolution", "--trials", "20", "--out", folder)[0] == 0
    first = (folder / "candidates.csv").read_bytes()
    status, _, err = verb(
        "search", *SMALL, "--epochs", "2", "--sampler", "evolution", "--trials", "30", "--out", folder
    )
    assert status == 0, err
    assert "training the supernet for 1 epochs" in err
    assert (folder / "candidates-1-epochs.csv").read_bytes() == first
    assert len(pd.read_csv(folder / "candidates.csv")) > 15
    status, _, err = verb(
        "search", *SMALL, "--epochs", "1", "--sampler", "evolution", "--trials", "30", "--out", folder
    )
    assert status == 1
    assert "was trained for 2 epochs already" in err


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["search", "--data", "nowhere", "--out", "OUT"], 2, "nowhere"),
        (["search", *SMALL, "--model", "vit_tinny_patch16_224", "--out", "OUT"], 2, "did you mean"),
        (["search", *SMALL, "--model", "vit_small_patch16_224", "--out", "OUT"], 2, "take a model made for 8×8"),
        (["search", *SMALL, "--levels", "64,30", "--out", "OUT"], 2, "30 is not a square grid"),
        (["search", *SMALL, "--levels", "49,16", "--out", "OUT"], 2, "begin with 49"),
        (["search", *SMALL, "--levels", "a,b", "--out", "OUT"], 2, "--levels 'a,b'"),
        (["search", *SMALL, "--operators", "max3d", "--out", "OUT"], 2, "max3d"),
        (["search", *SMALL, "--budget", "1%", "--out", "OUT"], 2, "this space reaches from"),
        (["search", *SMALL, "--budget", "fast", "--out", "OUT"], 2, "budget 'fast'"),
        (["search", *SMALL, "--sampler", "magic", "--out", "OUT"], 2, "sampler"),
        (["search", *SMALL, "--lr", "-1", "--out", "OUT"], 2, "--lr -1.0: input should be greater than 0"),
        (["search", "--data", "digits", "--model-args", "img_size=32", "--out", "OUT"], 2, "--img-size decides it"),
        (["search", "--data", "digits", "--model-args", "patch_size=0", "--out", "OUT"], 2, "patch_size"),
        (["export", "OUT", "--pick", "foo", "--out", "OTHER"], 2, "--pick"),
        (["search", *SMALL, "--device", "cuda:77", "--out", "OUT"], 2, "cuda:77"),
        (["search", *SMALL, "--model-args", "depth", "--out", "OUT"], 2, "KEY=VALUE"),
        (["search", *SMALL, "--model-args", "depht=3", "--out", "OUT"], 2, "depht"),
        (["search", "--out", "OUT"], 2, "--data"),
        (["space", "--model", "vit_tinny"], 2, "vit_tinny"),
        (["space", "--model", "resnet18"], 2, "it is a ResNet"),
        (["pareto", "OUT"], 1, "is not a run folder"),
        (["export", "OUT", "--out", "OTHER"], 1, "is not a run folder"),
        (["retrain", "OUT"], 1, "is not an exported folder"),
    ],
)  # fmt: skip
def test_wrong_use_is_named_and_nothing_is_written(words, status, says, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, err = verb(*words)
    assert (found, says in err) == (status, True), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_architectures_outside_the_space(run, verb, tmp_path):
    folder, _ = run
    for text, says in (
        ("64*2 5@max2d", "layer 2 (5@max2d)"),
        ("64*4", "has 4 layers; this space has 3"),
        ("64 64 x", "run 3"),
        ("64 64 16", "needs an operator"),
    ):
        status, _, err = verb("export", folder, "--architecture", text, "--out", tmp_path / "export")
        assert (status, says in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def begin(path, **changes):
    with RunFolder.claim(path, SearchConfig(data="digits", **changes)) as folder:
        folder.write_config("the images")
        return folder


def test_foreign_damaged_and_changed_run_folders_are_refused_untouched(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("do not touch")
    with pytest.raises(RunError, match="holds other files"):
        begin(tmp_path / "foreign")
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]

    path = tmp_path / "run"
    begin(path)
    good = (path / "config.json").read_text()
    with pytest.raises(RunError, match=r"lr: 0.002 there, 0.1 now; seed: 0 there, 1 now"):
        begin(path, seed=1, lr=0.1)
    with pytest.raises(RunError, match="training images of digits are not those"):
        RunFolder.open(path).write_config("other images")
    assert (path / "config.json").read_text() == good
    begin(path, trials=5, epochs=99, workers=2, device="cpu")

    for damaged in ("", "{", "[]", '{"format": 1}', good.replace('"lr"', '"rl"'), good.replace("0.002", '"x"')):
        (path / "config.json").write_text(damaged)
        with pytest.raises(RunError, match=r"config\.json is damaged or not a poolshare file"):
            RunFolder.open(path)
    (path / "config.json").write_text(good.replace('"format": 1', '"format": 2'))
    with pytest.raises(RunError, match="format version 2"):
        RunFolder.open(path)


def test_a_run_folder_in_use_names_its_owner(tmp_path):
    path = tmp_path / "run"
    begin(path)
    before = (path / "config.json").read_text()

    def hold():
        with RunFolder.claim(path, SearchConfig(data="digits")):
            print("held", flush=True)
            time.sleep(600)

    other = Forked(hold)
    other.wait_for("held", "out")
    with pytest.raises(RunError, match=f"in use by process {other.pid} on"):
        begin(path, trials=7)
    other.send(signal.SIGKILL)
    assert other.wait()[0] == -signal.SIGKILL
    assert (path / "config.json").read_text() == before
    begin(path)  # a killed owner leaves no lock behind
    assert str(os.getpid()) in (path / ".lock").read_text()


def test_a_damaged_candidates_file_is_never_shown_as_a_result(run, verb, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    good = (folder / "candidates.csv").read_text().splitlines(keepends=True)
    (folder / "candidates.csv").write_text("".join(good[:9]))  # cut at the end of a line
    status, out, err = verb("pareto", folder, "--json")
    assert (status, out, "candidates.csv is damaged" in err) == (1, "", True), err
    number = len(good[3].split(",")[1])
    for damaged in (
        [*good[:3], "64 nonsense" + good[3][good[3].index(",") :], *good[4:]],
        [*good[:3], good[3].replace(good[3].split(",")[1], "99.9" + "0" * number, 1), *good[4:]],
        [*good, good[-1]],
        [good[0].replace("macs", "flops"), *good[1:]],
        [*good[:5], good[5][:-6]],
    ):
        (folder / "candidates.csv").write_text("".join(damaged))
        status, _, err = verb("pareto", folder)
        assert (status, "candidates.csv is damaged" in err) == (1, True), err


def test_a_damaged_summary_or_journal_is_made_again_or_named(verb, tmp_path):
    folder = tmp_path / "run"
    words = ("search", *SMALL, "--epochs", "1", "--sampler", "evolution", "--out", folder, "-q")
    assert verb(*words, "--trials", "10")[0] == 0
    for damaged in ("", "{}", '{"format": 1}'):
        (folder / "summary.json").write_text(damaged)
        status, _, err = verb("pareto", folder)
        assert (status, "run the same `poolshare search` again" in err) == (1, True), err
        assert verb(*words, "--trials", "10")[0] == 0
        assert verb("pareto", folder)[0] == 0
    (folder / "study.journal").write_text("nonsense\n")
    status, _, err = verb(*words, "--trials", "15")
    assert (status, "study.journal is damaged" in err) == (1, True), err


def test_an_edited_export_is_refused(run, verb, tmp_path):
    export = tmp_path / "export"
    assert verb("export", run[0], "--architecture", "64*2 16@max2d", "--out", export)[0] == 0
    config, facts = (export / "config.json").read_text(), (export / "architecture.json").read_text()
    for name, text, says in (
        ("config.json", config.replace("16@max2d", "4@max2d"), "config.json is not what was written there"),
        ("config.json", config[:-20], "config.json is not what was written there"),
        ("architecture.json", facts.replace('"64*2 16@max2d"', '"64*2 4@max2d"'), "edited or damaged"),
        ("architecture.json", facts[:-20], "is damaged"),
    ):
        (export / name).write_text(text)
        status, _, err = verb("evaluate", export)
        assert (status != 0, says in err) == (True, True), err
        (export / "config.json").write_text(config)
        (export / "architecture.json").write_text(facts)
    assert verb("evaluate", export, "-q")[0] == 0


def test_a_refused_or_stopped_search_leaves_its_folder_as_it_was(run, verb):
    before = {path.name: path.read_bytes() for path in run[0].iterdir() if path.name != ".lock"}
    status, _, err = verb("search", *SMALL, "--epochs", "1", "--out", run[0])
    assert (status, "was trained for 2 epochs already" in err) == (1, True)
    other = Forked.verb("search", *SMALL, "--epochs", "50", "--out", run[0].with_name("other"))
    other.wait_for("training the supernet for 50 epochs")
    other.send(signal.SIGINT)
    status, _, rest = other.wait()
    assert (status, "stopped; the same command continues" in rest) == (1, True), rest
    assert "Traceback" not in rest
    assert {path.name: path.read_bytes() for path in run[0].iterdir() if path.name != ".lock"} == before


def test_changed_images_are_noticed(verb, tmp_path):
    source = open_data("digits", img_size=8, in_chans=1, mean=(0.5,), std=(0.5,)).split("train_full")
    for position in range(60):
        image = np.asarray(source.source.read(int(source.indices[position]))).reshape(8, 8) * 15
        folder = tmp_path / "photos" / str(source.labels[position])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype("uint8")).save(folder / f"{position}.png")
    words = ("search", "--data", tmp_path / "photos", "--model-args", "depth=2,embed_dim=16,num_heads=1,patch_size=8")
    words = (*words, "--img-size", "16", "--epochs", "1", "--batch-size", "16", "-q", "--out", tmp_path / "run")
    status, _, err = verb(*words, "--levels", "4,1")
    assert status == 0, err
    assert verb("export", tmp_path / "run", "--pick", "accuracy", "--out", tmp_path / "export")[0] == 0
    assert verb("evaluate", tmp_path / "export", "-q")[0] == 0
    victim = sorted((tmp_path / "photos" / "0").iterdir())[0]
    content = victim.read_bytes()
    with Image.open(victim) as image:
        inverted = ImageOps.invert(image)
    inverted.save(victim)
    status, _, err = verb(*words, "--levels", "4,1")
    assert (status, f"changed: '0/{victim.name}'" in err) == (1, True), err
    victim.write_bytes(content)  # with a new time of change
    status, out, err = verb(*words, "--levels", "4,1")
    assert status == 0, err
    assert "12 of its 60 images were set aside as test" in out
    for extra in range(3):
        shutil.copy(tmp_path / "photos" / "0" / "0.png", tmp_path / "photos" / "0" / f"new{extra}.png")
    status, _, err = verb(*words, "--levels", "4,1")
    assert (status, "are not those" in err) == (1, True), err
    status, _, err = verb("evaluate", tmp_path / "export", "-q")
    assert (status, "are not those the model was searched on" in err) == (2, True), err


def test_space_tells_the_published_numbers_of_vit_tiny(verb):
    status, out, _ = verb("space", "--model", "deit_tiny_patch16_224", "--budget", "60%", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["size"], found["dense_macs"]) == (31294, 1_258_411_200)
    assert found["within_budget"] < 31294
    assert found["within_budget_is_exact"] is True


def test_space_counts_a_head_of_the_datas_classes_as_search_does(verb):
    words = ["space", "--model", "digits_vit", "--model-args", "depth=3,embed_dim=16,num_heads=2", "--budget", "60%"]
    found = {}
    for classes in (10, 4):
        status, out, err = verb(*words, "--num-classes", classes, "--json")
        assert status == 0, err
        found[classes] = json.loads(out)
        assert found[classes]["num_classes"] == classes
    net = SuperNet.from_timm(
        "digits_vit", SearchSpace(3, (64, 16, 4, 1)), depth=3, embed_dim=16, num_heads=2, num_classes=4
    )
    assert found[4]["dense_macs"] == measure_macs(net).total(net.space[0]) == found[10]["dense_macs"] - 6 * 16
    assert found[4]["dense_parameters"] == found[10]["dense_parameters"] - 6 * 17
    status, out, _ = verb(*words)
    assert (status, "with a head of 10 classes (--num-classes: those of your data)" in " ".join(out.split())) == (
        0,
        True,
    )


def test_space_tells_of_the_space_that_search_takes_whatever_decides_its_defaults(verb):
    args = {"depth": 4, "embed_dim": 16, "num_heads": 1, "patch_size": 8}
    words = ["space", "--img-size", "16", "--model-args", ",".join(f"{name}={value}" for name, value in args.items())]
    for flag, options in (("--pretrained", {"pretrained": True}), ("--no-training", {"training": False})):
        status, out, err = verb(*words, flag, "--json")
        assert status == 0, err
        found = json.loads(out)
        config = checked_config(data="photos", img_size=16, model_args=args, **options)
        wanted = space_of(config, outline(config.model, model_options(config))).to_json()
        assert {name: found[name] for name in wanted} == wanted
        assert (found["budget_macs"] is None) == (flag == "--pretrained")


def test_space_says_about_where_a_number_is_an_estimate(verb):
    words = ["space", "--model", "vit_tiny_patch16_224", "--model-args", "embed_dim=16,num_heads=2", "--budget", "60%"]
    words += ["--levels", "196,176,156,140,120,100,80,60", "--operators", "tome,topk,kmeans,mstm"]
    status, out, err = verb(*words)
    assert status == 0, err
    about = re.search(r"within 60% +about ([0-9]{3},000,000) architectures", out)
    assert about, out
    found = json.loads(verb(*words, "--json")[1])
    assert found["within_budget_is_exact"] is False
    assert found["within_budget"] == pytest.approx(int(about[1].replace(",", "")), rel=0.005)


@pytest.mark.parametrize("exact", [True, False])
def test_announcement_and_page_of_a_search_say_about_where_a_count_is_an_estimate(exact, tmp_path, verb, monkeypatch):
    counting.paths_of.cache_clear()
    if not exact:
        monkeypatch.setattr(counting, "MAX_BEGINNINGS", 0)
        monkeypatch.setattr(counting, "MAX_SUMS", 0)
        monkeypatch.setattr(band, "FEW", 0)
    words = ["search", *SMALL, "--epochs", "0", "--sampler", "random", "--trials", "2", "--budget", "60%"]
    status, _, err = verb(*words, "--out", tmp_path / "run")
    counting.paths_of.cache_clear()
    assert status == 0, err
    announced = re.search(r"^(.*) of them cost at most .* \(60%\)$", err, re.MULTILINE)
    assert announced, err
    net = SuperNet.from_timm("digits_vit", SearchSpace(3, (64, 16, 4, 1)), depth=3, embed_dim=16, num_heads=2)
    costs = measure_macs(net)
    within = sum(costs.total(one) <= 0.6 * costs.total(net.space[0]) for one in net.space)
    about, number = announced[1].rpartition(" ")[::2]
    assert about == ("" if exact else "about")
    assert int(number) == (within if exact else pytest.approx(within, rel=0.2))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f">{announced[1]}<" in page


def test_every_verbs_help_ends_with_commands_that_can_be_copied_and_are_understood(verb):
    verbs = typer.main.get_command(app).commands
    for name, command in verbs.items():
        lines = verb(name, "--help")[1].splitlines()
        shown = [line for line in lines if line.startswith(f"    poolshare {name} ")]
        assert lines[-max(1, len(shown)) :] == shown, name
        for line in shown:
            words = shlex.split(line[4:].partition("    (")[0])
            command.make_context(name, words[2:])


def test_help_and_version_need_no_heavy_import():
    verbs = [[verb, "--help"] for verb in ("space", "search", "pareto", "show", "export")]
    script = (
        "import sys\nfrom poolshare.search.cli import main\n"
        f"for words in {[['--help'], ['--version'], *verbs]}:\n"
        "    sys.argv = ['poolshare', *words]\n"
        "    try:\n        main()\n    except SystemExit as leaving:\n        assert not leaving.code\n"
        "    heavy = {'torch', 'optuna', 'pandas', 'timm', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Usage:") == 6


def test_a_retraining_stopped_by_sigterm_continues_to_the_same_weights_and_holds_its_folder(run, verb, tmp_path):
    export, out = tmp_path / "export", tmp_path / "out"
    assert verb("export", run[0], "--budget", "60%", "--out", export)[0] == 0
    words = ("retrain", export, "--epochs", "6", "-q", "--out")
    assert verb(*words, tmp_path / "undisturbed")[0] == 0
    state = tmp_path / ".out.retraining" / "training.safetensors"
    other = Forked.verb("retrain", export, "--epochs", "6", "--out", out)
    other.wait_until(state.exists)
    status, _, err = verb(*words, out)
    assert (status, f"is in use by process {other.pid} on" in err) == (1, True), err
    other.send(signal.SIGTERM)
    status, _, said = other.wait()
    assert (status, "stopped; the same command continues" in said) == (1, True), said
    assert "which is saved" in said
    assert not out.exists()
    status, _, err = verb(*words, out, "--lr", "0.1")
    assert (status, "lr: 0.001 there, 0.1 now" in err) == (1, True), err
    assert verb(*words, out)[0] == 0
    weights = [(path / "model.safetensors").read_bytes() for path in (out, tmp_path / "undisturbed")]
    assert weights[0] == weights[1]
    assert not state.parent.exists()
    content = bytearray(weights[0])
    content[-3] ^= 1
    (out / "model.safetensors").write_bytes(content)
    status, _, err = verb("evaluate", out)
    assert (status, "is not what was written there" in err) == (1, True), err


def test_retraining_with_the_dense_model_as_teacher_and_a_recipe(run, verb, tmp_path):
    export, dense = tmp_path / "export", tmp_path / "dense"
    assert verb("export", run[0], "--budget", "60%", "--out", export)[0] == 0
    assert verb("export", run[0], "--architecture", "dense", "--out", dense)[0] == 0
    assert json.loads((dense / "architecture.json").read_text())["architecture"] == "64 64 64"
    recipe = "mixup=0.4,drop_path=0.1,ema=0.9,distill=0.7,accumulate=2"
    words = ("retrain", export, "--teacher", dense, "--epochs", "1", "--recipe", recipe, "--json", "-q")
    status, out, err = verb(*words)
    assert status == 0, err
    facts = json.loads(out)
    assert {name: facts["recipe"][name] for name in ("mixup", "drop_path", "ema", "distill", "accumulate", "epochs")} == {
        "mixup": 0.4, "drop_path": 0.1, "ema": 0.9, "distill": 0.7, "accumulate": 2, "epochs": 1,
    }  # fmt: skip
    assert "with dense as teacher" in facts["weights"]
    plain = json.loads(verb("retrain", export, "--epochs", "1", "--out", tmp_path / "plain", "--json", "-q")[1])
    assert plain["recipe"]["mixup"] == 0
    weights = [
        load_file(path / "model.safetensors")["head.weight"]
        for path in (tmp_path / "plain", tmp_path / "export-retrained")
    ]
    assert not torch.equal(*weights)
    for words, says in (
        (("--recipe", "lr=3"), "--lr decides it"),
        (("--recipe", "mixup"), "--recipe 'mixup' is not KEY=VALUE"),
        (("--recipe", "drop_path=2"), "--recipe drop_path=2.0: Input should be less than 1"),
        (("--teacher", tmp_path / "nowhere"), "nowhere is not an exported folder"),
    ):
        status, _, err = verb("retrain", export, "--out", tmp_path / "other", *words)
        assert (status != 0, says in err) == (True, True), err
    assert not (tmp_path / "other").exists()
    facts = read_json(dense / "architecture.json")
    facts["classes"][0] = "ten"
    write_json(dense / "architecture.json", facts)
    status, _, err = verb("retrain", export, "--out", tmp_path / "other", "--teacher", dense)
    assert (status, "knows other classes" in err) == (2, True), err


def test_a_search_begins_with_the_weights_of_a_file(verb, tmp_path):
    options = {"depth": 3, "embed_dim": 16, "num_heads": 2}
    torch.manual_seed(1)
    model = timm.create_model("digits_vit", num_classes=10, **options)
    save_file(model.state_dict(), tmp_path / "start.safetensors")
    save_file(timm.create_model("digits_vit", num_classes=4, **options).state_dict(), tmp_path / "four.safetensors")
    words = ("search", *SMALL, "--epochs", "0", "--sampler", "random", "--trials", "3", "--levels", "64,36,16")
    words += ("--out", tmp_path / "run")
    status, _, err = verb(*words, "--weights", tmp_path / "four.safetensors")
    assert (
        status,
        "four.safetensors does not fit the data: it has 4 classes, the data 10. Without training" in err,
    ) == (2, True)
    assert not (tmp_path / "run").exists()
    status, out, err = verb(*words, "--weights", tmp_path / "start.safetensors")
    assert status == 0, err
    assert "the data's classes in their order: '0' is output 0, '1' is output 1, '2' is output 2" in err
    assert "if it has seen any of these images" in err
    assert "warning: the trained head's predictions are near chance" in err  # its weights are random
    assert "warning: the trained head's predictions are near chance" in out
    summary = RunFolder.open(tmp_path / "run").read_summary()
    counts = np.array(summary["images"]["search"])
    assert (len(counts), counts.sum(), sum(summary["images"]["train"])) == (10, 377, 880)
    assert f"The most frequent class alone makes {100 * counts.max() / 377:.2f} %" in " ".join(out.split())
    assert any("near chance" in note for note in summary["notes"])
    assert RunFolder.open(tmp_path / "run").config.lr == 3e-4
    (tmp_path / "start.safetensors").unlink()  # from now on the weights are the run's
    assert verb("export", tmp_path / "run", "--architecture", "dense", "--out", tmp_path / "export")[0] == 0
    exported = load_file(tmp_path / "export" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(exported[name], value), name
    assert json.loads((tmp_path / "export" / "architecture.json").read_text())["pretrained"] is True
    status, _, err = verb(*words[:-1], tmp_path / "other", "--weights", tmp_path / "none.safetensors")
    assert (status, "none.safetensors cannot be read" in err) == (2, True), err
    (tmp_path / "map.txt").write_text("\n".join(map(str, range(4))))
    begun = ("--weights", tmp_path / "four.safetensors", "--class-map", tmp_path / "map.txt")
    status, _, err = verb(*words[:-1], tmp_path / "other", *begun)
    assert (status, "lacks '4', '5', '6' and 3 more, 6 of the data's 10 classes" in err) == (2, True), err
    status, _, err = verb(*words[:-1], tmp_path / "other", "--weights", "x", "--pretrained")
    assert (status, "are two beginnings" in err) == (2, True), err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("weights", [True, False])
def test_a_class_map_gives_the_classes_of_the_head_and_the_labels_follow(weights, tmp_path):
    """One with more names than the data have classes, in another order, with a head of as many outputs, or a new one."""
    names = [str(digit) for digit in range(11, -1, -1)]
    (tmp_path / "map.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    given = {"data": "digits", "model_args": {"depth": 2, "embed_dim": 16, "num_heads": 2}, "device": "cpu"}
    if weights:
        model = timm.create_model("digits_vit", num_classes=12, **given["model_args"])
        save_file(model.state_dict(), tmp_path / "twelve.safetensors")
        given |= {"weights": str(tmp_path / "twelve.safetensors"), "epochs": 0}
        given |= {"levels": (64, 16), "operators": ("max2d",)}  # so that none is tried out
    job = prepare(checked_config(**given, class_map=str(tmp_path / "map.json")))
    plain = open_data("digits", img_size=8, in_chans=1, mean=[0.5], std=[0.5], search_fraction=0.3)
    assert job.data.classes == tuple(names)
    assert job.supernet.num_classes == 12
    assert (job.head == "twelve.safetensors") == weights
    for split in ("train", "search", "test"):
        assert job.data.split(split).labels.tolist() == (11 - plain.split(split).labels).tolist()


def test_pretrained_weights_bring_a_head_too():
    config = checked_config(data="x", pretrained=True, epochs=0)  # vit_tiny_patch16_224, of ImageNet's 1,000 classes
    for classes, kept in ((["n01443537", "n01440764"], True), (["goldfish", "tench"], False)):
        data = SimpleNamespace(classes=tuple(classes), labelled=True)
        if kept:
            matched = matched_classes(config, data, None, None)
            assert (len(matched.classes), matched.indices, matched.fresh) == (1000, (1, 0), False)
            continue
        with pytest.raises(ModelError, match="the head of vit_tiny_patch16_224 does not fit the data"):
            matched_classes(config, data, None, None)
    headless = checked_config(data="x", model="vit_small_patch16_224.dino", pretrained=True, epochs=0)
    with pytest.raises(ModelError, match="brings weights without a head"):
        matched_classes(headless, data, None, None)


def test_operators_are_mixed_from_search_to_retraining_on_levels_that_are_no_squares(tmp_path, verb):
    """Grid, map-, key- and content-based operators in one supernet; the exported model has two of them."""
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["--operators", "max2d,wkmedoids,mstm,tome,max1d_conv", "--levels", "64,32,9"]
    status, stdout, stderr = verb("search", *SMALL, *words, "--epochs", "1", "--out", run, "--json")
    assert status == 0, stderr
    folder = RunFolder.open(run)
    scored = folder.read_candidates()["architecture"]
    space = SearchSpace(3, (64, 32, 9), ("max2d", "wkmedoids", "mstm", "tome", "max1d_conv"))
    assert sorted(scored) == sorted(map(str, space))
    assert any("@max2d" in text for text in scored)

    architecture = "64 32@mstm 9@tome"
    assert verb("export", run, "--architecture", architecture, "--out", out)[0] == 0
    status, stdout, stderr = verb("retrain", out, "--epochs", "1", "--device", "cpu", "--json", "--quiet")
    assert status == 0, stderr
    facts = json.loads(stdout)
    assert (facts["architecture"], facts["test_total"]) == (architecture, 540)
    model = timm.create_model(f"local-dir:{out}-retrained", pretrained=True).eval()
    assert count_macs(model, (torch.zeros(1, 1, 8, 8),)) == facts["macs"]


def test_training_within_a_limit_is_a_recipe_of_the_search_alone(verb, tmp_path):
    out, words = (
        tmp_path / "run",
        [*SMALL, "--epochs", "1", "--sampler", "random", "--trials", "20", "--budget", "60%", "-q"],
    )
    status, shown, errors = verb("search", *words, "--recipe", "within=0.6", "--out", out)
    assert status == 0, errors
    assert "trained on architectures up to 60% of the dense MACs alone" in " ".join(shown.split())
    status, shown, errors = verb("search", *words, "--recipe", "within=1", "--out", tmp_path / "whole")
    assert status == 0, errors
    assert "trained on draws from the whole space" in " ".join(shown.split())
    assert verb("search", *words, "--recipe", "within=true", "--out", tmp_path / "none")[0] == 2
    status, _, errors = verb("search", *words, "--recipe", "within=0.01", "--out", tmp_path / "none")
    assert status == 2
    assert "--recipe within=0.01 leaves nothing to train" in errors
    status, _, errors = verb("search", *words, "--recipe", "within=0.5", "--out", tmp_path / "none")
    assert status == 2
    assert "--budget 60% asks for more expensive ones too: give --budget 50%, or less" in errors
    assert not (tmp_path / "none").exists()
    assert verb("export", out, "--budget", "60%", "--out", tmp_path / "export")[0] == 0
    status, _, errors = verb(
        "retrain", tmp_path / "export", "--epochs", "1", "--recipe", "within=0.6", "--out", tmp_path / "r"
    )
    assert status == 2
    assert "belongs to `poolshare search`" in errors


def test_operators_are_listed_with_what_they_do(verb):
    for words in (("space", "--operators", "help"), ("search", "--operators", "help")):
        status, out, _ = verb(*words)
        assert status == 0
        assert [line.split()[0] for line in out.splitlines()] == list(OPERATORS)
        assert "ToMe: bipartite merging by keys" in out
