"""What a search says before it begins: how large, how cheap, how long."""

from __future__ import annotations

import statistics
import time
from functools import partial

from rich.console import Console

from poolshare.space import forecast, forecast_space
from poolshare.supernet import distributed
from poolshare.supernet.measure import wait_for
from poolshare.supernet.sandwich import Sandwich
from poolshare.supernet.train import precision_of, steps_per_epoch

from .evaluate import count_correct
from .prepare import Job
from .progress import time_text


def announce(job: Job, trained: float, console: Console) -> None:
    """Say what will be done and about how long it takes, from a few timed steps. trained: epochs that are done."""
    say = partial(console.print, markup=False, soft_wrap=True)
    space, macs, recipe = job.supernet.space, job.macs, job.recipe
    cheapest, dense = macs.total(space.cheapest(macs)), macs.total(job.dense)
    say(f"{job.config.title}: {space.size:,} architectures")
    say(f"they cost {macs.format(cheapest)} to {macs.format(dense)} per image")
    if job.latency:
        table, errors = job.latency.table, job.latency.errors
        fast, slow = table.total(space.cheapest(table)), table.total(space.dearest(table))
        say(f"they take {table.format(fast)} to {table.format(slow)} per image, {job.latency.conditions}")
        if errors:
            median, worst = statistics.median(errors), errors[-1]
            say(f"sums of layers differ from {len(errors)} whole models by {median:.1%} (median), {worst:.1%} (worst)")
    if job.config.budget:
        allowed = f"{job.allowed.size_text} of them cost at most {job.objective.format(job.allowed.high)} ({job.config.budget})"
        say(allowed)
    step, per_mac = calibrate(job)
    epochs = recipe.epochs - trained
    if epochs > 0:
        training = step * epochs * steps_per_epoch(job.data, recipe) / distributed.launched_size()
        say(f"training the supernet for {epochs:.4g} epochs takes about {time_text(training)}")
    else:
        say(f"the supernet has been trained for its {recipe.epochs} epochs")
    whole, images = forecast_space(space, macs), len(job.data.split("search"))
    single = whole.one_by_one / whole.architectures
    if job.exhaustive:
        say(
            f"scoring all of them on {images:,} images costs {whole.cost / single:,.0f} single evaluations "
            f"({whole.share:.1%} of one by one) and takes about {time_text(per_mac * whole.cost * images)}"
        )
    else:
        say(
            f"scoring {job.config.trials:,} of them on {images:,} images takes at most about "
            f"{time_text(per_mac * single * images * job.config.trials)}, less by what they share"
        )


def calibrate(job: Job) -> tuple[float, float]:
    """Seconds of one training step, and of one MAC in scoring, from a few small trial runs; changes no weight."""
    sandwich = Sandwich(job.supernet.space, job.macs, job.config.seed, within=job.recipe.within)
    device = next(job.supernet.parameters()).device
    images, labels = next(iter(job.data.train_loader(0, job.recipe.batch_size)))
    whole = len(images)
    if device.type == "cpu":  # a GPU takes a whole batch in little more time than a part of it
        images, labels = images[:32], labels[:32]
    images, labels = images.to(device), labels.to(device)
    times = []
    for step in range(4):
        start = time.perf_counter()
        with precision_of(job.recipe, device):
            loss = sandwich.loss(job.supernet.train(), images, labels, step)
        loss.backward()
        wait_for(device)
        times.append(time.perf_counter() - start)
    job.supernet.zero_grad(set_to_none=True)
    population = [architecture for step in range(8) for architecture in sandwich.at(step)]
    count_correct(job.supernet, population[:1], [(images, labels)], metric=job.metric)  # the first one sets things up
    start = time.perf_counter()
    count_correct(job.supernet, population, [(images, labels)], metric=job.metric)
    per_mac = (time.perf_counter() - start) / (forecast(population, job.macs).cost * len(images))
    return sum(times[1:]) / len(times[1:]) * whole / len(images), per_mac
