"""A study in a file, for workers on one machine or on a disk that they share."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState

from poolshare.space import PoolshareError, RunError
from poolshare.space.files import remedy

from .store import VALUES, Store

FORMAT = 1  # of the journal's lines


class Journal(BaseJournalBackend):
    """Optuna's journal with a format version and a checksum in every line, and a lock that dies with its holder.

    Differs from Optuna's own JournalFileBackend: that one's lock is a file which outlives a killed holder (others
    then wait half a minute, or for ever where the path is relative), and it reads past a last line that is damaged.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._read = (0, 0)  # lines read so far, and the byte at which the next one begins
        self._held: BinaryIO | None = None
        self._depth = 0
        with _file_errors(self.path):
            self.path.touch()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the file for this process; may be nested. A line that a killed writer left unfinished is cut off."""
        if self._held is None:
            with _file_errors(self.path):
                self._held = self._open_locked()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                held, self._held = self._held, None
                with suppress(OSError):  # a failed write was reported by then; closing tries it once more
                    held.close()  # with it the lock

    def _open_locked(self) -> BinaryIO:
        file = open(self.path, "a+b")  # noqa: SIM115 - closed by `lock`
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size < self._read[1]:
                raise RunError(f"{self.path} was cut or replaced while it was in use; start again")
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                    os.fsync(file.fileno())
        except BaseException:
            file.close()
            raise
        return file

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        text = "".join(_dump({**log, "poolshare": [FORMAT, _checksum(log)]}) + "\n" for log in logs)
        with self.lock(), _file_errors(self.path):
            assert self._held is not None
            self._held.write(text.encode())
            self._held.flush()
            os.fsync(self._held.fileno())

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        line_number, offset = self._read if self._read[0] <= log_number_from else (0, 0)
        with _file_errors(self.path), open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written, or left so by a killed writer: the next one who writes cuts it off
                line_number, offset = line_number + 1, offset + len(line)
                if line_number > log_number_from:
                    log = self._checked(line, line_number)
                    self._read = line_number, offset
                    yield log

    def _checked(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            log = json.loads(line)
            if "poolshare" not in log:  # another program's, a dashboard's perhaps
                return dict(log)
            version, checksum = log.pop("poolshare")
            if version != FORMAT:
                raise RunError(
                    f"{self.path}, line {number}: format version {version!r:.20}, this poolshare reads {FORMAT}"
                )
            if checksum != _checksum(log):
                raise ValueError("its checksum does not fit")
            return log
        except RunError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{self.path} is damaged or not a poolshare journal: line {number} ({type(error).__name__}: {str(error)[:80]}); "
                "restore it from a copy, or move it away to search again from the trained supernet"
            ) from None


class JournalStore(Store):
    """A journal in the run folder, for workers on one machine or on a disk that they share.

    The disk must carry file locks from machine to machine (`flock`), as NFS 4 does. Every worker holds a lock on a
    file of its own; the system frees it however the worker ends, and so the others know.
    """

    def __init__(self, path: Path, name: str):
        super().__init__(name)
        self.journal = Journal(path)
        self._own: BinaryIO | None = None

    def __enter__(self) -> JournalStore:
        with self.journal.lock(), _file_errors(self.journal.path):
            self._sweep()
            self._own = open(self._file(self.worker), "wb")
            fcntl.flock(self._own, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._own is not None
        self._file(self.worker).unlink(missing_ok=True)
        self._own.close()

    def study(self, names: Sequence[str] = VALUES) -> optuna.Study:
        try:
            self.storage = JournalStorage(self.journal)
            return super().study(names)
        except (PoolshareError, OSError):  # what cannot be read may be whole
            raise
        except Exception as error:  # what replaying a strange journal may raise is anything
            raise RunError(
                f"{self.journal.path} is damaged or not a poolshare journal ({type(error).__name__}: {str(error)[:80]}); "
                "restore it from a copy, or move it away to search again from the trained supernet"
            ) from None

    def lock(self) -> Any:
        return self.journal.lock()

    def workers(self) -> int:
        return self._sweep()

    def fail_abandoned(self, study: optuna.Study) -> None:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Whoever takes a trial signs it under the same lock, so an unsigned one was left by a killed worker.
            worker = trial.user_attrs.get("worker")
            if not isinstance(worker, str) or "/" in worker or not self._is_alive(self._file(worker)):
                study.tell(trial.number, state=TrialState.FAIL)

    def _file(self, worker: str) -> Path:
        return self.journal.path.with_name(f".worker-{worker}")

    def _sweep(self) -> int:
        """Count the living workers, and remove the files of the dead; under the lock."""
        living = 0
        for path in self.journal.path.parent.glob(".worker-*"):
            if self._is_alive(path):
                living += 1
            else:
                path.unlink(missing_ok=True)
        return living

    def _is_alive(self, path: Path) -> bool:
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (FileNotFoundError, ValueError):
            return False
        return False


def _dump(log: dict[str, Any]) -> str:
    return json.dumps(log, separators=(",", ":"))


def _checksum(log: dict[str, Any]) -> int:
    return zlib.crc32(_dump(log).encode())


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be used ({error.strerror or error}); {remedy(error)}") from None
