"""What makes supernet scores rank better? Levers tried against the truths that reproduce.py has trained already.

    python results/trust/levers.py labels        # or half, distilled: one supernet of digits, seed 0, scored
    python results/trust/levers.py calibrated    # the scores there are, corrected by MACs; no training

The architectures trained alone do not depend on the supernet, so a lever costs one supernet. Adds its scores and τ to
results/trust/levers.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from reproduce import SETTINGS

from poolshare.search.evaluate import count_correct
from poolshare.search.prepare import prepare
from poolshare.search.run import SearchConfig, write_json
from poolshare.search.trust import summarise
from poolshare.space import Architecture
from poolshare.supernet.sandwich import Sandwich
from poolshare.supernet.train import fit

HERE = Path(__file__).parent
LABELS = {"distilled": 0.0, "half": 0.5, "labels": 1.0}  # the labels' share of the students' loss


def main(lever: str) -> None:
    """Score the architectures whose accuracy alone is known, and compare."""
    torch.set_num_threads(1)
    rows = pd.read_csv(HERE / "digits-0.csv")
    names = list(dict.fromkeys(rows["architecture"]))
    scores = calibrated(rows) if lever == "calibrated" else trained(LABELS[lever], names)
    rows["supernet_correct"] = rows["architecture"].map(scores)
    result = summarise(rows)
    kept = {name: result[name] for name in ("tau", "ceiling", "share_of_ceiling", "within")}
    path = HERE / "levers.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    earlier.pop("checksum", None)  # of the file before
    write_json(path, earlier | {lever: kept | {"scores": scores}})


def trained(share: float, names: list[str]) -> dict[str, float]:
    """Scores by a supernet whose students take `share` of their loss from labels, the rest from the dense network."""
    job = prepare(SearchConfig(**SETTINGS["digits"], seed=0, device="cpu"))
    sandwich = Sandwich(job.supernet.space, job.macs, 0)

    def loss(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        teacher, *students = model(images, sandwich.at(step)).unbind(0)  # each (B, classes)
        targets = teacher.detach().softmax(dim=-1)
        parts = [share * F.cross_entropy(one, labels) + (1 - share) * F.cross_entropy(one, targets) for one in students]
        return F.cross_entropy(teacher, labels) + torch.stack(parts).mean()

    fit(job.supernet, loss, job.data, job.recipe, seed=0)
    architectures = [Architecture.parse(name) for name in names]
    scores, _ = count_correct(job.supernet, architectures, job.data.eval_loader("search", 256))
    return dict(zip(names, map(float, scores), strict=True))


def calibrated(rows: pd.DataFrame) -> dict[str, float]:
    """For each architecture, accuracy alone as a line in score and MACs says it, fitted to the 19 others."""
    first = rows[rows["repeat"] == 0].reset_index(drop=True)
    columns = first[["supernet_correct", "macs"]].to_numpy(float)
    design = np.column_stack([np.ones(len(first)), (columns - columns.mean(0)) / columns.std(0)])
    alone, found = first["correct"].to_numpy(float), {}
    for index, name in enumerate(first["architecture"]):
        others = np.arange(len(first)) != index
        found[name] = float(design[index] @ np.linalg.lstsq(design[others], alone[others], rcond=None)[0])
    return found


if __name__ == "__main__":
    main(sys.argv[1])
