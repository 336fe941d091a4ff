"""A search under a latency budget, its export, and whether the exported model keeps the budget: digits, from the shell.

    python results/latency/budget.py WORK [--epochs 3] [--budget 50%] [--batch 64]

Writes budget.json beside this file. The exported model and the exported dense one are timed in turn, 60 times each; the
median of the ratios of neighbours counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch

import poolshare.supernet  # registers the exported models


def poolshare(*arguments: str) -> str:
    """One verb from the command line; its standard output."""
    command = [sys.executable, "-m", "poolshare.search.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run, exports = options.work / "run", {name: options.work / name for name in ("found", "dense")}
    wish = ["--objective", "latency", "--latency-batch", str(options.batch), "--budget", options.budget]
    poolshare("search", "--data", "digits", "--epochs", options.epochs, "--sampler", "evolution", "--trials", "200",
              *wish, "--out", str(run))  # fmt: skip
    found = json.loads(
        poolshare("export", str(run), "--budget", options.budget, "--out", str(exports["found"]), "--json")
    )
    poolshare("export", str(run), "--architecture", "dense", "--out", str(exports["dense"]))
    models = {name: timm.create_model(f"local-dir:{path}", pretrained=True).eval() for name, path in exports.items()}
    images = torch.rand(options.batch, *models["dense"].pretrained_cfg["input_size"])
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(62):
            for name, model in models.items():
                model(images)
                start = time.thread_time()
                model(images)
                times[name].append(1e3 * (time.thread_time() - start) / options.batch)
    times = {name: values[2:] for name, values in times.items()}
    summary = json.loads((run / "summary.json").read_text())
    table = json.loads((run / "latency.json").read_text())
    ratio = statistics.median(a / b for a, b in zip(times["found"], times["dense"], strict=True))
    result = {
        "budget": options.budget,
        "batch_size": options.batch,
        "architecture": found["architecture"],
        "budget_latency_ms": summary["budget_latency_ms"],
        "dense_latency_ms_by_table": summary["dense"]["latency_ms"],
        "found_latency_ms": round(statistics.median(times["found"]), 4),
        "dense_latency_ms": round(statistics.median(times["dense"]), 4),
        "found_over_dense": round(ratio, 4),
        "table_median_error": table["median_error"],
        "table_worst_error": table["worst_error"],
        "device": f"{table['device']}, {os.cpu_count()} cores, {table['threads']} thread, no GPU",
        "versions": summary["versions"],
    }
    Path(__file__).with_name("budget.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
