"""A study in a PostgreSQL database, for workers on several machines."""

from __future__ import annotations

import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import Trial, TrialState

from poolshare.space import ConfigError, RunError

from .store import Store

HEARTBEAT_SECONDS, GRACE_SECONDS = 15, 60  # a trial whose worker is silent for longer is given to another


class PostgresStore(Store):
    """A PostgreSQL database, for workers on several machines; they show by heartbeats that they live.

    Raises ConfigError for an address that is none, RunError where the database cannot be used. No message holds any
    part of the address or of what the driver says of it: both may hold a password.
    """

    def __init__(self, url: str, name: str):
        super().__init__(name)
        address = checked_address(url)
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
            alive = int(connection.execute(self._text(query), {"key": self._key}).scalar_one())
        return max(1, alive)  # a connection that broke off took our own lock with it

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


def checked_address(url: str) -> Any:
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
