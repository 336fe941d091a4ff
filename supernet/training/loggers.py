"""Training curves for TensorBoard, Weights & Biases and MLflow, each an extra: every one is told all rows of a curve.

They are told of the rows before a stop too, so a training that goes on is one curve, whatever became of an earlier record.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from poolshare.space import ConfigError

from .curve import Row, Watch


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError for one that is not known, or whose package is missing."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"--log {name} is not known: take {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--log {name} needs a package that is not installed: pip install '.[{name}]'")


@contextmanager
def watching(names: Sequence[str], folder: Path | None, phase: str) -> Iterator[Watch | None]:
    """Yields what tells some loggers of a row; their files go into `folder`, under the name of the phase.

    folder: None in a process that only helps the first one: nobody is told.
    """
    with ExitStack() as stack:
        told = [stack.enter_context(LOGGERS[name](folder, phase)) for name in names] if folder else []

        def watch(row: Row) -> None:
            for tell in told:
                tell(row)

        yield watch if told else None


@contextmanager
def _tensorboard(folder: Path, phase: str) -> Iterator[Watch]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard" / phase), purge_step=0) as writer:  # hides an earlier record

        def watch(row: Row) -> None:
            for name, value in _values(row).items():
                writer.add_scalar(name, value, row.step)

        yield watch


@contextmanager
def _wandb(folder: Path, phase: str) -> Iterator[Watch]:
    import wandb

    title = f"{folder.name} {phase}"
    mine = hashlib.sha256(f"{folder.resolve()} {phase}".encode()).hexdigest()[:16]  # the same when it goes on
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(project="poolshare", name=title, id=mine, resume="allow", dir=folder)
    except wandb.Error as error:
        raise ConfigError(f"--log wandb: {error}; `wandb login`, or set WANDB_MODE=offline") from None
    with run:
        yield lambda row: run.log(_values(row), step=row.step)


@contextmanager
def _mlflow(folder: Path, phase: str) -> Iterator[Watch]:
    import mlflow

    title = f"{folder.name} {phase}"
    folder.mkdir(parents=True, exist_ok=True)
    place = None if "MLFLOW_TRACKING_URI" in os.environ else f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    client = mlflow.MlflowClient(place)
    found = client.get_experiment_by_name("poolshare")
    experiment = found.experiment_id if found else client.create_experiment("poolshare")
    run = client.create_run(experiment, run_name=title).info.run_id

    def watch(row: Row) -> None:
        for name, value in _values(row).items():
            client.log_metric(run, name, value, step=row.step)

    try:
        yield watch
    except BaseException:
        client.set_terminated(run, "KILLED")
        raise
    client.set_terminated(run)


def _values(row: Row) -> dict[str, float]:
    return {name: value for name, value in row._asdict().items() if name != "step"}


LOGGERS: dict[str, Callable[[Path, str], AbstractContextManager[Watch]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
