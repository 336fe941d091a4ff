"""Made-up runs and exports that tests share; not for results."""

from itertools import islice

import numpy as np
import pandas as pd

from poolshare.search.report.report import Report
from poolshare.space import SearchSpace

SPACE = SearchSpace(depth=8, levels=(64, 16, 4), operators=("max2d", "kmedoids"), max_run=3)
# Of an exported model; what else is known of it says the test.
FACTS = {"data": "photos", "data_dir": None, "data_fingerprint": "x", "seed": 0, "batch_size": 64, "pretrained": False}
FACTS |= {"task": "classification", "targets": "class", "metric": "top-1"}
FACTS |= {"macs": 1, "dense_macs": 2, "parameters": 3, "weights": "a test"}
# Of the summary of a run that classifies into two classes.
TASK = {"name": "classification", "metric": "top-1", "column": "top1", "targets": "class", "unit": "nats"}
TASK |= {"loss": "cross-entropy with the labels", "divergence": "divergence from the dense network's answers"}
WORDS = {"task": TASK, "score": "metric", "outputs": 2}
ATTACK = "</script><script>alert(1)</script>"


def candidates(count: int = 12) -> pd.DataFrame:
    """Accuracies and costs rise together, so every row is on the frontier."""
    correct = np.linspace(450, 539, count).astype(int)
    return pd.DataFrame(
        {
            "architecture": [str(architecture) for architecture in islice(SPACE, 1, count + 1)],
            "top1": 100 * correct / 540 + np.arange(count) * 1e-6,
            "correct": correct,
            "total": 540,
            "macs": np.linspace(10e6, 40e6, count).astype(int),
            "parameters": 397_834,
            "generation": 0,
        }
    )


def make_report(rows: pd.DataFrame | None = None, **changes) -> Report:
    """A report of these rows, without a budget, beside a dense network of 40 M MACs."""
    fields = {
        "title": "digits",
        "candidates": candidates() if rows is None else rows,
        "dense": {"architecture": str(SPACE[0]), "macs": 40_000_000, "top1": 99.0, "parameters": 400_000},
        "certified": True,
        "space_size": SPACE.size,
        "space": SPACE,
        "run": "runs/digits",
        "facts": {"Configuration": {"seed": "0"}},
    }
    return Report(**(fields | changes))
