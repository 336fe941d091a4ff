"""How a training went: a row for every few steps, kept beside its state as a table that any spreadsheet reads."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from poolshare.space.files import write_whole

ROWS = 2000  # of a whole training, at most


class Row(NamedTuple):
    """Means over the steps since the row before."""

    step: int  # the last of them, counted from 1
    epoch: float  # epochs done by then
    loss: float
    lr: float
    images_per_second: float  # of all processes together
    gradient_norm: float  # before it is clipped


Watch = Callable[[Row], None]  # told of each row as it is made, and at first of those before a stop


class Curve:
    """Collects rows, and keeps them in `path` up to the step that was saved last. path: None: it only tells `watch`."""

    def __init__(self, path: Path | None, first: int, total: int, steps_per_epoch: int, watch: Watch | None) -> None:
        self.path, self.watch, self.steps_per_epoch = path, watch, steps_per_epoch
        self.every = max(1, math.ceil(total / ROWS))
        self.rows = [row for row in ([] if path is None else read_curve(path)) if row.step <= first]
        if watch:
            for row in self.rows:
                watch(row)
        self._begin()

    def _begin(self) -> None:
        self.losses, self.norms, self.images, self.since = list[float](), list[torch.Tensor](), 0, time.monotonic()

    def add(self, done: int, loss: float, norm: torch.Tensor, lr: float, images: int) -> None:
        """One more step, which is step `done`, over so many images. norm: (), which a GPU may still be computing."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.images += images
        if done % self.every:
            return
        speed = self.images / max(time.monotonic() - self.since, 1e-9)
        loss, norm = sum(self.losses) / len(self.losses), torch.stack(self.norms).mean()
        self.rows.append(Row(done, done / self.steps_per_epoch, loss, lr, speed, norm.item()))
        self._begin()
        if self.watch:
            self.watch(self.rows[-1])

    def save(self) -> None:
        """Write the rows so far."""
        if self.path is not None:
            write_whole(self.path, self._write)

    def _write(self, temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([Row._fields, *([f"{value:.6g}" for value in row] for row in self.rows)])


def read_curve(path: Path) -> list[Row]:
    """The rows in a file, none where there is none, or one that cannot be read: it is a record, not a state."""
    rows: list[Row] = []
    with suppress(OSError, ValueError, TypeError), open(path, encoding="utf-8", newline="") as file:
        _, *lines = csv.reader(file)
        rows = [Row(int(float(line[0])), *map(float, line[1:])) for line in lines]
    return rows
