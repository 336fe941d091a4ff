"""Which of torchrun's processes this is, how many cores it has, and that it keeps its memory."""

from __future__ import annotations

import ctypes
import os

_MOST_MAPPINGS, _TRIM_THRESHOLD = -4, -1  # glibc's numbers of what `mallopt` sets


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


def keep_memory() -> bool:
    """Let glibc keep what is freed until this process ends, as tcmalloc and jemalloc do; returns whether it does now.

    As it comes it gives large tensors back to the system and fetches them anew, page by page, at every operation: on a CPU
    that slows forwards of large batches, most of all those of models that share attention (results/throughput). The
    greatest size of the process stays about the same. Nothing is changed where a variable MALLOC_MMAP_… or MALLOC_TRIM_…
    says what is wanted.
    """
    if any(name.startswith(("MALLOC_MMAP_", "MALLOC_TRIM_")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_MOST_MAPPINGS, 0) and mallopt(_TRIM_THRESHOLD, -1))
