"""The tasks that poolshare has, by name."""

from __future__ import annotations

from typing import Any

from poolshare.space import ConfigError

from .classification import CLASSIFICATION
from .embedding import EMBEDDING
from .multilabel import MULTILABEL
from .segmentation import SEGMENTATION
from .task import Task

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, MULTILABEL, SEGMENTATION, EMBEDDING)}


def task_named(task: Any) -> Task:
    """The task of a name, or the task that was given.

    Raises ConfigError for an unknown name, for what is no task, and for a task without a name of its own.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ConfigError(
                f"task {task!r} is unknown: there are {', '.join(TASKS)}; one that was given in Python is given again: go on "
                "with what `poolshare.search.search` returned, or give it to `poolshare.search.work`"
            )
        return TASKS[task]
    if not isinstance(task, Task):
        what = task.__name__ if isinstance(task, type) else f"{task!r:.60}"
        raise ConfigError(
            f"task {what} is not a task: give its name, or an instance of a subclass of poolshare.search.Task"
        )
    name = getattr(task, "name", "")
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"the task {type(task).__name__} is called {name!r}: give it a name, which is recorded")
    if name in TASKS and type(task) is not type(TASKS[name]):
        raise ConfigError(
            f"the task {type(task).__name__} is called {name}, as one of poolshare's: give it another name"
        )
    return task
