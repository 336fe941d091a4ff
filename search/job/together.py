"""Scoring by all processes that torchrun started: each answers for its share of the images, and the counts are added up.

The first process searches; the others wait for the architectures that it sends. Batches are those of one process, so
the counts are too, to the last image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from poolshare.space import Architecture, RunError
from poolshare.supernet.data.splits import Batches
from poolshare.supernet.threads import computing_with
from poolshare.supernet.training import distributed

from ..counts import Counts
from ..scoring import SCORING_BATCH, score_counts
from ..study.loop import Problem
from .prepare import Job


def _own_share(job: Job) -> Batches:
    """What this process scores on: its share of the search-validation images."""
    return job.data.eval_share(
        "search", SCORING_BATCH, distributed.rank(), distributed.world_size(), workers=job.config.workers
    )


def make_problem(job: Job, record: Mapping[Architecture, Counts] | None = None) -> Problem:
    """What a search of this job, with its trained supernet, needs to know. record: what was scored before."""
    batches, known = _own_share(job), dict(record or {})

    def score(architectures: Sequence[Architecture], progress: Callable[[float], None]) -> list[Counts]:
        new = [architecture for architecture in architectures if architecture not in known]
        scored = _score_together(job, new, batches, progress) if new else []
        found = known | dict(zip(new, scored, strict=True))
        return [found[architecture] for architecture in architectures]

    latency, by_latency = job.latency and job.latency.table, job.config.objective == "latency"
    space, by = job.supernet.space, job.config.score
    return Problem(space, job.macs, job.parameters, job.allowed, score, latency, by_latency, known, by, job.task)


def _score_together(
    job: Job, architectures: Sequence[Architecture], batches: Batches, progress: Callable[[float], None]
) -> list[Counts]:
    """`score_counts` over the images of all processes; in the first one."""
    with _speaking():
        distributed.from_first([str(architecture) for architecture in architectures])
        return _scored(job, architectures, batches, progress)


@contextmanager
def scoring_together(job: Job) -> Iterator[None]:
    """In the first process: the others have its weights from here on, and are released at the end."""
    with distributed.joined(job.device):
        with _speaking():
            _share(job)
        yield
        with _speaking():
            distributed.from_first(None)


def help_scoring(job: Job) -> None:
    """In every other process: score what the first one sends, until it has all."""
    with distributed.joined(job.device), _speaking(), computing_with(_share(job)):
        batches = _own_share(job)
        while (texts := distributed.from_first(None)) is not None:
            _scored(job, [*map(Architecture.parse, texts)], batches)


def _share(job: Job) -> int:
    """Give all processes the first one's weights; returns its number of threads."""
    job.supernet.load_state_dict(distributed.tensors_from_first(job.supernet.state_dict(), job.device))
    return distributed.from_first(torch.get_num_threads())


def _scored(
    job: Job,
    architectures: Sequence[Architecture],
    batches: Batches,
    progress: Callable[[float], None] | None = None,
) -> list[Counts]:
    """What is recorded of each, over the images of all processes; some may have none."""
    by = job.config.score
    mine = score_counts(job.supernet, architectures, batches, by, job.task, progress) if len(batches) else []
    numbers = distributed.summed([number for one in mine for number in one.to_json()], job.device)
    each = len(numbers) // len(architectures)
    return [Counts.of(numbers[at : at + each], by) for at in range(0, len(numbers), each)]


@contextmanager
def _speaking() -> Iterator[None]:
    """Raise RunError where a process that should answer has ended."""
    try:
        yield
    except RuntimeError as error:
        if distributed.world_size() == 1:
            raise
        raise RunError(
            f"one of the processes that torchrun started has ended ({str(error).splitlines()[0]:.100}): see what it said, then "
            "give the same command again"
        ) from None
