"""The main job killed by SIGKILL at random moments of training, search, report and export, and continued each time.

What is left must be what an undisturbed run leaves, byte for byte. Commands run in processes forked from one that has
imported everything, so that a restart costs tenths of a second.
"""

import random
import signal
import time
from itertools import pairwise

import pytest
from conftest import Forked

from poolshare.supernet.training.checkpoint import load_tensors


class Nursery:
    """Runs poolshare's commands in forked processes; `killed` counts those that were killed."""

    def __init__(self):
        self.child, self.killed = None, 0

    def run(self, *words, wait_for=None, delay=None):
        """(seconds, whether it ended by itself). With `delay` it is killed so long after `wait_for()` holds."""
        start = time.time()
        child = self.child = Forked.verb(*words)
        if delay is not None:
            if wait_for is not None:
                child.wait_until(lambda: wait_for(start))
            end = time.time() + delay
            child.wait_until(lambda: time.time() >= end)
            child.send(signal.SIGKILL)  # nothing happens where it ended by itself
        status, out, err = child.wait()
        self.killed += status == -signal.SIGKILL
        if status != -signal.SIGKILL:
            assert status == 0, out + err
        return time.time() - start, status == 0

    def announced(self, start):
        """Whether the command has told how long it will take: training or scoring is next."""
        return "scoring" in self.child.said("err")


@pytest.fixture
def nursery():
    return Nursery()


def content(run, export):
    """What must not depend on interruptions."""
    tensors, _ = load_tensors(run / "supernet.safetensors")
    files = [run / "pareto.csv", run / "candidates.csv", *sorted(export.iterdir())]
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, {
        f"{path.parent.name}/{path.name}": path.read_bytes() for path in files
    }


def disturb_and_compare(nursery, folder, words, kills, seed):
    """kills: how many in training, scoring, report and export. Each phase is left behind when its kills are done."""
    rng = random.Random(seed)
    print("seed", seed)
    for name in ("undisturbed", "disturbed"):
        (folder / name).mkdir()
    run, export = folder / "undisturbed" / "run", folder / "undisturbed" / "export"
    search = ("search", "--data", "digits", *words, "--device", "cpu", "--out")
    took = ("export", run, "--pick", "knee", "--out")

    seconds, _ = nursery.run(*search, run)
    ends = [(run / name).stat().st_mtime for name in ("config.json", "supernet.safetensors", "pareto.csv")]
    ends += [(run / "pareto.png").stat().st_mtime]
    training, scoring, report = (after - before for before, after in pairwise(ends))
    exporting, _ = nursery.run(*took, export)

    run_2, export_2 = folder / "disturbed" / "run", folder / "disturbed" / "export"
    took_2 = ("export", run_2, "--pick", "knee", "--out", export_2)

    def reported(start):
        return (run_2 / "pareto.csv").exists() and (run_2 / "pareto.csv").stat().st_mtime > start

    phases = (
        (kills[0], training, nursery.announced, run_2 / "supernet.safetensors"),
        (kills[1], scoring, nursery.announced, run_2 / "pareto.csv"),
        (kills[2], report, reported, run_2 / "pareto.png"),
    )
    for number, length, begun, done in phases:
        for _ in range(number):
            if done.exists() and begun != reported:
                break
            wait_for = None if rng.random() < 0.1 else begun
            nursery.run(*search, run_2, wait_for=wait_for, delay=rng.uniform(0, 2 * length / number))
    nursery.run(*search, run_2)
    for _ in range(kills[3]):
        if not export_2.exists():
            nursery.run(*took_2, delay=rng.uniform(0, exporting))
    if not export_2.exists():
        nursery.run(*took_2)
    weights, files = content(run, export)
    weights_2, files_2 = content(run_2, export_2)
    assert weights == weights_2
    assert files == files_2
    return seconds


SMALL = ("--model-args", "depth=3,embed_dim=16,num_heads=2", "--batch-size", "64")


def test_a_small_job_killed_in_every_phase_ends_like_one_that_was_not(nursery, tmp_path):
    words = (*SMALL, "--epochs", "4", "--sampler", "evolution", "--trials", "60")
    disturb_and_compare(nursery, tmp_path, words, kills=(3, 2, 1, 1), seed=0)
    assert nursery.killed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["exhaustive", "evolution"])
def test_the_main_job_killed_thirty_times_ends_like_one_that_was_not(sampler, nursery, tmp_path):
    words = ("--model-args", "depth=4", "--epochs", "10", "--sampler", sampler, "--trials", "300")
    rounds = 0
    while nursery.killed < 30:
        rounds += 1
        folder = tmp_path / str(rounds)
        folder.mkdir()
        disturb_and_compare(nursery, folder, words, kills=(16, 12, 6, 4), seed=rounds)
    print(f"{nursery.killed} kills in {rounds} rounds")
