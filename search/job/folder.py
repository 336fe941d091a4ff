"""The run folder: the interface between the verbs. The lock and the files of one search."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from poolshare.space import Architecture, RunError
from poolshare.space.data_kind import DataKind, is_place
from poolshare.space.files import check_folder, digest_of, held, reading

from ..analysis.pareto import TRAINED, measured
from ..config import ADDRESSES, LOCAL, MAY_DIFFER, PLACES, SearchConfig, first_problem
from .images import FileList, changed_files, difference, write_images
from .records import FORMAT, read_csv, read_json, write_csv, write_json

if TYPE_CHECKING:
    from poolshare.supernet.latency import Latency

# Not decided until the model has been made, and what they are until then.
BY_MODEL = ("head", "levels", "operators", "max_run", "img_size", "in_chans")
UNDECIDED = (None, "even", "auto")
# Of candidates, after the architecture and its score, whose column is called as the metric of the task.
SUMS = ("correct", "sums")  # right answers, or what else the images contribute
CANDIDATES = ("total", "macs", "parameters", "generation")
MORE = ("latency_ms", "loss", "loss_margin")  # of candidates too, where they are known
FINALISTS = ("architecture", "macs", *TRAINED, "supernet_score", "score", "low", "high", "total")
SUMMARY = {"dense", "task", "score", "classes", "outputs", "certified", "space", "space_size", "seconds", "versions"}


class RunFolder:
    """A folder with the files of one search; made by `claim`, read by `open`."""

    def __init__(self, path: Path, config: SearchConfig):
        self.path, self.config = path, config
        self.tuning = path / "tuning.safetensors"  # state of the dense model's tuning
        self.dense = path / "dense.safetensors"  # the dense model, tuned
        self.training = path / "training.safetensors"  # state of the training; the one before it is kept beside it
        self.supernet = path / "supernet.safetensors"  # trained weights
        self.journal = path / "study.journal"  # the study, where it is not in a database
        self.candidates = path / "candidates.csv"
        self.losses = path / "losses.safetensors"  # without training: what was scored, image by image
        self.benchmark = path / "benchmark.csv.gz"  # a whole space with its scores
        self.latency = path / "latency.json"  # the latency table, and how far it can be trusted
        self.finalists = path / "finalists.csv"  # the best ones, trained on and scored again
        self.pareto = path / "pareto.csv"
        self.summary = path / "summary.json"
        self.trust = path / "trust.json"
        self.trust_rows = path / "trust.csv"  # what it was computed from
        self.images = path / "images.csv"  # training images that are files, so that a changed one can be named
        self.regions = path / "regions.json"  # some images, and which parts of them are one token, for the page
        self.report = path / "report.html"
        self.figure = path / "pareto.png"

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in `path`. Raises RunError where there is none, or one that cannot be read."""
        path = Path(path)
        if not (path / "config.json").is_file():
            raise RunError(
                f"{path} is not a run folder: it has no config.json; `poolshare search --out {path}` makes one"
            )
        with reading(path / "config.json", "restore it, or search into a new folder"):
            content = read_json(path / "config.json")
            found = content["format"]
            try:
                config = SearchConfig(**content["search"]) if found == FORMAT else None
            except ValidationError as error:
                raise ValueError(first_problem(error)) from None
        if config is None:
            raise RunError(
                f"{path} has format version {found!r}, this poolshare reads {FORMAT}; use the version that wrote it"
            )
        return cls(path, config)

    @classmethod
    def continued(cls, path: str | Path, config: SearchConfig) -> SearchConfig:
        """What a call with this configuration means for the run in `path`, if there is one; raises what `check` does.

        What both of them left to a default is as it was decided for the run, whatever the default is today; and weights
        that are gone are those that the run began with.
        """
        path = Path(path)
        if (path / "config.json").exists():
            folder = cls.open(path)
            earlier = folder.config
            decided = set(folder.defaults) - config.given - (set(MAY_DIFFER) - {"epochs"})
            if earlier.model.startswith(f"{config.model}."):  # with the tag that timm chose then
                decided.add("model")
            gone = config.weights and not config.weights.startswith(ADDRESSES) and not Path(config.weights).exists()
            if gone and earlier.weights:
                decided.add("weights")
            config = config.changed(**{name: getattr(earlier, name) for name in decided})
        cls.check(path, config)
        return config

    @staticmethod
    def check(path: str | Path, config: SearchConfig) -> None:
        """Raise RunError for a folder with other contents, or with a configuration that differs in more than MAY_DIFFER.

        What only the model decides, and has not decided yet, does not differ. Writes nothing; each difference is named.
        """
        path = Path(path)
        check_folder(path)
        check_outside(path, config.data)
        if (path / "config.json").exists():
            folder = RunFolder.open(path)
            earlier = folder.config
            changed = [
                f"{name}: {getattr(earlier, name)!r} there, {getattr(config, name)!r} now"
                for name in SearchConfig.model_fields
                if name not in MAY_DIFFER
                and getattr(earlier, name) != getattr(config, name)
                and not (name in BY_MODEL and getattr(config, name) in UNDECIDED)
            ]
            if earlier.data != config.data and not (is_place(earlier.data) and is_place(config.data)):
                changed.append(f"data: {earlier.data!r} there, {config.data!r} now")  # a name is no place
            by_content = folder._fact("weights_sha256") and _weights_file(config.weights)
            if earlier.weights != config.weights and not by_content:
                changed.append(f"weights: {earlier.weights!r} there, {config.weights!r} now")
            if changed:
                free = [name for name in MAY_DIFFER if name not in PLACES]
                raise RunError(
                    f"{path} was begun with another configuration ({'; '.join(changed)}); repeat that one to "
                    f"continue it (only {', '.join(free)} may differ, and where data and weights lie), or search into a "
                    "new folder"
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
        files: FileList | None = None,
        classes: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Write config.json with the fingerprint of the training images, and the kind of storage its study is in.

        files: lists images that are files, each with a word for its contents; kept in images.csv. classes: of the
        model, in the order of its head. notes: on data and weights; those of earlier calls are kept.
        Raises what `check_same` and `check_weights` do, before anything is written.
        """
        path = self.path / "config.json"
        defaults, weights = set(SearchConfig.model_fields) - self.config.given, self.check_weights(self.config)
        if path.exists():
            self.check_same(data, storage, files)
            defaults |= set(self.defaults) - set(MAY_DIFFER)  # one that is spelled out now is still a default
            if self.config.score not in ("metric", RunFolder.open(self.path).config.score):
                self.candidates.unlink(missing_ok=True)  # by right answers or another loss; the study keeps them
        earlier = self.notes if path.exists() else ()
        content = {
            "format": FORMAT,
            "data": self.data_fingerprint if path.exists() else data,
            "storage": storage,
            "search": self.config.model_dump(mode="json"),
            "defaults": sorted(defaults),
            "weights_sha256": weights,
            "classes": None if classes is None else list(classes),
            "notes": list(dict.fromkeys([*earlier, *notes])),
        }
        write_json(path, content)
        if files and not self.images.exists():
            write_images(self.images, files())

    def decide(self, config: SearchConfig, note: str) -> None:
        """Replace the configuration by one that knows what the run has found out, and why."""
        self.config = config
        content = read_json(self.path / "config.json")
        notes = list(dict.fromkeys([*content["notes"], note]))
        write_json(self.path / "config.json", content | {"search": config.model_dump(mode="json"), "notes": notes})

    def check_same(self, data: str, storage: str, files: FileList | None = None) -> None:
        """Raise RunError where the run was begun with other training images, or with its study elsewhere."""
        self.check_images(data, files)
        there = self._fact("storage")
        if there not in (None, storage):
            remedy = "give --storage, or set POOLSHARE_STORAGE" if there == "postgresql" else "leave out --storage"
            raise RunError(f"the study of {self.path} is in a {there}: {remedy}, or search into a new folder")

    def check_images(self, fingerprint: str, files: FileList | None = None) -> None:
        """Raise RunError where the run was begun with other training images, naming `files` that differ."""
        if found := difference(fingerprint, self.data_fingerprint, mended=True):
            named = changed_files(self.images, dict(files() if files else ()))
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
        """The notes on data and weights that were printed when the run was begun or continued."""
        return tuple(self._fact("notes") or ())

    def check_weights(self, config: SearchConfig) -> str | None:
        """The SHA-256 of the weights that the run begins with, None where there are none or they are not on this machine.

        Raises RunError where the file of this configuration is not the one that the run was begun with.
        """
        there = self._fact("weights_sha256") if (self.path / "config.json").exists() else None
        file = _weights_file(config.weights)
        if file is None:
            return there
        found = digest_of(file)
        if there not in (None, found):
            raise RunError(
                f"--weights {config.weights} are not those {self.path} was begun with (SHA-256 {found[:16]} now, "
                f"{there!s:.16} there); give those, or search into a new folder"
            )
        return found

    def check_trains(self, verb: str) -> None:
        """Raise RunError for a run without training, which has neither a trained supernet nor images to train on."""
        if not self.config.training:
            raise RunError(
                f"{self.path} was searched without training (--no-training), so there is nothing for `poolshare {verb}`: "
                "`poolshare export` takes a model home, `poolshare retrain` trains it further"
            )

    @property
    def defaults(self) -> list[str]:
        """The options that the run's first call left to a default."""
        found = self._fact("defaults")
        return [name for name in SearchConfig.model_fields if isinstance(found, list) and name in found]

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
        with reading(path, "move it away to score again"):
            frame = read_csv(path)
            if tuple(frame.columns) != tuple(_columns(frame)):
                raise ValueError(f"its columns are {', '.join(frame.columns)}")
            if frame.isna().any(axis=None):
                raise ValueError("a value is missing")
            sums = {name: int if name == "correct" else str for name in SUMS if name in frame}
            column = measured(frame)
            frame = frame.astype({"architecture": str, column: float, **sums} | dict.fromkeys(CANDIDATES, int))
            for text in frame["architecture"]:
                Architecture.parse(text)
            if not frame["architecture"].is_unique or frame["total"].nunique() > 1:
                raise ValueError("an architecture stands twice, or numbers of images differ")
            if "correct" in frame:
                share = 100 * frame["correct"] / frame["total"]
                if not np.allclose(frame[column], share):
                    raise ValueError(f"a {column} is not correct / total")
                frame[column] = share
            return frame

    def read_finalists(self) -> pd.DataFrame:
        """The finalists that were trained with the present weights, columns FINALISTS; none before the verb has run.

        Raises RunError for a damaged file.
        """
        if not self.finalists.exists():
            return pd.DataFrame(columns=list(FINALISTS))
        with reading(self.finalists, "move it away to train finalists again"):
            frame = read_csv(self.finalists)
            if tuple(frame.columns) != FINALISTS or frame.isna().any(axis=None):
                raise ValueError(f"its columns are {', '.join(frame.columns)}, or a value is missing")
            for text in frame["architecture"]:
                Architecture.parse(text)
            floats = dict.fromkeys(("lr", "supernet_score", "score", "low", "high"), float)
            return frame.astype(dict.fromkeys(FINALISTS, int) | {"architecture": str, "amp": str} | floats)

    def write_candidates(self, frame: pd.DataFrame) -> None:
        """Replace candidates.csv; latencies and losses are written where all rows have one."""
        write_csv(self.candidates, frame[_columns(frame)], checked=True)

    def read_latency(self) -> Latency | None:
        """The latency table that the run was searched with last; None where there is none.

        Raises RunError for a damaged file.
        """
        from poolshare.supernet.latency import Latency

        if not self.latency.exists():
            return None
        with reading(self.latency, "move it away to measure latency again"):
            found = read_json(self.latency)
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}, not {FORMAT}")
            return Latency.from_json(found)

    def latency_torch(self) -> str:
        """The version of torch that latency.json was measured with; empty where there is none."""
        if not self.latency.exists():
            return ""
        return str(read_json(self.latency).get("torch", ""))

    def write_latency(self, latency: Latency) -> None:
        """Replace latency.json. Times are nanoseconds per image; `checked` holds whole models, timed and summed."""
        errors = latency.errors
        facts: dict[str, Any] = {"format": FORMAT, **latency.to_json(), "torch": version("torch")}
        if errors:
            facts |= {"median_error": statistics.median(errors), "worst_error": errors[-1]}
        write_json(self.latency, facts)

    def read_summary(self) -> dict[str, Any]:
        """What a finished search wrote beside its candidates. Raises RunError where it is not there."""
        from ..analysis.latency_budget import Timed

        if not self.summary.exists():
            raise RunError(f"the search in {self.path} has not finished; run the same `poolshare search` again")
        with reading(self.summary, "run the same `poolshare search` again"):
            summary = read_json(self.summary)
            if summary["format"] != FORMAT:
                raise ValueError(f"format {summary['format']!r}")
            missing, dense = SUMMARY - set(summary), set(summary.get("dense", ()))
            if missing or not {"architecture", summary["task"]["column"], "macs", "parameters"} <= dense:
                raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'facts of the dense model'}")
            if "timed" in summary:
                Timed.from_json(summary["timed"])
            return summary

    def scored_by(self) -> str:
        """What the candidates of a finished search were compared by, see `--score`; empty where there are none."""
        return str(self.read_summary()["score"]) if self.summary.exists() else ""

    def read_trust(self) -> dict[str, Any] | None:
        """What the verb `trust` wrote, a plan and a recipe before it has finished; None where there is nothing.

        Raises RunError for a damaged file.
        """
        if not self.trust.exists():
            return None
        with reading(self.trust, "move it and trust.csv away to measure trust again"):
            found = read_json(self.trust)
            if found.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return found

    def read_curves(self) -> dict[str, pd.DataFrame]:
        """Columns epoch and loss of its trainings, by words for each; a table that cannot be read is as one that is not there."""
        found: dict[str, pd.DataFrame] = {}
        for words, state in (("Tuning the dense model", self.tuning), ("Training the supernet", self.training)):
            with suppress(OSError, ValueError, KeyError):
                rows = read_csv(state.with_suffix(".csv"))[["epoch", "loss"]].astype(float)
                found[words] = rows[np.isfinite(rows).all(axis=1)]
        return {words: rows for words, rows in found.items() if len(rows)}

    def read_regions(self) -> dict[str, Any] | None:
        """What `regions.write_regions` kept; None where there is nothing. Raises RunError for a damaged file."""
        if not self.regions.exists():
            return None
        with reading(self.regions, "move it away, and the page shows no images"):
            found = read_json(self.regions)
            if found["format"] != FORMAT or {*map(type, found["images"])} != {str}:
                raise ValueError(f"its format is not {FORMAT}")
            return {name: found[name] for name in ("names", "images", "architectures")}


def _weights_file(weights: str | None) -> Path | None:
    """The file that weights are read from, by itself or in a folder; None for those of a repository, or where none is.

    Raises ModelError for a folder that holds none.
    """
    if weights is None:
        return None
    place = Path(weights.removeprefix(LOCAL))
    if place.is_dir():
        from poolshare.supernet.weights import file_of

        return file_of(weights, "--weights")
    return place if place.is_file() else None


def _columns(frame: pd.DataFrame) -> list[str]:
    """Those of candidates.csv, where these are the candidates."""
    sums = [name for name in SUMS if name in frame]
    more = [name for name in MORE if name in frame and frame[name].notna().all()]
    return ["architecture", measured(frame), *sums, *CANDIDATES, *more]


def check_outside(out: Path, data: str) -> None:
    """Raise RunError for a folder among the class folders of the data, where it would count as a class itself."""
    if not data or DataKind.of(data) is not DataKind.FOLDER:
        return
    from poolshare.supernet.data.formats.folders import TEST_FOLDERS, TRAIN_FOLDERS

    root, out = Path(data).expanduser().resolve(), out.expanduser().resolve()
    parts = [root]  # whose folders are classes
    if any((root / one).is_dir() for one in TRAIN_FOLDERS):
        parts = [root / one for one in (*TRAIN_FOLDERS, *TEST_FOLDERS)]
    if any(out.is_relative_to(part) for part in parts):
        raise RunError(
            f"{out} lies in the data {data}, where it would count as a class; choose an --out outside of them"
        )
