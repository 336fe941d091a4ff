"""Where a study is kept, as its workers see it."""

from __future__ import annotations

import os
import socket
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState

VALUES = ("top-1 (%)", "MACs")  # what a trial has two of
Tell = Callable[[Trial, Sequence[float], Mapping[str, Any]], None]


class Store(ABC):
    """One study as its workers see it; a context manager: inside, this process counts as one of them.

    Whatever reads and then writes the study holds `lock`, so no two workers queue or take the same trial.
    """

    storage: BaseStorage

    def __init__(self, name: str):
        self.name = name  # of the study
        # A name of this worker that no other one has: workers of several containers may share host and process id.
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    @abstractmethod
    def __enter__(self) -> Store: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...

    @abstractmethod
    def lock(self) -> Any:
        """A context manager: inside, no other worker changes the study. The system ends it however a holder ends."""

    @abstractmethod
    def workers(self) -> int:
        """How many workers are alive, this one included."""

    def take(self, study: optuna.Study) -> Trial:
        """Begin the next waiting trial, signed with this worker's name; under the lock."""
        trial = study.ask()
        trial.set_user_attr("worker", self.worker)
        return trial

    @abstractmethod
    def fail_abandoned(self, study: optuna.Study) -> None:
        """End the trials whose workers are gone as FAIL; under the lock."""

    def alive(self, trials: Sequence[Trial]) -> Any:
        """A context manager: inside, others see that these trials are being worked on."""
        return nullcontext()

    @contextmanager
    def working(self, study: optuna.Study, trials: Sequence[Trial]) -> Iterator[Tell]:
        """Work on trials that were taken; yields a function that ends one, with its values and user attributes.

        A trial that has not ended by then, after an error for instance, goes back to the queue at once.
        """
        untold = {trial.number for trial in trials}

        def tell(trial: Trial, values: Sequence[float], facts: Mapping[str, Any]) -> None:
            with suppress(UpdateFinishedTrialError):  # this worker was silent for so long that another got the trial
                for name, fact in facts.items():
                    trial.set_user_attr(name, fact)
                study.tell(trial, values, skip_if_finished=True)
            untold.discard(trial.number)

        try:
            with self.alive(trials):
                yield tell
        finally:
            for number in untold:
                study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def errors(self) -> Any:
        """A context manager that makes the storage's own errors RunErrors; around everything that uses the study."""
        return nullcontext()

    def study(self, names: Sequence[str] = VALUES) -> optuna.Study:
        """The study, begun or continued; names: of a trial's two values. Raises RunError where its record is damaged."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.errors(), self.lock():
            if self.name not in optuna.get_all_study_names(self.storage):
                optuna.create_study(storage=self.storage, study_name=self.name, directions=["maximize", "minimize"])
            # Workers only take what is queued: no sampler has a say in it.
            study = optuna.load_study(study_name=self.name, storage=self.storage, sampler=RandomSampler())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the names are for dashboards
                if study.metric_names is None:
                    study.set_metric_names(list(names))
            study.get_trials(deepcopy=False)
        return study
