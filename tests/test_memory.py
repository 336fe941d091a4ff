"""What a training step will hold, said and refused before it begins; what a search will take; and memory that is kept."""

import gc
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import DIGITS, call

from poolshare.search import SearchResult, search
from poolshare.search.config import checked_config
from poolshare.search.job import memory
from poolshare.search.job.forecast import sandwich_of
from poolshare.search.job.memory import check_memory, measure_memory
from poolshare.search.job.prepare import prepare
from poolshare.space import TrainingError
from poolshare.supernet.model import seeing_checkpoints

SMALL = {
    "data": "digits",
    "model_args": {"depth": 3, "embed_dim": 16, "num_heads": 2},
    "device": "cpu",
    "batch_size": 64,
}


def job_of(**options):
    return prepare(checked_config(**SMALL | options))


def memory_of(job):
    return measure_memory(job, sandwich_of(job))


def test_memory_is_that_of_what_autograd_keeps():
    job = job_of()
    found = memory_of(job)
    weights = sum(parameter.nbytes for parameter in job.supernet.parameters())
    assert (found.fixed, found.images) == (4 * weights, 64)
    assert found.step == found.fixed + math.ceil(64 * found.image)
    assert memory._saved(job, sandwich_of(job), 6) - memory._saved(job, sandwich_of(job), 2) == pytest.approx(
        4 * found.image
    )
    # A block keeps at least its input, its normed input, queries, keys, values and the MLP's hidden, of 65 tokens.
    assert found.image > 3 * 65 * (5 + 2 * 4) * 16 * 4
    assert all(parameter.grad is None for parameter in job.supernet.parameters())


def test_recipes_change_it():
    plain = memory_of(job_of())
    parts = memory_of(job_of(recipe={"accumulate": 4}))
    assert (parts.images, parts.image) == (16, plain.image)
    assert memory_of(job_of(recipe={"ema": 0.9})).fixed == plain.fixed * 5 / 4
    job = job_of(recipe={"checkpoint": True})
    found = memory_of(job)
    # What each block begins with, at the least, and less than half of what it holds without
    assert 3 * 64 * 16 * 4 < found.image < 0.5 * plain.image


@pytest.mark.parametrize("checkpoint", [True, False])
def test_measuring_counts_what_checkpoints_keep_and_keeps_nothing(checkpoint):
    job = job_of(recipe={"checkpoint": checkpoint})
    sandwich, seen = sandwich_of(job), []
    net = job.supernet
    net.set_grad_checkpointing(True)
    with seeing_checkpoints(lambda kept: seen.append(kept) if isinstance(kept, torch.Tensor) else None):
        dense = net(torch.zeros(2, 1, 8, 8), [net.space[0]])
    assert [kept.shape for kept in seen if kept.ndim == 3] == 3 * [(2, 64, 16)]
    seen.clear()
    del dense
    before = live_bytes()
    for images in (2, 4, 4):
        memory._saved(job, sandwich, images)
    assert live_bytes() == before


def live_bytes():
    gc.collect()
    return sum(one.untyped_storage().nbytes() for one in gc.get_objects() if type(one) is torch.Tensor)


def test_a_step_that_does_not_fit_is_refused_with_what_fits(monkeypatch):
    job = job_of()
    found = memory_of(job)
    monkeypatch.setattr(memory, "free_bytes", lambda device: found.step)
    check_memory(job, found)
    monkeypatch.setattr(memory, "free_bytes", lambda device: found.fixed + int(20 * found.image))
    with pytest.raises(
        TrainingError,
        match=r"64 images at once holds about [0-9.]+ MB, and cpu has [0-9.]+ MB free: give --recipe accumulate=4",
    ):
        check_memory(job, found)
    parts = job_of(recipe={"accumulate": 4})
    check_memory(parts, memory_of(parts))
    monkeypatch.setattr(memory, "free_bytes", lambda device: found.fixed // 2)
    with pytest.raises(TrainingError, match="take a smaller model, or try --recipe checkpoint=true"):
        check_memory(job, found)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path):
    status, out, err = call(*DIGITS, "--out", tmp_path / "run", "--dry-run", "-q")
    assert (status, out) == (0, "")
    for said in (
        "architectures",
        "training the supernet for 2 epochs takes about",
        "MB; the run folder takes about",
        "scoring",
    ):
        assert said in " ".join(err.split())
    assert not (tmp_path / "run").exists()
    found = search(
        "digits", out=tmp_path / "run", dry_run=True, quiet=True, **{k: v for k, v in SMALL.items() if k != "data"}
    )
    assert isinstance(found, SearchResult)
    assert not (tmp_path / "run").exists()


FETCHED = """
import resource
import numpy as np
from poolshare.space.processes import keep_memory

kept = keep_memory()
np.ones(2**24)  # 128 MiB, 64 pages of the largest kind
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
@pytest.mark.parametrize("asked", [True, False])
def test_memory_that_is_kept_is_not_fetched_anew(asked):
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    own |= {} if asked else {"MALLOC_MMAP_MAX_": "65536"}  # the user's word, and glibc's default
    out = subprocess.run([sys.executable, "-c", FETCHED], env=own, capture_output=True, text=True, check=True).stdout
    kept, faults = out.split()
    assert kept == str(asked)
    assert (int(faults) < 100) is asked, faults
