"""What was scored of a job's model as it is, image by image, kept in the run folder; and the whole search of the job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from poolshare.space import Architecture, DataError, forecast
from poolshare.supernet.data.splits import Batches
from poolshare.supernet.training.checkpoint import load_tensors, save_tensors

from ..config import IMAGES
from ..job.folder import RunFolder
from ..job.prepare import Job
from ..job.together import make_problem
from ..progress import Advance
from ..scoring import ImageScores, image_scores, paired
from .damage import single_reductions
from .racing import ScoreImages
from .search import Effort, search_untrained

BATCH = 32  # images of one walk: more of them do not run faster on a CPU, and hold more memory
FEW = 64  # images: fewer hardly distinguish architectures
_TRIED = 12  # architectures that the forecast is timed with


def drawn(job: Job) -> Job:
    """The job with the images to score on alone, in an order that the seed fixes. Raises DataError for fewer than two."""
    config, whole = job.config, len(job.data.split("search"))
    if whole < 2:
        raise DataError(
            f"{config.data} holds {whole} image to score on, which is too few to compare architectures: give a few hundred, as the "
            "model will see in use"
        )
    most = IMAGES if config.training and "search_images" not in config.given else config.search_images
    order = np.random.default_rng(config.seed).permutation(whole)[:most]
    notes = job.notes
    if len(order) < whole:
        notes += (
            f"{len(order):,} of the {whole:,} images are scored on, drawn with seed {config.seed}: see --search-images",
        )
    if len(order) < FEW:
        notes += (f"warning: {len(order)} images distinguish architectures poorly; a few hundred do better",)
    return replace(job, data=job.data.drawn("search", order), notes=notes)


class Record:
    """What was scored, kept in the run folder after every walk."""

    def __init__(self, folder: RunFolder):
        score = folder.config.score
        self.path, self.score = folder.losses, "divergence" if score == "metric" else score
        self.losses: dict[Architecture, ImageScores] = {}
        self.spent = 0.0  # in images that the dense model could have seen, whatever the objective was
        if not self.path.exists():
            return
        tensors, facts = load_tensors(self.path)
        if facts["score"] != self.score:  # another loss, which says nothing about this one
            return
        for name in tensors:
            if name.startswith("loss "):
                text = name.removeprefix("loss ")
                parts = (tensors[f"{kind} {text}"].numpy()[None] for kind in ("loss", "contributions"))
                self.losses[Architecture.parse(text)] = ImageScores(*parts)
        self.spent = facts["spent"]

    def save(self) -> None:
        """Write it, whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        for architecture, losses in self.losses.items():
            tensors[f"loss {architecture}"] = torch.from_numpy(losses.loss[0])
            tensors[f"contributions {architecture}"] = torch.from_numpy(losses.contributions[0])
        save_tensors(self.path, tensors, {"spent": self.spent, "score": self.score})

    def scorer(self, job: Job, advance: Advance) -> ScoreImages:
        """Scores architectures of the job on a range of its images. advance: told the images spent so far."""
        dense = job.objective.total(job.dense)

        def score(architectures: Sequence[Architecture], begin: int, end: int) -> ImageScores:
            walk = (end - begin) * forecast(dict.fromkeys([job.dense, *architectures]), job.objective).cost / dense
            found = image_scores(
                job.supernet,
                architectures,
                _batches(job, begin, end),
                loss=self.score,
                labelled=job.data.labelled,
                task=job.task,
                progress=lambda share: advance(self.spent + share * walk),
            )
            self.spent += walk
            return found

        return score


def search_job(job: Job, record: Record, advance: Advance) -> pd.DataFrame:
    """The candidates frame: finalists, dense, and the user's own, on all images of the job."""
    images, said = len(job.data.split("search")), ""

    def note(text: str, ahead: float) -> None:
        nonlocal said
        said = text
        if record.losses:
            record.save()
        advance(record.spent, said, record.spent + ahead / job.objective.total(job.dense))

    score = record.scorer(job, lambda done: advance(done, said))
    found = search_untrained(job.allowed, score, images, Effort(seed=job.config.seed), note, known=record.losses)
    if job.include:
        ahead = images * forecast(dict.fromkeys([job.dense, *job.include]), job.objective).cost
        note(f"{len(job.include)} included architectures on {images} images", ahead)
        found.race.run(job.include, images)
    note(said, 0)
    problem, rows = make_problem(job), []
    for architecture in dict.fromkeys([*found.finalists, job.dense, *job.include]):
        losses = found.race.losses[architecture]
        [counts] = losses.counts
        more = paired(losses.loss[0], found.race.losses[job.dense].loss[0])
        rows.append(problem.row(architecture, counts, 0) | {"loss_margin": more.high - more.mean})
    return pd.DataFrame(rows)


def _batches(job: Job, begin: int, end: int) -> Batches:
    return job.data.eval_loader("search", BATCH, workers=job.config.workers, start=begin, stop=end)


def seconds_per_unit(job: Job) -> float:
    """Of cost, on this machine now: a few single reductions on a batch, the first of which sets things up."""
    singles = single_reductions(job.supernet.space)
    tried = singles[:: max(1, len(singles) // _TRIED)]
    batches = list(_batches(job, 0, BATCH // 2))
    image_scores(job.supernet, tried[:1], batches, labelled=False, task=job.task)
    start = time.perf_counter()
    image_scores(job.supernet, tried, batches, labelled=False, task=job.task)
    seen = sum(len(labels) for _, labels in batches)
    return (time.perf_counter() - start) / (seen * forecast([job.dense, *tried], job.objective).cost)
