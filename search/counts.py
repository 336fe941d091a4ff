"""What a record says of one architecture: whole numbers, so that equal scores are equal and sums are exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

MICRONATS = 1_000_000  # per nat: losses are kept as whole numbers of them


class Measure(Protocol):
    """What is to be known of a task where scores are only read; every `supernet.tasks.Task` is one."""

    @property
    def metric(self) -> str:
        """What the score is called."""

    @property
    def column(self) -> str:
        """Its column in tables."""

    @property
    def proportion(self) -> bool:
        """Whether it is a share of right answers."""

    @property
    def lowest(self) -> float:
        """The least possible score."""

    def number(self, sums: np.ndarray, images: int) -> Any:
        """The score of so many images, at most 100, from the sum of their contributions (…, K)."""


class Share(NamedTuple):
    """The measure of classification."""

    metric: str = "top-1"
    column: str = "top1"
    proportion: bool = True
    lowest: float = 0.0

    def number(self, sums: np.ndarray, images: int) -> Any:
        """Percent of right answers."""
        return 100 * sums[..., 0] / images


TOP1 = Share()


class Counts(NamedTuple):
    """An architecture's score as it is recorded: whole numbers."""

    sums: tuple[int, ...]  # of what the images contribute to the task's score; of right answers alone, their number
    total: int  # images
    loss: int | None = None  # in micronats, summed over the images; None: the score decides

    def score(self, measure: Measure) -> float:
        """Of the task, at most 100."""
        return float(measure.number(np.asarray(self.sums), self.total))

    def plus(self, other: Counts) -> Counts:
        """Of both their images."""
        loss = None if self.loss is None or other.loss is None else self.loss + other.loss
        return Counts(tuple(map(sum, zip(self.sums, other.sums, strict=True))), self.total + other.total, loss)

    @property
    def mean_loss(self) -> float:
        """In nats. Only of counts that have a loss."""
        assert self.loss is not None
        return self.loss / self.total / MICRONATS

    def worth(self, measure: Measure) -> float:
        """What searches maximise, at most 100: the score, or exp(−mean loss) in percent."""
        return self.score(measure) if self.loss is None else 100 * math.exp(-self.mean_loss)

    def columns(self, measure: Measure) -> dict[str, Any]:
        """Of the candidates frame, see `pareto`."""
        sums = {"correct": self.sums[0]} if measure.proportion else {"sums": " ".join(map(str, self.sums))}
        loss = {} if self.loss is None else {"loss": self.mean_loss}
        return {measure.column: self.score(measure), **sums, "total": self.total, **loss}

    @classmethod
    def of_row(cls, row: Any, by_loss: bool) -> Counts:
        """What `columns` gave, from a row of the candidates frame as a mapping."""
        sums = (int(row["correct"]),) if "correct" in row else tuple(map(int, str(row["sums"]).split()))
        total = int(row["total"])
        return cls(sums, total, round(row["loss"] * total * MICRONATS) if by_loss else None)

    def to_json(self) -> list[int]:
        """Sums, images, and the loss where it decides; `of` and `from_json` read them back."""
        return [*self.sums, self.total, *([] if self.loss is None else [self.loss])]

    @classmethod
    def of(cls, numbers: Sequence[int], score: str) -> Counts:
        """From what `to_json` gives in a search by `score`, see `--score`."""
        after = 1 if score == "metric" else 2  # numbers after the sums
        return cls(tuple(numbers[:-after]), *numbers[-after:])

    @classmethod
    def from_json(cls, value: Any, score: str, measure: Measure = TOP1) -> Counts:
        """The same of anything. Raises ValueError for what `to_json` of such a search does not give."""
        least = 2 if score == "metric" else 3
        if isinstance(value, list) and len(value) >= least and all(type(number) is int for number in value):
            counts = cls.of(value, score)
            short = len(counts.sums) == 1 or not measure.proportion
            positive = counts.total > 0 and (counts.loss or 0) >= 0
            if short and positive and measure.lowest <= counts.score(measure) <= 100:
                return counts
        raise ValueError(f"its counts are {value!r:.40}")
