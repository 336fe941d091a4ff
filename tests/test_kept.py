"""Latency budgets are kept as whole models are timed: which ones are taken out, and what is picked instead."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import SMALL

from poolshare.search import SearchResult
from poolshare.search.analysis.latency_budget import AGAIN, Timed, time_frontier
from poolshare.search.analysis.pareto import frontier
from poolshare.search.report.page import page_data
from poolshare.search.report.report import Report
from poolshare.space import Architecture, BudgetError, SearchSpace
from poolshare.supernet import SuperNet, latency
from poolshare.supernet.latency import Share

# Sums of a table: ms, of 10 that the dense network takes. The more expensive, the more accurate.
SUMS = {"64*2": 10.0, "64 36@max2d": 6.0, "64 16@max2d": 5.0, "64 9@max2d": 4.5, "64 4@max2d": 4.0}
DENSE = {"architecture": "64*2", "top1": 90.0, "macs": 100, "parameters": 10, "latency_ms": 10.0}


def frame() -> pd.DataFrame:
    rows = [
        {"architecture": text, "top1": 80.0 + ms, "correct": 80, "total": 100, "macs": int(10 * ms), "parameters": 9}
        for text, ms in SUMS.items()
    ]
    return pd.DataFrame(rows).assign(generation=0, latency_ms=list(SUMS.values()))


def report(timed: Timed | None, budget: str = "50%") -> Report:
    limit = {"50%": 5.0, "4ms": 4.0, "1%": 0.1}[budget]
    return Report("", frame(), DENSE, True, 5, "run", {"latency_ms": limit}, timed=timed, budget=budget)


def test_without_timings_the_sums_decide():
    assert report(None).pick("budget").architecture == "64 16@max2d"
    assert "timed" not in report(None).pick("budget").why


def test_a_model_that_was_timed_counts_by_its_time_and_others_by_sums_made_longer():
    # The dearest within the budget takes 53 to 55 % instead of 50: a factor of 1.1, so 4.5 ms count as 4.95 of 10.
    timed = Timed(10.0, {"64*2": (1.0, 1.0), "64 16@max2d": (0.53, 0.55), "64 36@max2d": (0.6, 0.66)})
    assert list(report(timed).allowed["architecture"]) == ["64 9@max2d", "64 4@max2d"]
    choice = report(timed).pick("budget")
    assert choice.architecture == "64 9@max2d"
    assert "the whole model was not timed" in choice.why
    # Once it is timed, by its time alone: the median may lie within, the interval's end decides.
    for high, expected in ((0.499, "64 9@max2d"), (0.501, "64 4@max2d")):
        shares = {**timed.shares, "64 9@max2d": (0.49, high)}
        assert report(Timed(10.0, shares)).pick("budget", "macs").architecture == expected
    assert (
        "takes 49.0% of the dense model's time, at most 49.9%"
        in report(Timed(10.0, {**timed.shares, "64 9@max2d": (0.49, 0.499)})).pick("accuracy", "latency_ms").why
    )


def test_a_dear_one_that_is_faster_than_its_sum_is_taken_and_sums_are_never_made_shorter():
    timed = Timed(10.0, {"64*2": (1.0, 1.0), "64 36@max2d": (0.45, 0.48)})
    assert report(timed).pick("budget").architecture == "64 36@max2d"
    assert "64 16@max2d" in set(report(timed).allowed["architecture"])
    # The page marks what keeps the budget in the same way, though the sum of the second one is over it.
    assert page_data(report(timed))["allowed"] == "01111"
    assert page_data(report(None))["allowed"] == "00111"


def test_milliseconds_are_those_of_the_timing():
    # The machine is slower than when the table was made: dense takes 12 ms, so 4 ms are a third of it.
    timed = Timed(12.0, {"64*2": (1.0, 1.0)})
    with pytest.raises(BudgetError, match="none of the candidates keeps 4ms"):
        _ = report(timed, "4ms").allowed
    assert report(Timed(10.0, timed.shares), "4ms").pick("budget").architecture == "64 4@max2d"


def test_the_frontier_is_timed_until_its_dearest_end_keeps_the_budget():
    torch.manual_seed(0)
    space = SearchSpace(3, (64, 16, 4), ("max2d",), 2)
    net = SuperNet.from_timm("digits_vit", space, num_classes=10, depth=3, embed_dim=16, num_heads=2, in_chans=1).eval()
    texts = [str(space[rank]) for rank in range(space.size)]
    # A table that takes everything but the dense network for free, the more the more accurate.
    sums = [1.0 if index == 0 else 0.1 + 0.001 * index for index in range(len(texts))]
    rows = pd.DataFrame({"architecture": texts, "latency_ms": sums, "top1": [100 * one for one in sums]})
    for budget in ("80%", "60%"):
        timings: list[float] = [0]
        timed = time_frontier(net, rows, 1.0, budget, 1, lambda done, note, into=timings: into.append(done))
        keepers = rows[timed.keeps(rows, 1.0, budget)]
        assert len(timed.shares) > 1
        if keepers.empty:  # on this machine none keeps it; in the next test it is known what they take
            assert all(share[1] > float(budget[:-1]) / 100 for share in timed.shares.values())
            continue
        best = frontier(keepers, "latency_ms")["architecture"].iloc[-1]
        assert best in timed.shares  # not by its sum alone
        assert timed.shares[best][1] <= float(budget[:-1]) / 100
        assert timings[-1] >= AGAIN * (best != texts[0])  # the best was timed in so many sessions, others too
        assert timings == sorted(timings)
    assert Timed.from_json(json.loads(json.dumps(timed.to_json()))) == timed
    assert str(Architecture.parse(texts[0])) in timed.shares


@pytest.mark.parametrize("slow", [(), (7,), (7, 6, 3), range(1, 10), range(10)])
@pytest.mark.parametrize("budget", ["90%", "60%", "31%", "5%"])
def test_the_most_accurate_that_keeps_the_budget_is_found_where_sums_are_too_low(budget, slow, monkeypatch):
    space = SearchSpace(3, (64, 16, 4), ("max2d",), 2)
    net = SuperNet.from_timm("digits_vit", space, num_classes=10, depth=3, embed_dim=16, num_heads=2, in_chans=1)
    texts = [str(space[rank]) for rank in range(space.size)]
    dense, *others = texts
    sums = dict(zip(others, np.linspace(0.1, 0.75, len(others)), strict=True)) | {dense: 1.0}
    rows = pd.DataFrame({"architecture": texts, "latency_ms": map(sums.get, texts), "top1": map(sums.get, texts)})
    limit = float(budget[:-1]) / 100
    inside = [text for text in others if 1.25 * sums[text] <= limit]  # the dearest last
    late = {inside[-1 - index] for index in slow if index < len(inside)}  # they take twice as long
    takes = {text: 1.25 * sums[text] * (2 if text in late else 1) for text in others} | {dense: 1.0}
    monkeypatch.setattr(
        latency,
        "measure_shares",
        lambda supernet, models, batch, rng, dtype: (2e6, [Share(takes[str(one)], takes[str(one)]) for one in models]),
    )
    timed = time_frontier(net, rows, 1.0, budget, 1, lambda done, note: None)
    assert timed.dense_ms in (1.0, 2.0)
    assert all(share == (takes[text], takes[text]) for text, share in timed.shares.items())
    keepers = rows[timed.keeps(rows, 1.0, budget)]
    true = [text for text in others if takes[text] <= limit]
    assert list(frontier(keepers, "latency_ms")["architecture"])[-1:] == true[-1:]


def test_a_search_under_a_latency_budget_says_what_it_timed_and_another_batch_measures_anew(verb, tmp_path):
    out = tmp_path / "run"
    search = ["search", *SMALL, "--epochs", "0", "--out", out, "-q", "--json", "--objective", "latency"]
    status, printed, err = verb(*search, "--latency-batch", "16", "--budget", "90%")
    assert status == 0, err
    found, run = json.loads(printed), SearchResult(out)
    shares = found["timed"]["shares"]
    choice = run.pick()
    assert shares[choice.architecture][1] <= 0.9
    assert (choice.how, "timed whole" in choice.why) == ("budget", True)
    assert pd.read_csv(run.run.pareto)["architecture"].iloc[-1] == choice.architecture
    assert run.pick(budget="90%") == choice
    first, weights = run.run.read_latency(), run.run.supernet.read_bytes()
    rows = run.candidates

    status, printed, err = verb(*search, "--latency-batch", "2")
    assert status == 0, err
    again = SearchResult(out)
    second = again.run.read_latency()
    assert (first.batch_size, second.batch_size) == (16, 2)
    assert again.run.supernet.read_bytes() == weights
    assert list(again.candidates["correct"]) == list(rows["correct"])
    totals = [second.table.total(Architecture.parse(text)) / 1e6 for text in again.candidates["architecture"]]
    assert list(again.candidates["latency_ms"]) == pytest.approx(totals)
    assert "timed" not in json.loads(printed)  # no budget any more


def test_space_counts_what_keeps_a_latency_budget(verb):
    words = ["space", "--model", "digits_vit", "--model-args", "depth=3,embed_dim=16,num_heads=2", "--json", "--budget"]
    status, printed, err = verb(*words, "1000ms")
    assert status == 0, err
    found = json.loads(printed)
    assert (found["within_budget"], found["budget_latency_ms"], found["budget_macs"]) == (found["size"], 1000, None)
    assert 0 < found["dense_latency_ms"] < 1000
    status, _, err = verb(*words, "0.000001ms")
    assert (status, "reaches from" in err) == (2, True)
    status, printed, err = verb(*words[:-2], "--budget", "1000ms", "--latency-batch", "4", "--latency-dtype", "bf16")
    assert (status, "batch 4 in bf16 on cpu" in printed) == (0, True), err
