"""Scoring a whole space: sub-tree by sub-tree of its prefix tree, streamed to disk, continued after any stop.

The outer loop goes over sub-trees, the inner one over images: what is finished is then final, and appended to the
table. In memory are the activations of one path, the architectures of one sub-tree (bounded by `MAX_ARCHITECTURES`)
and their counts. Each sub-tree reads the images again; small splits are kept decoded (`Data.eval_loader`), for large
ones a sub-tree costs at least `DENSE_WALKS` dense passes, beside which reading is small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from poolshare.space import Architecture, CostTable, Layer, RunError, SearchSpace, forecast_space

from .progress import Advance
from .run import CANDIDATES, RunFolder, checked_row
from .study import Task, advance_within

SUBTREES = 100  # about as many in a large space, so that a stop loses a hundredth of the work
DENSE_WALKS = 20  # a sub-tree costs at least so many dense networks: its root path, computed again, is little beside it
MAX_ARCHITECTURES = 4096  # of one sub-tree, however cheap they are


class Subtree(NamedTuple):
    """Neighbours in rank that begin with the same layers: one piece of work, for whoever takes it."""

    prefix: tuple[Layer, ...]  # what all of them begin with
    first: int  # rank of the first
    architectures: int
    cost: int  # of one walk over them, per image, the stem and the prefix included

    def members(self, space: SearchSpace, skip: int = 0) -> list[Architecture]:
        """The architectures in the order of their ranks, without the first `skip`."""
        return [space[rank] for rank in range(self.first + skip, self.first + self.architectures)]


def subtrees(space: SearchSpace, costs: CostTable, target: int, most: int = MAX_ARCHITECTURES) -> Iterator[Subtree]:
    """Cut the prefix tree into pieces that cost at most `target` beside their prefix, in the order of ranks.

    A sub-tree that costs more, or holds more than `most` architectures, is cut at its root; children of one parent
    that are neighbours and small enough together stay one piece. Holds no more than one path while it goes.
    """
    below = _costs_below(space, costs)

    def cut(prefix: tuple[Layer, ...], node: object, spent: int, first: int) -> Iterator[Subtree]:
        """The pieces under a node; spent: the stem's and the prefix's cost."""
        left = space.depth - len(prefix) - 1  # layers to come below a child
        piece = Subtree(prefix, first, 0, spent)
        for layer, after in space.edges[node].items():  # type: ignore[index]
            ways = space.completions[left][after]
            edge = costs.edge(prefix[-1] if prefix else None, layer)
            price = edge + below[left][after]
            small = left == 0 or (price <= target and ways <= most)
            fits = piece.cost - spent + price <= target and piece.architectures + ways <= most
            if piece.architectures and not (small and fits):
                yield piece
                piece = Subtree(prefix, piece.first + piece.architectures, 0, spent)
            if small:
                piece = Subtree(prefix, piece.first, piece.architectures + ways, piece.cost + price)
            else:
                yield from cut((*prefix, layer), after, spent + edge, piece.first)
                piece = Subtree(prefix, piece.first + ways, 0, spent)
        if piece.architectures:
            yield piece

    return cut((), None, costs.source, 0)


def subtree_target(space: SearchSpace, costs: CostTable) -> int:
    """The cost of a piece that makes neither many of them nor much work twice."""
    return max(forecast_space(space, costs).cost // SUBTREES, DENSE_WALKS * costs.total(space[0]))


def _costs_below(space: SearchSpace, costs: CostTable) -> list[dict]:
    """[layers still to come][node] -> cost of one walk over everything below the node."""
    below: list[dict] = [{node: costs.head(space.levels[node.level]) for node in space.edges if node is not None}]
    for _ in range(space.depth - 1):
        ahead = below[-1]
        below.append(
            {
                node: sum(costs.edge(space.last_layer(node), edge) + ahead[after] for edge, after in out.items())
                for node, out in space.edges.items()
                if node is not None
            }
        )
    return below


def score_everything(task: Task, folder: RunFolder, advance: Advance) -> pd.DataFrame:
    """Score the whole space in the order of ranks, continuing after what is there; returns the candidates frame.

    Finished sub-trees are appended to candidates.part.csv, which takes the place of candidates.csv when all are there:
    what an earlier search scored stays, and is answered from the task's record. advance: called with the share of MACs
    that is done, 0 to 1, and a note. Raises RunError for a table of another space.
    """
    part, size = folder.partial, task.space.size
    done = _continue(part, task.space)
    pieces = partial(subtrees, task.space, task.macs, subtree_target(task.space, task.macs))
    whole = sum(piece.cost for piece in pieces())
    paid = 0
    with open(part, "ab") as file:
        for piece in pieces():
            skip = min(max(done - piece.first, 0), piece.architectures)
            if skip < piece.architectures:
                members = piece.members(task.space, skip)
                note = f"at {piece.first + piece.architectures:,} of {size:,}"
                show = partial(advance_within, advance, paid / whole, piece.cost / whole, note)
                counts, total = task.score(members, show)
                rows = (task.row(a, correct, total, 0) for a, correct in zip(members, counts, strict=True))
                lines = (checked_row(",".join(str(row[name]) for name in CANDIDATES)) for row in rows)
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            paid += piece.cost
    os.replace(part, folder.candidates)
    return folder.read_candidates()


def _continue(part: Path, space: SearchSpace) -> int:
    """Architectures whose rows stand whole in the file; what a killed writer left after them is cut off."""
    header = (",".join([*CANDIDATES, "check"]) + "\n").encode()
    done, end = 0, 0
    if part.exists():
        with open(part, "rb") as file:
            first = file.readline()
            if first == header:
                end = len(header)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    row = line[:-1].decode(errors="replace")
                    if row != checked_row(row.rpartition(",")[0]):
                        raise RunError(
                            f"{part}: row {done + 1} does not fit its checksum; delete the file to score again"
                        )
                    text = row.split(",", 1)[0]
                    if done >= space.size or text != str(space[done]):
                        raise RunError(
                            f"{part}: row {done + 1} is '{text:.80}', not the architecture of that rank in this space; "
                            "delete the file to score again"
                        )
                    done += 1
                    end += len(line)
            elif not header.startswith(first):
                raise RunError(f"{part} begins with {first[:60]!r}, not with our header; delete it to score again")
    with open(part, "ab") as file:
        file.truncate(end)
        if end == 0:
            file.write(header)
    return done
