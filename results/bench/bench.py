"""What the engine costs: ratios of interleaved medians, against one-by-one scoring and against timm's own step.

    python results/bench/bench.py            # some 15 minutes on 2 cores; writes results/bench/bench.json

Every pair that is compared runs in turn within one process, A B A B …, so that a machine whose speed drifts
disturbs both alike; the ratio is that of the medians. Quote the ratios: seconds belong to one machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn

from poolshare.search.job.records import versions
from poolshare.space import forecast
from poolshare.space.presets import PRESETS
from poolshare.supernet import Subnet, SuperNet, count_macs, measure_macs
from poolshare.supernet.data import ImageFormat, Place, open_data
from poolshare.supernet.training.loop import steps_per_epoch, train_model, train_supernet
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.sandwich import Sandwich, sandwich_loss

MODEL = "vit_tiny_patch16_224"


def interleaved(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of this thread's processor time of each, after one warm-up, taken in turn.

    Run on one torch thread, as all of this is, they do not count what other work takes.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if repeat:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def scoring(net: SuperNet, costs: Any, count: int, images: torch.Tensor, repeats: int) -> dict[str, Any]:
    """`count` uniform draws in one walk over their prefix tree, against one forward each."""
    population = [net.space.sample(random.Random(f"bench {index}")) for index in range(count)]
    results: dict[str, torch.Tensor] = {}

    def tree() -> None:
        results["tree"] = net(images, population)

    def one_by_one() -> None:
        results["one_by_one"] = torch.stack([net(images, [architecture])[0] for architecture in population])

    with torch.inference_mode():
        seconds = interleaved(repeats, tree=tree, one_by_one=one_by_one)
    counted = 1 / forecast(population, costs).share
    gain = seconds["one_by_one"] / seconds["tree"]
    return {
        "architectures": count,
        "batch": len(images),
        "counted_gain": round(counted, 3),
        "measured_gain": round(gain, 3),
        "measured_over_counted": round(gain / counted, 3),
        "logits_equal_bit_for_bit": torch.equal(results["tree"], results["one_by_one"]),
    }


def training_step(net: SuperNet, costs: Any, batch: int, repeats: int) -> dict[str, Any]:
    """A supernet step on the dense architecture against timm's step, and a sandwich step against its counted MACs."""
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    models = {}
    for name, fused in (("timm_unfused", False), ("timm_fused", True)):
        set_fused_attn(fused)
        models[name] = timm.create_model(MODEL, num_classes=10).train()
    set_fused_attn(True)
    net.train()
    sandwich = Sandwich(net.space, costs, seed=0)
    draws = iter(range(10_000))
    shares: list[float] = []

    def step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return run

    def sandwich_step() -> torch.Tensor:
        architectures = sandwich.at(next(draws))
        shares.append(forecast(architectures, costs).cost / costs.total(net.space[0]))
        return sandwich_loss(net, images, labels, architectures)

    seconds = interleaved(
        repeats,
        supernet=step(net, lambda: F.cross_entropy(net(images, [net.space[0]])[0], labels)),
        timm_unfused=step(models["timm_unfused"], lambda: F.cross_entropy(models["timm_unfused"](images), labels)),
        timm_fused=step(models["timm_fused"], lambda: F.cross_entropy(models["timm_fused"](images), labels)),
        sandwich=step(net, sandwich_step),
    )
    net.eval()
    dense_steps = statistics.median(shares[1:])
    return {
        "batch": batch,
        "supernet_over_timm_unfused": round(seconds["supernet"] / seconds["timm_unfused"], 3),
        "supernet_over_timm_fused": round(seconds["supernet"] / seconds["timm_fused"], 3),
        "sandwich_of_four_in_dense_steps": round(seconds["sandwich"] / seconds["supernet"], 3),
        "sandwich_of_four_counted": round(dense_steps, 3),
        "sandwich_over_counted": round(seconds["sandwich"] / seconds["supernet"] / dense_steps, 3),
    }


def epoch(folder: str, batch: int, repeats: int) -> dict[str, Any]:
    """An epoch of the supernet over real images, read and augmented, against an epoch of timm's model."""
    net = SuperNet.from_timm(MODEL, PRESETS[MODEL], num_classes=10)
    model, costs = timm.create_model(MODEL, num_classes=10), measure_macs(net)
    recipe = Recipe(epochs=1, batch_size=batch)
    data = open_data(Place(folder), ImageFormat(224, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9))
    steps, sandwich = steps_per_epoch(data, recipe), Sandwich(net.space, costs, seed=0)
    counted = sum(forecast(sandwich.at(step), costs).cost for step in range(steps)) / steps / costs.total(net.space[0])
    seconds = interleaved(
        repeats,
        supernet=lambda: train_supernet(net, data, costs, recipe),
        timm=lambda: train_model(model, data, recipe),
    )
    ratio = seconds["supernet"] / seconds["timm"]
    found = {
        "batch": batch,
        "steps": steps,
        "images": len(data.split("train")),
        "counted_dense_epochs": round(counted, 3),
    }
    return found | {"measured_dense_epochs": round(ratio, 3), "measured_over_counted": round(ratio / counted, 3)}


def peak_memory(batch: int) -> dict[str, Any]:
    """Megabytes that training steps need beyond the loaded program, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"batch": batch}
    for what in ("timm", "supernet_dense", "sandwich"):
        with context.Pool(1) as pool:
            found[f"{what}_mb"] = pool.apply(_memory_of, (what, batch))
    return found


def _memory_of(what: str, batch: int) -> int:
    torch.set_num_threads(1)
    net = SuperNet.from_timm(MODEL, PRESETS[MODEL], num_classes=10).eval()
    sandwich = Sandwich(net.space, measure_macs(net), seed=0)
    set_fused_attn(False)
    model = timm.create_model(MODEL, num_classes=10) if what == "timm" else net
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    for step in range(3):
        optimizer.zero_grad()
        architectures = sandwich.at(step) if what == "sandwich" else [net.space[0]]
        loss = (
            F.cross_entropy(model(images), labels)
            if what == "timm"
            else sandwich_loss(net, images, labels, architectures)
        )
        loss.backward()
        optimizer.step()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def arithmetic(net: SuperNet, costs: Any) -> dict[str, Any]:
    """Cost look-ups and band draws per second, and how far look-ups are from fvcore."""
    space = net.space
    population = [space.sample(random.Random(index)) for index in range(2000)]
    for architecture in population:
        costs.total(architecture)
    start = time.perf_counter()
    for _ in range(20):
        for architecture in population:
            costs.total(architecture)
    lookups = 20 * len(population) / (time.perf_counter() - start)

    middle = 600_000_000
    start = time.perf_counter()
    band = space.within(costs, int(middle * 0.996), int(middle * 1.004))
    building = time.perf_counter() - start
    rng = random.Random(0)
    start = time.perf_counter()
    for _ in range(20_000):
        band.sample(rng)
    draws = 20_000 / (time.perf_counter() - start)

    image = torch.zeros(1, 3, 224, 224)
    errors = [abs(count_macs(Subnet.from_supernet(net, a), (image,)) - costs.total(a)) for a in population[:10]]
    return {
        "cost_lookups_per_second": round(lookups),
        "band": f"{band.low:,} to {band.high:,} MACs (0.8 %)",
        "band_size": band.size,
        "band_building_seconds": round(building, 4),
        "band_draws_per_second": round(draws),
        "largest_difference_from_fvcore_macs": max(errors),
    }


def main() -> None:
    """Run all, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("bench.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="one of the steps; the others keep their figures")
    parser.add_argument("--data", help="a folder of images, for the step `epoch`, which is else left out")
    options = parser.parse_args()
    torch.manual_seed(0)
    net = SuperNet.from_timm(MODEL, PRESETS[MODEL], num_classes=10).eval()
    costs = measure_macs(net)
    figures: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.only else {}
    facts = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
    }
    figures |= {} if options.only else {**facts, "model": MODEL, "space_size": net.space.size}
    steps = {
        "arithmetic": lambda: arithmetic(net, costs),
        "scoring_50": lambda: scoring(net, costs, 50, torch.randn(4, 3, 224, 224), options.repeats),
        "scoring_500": lambda: scoring(net, costs, 500, torch.randn(4, 3, 224, 224), max(3, options.repeats // 2)),
        "training_step": lambda: training_step(net, costs, 8, 2 * options.repeats),
        "peak_memory": lambda: peak_memory(32),
    }
    if options.data:
        steps["epoch"] = lambda: epoch(options.data, 32, 3)
    for name, run in steps.items():
        if options.only not in (None, name):
            continue
        figures[name] = run() | (facts if options.only else {})  # run apart from the others: with its own commit
        print(name, json.dumps(figures[name], indent=2), flush=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
