"""Do supernet scores by loss rank better than by right answers? The same supernets, both scores.

    python results/trust/losses.py digits plain drawn-anywhere --seeds 0 1 2
    python results/trust/losses.py fashion plain drawn --seeds 0 1 --data-dir DATA
    python results/trust/losses.py digits table

Trains supernets by levers of reproduce.py, scores the architectures of <setting>-alone.csv by `--score loss` (cross-entropy)
and `--score divergence`, which count right answers too, and keeps these in <setting>-losses.csv. The table has Kendall's tau
with training alone: by each score, and by a loss less by right answers with a bootstrap over architectures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from reproduce import HERE, LEVERS, SETTINGS, gain, open_job, text, train

from poolshare.search.analysis.ranking import summarise
from poolshare.search.job.records import write_csv
from poolshare.search.scoring import score_counts
from poolshare.space import Architecture

SCORES = ("top-1", "loss", "divergence")


def rows_of(setting: str, lever: str, seed: int, options: argparse.Namespace) -> list[dict]:
    """What one supernet makes of the architectures; losses in micronats, summed."""
    job = open_job(setting, options.data_dir)
    options.work.mkdir(parents=True, exist_ok=True)
    state = options.work / f"{setting}-{lever}-{seed}.safetensors"
    supernet = train(job, LEVERS[lever], seed, state)
    names = list(pd.read_csv(HERE / f"{setting}-alone.csv")["architecture"].unique())
    batches = job.data.eval_loader("search", 256)
    by = {score: score_counts(supernet, [*map(Architecture.parse, names)], batches, score) for score in SCORES[1:]}
    return [
        {"lever": lever, "seed": seed, "architecture": name, "correct": by["loss"][place].sums[0]}
        | {score: counts[place].loss for score, counts in by.items()}
        for place, name in enumerate(names)
    ]


def table(setting: str) -> None:
    """A line of the README's table for each supernet."""
    truths, scores = (pd.read_csv(HERE / f"{setting}-{name}.csv") for name in ("alone", "losses"))
    wide = truths.pivot(index=["architecture", "band", "macs"], columns="repeat", values="correct").reset_index()
    for (lever, seed), group in scores.groupby(["lever", "seed"], sort=False):
        found = group.set_index("architecture")
        worth = {"top-1": found["correct"], "loss": -found["loss"], "divergence": -found["divergence"]}
        cells = [f"`{lever}`", str(seed)]
        for score, values in worth.items():
            scored = truths.rename(columns={"correct": "score"})
            result = summarise(scored.assign(supernet_score=truths["architecture"].map(values)))
            cells += [text(result["tau"]), text(result["within"]["tau"])]
            if score != "top-1":
                both = (wide["architecture"].map(one).to_numpy(float) for one in (worth["top-1"], values))
                cells.append(text(gain(wide, *both)))
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("what", nargs="+", choices=("table", *LEVERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data-dir", type=Path, help="where FashionMNIST/raw lies")
    parser.add_argument("--work", type=Path, default=Path("runs/trust"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = HERE / f"{options.setting}-losses.csv"
    for what in options.what:
        if what == "table":
            table(options.setting)
            continue
        for seed in options.seeds:
            rows = pd.read_csv(kept).to_dict("records") if kept.exists() else []
            if (what, seed) not in {(row["lever"], row["seed"]) for row in rows}:
                write_csv(kept, pd.DataFrame(rows + rows_of(options.setting, what, seed, options)))
                print(what, seed, flush=True)


if __name__ == "__main__":
    main()
