"""The number of threads: what decides it, that it is recorded and used again, and that nobody else's is changed."""

import shutil

import pytest
import torch

from poolshare.search import SearchResult, work
from poolshare.search.config import SearchConfig
from poolshare.search.job import forecast as announce
from poolshare.search.job import job as job_module
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.job import run_job
from poolshare.search.job.prepare import prepare
from poolshare.space import SearchSpace, TrainingError
from poolshare.supernet import SuperNet, threads
from poolshare.supernet.threads import choose_threads, computing_with, fastest, step_of
from poolshare.supernet.training import distributed
from poolshare.supernet.training.recipe import Recipe

SMALL = {
    "data": "digits",
    "model_args": {"depth": 2, "embed_dim": 16, "num_heads": 2},
    "batch_size": 128,
    "levels": (64, 16),
}


@pytest.mark.parametrize(
    ("milliseconds", "cores", "expected"),
    [
        ({1: 8, 2: 4, 4: 2, 8: 6}, 8, 4),  # as many as pay off
        ({1: 4, 2: 20}, 2, 1),  # a busy machine
        ({1: 6, 2: 3, 4: 3, 6: 1}, 6, 2),  # of equals the smaller number; 6 is not tried any more
        ({1: 6, 2: 3, 3: 1}, 3, 3),  # all cores, though 3 is no power of 2
        ({1: 1}, 1, 1),
    ],
)
def test_the_fastest_number_is_found_and_the_callers_is_left(milliseconds, cores, expected, monkeypatch):
    now = [0.0]

    def step(images):
        now[0] += milliseconds[torch.get_num_threads()] / 1000

    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    with computing_with(2):
        assert fastest(step, cores) == expected
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


@pytest.fixture
def two_cores(monkeypatch):
    """Nobody has said how many threads, there are 2 cores, and steps are timed only where a test says what comes out."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "fastest", lambda step, cores: pytest.fail("steps were timed"))
    return monkeypatch


def test_what_is_asked_for_wins_then_the_environment_then_the_record_then_timed_steps(two_cores):
    model = torch.nn.Linear(2, 2)
    assert choose_threads(5, 2, model).number == 5
    assert "5 threads as asked for, 2 until now" in choose_threads(5, 2, model).note
    assert choose_threads(None, 2, model) == (2, "")
    capped = choose_threads(None, 16, model)
    assert capped.number == 2
    assert "as many as there are cores; 16 until now" in capped.note
    two_cores.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(None, 16, model).number == torch.get_num_threads() == 1
    assert choose_threads(3, 16, model).number == 3


def test_a_timed_step_leaves_the_model_and_the_generator_as_they_were():
    net = prepare(SearchConfig(**SMALL, epochs=0)).supernet.train()
    before, generator = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    for recipe in (None, Recipe(), Recipe(amp="bf16")):
        step_of(net, recipe)(3)
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_hybrid_is_timed_on_images_and_not_on_what_its_stem_makes_of_them():
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 128}
    net = SuperNet.from_timm("vit_tiny_r_s16_p8_224", SearchSpace(2, (16, 4), ("max2d",), 2), **small)
    assert net.patch_embed.proj.in_channels != net.in_chans == 3
    step_of(net, None)(2)


@pytest.mark.slow
def test_the_number_is_recorded_and_every_verb_of_the_run_computes_with_it(two_cores, tmp_path):
    used = []
    forward = SuperNet.forward

    def seen(self, *arguments):
        used.append(torch.get_num_threads())
        return forward(self, *arguments)

    # Only the number: two real threads wait for each other where other programs run, the reason for all this.
    number = [1]
    two_cores.setattr(torch, "get_num_threads", lambda: number[0])
    two_cores.setattr(torch, "set_num_threads", lambda new: number.__setitem__(0, new))
    measure = job_module.measure_latency_table
    two_cores.setattr(
        job_module,
        "measure_latency_table",
        lambda net, batch, dtype, progress: measure(net, batch, dtype=dtype, rounds=1, check=1),
    )
    two_cores.setattr(SuperNet, "forward", seen)
    two_cores.setattr(threads, "fastest", lambda step, cores: 2)
    config = SearchConfig(**SMALL, epochs=1, objective="latency")
    folder = run_job(config, tmp_path / "run")
    assert (folder.config.threads, RunFolder.open(folder.path).config.threads) == (2, 2)
    assert set(used) == {2}
    assert folder.read_latency().threads == 2
    assert torch.get_num_threads() == 1  # the caller's
    two_cores.setattr(threads, "fastest", lambda step, cores: pytest.fail("steps were timed again"))

    scoring, counted = job_module.score_counts, []
    two_cores.setattr(
        job_module, "score_counts", lambda *a, **o: counted.append(torch.get_num_threads()) or scoring(*a, **o)
    )
    used.clear()
    run_job(config.model_copy(update={"epochs": 2}), tmp_path / "run")
    assert (set(used), set(counted)) == ({2}, {2})
    found, copy = SearchResult(folder.path), shutil.copytree(folder.path, tmp_path / "copy")
    (copy / "study.journal").unlink()
    counted.clear()
    assert work(copy, quiet=True)["scored"] > 0
    assert set(counted) == {2}
    seen_by = []
    for module in ("finalists", "trust"):
        train = __import__(f"poolshare.search.analysis.{module}", fromlist=["train_model"]).train_model

        def spied(*arguments, train=train, **options):
            seen_by.append(torch.get_num_threads())
            return train(*arguments, **options)

        two_cores.setattr(f"poolshare.search.analysis.{module}.train_model", spied)
    found.finalists(1, epochs=1, quiet=True)
    found.trust(2, 0, epochs=1, quiet=True)
    assert seen_by == [2, 2, 2]
    found.run.trust_rows.unlink()
    found.trust(2, 0, epochs=1, threads=1, quiet=True)
    assert seen_by[3:] == [1, 1]
    again = run_job(config.model_copy(update={"epochs": 2, "threads": 1}), tmp_path / "run")
    assert (again.config.threads, again.read_latency().threads, torch.get_num_threads()) == (1, 1, 1)


def test_the_forecast_runs_no_more_images_at_once_than_a_step_of_training(monkeypatch):
    job, sizes = prepare(SearchConfig(**SMALL, epochs=1, recipe={"accumulate": 3})), []
    forward = SuperNet.forward

    def seen(self, images, architectures=None):
        if architectures is not None:  # else it is what a batch of targets looks like, or the like
            sizes.append(len(images))
        return forward(self, images, architectures)

    monkeypatch.setattr(SuperNet, "forward", seen)
    monkeypatch.setattr(distributed, "launched_size", lambda: 2)
    monkeypatch.setattr(announce.time, "perf_counter", iter(range(100)).__next__)  # each step takes a second
    pace = announce.calibrate(job)
    assert sizes[:2] == [2, 4]  # what memory is forecast from
    assert set(sizes[2:]) == {22}  # 128 images, of which this process takes 64, in parts of 22
    assert pace.step == pytest.approx(64 / 22)
    sizes.clear()
    assert announce.calibrate(job, training=False).step == 0
    assert sizes == []


def test_a_step_that_does_not_fit_into_memory_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    forward = SuperNet.forward

    def full(self, images, architectures=None):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, architectures)

    monkeypatch.setattr(SuperNet, "forward", full)
    with pytest.raises(TrainingError, match=r"does not fit into the memory of cpu; .*--recipe accumulate=4"):
        run_job(SearchConfig(**SMALL, epochs=1, recipe={"accumulate": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
