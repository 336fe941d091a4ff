"""What a search of a job needs to know: its space, its costs, and how architectures are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from poolshare.space import Architecture

from ..counts import Counts
from ..study.loop import Problem
from .prepare import Job
from .together import score_together, search_batches


def make_problem(job: Job, record: Mapping[Architecture, Counts] | None = None) -> Problem:
    """What a search of this job, with its trained supernet, needs to know. record: what was scored before."""
    batches, known = search_batches(job), dict(record or {})

    def score(architectures: Sequence[Architecture], progress: Callable[[float], None]) -> list[Counts]:
        new = [architecture for architecture in architectures if architecture not in known]
        scored = score_together(job, new, batches, progress) if new else []
        found = known | dict(zip(new, scored, strict=True))
        return [found[architecture] for architecture in architectures]

    latency, by_latency = job.latency and job.latency.table, job.config.objective == "latency"
    space, by = job.supernet.space, job.config.score
    return Problem(space, job.macs, job.parameters, job.allowed, score, latency, by_latency, known, by, job.task)
