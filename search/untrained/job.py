"""The job without training: a model with its trained head and a folder of images, searched as it is."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from poolshare.space import ConfigError
from poolshare.space.data_kind import DataKind
from poolshare.supernet.data import Place
from poolshare.supernet.data.listing import is_image
from poolshare.supernet.data.loaders import loader_batch
from poolshare.supernet.data.opening import reader_of
from poolshare.supernet.data.splits import Data
from poolshare.supernet.tasks import Task
from poolshare.supernet.threads import computing_with
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import save_tensors

from ..config import ONLY_TRAINING, SearchConfig, checked_config
from ..console import say
from ..job.folder import RunFolder
from ..job.job import conclude, race, time_models, timed_job, with_threads
from ..job.prepare import Job, check_same_task, load_weights, prepare
from ..job.trained_head import checked_head
from ..progress import time_text
from .record import Record, drawn, seconds_per_unit
from .search import expected_cost


def run_untrained(
    config: SearchConfig,
    out: str | Path,
    console: Console | None = None,
    storage: str | None = None,
    data: Data | None = None,
    task: Task | None = None,
    dry_run: bool = False,
) -> RunFolder:
    """Search the model of `config` as it is, and leave frontier and report in the folder `out`; the arguments are those of
    `run_job`.

    Everything that was scored is kept in the folder, so the same call goes on where it was stopped, and another budget
    scores only what is new. storage: not used, since there is no study, which is said.
    Raises a PoolshareError for whatever the user can mend.
    """
    console = console or Console(quiet=True)
    task = check_same_task(config, task)
    config = _checked(config, data, task)
    if storage is not None:
        say(console, "--storage is not used: without training there is no study")
    config = RunFolder.continued(out, config)
    folder = RunFolder(Path(out), config)
    folder.check_weights(config)
    job = drawn(prepare(config, console, data, task, RunFolder.classes_of(out), load=not folder.supernet.exists()))
    job, threads = with_threads(job, folder, "journal")
    with computing_with(threads):
        return _run(job, Path(out), console, dry_run)


def _checked(config: SearchConfig, data: Data | None, task: Task) -> SearchConfig:
    """The configuration, knowing whether its images have labels. Raises ConfigError for what only a training has."""
    usual = checked_config(
        data=config.data, training=False, weights=config.weights, pretrained=config.pretrained, model=config.model
    )
    for name in ONLY_TRAINING:
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(config, name)} belongs to training, and --no-training was given: leave "
                "one of them out"
            )
    if config.score == "metric":
        raise ConfigError(
            "--score metric tells too little apart without training: give loss or divergence, or leave it out"
        )
    if task.targets == "dense" and (config.score == "loss" or config.unlabelled):
        wrong = "--unlabelled" if config.unlabelled else "--score loss"
        raise ConfigError(
            f"{wrong}: --task {task.name} never has labels, its targets are the dense model's outputs: leave it out"
        )
    if not config.warm:
        raise ConfigError(
            f"--no-training searches a model as it is, and {config.model} has no trained weights yet: give --weights FILE, or "
            "--pretrained, or a folder with weights as --model local-dir:FOLDER"
        )
    if distributed.launched_size() > 1:
        raise ConfigError("--no-training runs in one process: start it without torchrun")
    if data is not None and loader_batch(data) is not None:
        raise ConfigError(
            f"{config.data} came as loaders, and without training images are drawn one by one: give (train, validation) as "
            "Datasets"
        )
    if data is not None or DataKind.of(config.data) is not DataKind.FOLDER:
        if config.unlabelled:
            raise ConfigError(
                f"--unlabelled goes with a folder of pictures, and the data are {config.data}: leave it out"
            )
        return config
    return _labelled_or_not(config, task)


def _labelled_or_not(config: SearchConfig, task: Task) -> SearchConfig:
    """The configuration of a folder, unlabelled if that holds loose pictures. Raises ConfigError where labels are needed."""
    place = Place(config.data, data_dir=config.data_dir, targets=task.targets)
    root = place.path
    if root.is_dir() and not reader_of(place).holds(root) and any(is_image(one.name) for one in root.iterdir()):
        config = config.changed(unlabelled=True)
    if config.unlabelled and config.score == "loss":
        raise ConfigError(
            f"--score loss is the cross-entropy with labels, and the pictures of {config.data} have none: leave it out, for "
            "their divergence from the dense model's answers, or give class folders"
        )
    if config.unlabelled and config.search_data:
        raise ConfigError("--search-data names images with labels, and those of --data have none: give one of the two")
    return config


def _run(job: Job, out: Path, console: Console, dry_run: bool) -> RunFolder:
    folder = RunFolder(out, job.config)
    job = timed_job(job, folder, console)
    if dry_run:
        _announce(job, folder, console)
        return folder
    with RunFolder.claim(out, job.config) as folder:
        begun = folder.supernet.exists()
        if begun:
            load_weights(job.supernet, folder.supernet)
        elif job.head is not None and job.data.labelled:
            job = checked_head(job, console)
        folder.write_config(job.data.fingerprint, "journal", job.data.files, job.data.classes, job.notes)
        if job.latency:
            folder.write_latency(job.latency)
        if not begun:
            save_tensors(folder.supernet, job.supernet.state_dict(), {"epochs": 0})
        start = time.monotonic()
        _announce(job, folder, console)
        candidates, more = race(job, folder, console)
        spent = time.monotonic() - start
        conclude(job, folder, candidates, spent, time_models(job, candidates, console), more)
    return folder


def _announce(job: Job, folder: RunFolder, console: Console) -> None:
    record = Record(folder)
    for note in job.notes:
        say(console, note)
    dense = job.objective.total(job.dense)
    spent = 0.0 if folder.summary.exists() else record.spent  # what a finished search spent was for another budget
    left = max(0.0, expected_cost(job.allowed, len(job.data.split("search"))) / dense - spent)
    say(
        console,
        f"{job.config.title}: {job.supernet.space.size:,} architectures, {job.allowed.size_text} of them within the budget",
    )
    say(
        console,
        f"searching {'goes on and ' if record.spent else ''}takes about as long as the dense model on "
        f"{left:,.0f} images, {time_text(left * dense * seconds_per_unit(job))}",
    )
