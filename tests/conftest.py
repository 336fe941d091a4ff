"""What several test files need: processes for the suite, verbs, one finished search, no GPU, a browser.

Torch is imported by the processes that run tests: the one that only hands them out starts these the sooner.
"""

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from filelock import FileLock
from hypothesis import settings

from poolshare.search import cli

if TYPE_CHECKING:
    from torch import nn

# In CI a few examples of each kind; the slow tests (pytest -m slow) fuzz with thousands.
settings.register_profile("few", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("many", max_examples=3000, deadline=None)

# The files that take longest, and those that start processes, begin first, so that none of them is left for the end.
FIRST = ("workers", "distributed", "cli", "safety", "kill", "train", "browser_runs", "elsewhere", "entry", "operators")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The suite runs on as many cores as there are, up to four; single files and tests in this process."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return min(4, os.cpu_count() or 1) if whole else 0


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("many" if config.option.markexpr == "slow" else "few")


@pytest.hookimpl(tryfirst=True)  # before the others are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if config.option.markexpr == "slow" and item.get_closest_marker("fuzz"):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads would spend their time waiting for each other, ten times over."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as asked for, so that no search times steps to choose a number
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the suite sees of image files stays out of the user's cache."""
    from poolshare.supernet.data.seen import CACHE_VARIABLE

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_timings() -> Iterator[None]:
    """A latency table is made of the rounds that fit into two seconds, not into a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poolshare.supernet.latency.SPEND", 2.0)
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is expected here are a CPU's numbers, so no default device is a GPU, in child processes neither."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_gpu.py":
            patch.setattr("torch.cuda.is_available", lambda: False)
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
    from timm import layers

    before = bool(layers.use_fused_attn())
    layers.set_fused_attn(request.param == "fused")
    yield request.param
    layers.set_fused_attn(before)


def one_of_each(values: Iterable[Any], *representatives: Any) -> list[Any]:
    """For a parametrisation that takes long: one value of each structure in CI, the others under -m slow."""
    values = list(values)
    assert {*representatives} <= {*values}
    return [one if one in representatives else pytest.param(one, marks=pytest.mark.slow) for one in values]


def randomise(model: "nn.Module", seed: int = 0) -> "nn.Module":
    """Every parameter random and of a size that matters: layer scales, norms, tokens and biases included."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight"))
            size = (2 / parameter[0].numel()) ** 0.5 if "backbone" in name and parameter.ndim > 1 else 0.2  # deep stems
            parameter.copy_(1 + 0.3 * noise if is_scale else size * noise)
    return model


class Forked:
    """A function called in a process forked from this one, which has imported everything: a start costs no seconds.

    What it prints goes to files in a new folder.
    """

    def __init__(self, target: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="poolshare-forked-"))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            os.environ.update(environment)
            target(*arguments)
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    @classmethod
    def verb(cls, *words: object, **environment: str) -> "Forked":
        def run() -> None:
            sys.argv = ["poolshare", *map(str, words)]
            cli.main()

        return cls(run, **environment)

    def said(self, name: str) -> str:
        """What it has printed so far to "out" or to "err"."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def ended(self) -> bool:
        """Whether it has ended; it then still waits for `wait`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait_until(self, holds: Callable[[], Any]) -> None:
        """Return when something holds, or the process has ended."""
        while not holds() and not self.ended():
            time.sleep(0.002)

    def wait_for(self, text: str, name: str = "err") -> None:
        """Return when it has printed this, or has ended."""
        self.wait_until(lambda: text in self.said(name))

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str, str]:
        """(Exit status, or minus the signal that killed it; standard output; standard error)."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        found = status, self.said("out"), self.said("err")
        shutil.rmtree(self.folder)
        return found


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


DIGITS = ("search", "--data", "digits", "--model-args", "depth=3,embed_dim=16,num_heads=2", "--batch-size", "128")
DIGITS += ("--device", "cpu", "--epochs", "2")


class DigitsRun(NamedTuple):
    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def finished_digits(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A search over digits with a small model that scored its whole space, once for all processes of the suite."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    with FileLock(root / "digits.lock"):
        if not (root / "digits" / "err").exists():
            (root / "digits").mkdir()
            status, out, err = call(*DIGITS, "--out", root / "digits" / "run")
            assert status == 0, err
            (root / "digits" / "out").write_text(out)
            (root / "digits" / "err").write_text(err)
    return root / "digits"


@pytest.fixture(scope="module")
def digits_run(finished_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> DigitsRun:
    """This file's own copy of it, and what the search printed."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    shutil.copytree(finished_digits / "run", folder)
    told = [(finished_digits / name).read_text() for name in ("out", "err")]
    return DigitsRun(folder, *(text.replace(str(finished_digits / "run"), str(folder)) for text in told))
