"""Whether a head that was trained before answers in the order of the data's classes: looked at before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console

from poolshare.supernet.tasks.classification import CLASSIFICATION, baseline

from ..analysis.pareto import binomial_interval
from ..progress import progress_bar
from ..scoring import answers
from .prepare import Job

IMAGES_PER_CLASS = 5  # fewer do not show which class is taken for which
GAIN = 0.2  # share of the images that another order of the classes must make right to be believed


def checked_head(job: Job, console: Console) -> Job:
    """The job, with what the dense network with its trained head answers on search-validation images among its notes.

    Of tasks with a class per image; others have no most probable class to compare.
    """
    if job.task.targets != "class":
        return job
    batches = job.search_batches
    with progress_bar(console, "trying the trained head", len(batches), "batches") as advance:
        found = answers(job.supernet, batches, CLASSIFICATION, advance)
    labels, predicted = found.targets.numpy(), found.outputs.argmax(dim=-1).numpy()
    return replace(job, notes=(*job.notes, *head_notes(labels, predicted, job.data.classes)))


def head_notes(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> tuple[str, ...]:
    """What a trained head's answers say about the order of its classes; a warning where it seems to be another.

    labels, predicted: class indices (n,), of images and of answers.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, as the next one
    from sklearn.metrics import confusion_matrix

    right, images = int((labels == predicted).sum()), len(labels)
    least = baseline(labels)
    notes = [
        f"as it comes, the dense network is right on {100 * right / images:.2f} % of the {images:,} search-validation images; "
        f"the most frequent class alone makes {least:.2f} %"
    ]
    remedy = "give the order of its classes as --class-map FILE, one folder's name a line"
    if binomial_interval(right, images)[0] <= max(least, 100 / len(classes)):
        notes.append(
            f"warning: the trained head's predictions are near chance: if it was trained on these classes, {remedy}"
        )
    present = np.unique(labels)
    if images >= IMAGES_PER_CLASS * len(present):
        seen = np.unique(np.concatenate([labels, predicted]))
        table = confusion_matrix(labels, predicted, labels=seen)
        rows, columns = linear_sum_assignment(table, maximize=True)
        best = int(table[rows, columns].sum())
        if best - right > GAIN * images:
            pairs = sorted(zip(rows, columns, strict=True), key=lambda pair: -table[pair])
            pairs = [(row, column) for row, column in pairs if row != column and table[row, column]][:3]
            swapped = ", ".join(f"{classes[seen[row]]!r} as {classes[seen[column]]!r}" for row, column in pairs)
            notes.append(
                f"warning: the head seems to have its classes in another order: it predicts {swapped}; in the best order "
                f"{100 * best / images:.2f} % would be right: {remedy}"
            )
    return tuple(notes)
