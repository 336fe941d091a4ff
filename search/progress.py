"""Progress of long work: a bar in a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10

Advance = Callable[..., None]  # (units done so far, note="")


def no_progress(done: float, note: str = "") -> None:
    """An Advance that shows nothing."""


@contextmanager
def progress_bar(console: Console, title: str, total: float) -> Iterator[Advance]:
    """Yields a function to call with the units done so far, of `total`, and a short note."""
    if console.is_terminal and not console.quiet:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
        return
    start = last = time.monotonic()

    def advance(done: float, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) * (total - done) / done if done else float("nan")
            rest = f"{now - start:.0f} s, about {left:.0f} s left" if done < total else f"done in {now - start:.0f} s"
            console.print(f"{title}: {done / total:.0%}, {rest} {note}".rstrip(), markup=False, highlight=False)

    yield advance
