"""The run folder: the interface between the verbs. The lock and the files of one search."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from poolshare.space import Architecture, RunError
from poolshare.space.files import held, write_whole

from .config import MAY_DIFFER, SearchConfig, first_problem
from .images import changed_files, difference, write_images

if TYPE_CHECKING:
    from poolshare.supernet.latency import Latency

FORMAT = 1
CANDIDATES = ("architecture", "top1", "correct", "total", "macs", "parameters", "generation")
FINALISTS = ("architecture", "macs", "epochs", "batch_size", "lr", "amp", "supernet_correct", "correct", "total")


class RunFolder:
    """A folder with the files of one search; made by `create`, found by `open`."""

    def __init__(self, path: Path, config: SearchConfig):
        self.path, self.config = path, config
        self.training = path / "training.safetensors"  # state of the training; the one before it is kept beside it
        self.supernet = path / "supernet.safetensors"  # trained weights
        self.journal = path / "study.journal"  # the study, where it is not in a database
        self.candidates = path / "candidates.csv"
        self.benchmark = path / "benchmark.csv.gz"  # a whole space with its scores
        self.latency = path / "latency.json"  # the latency table, and how far it can be trusted
        self.finalists = path / "finalists.csv"  # the best ones, trained on and scored again
        self.pareto = path / "pareto.csv"
        self.summary = path / "summary.json"
        self.trust = path / "trust.json"
        self.trust_rows = path / "trust.csv"  # what it was reckoned from
        self.images = path / "images.csv"  # training images that are files, so that a changed one can be named
        self.report = path / "report.html"
        self.figure = path / "pareto.png"

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in `path`. Raises RunError where there is none, or one that cannot be read."""
        path = Path(path)
        if not (path / "config.json").is_file():
            raise RunError(
                f"{path} is no run folder: it holds no config.json; `poolshare search --out {path}` makes one"
            )
        try:
            content = read_json(path / "config.json")
            found = content["format"]
            config = SearchConfig(**content["search"]) if found == FORMAT else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = first_problem(error) if isinstance(error, ValidationError) else repr(error)
            raise RunError(
                f"{path / 'config.json'} is damaged or not ours ({what}); restore it, or search into a new folder"
            ) from None
        if config is None:
            raise RunError(
                f"{path} has format version {found!r}, this poolshare reads {FORMAT}; use the version that wrote it"
            )
        return cls(path, config)

    @staticmethod
    def check(path: str | Path, config: SearchConfig) -> None:
        """Raise RunError for a folder with other contents, or with a configuration that differs in more than MAY_DIFFER.

        Writes nothing; each difference is named.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; --out needs a folder, new or of an earlier run")
        if (path / "config.json").exists():
            earlier = RunFolder.open(path).config
            changed = [
                f"{name}: {getattr(earlier, name)!r} there, {getattr(config, name)!r} now"
                for name in SearchConfig.model_fields
                if name not in MAY_DIFFER and getattr(earlier, name) != getattr(config, name)
            ]
            if changed:
                raise RunError(
                    f"{path} was begun with another configuration ({'; '.join(changed)}); repeat that one to "
                    f"continue it (only {', '.join(MAY_DIFFER)} may differ), or search into a new folder"
                )
        elif path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()):
            raise RunError(f"{path} holds other files and no config.json; search into a new or an empty folder")

    @classmethod
    @contextmanager
    def claim(cls, path: str | Path, config: SearchConfig) -> Iterator[RunFolder]:
        """Hold a new run folder, or an existing one that may be continued with this configuration, for one process.

        Raises what `check` does, and RunError, naming the owner, where another process holds the folder. The
        configuration is not written yet: see `write_config`.
        """
        cls.check(path, config)
        folder = cls(Path(path), config)
        folder.path.mkdir(parents=True, exist_ok=True)
        with held(folder.path):
            cls.check(path, config)  # the process that held it may have begun it meanwhile
            yield folder

    def write_config(
        self,
        data: str,
        storage: str = "journal",
        files: Mapping[str, str] | None = None,
        classes: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Write config.json with the fingerprint of the training images, and the kind of storage its study is in.

        files: of images that are files, a word for the contents of each by its name; kept in images.csv. classes: of the
        model, in the order of its head. notes: on data and weights; those of earlier calls are kept.
        Raises what `check_same` does, before anything is written.
        """
        path = self.path / "config.json"
        if path.exists():
            self.check_same(data, storage, files)
        content = {"format": FORMAT, "data": data, "storage": storage, "search": self.config.model_dump(mode="json")}
        earlier = self.notes if path.exists() else ()
        content |= {
            "classes": None if classes is None else list(classes),
            "notes": list(dict.fromkeys([*earlier, *notes])),
        }
        write_json(path, content)
        if files and not self.images.exists():
            write_images(self.images, files)

    def check_same(self, data: str, storage: str, files: Mapping[str, str] | None = None) -> None:
        """Raise RunError where the run was begun with other training images, or with its study elsewhere."""
        self.check_images(data, files)
        there = self._fact("storage")
        if there not in (None, storage):
            remedy = "give --storage, or set POOLSHARE_STORAGE" if there == "postgresql" else "leave out --storage"
            raise RunError(f"the study of {self.path} is in a {there}: {remedy}, or search into a new folder")

    def check_images(self, fingerprint: str, files: Mapping[str, str] | None = None) -> None:
        """Raise RunError where the run was begun with other training images, naming `files` that differ."""
        if found := difference(fingerprint, self.data_fingerprint):
            named = changed_files(self.images, files or {})
            raise RunError(
                f"the training images of {self.config.data} are not those {self.path} was begun with "
                f"({found}{named and f': {named}'}); restore them to continue it, or search into a new folder"
            )

    @staticmethod
    def classes_of(path: str | Path) -> tuple[str, ...] | None:
        """The classes that the run in `path` was begun with; None where there is none yet."""
        return RunFolder.open(path).classes if (Path(path) / "config.json").exists() else None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes of its model in the order of the head; they may be more than the data's."""
        found = self._fact("classes")
        return None if found is None else tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user was told of data and weights when the run was begun or continued."""
        return tuple(self._fact("notes") or ())

    @property
    def data_fingerprint(self) -> str:
        """What `write_config` was given when the run was begun."""
        return str(self._fact("data"))

    def _fact(self, name: str) -> Any:
        return read_json(self.path / "config.json").get(name)

    def read_candidates(self) -> pd.DataFrame:
        """The scored architectures, see `pareto`. Raises RunError where there are none yet, or the file is damaged."""
        path = self.candidates
        if not path.exists():
            raise RunError(f"{self.path} has no candidates.csv yet; continue its search with `poolshare search`")
        try:
            frame = read_csv(path)
            if tuple(frame.columns) not in (CANDIDATES, (*CANDIDATES, "latency_ms")):
                raise ValueError(f"its columns are {', '.join(frame.columns)}")
            if frame.isna().any(axis=None):
                raise ValueError("a value is missing")
            frame = frame.astype({"architecture": str, "top1": float} | dict.fromkeys(CANDIDATES[2:], int))
            for text in frame["architecture"]:
                Architecture.parse(text)
            if not frame["architecture"].is_unique or frame["total"].nunique() > 1:
                raise ValueError("an architecture stands twice, or numbers of images differ")
            if not np.allclose(frame["top1"], 100 * frame["correct"] / frame["total"]):
                raise ValueError("a top1 is not correct / total")
            return frame
        except (ValueError, OSError) as error:
            raise RunError(f"{path} is damaged ({error}); delete it to score again") from None

    def read_finalists(self) -> pd.DataFrame:
        """The finalists that were trained with the present weights, columns FINALISTS; none before the verb has run.

        Raises RunError for a damaged file.
        """
        if not self.finalists.exists():
            return pd.DataFrame(columns=list(FINALISTS))
        try:
            frame = read_csv(self.finalists)
            if "lr" not in frame:  # of before these were recorded: they were the search's, and the usual rate
                config = self.config
                frame = frame.assign(batch_size=config.batch_size, lr=config.finetune_lr, amp=config.amp)
                frame = frame[[name for name in FINALISTS if name in frame]]
            if tuple(frame.columns) != FINALISTS or frame.isna().any(axis=None):
                raise ValueError(f"its columns are {', '.join(frame.columns)}, or a value is missing")
            for text in frame["architecture"]:
                Architecture.parse(text)
            return frame.astype(dict.fromkeys(FINALISTS, int) | {"architecture": str, "lr": float, "amp": str})
        except (ValueError, OSError) as error:
            raise RunError(f"{self.finalists} is damaged ({error}); delete it to train finalists again") from None

    def write_candidates(self, frame: pd.DataFrame) -> None:
        """Replace candidates.csv; latencies are written where all rows have one."""
        known = "latency_ms" in frame and frame["latency_ms"].notna().all()
        write_csv(self.candidates, frame[[*CANDIDATES, "latency_ms"] if known else list(CANDIDATES)], checked=True)

    def read_latency(self) -> Latency | None:
        """The latency table that the run was searched with last; None where there is none.

        Raises RunError for a damaged file.
        """
        from poolshare.supernet.latency import Latency

        try:
            found = read_json(self.latency)
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}, not {FORMAT}")
            return Latency.from_json(found)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{self.latency} is damaged ({error}); delete it to measure latency again") from None

    def latency_torch(self) -> str:
        """The version of torch that latency.json was measured with; empty where there is none."""
        if not self.latency.exists():
            return ""
        return str(json.loads(self.latency.read_text(encoding="utf-8")).get("torch", ""))

    def write_latency(self, latency: Latency) -> None:
        """Replace latency.json. Times are nanoseconds per image; `checked` holds whole models, timed and summed."""
        errors = latency.errors
        facts: dict[str, Any] = {"format": FORMAT, **latency.to_json(), "torch": version("torch")}
        if errors:
            facts |= {"median_error": statistics.median(errors), "worst_error": errors[-1]}
        write_json(self.latency, facts)

    def read_summary(self) -> dict[str, Any]:
        """What a finished search wrote beside its candidates. Raises RunError where it is not there."""
        from .kept import Timed

        try:
            summary = read_json(self.summary)
            if summary["format"] != FORMAT:
                raise ValueError(f"format {summary['format']!r}")
            missing = {"dense", "classes", "certified", "space", "space_size", "seconds", "versions"} - set(summary)
            if missing or not {"architecture", "top1", "macs", "parameters"} <= set(summary["dense"]):
                raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'facts of the dense model'}")
            if "timed" in summary:
                Timed.from_json(summary["timed"])
            return summary
        except FileNotFoundError:
            raise RunError(
                f"the search in {self.path} has not finished; run the same `poolshare search` again"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.summary} is damaged ({error!r}); run the same `poolshare search` again") from None

    def read_trust(self) -> dict[str, Any] | None:
        """What the verb `trust` wrote, a plan and a recipe before it has finished; None where there is nothing.

        Raises RunError for a damaged file.
        """
        try:
            found = read_json(self.trust)
            if found.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.trust} is damaged ({error}); remove it and trust.csv to measure trust again"
            ) from None


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
