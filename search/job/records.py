"""Records as files: JSON objects and tables, each with a checksum, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from poolshare.space.files import write_whole

FORMAT = 1
CHECKSUM = "checksum "  # with it begins the name of the last column of a checked table


def versions() -> dict[str, str]:
    """What a number depends on beside the configuration."""
    names = ("poolshare", "torch", "timm", "optuna", "fvcore")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as readable JSON with a checksum, whole or not at all."""
    text = json.dumps({**value, "checksum": _checksum(value)}, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object that `write_json` wrote. Raises OSError, or ValueError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    # Another format version is reported as such, whatever the checksum.
    if value.get("format") == FORMAT and value.pop("checksum", None) != _checksum(value):
        raise ValueError("its checksum does not fit, so it was edited or damaged")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_csv(path: Path, frame: pd.DataFrame, checked: bool = False) -> None:
    """Write a table, whole or not at all; checked: with a checksum of its values as the name of a last, empty column."""
    if checked:
        frame = frame.assign(**{_column(frame): ""})
    text = frame.to_csv(index=False, lineterminator="\n")
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_csv(path: Path) -> pd.DataFrame:
    """A table that `write_csv` wrote, or a spreadsheet saved since. Raises OSError, or ValueError for anything else.

    The checksum is of values, whatever their quotes and line ends; a table without one is read as it is.
    """
    frame = pd.read_csv(StringIO(path.read_text(encoding="utf-8")))
    column = str(frame.columns[-1])
    if column.startswith(CHECKSUM):
        frame = frame.drop(columns=column)
        if column != _column(frame):
            raise ValueError("its values do not fit its checksum, so it was edited or damaged")
    return frame


def _column(frame: pd.DataFrame) -> str:
    """Numbers count with nine digits, which every program keeps."""
    cells = [list(frame.columns), *frame.itertuples(index=False, name=None)]
    texts = [[f"{cell:.9g}" if isinstance(cell, float) else str(cell) for cell in row] for row in cells]
    return f"{CHECKSUM}{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}"
