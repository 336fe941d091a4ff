"""Ctrl-C and SIGTERM deferred until the work reaches a point where it can stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """`number`: the signal that arrived, or None. `obey` lets a signal take its usual effect."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.earlier: dict[int, Any] = {}

    def note(self, number: int, frame: Any) -> None:
        """The handler: the second signal is obeyed at once."""
        if self.number is not None:
            self.obey(number)
        self.number = number

    def obey(self, number: int) -> None:
        """Restore the earlier handlers and raise the signal again."""
        for one, handler in self.earlier.items():
            signal.signal(one, handler)
        signal.raise_signal(number)


@contextmanager
def kept_signals(wanted: bool) -> Iterator[Stop]:
    """Within, the first SIGINT or SIGTERM is only noted. Not wanted, or outside the main thread, nothing changes."""
    stop = Stop()
    if wanted and threading.current_thread() is threading.main_thread():
        stop.earlier = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in stop.earlier.items():
            signal.signal(number, handler)
