"""Throughput of two workers against one, on a journal: workers.csv.

    python results/workers/reproduce.py [ROUNDS]

The same study with one and with two processes, in turns, in rounds of their own. Processes are forked from one that
has opened data and model, so start-up does not count; the weights are untrained, which costs the same. Beside seconds
of wall-clock stand CPU seconds of all workers, which other work on the machine changes less, and the machine's load.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from poolshare.search.config import checked_config
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.prepare import Job, prepare
from poolshare.search.job.together import make_problem
from poolshare.search.progress import no_progress
from poolshare.search.samplers.exhaustive import score_everything
from poolshare.search.study.loop import run_study
from poolshare.search.study.open import open_store

HERE = Path(__file__).parent
TRIALS = 600


def one(job: Job, kind: str, folder: RunFolder) -> None:
    """What one worker does."""
    problem = make_problem(job)
    if kind == "exhaustive":
        score_everything(problem, open_store(folder.journal, None, kind), no_progress)
    else:
        run_study(problem, open_store(folder.journal, None, kind), kind, TRIALS, 0, no_progress)


def measure(job: Job, kind: str, workers: int) -> tuple[float, float]:
    """(wall-clock, CPU seconds of all workers) of one study."""
    with tempfile.TemporaryDirectory() as path, RunFolder.claim(f"{path}/run", job.config) as folder:
        forking = multiprocessing.get_context("fork")
        crew = [forking.Process(target=one, args=(job, kind, folder)) for _ in range(workers)]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        for process in crew:
            process.start()
        for process in crew:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a worker ended with status {process.exitcode}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.monotonic() - start, cpu


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    job = prepare(checked_config(data="digits", device="cpu", model_args={"depth": 9}))
    make_problem(job)  # decodes the images once, for all
    rows = []
    for number in range(rounds):
        for kind in ("evolution", "exhaustive"):
            for workers in (1, 2):
                wall, cpu = measure(job, kind, workers)
                rows.append(
                    {"round": number, "kind": kind, "workers": workers, "wall_s": round(wall, 2),
                     "cpu_s": round(cpu, 2), "load": round(os.getloadavg()[0], 2)}
                )  # fmt: skip
                print(rows[-1], flush=True)
    with open(HERE / "workers.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for kind in ("evolution", "exhaustive"):
        for what in ("wall_s", "cpu_s"):
            one_, two = (
                statistics.median(row[what] for row in rows if (row["kind"], row["workers"]) == (kind, workers))
                for workers in (1, 2)
            )
            print(f"{kind} {what}: 1 worker {one_:.2f}, 2 workers {two:.2f}, ratio {one_ / two:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
