"""Files written whole or not at all, and folders held by one process at a time."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from .errors import RunError


def write_whole(path: Path, write: Callable[[Path], Any], earlier: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place: readers see the old or the new.

    Both are on the disk when this returns, so a power cut leaves one of them too. earlier: where to keep what stood
    at `path` before; a reader that finds no `path`, because the power failed between the two moves, takes that.
    Raises RunError, naming `path`, where the disk is full or the folder read-only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        if earlier is not None and path.exists():
            os.replace(path, earlier)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}); {remedy(error)}") from None
    finally:
        with suppress(OSError):  # a read-only disk holds none
            temporary.unlink(missing_ok=True)


def remedy(error: OSError) -> str:
    """What the user can do about an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then give the same command again"
    return "check the path and its permissions"


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk; a system or a disk that cannot sync folders need not."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed writers of `path` left. For a process that alone may write it."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold an existing folder for this process; its `.lock` says who does. Raises RunError, naming the owner, if held."""
    import fcntl

    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system however the process ends
        except OSError:
            file.seek(0)
            raise RunError(
                f"{folder} is in use by {file.read().strip() or 'another process'}; wait, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
