"""Does a ViT-L/14 at 518 pixels fit, and does the forecast say so? Trains one step of its supernet; writes large.json.

    python results/scale/large.py --images PHOTOS            # random weights; an hour of one core, 12 GiB

PHOTOS: a folder of class folders. The step is that of a search: a sandwich in bfloat16 (or float32: --amp), with checkpointing, in
parts of one image. What a process holds is its resident size, of which the forecast leaves out the program itself and what a
block's backward pass holds for a moment.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from poolshare.search.config import checked_config
from poolshare.search.job.forecast import sandwich_of
from poolshare.search.job.memory import measure_memory
from poolshare.search.job.prepare import prepare
from poolshare.search.job.records import versions
from poolshare.space import forecast_space
from poolshare.supernet.training.loop import train_supernet


def peak() -> int:
    """Greatest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident size of this process now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Prepare the job as a search does, say what a step will hold, and take it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", default="vit_large_patch14_reg4_dinov2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--amp", choices=("none", "bf16"), default="bf16", help="none where a CPU has no units for bfloat16"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("large.json"))
    given = parser.parse_args()
    program = resident()
    config = checked_config(
        data=str(given.images),
        model=given.model,
        levels=(1369, 676, 324),
        max_run=2,
        batch_size=given.batch,
        epochs=1,
        amp=given.amp,
        recipe={"checkpoint": True, "accumulate": given.batch},
        check_images="never",
        device="cpu",
    )
    start = time.perf_counter()
    job = prepare(config)
    space, macs = job.supernet.space, job.macs
    dense, cheapest = macs.total(job.dense), macs.total(space.cheapest(macs))
    found: dict[str, Any] = {
        "model": job.config.model,
        "pixels": list(job.supernet.patch_embed.img_size),
        "parameters": sum(one.numel() for one in job.supernet.parameters()),
        "architectures": space.size,
        "amp": given.amp,
        "gmacs": [round(cheapest / 1e9, 1), round(dense / 1e9, 1)],
        "whole_space_in_single_evaluations": forecast_space(space, macs).architectures,
        "prepared_in_seconds": round(time.perf_counter() - start, 1),
        "versions": versions() | {"torch": torch.__version__},
    }
    print(found, flush=True)
    sandwich = sandwich_of(job)
    memory = measure_memory(job, sandwich)
    found["forecast"] = {"fixed": memory.fixed, "image": memory.image, "images": memory.images, "text": memory.text}
    found["resident_before_the_step"], found["program"], found["peak_of_the_forecast"] = resident(), program, peak()
    print(found["forecast"], flush=True)

    class Done(Exception):
        pass

    losses: list[float] = []

    def stop(step: int, loss: float | None) -> None:
        losses.append(float(loss or 0))
        raise Done

    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest resident size
    start = time.perf_counter()
    with suppress(Done):
        train_supernet(job.supernet, job.data, macs, job.recipe, progress=stop)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found["step"] = {
        "seconds": round(time.perf_counter() - start, 1),
        "images": given.batch,
        "loss": losses[0],
        "peak": int(status["VmHWM"].split()[0]) * 1024,
        "threads": torch.get_num_threads(),
    }
    print(found["step"], flush=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
