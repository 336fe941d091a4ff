"""How a run was made, as people read it: configuration, space and data, time, versions, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import SearchConfig

CLASSES_SHOWN = 20


def run_facts(
    config: SearchConfig, summary: Mapping[str, Any], images: int, baseline: float | None
) -> dict[str, dict[str, str]]:
    """Heading → name → fact. images: scored on. baseline: see `Report`."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if value not in (None, {}, [])}
    configuration = {name.replace("_", " "): _plain(value) for name, value in settings.items()}
    space = {name.replace("_", " "): _plain(value) for name, value in summary["space"].items() if value is not None}
    space["architectures"] = f"{summary['space_size']:,}"
    if "within_budget" in summary:
        space["within the budget"] = summary["within_budget"]
    space["classes"] = _listed(summary["classes"])
    counts = summary.get("images", {})
    for split, name in (("train", "training images"), ("search", "search-validation images")):
        if split in counts:
            space[f"{name} of each class"] = _listed(counts[split], "{:,}", summary["classes"])
    if baseline is not None:
        space["most frequent class alone"] = f"{baseline:.2f} % top-1"
    space["images scored on"] = f"{images:,} (search-validation)"
    seconds = {phase: f"{spent:,.0f} s" for phase, spent in summary["seconds"].items()}
    if "phases" in summary:
        seconds |= {phase: _phase(facts) for phase, facts in summary["phases"].items()}
    facts = {"Configuration": configuration, "Space and data": space, "Time": seconds, "Versions": summary["versions"]}
    notes = {str(number): note for number, note in enumerate(summary.get("notes", ()), start=1)}
    return facts | ({"Notes": notes} if notes else {})


def _phase(facts: Mapping[str, Any]) -> str:
    """What a phase took and gained, see `job.dense.phases`."""
    text = f"{facts['seconds']:,.0f} s"
    if "dense_epochs" in facts:
        text += f", as {facts['dense_epochs']:.1f} epochs of the dense model"
    if "score" in facts:
        text += f": the dense model reaches {facts['score']:.2f} % on search-validation"
    if "gain" in facts:
        text += f": {facts['gain']:+.2f} points on the frontier against the dense model's weights"
    return text


def _listed(values: Sequence[Any], form: str = "{}", names: Sequence[str] = ()) -> str:
    """Classes, or a number for each of them; of many the first three, or the range."""
    if len(values) <= CLASSES_SHOWN:
        texts = [form.format(value) for value in values]
        return (
            ", ".join(f"{name} {text}" for name, text in zip(names, texts, strict=True)) if names else ", ".join(texts)
        )
    if names:
        return f"{form.format(min(values))} to {form.format(max(values))}, {sum(value > 0 for value in values):,} classes with any"
    return f"{len(values):,}: {', '.join(map(str, values[:3]))}, …"


def _plain(value: Any) -> str:
    """A JSON value as people write it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
