"""One more searcher on the study of a run: waits for its supernet, then scores until the search is over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from timm.layers import to_2tuple

from poolshare.space import ConfigError, DataError, RunError
from poolshare.space.data_kind import DataKind
from poolshare.space.quantities import check_whole
from poolshare.supernet.data.given import Parts
from poolshare.supernet.data.splits import Data
from poolshare.supernet.tasks import Task
from poolshare.supernet.training import distributed

from ..config import SearchConfig
from ..console import say
from ..study.open import check_storage
from .dense import answered
from .folder import RunFolder
from .job import score_candidates
from .prepare import Job, check_same_task, computing, is_trained, load_weights, open_given, pick_device, prepare
from .together import help_scoring, make_problem, scoring_together

SECONDS_BETWEEN_LOOKS = 2
PATIENCE_SECONDS = 600  # a search that has just been started checks its images before it makes the run folder


def work(
    run: str | Path,
    storage: str | None = None,
    data: str | Path | Parts | None = None,
    data_dir: str | None = None,
    workers: int = 0,
    device: str | None = None,
    console: Console | None = None,
    classes: Sequence[str] | None = None,
    task: Task | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Score architectures of a run beside whoever else does, until its trials are all scored; writes no report.

    data, data_dir: where the images of the search lie here, if elsewhere. data, classes, task: those given in Python to
    the search, see `poolshare.search.search`. workers: processes that load images. threads: of PyTorch on a CPU; None: see
    `choose_threads`.
    Returns how many architectures were scored here, and in all. Processes that torchrun started together are one worker,
    each with its share of the images; all but the first return nothing. Raises a PoolshareError for whatever the user can mend, for
    instance other images than those of the search.
    """
    check_whole(0, workers=workers)
    check_whole(1, threads=threads)
    console = console or Console(quiet=True)
    kind = check_storage(storage)
    _wait_for_folder(Path(run), console)
    folder = RunFolder.open(run)
    folder.check_trains("worker")
    if folder.config.races:
        raise RunError(
            f"{folder.path} has no supernet: `poolshare search` alone searches its dense model, so stop this worker"
        )
    folder.check_same(folder.data_fingerprint, kind)
    # What can be refused now is not refused after hours of waiting for the supernet.
    pick_device(device or folder.config.device)
    task = check_same_task(folder.config, task)
    own, place = None, None
    if data is None or isinstance(data, (str, Path)):
        place = None if data is None else str(data)
        folder.config.at(place, data_dir)
    else:
        own = _open_own(data, classes, folder.config, workers, console, task)
    folder = _wait_for_supernet(folder, console)
    config = folder.config.without_weights.at(place, data_dir)
    config = config.changed(device=device or config.device, download=False, workers=workers)
    job = _with_supernet(prepare(config, console, own, task, folder.classes), folder, kind)
    if distributed.rank() > 0:
        help_scoring(job)
        return {}
    scored = 0

    def score(architectures: Any, progress: Any) -> Any:
        nonlocal scored
        result = problem.score(architectures, progress)
        scored += len(architectures)
        return result

    with computing(job, threads, folder.config.threads, console), scoring_together(job):
        problem = make_problem(job)
        found = score_candidates(job, replace(problem, score=score), folder, console, storage, publish=False)
    return {"run": str(folder.path), "scored": scored, "candidates": len(found)}


def _with_supernet(job: Job, folder: RunFolder, kind: str) -> Job:
    """The job with the weights and the latencies of its run. Raises RunError for other images."""
    folder.check_same(job.data.fingerprint, kind, job.data.files)
    load_weights(job.supernet, folder.supernet)
    job, latency = answered(job, folder), folder.read_latency()
    if latency is None and job.config.objective == "latency":
        raise RunError(f"{folder.path} holds no latency.json yet; `poolshare search` measures it, then start workers")
    return job.with_latency(latency) if latency else job


def _open_own(
    parts: Parts, classes: Sequence[str] | None, config: SearchConfig, workers: int, console: Console, task: Task
) -> Data:
    """Data given in Python, under the name that the search gave them."""
    if DataKind.of(config.data) is not DataKind.GIVEN:
        raise ConfigError(f"the images of this search are {config.data}, not data given in Python: leave data out")
    name = config.data.removeprefix(DataKind.GIVEN.value)
    own = open_given(parts, name, classes, config.seed, workers, console, task.targets)
    here, there = (own.in_chans, *own.img_size), (config.in_chans, *to_2tuple(config.img_size))
    if here != there:
        texts = ["×".join(map(str, shape)) for shape in (here, there)]
        raise DataError(f"images are {texts[0]} here, and {texts[1]} in the search: transform them alike")
    return own


def _wait_for_folder(run: Path, console: Console) -> None:
    """Return once a search has begun the run, where something else stands, or after `PATIENCE_SECONDS`."""

    def absent() -> bool:
        return not run.exists() or (run.is_dir() and all(entry.name.startswith(".") for entry in run.iterdir()))

    start = time.monotonic()
    if absent():
        minutes = PATIENCE_SECONDS // 60
        say(console, f"{run} is not a run folder yet: waiting {minutes} minutes for `poolshare search` to begin it")
    while absent() and time.monotonic() - start < PATIENCE_SECONDS:
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _wait_for_supernet(folder: RunFolder, console: Console) -> RunFolder:
    """The run as it is once its supernet has all its epochs."""
    if not is_trained(folder):
        say(console, f"{folder.path} has no trained supernet yet: waiting for `poolshare search` to train it")
    while not is_trained(folder):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        folder = RunFolder.open(folder.path)
    return folder
