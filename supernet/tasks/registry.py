"""The tasks that poolshare has, by name."""

from __future__ import annotations

from typing import Any

from poolshare.space import ConfigError

from .classification import CLASSIFICATION
from .embedding import EMBEDDING
from .multilabel import MULTILABEL
from .segmentation import SEGMENTATION
from .task import Task, check_task

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, MULTILABEL, SEGMENTATION, EMBEDDING)}


def task_named(task: Any) -> Task:
    """The task of a name, or the task that was given. Raises ConfigError for an unknown name, and what `check_task` does."""
    if isinstance(task, str):
        if task not in TASKS:
            raise ConfigError(
                f"task {task!r} is unknown: there are {', '.join(TASKS)}; one that was given in Python is given again: go on "
                "with what `poolshare.search.search` returned, or give it to `poolshare.search.work`"
            )
        return TASKS[task]
    return check_task(task, [type(one) for one in TASKS.values()])
