"""The job without training: a model with its trained head and a folder of images, searched as it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from poolshare.space import Architecture, ConfigError, DataError, forecast
from poolshare.space.data_kind import DataKind
from poolshare.supernet.data import Place
from poolshare.supernet.data.listing import is_image, subfolders
from poolshare.supernet.data.loaders import loader_batch
from poolshare.supernet.data.splits import Batches, Data
from poolshare.supernet.threads import computing_with
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import load_tensors, save_tensors

from ..config import ONLY_TRAINING, SearchConfig, checked_config
from ..counts import Counts
from ..job.folder import RunFolder
from ..job.job import conclude, make_task, time_models, timed_job, with_threads
from ..job.prepare import Job, load_weights, prepare
from ..job.trained_head import checked_head
from ..losses import ImageLosses, image_losses, loss_of, paired
from ..progress import Advance, progress_bar, time_text
from ..scoring import Metric, top1
from .damage import single_reductions
from .search import Effort, expected_cost, search_untrained

BATCH = 32  # images of one walk: more of them do not run faster on a CPU, and hold more memory
FEW = 64  # images: fewer hardly distinguish architectures
_TRIED = 12  # architectures that the forecast is timed with


def run_untrained(
    config: SearchConfig,
    out: str | Path,
    console: Console | None = None,
    storage: str | None = None,
    data: Data | None = None,
    metric: Metric = top1,
) -> RunFolder:
    """Search the model of `config` as it is, and leave frontier and report in the folder `out`; the arguments are those of
    `run_job`.

    Everything that was scored is kept in the folder, so the same call goes on where it was stopped, and another budget
    scores only what is new. storage: not used, since there is no study.
    Raises a PoolshareError for whatever the user can mend.
    """
    console = console or Console(quiet=True, markup=False)
    config = _checked(config, data)
    if config.unlabelled and metric is not top1:
        raise ConfigError(
            f"the metric {config.metric} needs labels, and the images of {config.data} have none; leave it out, or give "
            "images in class folders"
        )
    config = RunFolder.continued(out, config)
    folder = RunFolder(Path(out), config)
    folder.check_weights(config)
    job = _drawn(prepare(config, console, data, metric, RunFolder.classes_of(out), load=not folder.supernet.exists()))
    job, threads = with_threads(job, folder, "journal")
    with computing_with(threads):
        return _run(job, Path(out), console)


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


def _drawn(job: Job) -> Job:
    """The job with the images to score on alone, in an order that the seed fixes. Raises DataError for fewer than two."""
    config, whole = job.config, len(job.data.split("search"))
    if whole < 2:
        raise DataError(
            f"{config.data} holds {whole} image to score on, which is too few to compare architectures: give a few hundred, as the "
            "model will see in use"
        )
    order = np.random.default_rng(config.seed).permutation(whole)[: config.images]
    notes = job.notes
    if len(order) < whole:
        notes += (f"{len(order):,} of the {whole:,} images are scored on, drawn with seed {config.seed}: see --images",)
    if len(order) < FEW:
        notes += (f"warning: {len(order)} images distinguish architectures poorly; a few hundred do better",)
    return replace(job, data=job.data.drawn("search", order), notes=notes)


class _Record:
    """What was scored, kept in the run folder after every walk."""

    def __init__(self, folder: RunFolder):
        self.path, self.score = folder.losses, folder.config.score
        self.losses: dict[Architecture, ImageLosses] = {}
        self.spent = 0.0  # in images that the dense model could have seen, whatever the objective was
        if not self.path.exists():
            return
        tensors, facts = load_tensors(self.path)
        if facts["score"] != self.score:  # another loss, which says nothing about this one
            return
        for name in tensors:
            if name.startswith("loss "):
                text = name.removeprefix("loss ")
                loss, right = (tensors[f"{kind} {text}"].numpy()[None] for kind in ("loss", "right"))
                self.losses[Architecture.parse(text)] = ImageLosses(loss, right)
        self.spent = facts["spent"]

    def save(self) -> None:
        """Write it, whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        for architecture, losses in self.losses.items():
            tensors[f"loss {architecture}"] = torch.from_numpy(losses.loss[0])
            tensors[f"right {architecture}"] = torch.from_numpy(losses.right[0])
        save_tensors(self.path, tensors, {"spent": self.spent, "score": self.score})


def _run(job: Job, out: Path, console: Console) -> RunFolder:
    job = timed_job(job, RunFolder(out, job.config), console)
    say = partial(console.print, markup=False, soft_wrap=True)
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
        for note in job.notes:
            say(note)
        start = time.monotonic()
        record, images = _Record(folder), len(job.data.split("search"))
        dense = job.objective.total(job.dense)
        cost = expected_cost(job.allowed, images) / dense
        left = max(0.0, cost - record.spent)
        say(
            f"{job.config.title}: {job.supernet.space.size:,} architectures, {job.allowed.size_text} of them within the budget"
        )
        say(
            f"searching {'goes on and ' if record.spent else ''}takes about as long as the dense model on "
            f"{left:,.0f} images, {time_text(left * dense * _seconds_per_unit(job))}"
        )
        with progress_bar(console, "searching without training", cost, "dense images") as advance:
            candidates = _search(job, record, advance)
        spent = time.monotonic() - start
        more = {
            "looked_at": len(record.losses),
            "dense_passes": round(record.spent / images, 1),
            "labelled": job.data.labelled,
        }
        folder.write_candidates(candidates)
        conclude(job, folder, candidates, spent, time_models(job, candidates, console), more)
    return folder


def _search(job: Job, record: _Record, advance: Advance) -> pd.DataFrame:
    """The candidates frame: finalists, dense, and the user's own, on all images."""
    images, dense, said = len(job.data.split("search")), job.objective.total(job.dense), ""

    def score(architectures: Sequence[Architecture], begin: int, end: int) -> ImageLosses:
        walk = (end - begin) * forecast(dict.fromkeys([job.dense, *architectures]), job.objective).cost / dense
        found = image_losses(
            job.supernet,
            architectures,
            _batches(job, begin, end),
            loss=loss_of(job.config.score),
            labelled=job.data.labelled,
            metric=job.metric,
            progress=lambda share: advance(record.spent + share * walk, said),
        )
        record.spent += walk
        return found

    def note(text: str) -> None:
        nonlocal said
        said = text
        if record.losses:
            record.save()

    advance(record.spent)
    found = search_untrained(job.allowed, score, images, Effort(seed=job.config.seed), note, known=record.losses)
    found.race.run(job.include, images)
    record.save()
    advance(record.spent, total=record.spent)
    task, rows = make_task(job), []
    wanted = dict.fromkeys([*found.finalists, job.dense, *job.include])
    for architecture in wanted:
        losses = found.race.losses[architecture]
        counts = Counts(int(losses.right.sum()), images, int(losses.loss.sum()))
        more = paired(losses.loss[0], found.race.losses[job.dense].loss[0])
        rows.append(task.row(architecture, counts, 0) | {"loss_margin": more.high - more.mean})
    return pd.DataFrame(rows)


def _batches(job: Job, begin: int, end: int) -> Batches:
    return job.data.eval_loader("search", BATCH, workers=job.config.workers, start=begin, stop=end)


def _seconds_per_unit(job: Job) -> float:
    """Of cost, on this machine now: a few single reductions on a batch, the first of which sets things up."""
    singles = single_reductions(job.supernet.space)
    tried = singles[:: max(1, len(singles) // _TRIED)]
    batches = list(_batches(job, 0, BATCH // 2))
    image_losses(job.supernet, tried[:1], batches, labelled=False)
    start = time.perf_counter()
    image_losses(job.supernet, tried, batches, labelled=False)
    seen = sum(len(labels) for _, labels in batches)
    return (time.perf_counter() - start) / (seen * forecast([job.dense, *tried], job.objective).cost)
