"""Memory and time of a supernet step, by what is shared and what is kept: writes step.json.

    python results/bench/step.py                    # memory, some 10 minutes on one core; --time also times steps
    python results/bench/step.py --device cuda --time

A step is a sandwich of four architectures on ViT-Tiny at 224 pixels, batch 32, optimiser included. Memory is the peak
beyond the loaded program, each setting in a process of its own: resident size on a CPU, allocated memory on a GPU. Time
is that of steps taken in turn in one process; the figures are ratios of medians to the first setting.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from poolshare.search.job.records import versions
from poolshare.space.presets import PRESETS
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.measure import wait_for
from poolshare.supernet.training.loop import attention_of, memory_of, precision_of
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.sandwich import Sandwich

MODEL = "vit_tiny_patch16_224"
Setting = tuple[str, str, bool]  # sharing, precision, checkpointing


def settings_of(precisions: Sequence[str]) -> list[Setting]:
    """What is measured, in these precisions."""
    kinds = (("qk", False), ("qk", True), ("map", False))
    return [(sharing, amp, checkpoint) for amp in precisions for sharing, checkpoint in kinds]


def name_of(sharing: str, amp: str, checkpoint: bool) -> str:
    """A setting in words."""
    return f"{sharing}, {'bfloat16' if amp == 'bf16' else 'float32'}" + (", checkpointing" if checkpoint else "")


def stepper(sharing: Any, amp: Any, checkpoint: bool, batch: int, device: str) -> Callable[[int], None]:
    """A supernet in training and what runs step n of it."""
    torch.manual_seed(0)
    net = SuperNet.from_timm(MODEL, PRESETS[MODEL], sharing=sharing, num_classes=10)
    sandwich = Sandwich(net.space, measure_macs(net), seed=0)
    net.to(device).train()
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    recipe, place = Recipe(amp=amp, checkpoint=checkpoint), torch.device(device)

    def run(step: int) -> None:
        with ExitStack() as stack:
            for context in (memory_of(recipe, net), attention_of(recipe, net, place)):
                stack.enter_context(context)
            optimizer.zero_grad()
            with precision_of(recipe, place):
                loss = sandwich.loss(net, images, labels, step)
            loss.backward()
            optimizer.step()

    return run


def memory(sharing: str, amp: str, checkpoint: bool, batch: int, device: str) -> int:
    """Peak megabytes of three steps."""
    torch.set_num_threads(1)
    run = stepper(sharing, amp, checkpoint, batch, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(3):
        run(step)
    if device != "cpu":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def seconds(settings: Sequence[Setting], batch: int, device: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each setting, all taken in turn."""
    torch.set_num_threads(1)
    runs = {name_of(*setting): stepper(*setting, batch, device) for setting in settings}
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.thread_time if device == "cpu" else time.perf_counter
    for step in range(rounds + 1):
        for name, run in runs.items():
            wait_for(torch.device(device))
            start = clock()
            run(step)
            wait_for(torch.device(device))
            if step:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", nargs="+", default=["none", "bf16"], help="bf16 is slow on a CPU without units for it")
    parser.add_argument(
        "--time", action="store_true", help="time steps too; memory does not mind other work, this does"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("step.json"))
    given = parser.parse_args()
    found: dict[str, Any] = {"batch": given.batch, "device": given.device, "versions": versions(), "peak_mb": {}}
    settings = settings_of(given.amp)
    for setting in settings:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found["peak_mb"][name_of(*setting)] = pool.apply(memory, (*setting, given.batch, given.device))
        print(name_of(*setting), found["peak_mb"][name_of(*setting)], "MB", flush=True)
    if given.time:
        medians = seconds(settings, given.batch, given.device, given.rounds)
        first = next(iter(medians.values()))
        found["step_over_first"] = {name: round(value / first, 3) for name, value in medians.items()}
        found["seconds_of_first"] = round(first, 3)
        print(json.dumps(found["step_over_first"], indent=1))
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
