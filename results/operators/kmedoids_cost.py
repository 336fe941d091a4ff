"""Weighted K-Medoids from 196 to 49 tokens, beside one transformer block of ViT-Tiny at 197 tokens.

python results/operators/kmedoids_cost.py        # seconds; prints the ratios of interleaved medians
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import Block

from poolshare.supernet.operators.clustering import kmedoids


def ratio(batch: int, repeats: int = 15) -> float:
    """Median seconds of the operator over median seconds of the block, taken in turn."""
    block = Block(192, 3, qkv_bias=True).eval()
    tokens, weights = torch.randn(batch, 197, 192), torch.rand(batch, 196)
    runs: dict[str, Callable[[], Any]] = {
        "operator": lambda: kmedoids(tokens[:, 1:], 49, weights),
        "block": lambda: block(tokens),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if repeat >= 2:
                    times[name].append(time.perf_counter() - start)
    return statistics.median(times["operator"]) / statistics.median(times["block"])


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 64):
            print(f"{threads} thread(s), batch {batch}: operator / block = {ratio(batch):.2f}")
