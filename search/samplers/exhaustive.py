"""Scoring a whole space: sub-tree by sub-tree of its prefix tree, by any number of workers, continued after any stop.

The outer loop goes over sub-trees, the inner one over images: what is finished is then final. Each sub-tree is a trial
of a study, which is the record; a worker takes neighbours together and walks what they begin with once. In memory are
the activations of one path, the architectures of one walk (bounded by `MAX_ARCHITECTURES`) and all counts. Each walk
reads the images again; small splits are kept decoded (`Data.eval_loader`), for large ones a lone worker's walk costs
at least `WALK` dense passes, beside which reading is small.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from poolshare.space import Architecture, CostTable, Layer, RunError, SearchSpace, forecast_space

from ..counts import Counts
from ..progress import Advance
from ..study.loop import MAX_FAILURES, Problem, advance_within
from ..study.store import Store

# One of so many parts of the whole, but not less than so many dense networks: what several walks begin with is computed
# by each of them, and should be little beside the rest.
SUBTREES, SUBTREE = 200, 2  # a trial: small, so that many workers can have equal shares
WALKS, WALK = 100, 20  # what a lone worker takes at once, and a stop may lose
MAX_ARCHITECTURES = 4096  # of one walk, however cheap they are


class Subtree(NamedTuple):
    """Neighbours in rank that begin with the same layers: one piece of work, for whoever takes it."""

    prefix: tuple[Layer, ...]  # what all of them begin with
    first: int  # rank of the first
    architectures: int
    cost: int  # of one walk over them, per image, the stem and the prefix included

    def members(self, space: SearchSpace) -> list[Architecture]:
        """The architectures in the order of their ranks."""
        return [space[rank] for rank in range(self.first, self.first + self.architectures)]


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


def piece_cost(space: SearchSpace, costs: CostTable, parts: int, dense: int) -> int:
    """The cost of one of so many parts of the whole, but not less than that of so many dense networks."""
    return max(forecast_space(space, costs).cost // parts, dense * costs.total(space[0]))


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


def score_everything(problem: Problem, store: Store, advance: Advance) -> pd.DataFrame:
    """Score the whole space as one of any number of workers; returns the candidates frame in the order of ranks.

    What an earlier search scored is answered from the problem's record. advance: called with the share of MACs that is
    done, 0 to 1, and a note. Raises RunError for a study that is damaged or of another space.
    """
    patience = 0.1  # seconds to wait for other workers
    with store, store.errors():
        whole = _Whole(problem, store.study(problem.names), store)
        while True:
            with store.lock():
                store.fail_abandoned(whole.study)
                if whole.queue():
                    break
                taken = whole.take()
            note = f"{whole.scored:,} of {problem.space.size:,} architectures"
            if not taken:
                advance(whole.share, f"{note}; others are scoring the last ones")
                time.sleep(patience)
                continue
            start = time.monotonic()
            length = sum(piece.cost for _, piece in taken) / whole.cost
            whole.score(taken, partial(advance_within, advance, whole.share, length, note))
            patience = min(max((time.monotonic() - start) / 10, 0.05), 2)
        advance(1, f"{whole.scored:,} of {problem.space.size:,} architectures")
        return whole.candidates()


class _Whole:
    """A study whose trials are the sub-trees of a space. `queue` and `take` are called under the store's lock."""

    def __init__(self, problem: Problem, study: optuna.Study, store: Store):
        self.problem, self.study, self.store = problem, study, store
        space, macs = problem.space, problem.macs
        target = piece_cost(space, macs, SUBTREES, SUBTREE)
        self.pieces = {piece.first: piece for piece in subtrees(space, macs, target)}
        self.cost = sum(piece.cost for piece in self.pieces.values())
        self.walk = piece_cost(space, macs, WALKS, WALK)
        self.counts: dict[int, list[Counts]] = {}  # first rank of a scored piece → what is recorded, in its order

    @property
    def scored(self) -> int:
        """Architectures that are scored."""
        return sum(map(len, self.counts.values()))

    @property
    def share(self) -> float:
        """The share of MACs that is done."""
        return sum(self.pieces[first].cost for first in self.counts) / self.cost

    def queue(self) -> bool:
        """Queue the pieces that are neither scored nor queued; returns whether all are scored."""
        present: set[int] = set()
        failures: Counter[int] = Counter()
        for trial in self.study.get_trials(deepcopy=False):
            piece = self._piece(trial)
            if trial.state == TrialState.FAIL:
                failures[piece.first] += 1
                continue
            present.add(piece.first)
            if trial.state == TrialState.COMPLETE and piece.first not in self.counts:
                self.counts[piece.first] = self._counts(trial, piece)
        for piece in self.pieces.values():
            if failures[piece.first] >= MAX_FAILURES and piece.first not in present:
                raise RunError(
                    f"{MAX_FAILURES} workers in turn ended while they scored the {piece.architectures} architectures "
                    f"from '{self.problem.space[piece.first]}' on; see to what ended them, memory perhaps, and search into "
                    "a new folder"
                )
            if piece.first not in present:
                self._add(piece)
        return len(self.counts) == len(self.pieces)

    def take(self) -> list[tuple[Trial, Subtree]]:
        """What this worker scores next, as running trials; empty where others work on all that is left.

        Alone it takes much at once. Several take ever smaller shares of what is left, to end at the same time.
        """
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        pieces = [self._piece(trial) for trial in waiting]
        workers, most = self.store.workers(), self.walk
        if workers > 1:
            most = min(most, sum(piece.cost for piece in pieces) // (2 * workers))
        cost = architectures = number = 0
        for piece in pieces:
            cost, architectures = cost + piece.cost, architectures + piece.architectures
            if number and (cost > most or architectures > MAX_ARCHITECTURES):
                break
            number += 1
        taken = [self.store.take(self.study) for _ in range(number)]
        return [(trial, self.pieces[trial.user_attrs["first"]]) for trial in taken]

    def score(self, taken: Sequence[tuple[Trial, Subtree]], progress: Callable[[float], None]) -> None:
        """Score pieces in one walk and tell the study; gives back what an error leaves unscored."""
        with self.store.working(self.study, [trial for trial, _ in taken]) as tell:
            members = [piece.members(self.problem.space) for _, piece in taken]
            rest = iter(self.problem.score(list(chain.from_iterable(members)), progress))
            for (trial, _), architectures in zip(taken, members, strict=True):
                counts = [next(rest) for _ in architectures]
                tell(trial, self._values(architectures, counts), _facts(counts))

    def candidates(self) -> pd.DataFrame:
        """The candidates frame, once all is scored: piece by piece, for a column takes less than its values in rows."""
        return pd.concat(
            [
                pd.DataFrame(
                    self.problem.row(architecture, counts, 0)
                    for architecture, counts in zip(piece.members(self.problem.space), self.counts[first], strict=True)
                )
                for first, piece in self.pieces.items()
            ],
            ignore_index=True,
        )

    def _add(self, piece: Subtree) -> None:
        """Queue a piece, or answer it where the record knows all of it."""
        facts: dict[str, Any] = {"first": piece.first, "architectures": piece.architectures}
        known, state, values = self.problem.record, TrialState.WAITING, None
        members = piece.members(self.problem.space) if len(known) >= piece.architectures else []
        if members and all(architecture in known for architecture in members):
            counts = [known[architecture] for architecture in members]
            facts |= _facts(counts)
            state, values = TrialState.COMPLETE, self._values(members, counts)
        self.study.add_trial(create_trial(state=state, values=values, user_attrs=facts))

    def _values(self, architectures: Sequence[Architecture], counts: Sequence[Counts]) -> list[float]:
        """What a dashboard shows of a piece: score and cost of its best architecture."""
        costs = (-self.problem.macs.total(architecture) for architecture in architectures)
        worth, saved = max(zip((one.worth(self.problem.measure) for one in counts), costs, strict=True))
        return [worth, -saved]

    def _piece(self, trial: FrozenTrial) -> Subtree:
        first, architectures = (trial.user_attrs.get(name) for name in ("first", "architectures"))
        piece = self.pieces.get(first) if type(first) is int else None
        if piece is None or piece.architectures != architectures:
            raise self._damaged(trial, f"its architectures are {architectures!r:.20} from {first!r:.20} on")
        return piece

    def _counts(self, trial: FrozenTrial, piece: Subtree) -> list[Counts]:
        found, problem = trial.user_attrs.get("counts"), self.problem
        try:
            if type(found) is not list or len(found) != piece.architectures:
                raise ValueError(f"its counts are {found!r:.40}")
            counts = [Counts.from_json(one, problem.scored_by, problem.measure) for one in found]
            if len({one.total for piece in (counts, *self.counts.values()) for one in piece[:1]}) > 1:
                raise ValueError(f"its images are {counts[0].total}")
        except ValueError as error:
            raise self._damaged(trial, str(error)) from None
        return counts

    def _damaged(self, trial: FrozenTrial, why: str) -> RunError:
        return RunError(
            f"trial {trial.number} of study {self.study.study_name!r} is damaged or of another search ({why}); restore "
            "the study, or search into a new folder"
        )


def _facts(counts: Sequence[Counts]) -> dict[str, Any]:
    """What a trial keeps of its architectures."""
    return {"counts": [one.to_json() for one in counts]}
