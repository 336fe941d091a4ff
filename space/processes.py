"""Which of torchrun's processes this is, and how many cores it has."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def launched_rank() -> int:
    """Which of all processes this is; the first one, 0, writes and prints."""
    return int(os.environ["RANK"]) if launched() else 0


def usable_cores() -> int:
    """The cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
