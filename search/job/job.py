"""The main job: open the data, train the supernet, search it, report; each step continues what is there."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from poolshare.space import Architecture, RunError, forecast_space
from poolshare.supernet.data.loaders import loader_batch
from poolshare.supernet.data.splits import Data
from poolshare.supernet.latency import device_name, measure_latency_table
from poolshare.supernet.tasks import Task
from poolshare.supernet.threads import choose_threads, computing_with
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import load_state_facts, save_tensors
from poolshare.supernet.training.loop import check_batches, steps_per_epoch, train_supernet
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.trackers import check_trackers, watching

from ..analysis.intervals import difference_interval, score_interval
from ..analysis.latency_budget import MODELS, Timed, time_frontier
from ..analysis.pareto import frontier
from ..config import MAY_DIFFER, SearchConfig
from ..console import say
from ..counts import Counts
from ..progress import advance_loss, progress_bar
from ..report.report import load_report
from ..report.write import write_report
from ..samplers.benchmark import Benchmark
from ..samplers.exhaustive import score_everything
from ..scoring import image_scores, score_counts
from ..study.loop import GENERATION, Problem, run_study
from ..study.open import check_storage, open_store
from ..untrained.offered import offered
from ..untrained.record import Record, drawn, search_job
from .dense import Tuned, answered, begun_tuning, phases, read_tuned, score_with_dense, tuned_model
from .folder import RunFolder
from .forecast import announce, calibrate
from .prepare import Job, is_trained, load_weights, prepare, supernet_epochs
from .recipes import supernet_recipe, without_usual_recipe
from .records import FORMAT, versions, write_csv, write_json
from .regions import write_regions
from .together import help_scoring, make_problem, scoring_together
from .trained_head import checked_head


def run_job(
    config: SearchConfig,
    out: str | Path,
    console: Console | None = None,
    storage: str | None = None,
    data: Data | None = None,
    task: Task | None = None,
    dry_run: bool = False,
) -> RunFolder:
    """Train the supernet of `config` (or continue), search it, and leave frontier and report in the folder `out`.

    console: where forecast and progress go; None: nowhere. storage: address of the PostgreSQL database that holds the
    study; None: a journal in the folder. data, task: those given in Python, see `prepare`. dry_run: only say what it
    would take; nothing is written. Raises a PoolshareError for
    whatever the user can mend. Where torchrun started several processes they train and score together, and the first
    one does all the rest.
    """
    console = console or Console(quiet=True)
    check_trackers(config.tracker)
    config = RunFolder.continued(out, without_usual_recipe(config))  # before anything long
    folder = RunFolder(Path(out), config)
    begun = is_trained(folder) or load_state_facts(folder.training) is not None or begun_tuning(folder)
    folder.check_weights(config)
    if distributed.rank() == 0:
        _refuse_fewer_epochs(folder, supernet_recipe(config))
    kind = check_storage(storage) if distributed.rank() == 0 else ""
    job = prepare(config, console, data, task, RunFolder.classes_of(out), load=not begun)
    config = job.config
    check_batches(job.data, job.recipe, distributed.launched_size())
    if distributed.rank() > 0:
        if dry_run:
            return RunFolder(Path(out), config)
        with distributed.joined(job.device):
            job, _ = _train(job, None, console)
            if not job.config.races:
                help_scoring(answered(job, None))
        return RunFolder(Path(out), config)
    if config.races and "trials" in config.given:
        say(console, f"--trials {config.trials} counts what a supernet scores, and none is trained: it has no effect")
    job, threads = with_threads(job, folder, kind, job.recipe)
    with computing_with(threads):
        return _run(job, Path(out), console, storage, kind, dry_run)


def with_threads(job: Job, folder: RunFolder, kind: str, recipe: Recipe | None = None) -> tuple[Job, int | None]:
    """The job with its number of threads, the run's where it was begun, and that number; see `choose_threads`.

    Raises RunError for other images, or a study elsewhere, than those the run was begun with.
    """
    recorded = None
    if (folder.path / "config.json").exists():
        folder.check_same(job.data.fingerprint, kind, job.data.files)
        recorded = RunFolder.open(folder.path).config.threads
    threads = choose_threads(job.config.threads, recorded, job.supernet, recipe)
    notes = (*job.notes, *([threads.note] if threads.note else []))
    return replace(job, config=job.config.changed(threads=threads.number), notes=notes), threads.number


def _run(job: Job, out: Path, console: Console, storage: str | None, kind: str, dry_run: bool) -> RunFolder:
    """Train, search and report, in the process that does it all."""
    folder = RunFolder(out, job.config)
    job = timed_job(job, folder, console)
    trained = _epochs_trained(folder, job.recipe.epochs)
    # A step that the memory of this machine cannot hold is refused before anything is written.
    pace = calibrate(job, training=trained < job.recipe.epochs)
    if dry_run:
        announce(job, pace, trained, console, tuned=folder.dense.exists())
        return folder
    with RunFolder.claim(out, job.config) as folder:
        _refuse_fewer_epochs(folder, job.recipe)
        if job.head is not None:
            job = checked_head(job, console)
        folder.write_config(job.data.fingerprint, kind, job.data.files, job.data.classes, job.notes)
        if job.latency:
            folder.write_latency(job.latency)
        announce(job, pace, trained, console, tuned=folder.dense.exists())
        with distributed.joined(job.device):
            job, trying = _train(job, folder, console)
            job = job if job.config.races else answered(job, folder)
            start, more = time.monotonic(), dict[str, Any]()
            candidates = None if job.config.races else _score(job, folder, console, storage)
        if candidates is None:
            job = drawn(job)
            candidates, more = race(job, folder, console)
        scoring = trying + time.monotonic() - start
        conclude(job, folder, candidates, scoring, time_models(job, candidates, console), more)
    return folder


def timed_job(job: Job, folder: RunFolder, console: Console) -> Job:
    """The job with the folder's latency table, or with a new one where latency is wanted and that is of another
    device, batch size, precision, number of threads or torch. Writes nothing."""
    latency, batch = folder.read_latency(), job.config.latency_batch
    if job.config.objective == "latency":
        threads = torch.get_num_threads() if job.device.type == "cpu" else 0
        place = batch, device_name(job.device), threads, job.config.deployed, versions()["torch"]
        there = latency and (latency.batch_size, latency.device, latency.threads, latency.dtype, folder.latency_torch())
        if there != place:
            with progress_bar(console, "measuring latency", 1, "forwards") as advance:
                latency = measure_latency_table(
                    job.supernet,
                    batch,
                    dtype=job.config.deployed,
                    progress=lambda done, total: advance(done, total=total),
                )
    return job.with_latency(latency) if latency else job


def _epochs_trained(folder: RunFolder, wished: int) -> float:
    """Those that need not be trained again; a training that was to go on and was stopped may be beyond its supernet."""
    trained = supernet_epochs(folder)
    if trained == wished:
        return trained
    return max(trained or 0, float((load_state_facts(folder.training) or {}).get("epochs", 0)))


def _refuse_fewer_epochs(folder: RunFolder, recipe: Recipe) -> None:
    trained = _epochs_trained(folder, recipe.epochs)
    if trained > recipe.epochs:
        raise RunError(
            f"{folder.path} was trained for {trained:g} epochs already; ask for --epochs {math.ceil(trained)} or more, "
            "or search into a new folder"
        )


def _train(job: Job, folder: RunFolder | None, console: Console) -> tuple[Job, float]:
    """Train what is missing; returns the job, whose space the dense model may have narrowed, and the seconds of that.

    folder: None in a process that only helps the first one.
    """
    recipe, trying = job.recipe, 0.0
    finished = folder is not None and is_trained(folder)
    total = recipe.epochs * steps_per_epoch(job.data, recipe)
    with distributed.joined(job.device):
        if distributed.from_first(finished):
            if folder:
                load_weights(job.supernet, folder.supernet)
            return job, trying
        threads = distributed.from_first(job.config.threads)  # the first one chose them
        teacher = None
        if job.config.guided:
            with computing_with(threads):
                teacher = tuned_model(job, folder, console)
                start = time.monotonic()
                if loader_batch(job.data) is None:  # such data give no range of their images
                    job = offered(job, folder, console)
                trying = time.monotonic() - start
        if folder:
            earlier = supernet_epochs(folder) or 0
            for scored in (folder.candidates, folder.finalists, folder.trust, folder.trust_rows):
                if scored.exists():  # with weights that now change
                    scored.rename(scored.with_stem(f"{scored.stem}-{earlier}-epochs"))
        bar = progress_bar(console, "training the supernet", total, "steps")
        logs = watching(job.config.tracker, folder.path if folder else None, "training")
        with computing_with(threads), logs as watch, bar as advance:
            train_supernet(
                job.supernet,
                job.data,
                job.macs,
                recipe,
                teacher=teacher,
                task=job.task,
                seed=job.config.seed,
                workers=job.config.workers,
                state=folder and folder.training,
                progress=partial(advance_loss, advance),
                watch=watch,
                say=partial(say, console),
                otherwise="search into a new folder",
            )
    if folder:
        save_tensors(folder.supernet, job.supernet.state_dict(), {"epochs": recipe.epochs})
    return job, trying


def _seconds(folder: RunFolder, scoring: float) -> dict[str, float]:
    """What training and scoring took, in earlier calls and in this one."""
    try:
        earlier = folder.read_summary()["seconds"]
    except RunError:  # none yet, or damaged: it is made again
        earlier = {}
    training = _training_seconds(folder, earlier.get("training", 0.0))
    return {"training": training, "scoring": earlier.get("scoring", 0.0) + scoring}


def _training_seconds(folder: RunFolder, otherwise: float) -> float:
    """What the supernet's training took, interrupted or not, as its state says."""
    try:
        facts = load_state_facts(folder.training) or {}
    except RunError:  # damaged, and no longer needed
        return otherwise
    return float(facts.get("seconds", otherwise)) if facts.get("epochs") == folder.config.epochs else otherwise


def study_name(job: Job, folder: RunFolder) -> str:
    """The study of this configuration, these images and these trained weights: no worker can score with others."""
    ours = folder.config.model_dump(mode="json", exclude=set(MAY_DIFFER))
    if not job.exhaustive:  # all scores of a space are the same whatever is looked for
        ours |= {"budget": job.config.budget, "sampler": job.config.sampler, "generation": GENERATION}
        if job.config.objective == "latency":
            ours["objective"] = job.objective.to_json()
    if job.config.score != "metric":
        ours["score"] = job.config.score
    digest = hashlib.sha256(json.dumps([ours, folder.data_fingerprint], sort_keys=True).encode())
    for name, tensor in sorted(job.supernet.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().cpu().numpy().tobytes())
    return f"{sampler_of(job)} after {folder.config.epochs} epochs, {digest.hexdigest()[:16]}"


def sampler_of(job: Job) -> str:
    """The sampler that a search of this job runs."""
    if job.exhaustive:
        return "exhaustive"
    return "evolution" if job.config.sampler == "auto" else job.config.sampler


def score_candidates(
    job: Job, problem: Problem, folder: RunFolder, console: Console, storage: str | None, publish: bool = True
) -> pd.DataFrame:
    """Score the whole space or search it, as one of any number of workers; returns the candidates frame.

    publish: write candidates.csv as a search goes on.
    """
    config, store = job.config, open_store(folder.journal, storage, study_name(job, folder))
    if job.exhaustive:
        whole = forecast_space(problem.space, job.macs)
        singles = whole.cost * whole.architectures / whole.one_by_one
        with progress_bar(console, "scoring the whole space", singles, "single evaluations") as advance:
            return score_everything(problem, store, lambda share, note: advance(share * singles, note))
    with progress_bar(console, f"searching ({sampler_of(job)})", config.trials, "architectures") as advance:
        write = folder.write_candidates if publish else None
        return run_study(problem, store, sampler_of(job), config.trials, config.seed, advance, write)


def race(job: Job, folder: RunFolder, console: Console) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Search the model as it is, on the images of `drawn`; returns the candidates frame, and facts for the summary."""
    record, images = Record(folder), len(job.data.split("search"))
    with progress_bar(console, "searching without training", 1, "dense images") as advance:
        frame = search_job(job, record, advance)
    folder.write_candidates(frame)
    passes = round(record.spent / images, 1)
    return frame, {"looked_at": len(record.losses), "dense_passes": passes, "labelled": job.data.labelled}


def _score(job: Job, folder: RunFolder, console: Console, storage: str | None) -> pd.DataFrame:
    """The candidates frame, by a study."""
    with scoring_together(job):
        problem = make_problem(job, _record(folder))
        frame = score_candidates(job, problem, folder, console, storage)
        frame = _with_included(job, problem, frame)
    folder.write_candidates(frame)
    return frame


def _record(folder: RunFolder) -> dict[Architecture, Counts]:
    """What earlier searches scored with these weights; `write_config` has removed losses of another kind."""
    if not folder.candidates.exists():
        return {}
    rows, by_loss = folder.read_candidates().to_dict("records"), folder.config.score != "metric"
    return {Architecture.parse(row["architecture"]): Counts.of_row(row, by_loss) for row in rows}


def _with_included(job: Job, problem: Problem, frame: pd.DataFrame) -> pd.DataFrame:
    """The candidates, and after them those the user asked for that are not among them."""
    present = set(frame["architecture"])
    missing = [architecture for architecture in dict.fromkeys(job.include) if str(architecture) not in present]
    if not missing:
        return frame
    counts = problem.score(missing, lambda share: None)
    last = int(frame["generation"].max()) if len(frame) else 0
    rows = [problem.row(architecture, each, last) for architecture, each in zip(missing, counts, strict=True)]
    return pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)


def time_models(job: Job, candidates: pd.DataFrame, console: Console) -> Timed | None:
    """What whole models take, where a latency budget is to be kept."""
    if job.latency is None or job.config.objective != "latency" or job.config.budget is None:
        return None
    table, batch, dtype = job.latency.table, job.latency.batch_size, job.latency.dtype
    dense = table.value(table.total(job.dense))
    with progress_bar(console, "timing whole models", MODELS, "models") as advance:
        return time_frontier(job.supernet, candidates, dense, job.config.budget, batch, advance, dtype)


def _cheapest(job: Job) -> dict[str, dict[str, Any]]:
    """By each cost, the cheapest architecture of the whole space, scored or not, and what it costs."""
    space, latency = job.supernet.space, job.latency and job.latency.table
    cheapest = space.cheapest(job.macs)
    found: dict[str, dict[str, Any]] = {"macs": {"architecture": str(cheapest), "macs": job.macs.total(cheapest)}}
    if latency:
        fastest = space.cheapest(latency)
        found["latency_ms"] = {"architecture": str(fastest), "latency_ms": latency.value(latency.total(fastest))}
    return found


def _dense_score(job: Job, folder: RunFolder, tuned: Tuned | None, candidates: pd.DataFrame) -> dict[str, object]:
    """The dense model's score and, where losses decide, its loss: with its own weights, else with the supernet's."""
    columns = job.task.column, "loss"
    if tuned and job.config.score == "metric":
        return {job.task.column: tuned.score}
    row = candidates[candidates["architecture"] == str(job.dense)]
    if (not tuned or job.config.races) and not row.empty:
        return {name: float(row[name].iloc[0]) for name in columns if name in row}
    if tuned:
        [counts] = score_with_dense(job, folder, [str(job.dense)]).values()
    else:
        [counts] = score_counts(job.supernet, [job.dense], job.search_batches, job.config.score, job.task)
    found = counts.columns(job.task)
    return {name: found[name] for name in columns if name in found}


def _with_dense_weights(
    job: Job, folder: RunFolder, tuned: Tuned, candidates: pd.DataFrame, seconds: dict[str, float]
) -> dict[str, Any]:
    """What the frontier scores with the dense model's weights, and what each phase took; the seconds of both are added."""
    begin = time.monotonic()
    best = frontier(candidates, job.config.cost)
    # Without a supernet these are the weights that were scored.
    wanted = [*best["architecture"], *map(str, job.include)] if job.config.epochs else []
    by_dense = {text: counts.score(job.task) for text, counts in score_with_dense(job, folder, wanted).items()}
    pairs = zip(best["architecture"], best[job.task.column], strict=True)
    both = [(by_dense[text], score) for text, score in pairs if text in by_dense]
    seconds |= {"tuning": tuned.seconds, "scoring": seconds["scoring"] + time.monotonic() - begin}
    return {"phases": phases(job, tuned, seconds, len(candidates), both), "with_dense_weights": by_dense}


def task_words(task: Task, labelled: bool) -> dict[str, str]:
    """What a report says of a task, for summary.json; labelled: whether the images have targets of their own."""
    return {
        "name": task.name,
        "metric": task.metric if labelled else task.agreement,
        "column": task.column,
        "targets": task.targets,
        "loss": task.loss_words,
        "divergence": task.divergence_words,
        "unit": task.unit,
    }


def shown_intervals(job: Job, folder: RunFolder) -> dict[str, list[float]]:
    """95 % intervals of the scores on the frontiers, and of their differences from the dense model's: four numbers each.

    Only of scores that are no shares, which come from a bootstrap over images: those are looked at once more, one by one.
    """
    report = load_report(folder)
    texts = dict.fromkeys(str(text) for cost in report.costs for text in report.by(cost)["architecture"])
    shown = [job.dense, *map(Architecture.parse, texts), *job.include]
    if job.config.races:
        record = Record(folder).losses
        parts = [record[architecture].contributions[0] for architecture in shown]
    else:
        parts = list(image_scores(job.supernet, shown, job.search_batches, task=job.task).contributions)
    return {
        str(architecture): [*score_interval(job.task, part), *difference_interval(job.task, part, parts[0])]
        for architecture, part in zip(shown, parts, strict=True)
    }


def conclude(
    job: Job,
    folder: RunFolder,
    candidates: pd.DataFrame,
    scoring: float,
    timed: Timed | None,
    more: Mapping[str, Any],
) -> None:
    """Summary, page and picture, frontier. scoring: seconds of this call. more: facts for the summary."""
    limit = None if job.config.budget is None else job.objective.value(job.allowed.high)
    cost = job.config.cost
    if job.exhaustive and job.task.proportion:
        Benchmark.of(candidates, job.supernet.space, job.macs, job.parameters).save(folder.benchmark)
    tuned = read_tuned(folder)
    dense = _dense_score(job, folder, tuned, candidates)
    seconds = _seconds(folder, scoring)
    path = _with_dense_weights(job, folder, tuned, candidates, seconds) if tuned else {}
    splits = ("train", "search") if job.config.training else ("search",)
    facts = {
        "format": FORMAT,
        "dense": {
            "architecture": str(job.dense),
            **dense,
            "macs": job.macs.total(job.dense),
            "parameters": job.parameters.total(job.dense),
            **({"latency_ms": job.latency.table.value(job.latency.table.total(job.dense))} if job.latency else {}),
        },
        "objective": job.config.objective,
        "score": job.config.score,
        "task": task_words(job.task, job.data.labelled),
        **{f"budget_{column}": limit if cost == column else None for column in ("macs", "latency_ms")},
        "budget": job.config.budget,
        **({"timed": timed.to_json()} if timed else {}),
        "included": list(map(str, job.include)),
        "classes": list(job.data.classes),
        "outputs": job.supernet.num_classes,
        "images": {
            name: job.data.split(name).images_of(len(job.data.classes))
            for name in splits
            if job.data.labelled and job.data.classes and not job.data.of_pixels
        },
        "split_sizes": {name: len(job.data.split(name)) for name in splits},
        "notes": list(folder.notes),
        "certified": len(candidates) == job.supernet.space.size,
        "space": job.supernet.space.to_json(),
        "space_size": job.supernet.space.size,
        "cheapest": _cheapest(job),
        **({"within_budget": job.allowed.size_text} if job.config.budget else {}),
        **path,
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "versions": versions(),
        **more,
    }
    write_json(folder.summary, facts)
    if not job.task.proportion:
        write_json(folder.summary, facts | {"intervals": shown_intervals(job, folder)})
    write_regions(job, folder)
    report = write_report(folder)
    write_csv(folder.pareto, report.by(report.cost))
