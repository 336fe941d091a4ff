"""Files written whole or not at all, and folders held by one process at a time."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from .errors import DamagedError, RunError


def write_whole(path: Path, write: Callable[[Path], Any], earlier: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place: readers see the old or the new.

    Both are on the disk when this returns, so a power cut leaves one of them too. Its permissions are those of any new
    file there. earlier: where to keep what stood at `path` before; a reader that finds no `path`, because the power
    failed between the two moves, takes that.
    Raises RunError, naming `path`, where the disk is full or the folder read-only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with usual_permissions(temporary):
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


@contextmanager
def usual_permissions(path: Path) -> Iterator[None]:
    """Give the new file `path`, however it is written, the permissions that the umask asks for.

    safetensors, for one, makes files that only their owner may read.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Raise RunError where `path` cannot be read, and DamagedError, with `advice`, where its content is not what it should be.

    The two are kept apart: a file that this user may not open, or that lies on a failing disk, may be complete. RunErrors
    of what is inside pass as they are.
    """
    try:
        yield
    except RunError:
        raise
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}); {remedy(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path} is damaged or not a poolshare file ({error if str(error) else repr(error)}); {advice}"
        ) from None


def check_folder(path: Path) -> None:
    """Raise RunError where no folder can be made at `path`, because it, or a part of the path, is a file."""
    for part in (path, *path.parents):
        if os.path.lexists(part):
            if not part.is_dir():
                raise RunError(f"{part} is a file; --out needs a folder, new or of an earlier run")
            return


def remedy(error: OSError) -> str:
    """What the user can do about an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then give the same command again"
    return "check the path and its permissions"


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; where folders cannot be synced, that is skipped."""
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
