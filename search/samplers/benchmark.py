"""A tabular benchmark: every architecture of a space with its score, read back as an objective that answers at once.

Two files stand side by side: `benchmark.csv.gz` (columns architecture, macs, parameters, correct, total; one row for
each architecture, in the order of ranks) and `benchmark.json` (the space and its two cost tables). A study of samplers
on it takes seconds, and needs neither images nor torch.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import ne
from pathlib import Path

import numpy as np
import pandas as pd

from poolshare.space import Architecture, CostTable, RunError, SearchSpace
from poolshare.space.files import write_whole

from ..counts import Counts
from ..job.records import FORMAT, read_json, write_json
from ..study.loop import Problem

COLUMNS = ("architecture", "macs", "parameters", "correct", "total")


@dataclass(frozen=True)
class Benchmark:
    """A whole space with its scores; made by `of` or `load`."""

    space: SearchSpace
    macs: CostTable
    parameters: CostTable
    frame: pd.DataFrame  # COLUMNS, in the order of ranks

    @classmethod
    def of(cls, candidates: pd.DataFrame, space: SearchSpace, macs: CostTable, parameters: CostTable) -> Benchmark:
        """From a candidates frame that holds the whole space. Raises RunError where rows are missing or foreign."""
        frame = candidates[list(COLUMNS)].reset_index(drop=True)
        if len(frame) != space.size or any(map(ne, frame["architecture"], map(str, space))):
            raise RunError(
                f"the table has {len(frame):,} rows, the space {space.size:,} architectures; a benchmark holds each of "
                "them once, in the order of ranks: score the whole space first (--sampler exhaustive)"
            )
        for costs in (macs, parameters):
            totals = np.fromiter(map(costs.total, space), np.int64, space.size)
            wrong = np.flatnonzero(frame[costs.quantity].to_numpy() != totals)
            if len(wrong):
                raise RunError(
                    f"row {wrong[0]} of the table has {frame[costs.quantity][wrong[0]]:,} {costs.quantity}, "
                    f"its cost table says {totals[wrong[0]]:,}; take both from one run"
                )
        if not ((frame["correct"] >= 0) & (frame["correct"] <= frame["total"]) & (frame["total"] > 0)).all():
            raise RunError("the table has a row whose correct answers are not between 0 and its images; restore it")
        return cls(space, macs, parameters, frame)

    def save(self, path: str | Path) -> None:
        """Write `path` (….csv.gz) and beside it the space and costs (….json); equal contents give equal bytes."""
        csv, sidecar = _both(path)
        facts = {"space": self.space.to_json(), "macs": self.macs.to_json(), "parameters": self.parameters.to_json()}
        write_json(sidecar, {"format": FORMAT} | facts)
        content = gzip.compress(self.frame.to_csv(index=False).encode(), mtime=0)
        write_whole(csv, lambda temporary: temporary.write_bytes(content))

    @classmethod
    def load(cls, path: str | Path) -> Benchmark:
        """Read what `save` wrote. Raises RunError where a file is missing or damaged."""
        csv, sidecar = _both(path)
        try:
            facts = read_json(sidecar)
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']!r}, this poolshare reads {FORMAT}")
            frame = pd.read_csv(csv, compression="gzip")
            if tuple(frame.columns) != COLUMNS:
                raise ValueError(f"its columns are {', '.join(frame.columns)}")
            frame = frame.astype({"architecture": str} | dict.fromkeys(COLUMNS[1:], "int64"))
            tables = (CostTable.from_json(facts[name]) for name in ("macs", "parameters"))
            return cls.of(frame, SearchSpace(**facts["space"]), *tables)
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{csv} with {sidecar.name} is not a benchmark, or is damaged ({error!s:.200}); restore both"
            ) from None

    @property
    def candidates(self) -> pd.DataFrame:
        """The same as a candidates frame, see `pareto`."""
        frame = self.frame.assign(generation=0)
        frame.insert(1, "top1", 100 * frame["correct"] / frame["total"])
        return frame

    def problem(self, budget: float | None = None) -> Problem:
        """What a search on the table needs: the space within a budget in MACs, scored by looking up."""
        correct = dict(zip(self.space, self.frame["correct"].tolist(), strict=True))
        total = int(self.frame["total"].iloc[0])

        def score(architectures: Sequence[Architecture], progress: Callable[[float], None]) -> list[Counts]:
            progress(1.0)
            return [Counts((correct[architecture],), total) for architecture in architectures]

        return Problem(self.space, self.macs, self.parameters, self.space.within(self.macs, None, budget), score)


def _both(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    if not path.name.endswith(".csv.gz"):
        raise RunError(
            f"{path} does not end in .csv.gz, as the table of a benchmark does; its space is in a .json beside it"
        )
    return path, path.with_name(path.name.removesuffix(".csv.gz") + ".json")
