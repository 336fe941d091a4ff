"""Finalists: the best architectures of a search, trained a little further, each alone, and scored again.

A supernet's scores separate harmful reductions from harmless ones, but hardly rank good architectures, and the best of
hundreds of scores is partly luck. Finalists are compared after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from poolshare.space import Architecture
from poolshare.space.files import held
from poolshare.space.quantities import check_whole
from poolshare.supernet import Subnet
from poolshare.supernet.data.splits import Data
from poolshare.supernet.tasks import Task
from poolshare.supernet.training.loop import check_batches, steps_per_epoch, train_model
from poolshare.supernet.training.recipe import Recipe

from ..exported.export import better_with_dense, load_supernet
from ..job.dense import answered
from ..job.folder import FINALISTS, RunFolder
from ..job.prepare import Job, computing, prepare
from ..job.recipes import checked_recipe, supernet_recipe
from ..job.records import write_csv
from ..progress import advance_step, progress_bar
from ..report.report import load_report
from ..report.write import write_report
from ..scoring import answers
from .intervals import score_interval
from .pareto import TRAINED, ranked, score_of


def train_finalists(
    folder: RunFolder,
    count: int = 8,
    *,
    epochs: int = 2,
    budget: str | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    amp: str | None = None,
    workers: int = 0,
    device: str | None = None,
    threads: int | None = None,
    console: Console | None = None,
    data: Data | str | None = None,
    data_dir: str | None = None,
    task: Task | None = None,
) -> pd.DataFrame:
    """Train the `count` best candidates within the budget further, each alone, and score them again.

    Of candidates with the same tokens in every layer only the best takes part: they differ in sharing alone, and hardly
    in accuracy. Architectures that the search was asked to include take part too, where they are within the budget. Each
    begins with the weights that `poolshare export` takes, has the tuned dense model as teacher, where there is one, and sees
    the supernet's training images with its augmentation, at the learning rate of `poolshare retrain`; both scores are of the
    search-validation images, so the test images stay unseen. budget: default: the search's.
    batch_size, lr, amp: default: as in the search. data, data_dir: where the search's images lie now, if elsewhere.
    data, task: those given in Python, see `prepare`.

    Returns all finalists within the budget that were trained alike, the best first: columns FINALISTS. Writes
    finalists.csv after each training and continues from it; the report then has the pick "finalist", the winner of the
    largest group within the search's budget that was trained alike.
    Raises RunError for a run that has not finished, that another process holds, or whose finalists.csv is damaged.
    """
    check_whole(1, count=count, epochs=epochs, threads=threads)
    check_whole(0, workers=workers)
    folder.check_trains("finalists")
    console = console or Console(quiet=True)
    usual = {"epochs": epochs, "lr": folder.config.finetune_lr}
    wished = {"batch_size": batch_size, "lr": lr, "amp": amp}
    recipe = checked_recipe(supernet_recipe(folder.config).model_dump() | usual, wished)
    with held(folder.path):
        report = load_report(folder, budget)
        chosen = choose(report.allowed, count, report.cost, report.included)
        rows = folder.read_finalists()
        done = set(rows["architecture"][_alike(rows, recipe)])
        missing = [row for row in chosen.to_dict("records") if row["architecture"] not in done]
        if missing:
            given = data if isinstance(data, Data) else None
            config = folder.config.without_weights.at(None if isinstance(data, Data) else data, data_dir)
            config = config.changed(device=device or config.device, workers=workers)
            job = prepare(config, console, given, task, folder.classes)
            folder.check_images(job.data.fingerprint, job.data.files)
            job = answered(job, folder)
            check_batches(job.data, recipe, 1)
            with computing(job, threads, folder.config.threads, console, recipe):
                rows = _train(folder, job, missing, rows, recipe, console)
            write_report(folder)  # the page shows the winner
    allowed = rows["architecture"].isin(set(report.allowed["architecture"]))
    return ranked(rows[allowed & _alike(rows, recipe)])


def _alike(rows: pd.DataFrame, recipe: Recipe) -> pd.Series:
    """Which rows are of this recipe."""
    return (rows[TRAINED] == pd.Series({name: getattr(recipe, name) for name in TRAINED})).all(axis=1)


def choose(candidates: pd.DataFrame, count: int, cost: str, included: Sequence[str] = ()) -> pd.DataFrame:
    """The best candidates, of equals the cheapest, each with other tokens in some layer; then those included."""
    score = score_of(candidates)
    best_first = candidates.sort_values([score, cost], ascending=[score == "loss", True], kind="stable")
    tokens = best_first["architecture"].map(
        lambda text: tuple((layer.tokens, layer.operator) for layer in Architecture.parse(text).layers)
    )
    chosen = best_first[~tokens.duplicated()].head(count)
    return pd.concat([chosen, best_first[best_first["architecture"].isin(included)]]).drop_duplicates("architecture")


def _train(
    folder: RunFolder,
    job: Job,
    missing: list[dict[str, object]],
    rows: pd.DataFrame,
    recipe: Recipe,
    console: Console,
) -> pd.DataFrame:
    config = job.config
    teacher = _start(folder, job.dense) if folder.dense.exists() else None
    batches = job.search_batches
    steps = recipe.epochs * steps_per_epoch(job.data, recipe)
    with progress_bar(console, "training finalists", len(missing) * steps, "steps") as advance:
        for index, candidate in enumerate(missing):
            text = str(candidate["architecture"])
            note = f"{index + 1} of {len(missing)}: {text}"
            torch.manual_seed(config.seed)
            architecture = Architecture.parse(text)
            model = _start(folder, architecture).to(job.device)
            show = partial(advance_step, advance, index * steps, note)
            train_model(
                model,
                job.data,
                recipe,
                teacher=teacher,
                task=job.task,
                seed=config.seed,
                workers=config.workers,
                progress=show,
            )
            found = answers(model, batches, job.task)
            low, high = score_interval(job.task, found.contributions)
            before: Any = better_with_dense(folder, architecture)
            before = candidate[job.task.column] if before is None else before
            new = {"architecture": text, "macs": candidate["macs"], "supernet_score": before}
            new |= {name: getattr(recipe, name) for name in TRAINED}
            new |= {"score": found.counts.score(job.task), "low": low, "high": high, "total": found.counts.total}
            rows = pd.concat([rows, pd.DataFrame([new])[list(FINALISTS)]], ignore_index=True)
            write_csv(folder.finalists, rows, checked=True)
    return rows


def _start(folder: RunFolder, architecture: Architecture) -> Subnet:
    """The architecture with the better weights, the supernet's or the dense model's."""
    return Subnet.from_supernet(load_supernet(folder, architecture), architecture)
