"""What a record says of one architecture: whole numbers, so that equal scores are equal and sums are exact."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

# What the losses of `--score` are called.
LOSS_WORDS = {"loss": "cross-entropy with the labels", "divergence": "divergence from the dense network's answers"}
MICRONATS = 1_000_000  # per nat: losses are kept as whole numbers of them


class Counts(NamedTuple):
    """An architecture's score as it is recorded: whole numbers."""

    correct: int  # answers that count as right
    total: int  # images
    loss: int | None = None  # in micronats, summed over the images; None: right answers decide

    @property
    def top1(self) -> float:
        """Percent of the images."""
        return 100 * self.correct / self.total

    @property
    def worth(self) -> float:
        """What searches maximise, 0 to 100: top-1, or exp(−mean loss) in percent."""
        return self.top1 if self.loss is None else 100 * math.exp(-self.loss / self.total / MICRONATS)

    @property
    def columns(self) -> dict[str, float]:
        """Of the candidates frame, see `pareto`."""
        loss = {} if self.loss is None else {"loss": self.loss / self.total / MICRONATS}
        return {"top1": self.top1, "correct": self.correct, "total": self.total, **loss}

    def to_json(self) -> list[int]:
        """Two or three numbers; `from_json` reads them back."""
        return [number for number in self if number is not None]

    @classmethod
    def from_json(cls, value: Any, score: str) -> Counts:
        """score: what the search is by. Raises ValueError for anything that `to_json` of such a search does not give."""
        numbers = value if isinstance(value, list) and all(type(number) is int for number in value) else []
        if len(numbers) != (2 if score == "top1" else 3):
            raise ValueError(f"its counts are {value!r:.40}")
        counts = cls(*numbers)
        if not 0 <= counts.correct <= counts.total or counts.total == 0 or (counts.loss or 0) < 0:
            raise ValueError(f"its counts are {value!r:.40}")
        return counts
