"""What a search of a job needs to know: its space, its costs, and how architectures are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from poolshare.space import Architecture

from ..study.loop import Task
from .prepare import Job
from .together import count_together, search_batches


def make_task(job: Job, record: Mapping[Architecture, tuple[int, int]] | None = None) -> Task:
    """What a search of this job, with its trained supernet, needs to know. record: what was scored before."""
    batches, known = search_batches(job), dict(record or {})

    def score(architectures: Sequence[Architecture], progress: Callable[[float], None]) -> tuple[list[int], int]:
        new = [architecture for architecture in architectures if architecture not in known]
        if new or not architectures:
            counts, total = count_together(job, new, batches, progress)
            found = dict(zip(new, counts, strict=True))
        else:
            found, total = {}, known[architectures[0]][1]
        return [found[a] if a in found else known[a][0] for a in architectures], total

    latency, by_latency = job.latency and job.latency.table, job.config.objective == "latency"
    return Task(
        job.supernet.space, job.macs, job.parameters, job.allowed, score, latency, by_latency=by_latency, record=known
    )
