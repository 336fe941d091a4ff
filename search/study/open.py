"""Where a study is kept: the run folder's journal, or the database at an address."""

from __future__ import annotations

from pathlib import Path

from .journal import JournalStore
from .postgres import PostgresStore
from .store import Store


def check_storage(url: str | None) -> str:
    """The kind of storage at an address; None: the run folder's journal.

    Raises ConfigError where it is not an address, RunError where the database cannot be used, long before it is needed.
    """
    if url is None:
        return "journal"
    with PostgresStore(url, "a check"):
        return "postgresql"


def open_store(journal: Path, url: str | None, name: str) -> Store:
    """The store of a run's study: its journal, or the database at `url`."""
    return JournalStore(journal, name) if url is None else PostgresStore(url, name)
