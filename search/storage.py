"""Where a study is kept, a journal file or PostgreSQL: its lock, its living workers, its errors without passwords."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import uuid
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import Trial, TrialState

from poolshare.space import ConfigError, PoolshareError, RunError

FORMAT = 1  # of the journal's lines
HEARTBEAT_SECONDS, GRACE_SECONDS = 15, 60  # PostgreSQL: a trial whose worker is silent for longer is given to another


class Store(ABC):
    """One study as its workers see it; a context manager: inside, this process counts as one of them.

    Whatever reads and then writes the study holds `lock`, so no two workers queue or take the same trial.
    """

    kind: str
    storage: BaseStorage

    def __init__(self, name: str):
        self.name = name  # of the study
        # A name of this worker that no other one has: workers of several containers may share host and process id.
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    @abstractmethod
    def __enter__(self) -> Store: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...

    @abstractmethod
    def lock(self) -> Any:
        """A context manager: inside, no other worker changes the study. The system ends it however a holder ends."""

    @abstractmethod
    def workers(self) -> int:
        """How many workers are alive, this one included."""

    def take(self, study: optuna.Study) -> Trial:
        """Begin the next waiting trial, signed with this worker's name; under the lock."""
        trial = study.ask()
        trial.set_user_attr("worker", self.worker)
        return trial

    @abstractmethod
    def fail_abandoned(self, study: optuna.Study) -> None:
        """End the trials whose workers are gone as FAIL; under the lock."""

    def alive(self, trials: Sequence[Trial]) -> Any:
        """A context manager: inside, others see that these trials are being worked on."""
        return nullcontext()

    def errors(self) -> Any:
        """A context manager that makes the storage's own errors RunErrors; around everything that uses the study."""
        return nullcontext()

    def study(self, cost: str = "MACs") -> optuna.Study:
        """The study, begun or continued; cost: what its second value is. Raises RunError where its record is damaged."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.errors(), self.lock():
            if self.name not in optuna.get_all_study_names(self.storage):
                optuna.create_study(storage=self.storage, study_name=self.name, directions=["maximize", "minimize"])
            # Workers only take what is queued, see `study`: no sampler has a say in it.
            study = optuna.load_study(study_name=self.name, storage=self.storage, sampler=RandomSampler())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the names are for dashboards
                if study.metric_names is None:
                    study.set_metric_names(["top-1 (%)", cost])
            study.get_trials(deepcopy=False)
        return study


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
                self._held.close()  # with it the lock
                self._held = None

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
                f"{self.path} is damaged or not ours: line {number} ({type(error).__name__}: {str(error)[:80]}); "
                "restore it from a copy, or delete it to search again from the trained supernet"
            ) from None


class JournalStore(Store):
    """A journal in the run folder, for workers on one machine or on a disk that they share.

    The disk must carry file locks from machine to machine (`flock`), as NFS 4 does. Every worker holds a lock on a
    file of its own; the system frees it however the worker ends, and so the others know.
    """

    kind = "journal"

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

    def study(self, cost: str = "MACs") -> optuna.Study:
        try:
            self.storage = JournalStorage(self.journal)
            return super().study(cost)
        except PoolshareError:
            raise
        except Exception as error:  # what replaying a strange journal may raise is anything
            raise RunError(
                f"{self.journal.path} is damaged or not ours ({type(error).__name__}: {str(error)[:80]}); "
                "restore it from a copy, or delete it to search again from the trained supernet"
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


class PostgresStore(Store):
    """A PostgreSQL database, for workers on several machines; they show by heartbeats that they live.

    Raises ConfigError for an address that is none, RunError where the database cannot be used. No message holds any
    part of the address or of what the driver says of it: both may hold a password.
    """

    kind = "postgresql"

    def __init__(self, url: str, name: str):
        super().__init__(name)
        address = _postgres_address(url)
        self._key = zlib.crc32(name.encode()) & 0x7FFFFFFF  # of the advisory locks, beside 0 (queue) and 1 (presence)
        self._stack = ExitStack()
        import sqlalchemy

        self._text = sqlalchemy.text
        options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}}
        with self.errors():
            self._engine = sqlalchemy.create_engine(address, **options)
            with warnings.catch_warnings(), self.lock():  # two who begin at once would both create the tables
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._database = RDBStorage(
                    address.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
                    options,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                )
        self.storage = self._database

    def __enter__(self) -> PostgresStore:
        with self.errors():
            connection = self._stack.enter_context(self._engine.connect())
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(self._text("SELECT pg_advisory_lock_shared(:key, 1)"), {"key": self._key})
        return self

    def __exit__(self, *exception: object) -> None:
        import sqlalchemy.exc

        with suppress(sqlalchemy.exc.SQLAlchemyError):  # a lost connection has no lock to give back
            self._stack.close()
            self._engine.dispose()
            self._database.engine.dispose()

    @contextmanager
    def lock(self) -> Iterator[None]:
        with self._engine.begin() as connection:
            connection.execute(self._text("SELECT pg_advisory_xact_lock(:key, 0)"), {"key": self._key})
            yield

    def workers(self) -> int:
        query = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = :key AND objid = 1 "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        with self._engine.connect() as connection:
            found = int(connection.execute(self._text(query), {"key": self._key}).scalar_one())
        return max(1, found)  # a connection that broke off took our own lock with it

    def take(self, study: optuna.Study) -> Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Optuna beats for its own loop only; `alive` does for ours
            trial = study.ask()
        # In this order: a signed trial has a heartbeat, so its worker's silence will be noticed.
        self._database.record_heartbeat(trial._trial_id)
        trial.set_user_attr("worker", self.worker)
        return trial

    def fail_abandoned(self, study: optuna.Study) -> None:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "worker" not in trial.user_attrs:  # left by a worker that was killed before it signed
                study.tell(trial.number, state=TrialState.FAIL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            fail_stale_trials(study)

    @contextmanager
    def alive(self, trials: Sequence[Trial]) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            with suppress(StorageInternalError):  # the worker itself will meet the same error and tell it
                while not done.wait(HEARTBEAT_SECONDS):
                    for trial in trials:
                        self._database.record_heartbeat(trial._trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def errors(self) -> Iterator[None]:
        import sqlalchemy.exc

        try:
            yield
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:
            raise RunError(f"the database of --storage {_reason(error)}") from None


def storage_kind(url: str | None) -> str:
    """The kind of storage at an address; None: the run folder's journal. Raises ConfigError where it is no address."""
    if url is None:
        return JournalStore.kind
    _postgres_address(url)
    return PostgresStore.kind


def open_store(journal: Path, url: str | None, name: str) -> Store:
    """The store of a run's study: its journal, or the database at `url`."""
    return JournalStore(journal, name) if url is None else PostgresStore(url, name)


def _postgres_address(url: str) -> Any:
    """An address as SQLAlchemy has it. Raises ConfigError, without any part of it."""
    import sqlalchemy.exc

    try:
        address = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        address = None
    if address is None or address.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ConfigError("--storage is not understood; write postgresql://USER:PASSWORD@HOST/DATABASE")
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise ConfigError("--storage needs the PostgreSQL driver; pip install 'poolshare[postgres]'") from None
    return address.set(drivername="postgresql+psycopg")


def _reason(error: BaseException) -> str:
    """What is wrong with a database, in our words: the driver's may hold parts of the address."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause).lower())
        cause = getattr(cause, "orig", None) or cause.__cause__
    for sign, reason in (
        ("password", "refuses this user or password; check them"),
        ("no pg_hba.conf entry", "refuses this user from this machine; see its pg_hba.conf"),
        ("does not exist", "does not exist, or not for this user, or lacks its tables; create it with createdb"),
        ("permission denied", "does not let this user create tables; GRANT CREATE ON SCHEMA public"),
        ("read-only", "is read-only; use its primary server"),
        ("no space left", "has no space left; free some, then start again"),
        ("too many clients", "has no connection left; raise its max_connections, or start fewer workers"),
    ):
        if any(sign in text for text in texts):
            return reason
    return f"cannot be reached, or broke off ({type(error).__name__}); check that it runs, then start again"


def _dump(log: dict[str, Any]) -> str:
    return json.dumps(log, separators=(",", ":"))


def _checksum(log: dict[str, Any]) -> int:
    return zlib.crc32(_dump(log).encode())


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be used ({error.strerror or error}); free some space, or see to its permissions"
        ) from None
