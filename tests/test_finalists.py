"""Finalists: who takes part, what is written and continued, and that the best of them can be exported."""

import json
import shutil

import pandas as pd
import pytest
import timm
from safetensors.torch import save_file

from poolshare.search.analysis.finalists import choose, train_finalists
from poolshare.search.analysis.pareto import compared, ranked
from poolshare.search.config import SearchConfig
from poolshare.search.job.folder import FINALISTS, RunFolder
from poolshare.search.job.job import run_job
from poolshare.search.job.records import read_json, write_csv, write_json
from poolshare.search.report.report import load_report
from poolshare.space import BudgetError, ConfigError, RunError

SMALL = {"data": "digits", "model_args": {"depth": 3, "embed_dim": 16, "num_heads": 2}, "batch_size": 128}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_job(SearchConfig(**SMALL, epochs=1, budget="70%"), tmp_path_factory.mktemp("finalists") / "run")


def test_one_of_each_token_schedule_takes_part_the_most_accurate_first():
    texts = ["64 64 16@max2d", "64*2 16@max2d", "64 16@max2d 16", "64 16@max2d*2", "64 1@max2d 1"]
    frame = pd.DataFrame({"architecture": texts, "top1": [90.0, 91.0, 80.0, 80.0, 70.0], "macs": [9, 8, 7, 6, 5]})
    assert list(choose(frame, 9, "macs")["architecture"]) == [texts[1], texts[3], texts[4]]
    assert list(choose(frame, 2, "macs")["architecture"]) == [texts[1], texts[3]]
    own = [texts[4], texts[1], "64 64 4@max2d"]  # the last one is over the budget
    assert list(choose(frame, 2, "macs", own)["architecture"]) == [texts[1], texts[3], texts[4]]


def test_equals_are_ranked_by_the_supernet_and_then_by_cost():
    rows = [("a", 9, 5, 7), ("b", 8, 6, 7), ("c", 7, 6, 7), ("d", 6, 1, 8)]
    frame = pd.DataFrame(rows, columns=["architecture", "macs", "supernet_score", "score"])
    assert list(ranked(frame)["architecture"]) == ["d", "c", "b", "a"]


def test_only_those_that_were_trained_alike_are_compared(run):
    usual = train_finalists(run, 2, epochs=1, device="cpu")
    other = train_finalists(run, 2, epochs=1, lr=2e-4, batch_size=256, amp="bf16", device="cpu")
    assert other["lr"].tolist() == [2e-4] * 2
    assert (usual["lr"] == 1e-3).all()
    assert set(usual["architecture"]) == set(other["architecture"])
    assert dict(zip(usual["architecture"], usual["score"], strict=True)) != dict(
        zip(other["architecture"], other["score"], strict=True)
    )
    rows = run.read_finalists()
    assert len(rows) == 4
    again = train_finalists(run, 2, epochs=1, device="cpu")
    assert again.to_dict("records") == usual.to_dict("records")
    assert list(compared(rows)["lr"]) == [2e-4] * 2  # the last of two such groups
    assert list(compared(rows[:3])["lr"]) == [1e-3] * 2
    assert compared(rows[:0]).empty
    assert "(batch 256, lr 0.0002, amp bf16) alone" in load_report(run).pick("finalist").why
    with pytest.raises(ConfigError, match="lr"):
        train_finalists(run, 2, epochs=1, lr=-1.0, device="cpu")
    run.finalists.unlink()


def test_finalists_are_trained_within_the_budget_kept_and_continued(run):
    found = train_finalists(run, 3, epochs=1, device="cpu")
    assert len(found) == 3
    allowed = load_report(run).allowed
    expected = choose(allowed, 3, "macs").set_index("architecture")
    assert set(found["architecture"]) == set(expected.index)
    for row in found.itertuples():
        assert (row.macs, row.supernet_score, row.total) == tuple(
            expected.loc[row.architecture, ["macs", "top1", "total"]]
        )
    assert found["score"].tolist() == sorted(found["score"], reverse=True)
    assert found["score"].mean() > found["supernet_score"].mean()  # an epoch alone, after one of the supernet

    # Cut off after the first training: the others are trained again, to the same numbers; a fourth joins them.
    kept = run.read_finalists()
    write_csv(run.finalists, kept[:1], checked=True)
    again = train_finalists(run, 4, epochs=1, device="cpu")
    assert len(again) == 4
    both = again.merge(found, on="architecture", suffixes=("", "_before"))
    assert len(both) == 3
    assert (both["score"] == both["score_before"]).all()


def test_the_best_of_the_most_that_trained_equally_long_is_picked_and_exported(run, tmp_path, verb):
    train_finalists(run, 1, epochs=3, device="cpu")
    assert (
        load_report(run).pick("finalist").architecture
        == train_finalists(run, 4, epochs=1, device="cpu")["architecture"][0]
    )
    run.finalists.unlink()
    train_finalists(run, 2, epochs=1, device="cpu")
    longer = train_finalists(run, 2, epochs=2, device="cpu")
    assert (longer["epochs"] == 2).all()
    assert len(longer) == 2
    pick = load_report(run).pick("finalist")
    assert pick.architecture == longer["architecture"][0]
    assert f"{longer['score'][0]:.2f} % after 2 epochs alone" in pick.why
    assert load_report(run).picks()[0] == pick
    assert "--budget 70% --pick finalist" in verb("pareto", run.path)[1]
    assert pick.why.split(":")[1] in (run.path / "report.html").read_text()
    code, out, _ = verb("export", str(run.path), "--pick", "finalist", "--out", str(tmp_path / "best"), "--json")
    assert code == 0
    assert json.loads(out)["architecture"] == pick.architecture


def test_the_verb_shows_both_scores_and_what_comes_next(run, verb):
    code, out, _ = verb("finalists", str(run.path), "--count", "2", "--epochs", "1", "-q", "--budget", "60%")
    assert code == 0
    assert "finalists on 377 search-validation images; alone: one more epoch" in " ".join(out.split())
    assert f"poolshare export {run.path} --architecture" in out
    code, out, _ = verb("finalists", str(run.path), "--count", "2", "--epochs", "1", "--amp", "bf16", "-q", "--json")
    assert code == 0
    first = json.loads(out)["finalists"][0]
    assert set(first) == set(FINALISTS)
    assert first["amp"] == "bf16"


def test_what_cannot_be_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="count=0: give a whole number from 1"):
        train_finalists(run, 0)
    with pytest.raises(BudgetError, match="ask for at least that"):
        train_finalists(run, 2, budget="1%")
    fresh = run_job(SearchConfig(**SMALL, epochs=0), tmp_path / "fresh")
    with pytest.raises(RunError, match=r"poolshare finalists .*fresh --budget 50%"):
        load_report(fresh, "50%").pick("finalist")
    fresh.finalists.write_text("architecture,macs\n64 64 64,5\n", encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        train_finalists(fresh, 2)


@pytest.mark.parametrize("words", [["finalists", "--count", "1"], ["trust", "--architectures", "2", "--twice", "0"]])
def test_other_images_are_refused_before_anything_is_trained(run, tmp_path, verb, words):
    changed = shutil.copytree(run.path, tmp_path / "run")
    config = read_json(changed / "config.json")
    write_json(changed / "config.json", config | {"data": "1257 images, 0123456789abcdef"})
    before = sorted(path.name for path in changed.iterdir())
    code, _, error = verb(words[0], changed, *words[1:], "--epochs", "7", "--device", "cpu", "-q")  # as none did yet
    assert code == 1
    assert "(other classes or labels); restore them" in " ".join(error.split())
    assert sorted(path.name for path in changed.iterdir()) == before


def test_finalists_need_no_more_the_weights_that_the_supernet_began_with(tmp_path):
    weights = tmp_path / "base.safetensors"
    base = timm.create_model("digits_vit", num_classes=10, **SMALL["model_args"])
    save_file(base.state_dict(), weights)
    small = SMALL | {"levels": (64, 16, 4), "sampler": "random", "trials": 4}
    folder = run_job(SearchConfig(**small, epochs=0, weights=str(weights)), tmp_path / "run")
    weights.unlink()
    assert train_finalists(folder, 1, epochs=1, device="cpu")["lr"].tolist() == [3e-4]


def test_more_epochs_of_the_supernet_set_finalists_aside(tmp_path):
    folder = run_job(SearchConfig(**SMALL, epochs=1), tmp_path / "run")
    train_finalists(folder, 1, epochs=1, device="cpu")
    run_job(SearchConfig(**SMALL, epochs=2), tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").read_finalists().empty
    assert (tmp_path / "run" / "finalists-1-epochs.csv").exists()
