"""Do fewer MACs mean less time? Exported models beside the dense one, at batch 1, 16, 64 and more.

    python results/throughput/reproduce.py                                     # some 20 minutes on one core
    python results/throughput/reproduce.py --as-it-comes --sizes 224 --batches 64 --name cpu-glibc    # some 10
    python results/throughput/reproduce.py --device cuda --sizes 224 --batches 1,64,512 --rounds 9 --name gpu    # some 3

ViT-Tiny at 224 pixels (196 tokens) and at 112 (49). Models that share do so by queries and keys ("qk", all in the
fused kernel) and by written maps ("map"), side by side. Each runs in float32 and bfloat16 (weights and images; the
latter where the CPU has units for it), and on a GPU also replayed as a CUDA graph; `kind` is what was fastest for it.
All models of a size take turns in one process, in another order each time; the figures are ratios of medians. Weights
are random: they do not change the time. On a CPU glibc keeps memory, as it does in poolshare's verbs and as tcmalloc and jemalloc
do (`keep_memory`); with --as-it-comes it gives memory back between operations; `page_faults` counts what is fetched anew in
a forward. Writes <name>.csv.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import timm
import torch
from rich.console import Console

from poolshare.search.job.records import write_csv
from poolshare.search.progress import progress_bar
from poolshare.space.processes import keep_memory
from poolshare.supernet import Subnet, count_macs
from poolshare.supernet.block import Sharing
from poolshare.supernet.measure import wait_for

HERE = Path(__file__).parent
MODEL = "vit_tiny_patch16_224"
SHARINGS: tuple[Sharing, ...] = ("qk", "map")
# The last two of 112 pixels are what results/eurosat searched.
MODELS = {
    224: {
        "pooling, 57 %": "196*1 196 196 196 100@max2d 100 100 100 49@max2d 49 49 49",
        "ToMe, 59 %": " ".join(["196", *(f"{196 - 13 * layer}@tome" for layer in range(1, 12))]),
        "sharing, runs of 2": "196*2 196*2 196*2 196*2 196*2 196*2",
        "sharing, runs of 3": "196*3 196*3 196*3 196*3",
        "pooling and sharing": "196*2 196 100@max2d*3 49@max2d*2 49*3 49",
    },
    112: {
        "pooling, 56 %": "49*1 49 49 49 25@max2d 25 25 25 9@max2d 9 9 9",
        "ToMe, 56 %": " ".join(["49", *(f"{49 - 4 * layer}@tome" for layer in range(1, 12))]),
        "sharing, runs of 3": "49*3 49*3 49*3 49*3",
        "pooling and sharing": "49*2 49 25@max2d*3 16@max2d*2 16*3 16",
    },
}


@torch.inference_mode()
def measured(run: Callable[[], object], device: str) -> tuple[float, int]:
    """Milliseconds of one forward, on one CPU thread by its own clock, which other programs do not disturb; page faults."""
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, clock()
    run()
    wait_for(torch.device(device))
    return (clock() - start) * 1e3, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


@torch.inference_mode()
def forward_of(model: torch.nn.Module, images: torch.Tensor, kind: str) -> Callable[[], object]:
    """One forward of a copy of the model, as the kind says."""
    number = torch.float32 if kind == "float32" else torch.bfloat16
    ready, inputs = copy.deepcopy(model).to(images.device, number).eval(), images.to(number)
    if not kind.endswith("graph"):
        return lambda: ready(inputs)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):  # what is set up at the first calls must not be captured
        for _ in range(3):
            ready(inputs)
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ready(inputs)
    graph.kept = ready, inputs  # type: ignore[attr-defined]
    return graph.replay


def has_bfloat16(device: str) -> bool:
    """Whether there are units for it: emulated, it says nothing."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def main() -> None:
    """Time everything in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", default="224,112")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--name", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--as-it-comes", action="store_true", help="glibc gives memory back between operations")
    given = parser.parse_args()
    if not given.as_it_comes:
        keep_memory()
    torch.set_num_threads(given.threads)
    console, rng, rows = Console(stderr=True), random.Random(0), []
    for size in map(int, given.sizes.split(",")):
        models = {"dense": timm.create_model(MODEL, img_size=size, num_classes=10)}
        for name, text in MODELS[size].items():
            for sharing in SHARINGS if "sharing" in name else ("qk",):
                model = Subnet.from_base(MODEL, text, sharing, img_size=size, num_classes=10)
                models[f"{name} ({sharing})" if "sharing" in name else name] = model
        macs = {name: count_macs(model.eval(), (torch.zeros(1, 3, size, size),)) for name, model in models.items()}
        for batch in map(int, given.batches.split(",")):
            images = torch.randn(batch, 3, size, size, device=given.device)
            times: dict[tuple[str, str], list[float]] = {}
            faults: dict[tuple[str, str], list[int]] = {}
            kinds = (
                ["float32"] + ["bfloat16"] * has_bfloat16(given.device) + ["bfloat16 graph"] * (given.device != "cpu")
            )
            ready = {(name, kind): forward_of(model, images, kind) for name, model in models.items() for kind in kinds}
            rounds = given.rounds * (10 if batch == 1 else 1)
            with progress_bar(console, f"{size} pixels, batch {batch}", rounds, "rounds") as advance:
                for turn in range(rounds + 1):
                    # in another order each time: a model may find the memory as the one before it left it
                    for (name, kind), run in rng.sample([*ready.items()], len(ready)):
                        spent, fetched = measured(run, given.device)
                        if turn:
                            times.setdefault((name, kind), []).append(spent)
                            faults.setdefault((name, kind), []).append(fetched)
                    advance(turn)
            medians = {key: statistics.median(values) for key, values in times.items()}
            fastest = {name: min((medians[name, kind], kind) for kind in kinds) for name in models}
            for name in models:
                saved, sped = macs["dense"] / macs[name], fastest["dense"][0] / fastest[name][0]
                row = {"pixels": size, "batch": batch, "model": name, "macs_ratio": saved, "speed_up": sped}
                row |= {"speed_up_over_macs_ratio": sped / saved, "kind": fastest[name][1]}
                row |= {
                    f"speed_up_{kind.replace(' ', '_')}": medians["dense", kind] / medians[name, kind] for kind in kinds
                }
                row |= {"milliseconds": fastest[name][0]}
                row |= {"page_faults": round(statistics.median(faults[name, fastest[name][1]]))}
                rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
            write_csv(given.out / f"{given.name}.csv", pd.DataFrame(rows))
            gc.collect()
    console.print(pd.DataFrame(rows).to_string())


if __name__ == "__main__":
    main()
