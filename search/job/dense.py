"""The dense model of a run: tuned on the user's images before anything else, then teacher, baseline and a start.

What is searched for is a cheaper model than this one, so this one is made first. Its file, dense.safetensors, holds its
weights, its score on the search-validation images and what it took.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from poolshare.space import OPERATORS, Architecture, RunError
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import load_facts, load_state_facts, load_tensors, save_tensors, shapes_of
from poolshare.supernet.training.loop import steps_per_epoch, train_model
from poolshare.supernet.training.trackers import watching

from ..console import say
from ..counts import Counts
from ..progress import advance_loss, progress_bar
from ..scoring import answers, score_counts
from .folder import RunFolder
from .prepare import Job
from .recipes import tuning_recipe


@dataclass(frozen=True)
class Tuned:
    """What is known about a run's dense model."""

    epochs: int  # it was tuned for; 0: its head knew the classes
    seconds: float
    counts: Counts  # on the search-validation images
    score: float


def read_tuned(folder: RunFolder) -> Tuned | None:
    """What dense.safetensors says of itself; None: the run has none. Raises RunError for a damaged file."""
    if not folder.dense.exists():
        return None
    facts = load_facts(folder.dense)
    return Tuned(facts["epochs"], facts["seconds"], Counts.of(facts["counts"], "metric"), facts["score"])


def begun_tuning(folder: RunFolder) -> bool:
    """Whether the dense model, or a part of its tuning, is there: the weights that the run began with are not needed."""
    return folder.dense.exists() or load_state_facts(folder.tuning) is not None


def tuned_model(job: Job, folder: RunFolder | None, console: Console) -> Subnet:
    """Tune the dense model, or what is missing of that, or read it. The supernet has its weights then.

    folder: None in a process that only helps the first one.
    """
    model = Subnet.from_supernet(job.supernet, job.dense)
    device = next(model.parameters()).device
    there = distributed.from_first(folder is not None and folder.dense.exists())
    if not there:
        _tune(job, model, folder, console)
    elif folder:
        model.load_state_dict(load_tensors(folder.dense, shapes_of(model))[0])
    weights = distributed.tensors_from_first(model.state_dict(), device)
    if there:
        model.load_state_dict(weights)
    job.supernet.load_state_dict(weights, strict=False)  # all but learned poolings, which the dense model has not
    return model.eval()


def _tune(job: Job, model: Subnet, folder: RunFolder | None, console: Console) -> None:
    config, recipe = job.config, tuning_recipe(job.config)
    if recipe.epochs:
        total = recipe.epochs * steps_per_epoch(job.data, recipe)
        logs = watching(config.tracker, folder.path if folder else None, "tuning")
        with logs as watch, progress_bar(console, "tuning the dense model", total, "steps") as advance:
            train_model(
                model,
                job.data,
                recipe,
                seed=config.seed,
                workers=config.workers,
                state=folder and folder.tuning,
                task=job.task,
                settings={"tuning": recipe.epochs},
                progress=partial(advance_loss, advance),
                watch=watch,
                say=partial(say, console),
                otherwise="search into a new folder",
            )
    if folder is None:
        return
    if job.task.targets == "dense":
        job = replace(job, data=job.data.answered_by(model.eval()))
    counts = answers(model, job.search_batches, job.task).counts
    score = counts.score(job.task)
    seconds = float((load_state_facts(folder.tuning) or {}).get("seconds", 0.0))
    facts = {"epochs": recipe.epochs, "seconds": seconds, "counts": counts.to_json(), "score": score}
    save_tensors(folder.dense, model.state_dict(), facts)
    for state in folder.path.glob(f"{folder.tuning.stem}*{folder.tuning.suffix}"):  # nothing goes on from it
        state.unlink()
    say(
        console,
        f"the dense model{f', tuned for {recipe.epochs} epochs,' if recipe.epochs else ''} reaches {job.task.metric} "
        f"{score:.2f} % on the {counts.total:,} search-validation images",
    )


def load_dense(supernet: SuperNet, path: Path) -> None:
    """Put a dense model's weights into its supernet. Raises RunError where they are damaged or another's."""
    tensors, _ = load_tensors(path, shapes_of(supernet))
    missing = supernet.load_state_dict(tensors, strict=False).missing_keys
    if any(not name.startswith("poolings.") for name in missing):
        raise RunError(f"{path} lacks {missing[0]}; move it away, and search into a new folder")
    supernet.eval()


def answered(job: Job, folder: RunFolder | None) -> Job:
    """The job with the dense model's outputs as targets, where its task has no others.

    folder: None in a process that only helps the first one. Before any training the supernet's weights are the dense model's.
    """
    if job.task.targets != "dense":
        return job
    model = Subnet.from_supernet(job.supernet, job.dense)
    if folder and folder.dense.exists():
        model.load_state_dict(load_tensors(folder.dense, shapes_of(model))[0])
    model.to(job.device).load_state_dict(distributed.tensors_from_first(model.state_dict(), job.device))
    return replace(job, data=job.data.answered_by(model))


def takes_dense_weights(architecture: Architecture) -> bool:
    """Whether the dense model's weights are all that it needs: no operator of it has weights of its own."""
    return not any(layer.operator and OPERATORS[layer.operator].learned for layer in architecture.layers)


@torch.no_grad()
def score_with_dense(job: Job, folder: RunFolder, texts: Iterable[str]) -> dict[str, Counts]:
    """Scores on the search-validation images with the dense model's weights, by architecture.

    The supernet has its own weights again afterwards.
    """
    architectures = [one for one in map(Architecture.parse, dict.fromkeys(texts)) if takes_dense_weights(one)]
    if not architectures:
        return {}
    own = {name: tensor.clone() for name, tensor in job.supernet.state_dict().items()}
    try:
        load_dense(job.supernet, folder.dense)
        counts = score_counts(job.supernet, architectures, job.search_batches, job.config.score, job.task)
    finally:
        job.supernet.load_state_dict(own)
    return dict(zip(map(str, architectures), counts, strict=True))


def phases(
    job: Job, tuned: Tuned, seconds: dict[str, float], scored: int, by_both: list[tuple[float, float]]
) -> dict[str, Any]:
    """What each phase took, in seconds and in epochs of the dense tuning, and what it gained; for summary.json.

    by_both: scores of the same architectures with the dense model's weights and with the supernet's.
    """
    epoch = tuned.seconds / tuned.epochs if tuned.epochs and tuned.seconds else math.nan

    def phase(name: str, **facts: Any) -> dict[str, Any]:
        spent = seconds.get(name, 0.0)
        cost = {} if math.isnan(epoch) else {"dense_epochs": round(spent / epoch, 2)}
        return {"seconds": round(spent, 3), **cost, **facts}

    gain = sum(after - before for before, after in by_both) / max(1, len(by_both))
    return {
        "tuning": phase("tuning", epochs=tuned.epochs, score=tuned.score),
        **({"training": phase("training", epochs=job.config.epochs, gain=round(gain, 2))} if job.config.epochs else {}),
        "scoring": phase("scoring", architectures=scored),
    }
