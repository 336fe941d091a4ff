"""The job without training: a model with its trained head and a folder of images, searched as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from poolshare.space import ConfigError
from poolshare.space.data_kind import DataKind
from poolshare.supernet.data import Place
from poolshare.supernet.data.listing import is_image, subfolders
from poolshare.supernet.data.loaders import loader_batch
from poolshare.supernet.data.splits import Data
from poolshare.supernet.threads import computing_with
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import save_tensors

from ..config import ONLY_TRAINING, SearchConfig, checked_config
from ..job.folder import RunFolder
from ..job.job import conclude, race, time_models, timed_job, with_threads
from ..job.prepare import Job, load_weights, prepare
from ..job.trained_head import checked_head
from ..progress import time_text
from ..scoring import Metric, top1
from .record import Record, drawn, seconds_per_unit
from .search import expected_cost


def run_untrained(
    config: SearchConfig,
    out: str | Path,
    console: Console | None = None,
    storage: str | None = None,
    data: Data | None = None,
    metric: Metric = top1,
    dry_run: bool = False,
) -> RunFolder:
    """Search the model of `config` as it is, and leave frontier and report in the folder `out`; the arguments are those of
    `run_job`.

    Everything that was scored is kept in the folder, so the same call goes on where it was stopped, and another budget
    scores only what is new. storage: not used, since there is no study, which is said.
    Raises a PoolshareError for whatever the user can mend.
    """
    console = console or Console(quiet=True, markup=False)
    config = _checked(config, data)
    if storage is not None:
        console.print("--storage is not used: without training there is no study", soft_wrap=True)
    if config.unlabelled and metric is not top1:
        raise ConfigError(
            f"the metric {config.metric} needs labels, and the images of {config.data} have none; leave it out, or give "
            "images in class folders"
        )
    config = RunFolder.continued(out, config)
    folder = RunFolder(Path(out), config)
    folder.check_weights(config)
    job = drawn(prepare(config, console, data, metric, RunFolder.classes_of(out), load=not folder.supernet.exists()))
    job, threads = with_threads(job, folder, "journal")
    with computing_with(threads):
        return _run(job, Path(out), console, dry_run)


def _checked(config: SearchConfig, data: Data | None) -> SearchConfig:
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
    if config.score == "top1":
        raise ConfigError(
            "--score top1 tells too little apart without training: give loss or divergence, or leave it out"
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
    root = Place(config.data, data_dir=config.data_dir).path
    if root.is_dir() and not subfolders(root) and any(is_image(one.name) for one in root.iterdir()):
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
    job = timed_job(job, RunFolder(out, job.config), console)
    say = partial(console.print, markup=False, soft_wrap=True)
    if dry_run:
        folder = RunFolder(out, job.config)
        _announce(job, Record(folder), say)
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
        _announce(job, Record(folder), say)
        candidates, more = race(job, folder, console)
        spent = time.monotonic() - start
        conclude(job, folder, candidates, spent, time_models(job, candidates, console), more)
    return folder


def _announce(job: Job, record: Record, say: Callable[[str], None]) -> None:
    for note in job.notes:
        say(note)
    dense = job.objective.total(job.dense)
    left = max(0.0, expected_cost(job.allowed, len(job.data.split("search"))) / dense - record.spent)
    say(
        f"{job.config.title}: {job.supernet.space.size:,} architectures, {job.allowed.size_text} of them within the budget"
    )
    say(
        f"searching {'goes on and ' if record.spent else ''}takes about as long as the dense model on "
        f"{left:,.0f} images, {time_text(left * dense * seconds_per_unit(job))}"
    )
