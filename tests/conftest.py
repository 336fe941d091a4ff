"""What several test files need: processes for the suite, verbs, one finished search, no GPU, a browser."""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm.layers
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from torch import nn

from poolshare.search import cli

# In CI a few examples of each kind, in the nightly run thousands: pytest -m "slow or fuzz" --hypothesis-profile=many.
settings.register_profile("few", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("many", max_examples=3000, deadline=None)
settings.load_profile("few")

# The files that take longest, and those that start processes, begin first, so that none of them is left for the end.
FIRST = ("workers", "distributed", "cli", "safety", "kill", "train", "browser_runs", "elsewhere", "entry", "operators")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The suite runs on as many cores as there are, up to four; single files and tests in this process."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return min(4, os.cpu_count() or 1) if whole else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads would spend their time waiting for each other, ten times over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as asked for, so that no search times steps to choose a number
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _no_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is expected here are a CPU's numbers, so no default device is a GPU, in child processes neither."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_gpu.py":
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """The system's browser; the tests that ask for it skip, and say so, where there is none."""
    from browser import launched

    with launched() as found:
        yield found


@pytest.fixture(params=["fused", "unfused"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Models made in this test attend by PyTorch's fused kernel, or by timm's spelled-out one; then as before."""
    before = bool(timm.layers.use_fused_attn())
    timm.layers.set_fused_attn(request.param == "fused")
    yield request.param
    timm.layers.set_fused_attn(before)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and of a size that matters: layer scales, norms, tokens and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight"))
            size = (2 / parameter[0].numel()) ** 0.5 if "backbone" in name and parameter.ndim > 1 else 0.2  # deep stems
            parameter.copy_(1 + 0.3 * noise if is_scale else size * noise)
    return model


def call(*words: object) -> tuple[int, str, str]:
    """Run a verb in this process: (exit status, standard output, standard error)."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["poolshare", *map(str, words)])
        try:
            cli.main()
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a verb in this process: (exit status, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["poolshare", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        return status, *capsys.readouterr()

    return run
