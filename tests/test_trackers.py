"""What a training tells TensorBoard, Weights & Biases and MLflow, read back from their files; nothing leaves the machine.

Weights & Biases and MLflow start services of their own and are big to install: their tests are slow ones.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import call
from opened import open_data

from poolshare.search.config import SearchConfig
from poolshare.space import ConfigError
from poolshare.supernet.training import curve
from poolshare.supernet.training.curve import Row, read_curve
from poolshare.supernet.training.loop import train_model
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.trackers import TRACKERS, check_trackers, watching

Told = dict[str, dict[int, float]]  # name → step → value


def of_tensorboard(folder: Path, phase: str) -> Told:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard" / phase)).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def records(content: bytes) -> Iterator[bytes]:
    """What is in a file of Weights & Biases, which is a log of LevelDB's: blocks of 32 KiB, records that may go over their ends."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def of_wandb(folder: Path, phase: str) -> Told:
    from wandb.proto import wandb_internal_pb2

    found: Told = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") != "history":
                continue
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num
            for name in Row._fields[1:]:
                found.setdefault(name, {})[step] = items[name]
    return found


def of_mlflow(folder: Path, phase: str) -> Told:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'poolshare'")
    run = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])[0]
    assert run.info.run_name == f"{folder.name} {phase}"
    names = Row._fields[1:]
    return {name: {one.step: one.value for one in client.get_metric_history(run.info.run_id, name)} for name in names}


READERS: dict[str, Any] = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}


@pytest.mark.parametrize(
    "name", ["tensorboard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "mlflow"))]
)
def test_a_tracker_has_every_row_of_a_training_that_was_stopped(name, tmp_path, monkeypatch):
    assert {*READERS} == {*TRACKERS}
    pytest.importorskip(name, reason=f"pip install '.[{name}]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(curve, "ROWS", 12)
    digits = open_data("digits", img_size=8, in_chans=1, mean=(0.5,), std=(0.5,))
    recipe, state = Recipe(epochs=2, batch_size=128), tmp_path / "training.safetensors"

    def train(stop_at: int | None = None) -> None:
        def progress(step: int, loss: float | None) -> None:
            if step == stop_at:
                raise InterruptedError

        model = timm.create_model("digits_vit", depth=1, embed_dim=16, num_heads=2)
        with watching([name], tmp_path, "training") as watch:
            train_model(model, digits, recipe, state=state, save_seconds=0, progress=progress, watch=watch)

    with pytest.raises(InterruptedError):
        train(5)
    train()
    rows = read_curve(state.with_suffix(".csv"))
    assert len(rows) > 6
    found = READERS[name](tmp_path, "training")
    assert {*found} == {*Row._fields[1:]}
    for column, told in found.items():
        expected = {row.step: getattr(row, column) for row in rows}
        assert [*told] == [*expected]
        assert all(math.isclose(told[step], value, rel_tol=1e-4) for step, value in expected.items()), column


def test_torchrun_takes_no_option_of_a_verb_for_its_own():
    """It reads all words that could begin one of its options, those after the program too: `--log` could be `--log-dir`."""
    from torch.distributed.run import get_args_parser

    for name in SearchConfig.model_fields:
        words = ["-m", "poolshare.search.cli", "search", f"--{name.replace('_', '-')}", "1"]
        assert get_args_parser().parse_args(words).training_script_args == words[2:]


def test_nobody_is_told_where_nobody_is_asked_for_and_a_helping_process_tells_nobody(tmp_path):
    for names, folder in (((), tmp_path), (("tensorboard",), None)):
        with watching(names, folder, "training") as watch:
            assert watch is None
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"--tracker mlflow needs a package that is not installed: pip install '\.\[mlflow\]'"
    ):
        check_trackers(["mlflow"])
    status, _, error = call("search", "--data", "digits", "--tracker", "wandb", "--out", tmp_path / "run")
    assert (status, "pip install '.[wandb]'" in error, (tmp_path / "run").exists()) == (2, True, False)
    status, _, error = call("search", "--data", "digits", "--tracker", "elsewhere", "--out", tmp_path / "run")
    assert (status, "tensorboard" in error) == (2, True)
    with pytest.raises(ConfigError, match="--tracker elsewhere is not known: take tensorboard, wandb, mlflow"):
        check_trackers(["elsewhere"])


def test_a_search_and_a_retraining_show_there_what_they_do(tmp_path):
    """In CI one search of 3 seconds: that verbs pass on who is to be told can only be seen in verbs."""
    pytest.importorskip("tensorboard", reason="pip install '.[tensorboard]'")
    small = (
        "--model-args",
        "depth=1,embed_dim=16,num_heads=2",
        "--batch-size",
        "256",
        "--epochs",
        "1",
        "--device",
        "cpu",
    )
    told, run, export = ("--tracker", "tensorboard"), tmp_path / "run", tmp_path / "export"
    assert call("search", "--data", "digits", *small, *told, "--out", run, "-q")[0] == 0
    assert [*of_tensorboard(run, "training")["loss"]] == [row.step for row in read_curve(run / "training.csv")]
    assert call("export", run, "--architecture", "dense", "--out", export)[0] == 0
    assert call("retrain", export, "--epochs", "1", "--batch-size", "256", *told, "-q")[0] == 0
    shown = of_tensorboard(tmp_path / "export-retrained-logs", "retraining")
    assert [*shown["loss"]] == [row.step for row in read_curve(tmp_path / "export-retrained" / "training.csv")]
