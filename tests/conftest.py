"""What several test files need: no GPU, timm with and without fused attention, weights that leave nothing trivial, a browser."""

import sys
from collections.abc import Callable, Iterator

import pytest
import timm.layers
import torch
from torch import nn

from poolshare.search import cli


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
