"""The one loop: queue a generation, score it in one pass, tell the study."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from poolshare.space import Architecture, Band, CostTable, RunError, SearchSpace

from ..counts import TOP1, Counts, Measure
from ..progress import Advance
from ..samplers.propose import PROPOSERS, Scored, decode, distributions, encode, optuna_sampler
from .store import Store

GENERATION = 25  # architectures that are proposed together, from all that were scored before
MAX_FAILURES = 20  # workers that may die over one architecture before the search gives up

# Architectures and a progress callback (share done) → what is recorded of each.
Score = Callable[[Sequence[Architecture], Callable[[float], None]], list[Counts]]


@dataclass(frozen=True)
class Problem:
    """What a search needs to know beside its sampler."""

    space: SearchSpace
    macs: CostTable
    parameters: CostTable
    allowed: Band  # the budget
    score: Score
    latency: CostTable | None = None  # where it is known
    by_latency: bool = False  # whether that is the objective, and not MACs
    record: Mapping[Architecture, Counts] = field(default_factory=dict)  # scored before
    scored_by: str = "metric"  # see `--score`
    measure: Measure = TOP1  # of the job's task

    @property
    def objective(self) -> CostTable:
        """What is weighed against the score, and what the budget is of."""
        return self.latency if self.latency and self.by_latency else self.macs

    @property
    def names(self) -> list[str]:
        """Of the two values that a study keeps of each trial."""
        cost = "latency (ns per image)" if self.objective.quantity == "latency" else self.objective.cost.label
        return [f"{self.measure.metric} (%)" if self.scored_by == "metric" else "exp(-loss) (%)", cost]

    def row(self, architecture: Architecture, counts: Counts, generation: int) -> dict[str, object]:
        """One row of the candidates frame, see `pareto`."""
        row: dict[str, object] = {
            "architecture": str(architecture),
            **counts.columns(self.measure),
            "macs": self.macs.total(architecture),
            "parameters": self.parameters.total(architecture),
            "generation": generation,
        }
        if self.latency is not None:
            row["latency_ms"] = self.latency.value(self.latency.total(architecture))
        return row


def run_study(
    problem: Problem,
    store: Store,
    sampler: str,
    trials: int,
    seed: int,
    advance: Advance,
    publish: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Search until the study holds `trials` scored trials, as one of any number of workers; returns the candidates.

    store: of the study. sampler: "evolution", "random", "nsga2" or "tpe". advance: called with the number of scored
    trials and a note. publish: called with the candidates as they grow.

    A generation is proposed from the complete earlier generations alone, by randomness that is keyed by (seed,
    generation), so its slots hold the same architectures whichever worker queues them, how many workers score them, and
    whichever of them die: what is missing is queued again, what is scored stays.
    """
    with store, store.errors():
        search = _Search(problem, store.study(problem.names), store, sampler, trials, seed)
        while True:
            with store.lock():
                store.fail_abandoned(search.study)
                generation = search.queue()
                if generation is None:
                    break
                batch = search.take()
            done = len(search.read()[0])
            if not batch:
                advance(done, f"generation {generation}: others are scoring its last architectures")
                time.sleep(search.patience)
                continue
            search.score(batch, partial(advance_within, advance, done, len(batch), f"generation {generation}"))
            if publish:
                publish(search.candidates())
        frame = search.candidates()
        if publish:
            publish(frame)
        return frame


def advance_within(advance: Advance, start: float, length: float, note: str, share: float) -> None:
    """Progress inside one step of a longer work."""
    advance(start + share * length, note)


class _Proposal(NamedTuple):
    """What a slot of a generation asks for."""

    architecture: Architecture
    params: dict[str, Any]
    system_attrs: dict[str, Any]  # what an Optuna sampler wants to know of its earlier trials


class _Slot(NamedTuple):
    """A trial as the search sees it: its place, and once it is scored, its counts."""

    generation: int
    position: int  # in the generation
    architecture: Architecture
    counts: Counts | None
    trial: FrozenTrial


@dataclass
class _Search:
    """A study with the problem it is about. `queue` and `take` are called under the store's lock."""

    problem: Problem
    study: optuna.Study
    store: Store
    sampler: str
    trials: int
    seed: int
    patience: float = 0.1  # seconds to wait for other workers
    _read: dict[int, _Slot] = field(default_factory=dict)  # trial number -> what a complete trial says
    _proposed: dict[int, list[_Proposal]] = field(default_factory=dict)  # the last generation's

    def read(self) -> tuple[list[_Slot], list[_Slot]]:
        """The scored slots, and the open ones that wait or are being scored, by generation and position.

        Read in one go, because trials end without the lock. Raises RunError for one that this search cannot have written.
        """
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
        slots = sorted(map(self._slot, trials), key=lambda slot: (slot.generation, slot.position))
        return [slot for slot in slots if slot.counts is not None], [slot for slot in slots if slot.counts is None]

    def candidates(self) -> pd.DataFrame:
        """The candidates frame: what earlier searches scored, then this one's by generation and position, each once."""
        rows: dict[Architecture, dict[str, object]] = {}
        for slot in self.read()[0]:
            assert slot.counts is not None
            rows.setdefault(slot.architecture, self.problem.row(slot.architecture, slot.counts, slot.generation))
        earlier = [self.problem.row(a, counts, 0) for a, counts in self.problem.record.items() if a not in rows]
        return pd.DataFrame([*earlier, *rows.values()])

    def queue(self) -> int | None:
        """Queue what the current generation lacks; returns its number, or None where the search is over.

        What it lacks is all of it, or what a worker that was killed has not queued or not scored, or a repetition,
        which is answered from the record.
        """
        scored, open_ = self.read()
        generation = max((slot.generation for slot in scored + open_), default=0)
        while True:
            earlier = [slot for slot in scored if slot.generation < generation]
            present = {slot.position: slot for slot in scored + open_ if slot.generation == generation}
            wanted = min(GENERATION, self.trials - len(earlier))
            if wanted <= 0:
                return None
            if len(present) < wanted:
                proposals = self._proposals(generation, earlier)[:wanted]
                if not proposals:
                    return None  # every architecture within the budget has been tried
                self._queue(generation, proposals, present, scored)
                scored, open_ = self.read()
            if open_:
                return generation
            generation += 1

    def take(self) -> list[Trial]:
        """This worker's share of what is queued, as running trials; empty where others work on all of it."""
        waiting = len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        share = -(-min(GENERATION, self.trials) // self.store.workers())
        return [self.store.take(self.study) for _ in range(min(waiting, share))]

    def score(self, taken: list[Trial], progress: Callable[[float], None]) -> None:
        """Score trials in one pass and tell the study; gives back what an error leaves unscored."""
        start = time.monotonic()
        with self.store.working(self.study, taken) as tell:
            slots = {slot.trial.number: slot for slot in self.read()[1]}
            mine = [(trial, slots[trial.number].architecture) for trial in taken if trial.number in slots]
            scored = self.problem.score([architecture for _, architecture in mine], progress)
            for (trial, architecture), counts in zip(mine, scored, strict=True):
                tell(
                    trial,
                    [counts.worth(self.problem.measure), self.problem.objective.total(architecture)],
                    {"counts": counts.to_json()},
                )
        self.patience = min(max((time.monotonic() - start) / 10, 0.05), 2)

    def _slot(self, trial: FrozenTrial) -> _Slot:
        if trial.number in self._read:
            return self._read[trial.number]
        facts, problem = trial.user_attrs, self.problem
        try:
            generation, position = facts["generation"], facts["position"]
            architecture = problem.space.check(Architecture.parse(facts["architecture"]))
            counts = None
            whole = type(generation) is int and type(position) is int
            if not whole or generation < 0 or not 0 <= position < GENERATION:
                raise ValueError(f"its place is {generation!r:.20}, {position!r:.20}")
            if trial.state == TrialState.COMPLETE:
                counts = Counts.from_json(facts["counts"], problem.scored_by, problem.measure)
                worth, cost = trial.values
                if cost != problem.objective.total(architecture) or not math.isclose(
                    worth, counts.worth(problem.measure), abs_tol=1e-9
                ):
                    raise ValueError(f"its values are {trial.values!r:.60}")
        except (KeyError, TypeError, ValueError) as error:  # an ArchitectureError is a ValueError
            raise RunError(
                f"trial {trial.number} of study {self.study.study_name!r} is damaged or of another search "
                f"({type(error).__name__}: {str(error)[:100]}); restore the study, or search into a new folder"
            ) from None
        slot = _Slot(generation, position, architecture, counts, trial)
        if trial.state == TrialState.COMPLETE:
            self._read[trial.number] = slot
        return slot

    def _queue(
        self, generation: int, proposals: list[_Proposal], present: dict[int, _Slot], scored: list[_Slot]
    ) -> None:
        known = dict(self.problem.record) | {slot.architecture: slot.counts for slot in scored}
        open_ = {slot.architecture for slot in present.values()}
        failures = Counter(
            (trial.user_attrs.get("generation"), trial.user_attrs.get("position"))
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        )
        missing = [item for item in enumerate(proposals) if item[0] not in present]
        # In the order of ranks, so that a worker's share has long common prefixes.
        for position, proposal in sorted(missing, key=lambda item: self.problem.space.rank(item[1].architecture)):
            architecture = proposal.architecture
            if failures[generation, position] >= MAX_FAILURES:
                raise RunError(
                    f"{MAX_FAILURES} workers in turn ended while they scored '{architecture}'; see to what ended them, "
                    "memory perhaps, and search into a new folder"
                )
            if architecture in known or architecture not in open_:
                self._add(generation, position, proposal, known.get(architecture))
                open_.add(architecture)

    def _add(self, generation: int, position: int, proposal: _Proposal, counts: Counts | None) -> None:
        architecture = proposal.architecture
        objective = self.problem.objective
        cost = objective.total(architecture)
        excess = max(0, cost - self.problem.allowed.high)
        facts: dict[str, Any] = {"generation": generation, "position": position, "architecture": str(architecture)}
        facts |= {"macs": self.problem.macs.total(architecture)} | {objective.quantity: cost}
        facts |= {"feasible": excess == 0, f"{objective.quantity}_over_budget": excess}
        facts |= {} if counts is None else {"counts": counts.to_json()}
        self.study.add_trial(
            create_trial(
                state=TrialState.WAITING if counts is None else TrialState.COMPLETE,
                values=None if counts is None else [counts.worth(self.problem.measure), cost],
                params=proposal.params,
                distributions=distributions(self.problem.space),
                user_attrs=facts,
                # Feasible where ≤ 0. This older form of a constraint is the one that Optuna and its dashboard both read.
                system_attrs=proposal.system_attrs | {"constraints": [excess]},
            )
        )

    def _proposals(self, generation: int, earlier: list[_Slot]) -> list[_Proposal]:
        if generation not in self._proposed:
            propose = self._by_ourselves if self.sampler in PROPOSERS else self._by_optuna
            self._proposed = {generation: propose(generation, earlier)}
        return self._proposed[generation]

    def _by_ourselves(self, generation: int, earlier: list[_Slot]) -> list[_Proposal]:
        scored = [Scored(slot.architecture, slot.trial.values[0], int(slot.trial.values[1])) for slot in earlier]
        key = f"{self.sampler} {self.seed} {generation}"
        proposals = PROPOSERS[self.sampler](self.problem.allowed, self.problem.objective, scored, key, GENERATION)
        return [_Proposal(architecture, encode(architecture, self.problem.space), {}) for architecture in proposals]

    def _by_optuna(self, generation: int, earlier: list[_Slot]) -> list[_Proposal]:
        """Ask one of Optuna's samplers in memory, over the earlier generations in their own order.

        In the shared study trial numbers depend on who queued and who was killed, and samplers look at them.
        """
        sampler = optuna_sampler(self.sampler, self.seed * 1_000_003 + generation)
        study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
        study.add_trials(slot.trial for slot in earlier)
        if generation == 0 and self.problem.allowed.size < self.problem.space.size:
            # As evolution does: these samplers learn what a budget allows, and of a tight one may never meet a member.
            study.enqueue_trial(encode(self.problem.space.cheapest(self.problem.objective), self.problem.space))
        for _ in range(GENERATION):
            study.ask(distributions(self.problem.space))
        asked = study.get_trials()[len(earlier) :]
        return [_Proposal(decode(t.params, self.problem.space), t.params, t.system_attrs) for t in asked]
