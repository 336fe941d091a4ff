"""Searches under latency budgets, their exports, and whether the exported models keep the budget; from the shell.

    python results/latency/budget.py WORK digits --batch 64 --budgets 70% 50% 35%     # also: vit, --batch 1

Each budget is searched in the same run folder (trained once), exported, and the export and the exported dense model are
timed in turn in a process of their own, three times; the median of the ratios of neighbours counts. Writes its lines into
budget.csv beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from poolshare.search import SearchResult

HERE = Path(__file__).parent
SEARCH = {
    "digits": ["--data", "digits", "--epochs", "3", "--sampler", "evolution", "--trials", "200"],
    "vit": ["--data", "digits-112", "--model", "vit_tiny_patch16_224", "--img-size", "112", "--levels", "49,25,9",
            "--epochs", "1", "--sampler", "evolution", "--trials", "100", "--search-fraction", "0.5"],
}  # fmt: skip
COLUMNS = ("model", "batch", "budget", "architecture", "table_share", "timed_share", "timed_high", "fresh_shares", "kept",
           "models_timed", "table_median_error")  # fmt: skip


def poolshare(*arguments: str) -> str:
    """One verb from the command line; its standard output."""
    command = [sys.executable, "-m", "poolshare.search.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_digits(folder: Path) -> None:
    """240 of the digits as pictures in class folders: scores do not matter here, times do."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    for index in range(240):
        place = folder / str(labels[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[index].reshape(8, 8) * 15).astype("uint8")).resize((112, 112)).save(
            place / f"{index}.png"
        )


def share(found: Path, dense: Path, batch: int, rounds: int) -> float:
    """The searched model's time over the dense one's, in this process."""
    import timm
    import torch

    import poolshare.supernet  # noqa: F401 - registers the exported models

    torch.set_num_threads(1)
    models = [timm.create_model(f"local-dir:{path}", pretrained=True).eval() for path in (found, dense)]
    images = torch.rand(batch, *models[0].pretrained_cfg["input_size"])
    ratios = []
    with torch.inference_mode():
        for _ in range(rounds + 2):
            spent = []
            for model in models:
                model(images)
                start = time.thread_time()
                model(images)
                spent.append(time.thread_time() - start)
            ratios.append(spent[0] / spent[1])
    return statistics.median(ratios[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("model", choices=SEARCH)
    parser.add_argument("--budgets", nargs="+", default=["50%"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--share", nargs=2, type=Path, help="only time these two exports")
    asked = parser.parse_args()
    if asked.share:
        print(share(*asked.share, asked.batch, asked.rounds))
        return
    options, work = list(SEARCH[asked.model]), asked.work
    if asked.model == "vit":
        options[1] = str(work / "pictures")
        if not (work / "pictures").exists():
            write_digits(work / "pictures")
    rows = []
    for budget in asked.budgets:
        run = work / f"{asked.model}-run"
        wish = ["--objective", "latency", "--latency-batch", str(asked.batch), "--budget", budget, "--seed", "0"]
        poolshare("search", *options, *wish, "--out", str(run), "-q")
        summary, table = (json.loads((run / name).read_text()) for name in ("summary.json", "latency.json"))
        found, dense = (work / f"{asked.model}-{asked.batch}-{name}" for name in (budget.rstrip("%"), "dense"))
        facts = json.loads(poolshare("export", str(run), "--budget", budget, "--out", str(found), "--json"))
        if not dense.exists():
            poolshare("export", str(run), "--architecture", "dense", "--out", str(dense))
        again = [sys.executable, __file__, str(work), asked.model, "--share", str(found), str(dense)]
        again += ["--batch", str(asked.batch), "--rounds", str(asked.rounds)]
        fresh = [float(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout) for _ in range(3)]
        rows.append(line(asked.model, asked.batch, budget, facts, summary, table, run, fresh))
        print(rows[-1], flush=True)
    target = HERE / "budget.csv"
    with open(target, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not target.stat().st_size:
            writer.writeheader()
        writer.writerows(rows)


def line(
    model: str, batch: int, budget: str, facts: Any, summary: Any, table: Any, run: Path, fresh: list[float]
) -> dict[str, Any]:
    """One line of budget.csv."""
    text = facts["architecture"]
    candidates = SearchResult(run).candidates.set_index("architecture")
    summed = float(candidates.loc[text, "latency_ms"])
    timed = summary["timed"]["shares"]
    return {
        "model": model,
        "batch": batch,
        "budget": budget,
        "architecture": text,
        "table_share": round(summed / summary["dense"]["latency_ms"], 4),
        "timed_share": round(timed[text][0], 4),
        "timed_high": round(timed[text][1], 4),
        "fresh_shares": " ".join(f"{one:.4f}" for one in fresh),
        "kept": sum(one <= float(budget.rstrip("%")) / 100 for one in fresh),
        "models_timed": len(timed) - 1,
        "table_median_error": round(table["median_error"], 4),
    }


if __name__ == "__main__":
    main()
