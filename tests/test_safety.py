"""What must not happen: damage taken for a result, a stranger's file that reaches out, a traceback, a lost search."""

import csv
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from conftest import Forked, call
from safetensors.torch import load_file, save_file

from poolshare.search.exported.export import load_export
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.records import read_csv, read_json, write_csv, write_json
from poolshare.space import CostTable, PoolshareError, RunError, SearchSpace
from poolshare.space.files import held
from poolshare.supernet import SuperNet
from poolshare.supernet.latency import Latency
from poolshare.supernet.training.checkpoint import load_tensors

SEARCH = ["search", "--data", "digits", "--model-args", "depth=3,embed_dim=16,num_heads=2", "--batch-size", "128"]
SEARCH += ["--epochs", "2", "--sampler", "evolution", "--trials", "20", "--device", "cpu", "-q"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished search and an export of it."""
    folder = tmp_path_factory.mktemp("made")
    for words in ([*SEARCH, "--out", folder / "run"], ["export", folder / "run", "--out", folder / "export"]):
        status, _, err = call(*words)
        assert status == 0, err
    return folder


def damaged(content, rng, times=1):
    """Ways in which a file is cut or one of its bits flipped."""
    yield b""
    for _ in range(times):
        yield content[: rng.randrange(1, len(content))]
        position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        yield content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]


def result_of(folder):
    return [(folder / name).read_bytes() for name in ("candidates.csv", "pareto.csv")]


@pytest.mark.parametrize(
    "name",
    ["config.json", "summary.json", "candidates.csv", "pareto.csv", "study.journal", "supernet.safetensors",
     "training.safetensors", "report.html", "pareto.png"],
)  # fmt: skip
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_damaged_file_of_a_run_is_a_clear_error_or_made_again_and_never_another_result(
    name, times, made, verb, tmp_path
):
    right, rng = result_of(made / "run"), random.Random(name)
    content = (made / "run" / name).read_bytes()
    status, shown, _ = verb("pareto", made / "run", "--json")
    assert status == 0
    damages = list(damaged(content, rng, times))
    for number, damage in enumerate(damages):
        folder = tmp_path / str(number)
        shutil.copytree(made / "run", folder)
        (folder / name).write_bytes(damage)
        found, out, err = verb("pareto", folder, "--json")
        assert "Traceback" not in err
        if found == 0 and name != "candidates.csv":  # a table cut at the end of a line is a shorter one, and says so
            assert json.loads(out)["frontier"] == json.loads(shown)["frontier"]
        if times == 1 and number < len(damages) - 1:  # looking is quick, searching again is not: after the last one
            continue
        found, _, err = verb(*SEARCH, "--out", folder)
        assert "Traceback" not in err
        assert (found, bool(err)) == (1, True) or result_of(folder) == right, (number, err)
        if found:
            assert name in err or "supernet" in err, err
        shutil.rmtree(folder)


def test_training_goes_on_from_the_state_before_a_damaged_one(made, verb, tmp_path):
    newest, before = "training.safetensors", "training-before.safetensors"
    rng = random.Random(0)
    for number, broken in enumerate([(newest,), (before,), (newest, before)]):
        folder = tmp_path / str(number)
        shutil.copytree(made / "run", folder)
        (folder / "supernet.safetensors").unlink()  # so that training is looked at again
        for name in broken:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: rng.randrange(len(content) // 2, len(content))])
        status, _, err = verb(*SEARCH, "--out", folder)
        assert "Traceback" not in err
        if len(broken) == 2:
            assert (status, "training" in err) == (1, True), err
        else:
            assert status == 0, err
            assert result_of(folder) == result_of(made / "run")


def test_damaged_tables_of_latency_and_trust_are_refused(made, verb, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    status, _, err = verb("trust", run, "--architectures", "2", "--twice", "1", "--bands", "1", "--epochs", "1", "-q")
    assert status == 0, err
    folder = RunFolder.open(run)
    space = SearchSpace(2, (64, 16))
    nanoseconds = CostTable("latency", 5, {64: 90, 16: 30}, {64: 70, 16: 20}, {("max2d", 64, 16): 3}, {64: 9, 16: 2})
    folder.write_latency(Latency(nanoseconds, 1, "cpu", 1, "fp32", ((str(space[0]), 200, 194),)))
    assert folder.read_latency().table.total(space[0]) == nanoseconds.total(space[0])
    for name, read in (("latency.json", folder.read_latency), ("trust.json", folder.read_trust)):
        content = (run / name).read_bytes()
        for damage in damaged(content, random.Random(name)):
            (run / name).write_bytes(damage)
            with pytest.raises(RunError, match=name):
                read()
        (run / name).write_bytes(content)
    content = (run / "trust.csv").read_bytes()
    for damage in damaged(content, random.Random("trust.csv")):
        (run / "trust.csv").write_bytes(damage)
        status, _, err = verb(
            "trust", run, "--architectures", "2", "--twice", "1", "--bands", "1", "--epochs", "1", "-q"
        )
        assert "Traceback" not in err
        assert status == 0 or (status, "trust" in err) == (1, True), err
        if status == 0:  # rows that were cut off are trained again
            assert (run / "trust.csv").read_bytes() == content


def test_a_retraining_killed_before_it_removed_its_state_leaves_nothing_after_the_next_call(
    made, verb, tmp_path, monkeypatch
):
    out, hidden = tmp_path / "out", tmp_path / ".out.retraining"
    words = ("retrain", made / "export", "--epochs", "1", "--device", "cpu", "-q", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(
            "poolshare.search.exported.retrain.shutil.rmtree", lambda *a, **k: None
        )  # as if killed right there
        status, _, err = verb(*words)
    assert (status, hidden.exists()) == (0, True), err
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    status, _, err = verb(*words)
    assert (status, "exists already" in err, hidden.exists()) == (1, True, False), err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    # The state of a retraining that is not finished stays, whatever stands at `out`.
    hidden.mkdir()
    (hidden / "training.safetensors").write_bytes(b"unfinished")
    assert verb(*words)[0] == 1
    assert hidden.exists()


def test_a_file_that_promises_more_than_it_holds_is_refused_at_once(made, tmp_path):
    def promised(shape, begin, end, length=None):
        header = json.dumps({"norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}).encode()
        return (length or len(header)).to_bytes(8, "little") + header + bytes(64)

    tracemalloc.start()
    for number, content in enumerate(
        (
            promised([2**40], 0, 2**42), promised([2**40], 0, 64), promised([2**62, 4], 0, 64), promised([16], 2**60, 2**60 + 64),
            promised([16], 0, 64, length=2**62), promised([0] * 10**5, 0, 0), b"\xff" * 8, b"",
        )
    ):  # fmt: skip
        folder = forge(made / "export", tmp_path / str(number))
        (folder / "model.safetensors").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        facts = read_json(folder / "architecture.json")
        write_json(folder / "architecture.json", facts | {"weights_sha256": digest})
        with pytest.raises(RunError):
            load_export(folder)
        (tmp_path / "state.safetensors").write_bytes(content)
        with pytest.raises(RunError):
            load_tensors(tmp_path / "state.safetensors", {})
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["config.json", "architecture.json", "model.safetensors", "README.md"])
def test_a_damaged_export_is_refused(name, made, tmp_path):
    content = (made / "export" / name).read_bytes()
    shutil.copytree(made / "export", tmp_path / "export")
    for damage in damaged(content, random.Random(name)):
        (tmp_path / "export" / name).write_bytes(damage)
        if name == "README.md":  # nothing reads it
            load_export(tmp_path / "export")
        else:
            with pytest.raises(RunError):
                load_export(tmp_path / "export")


def forge(export, target, arguments=None, cut=(), weights=None, **facts):
    """What a stranger can hand out: an export with checksums that fit."""
    shutil.copytree(export, target)
    config = json.loads((target / "config.json").read_text())
    config["model_args"] |= arguments or {}
    for name in cut:
        del config["model_args"][name]
    (target / "config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, target / "model.safetensors")
    digests = {
        key: hashlib.sha256((target / name).read_bytes()).hexdigest()
        for key, name in (("config_sha256", "config.json"), ("weights_sha256", "model.safetensors"))
    }
    write_json(target / "architecture.json", read_json(target / "architecture.json") | digests | facts)
    return target


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("with_timm", [False, True])
def test_an_export_of_a_stranger_runs_no_code_and_reads_no_other_file(with_timm, made, tmp_path):
    sprung = tmp_path / "sprung"
    trap = tmp_path / "trap.pt"
    with open(trap, "wb") as file:
        pickle.dump(Trap(sprung), file)
    torch.save({"state_dict": Trap(sprung)}, tmp_path / "trap.pth")
    for number, arguments in enumerate(
        (
            {"checkpoint_path": str(trap)},
            {"checkpoint_path": str(tmp_path / "trap.pth")},
            {"pretrained_cfg_overlay": {"file": str(trap)}},
            {"pretrained_cfg": {"file": str(trap)}},
            {"pretrained": True},
            {"pretrained_strict": False},
            {"features_only": True},
            {"cache_dir": str(tmp_path / "cache")},
            {"pruned": True},
            {"device": "meta"},
            {"model_cfg": "os.system"},
            {"norm_layer": "os.system"},
            {"act_layer": "builtins.eval"},
            {"block_fn": "os.system"},
            {"attn_layer": "subprocess.Popen"},
            {"base": "hf-hub:someone/model"},
            {"base": f"local-dir:{tmp_path}"},
            {"base": "../../etc/passwd"},
            {"base": "resnet18"},
        )
    ):
        folder = forge(made / "export", tmp_path / str(number), arguments)
        if with_timm:
            with pytest.raises(Exception):  # noqa: B017, PT011 - some of these are timm's own errors
                timm.create_model(f"local-dir:{folder}", pretrained=True)
        else:
            with pytest.raises(PoolshareError):
                load_export(folder)
    assert not sprung.exists()
    assert not (tmp_path / "cache").exists()


def test_sizes_and_shapes_of_a_stranger_are_refused_before_anything_is_allocated(made, tmp_path):
    sizes = (
        {"embed_dim": 10**9, "num_heads": 1}, {"embed_dim": 10**5}, {"depth": 10**6}, {"depth": 1e9}, {"depth": -1},
        {"img_size": 10**6}, {"img_size": 10**9}, {"reg_tokens": 10**9}, {"mlp_ratio": 1e300}, {"mlp_ratio": 1e6},
        {"in_chans": 10**8}, {"patch_size": 0}, {"num_heads": 0}, {"embed_dim": "16" * 99}, {"embed_dim": None},
    )  # fmt: skip
    folders = [forge(made / "export", tmp_path / f"size{i}", arguments) for i, arguments in enumerate(sizes)]
    weights = load_file(made / "export" / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    for i, other in enumerate(
        (
            {name: torch.zeros(3, 3)},
            {name: weights[name].new_zeros(1, *weights[name].shape)},
            {"more": torch.zeros(2**22)},
        )
    ):
        folders.append(forge(made / "export", tmp_path / f"weights{i}", weights=weights | other))
    missing = {key: value for key, value in weights.items() if key != name}
    folders.append(forge(made / "export", tmp_path / "missing", weights=missing))
    for i, facts in enumerate(
        ({"macs": "many"}, {"macs": 0}, {"seed": -1}, {"classes": ["a"]}, {"classes": {}}, {"data": 3},
         {"test_score": 1e9}, {"batch_size": 1.5}, {"runs": []}, {"architecture": "64"}, {"format": 9})
    ):  # fmt: skip
        folders.append(forge(made / "export", tmp_path / f"facts{i}", **facts))

    def load_all():  # in a process of its own, whose largest size is its own
        load_export(made / "export")
        largest = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = largest()
        for path in folders:
            with pytest.raises(PoolshareError):
                load_export(path)
        print(largest() - before)

    status, grown, err = Forked(load_all).wait()
    assert status == 0, err
    assert int(grown) < 300_000  # KiB


def test_a_run_folder_of_a_stranger_names_no_file_and_no_size_that_is_used(made, verb, tmp_path):
    for number, changes in enumerate(
        (
            {"model_args": {"checkpoint_path": str(tmp_path)}},
            {"model_args": {"embed_dim": 10**9}},
            {"model_args": {"depth": 10**6}},
            {"model": f"local-dir:{tmp_path}"},
            {"levels": [64, 0]},
            {"max_run": 10**9},
            {"operators": ["os.system"]},
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(made / "run", folder)
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", config | {"search": config["search"] | changes})
        for words in (["worker", folder], ["export", folder, "--pick", "accuracy", "--out", tmp_path / "out"]):
            status, _, err = verb(*words)
            assert (status != 0, err.startswith("error: ")) == (True, True), err
            assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(PoolshareError, match="memory"):
        SuperNet.from_timm("digits_vit", SearchSpace(8, (64, 16)), embed_dim=2**20, num_heads=1)


def mounted(folder, *options):
    """Mount a temporary file system of a few MiB on a folder, or skip."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    return folder


@pytest.fixture
def disk(tmp_path):
    """A disk of 3 MiB."""
    folder = mounted(tmp_path / "disk", "-o", "size=3m")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_the_search_goes_on_when_there_is_room(made, verb, disk):
    run, filler = disk / "run", disk / "filler"
    for kept in (700_000, 320_000, 60_000, 8_000):  # less and less room: it fails ever earlier
        shutil.rmtree(run, ignore_errors=True)
        filler.write_bytes(b"")
        room = os.statvfs(disk)
        filler.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - kept)))
        status, _, err = verb(*SEARCH, "--out", run)
        assert "Traceback" not in err
        if status == 0:
            continue
        assert "space" in err.lower(), err
        filler.unlink()
        status, _, err = verb(*SEARCH, "--out", run)
        assert status == 0, err
        assert result_of(run) == result_of(made / "run")
    filler.write_bytes(b"")
    room = os.statvfs(disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - 4096))
    status, _, err = verb("export", made / "run", "--out", disk / "export")
    assert (status, "space" in err) == (1, True), err
    assert not (disk / "export").exists()


def test_a_full_disk_stops_every_verb_with_the_name_of_the_file_and_takes_nothing(made, verb, disk):
    shutil.copytree(made / "run", disk / "run")
    shutil.copytree(made / "export", disk / "export")
    (disk / "run" / "study.journal").unlink()  # so that there is something to score
    (disk / "run" / "study.journal").touch()
    before = {path: path.read_bytes() for path in disk.rglob("*.*") if path.is_file() and path.name != ".lock"}
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize))
    plan = ("--architectures", "2", "--twice", "0", "--bands", "1", "--epochs", "1", "-q")
    for words, file in (
        (["worker", disk / "run", "-q"], "study.journal"),
        (["trust", disk / "run", *plan], ""),
        (["retrain", disk / "export", "--epochs", "1", "-q"], ""),
        (["pareto", made / "run", "--csv", disk / "frontier.csv"], "frontier.csv"),
        (["pareto", made / "run", "--png", disk / "frontier.png"], "frontier.png"),
    ):
        status, _, err = verb(*words)
        assert (status, file in err, "No space left" in err, "free some space" in err) == (1, True, True, True), err
        assert not any(wrong in err for wrong in ("Traceback", "damaged", "delete")), err
        assert {path: path.read_bytes() for path in before} == before
    (disk / "filler").unlink()
    assert verb("worker", disk / "run", "-q")[0] == 0


def test_trust_holds_its_run(made, verb):
    with held(made / "run"):
        status, _, err = verb("trust", made / "run", "--architectures", "2", "-q")
    assert (status, f"is in use by process {os.getpid()}" in err) == (1, True), err


def test_a_read_only_disk_is_a_clear_error(made, verb, disk):
    shutil.copytree(made / "run", disk / "run")
    shutil.copytree(made / "export", disk / "export")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for words in (
        [*SEARCH, "--out", disk / "run"],
        [*SEARCH, "--out", disk / "new"],
        ["worker", disk / "run"],
        ["export", disk / "run", "--out", disk / "other"],
        ["retrain", disk / "export", "--epochs", "1", "-q"],
    ):
        status, _, err = verb(*words)
        assert (status, "error: " in err, "ead-only" in err) == (1, True, True), err
    for words in (["pareto", disk / "run"], ["evaluate", disk / "export", "-q"]):  # reading is allowed
        status, _, err = verb(*words)
        assert status == 0, err


def test_a_table_that_a_spreadsheet_saved_is_no_damage_and_another_value_is(tmp_path):
    frame = pd.DataFrame({"architecture": ["64*2", "64 16@max2d"], "top1": [100 / 3, 93.0], "macs": [10**12, 7]})
    write_csv(tmp_path / "table.csv", frame, checked=True)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "table.csv"), frame)
    saved = pd.read_csv(tmp_path / "table.csv").round({"top1": 9})
    saved.to_csv(tmp_path / "table.csv", index=False, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    pd.testing.assert_frame_equal(read_csv(tmp_path / "table.csv"), frame)
    for column, value in (("macs", 8), ("architecture", "64 64"), ("top1", 93.0001)):
        saved.assign(**{column: [saved[column][0], value]}).to_csv(tmp_path / "table.csv", index=False)
        with pytest.raises(ValueError, match="do not fit its checksum"):
            read_csv(tmp_path / "table.csv")
