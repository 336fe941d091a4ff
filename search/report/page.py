"""One HTML file that needs nothing beside itself: the assets in `web/` with a run's numbers as JSON inside."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd

from poolshare.space import BY_COLUMN, Architecture
from poolshare.space.files import write_whole

from ..analysis.layers import in_words
from .report import Report

POINTS = 300  # of a curve
SCRIPTS = ("picture.js", "plot.js", "charts.js", "regions.js", "page.js")  # one script on the page, in this order


def write_html(report: Report, path: str | Path) -> None:
    """Write the page of a run. It asks for no other file: its content security policy forbids every request.

    Text from outside reaches the page in two ways only: escaped in the heading, and as JSON that the script shows as
    text. The policy names the script and the style sheet by their hashes, so nothing else could run anyway.
    """
    script = "\n".join(_asset(name) for name in SCRIPTS)
    style = _asset("style.css")
    certainty, verdict = report.verdict.split(":", 1)
    page = Template(_asset("page.html")).substitute(
        title=escape(report.title),
        certainty=escape(certainty),
        verdict=escape(verdict),
        facts=_facts(report.facts),
        script_hash=_hash(script),
        style_hash=_hash(style),
        script=script,
        style=style,
        data=_embedded(page_data(report)),
    )
    write_whole(Path(path), lambda part: part.write_text(page, encoding="utf-8", errors="backslashreplace"))


def page_data(report: Report) -> dict[str, Any]:
    """Everything the page draws, as JSON values. Architectures are named by their row among `candidates`."""
    rows = report.candidates.reset_index(drop=True)
    dense = {
        key: report.dense[key] for key in ("architecture", report.column, "loss", *report.costs) if key in report.dense
    }
    scored = len(rows)
    if not (rows["architecture"] == dense["architecture"]).any():
        if "correct" in rows:
            dense |= {"correct": round(report.dense_score * report.images / 100), "total": report.images}
        rows = pd.concat([rows, pd.DataFrame([dense])], ignore_index=True)
    index = {text: row for row, text in enumerate(rows["architecture"])}
    shares = report.layer_shares()
    progress = report.progress()
    return {
        "title": report.title,
        "run": report.run,
        "images": report.images,
        "score": report.metric,
        "scored": scored,  # rows after these are shown, but were not scored by the search
        "spaceSize": report.space_size,
        "certified": report.certified,
        "candidates": {"architecture": list(rows["architecture"])}
        | (
            {"correct": list(map(int, rows["correct"]))}
            if "correct" in rows
            else {"score": _numbers(rows[report.column])}
        )
        | {name: _numbers(rows[name].fillna(0)) for name in (*report.costs, "loss", "loss_margin") if name in rows},
        "loss": report.loss_words or None,
        "unit": report.unit,
        "intervals": _intervals(report, rows),
        "gaps": {
            index[text]: list(map(_short, found[2:])) for text, found in report.intervals.items() if text in index
        },
        "numbers": report.space and [report.space.rank(Architecture.parse(text)) for text in rows["architecture"]],
        # The report's own cost first: the page opens with it.
        "costs": [
            {"name": cost, "label": BY_COLUMN[cost].label}
            for cost in sorted(report.costs, key=lambda cost: cost != report.cost)
        ],
        "limits": {
            cost: {"value": limit, "text": BY_COLUMN[cost].format(limit)} for cost, limit in report.limits.items()
        },
        # Row by row of those that were scored, as characters: whole models that were timed may overrule the limits.
        "allowed": "".join("01"[int(fits)] for fits in report.candidates.index.isin(report.allowed.index)),
        "dense": index[dense["architecture"]],
        "included": [index[text] for text in report.included if text in index],
        "frontier": {cost: [index[text] for text in report.by(cost)["architecture"]] for cost in report.costs},
        "picks": {
            cost: [
                {"how": each.how, "label": each.label, "row": index[each.architecture], "why": each.why}
                for each in report.picks(cost)
            ]
            for cost in report.costs
        },
        "layers": {
            group: {"rows": _heat_rows(part), "words": in_words(part)} for group, part in shares.groupby("cost")
        },
        "progress": {name: progress[name].round(6).tolist() for name in progress},
        "curves": [_curve(words, rows) for words, rows in report.curves.items()],
        "reference": report.reference,
        "trust": report.trust,
        "retraining": report.retraining,
        "regions": _regions(report, index),
    }


def _intervals(report: Report, rows: pd.DataFrame) -> dict[int, list[float]]:
    """95 % intervals by the number of right answers, or else by the row, of those that have one."""
    keys = list(rows["correct"]) if "correct" in rows else range(len(rows))
    different = dict(zip(map(int, keys), rows.to_dict("records"), strict=True))
    found = {key: report.interval(row) for key, row in sorted(different.items())}
    return {
        key: [_short(low), _short(high)] for key, (low, high) in found.items() if low is not None and high is not None
    }


def _regions(report: Report, index: Mapping[str, int]) -> dict[str, Any] | None:
    """The kept images, and by the row of an architecture its tokens in them."""
    if report.regions is None:
        return None
    steps = {index[text]: steps for text, steps in report.regions["architectures"].items() if text in index}
    return {"names": report.regions["names"], "images": report.regions["images"], "steps": steps} if steps else None


def _curve(words: str, rows: pd.DataFrame) -> dict[str, Any]:
    """A training as the page draws it: where there are more rows than it has room for, means of neighbours."""
    points = rows.groupby(np.arange(len(rows)) * min(len(rows), POINTS) // len(rows)).mean()
    return {"title": words} | {name: _numbers(points[name]) for name in ("epoch", "loss")}


def _asset(name: str) -> str:
    return (files("poolshare.search.report") / "web" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls this inline text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end that element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _numbers(column: pd.Series) -> list[float]:
    return [_short(value) for value in column]


def _short(value: float) -> float:
    """Whole where it can be, else in the six digits that an eye or a command could want."""
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")


def _heat_rows(part: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "value": value, "shares": [round(share, 4) for share in group["share"]]}
        for (kind, value), group in part.groupby(["kind", "value"], sort=False)
    ]


def _facts(facts: Mapping[str, Mapping[str, str]]) -> str:
    sections = []
    for heading, entries in facts.items():
        pairs = "\n".join(
            f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(fact))}</dd></div>" for name, fact in entries.items()
        )
        sections.append(f"<section><h3>{escape(heading)}</h3>\n<dl>\n{pairs}\n</dl></section>")
    return "\n".join(sections)
