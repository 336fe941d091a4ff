"""The Python entry: `search`, which the command line calls too, what it found as a value, and `work` beside it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from poolshare.space import Architecture, ConfigError
from poolshare.space.quantities import check_whole
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.data.given import Parts
from poolshare.supernet.data.loaders import loader_batch
from poolshare.supernet.data.splits import Data
from poolshare.supernet.tasks import Task, task_named

from .analysis.finalists import train_finalists
from .analysis.trust import Plan, measure_trust
from .config import SearchConfig, checked_config
from .console import progress_console
from .exported.export import better_with_dense, export_architecture, load_supernet
from .job import worker
from .job.folder import RunFolder
from .job.job import run_job
from .job.prepare import open_given, with_card
from .report.report import Pick, Report, load_report
from .untrained.job import run_untrained

AUGMENTING = ("hflip", "crop_scale", "color_jitter", "auto_augment", "re_prob")
# What the user's own data decide.
NOT_OWN = (
    "data_dir",
    "download",
    "search_fraction",
    "search_data",
    "search_images",
    "check_images",
    "scale_16bit",
    "img_size",
    "in_chans",
)


def search(
    data: str | Path | Parts,
    *,
    out: str | Path,
    name: str = "data",
    classes: Sequence[str] | int | None = None,
    task: Task | str = "classification",
    storage: str | None = None,
    quiet: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> SearchResult:
    """Train a supernet (or continue), search it, and leave frontier and report in the run folder `out`.

    data: what `--data` takes; or (train, validation), two torch `Dataset`s of (float image (channels, H, W), class
        index), or two `DataLoader`s of batches of them; or dictionaries of these, as Hugging Face data sets give them. Their
        transforms are the user's; architectures are scored on the validation images.
    out: the run folder; the same call continues it. name: of own data, kept in the record beside a hash of all
        images and labels. classes: names of own data's classes in index order, or their number.
    task: what the model is trained and judged for: a name, see `--task`, or an instance of one's own subclass of
        `poolshare.search.Task`, whose name is recorded.
    storage: of the study, as `--storage`. quiet: no forecast and no progress on standard error. dry_run: give the forecast
        alone; nothing is written, and the result has no run yet.
    options: what `poolshare search` takes, with underscores: model, pretrained, weights, class_map, model_args (a dict),
        levels, operators (tuples), max_run, sharing, budget, sampler, score, objective, latency_batch, latency_dtype, include,
        trials, tune_epochs, epochs, batch_size, lr, weight_decay, amp, recipe (a dict), workers, seed, device, threads; and
        data_dir, download, search_fraction, search_images, check_images, img_size, in_chans, search_data, scale_16bit, which
        own data decide by themselves.

        training=False searches the model as it is, see `--no-training`; unlabelled belongs to that.

    Raises a PoolshareError, a ValueError that says what to do, before anything is written.
    """
    _check_names(options)
    chosen = task_named(task)
    console = progress_console(quiet)
    own: Data | None = None
    options |= {
        name: str(options[name]) for name in ("model", "weights", "class_map") if isinstance(options.get(name), Path)
    }
    options = with_card(options, own=not isinstance(data, (str, Path)))
    if isinstance(data, (str, Path)):
        options["data"] = str(data)
    else:
        _check_own(name, options)
        seed, workers = options.get("seed", 0), options.get("workers", 0)
        check_whole(0, seed=seed, workers=workers)  # needed before the configuration is checked as a whole
        own = open_given(data, name, classes, seed, workers, console, chosen.targets)
        options |= _decided_by(own, options)
    if own is None and (classes is not None or name != "data"):
        raise ConfigError(f"name and classes belong to data given in Python, and data is {data!r}: leave them out")
    config = checked_config(**options, task=chosen.name)
    run = run_job if config.training else run_untrained
    return SearchResult(run(config, out, console, storage, own, chosen, dry_run).path, own, chosen)


def work(
    run: str | Path,
    data: str | Path | Parts | None = None,
    *,
    classes: Sequence[str] | None = None,
    task: Task | None = None,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score architectures beside the `search` of the run folder `run`, in a process of its own, as `poolshare worker`.

    data, classes, task: those given in Python to that search, if any. options: storage, data_dir, workers, device, threads.
    Waits for the supernet, and returns when all is scored: how many architectures were scored here, and in all.

    Raises a PoolshareError, a ValueError that says what to do, for instance for other images than those of the search.
    """
    given: dict[str, Any] = {"classes": classes, "task": task, "console": progress_console(quiet)}
    return worker.work(run, data=data, **given, **options)


@dataclass(frozen=True)
class SearchResult:
    """What a search left in its run folder; `SearchResult("runs/photos")` is one of any finished run.

    Architectures are taken as text, as `Architecture`, or as a `Pick`; "dense" is the one without savings.
    data, task: those given in Python, which `search` leaves here, its decoded images included.
    """

    folder: str | Path
    data: Data | None = field(default=None, repr=False, compare=False)
    task: Task | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @cached_property
    def run(self) -> RunFolder:
        """Its files and configuration. Raises RunError where there is no run."""
        return RunFolder.open(self.folder)

    @cached_property
    def report(self) -> Report:
        """All there is to show, by any cost."""
        return load_report(self.run)

    @property
    def candidates(self) -> pd.DataFrame:
        """One row per scored architecture: architecture, its score (top1), correct, total, macs, parameters, …"""
        return self.report.candidates

    @property
    def frontier(self) -> pd.DataFrame:
        """The candidates within the budget that no other one beats, by rising cost: that of the objective, see `Report`."""
        return self.report.by(self.report.cost)

    def pick(self, how: str | None = None, budget: str | None = None) -> Pick:
        """A point of the frontier, with `architecture` and `why`.

        how: "finalist", "half-point" (the cheapest within half a point of dense), "knee", "budget", "accuracy"; default: "budget"
        where there is one, else "knee". budget: another one than the search's, such as "60%".
        """
        report = self.report if budget is None else load_report(self.run, budget)
        return report.pick(how)

    def finalists(self, count: int = 8, *, quiet: bool = False, **options: Any) -> pd.DataFrame:
        """Train the `count` best within the budget a little further, each alone, and score them again, as `poolshare finalists`.

        options: epochs, budget, batch_size, lr, amp, data, data_dir, workers, device, threads; see `train_finalists`.
        Returns a row for each that was trained so, the best first; `pick("finalist")` then takes the winner, of finalists
        that were trained in several ways that of the largest group. Continues where it was interrupted. On data or for a
        task given in Python it needs the result that `search` returned: repeat that call.
        """
        self._check_batch(options)
        given = {"data": self.data} | options
        try:
            return train_finalists(self.run, count, console=progress_console(quiet), task=self.task, **given)
        finally:
            self.__dict__.pop("report", None)  # it knows of none, or of fewer

    def trust(
        self,
        architectures: int = 24,
        twice: int | None = None,
        bands: int = 4,
        *,
        seed: int = 0,
        data: str | None = None,
        data_dir: str | None = None,
        weights: str | None = None,
        workers: int = 0,
        device: str | None = None,
        threads: int | None = None,
        quiet: bool = False,
        **recipe: Any,
    ) -> dict[str, Any]:
        """How well supernet scores rank architectures, by Kendall's tau against training some of them alone, as `poolshare trust`.

        twice: how many of them a second time, for the ceiling; None: half. recipe: epochs, batch_size, lr, amp; left out: the
        supernet's. data, data_dir, weights: where the search's images and weights lie now, if elsewhere.
        Returns what trust.json holds, see `measure_trust`; `report.trust` has it from then on.
        Continues where it was interrupted. On data or for a task given in Python as `finalists`.
        """
        self._check_batch(recipe)
        plan = Plan(architectures, architectures // 2 if twice is None else twice, bands, seed)
        try:
            return measure_trust(
                self.run,
                plan,
                recipe_changes=recipe,
                workers=workers,
                device=device,
                threads=threads,
                console=progress_console(quiet),
                data=data or self.data,
                data_dir=data_dir,
                weights=weights,
                task=self.task,
            )
        finally:
            self.__dict__.pop("report", None)

    def model(self, architecture: Architecture | Pick | str) -> Subnet:
        """A timm model with the supernet's weights for it, in evaluation mode on the CPU; with the dense model's, where
        the search found those better.

        Raises ArchitectureError for one outside the space.
        """
        wished = self._architecture(architecture)
        better = better_with_dense(self.run, wished) is not None
        return Subnet.from_supernet(load_supernet(self.run, wished) if better else self._supernet, wished).eval()

    def export(self, architecture: Architecture | Pick | str, out: str | Path) -> dict[str, Any]:
        """The same as a new folder for `timm.create_model("local-dir:OUT")`; returns what is known about it."""
        return export_architecture(self.run, self._architecture(architecture), Path(out))

    def _check_batch(self, options: dict[str, Any]) -> None:
        if self.data is not None:
            _loaders_batch(self.data, options.get("batch_size"))

    @cached_property
    def _supernet(self) -> SuperNet:
        return load_supernet(self.run)

    def _architecture(self, wish: Architecture | Pick | str) -> Architecture:
        if isinstance(wish, Architecture):
            return wish
        text = wish.architecture if isinstance(wish, Pick) else wish
        return Architecture.parse(self.run.read_summary()["dense"]["architecture"] if text == "dense" else text)


def _check_names(options: dict[str, Any]) -> None:
    known = set(SearchConfig.model_fields) - {"data", "task", "preprocessing", "guided", "drawn_within"}
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"search has no option {option!r}; {hint}")


def _check_own(name: str, options: dict[str, Any]) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"name {name!r} is not a name for the data; give a text such as 'cells, May'")
    for option in NOT_OWN:
        if options.get(option) is not None:
            raise ConfigError(f"{option}={options[option]!r}: leave it out, the data given in Python decide it")
    for option in AUGMENTING:
        if option in (options.get("recipe") or {}):
            raise ConfigError(f"recipe {option}: leave it out, the transforms of the data given in Python do that")


def _decided_by(own: Data, options: dict[str, Any]) -> dict[str, Any]:
    """What a configuration takes from own data."""
    decided: dict[str, Any] = {"data": own.name, "img_size": own.img_size, "in_chans": own.in_chans}
    batch = _loaders_batch(own, options.get("batch_size"))
    return decided if batch is None else decided | {"batch_size": batch}


def _loaders_batch(own: Data, wished: int | None) -> int | None:
    """The batch size of own data that is a loader. Raises ConfigError where another one is wished for."""
    batch = loader_batch(own)
    if batch is not None and wished not in (None, batch):
        raise ConfigError(f"batch_size={wished}: leave it out, the training loader gives {batch}")
    return batch
