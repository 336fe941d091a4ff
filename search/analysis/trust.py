"""How far supernet scores can be trusted: Kendall's τ against the same architectures trained alone, and its ceiling."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from poolshare.space import Architecture, BudgetError, ConfigError, RunError
from poolshare.space.band import even_borders
from poolshare.space.files import held, reading
from poolshare.space.quantities import check_whole
from poolshare.supernet.data.splits import Data
from poolshare.supernet.subnet import Subnet, checkpoint_filter_fn
from poolshare.supernet.tasks import Task
from poolshare.supernet.training.loop import Progress, Recipe, check_batches, steps_per_epoch, train_model

from ..config import RETRAIN_EPOCHS_GUIDED
from ..job.dense import answered, load_dense
from ..job.folder import RunFolder
from ..job.prepare import Job, computing, is_trained, load_weights, prepare
from ..job.recipes import checked_recipe, supernet_recipe
from ..job.records import FORMAT, read_csv, write_csv, write_json
from ..progress import advance_step, progress_bar
from ..report.report import Report, load_report
from ..report.write import write_report
from ..scoring import answers, score_counts
from .ranking import summarise

POINTS = ("architecture", "band", "macs", "supernet_score", "repeat", "score", "total")


@dataclass(frozen=True)
class Plan:
    """Which architectures are trained alone, and how often. Each band gets its share; `twice` of them have a ceiling."""

    architectures: int = 24
    twice: int = 12
    bands: int = 4  # of equal width in MACs
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architectures < 2 or not 0 <= self.twice <= self.architectures or self.bands < 1 or self.seed < 0:
            raise ConfigError(
                f"{self}: take at least 2 architectures, no more of them twice than there are, 1 band or more, and a "
                "seed from 0"
            )


def measure_trust(
    folder: RunFolder,
    plan: Plan,
    *,
    recipe_changes: Mapping[str, Any] | None = None,
    workers: int = 0,
    device: str | None = None,
    threads: int | None = None,
    console: Console | None = None,
    data: Data | str | None = None,
    data_dir: str | None = None,
    weights: str | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Train some architectures alone and compare their accuracy with their supernet score; returns trust.json.

    Each begins where the supernet began (at random, from the pretrained weights, or from the tuned dense ones) and takes the
    supernet's recipe and training images; both accuracies are of the search-validation images, so the test images stay unseen.
    recipe_changes: epochs, batch_size, lr, amp; None or left out: the supernet's.
    data, data_dir, weights: where the search's images and weights lie now, if elsewhere.
    data, task: those given in Python, see `prepare`. Writes trust.csv after each training and continues from it.
    Raises RunError for a run that is not trained yet, that another process holds, whose images have changed, or whose
    trust.csv belongs to another plan.
    """
    check_whole(0, workers=workers)
    check_whole(1, threads=threads)
    folder.check_trains("trust")
    given = data if isinstance(data, Data) else None
    config = folder.config.at(None if isinstance(data, Data) else data, data_dir, weights)
    config = config.changed(device=device or config.device, workers=workers)
    with held(folder.path):
        if not is_trained(folder):
            raise RunError(
                f"{folder.path} has no supernet of {folder.config.epochs} epochs yet; continue its training with `poolshare search`"
            )
        folder.check_weights(config)
        usual = {"epochs": RETRAIN_EPOCHS_GUIDED} if config.races else {}  # there is no supernet to take them from
        recipe = checked_recipe(supernet_recipe(config).model_dump() | usual, recipe_changes)
        header = {"format": FORMAT, "plan": plan.__dict__, "recipe": recipe.model_dump()}
        rows = _earlier_rows(folder, header)
        report = load_report(folder) if folder.summary.exists() else None  # raises for damage before any training
        console = console or Console(quiet=True)
        job = prepare(config, console, given, task, folder.classes)
        folder.check_images(job.data.fingerprint, job.data.files)
        if folder.dense.exists():
            load_dense(job.supernet, folder.dense)
        job = answered(job, folder)
        check_batches(job.data, recipe, 1)
        job = _within_latency(job, folder, report)
        drawn = draw(job, plan)
        _check_drawn(folder, rows, drawn)
        with computing(job, threads, folder.config.threads, console, recipe):
            return _measure(folder, plan, job, drawn, recipe, header, rows, console)


def _within_latency(job: Job, folder: RunFolder, report: Report | None) -> Job:
    """The job with its latency budget as in the search: sums of the table, scaled up where the whole models that were timed
    took longer."""
    config, latency = job.config, folder.read_latency()
    if config.objective != "latency":
        return job
    if latency is None:
        raise RunError(f"{folder.path} holds no latency.json; `poolshare search` measures it, then measure trust")
    job = job.with_latency(latency)
    if report is None or report.timed is None or report.budget != config.budget or config.budget is None:
        return job
    dense = latency.table.total(job.dense)
    limit = report.timed.limit(config.budget) / report.timed.longer(report.candidates, report.dense["latency_ms"])
    return replace(
        job, allowed=job.supernet.space.within(latency.table, None, min(job.allowed.high, int(limit * dense)))
    )


def _measure(
    folder: RunFolder,
    plan: Plan,
    job: Job,
    drawn: list[tuple[Architecture, int]],
    recipe: Recipe,
    header: Mapping[str, Any],
    rows: list[dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    untrained = {name: tensor.clone() for name, tensor in job.supernet.state_dict().items()}
    load_weights(job.supernet, folder.supernet)
    # An architecture has one score: the one from before its first training.
    scores = {row["architecture"]: row["supernet_score"] for row in rows}
    new = [architecture for architecture, _ in drawn if str(architecture) not in scores]
    counts = score_counts(job.supernet, new, job.search_batches, task=job.task) if new else []
    scores |= {str(one): count.score(job.task) for one, count in zip(new, counts, strict=True)}
    if not rows:
        write_json(folder.trust, header)
    missing = [
        (repeat, index)
        for repeat, count in enumerate((len(drawn), plan.twice))
        for index in range(min(count, len(drawn)))
        if (str(drawn[index][0]), repeat) not in {(row["architecture"], row["repeat"]) for row in rows}
    ]
    steps = recipe.epochs * steps_per_epoch(job.data, recipe)
    with progress_bar(console, "training alone", max(1, len(missing) * steps), "steps") as advance:
        for done, (repeat, index) in enumerate(missing):
            architecture, band = drawn[index]
            note = f"{done + 1} of {len(missing)}: {architecture}"
            show = partial(advance_step, advance, done * steps, note)
            score, total = _train_alone(job, architecture, untrained, recipe, f"{plan.seed} {index} {repeat}", show)
            macs = job.macs.total(architecture)
            point = (str(architecture), band, macs, scores[str(architecture)], repeat, score, total)
            rows.append(dict(zip(POINTS, point, strict=True)))
            write_csv(folder.trust_rows, pd.DataFrame(rows), checked=True)
    result = {**header, **summarise(pd.DataFrame(rows), plan.seed)}
    write_json(folder.trust, result)
    if folder.summary.exists():
        write_report(folder)  # the page shows it
    return result


def _earlier_rows(folder: RunFolder, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trainings an interrupted call of the same plan has finished."""
    table = folder.trust_rows
    if not table.exists():
        return []
    earlier = folder.read_trust()
    changed = [name for name in ("plan", "recipe") if (earlier or {}).get(name) != header[name]]
    if changed:
        raise RunError(
            f"{table} was begun with another {' and '.join(changed)}; repeat the earlier call, or move {table} away"
        )
    with reading(table, "move it away to measure trust again"):
        frame = read_csv(table)
        if tuple(frame.columns) != POINTS or frame.isna().any(axis=None):
            raise ValueError(f"its columns are {', '.join(frame.columns)}, or a value is missing")
        return frame.to_dict("records")


def _check_drawn(folder: RunFolder, rows: list[dict[str, Any]], drawn: list[tuple[Architecture, int]]) -> None:
    """Raise RunError where earlier trainings are of another draw: the run has another budget by now, or other latencies."""
    bands = {str(architecture): band for architecture, band in drawn}
    if any(bands.get(row["architecture"]) != row["band"] for row in rows):
        raise RunError(
            f"{folder.trust_rows} was begun within another budget, or with another latency table, than {folder.path} has now: "
            f"search with that one again, or move {folder.trust_rows} away"
        )


def draw(job: Job, plan: Plan) -> list[tuple[Architecture, int]]:
    """The plan's architectures with their bands, each once; the first ones come from all bands in turn.

    Bands are of equal width from the cheapest to the most expensive architecture of the budget, in its own quantity (MACs or
    latency). Where one runs out of members the others give more.
    """
    borders = even_borders(job.allowed.low, job.allowed.high, plan.bands)
    members: list[list[Architecture]] = []
    for band, (start, stop) in enumerate(pairwise(borders)):
        rng = random.Random(f"trust {plan.seed} {band}")
        members.append(_distinct(job, start, stop - 1, plan.architectures, rng))
    in_turn = [
        (group[turn], band)
        for turn in range(plan.architectures)
        for band, group in enumerate(members)
        if turn < len(group)
    ]
    if len(in_turn) < 2:
        raise RunError("the space has fewer than two architectures within the budget; there is nothing to rank")
    return in_turn[: plan.architectures]


def _distinct(job: Job, low: int, high: int, count: int, rng: random.Random) -> list[Architecture]:
    """Up to `count` different uniform draws from a band; a bounded number of tries, fewer where the band is small."""
    try:
        band = job.supernet.space.within(job.allowed.costs, low, high)
    except BudgetError:
        return []
    drawn: dict[Architecture, None] = {}
    for _ in range(50 * count):
        if len(drawn) == min(count, band.size):
            break
        drawn[band.sample(rng)] = None
    return list(drawn)


def _train_alone(
    job: Job,
    architecture: Architecture,
    untrained: dict[str, torch.Tensor],
    recipe: Recipe,
    key: str,
    progress: Progress,
) -> tuple[float, int]:
    """One architecture from the supernet's own start; its score on the search-validation images, and their number."""
    seed = random.Random(f"alone {key}").getrandbits(31)
    torch.manual_seed(seed)
    base, options = job.supernet.base
    model = Subnet.from_base(base, str(architecture), job.supernet.sharing, **options)
    if job.config.warm:
        model.load_state_dict(checkpoint_filter_fn(untrained, model))
    model.to(job.device)
    teacher = job.data.answering if job.task.targets == "dense" else None
    train_model(
        model,
        job.data,
        recipe,
        teacher=teacher,
        task=job.task,
        seed=seed,
        workers=job.config.workers,
        progress=progress,
    )
    counts = answers(model, job.search_batches, job.task).counts
    return counts.score(job.task), counts.total
