"""Search: the command line, the Python API, samplers, studies and reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import SearchResult as SearchResult
    from .api import search as search
    from .api import work as work
    from .exported.regions import draw_regions as draw_regions

__all__ = ["SearchResult", "draw_regions", "search", "work"]


def __getattr__(name: str) -> Any:
    """What is imported only when it is asked for, so that `poolshare --help` loads no torch."""
    if name in __all__:
        from . import api
        from .exported import regions

        return getattr(regions if name == "draw_regions" else api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
