"""What models are trained and judged for: poolshare's own tasks, and what those of users are made of."""

from .classification import CLASSIFICATION, Classification
from .embedding import Embedding
from .multilabel import MultiLabel
from .registry import TASKS, task_named
from .task import Task

__all__ = ["CLASSIFICATION", "TASKS", "Classification", "Embedding", "MultiLabel", "Task", "task_named"]
