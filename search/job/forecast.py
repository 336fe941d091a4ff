"""What a search says before it begins: how large, how cheap, how long."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console

from poolshare.space import Band, TrainingError, forecast, forecast_space
from poolshare.space.quantities import human
from poolshare.supernet.measure import wait_for
from poolshare.supernet.training import distributed
from poolshare.supernet.training.loop import attention_of, precision_of, steps_per_epoch
from poolshare.supernet.training.sandwich import GUIDED, LEAST, Sandwich

from ..config import IMAGES, SearchConfig, retraining_epochs
from ..console import say
from ..progress import time_text
from ..scoring import score_counts
from ..untrained.search import expected_cost
from .memory import Memory, check_memory, measure_memory
from .prepare import Job


def announce(job: Job, pace: Pace, trained: float, console: Console, tuned: bool) -> None:
    """Say what is to be known, what will be done and about how long it takes. trained: epochs that are done. tuned: so is the
    dense model."""
    tell = partial(say, console)
    for note in job.notes:
        tell(note)
    _announce_space(job, tell)
    recipe, dense = job.recipe, job.macs.total(job.dense)
    step, per_mac, memory = pace
    train, search = (len(job.data.split(name)) for name in ("train", "search"))
    if job.config.tune_epochs and not tuned:
        tuning = 3 * dense * per_mac * train * job.config.tune_epochs  # a step takes about three forwards
        tell(f"tuning the dense model for {job.config.tune_epochs} epochs takes about {time_text(tuning)}")
    epochs = recipe.epochs - trained
    if epochs > 0:
        training = step * epochs * steps_per_epoch(job.data, recipe)
        tell(f"training the supernet for {epochs:.4g} epochs takes about {time_text(training)}")
    elif recipe.epochs:
        tell(f"the supernet has been trained for its {recipe.epochs} epochs")
    if memory:
        weights = sum(parameter.nbytes for parameter in job.supernet.parameters())
        # of each training its weights, and two states of three times that
        kept = weights * (14 if job.config.tune_epochs else 7)
        tell(f"{memory.text}; the run folder takes about {human(kept)}B")
    _announce_scoring(job, per_mac, tell)
    if job.config.guided:
        path = path_epochs(job.config, job.allowed, train, search)
        epochs = retraining_epochs(job.config, train + search)
        seconds = 3 * dense * per_mac * train * path["retraining"]
        guided = " with the dense model as teacher" if job.config.teaches else ""
        tell(
            f"then `poolshare retrain`, for {epochs} epochs{guided}, takes about "
            f"{time_text(seconds)}; the whole path costs about {sum(path.values()):.0f} epochs of the dense model's tuning"
        )


def path_epochs(config: SearchConfig, allowed: Band, train: int, search: int) -> dict[str, float]:
    """What each phase of a pretrained model's path costs at most, teacher included, in epochs of the dense tuning, by its costs.

    train, search: how many images. What loading images takes is not in it.
    """
    dense = allowed.costs.total(allowed.space[0])
    share, least = min(1.0, allowed.high / dense), allowed.costs.total(allowed.space.cheapest(allowed.costs)) / dense
    epoch = 3 * train  # in forwards of the dense model; with its backward a step takes three
    path = {"tuning": float(config.tune_epochs)}
    if config.races:
        path["scoring"] = expected_cost(allowed, min(search, IMAGES)) / dense / epoch
    else:
        drawn = (max(least, min(LEAST, share / 2)) + share) / 2  # on average, see `Sandwich`
        path["training"] = config.epochs * (GUIDED * drawn + 1 / 3)
        path["scoring"] = config.trials * share * search / epoch
    epochs = retraining_epochs(config, train + search)
    return path | {"retraining": epochs * (train + search) / train * (share + config.teaches / 3)}


def _announce_space(job: Job, tell: Callable[[str], None]) -> None:
    space, macs = job.supernet.space, job.macs
    cheapest, dense = macs.total(space.cheapest(macs)), macs.total(job.dense)
    tell(f"{job.config.title}: {space.size:,} architectures")
    tell(f"they cost {macs.format(cheapest)} to {macs.format(dense)} per image")
    if job.latency:
        table, errors = job.latency.table, job.latency.errors
        fast, slow = table.total(space.cheapest(table)), table.total(space.most_expensive(table))
        tell(f"they take {table.format(fast)} to {table.format(slow)} per image, {job.latency.conditions}")
        if errors:
            median, worst = statistics.median(errors), errors[-1]
            tell(f"sums of layers differ from {len(errors)} whole models by {median:.1%} (median), {worst:.1%} (worst)")
    if job.config.budget:
        tell(
            f"{job.allowed.size_text} of them cost at most {job.objective.format(job.allowed.high)} ({job.config.budget})"
        )


def _announce_scoring(job: Job, per_mac: float, tell: Callable[[str], None]) -> None:
    space, macs, images = job.supernet.space, job.macs, len(job.data.split("search"))
    if job.config.races:
        seen = expected_cost(job.allowed, min(images, IMAGES)) / job.objective.total(job.dense)
        seconds = per_mac * seen * macs.total(job.dense)
        return tell(
            f"searching it as it is takes about as long as it takes on {seen:,.0f} images, {time_text(seconds)}"
        )
    whole = forecast_space(space, macs)
    single = whole.one_by_one / whole.architectures
    if job.exhaustive:
        return tell(
            f"scoring all of them on {images:,} images costs {whole.cost / single:,.0f} single evaluations "
            f"({whole.share:.1%} of one by one) and takes about {time_text(per_mac * whole.cost * images)}"
        )
    seconds = per_mac * single * images * job.config.trials
    tell(
        f"scoring {job.config.trials:,} of them on {images:,} images takes at most about {time_text(seconds)}, less by what "
        "they share"
    )


class Pace(NamedTuple):
    """What a forecast is computed from."""

    step: float  # seconds of one training step, of all processes together
    per_mac: float  # seconds of one MAC in scoring
    memory: Memory | None  # of a training step; None: there is none to be done


def calibrate(job: Job, training: bool = True) -> Pace:
    """The pace of this machine, from a few small trial runs that hold no more images at once than training does.

    training: whether any is to be done. Changes no weight. Raises TrainingError where a step of it does not fit into the
    GPU's memory.
    """
    sandwich = sandwich_of(job)
    device = job.device
    images, targets = next(
        iter(job.data.train_loader(0, job.recipe.batch_size, world_size=distributed.launched_size()))
    )
    share = len(images)  # of this process
    images, targets = (part.chunk(job.recipe.accumulate)[0] for part in (images, targets))
    if device.type == "cpu":  # a GPU takes a whole batch in little more time than a part of it
        images, targets = images[:32], targets[:32]
    images, targets = images.to(device), targets.to(device)
    if job.task.targets == "dense":
        with torch.no_grad():
            targets = job.supernet.eval()(images)
    times, memory = [], None
    try:
        if training:
            memory = measure_memory(job, sandwich)
            check_memory(job, memory)
        for step in range(4 if training else 0):
            start = time.perf_counter()
            with attention_of(job.recipe, job.supernet, device), precision_of(job.recipe, device):
                teacher = job.supernet if sandwich.guided else None  # without architectures: the dense model
                loss = sandwich.loss(job.supernet.train(), images, targets, step, teacher=teacher, task=job.task)
                loss.backward()
            wait_for(device)
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        more = 2 * job.recipe.accumulate
        raise TrainingError(
            f"a training step of {len(images)} images at once does not fit into the memory of {device}; run it in parts by "
            f"--recipe accumulate={more}, or give a smaller --batch-size"
        ) from None
    finally:
        job.supernet.zero_grad(set_to_none=True)
    population = [architecture for step in range(8) for architecture in sandwich.at(step)]
    score_counts(job.supernet, population[:1], [(images, targets)], task=job.task)  # the first one sets things up
    start = time.perf_counter()
    score_counts(job.supernet, population, [(images, targets)], task=job.task)
    per_mac = (time.perf_counter() - start) / (forecast(population, job.macs).cost * len(images))
    return Pace(statistics.mean(times[1:]) * share / len(images) if times else 0.0, per_mac, memory)


def sandwich_of(job: Job) -> Sandwich:
    """What each step of the supernet's training draws from; counting its bands may take seconds."""
    config, within = job.config, job.recipe.within
    return Sandwich(job.supernet.space, job.macs, config.seed, within=within, guided=bool(config.guided))
