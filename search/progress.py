"""Progress of long work with its rate: a bar in a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from .console import say

SECONDS_BETWEEN_LINES = 10  # at first; later a twentieth of the time spent, so that a day's log stays readable

Advance = Callable[..., None]  # (units done so far, note="", total=None)


def no_progress(done: float, note: str = "", total: float | None = None) -> None:
    """An Advance that shows nothing."""


def advance_loss(advance: Advance, step: int, loss: float | None) -> None:
    """A training's progress with its loss, where this process has seen one."""
    advance(step, "" if loss is None else f"loss {loss:.3f}")


def advance_step(advance: Advance, before: int, note: str, step: int, loss: float | None) -> None:
    """A training's progress as a part of a longer work, of which `before` steps were done when it began."""
    advance(before + step, note)


@contextmanager
def progress_bar(console: Console, title: str, total: float, unit: str) -> Iterator[Advance]:
    """Yields a function to call with the units done so far, of `total`, and a short note; it may correct the total.

    unit: plural of what is counted, such as "steps". What the first call reports as done counts as done before, so
    that continued work has an honest rate.
    """
    if console.quiet:
        yield no_progress
    elif console.is_terminal:
        with _bar(console, title, total) as advance:
            yield advance
    else:
        with _lines(console, title, total, unit) as advance:
            yield advance


def rate_text(per_second: float, unit: str = "") -> str:
    """A rate such as "12.3 steps/s", or "4.2 s per step" where one takes longer; without a unit "12.3/s", "4.2 s each"."""
    if per_second <= 0:
        return ""
    number = max(per_second, 1 / per_second)
    digits = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
    if per_second >= 1:
        return f"{digits} {unit}/s" if unit else f"{digits}/s"
    one = unit.removesuffix("es" if unit.endswith("ches") else "s")
    return f"{digits} s per {one}" if unit else f"{digits} s each"


def time_text(seconds: float) -> str:
    """A time in two digits or so: "45 s", "1.7 min", "12 min", "3.1 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5970:
        return f"{seconds / 60:.1f} min" if seconds < 597 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class _RateColumn(ProgressColumn):
    """Units per second over the last samples, and the time left; at the end the time it took."""

    def render(self, task: Task) -> Text:
        parts = [rate_text(task.finished_speed or task.speed or 0)]
        if task.finished_time is not None:
            parts.append(time_text(task.finished_time))
        elif task.time_remaining is not None:
            parts.append(f"{time_text(task.time_remaining)} left")
        return Text(", ".join(filter(None, parts)))


@contextmanager
def _bar(console: Console, title: str, total: float) -> Iterator[Advance]:
    line = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=line),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TaskProgressColumn(table_column=line.copy()),
        _RateColumn(table_column=line.copy()),
        TextColumn("{task.fields[note]}", markup=False, table_column=line.copy()),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(title, total=total, note="")
        begun = False

        def advance(done: float, note: str = "", total: float | None = None) -> None:
            nonlocal begun
            if not begun:  # not a step of now: only where this call begins
                bar.reset(task, completed=0, start=True)
                begun = True
                bar.tasks[0].completed = done
            bar.update(task, completed=done, note=note, total=total)

        yield advance


@contextmanager
def _lines(console: Console, title: str, total: float, unit: str) -> Iterator[Advance]:
    """The line that says "done" comes when the work has ended: a total that was forecast may be passed on the way."""
    opened = shown = now = time.monotonic()
    start, first, last, said = opened, None, 0.0, ""
    whole = total

    def advance(done: float, note: str = "", total: float | None = None) -> None:
        nonlocal start, shown, now, first, last, said, whole
        now, last, said = time.monotonic(), done, note
        whole = whole if total is None else total
        if first is None:
            start, first = now, done
        if last != whole and now - shown >= max(SECONDS_BETWEEN_LINES, (now - start) / 20):
            shown = now
            show(f"{last / whole:.0%}" if last < whole else "longer than forecast", first, start)

    def show(share: str, first: float, start: float) -> None:
        parts, spent = [share], now - start
        if spent > 0 and last > first:
            rate = (last - first) / spent
            parts.append(rate_text(rate, unit))
            if last < whole:
                parts.append(f"about {time_text((whole - last) / rate)} left")
        say(console, f"{title}: {', '.join(parts)}{said and f', {said}'}")

    yield advance
    if first is not None and last >= whole:
        at_once = last == first  # all of it in one call, before which nothing was said
        first, start = (0, opened) if at_once else (first, start)
        show(f"100%, done in {time_text(now - start)}", first, start)
