"""Search: the command line, the Python API, samplers, studies and reports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poolshare.supernet.tasks import Classification as Classification
    from poolshare.supernet.tasks import Embedding as Embedding
    from poolshare.supernet.tasks import MultiLabel as MultiLabel
    from poolshare.supernet.tasks import Task as Task

    from .api import SearchResult as SearchResult
    from .api import search as search
    from .api import work as work
    from .exported.predict import predict as predict
    from .exported.regions import draw_regions as draw_regions
    from .exported.retrain import evaluate as evaluate
    from .exported.retrain import retrain as retrain

_PLACES = {
    "poolshare.supernet.tasks": ("Classification", "Embedding", "MultiLabel", "Task"),
    "poolshare.search.api": ("SearchResult", "search", "work"),
    "poolshare.search.exported.predict": ("predict",),
    "poolshare.search.exported.regions": ("draw_regions",),
    "poolshare.search.exported.retrain": ("evaluate", "retrain"),
}
__all__ = sorted(name for names in _PLACES.values() for name in names)


def __getattr__(name: str) -> Any:
    """What is imported only when it is asked for, so that `poolshare --help` loads no torch."""
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(place), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
