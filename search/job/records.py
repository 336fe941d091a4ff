"""Records as files: JSON objects and tables that carry a checksum, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from poolshare.space.files import write_whole

FORMAT = 1


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
        raise ValueError("it holds no object")
    # A file of another format version is told as that, whatever its checksum.
    if value.get("format") == FORMAT and value.pop("checksum", None) != _checksum(value):
        raise ValueError("its checksum does not fit, so it was edited or damaged")
    return value


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_csv(path: Path, frame: pd.DataFrame, checked: bool = False) -> None:
    """Write a table, whole or not at all; checked: with a checksum in each row, for `read_csv`."""
    text = frame.to_csv(index=False, lineterminator="\n")
    if checked:
        head, *rows = text.splitlines()
        text = "\n".join([f"{head},check", *map(checked_row, rows)]) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def checked_row(row: str) -> str:
    """A row of a table with its checksum."""
    return f"{row},{zlib.crc32(row.encode())}"


def read_csv(path: Path) -> pd.DataFrame:
    """The table that `write_csv` wrote with checksums. Raises OSError, or ValueError for anything else."""
    text = path.read_text(encoding="utf-8")
    for number, row in enumerate(text.splitlines()[1:], start=1):
        if row != checked_row(row.rpartition(",")[0]):
            raise ValueError(f"row {number} does not fit its checksum, so it was edited or damaged")
    frame = pd.read_csv(StringIO(text))
    return frame.drop(columns="check", errors="ignore")
