"""The main job killed by SIGKILL at random moments of training, search, report and export, and continued each time.

What is left must be what an undisturbed run leaves, byte for byte. Commands run in processes forked from one that has
imported everything, so that a restart costs tenths of a second.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from poolshare.supernet.training.checkpoint import load_tensors

NURSERY = """
import json, os, sys
import torch
import poolshare.search.cli, poolshare.search.exported.export, poolshare.search.job.job, matplotlib.figure
torch.set_num_threads(1)
for line in sys.stdin:
    words, log = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        sys.argv = ["poolshare", *words]
        status = 1
        try:
            poolshare.search.cli.main()
            status = 0
        except SystemExit as leaving:
            status = leaving.code or 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Runs poolshare's commands in forked processes; `killed` counts those that were killed."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.log, self.killed = folder / "log", 0

    def run(self, *words, wait_for=None, delay=None):
        """(seconds, whether it ended by itself). With `delay` it is killed so long after `wait_for()` holds."""
        self.log.unlink(missing_ok=True)
        start = time.time()
        print(json.dumps([list(map(str, words)), str(self.log)]), file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        if delay is not None:
            running = f"/proc/{child}/exe"
            while wait_for is not None and not wait_for(start) and os.access(running, os.R_OK):
                time.sleep(0.002)
            end = time.time() + delay
            while time.time() < end and os.access(running, os.R_OK):
                time.sleep(0.002)
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(child, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        self.killed += status == -signal.SIGKILL
        if status != -signal.SIGKILL:
            assert status == 0, self.log.read_text()
        return time.time() - start, status == 0

    def announced(self, start):
        """Whether the command has told how long it will take: training or scoring is next."""
        return self.log.exists() and "scoring" in self.log.read_text()


@pytest.fixture
def nursery(tmp_path):
    made = Nursery(tmp_path)
    yield made
    made.process.stdin.close()
    made.process.wait()


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
    disturb_and_compare(nursery, tmp_path, words, kills=(3, 2, 1, 1), seed=random.randrange(2**32))
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
        disturb_and_compare(nursery, folder, words, kills=(16, 12, 6, 4), seed=random.randrange(2**32))
    print(f"{nursery.killed} kills in {rounds} rounds")
