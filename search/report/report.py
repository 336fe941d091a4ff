"""The report of a run: its candidates, the frontier by any cost, notable points and why, facts.

How it is shown lies elsewhere: `terminal` in characters, `figure` as a PNG, `page` as one HTML file.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd

from poolshare.space import (
    BY_COLUMN,
    COSTS,
    BudgetError,
    ConfigError,
    RunError,
    SearchSpace,
    budget_quantity,
    parse_budget,
)
from poolshare.space.quantities import LATENCY, human

from ..analysis.guard import against_dense
from ..analysis.latency_budget import Timed
from ..analysis.layers import layer_shares
from ..analysis.pareto import (
    PICKS,
    binomial_interval,
    compared,
    frontier,
    hypervolume,
    measured,
    pick,
    progress,
    ranked,
    score_of,
)
from ..config import SearchConfig, retraining_epochs
from ..console import printable
from ..counts import TOP1
from ..job.folder import RunFolder
from .facts import run_facts

COLUMNS = ("architecture", "total", "macs", "parameters")
DENSE_FIELDS = ("architecture", "macs", "parameters")
INTERVAL = tuple[float | None, float | None]  # low and high; None: unknown


class Row(NamedTuple):
    """One line of a table: percentages as numbers, counts with their unit."""

    architecture: str
    score: float
    low: float | None  # end of the 95 % interval
    high: float | None
    macs: str
    of_dense: float  # percent of the dense network's cost
    parameters: str
    latency: str  # empty where it was not measured
    loss: str = ""  # with its margin, in nats; empty where there is none


class Pick(NamedTuple):
    """A notable architecture."""

    how: str  # "finalist" or one of pareto.PICKS
    label: str
    architecture: str
    why: str


class Retraining(NamedTuple):
    """What the time of retraining is computed from."""

    epochs: int  # by default
    seconds: float  # that these epochs would take if each step took as long as one of the search's training
    step_macs: float  # of one image in a step of that
    teacher: float  # what a teacher's forward takes of such a step


@dataclass(frozen=True)
class Report:
    """One run. Frames have the columns of `pareto`; macs are per image, scores at most 100."""

    title: str
    candidates: pd.DataFrame
    dense: Mapping[str, Any]  # architecture, macs, score, parameters (and latency_ms) of the unreduced network
    certified: bool  # the whole space was scored
    space_size: int
    run: str  # the run folder, as commands name it
    limits: Mapping[str, float] = field(default_factory=dict)  # the budget: cost column → the most that is allowed
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # heading → name → fact
    timed: Timed | None = None  # whole models, where there was a latency budget to keep
    budget: str | None = None  # in words
    included: Sequence[str] = ()  # architectures that the user asked to be scored
    trust: Mapping[str, Any] | None = None  # trust.json
    finalists: pd.DataFrame | None = None  # finalists.csv; None: none were trained
    space: SearchSpace | None = None
    cheapest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # cost column → the cheapest of the space
    retraining: Retraining | None = None  # None where its time is unknown
    baseline: float | None = None  # top-1 in percent of always answering with the most frequent class
    notes: Sequence[str] = ()  # what the user should know of data and weights
    untrained: bool = False  # nothing was trained, and no weights were given
    within: float | None = None  # share of the dense MACs that the supernet's training kept to; None: it trained all
    looked_at: int | None = None  # without training: how many were scored, most of them on some images only
    labelled: bool = True  # without labels the score is agreement with the dense network
    metric: str = TOP1.metric  # what the score is called
    # Of architectures whose score is no share: low and high end of the 95 % interval, and of the difference from dense.
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    loss_words: str = ""  # what architectures are compared by, where not by the score, and its unit
    unit: str = "nats"
    objective: str = "macs"  # the cost column that the search weighed against accuracy
    curves: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # words for a training → its epochs and losses
    regions: Mapping[str, Any] | None = None  # regions.json: images and their tokens; None: none were kept
    with_dense: Mapping[str, float] | None = None  # scores with the tuned dense model's weights; None: there is none

    def __post_init__(self) -> None:
        for name, part, needed in (
            ("candidates frame", self.candidates, COLUMNS),
            ("dense row", self.dense, (*DENSE_FIELDS, self.column)),
        ):
            missing = [column for column in needed if column not in part]
            if missing:
                raise RunError(f"a report's {name} lacks {missing[0]!r}; it needs {', '.join(needed)}")
        if self.candidates.empty:
            raise RunError("there is no frontier to report: no architecture has been scored yet")

    @property
    def costs(self) -> tuple[str, ...]:
        """The cost columns that candidates and dense network both have."""
        return tuple(cost for cost in BY_COLUMN if cost in self.candidates and cost in self.dense)

    @property
    def column(self) -> str:
        """The column of the score, in the candidates frame and of the dense network."""
        return measured(self.candidates)

    @property
    def dense_score(self) -> float:
        """Of the dense network."""
        return float(self.dense[self.column])

    def interval(self, row: Mapping[str, Any]) -> INTERVAL:
        """The 95 % interval of a candidate's score; unknown of most where scores are no shares of right answers."""
        if "correct" in row:
            low, high = binomial_interval(int(row["correct"]), int(row["total"]))
            return float(low), float(high)
        found = self.intervals.get(str(row["architecture"]))
        return (None, None) if found is None else (found[0], found[1])

    @property
    def cost(self) -> str:
        """The default cost column: latency under a budget of latency, else the objective."""
        return "latency_ms" if "latency_ms" in self.limits else self.objective

    @property
    def images(self) -> int:
        """How many search-validation images each candidate was scored on."""
        return int(self.candidates["total"].iloc[0])

    @property
    def allowed(self) -> pd.DataFrame:
        """The candidates within the budget. Raises BudgetError where there is none."""
        rows = self.candidates
        for cost, limit in self.limits.items():
            if cost not in rows:
                raise RunError(
                    f"the candidates of {self.run} have no {BY_COLUMN[cost].label}, and the budget is one; let its search finish"
                )
            fits = rows[cost] <= limit
            if cost == "latency_ms" and self.timed and self.budget:
                fits = self.timed.keeps(rows, self.dense["latency_ms"], self.budget)
                if not fits.any():
                    raise BudgetError(
                        f"none of the candidates keeps {self.budget}, as whole models of them were timed (the shortest takes "
                        f"{self.timed.shortest}); ask for more"
                    )
            if not fits.any():
                raise BudgetError(self._too_tight(rows, cost, limit))
            rows = rows[fits]
        return rows

    def _too_tight(self, rows: pd.DataFrame, cost: str, limit: float) -> str:
        """Why no candidate is within a limit: the space holds none, or none was scored."""
        scored, show = rows.loc[rows[cost].idxmin()], BY_COLUMN[cost].format
        problem = (
            f"none of the {len(rows):,} architectures that were scored stays within {show(limit)}; the cheapest of "
            f"them, {scored['architecture']}, needs {show(scored[cost])}"
        )
        whole = self.cheapest.get(cost)
        if whole is None or whole[cost] >= scored[cost]:
            return f"{problem}, so ask for at least that"
        problem += f", the cheapest of the space, {whole['architecture']}, {show(whole[cost])}"
        if whole[cost] > limit:
            return f"{problem}, so ask for at least that and search again"
        return f"{problem}: search with this budget, so that those within it are scored"

    @property
    def frontier(self) -> pd.DataFrame:
        """The frontier by MACs, within the budget."""
        return self.by("macs")

    def by(self, cost: str) -> pd.DataFrame:
        """The frontier by any of `costs`, within the budget; the index is new. Raises RunError for other costs."""
        if cost not in self.costs:
            label = BY_COLUMN[cost].label if cost in BY_COLUMN else cost
            known = ", ".join(BY_COLUMN[one].label for one in self.costs)
            raise RunError(f"{self.run} has no {label} of its candidates; it has {known}")
        return frontier(self.allowed, cost)

    @property
    def against_dense(self) -> str:
        """What the default pick loses against the dense model of the same training; empty where none was tuned."""
        if self.with_dense is None:
            return ""
        chosen = self.pick()
        row = self.candidates[self.candidates["architecture"] == chosen.architecture].iloc[0]
        score = max(float(row[self.column]), self.with_dense.get(chosen.architecture, -math.inf))
        if "correct" in row:
            high = float(binomial_interval(round(score * self.images / 100), self.images)[1])
        else:  # of the same images, by which both were scored
            high = self.dense_score + self.intervals.get(chosen.architecture, (math.inf,))[-1]
        share = float(row["macs"]) / float(self.dense["macs"])
        return against_dense(score, high, self.dense_score, share)

    @property
    def warnings(self) -> list[str]:
        """The notes that begin with "warning:"."""
        return [note for note in self.notes if note.startswith("warning:")]

    @property
    def verdict(self) -> str:
        """How far the frontier can be trusted to be the best there is, in words."""
        if self.untrained:
            return (
                "Meaningless: nothing was trained and no weights were given, so these are the scores of random weights; train "
                "(--epochs 1 or more), or begin with --pretrained or --weights."
            )
        least = "" if self.baseline is None else f" The most frequent class alone makes {self.baseline:.2f} %."
        return self._certainty + least

    @property
    def _certainty(self) -> str:
        untrained = ""
        if self.with_dense is not None:
            untrained = f" Before any retraining {self.against_dense.removeprefix('warning: ')}."
        elif self.within is not None:
            untrained = (
                f" The supernet was trained on architectures up to {self.within:.0%} of the dense MACs alone: the scores of more "
                "expensive ones, and of the dense network, are too low."
            )
            if self.within == 1:
                untrained = (
                    " The supernet was trained on draws from the whole space, seldom on the dense network: that one's score is "
                    "too low."
                )
        if self.looked_at is not None:
            answers = "right answers" if self.labelled else "answers like the dense network's"
            counted = f"; {self.metric} counts {answers}" if "correct" in self.candidates else ""
            return (
                f"Found: the least damaging of {self.looked_at:,} architectures that were tried without training, of the space's "
                f"{self.space_size:,}; {len(self.candidates)} of them were scored on all {self.images:,} images. The loss is the "
                f"{self.loss_words}{self.unit and f' in {self.unit}'}{counted}.{untrained}"
            )
        if self.loss_words:
            untrained += (
                f" Architectures are compared by their loss, the {self.loss_words}{self.unit and f' in {self.unit}'}."
            )
        if self.certified:
            return (
                f"Certified: all {self.space_size:,} architectures of the space were scored, "
                f"and none of them beats this frontier on the search-validation images.{untrained}"
            )
        return (
            f"Found: {len(self.candidates):,} of the space's {self.space_size:,} architectures were scored; "
            f"better ones may exist among the rest.{untrained}"
        )

    @property
    def reference(self) -> tuple[float, float]:
        """The hypervolume's reference: the worst score, at the dense network's MACs."""
        return min(float(self.candidates[self.column].min()), 99.99), float(self.dense["macs"])

    @property
    def hypervolume(self) -> float:
        """Share, 0 to 1, of the rectangle between `reference` and 100 % at no MACs that the candidates dominate."""
        return hypervolume(self.candidates, self.reference)

    def progress(self) -> pd.DataFrame:
        """The hypervolume over evaluations, see `pareto.progress`."""
        return progress(self.candidates, self.reference)

    def layer_shares(self) -> pd.DataFrame:
        """What the frontier by each cost, and all candidates (cost "all"), have in common; see `layers`."""
        groups = {cost: self.by(cost)["architecture"] for cost in self.costs} | {"all": self.candidates["architecture"]}
        parts = [layer_shares(list(texts)).assign(cost=cost) for cost, texts in groups.items()]
        return pd.concat(parts, ignore_index=True)[["cost", "kind", "value", "layer", "share"]]

    def pick(self, how: str | None = None, cost: str | None = None) -> Pick:
        """The best finalist, or the point of the frontier by `cost` that `how` names, and why.

        how: None: "budget" where there is one, else "knee". cost: None: that of the report. Raises RunError where no
        finalist within the budget was trained; see `pareto.pick` for what else can go wrong.
        """
        how = how or ("budget" if self.limits else "knee")
        cost = cost or self.cost
        if how == "finalist":
            return self._best_finalist()
        limit = next(iter(self.limits.items()), None)
        if how == "budget" and limit is None:
            raise ConfigError("picking by 'budget' needs a budget; give --budget, or pick by another rule")
        if how == "budget" and limit is not None:
            cost = limit[0]
        if how == "half-point" and self.within is not None and self.with_dense is None:
            raise ConfigError(
                f"the dense network took little or no part in the supernet's training (--recipe within={self.within:g}): "
                "nothing can be compared with its score; pick by 'budget', 'knee' or 'accuracy'"
            )
        dense = self.dense_score
        rule = "accuracy" if how == "budget" else how  # the frontier holds what is within the budget and no more
        row = pick(self.by(cost), rule, cost=cost, dense=dense)
        best = "least damaging" if score_of(self.candidates) == "loss" else "most accurate"
        timed = self.timed.words(str(row["architecture"])) if self.timed else ""
        label, why = {
            "half-point": (
                "Half a point from dense",
                f"the least {BY_COLUMN[cost].label} that loses at most half a point against the dense network's {dense:.2f} %",
            ),
            "knee": (
                "Knee",
                "farthest above the straight line between the frontier's ends: beyond it, gains get expensive",
            ),
            "budget": (
                "Within budget",
                f"the {best} within {BY_COLUMN[cost].format(limit[1]) if limit else ''}",
            ),
            "accuracy": (best.capitalize(), f"the {best}; of equals, the cheapest"),
        }[how]
        return Pick(how, label, str(row["architecture"]), why + timed)

    def _best_finalist(self) -> Pick:
        rows = self.finalists
        every = None if rows is None else rows[rows["architecture"].isin(set(self.allowed["architecture"]))]
        rows = None if every is None else compared(every)
        if every is None or rows is None or rows.empty:
            wish = ["--budget", self.budget] if self.budget else []
            raise RunError(
                f"no finalist within the budget was trained yet; `{shlex.join(['poolshare', 'finalists', self.run, *wish])}` "
                "does that"
            )
        best = ranked(rows).iloc[0]
        after, before = best["score"], best["supernet_score"]
        epochs = "one epoch" if best["epochs"] == 1 else f"{best['epochs']} epochs"
        if len(every[["batch_size", "lr", "amp"]].drop_duplicates()) > 1:
            epochs += f" (batch {best['batch_size']}, lr {best['lr']:g}, amp {best['amp']})"
        of = "the only finalist" if len(rows) == 1 else f"the best of {len(rows)} finalists"
        why = f"{of}: {after:.2f} % after {epochs} alone, {before:.2f} % before"
        return Pick("finalist", "Best finalist", str(best["architecture"]), why)

    def picks(self, cost: str | None = None) -> list[Pick]:
        """Every pick that this run has; cost: None: that of the report."""
        picks = []
        for how in ("finalist", *PICKS):
            try:
                picks.append(self.pick(how, cost))
            except (ConfigError, RunError):
                continue
        return picks

    def rows(self, frame: pd.DataFrame, cost: str = "macs") -> list[Row]:
        """A frame's rows as people read them, `of_dense` by `cost`."""
        return [
            Row(
                str(row["architecture"]), float(row[self.column]), *self.interval(row), human(row["macs"]),
                100 * row[cost] / self.dense[cost], human(row["parameters"]),
                LATENCY.format(row["latency_ms"]) if "latency_ms" in row else "",
                (f"{row['loss']:.4f}" if "loss" in row else "")
                + (f"±{row['loss_margin']:.4f}" if "loss_margin" in row else ""),
            )
            for row in frame.to_dict("records")
        ]  # fmt: skip

    @property
    def dense_row(self) -> Row:
        """The same of the dense network, without an interval."""
        dense = self.dense
        latency = LATENCY.format(dense["latency_ms"]) if "latency_ms" in dense else ""
        return Row(
            f"dense: {dense['architecture']}", self.dense_score, None, None, human(dense["macs"]), 100.0,
            human(dense["parameters"]), latency, f"{dense.get('loss', 0):.4f}",
        )  # fmt: skip

    def export_command(self, architecture: str) -> str:
        """The shell command that exports an architecture."""
        out = f"{self.run}-export"
        return shlex.join(["poolshare", "export", self.run, "--architecture", architecture, "--out", out])


def load_report(folder: RunFolder, budget: str | None = None) -> Report:
    """The report of a finished run, from its files alone, within its own budget or within another.

    Raises RunError where files are missing or damaged, BudgetError for a budget that no candidate keeps.
    """
    summary, candidates = folder.read_summary(), folder.read_candidates()
    dense, trust = summary["dense"], folder.read_trust()
    limits, task, scored_by = _limits(summary, budget), summary["task"], summary["score"]
    baseline = _baseline(folder.config, summary)
    report = Report(
        title=printable(folder.config.title)
        + (f", {folder.config.task}" if folder.config.task != "classification" else ""),
        candidates=candidates,
        dense=dense,
        certified=summary["certified"] and len(candidates) == summary["space_size"],
        space_size=summary["space_size"],
        run=str(folder.path),
        limits=limits,
        timed=Timed.from_json(summary["timed"]) if "timed" in summary and "latency_ms" in limits else None,
        budget=budget or summary.get("budget"),
        facts=run_facts(folder.config, summary, int(candidates["total"].iloc[0]), baseline),
        included=tuple(summary.get("included", ())),
        trust=trust if trust and "tau" in trust else None,  # else not measured to the end
        finalists=folder.read_finalists() if folder.finalists.exists() else None,
        space=SearchSpace(**summary["space"]),
        cheapest=summary.get("cheapest", {}),
        retraining=_retraining(folder.config, summary, candidates),
        within=folder.config.within,
        baseline=baseline,
        notes=summary.get("notes", ()),
        untrained=folder.config.epochs == 0 and not folder.config.warm,
        with_dense=summary.get("with_dense_weights"),
        looked_at=summary.get("looked_at"),
        curves=folder.read_curves(),
        regions=folder.read_regions(),
        labelled=summary.get("labelled", True),
        metric=task["metric"],
        intervals=summary.get("intervals", {}),
        loss_words="" if scored_by == "metric" else task[scored_by],
        unit=task["unit"],
        objective=COSTS[summary.get("objective", "macs")].column,
    )
    if (text := report.against_dense).startswith("warning:"):
        report = replace(report, notes=(*report.notes, text))
    _ = report.frontier  # a budget that nothing keeps is refused here
    return report


def _limits(summary: Mapping[str, Any], budget: str | None) -> dict[str, float]:
    """The run's own budget, or another in words; a percentage is of what the run weighed against the score."""
    objective = summary.get("objective", "macs")
    if budget is None:
        own = {cost.column: summary.get(f"budget_{cost.column}") for cost in COSTS.values()}
        return {column: limit for column, limit in own.items() if limit is not None}
    cost = COSTS[budget_quantity(budget, objective)]
    if cost.column not in summary["dense"]:
        raise BudgetError(
            f"budget {budget!r} is one of {cost.label}, which this run has not measured; repeat its `poolshare search` with "
            f"--budget {budget}, which trains nothing again"
        )
    dense = round(summary["dense"][cost.column] * cost.scale)
    return {cost.column: parse_budget(budget, dense, cost.quantity) / cost.scale}


def _baseline(config: SearchConfig, summary: Mapping[str, Any]) -> float | None:
    """Top-1 in percent of always answering with the search-validation images' most frequent class; None: it is not known."""
    counts = summary.get("images", {}).get("search")
    return 100 * max(counts) / sum(counts) if counts and config.task == "classification" else None


def _retraining(config: SearchConfig, summary: Mapping[str, Any], candidates: pd.DataFrame) -> Retraining | None:
    """Estimated from the time that tuning the dense model, or else the supernet, took on the same machine.

    A supernet's step trains the dense network, the cheapest, and two between them, or six from the cheapest to the
    recipe's limit; a retraining's has the teacher's forward besides. Retraining sees all the images.
    """
    dense, least, within = summary["dense"]["macs"], float(candidates["macs"].min()), config.within
    if config.guided:
        trained, phase = config.tune_epochs, "tuning"
        step, teacher = dense, config.teaches / 3  # one forward beside a forward and a backward
    else:
        trained, phase, teacher = config.epochs, "training", 0.0
        step = 2 * (dense + least) if within is None else 6 * (within * dense + least) / 2
    seconds = summary["seconds"].get(phase, 0)
    if not seconds or not trained:
        return None
    sizes = summary["split_sizes"]
    images = sum(sizes.values())
    epochs = retraining_epochs(config, images)
    return Retraining(epochs, seconds / trained / sizes["train"] * images * epochs, step, teacher)
