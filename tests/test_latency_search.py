"""Searching by latency, and again by something else on the same weights, from the command line on real digits."""

import json

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_cli import SMALL

from poolshare.search.config import SearchConfig
from poolshare.search.job.folder import RunFolder
from poolshare.space import Architecture

MINE = "64*2 16@max2d"


def test_a_run_is_searched_by_latency_then_by_macs_then_whole_and_is_trained_once(verb, tmp_path):
    out = tmp_path / "run"
    search = ["search", *SMALL, "--epochs", "0", "--out", out, "-q", "--json"]
    by_latency = ["--objective", "latency", "--latency-batch", "32", "--sampler", "evolution", "--trials", "8"]
    status, printed, err = verb(*search, *by_latency, "--budget", "90%", "--include", MINE)
    assert status == 0, err
    found, folder = json.loads(printed), RunFolder.open(out)
    latency = folder.read_latency()
    assert latency is not None
    assert (latency.batch_size, latency.table.quantity) == (32, "latency")
    first = folder.read_candidates()
    sums = [latency.table.total(Architecture.parse(text)) for text in first["architecture"]]
    np.testing.assert_allclose(first["latency_ms"] * 1e6, sums, rtol=1e-12)
    dense = latency.table.total(Architecture.parse("64 64 64"))
    assert found["budget_latency_ms"] == pytest.approx(dense * 9 // 10 / 1e6)
    assert found["included"] == [MINE]
    assert MINE in set(first["architecture"])
    assert all(row["latency_ms"] <= found["budget_latency_ms"] for row in found["frontier"])
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    study = optuna.load_study(study_name=None, storage=storage)  # the only one
    assert study.metric_names == ["top-1 (%)", "latency (ns per image)"]
    weights, table = folder.supernet.read_bytes(), folder.latency.read_bytes()

    status, printed, err = verb(*search, "--budget", "70%", "--sampler", "random", "--trials", "4")
    assert status == 0, err
    found, second = json.loads(printed), folder.read_candidates()
    assert (found["objective"], found["budget_latency_ms"], found["included"]) == ("macs", None, [])
    assert all(row["macs"] <= found["budget_macs"] for row in found["frontier"])
    kept = second.set_index("architecture").loc[list(first["architecture"]), "correct"]
    assert list(kept) == list(first["correct"])

    status, printed, err = verb(*search)
    assert status == 0, err
    whole = folder.read_candidates()
    assert json.loads(printed)["certified"]
    assert len(whole) == json.loads(printed)["space_size"]
    counts = whole.set_index("architecture")["correct"]
    assert all(counts[row.architecture] == row.correct for row in second.itertuples())
    assert (folder.supernet.read_bytes(), folder.latency.read_bytes()) == (weights, table)

    limit = float(pd.Series(whole["latency_ms"]).median())
    status, printed, err = verb("pareto", out, "--cost", "latency", "--budget", f"{limit:.4f}ms", "--json")
    assert status == 0, err
    rows = json.loads(printed)["frontier"]
    assert rows
    assert all(row["latency_ms"] <= limit for row in rows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--include", "64*2 30@max2d"], "30"),
        (["--include", "64*2"], "2 layers; this space has 3"),
        (["--budget", "12ms", "--objective", "macs"], "12ms"),
        (["--budget", "1M", "--objective", "latency"], "1M"),
        (["--latency-batch", "0"], "--latency-batch"),
    ],
)
def test_what_cannot_be_searched_for_is_refused_before_anything_is_written(words, says, verb, tmp_path):
    status, _, err = verb("search", *SMALL, *words, "--out", tmp_path / "run")
    assert (status, says in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_in_milliseconds_means_latency():
    given = {"data": "digits", "model": "digits_vit"}
    assert SearchConfig(**given, budget="12ms").objective == "latency"
    assert SearchConfig(**given, budget="60%").objective == "macs"
    assert SearchConfig(**given, budget="60%", objective="latency").cost == "latency_ms"


def test_a_latency_budget_of_a_run_without_latency_is_refused_with_the_remedy(verb, tmp_path):
    out = tmp_path / "run"
    assert verb("search", *SMALL, "--epochs", "0", "--out", out, "-q", "--json")[0] == 0
    status, _, err = verb("pareto", out, "--budget", "12ms")
    assert status == 2
    assert "repeat its `poolshare search` with --budget 12ms" in err
