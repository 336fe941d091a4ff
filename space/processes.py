"""Which of torchrun's processes this is, read from the environment that torchrun sets."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def launched_rank() -> int:
    """Which of all processes this is; the first one, 0, writes and prints."""
    return int(os.environ["RANK"]) if launched() else 0
