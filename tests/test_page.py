"""The page as a file: complete in itself, nothing that could run but its own script, the run's numbers inside."""

import base64
import hashlib
import json
import os
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from reports import ATTACK, SPACE, candidates, make_report

from poolshare.search.report.page import POINTS, SCRIPTS, page_data, write_html
from poolshare.search.report.report import Report
from poolshare.space import RunError


class Page(HTMLParser):
    """Every tag with its attributes, the text a reader sees, and the contents of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.seen = ""
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            getattr(self, f"{tag}s").append("")
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if self.inside:
            getattr(self, f"{self.inside[-1]}s")[-1] += data
        else:
            self.seen += data


def page_of(report: Report, folder) -> Page:
    write_html(report, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def attacked() -> Report:
    return make_report(
        title=f"{ATTACK} $title ${{x}}", run=f"runs/{ATTACK}", facts={ATTACK: {ATTACK: f"{ATTACK} <!-- \u2028"}}
    )


def test_page_refers_to_nothing_outside_itself(tmp_path):
    page = page_of(attacked(), tmp_path)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form"), tag
        referring = {"src", "href", "srcset", "action", "data", "poster", "background"} & attributes.keys()
        assert not referring, (tag, referring)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "style" not in attributes, "the policy would refuse it"
    assert "url(" not in "".join(page.styles)
    assert "@import" not in "".join(page.styles)
    addresses = "".join(page.scripts).replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert "://" not in addresses


def test_policy_allows_this_script_and_this_style_sheet_and_nothing_else(tmp_path):
    page = page_of(attacked(), tmp_path)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    [numbers, script], [style] = page.scripts, page.styles
    assert json.loads(numbers)["title"].startswith(ATTACK)

    def hashed(text):
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert allowed == {
        "default-src": "'none'",
        "script-src": hashed(script),
        "style-src": hashed(style),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_hostile_text_is_text(tmp_path):
    harmless, hostile = page_of(make_report(), tmp_path), page_of(attacked(), tmp_path)
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert hostile.seen.count(ATTACK) == 5  # title, heading, a group of facts, one fact's name and value
    assert "$title ${x}" in hostile.seen
    numbers = json.loads(hostile.scripts[0])
    assert numbers["run"] == f"runs/{ATTACK}"
    assert "<" not in hostile.scripts[0]


def test_page_data_are_the_runs_numbers():
    rows = candidates()
    report = make_report(rows, limits={"macs": 24e6}, included=list(rows["architecture"][[4, 7]]), certified=False)
    data = json.loads(json.dumps(page_data(report)))
    assert data["candidates"]["architecture"] == [*rows["architecture"], str(SPACE[0])]  # dense was not scored
    assert (data["scored"], data["dense"], data["included"]) == (12, 12, [4, 7])
    assert data["candidates"]["macs"][:12] == list(rows["macs"])
    assert data["candidates"]["correct"] == [*rows["correct"], round(0.99 * 540)]
    assert data["numbers"] == [*range(1, 13), 0]
    assert data["frontier"]["macs"] == [row for row in range(12) if rows["macs"][row] <= 24e6]
    assert data["limits"]["macs"] == {"value": 24e6, "text": "24.0 M MACs"}
    for pick in data["picks"]["macs"]:
        assert report.pick(pick["how"]).architecture == rows["architecture"][pick["row"]]
    assert data["progress"]["evaluations"] == list(range(1, 13))
    assert set(data["layers"]) == {"macs", "parameters", "all"}
    [shares] = [row["shares"] for row in data["layers"]["all"]["rows"] if row["kind"] == "shares"]
    table = report.layer_shares()
    assert shares == pytest.approx(table[(table["cost"] == "all") & (table["kind"] == "shares")]["share"], abs=1e-4)


def test_a_curve_is_shown_in_means_of_as_many_points_as_there_is_room_for():
    rows = pd.DataFrame({"epoch": np.arange(1, 2001) / 100, "loss": 1 / np.arange(1, 2001)})
    curves = {"Tuning the dense model": rows[:7], "Training the supernet": rows}
    short, long = page_data(make_report(curves=curves))["curves"]
    assert (short["title"], short["loss"]) == ("Tuning the dense model", pytest.approx(rows["loss"][:7], rel=1e-5))
    parts = np.array_split(rows["loss"], POINTS)
    assert (len(long["loss"]), len(long["epoch"])) == (POINTS, POINTS)
    assert sum(len(part) * loss for part, loss in zip(parts, long["loss"], strict=True)) == pytest.approx(
        rows["loss"].sum(), rel=0.05
    )
    assert long["loss"] == sorted(long["loss"], reverse=True)
    assert page_data(make_report())["curves"] == []


def test_page_tells_the_verdict_and_the_facts_without_its_script(tmp_path):
    page = page_of(make_report(facts={"Time": {"training": "130 s"}}), tmp_path)
    assert "Certified: all" in page.seen
    assert "130 s" in page.seen
    assert "pareto.csv and candidates.csv" in " ".join(page.seen.split())


def test_page_survives_a_failed_write(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match=r"report\.html cannot be written \(disk full\)"):
        write_html(make_report(), target)
    assert os.listdir(tmp_path) == ["report.html"]
    assert target.read_text() == "old"


def test_every_asset_is_packaged():
    root = Path(__file__).parents[1]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "poolshare.search.report"
    ]
    covered = {path.name for pattern in packaged for path in (root / "search" / "report").glob(pattern)}
    assert covered == {path.name for path in (root / "search" / "report" / "web").iterdir()}
    assert covered >= {*SCRIPTS, "page.html", "style.css"}
