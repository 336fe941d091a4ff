"""How many threads PyTorch uses on a CPU: as asked for, as recorded, or the fastest by a few timed steps.

More are not always faster. Where other programs take the cores, or kernels are small, threads wait for each other, up
to ten times as long as they compute. Sums of floats depend on their number, so what is chosen is kept and used again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from poolshare.space.processes import usable_cores
from poolshare.space.quantities import check_whole

from .measure import evaluating
from .model import SuperNet
from .training.loop import attention_of, precision_of
from .training.recipe import Recipe

MOST_IMAGES, SECONDS = 32, 0.3  # limits of one timed step, so that choosing takes seconds
ROUNDS = 3  # steps of each number that are compared, in turn
WORTH = 0.9  # of the time: more threads are taken only where they need no more than this


class Threads(NamedTuple):
    """A number of threads, and a note for the user on how it was chosen, which may be empty."""

    number: int | None  # None: leave PyTorch as it is
    note: str = ""


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """Set the number of PyTorch's threads, None: leave it; restored on leaving."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_threads(asked: int | None, recorded: int | None, model: nn.Module, recipe: Recipe | None = None) -> Threads:
    """How many threads to run a model with, on its device.

    asked: by the user; else OMP_NUM_THREADS decides where it is set; else `recorded`, the number of the work that goes
    on, though no more than there are cores; else steps of the model are timed. On a GPU nothing is timed.
    recipe: how it is trained; None: it only answers. Raises ConfigError for fewer than one.
    """
    check_whole(1, threads=asked)
    device, cores = next(model.parameters()).device, usable_cores()
    if device.type != "cpu":
        return Threads(asked or recorded)
    explicit = asked or (torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS", "").strip() else None)
    if explicit is not None:
        other = recorded not in (None, explicit)
        return Threads(explicit, f"{_words(explicit)} as asked for, {recorded} until now{_DIGITS}" if other else "")
    if recorded is not None and recorded > cores:
        return Threads(cores, f"{_words(cores)}, as many as there are cores; {recorded} until now{_DIGITS}")
    if recorded is not None:
        return Threads(recorded)
    if cores == 1:
        return Threads(1)
    number = fastest(step_of(model, recipe), cores)
    return Threads(
        number, f"{_words(number)}: the fastest here by timed steps; --threads or OMP_NUM_THREADS overrules it"
    )


_DIGITS = ": the last digits of results may differ"


def _words(threads: int) -> str:
    return f"computing with {threads} thread{'s' if threads > 1 else ''}"


def fastest(step: Callable[[int], object], cores: int) -> int:
    """The number of threads, a power of 2 or all cores, with which a step is fastest; the smallest of about equals.

    step: runs one of so many images. More threads are tried as long as they are worth it; steps are timed in turn, so
    that other programs slow down all numbers alike.
    """
    few = 2

    def seconds(threads: int, images: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        step(images)
        return time.perf_counter() - start

    with computing_with(1):
        seconds(1, few)  # sets things up
        images = max(few, min(MOST_IMAGES, int(few * SECONDS / max(seconds(1, few), 1e-9))))
        best = 1
        while best < cores:
            more = min(2 * best, cores)
            seconds(more, images)
            taken = [(seconds(best, images), seconds(more, images)) for _ in range(ROUNDS)]
            if sum(new for _, new in taken) > WORTH * sum(old for old, _ in taken):
                break
            best = more
    return best


def step_of(model: Any, recipe: Recipe | None) -> Callable[[int], None]:
    """A step of training on random images, or without a recipe a forward; no weight changes.

    Of a supernet one of four architectures, the largest among them.
    """
    shape = (model.in_chans, *model.patch_embed.img_size)
    pool = torch.randn(MOST_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    arguments: tuple[Any, ...] = ()
    if isinstance(model, SuperNet):
        rng = random.Random(0)
        arguments = ([model.space[0], *(model.space.sample(rng) for _ in range(3))],)
    device = pool.device

    def step(images: int) -> None:
        with evaluating(model):
            if recipe is None:
                with torch.inference_mode():
                    model(pool[:images], *arguments)
                return
            with attention_of(recipe, model, device):
                with precision_of(recipe, device):
                    loss = model(pool[:images], *arguments).float().square().mean()
                loss.backward()
            model.zero_grad(set_to_none=True)

    return step
