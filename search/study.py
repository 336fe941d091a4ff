"""The one loop: queue a generation, score it in one pass, tell the study; or score the whole space."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from poolshare.space import Architecture, Band, CostTable, RunError, SearchSpace, forecast

from .progress import Advance
from .propose import PROPOSERS, Scored, decode, distributions, encode, optuna_sampler
from .run import RunFolder

GENERATION = 50  # architectures that are scored in one pass over the images
CHUNK = 256  # neighbours in rank that are scored in one pass when the whole space is
SECONDS_BETWEEN_WRITES = 5

# Architectures and a progress callback (share done) → correct counts, number of images.
Score = Callable[[Sequence[Architecture], Callable[[float], None]], tuple[list[int], int]]


@dataclass(frozen=True)
class Task:
    """What a search needs to know beside its sampler."""

    space: SearchSpace
    macs: CostTable
    parameters: CostTable
    allowed: Band  # the budget
    score: Score

    def row(self, architecture: Architecture, correct: int, total: int, generation: int) -> dict[str, object]:
        """One row of the candidates frame, see `pareto`."""
        return {
            "architecture": str(architecture),
            "top1": 100 * correct / total,
            "correct": correct,
            "total": total,
            "macs": self.macs.total(architecture),
            "parameters": self.parameters.total(architecture),
            "generation": generation,
        }


def score_everything(task: Task, folder: RunFolder, advance: Advance) -> pd.DataFrame:
    """Score the whole space in the order of ranks, continuing after what candidates.csv already holds.

    advance: called with the share of MACs that is done, 0 to 1, and a note.
    """
    done = folder.read_candidates().to_dict("records") if folder.candidates.exists() else []
    architectures = list(task.space)
    chunks = [architectures[start : start + CHUNK] for start in range(len(done), len(architectures), CHUNK)]
    prices = [forecast(chunk, task.macs).cost for chunk in chunks]
    whole = sum(prices) or 1
    paid, written = 0, time.monotonic()
    for chunk, price in zip(chunks, prices, strict=True):
        note = f"at {len(done) + len(chunk):,} of {len(architectures):,}"
        show = partial(_advance_within, advance, paid / whole, price / whole, note)
        counts, total = task.score(chunk, show)
        done += [task.row(a, correct, total, 0) for a, correct in zip(chunk, counts, strict=True)]
        paid += price
        if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
            folder.write_candidates(pd.DataFrame(done))
            written = time.monotonic()
    frame = pd.DataFrame(done)
    folder.write_candidates(frame)
    return frame


def run_study(
    task: Task, folder: RunFolder, sampler: str, trials: int, seed: int, name: str, advance: Advance
) -> pd.DataFrame:
    """Search until the study holds `trials` finished trials; continues what the journal already has.

    sampler: "evolution", "random", "nsga2" or "tpe". advance: called with the number of finished trials and a note.
    """
    study = open_study(folder.journal, name)
    _requeue_abandoned(study)
    while (finished := len(_trials(study, TrialState.COMPLETE))) < trials:
        count = min(GENERATION, trials - finished)
        generation = 1 + max(
            (t.user_attrs.get("generation", -1) for t in _trials(study, TrialState.COMPLETE)), default=-1
        )
        if not _trials(study, TrialState.WAITING):
            if sampler in PROPOSERS:
                _queue(study, task, sampler, f"{sampler} {seed} {generation}", count, generation)
                if not _trials(study, TrialState.WAITING):
                    break  # every architecture within the budget has been tried
            else:
                study.sampler = optuna_sampler(sampler, seed * 1_000_003 + generation, GENERATION)
        asked = [study.ask(distributions(task.space)) for _ in range(len(_trials(study, TrialState.WAITING)) or count)]
        show = partial(_advance_within, advance, finished, len(asked), f"generation {generation}")
        _score(study, task, asked, generation, show)
        folder.write_candidates(candidates(study, task))
    return candidates(study, task)


def _advance_within(advance: Advance, start: float, length: float, note: str, share: float) -> None:
    """Progress inside one step of a longer work."""
    advance(start + share * length, note)


def open_study(journal: Path, name: str) -> optuna.Study:
    """The study of a journal file, begun or continued. The caller holds the run folder's lock."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _cut_torn_line(journal)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=name,
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a line that is no JSON, or no operation
        raise RunError(f"{journal} is damaged ({error}); delete it to search again from the trained supernet") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the names are for dashboards only
        study.set_metric_names(["top-1 (%)", "MACs"])
    return study


def candidates(study: optuna.Study, task: Task) -> pd.DataFrame:
    """The candidates frame of a study's finished trials: each architecture once, in the order it was scored."""
    rows: dict[Architecture, dict[str, object]] = {}
    for trial in _trials(study, TrialState.COMPLETE):
        facts = trial.user_attrs
        architecture = Architecture.parse(facts["architecture"])
        rows.setdefault(architecture, task.row(architecture, facts["correct"], facts["total"], facts["generation"]))
    return pd.DataFrame(rows.values())


def _trials(study: optuna.Study, state: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(state,))


def _cut_torn_line(journal: Path) -> None:
    """A writer that was killed may leave half a line, and the next append would make the file unreadable."""
    if not journal.exists():
        return
    with open(journal, "r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
            os.fsync(file.fileno())


def _requeue_abandoned(study: optuna.Study) -> None:
    """Trials that a killed search left running go back to the queue: nobody else works on this folder."""
    for trial in _trials(study, TrialState.RUNNING):
        study.tell(trial.number, state=TrialState.FAIL)
        study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={"generation": trial.user_attrs["generation"]} if "generation" in trial.user_attrs else {},
            )
        )


def _queue(study: optuna.Study, task: Task, sampler: str, key: str, count: int, generation: int) -> None:
    """Let our own proposer fill the next generation."""
    scored = [
        Scored(Architecture.parse(trial.user_attrs["architecture"]), trial.values[0], int(trial.values[1]))
        for trial in _trials(study, TrialState.COMPLETE)
    ]
    study.add_trials(
        create_trial(
            state=TrialState.WAITING,
            params=encode(architecture, task.space),
            distributions=distributions(task.space),
            user_attrs={"generation": generation},
        )
        for architecture in PROPOSERS[sampler](task.allowed, task.macs, scored, key, count)
    )


def _score(
    study: optuna.Study, task: Task, asked: list[Trial], generation: int, progress: Callable[[float], None]
) -> None:
    """Score the asked trials in one pass, each architecture once, and tell the study."""
    known = {
        trial.user_attrs["architecture"]: (trial.user_attrs["correct"], trial.user_attrs["total"])
        for trial in _trials(study, TrialState.COMPLETE)
    }
    drawn = [decode(trial.params, task.space) for trial in asked]
    unknown = [architecture for architecture in dict.fromkeys(drawn) if str(architecture) not in known]
    if unknown:
        counts, total = task.score(unknown, progress)
        known |= {str(architecture): (correct, total) for architecture, correct in zip(unknown, counts, strict=True)}
    for trial, architecture in zip(asked, drawn, strict=True):
        correct, total = known[str(architecture)]
        macs = task.macs.total(architecture)
        facts = {"architecture": str(architecture), "correct": correct, "total": total, "generation": generation}
        for name, value in facts.items():
            trial.set_user_attr(name, value)
        # Feasible where ≤ 0; as an attribute too, since the dashboard does not show constraints.
        excess = max(0, macs - task.allowed.high)
        trial.set_constraint("MACs over budget", excess)
        trial.set_user_attr("macs_over_budget", excess)
        study.tell(trial, [100 * correct / total, macs])
