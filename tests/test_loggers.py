"""What a training tells TensorBoard, Weights & Biases and MLflow, read back from their files; nothing leaves the machine.

Weights & Biases and MLflow start services of their own and are big to install: their tests are slow ones.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from opened import open_data

from poolshare.space import ConfigError
from poolshare.supernet.training import curve
from poolshare.supernet.training.curve import Row, read_curve
from poolshare.supernet.training.loggers import LOGGERS, check_loggers, watching
from poolshare.supernet.training.loop import train_model
from poolshare.supernet.training.recipe import Recipe

timm = pytest.importorskip("timm")
Told = dict[str, dict[int, float]]  # name → step → value


def of_tensorboard(folder: Path, phase: str) -> Told:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard" / phase)).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def of_wandb(folder: Path, phase: str) -> Told:
    import json

    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    found: Told = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (content := store.scan_data()) is not None:
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
def test_a_logger_has_every_row_of_a_training_that_was_stopped(name, tmp_path, monkeypatch):
    assert {*READERS} == {*LOGGERS}
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


def test_nobody_is_told_where_nobody_is_asked_for_and_a_helping_process_tells_nobody(tmp_path):
    for names, folder in (((), tmp_path), (("tensorboard",), None)):
        with watching(names, folder, "training") as watch:
            assert watch is None
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"--log mlflow needs a package that is not installed: pip install '\.\[mlflow\]'"
    ):
        check_loggers(["mlflow"])
    status, _, error = call("search", "--data", "digits", "--log", "wandb", "--out", tmp_path / "run")
    assert (status, "pip install '.[wandb]'" in error, (tmp_path / "run").exists()) == (2, True, False)
    status, _, error = call("search", "--data", "digits", "--log", "elsewhere", "--out", tmp_path / "run")
    assert (status, "tensorboard" in error) == (2, True)
    with pytest.raises(ConfigError, match="--log elsewhere is not known: take tensorboard, wandb, mlflow"):
        check_loggers(["elsewhere"])


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
    log, run, export = ("--log", "tensorboard"), tmp_path / "run", tmp_path / "export"
    assert call("search", "--data", "digits", *small, *log, "--out", run, "-q")[0] == 0
    assert [*of_tensorboard(run, "training")["loss"]] == [row.step for row in read_curve(run / "training.csv")]
    assert call("export", run, "--architecture", "dense", "--out", export)[0] == 0
    assert call("retrain", export, "--epochs", "1", "--batch-size", "256", *log, "-q")[0] == 0
    told = of_tensorboard(tmp_path / "export-retrained-logs", "retraining")
    assert [*told["loss"]] == [row.step for row in read_curve(tmp_path / "export-retrained" / "training.csv")]
