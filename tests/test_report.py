"""What a report says about a run: frontiers by any cost, picks and why, verdicts, numbers as people read them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from reports import SPACE, WORDS, candidates, make_report

from poolshare.search import SearchResult
from poolshare.search import api as entry
from poolshare.search.analysis.layers import in_words, layer_shares, ranges
from poolshare.search.analysis.pareto import PICKS, frontier, hypervolume, pick, progress
from poolshare.search.config import checked_config
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.records import FORMAT, write_json
from poolshare.search.report.report import load_report
from poolshare.search.report.write import write_report
from poolshare.space import COSTS, Architecture, BudgetError, ConfigError, RunError
from poolshare.space.quantities import human


def finished_run(path: Path, rows: pd.DataFrame | None = None, **summary) -> RunFolder:
    """A run folder with the files that a report is made from."""
    path.mkdir()
    folder = RunFolder(path, checked_config(data="digits", epochs=4))
    folder.write_config("fingerprint")
    rows = candidates() if rows is None else rows
    folder.write_candidates(rows)
    made = make_report(rows)
    facts = {
        "format": FORMAT, "dense": dict(made.dense), "budget_macs": None, "classes": ["0", "1"], "certified": False,
        "space": SPACE.to_json(), "space_size": SPACE.size,
        "split_sizes": {"train": 700, "search": 300}, "seconds": {"training": 60.0, "scoring": 5.0},
        "versions": {"python": "3"}, **WORDS,
    }  # fmt: skip
    write_json(folder.summary, facts | summary)
    return RunFolder.open(path)


def test_frontiers_by_other_costs_are_those_of_brute_force_within_the_budget():
    generator = np.random.default_rng(0)
    rows = candidates(200)
    rows["correct"] = generator.integers(400, 540, 200)
    rows["top1"] = 100 * rows["correct"] / 540
    rows["parameters"] = generator.integers(1000, 1100, 200)
    rows["latency_ms"] = generator.integers(1, 60, 200) / 4
    dense = {**make_report().dense, "latency_ms": 20.0}
    report = make_report(rows, dense=dense, limits={"macs": 25e6})
    assert report.costs == ("macs", "parameters", "latency_ms")
    inside = rows[rows["macs"] <= 25e6]
    for cost in report.costs:
        best = {
            (row[cost], row["top1"])
            for _, row in inside.iterrows()
            if not (
                ((inside["top1"] > row["top1"]) & (inside[cost] <= row[cost]))
                | ((inside["top1"] >= row["top1"]) & (inside[cost] < row[cost]))
            ).any()
        }
        found = report.by(cost)
        assert set(zip(found[cost], found["top1"], strict=True)) == best
        assert len(found) == len(best)
    with pytest.raises(RunError, match="has no latency of its candidates; it has MACs, parameters"):
        make_report().by("latency_ms")
    with pytest.raises(BudgetError, match=r"within 1.00 M MACs.* needs 10.0 M MACs, so ask for at least that"):
        _ = make_report(limits={"macs": 1e6}).frontier


def test_a_budget_that_nothing_scored_keeps_is_told_the_cheapest_of_the_space_too():
    def problem(cheapest: dict) -> str:
        with pytest.raises(BudgetError) as caught:
            _ = make_report(limits={"macs": 6e6}, cheapest=cheapest).frontier
        return str(caught.value)

    scored = candidates()
    row = scored.loc[scored["macs"].idxmin()]
    of_them = f"the cheapest of them, {row['architecture']}, needs 10.0 M MACs"
    alone = problem({"macs": {"architecture": row["architecture"], "macs": int(row["macs"])}})
    assert f"none of the {len(scored):,} architectures that were scored stays within 6.00 M MACs" in alone
    assert of_them in alone
    assert "of the space" not in alone
    dearer = problem({"macs": {"architecture": "64 16@max2d*7", "macs": 8_000_000}})
    assert f"{of_them}, the cheapest of the space, 64 16@max2d*7, 8.00 M MACs, so ask for at least that" in dearer
    inside = problem({"macs": {"architecture": "64 16@max2d*7", "macs": 5_000_000}})
    assert f"{of_them}, the cheapest of the space, 64 16@max2d*7, 5.00 M MACs: search with this budget" in inside


@pytest.mark.parametrize("size", ["about 628,000", "627,995"])
def test_a_report_says_how_many_are_within_the_budget_and_whether_that_is_exact(tmp_path: Path, size: str):
    folder = finished_run(tmp_path / "run", within_budget=size)
    assert load_report(folder).facts["Space and data"]["within the budget"] == size
    write_report(folder)
    assert size in folder.report.read_text(encoding="utf-8")


def test_picks_are_named_with_their_reason():
    rows = candidates()
    report = make_report(rows, dense={**make_report().dense, "top1": 93.0}, limits={"macs": 36e6})
    picks = {each.how: each for each in report.picks()}
    assert set(picks) == set(PICKS)
    by_text = rows.set_index("architecture")
    close = by_text.loc[picks["half-point"].architecture]
    assert close["top1"] >= 92.5
    assert (rows[rows["macs"] < close["macs"]]["top1"] < 92.5).all()
    assert "at most half a point" in picks["half-point"].why
    assert "93.00 %" in picks["half-point"].why
    allowed = rows[rows["macs"] <= 36e6]
    assert picks["budget"].architecture == allowed["architecture"].iloc[-1] == picks["accuracy"].architecture
    assert "36.0 M MACs" in picks["budget"].why
    assert [each.how for each in make_report().picks()] == ["half-point", "knee", "accuracy"]
    far = make_report(dense={**make_report().dense, "top1": 100.5})
    assert "half-point" not in {each.how for each in far.picks()}
    with pytest.raises(RunError, match="more than half a point below"):
        far.pick("half-point")
    with pytest.raises(ConfigError, match="needs a budget"):
        make_report().pick("budget")
    with pytest.raises(ConfigError, match="needs the dense network's score"):
        pick(rows, "half-point")


@pytest.mark.parametrize("how", [None, "half-point", "knee", "accuracy", "budget"])
@pytest.mark.parametrize("budget", [None, "18ms", "20M"])
def test_every_verb_gives_the_same_answer_to_which_is_picked(how, budget, verb, tmp_path, monkeypatch):
    generator = np.random.default_rng(4)
    rows = candidates(24).assign(latency_ms=generator.permutation(np.linspace(9, 40, 24)))
    dense = {**make_report().dense, "latency_ms": 41.0, "top1": 86.0}
    facts = {"dense": dense, "objective": "latency", "budget": "30ms", "budget_latency_ms": 30.0}
    folder = finished_run(tmp_path / "run", rows, **facts)
    taken = []
    monkeypatch.setattr(entry, "export_architecture", lambda run, chosen, out: taken.append(str(chosen)) or {})
    found = SearchResult(folder.path)
    words = [part for name, value in (("--budget", budget), ("--pick", how)) if value for part in (name, value)]
    chosen = found.pick(how, budget)
    status, _, err = verb("export", folder.path, *words, "--out", tmp_path / "out", "--json")
    assert (status, taken) == (0, [chosen.architecture]), err
    status, out, err = verb("pareto", folder.path, *words, "--json")
    assert status == 0, err
    shown = json.loads(out)
    limits = load_report(folder, budget).limits
    allowed = rows[np.logical_and.reduce([rows[cost] <= limit for cost, limit in limits.items()])]
    if how is None:
        assert chosen.architecture == allowed.sort_values("top1")["architecture"].iloc[-1]
        return
    assert shown["pick"] == chosen._asdict()
    by_latency = frontier(allowed, "latency_ms")
    expected = pick(by_latency, "accuracy" if how == "budget" else how, cost="latency_ms", dense=86.0)
    assert chosen.architecture == expected["architecture"]
    assert [row["architecture"] for row in shown["frontier"]] == list(by_latency["architecture"])


def test_without_a_budget_the_knee_by_the_objective_is_picked():
    rows = candidates(24)
    rows["latency_ms"] = np.random.default_rng(4).permutation(np.linspace(9, 40, 24))
    report = make_report(rows, dense={**make_report().dense, "latency_ms": 41.0}, objective="latency_ms")
    assert report.pick().architecture == pick(frontier(rows, "latency_ms"), "knee", cost="latency_ms")["architecture"]
    assert report.pick() != report.pick(cost="macs")


def test_progress_is_the_hypervolume_of_what_was_scored_so_far():
    generator = np.random.default_rng(1)
    rows = candidates(50).sample(frac=1, random_state=2)
    rows["top1"] = generator.uniform(50, 99, 50)
    reference = (50.0, 40e6)
    found = progress(rows, reference)
    assert list(found["evaluations"]) == list(range(1, 51))
    for count, value in found.itertuples(index=False):
        assert value == pytest.approx(hypervolume(rows.head(int(count)), reference))
    few = progress(rows, reference, points=7)
    assert (few["evaluations"].iloc[0], few["evaluations"].iloc[-1]) == (1, 50)
    assert few["hypervolume"].iloc[-1] == pytest.approx(found["hypervolume"].iloc[-1])


def test_layer_shares_count_what_each_layer_does():
    texts = [str(SPACE[rank]) for rank in range(0, SPACE.size, 97)]
    paths = [Architecture.parse(text).layers for text in texts]
    table = layer_shares(texts)
    for kind, value, layer, share in table.itertuples(index=False):
        hits = {
            "tokens": lambda one, value=value: one.tokens == int(value),
            "drops": lambda one, value=value: one.operator == value,
            "shares": lambda one: one.shared,
        }[kind]
        assert share == pytest.approx(sum(hits(path[layer]) for path in paths) / len(paths))
    assert list(dict.fromkeys(table["kind"])) == ["tokens", "drops", "shares"]
    assert list(dict.fromkeys(table[table["kind"] == "tokens"]["value"])) == ["64", "16", "4"]
    assert set(table["layer"]) == set(range(8))


def test_layer_shares_in_words():
    assert in_words(layer_shares(["9 9 4@max2d*2", "9 4@max2d*2 4"])) == (
        "From layer 1 on, at least half of these architectures work on fewer tokens. "
        "Sharing is most common at layers 2-3: 50% of them."
    )
    assert in_words(layer_shares(["9 9 9"])) == (
        "At every layer most of these architectures still work on all tokens. None of them shares attention."
    )
    assert ranges([3, 4, 5, 8]) == "3-5, 8"


def test_verdicts():
    assert make_report().verdict.startswith(f"Certified: all {SPACE.size:,} architectures")
    found = replace(make_report(), certified=False).verdict
    assert found.startswith(f"Found: 12 of the space's {SPACE.size:,} architectures were scored")
    assert "better ones may exist" in found


def test_a_runs_report_comes_from_its_files(tmp_path):
    included = [candidates()["architecture"].iloc[3]]
    folder = finished_run(tmp_path / "run", budget_macs=20_000_000, included=included)
    write_json(folder.path / "trust.json", {"format": 1, "plan": {}})  # begun, not finished
    report = load_report(folder)
    assert report.limits == {"macs": 20_000_000}
    assert report.included == tuple(included)
    assert report.trust is None
    assert report.facts["Configuration"]["seed"] == "0"
    assert report.facts["Time"] == {"training": "60 s", "scoring": "5 s"}
    # 4 epochs over 70 % of the images took 60 s, each step with dense, cheapest and two between them.
    assert report.retraining == (15, pytest.approx(60 / 4 / 0.7 * 15), 40e6 + 10e6 + 2 * 25e6, 0.0)
    assert load_report(folder, "50%").limits == {"macs": 20_000_000}
    (folder.path / "trust.json").write_text("{")
    with pytest.raises(RunError, match=r"trust.json is damaged"):
        load_report(folder)


def test_every_picture_has_its_numbers_in_a_file_beside_it(tmp_path):
    folder = finished_run(tmp_path / "run")
    report = write_report(folder)
    names = {path.name for path in folder.path.iterdir()}
    assert {"report.html", "pareto.png", "candidates.csv", "layers.csv", "progress.csv"} <= names
    layers = pd.read_csv(folder.path / "layers.csv", keep_default_na=False)
    assert set(layers["cost"]) == {"macs", "parameters", "all"}
    assert len(layers) == len(report.layer_shares())
    last = pd.read_csv(folder.path / "progress.csv").iloc[-1]
    assert last["evaluations"] == 12
    assert last["hypervolume"] == pytest.approx(report.hypervolume)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.00 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (9_994_000, "9.99 M"),
        (9_996_000, "10.0 M"),
        (99_960_000, "100 M"),
        (1_261_000_000, "1.26 G"),
        (17_600_000_000, "17.6 G"),
    ],
)
def test_counts_are_read_in_three_digits(count, text):
    assert human(count) == text


def test_quantities_carry_their_unit():
    assert COSTS["macs"].format(1_261_000_000) == "1.26 G MACs"
    assert COSTS["parameters"].format(5_717_416) == "5.72 M parameters"
    assert COSTS["latency"].format(12.345) == "12.3 ms"


def test_an_unusable_report_is_refused_when_it_is_made():
    with pytest.raises(RunError, match="candidates frame lacks 'macs'"):
        make_report(candidates=candidates().drop(columns="macs"))
    with pytest.raises(RunError, match="no frontier to report"):
        make_report(candidates=candidates().iloc[:0])
    with pytest.raises(RunError, match="dense row lacks 'top1'"):
        make_report(dense={"architecture": "64*8", "macs": 1, "parameters": 1})


def test_importing_what_shows_a_run_loads_nothing_heavy():
    code = (
        "import json, sys, poolshare.search.report.report, poolshare.search.report.terminal;"
        "import poolshare.search.report.figure, poolshare.search.report.page, poolshare.search.cli.looking;"
        "print(json.dumps([m for m in ('matplotlib', 'plotext', 'torch', 'optuna') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_supernet_trained_within_a_limit_says_so_and_is_not_held_against_dense():
    report = make_report(within=0.6)
    assert "trained on architectures up to 60% of the dense MACs alone" in report.verdict
    assert "draws from the whole space" in make_report(within=1.0).verdict
    assert "half-point" not in {each.how for each in report.picks()}
    with pytest.raises(ConfigError, match="took little or no part"):
        report.pick("half-point")


def test_scores_of_random_weights_are_no_finding_and_the_baseline_stands_beside_accuracies():
    assert make_report(untrained=True).verdict.startswith("Meaningless: nothing was trained")
    assert make_report(baseline=97.96).verdict.endswith("The most frequent class alone makes 97.96 %.")
    assert make_report(notes=["a note", "warning: mind"]).warnings == ["warning: mind"]
