"""Trust: the statistics against SciPy and hand-made truths, and the verb on a real, small run."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from poolshare.search import cli
from poolshare.search.analysis import trust
from poolshare.search.analysis.ranking import kendall_tau, summarise
from poolshare.search.analysis.trust import POINTS, Plan, draw, measure_trust
from poolshare.search.config import SearchConfig
from poolshare.search.job import job as job_module
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.job import run_job
from poolshare.search.job.prepare import prepare
from poolshare.search.job.records import read_csv, read_json, write_csv, write_json
from poolshare.search.report.report import load_report
from poolshare.space import Architecture, ConfigError, RunError

SMALL = {"data": "digits", "model_args": {"depth": 3, "embed_dim": 16, "num_heads": 2}, "batch_size": 128}


def test_kendall_tau_is_scipys_with_ties_and_without():
    rng = np.random.default_rng(0)
    for size, values in [(2, 9), (5, 3), (30, 7), (40, 1000)]:
        x, y = rng.integers(values, size=(2, size))
        expected = kendalltau(x, y).statistic
        assert kendall_tau(x, y, np.zeros(size)) == pytest.approx(expected, nan_ok=True)


def test_tau_within_groups_forgets_what_lies_between_them():
    groups = np.repeat([0, 1, 2], 4)
    x = 10 * groups + np.tile([0, 1, 2, 3], 3)
    y = 10 * groups + np.tile([3, 2, 1, 0], 3)
    assert kendall_tau(x, y, groups) == -1
    assert kendall_tau(x, y, np.zeros(12)) > 0.4


def frame(score, first, second, bands):
    rows = [
        (f"a{index}", band, 1000 * band + index, s, repeat, correct, 1000)
        for index, (s, a, b, band) in enumerate(zip(score, first, second, bands, strict=True))
        for repeat, correct in enumerate((a, b))
        if correct is not None
    ]
    return pd.DataFrame(rows, columns=POINTS)


def test_the_summary_of_a_score_that_ranks_as_well_as_a_retraining():
    bands = np.repeat([0, 1], 10)
    truth = np.arange(20) + 900
    found = summarise(frame(truth, truth, truth, bands))
    for part in (found, found["within"], *found["bands"]):
        assert part["tau"] == {"value": 1, "low": 1, "high": 1} == part["ceiling"] == part["share_of_ceiling"]
    assert (found["n"], found["twice"], [band["n"] for band in found["bands"]]) == (20, 20, [10, 10])


def test_cost_alone_gives_a_high_tau_overall_and_none_within_bands():
    """The reason for bands: a score that knows nothing but the band looks good overall."""
    rng = np.random.default_rng(1)
    bands = np.repeat([0, 1, 2, 3], 12)
    truth = 100 * bands + rng.integers(50, size=48)
    score = 100 * bands + rng.integers(50, size=48)
    found = summarise(frame(score, truth, truth, bands))
    assert found["tau"]["value"] > 0.7
    assert abs(found["within"]["tau"]["value"]) < 0.3
    assert found["within"]["tau"]["low"] < 0 < found["within"]["tau"]["high"]


def test_without_second_trainings_there_is_no_ceiling_and_a_constant_score_has_no_tau():
    bands = np.repeat([0, 1], 5)
    found = summarise(frame(np.full(10, 7), np.arange(10), [None] * 10, bands))
    unknown = {"value": None, "low": None, "high": None}
    assert found["tau"] == found["ceiling"] == found["share_of_ceiling"] == unknown


def test_a_score_that_was_counted_again_and_flipped_changes_nothing():
    rng = np.random.default_rng(2)
    bands = np.repeat([0, 1], 6)
    truth = rng.permutation(12) + 900
    rows = frame(truth, truth, truth[::-1], bands)
    flipped = rows.copy()
    flipped.loc[rows["repeat"] == 1, "supernet_score"] += rng.integers(2, size=12)
    assert summarise(rows)["tau"]["value"] == 1
    assert summarise(flipped) == summarise(rows)


@pytest.fixture(scope="module")
def run(digits_run):
    return RunFolder.open(digits_run.folder)


def test_draws_come_from_all_bands_in_turn_each_once(run):
    job = prepare(run.config)
    drawn = draw(job, Plan(architectures=12, twice=6, bands=3))
    assert len({architecture for architecture, _ in drawn}) == 12
    assert [band for _, band in drawn[:6]] == [0, 1, 2, 0, 1, 2]
    low, high = (job.macs.total(a) for a in (job.supernet.space.cheapest(job.macs), job.supernet.space[0]))
    for architecture, band in drawn:
        assert (job.macs.total(architecture) - low) * 3 // (high + 1 - low) == band
    assert drawn == draw(prepare(run.config), Plan(architectures=12, twice=6, bands=3))


def test_trust_trains_scores_reports_and_continues(run, monkeypatch, capsys):
    words = ["trust", str(run.path), "--architectures", "4", "--twice", "2", "--bands", "2", "--epochs", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["poolshare", *words, "--device", "cpu"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 0
    found = json.loads(capsys.readouterr().out)
    table = pd.read_csv(run.path / "trust.csv")
    assert table["repeat"].tolist() == [0] * 4 + [1] * 2
    assert (table["total"] == 377).all()
    scored = run.read_candidates().set_index("architecture")
    for row in table.itertuples():
        assert scored.loc[row.architecture, ["top1", "macs"]].tolist() == [row.supernet_score, row.macs]
    assert found == read_json(run.path / "trust.json")
    assert [len(point["retrained_scores"]) for point in found["points"]].count(2) == 2

    # Cut off after the second training: the rest is trained again, to the same numbers.
    write_csv(run.trust_rows, read_csv(run.trust_rows)[:2], checked=True)
    plan = Plan(architectures=4, twice=2, bands=2)
    assert measure_trust(run, plan, recipe_changes={"epochs": 1}, device="cpu") == found
    pd.testing.assert_frame_equal(pd.read_csv(run.path / "trust.csv"), table)

    # An architecture keeps the score it was ranked by, though here (or on a GPU) one image more would be right.
    table = read_csv(run.trust_rows)
    kept = table[:4].assign(supernet_score=table["supernet_score"][:4] + 1)
    write_csv(run.trust_rows, kept, checked=True)
    again = measure_trust(run, plan, recipe_changes={"epochs": 1}, device="cpu")
    assert again["tau"] == found["tau"]
    written = pd.read_csv(run.trust_rows)
    assert written.groupby("architecture")["supernet_score"].nunique().max() == 1
    assert written["supernet_score"].tolist() == (table["supernet_score"] + 1).tolist()
    write_csv(run.trust_rows, table, checked=True)

    with pytest.raises(RunError, match="another recipe; repeat the earlier call"):
        measure_trust(run, plan, recipe_changes={"epochs": 2}, device="cpu")


def test_what_trust_cannot_use_is_named_before_it_reads_an_image(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "prepare", lambda *arguments, **options: pytest.fail("the data were opened"))
    changed = RunFolder.open(shutil.copytree(run.path, tmp_path / "run"))
    for name in ("trust.csv", "trust.json"):
        (changed.path / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="lr"):
        measure_trust(changed, Plan(2, 0), recipe_changes={"lr": -1.0})
    changed.candidates.unlink()  # the summary is there, and the report needs both in the end
    with pytest.raises(RunError, match=r"has no candidates.csv yet"):
        measure_trust(changed, Plan(2, 0), device="cpu")
    assert not changed.trust.exists()


def test_trust_draws_within_a_budget_of_latency_as_the_search_keeps_it(tmp_path):
    config = SearchConfig(
        **SMALL, epochs=0, objective="latency", latency_batch=16, budget="90%", sampler="random", trials=4
    )
    folder = run_job(config, tmp_path / "run")
    summary, latency = read_json(folder.summary), folder.read_latency()
    # Whole models took a tenth longer than their sums, so sums may reach 90 / 1.1 % of dense.
    dense = latency.table.total(prepare(config).dense)
    rows = folder.read_candidates()
    shares = {
        text: (1.0, 1.1 * ms * 1e6 / dense) for text, ms in zip(rows["architecture"], rows["latency_ms"], strict=True)
    }
    shares[summary["dense"]["architecture"]] = (1.0, 1.0)
    write_json(folder.summary, summary | {"timed": {"dense_ms": dense / 1e6, "shares": shares}})
    found = measure_trust(folder, Plan(12, 0, 2), recipe_changes={"epochs": 0}, device="cpu")
    sums = [latency.table.total(Architecture.parse(point["architecture"])) / dense for point in found["points"]]
    kept = [one for one in prepare(config).supernet.space if latency.table.total(one) / dense <= 0.9 / 1.1]
    assert len(sums) == min(12, len(kept)) > 1
    assert max(sums) <= 0.9 / 1.1 + 1e-6
    folder.latency.unlink()
    folder.trust_rows.unlink()
    with pytest.raises(RunError, match=r"holds no latency.json"):
        measure_trust(folder, Plan(12, 0, 2), recipe_changes={"epochs": 0}, device="cpu")


def test_trust_belongs_to_the_weights_it_was_measured_with(tmp_path, monkeypatch):
    folder, plan = run_job(SearchConfig(**SMALL, epochs=1), tmp_path / "run"), Plan(3, 1, 1)
    one = measure_trust(folder, plan, recipe_changes={"epochs": 0}, device="cpu")

    def cut_off(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(job_module, "train_supernet", cut_off)
    with pytest.raises(MemoryError):
        run_job(SearchConfig(**SMALL, epochs=2), tmp_path / "run")
    monkeypatch.undo()
    folder = RunFolder.open(tmp_path / "run")
    assert folder.read_trust() is None
    with pytest.raises(RunError, match="has no supernet of 2 epochs yet"):
        measure_trust(folder, plan, recipe_changes={"epochs": 0}, device="cpu")
    run_job(SearchConfig(**SMALL, epochs=2), tmp_path / "run")
    assert load_report(folder).trust is None
    two = measure_trust(folder, plan, recipe_changes={"epochs": 0}, device="cpu")
    scored = folder.read_candidates().set_index("architecture")["top1"]
    assert [scored[row.architecture] for row in pd.read_csv(folder.trust_rows).itertuples()] == [
        row.supernet_score for row in pd.read_csv(folder.trust_rows).itertuples()
    ]
    assert two["points"] != one["points"]
    assert read_json(tmp_path / "run" / "trust-1-epochs.json") == one
    assert (tmp_path / "run" / "trust-1-epochs.csv").exists()


def test_trainings_of_another_budget_are_not_mixed_with_those_of_this_one(tmp_path):
    folder, plan = run_job(SearchConfig(**SMALL, epochs=0, sampler="random", trials=4), tmp_path / "run"), Plan(6, 0, 1)
    measure_trust(folder, plan, recipe_changes={"epochs": 0}, device="cpu")
    rows = folder.trust_rows.read_bytes()
    other = RunFolder(folder.path, folder.config.changed(budget="60%"))
    with pytest.raises(RunError, match="was begun within another budget"):
        measure_trust(other, plan, recipe_changes={"epochs": 0}, device="cpu")
    assert folder.trust_rows.read_bytes() == rows


def test_a_budget_that_few_architectures_keep_has_as_many_second_trainings_as_these(tmp_path):
    config = SearchConfig(
        **SMALL | {"model_args": {"depth": 2, "embed_dim": 16, "num_heads": 2}}, levels=(64, 16), epochs=0
    )
    found = measure_trust(run_job(config, tmp_path / "run"), Plan(24, 12), recipe_changes={"epochs": 0}, device="cpu")
    assert found["n"] == found["twice"] == RunFolder.open(tmp_path / "run").read_summary()["space_size"] < 12


def test_what_is_trained_alone_shares_attention_as_in_the_search(monkeypatch):
    class Seen(Exception):
        pass

    def seen(model, *_, **__):
        raise Seen(model.sharing)

    monkeypatch.setattr(trust, "train_model", seen)
    for sharing in ("qk", "map"):
        job = prepare(SearchConfig(**SMALL, max_run=3, sharing=sharing))
        with pytest.raises(Seen, match=sharing):
            trust._train_alone(job, Architecture.parse("64*3"), {}, job.recipe, "key", lambda *_: None)


def test_impossible_plans_are_refused():
    with pytest.raises(ConfigError, match="at least 2 architectures"):
        Plan(architectures=4, twice=5)
