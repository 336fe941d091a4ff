"""`--score loss` and `--score divergence` on a trained supernet: whole numbers, exact, and what decides."""

import optuna
import pytest
import torch
import torch.nn.functional as F
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from test_cli import SMALL

from poolshare.search import SearchResult, search
from poolshare.search.counts import MICRONATS, TOP1, Counts
from poolshare.search.job import job as job_module
from poolshare.search.job.prepare import prepare

GIVEN = {"model_args": {"depth": 3, "embed_dim": 16, "num_heads": 2}, "batch_size": 128, "epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("score") / "run"
    return search("digits", out=out, quiet=True, score="loss", sampler="evolution", trials=30, **GIVEN)


def test_losses_are_those_of_the_exported_models_summed_exactly(found):
    data = prepare(found.run.config, classes=found.run.classes, load=False).data
    [(images, labels)] = data.eval_loader("search", 10_000)
    for row in found.candidates.head(4).to_dict("records"):
        with torch.inference_mode():
            logits = found.model(row["architecture"])(images).double()
        nats = F.cross_entropy(logits, labels, reduction="none")
        micronats = row["loss"] * row["total"] * MICRONATS
        assert micronats == pytest.approx(round(micronats), abs=1e-3)
        assert row["loss"] == pytest.approx(float(nats.mean()), abs=1e-5)
        assert row["correct"] == int((logits.argmax(1) == labels).sum())


def test_the_frontier_is_by_loss_and_the_study_maximises_exp_of_it(found):
    rows = found.frontier
    assert list(rows["loss"]) == sorted(rows["loss"], reverse=True)
    assert found.candidates["loss"].min() == rows["loss"].min()
    assert found.report.dense["loss"] > 0
    assert "compared by their loss, the cross-entropy with the labels" in found.report.verdict
    assert '"loss":"cross-entropy with the labels"' in found.run.report.read_text()
    study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(found.run.journal))))
    assert study.metric_names == ["exp(-loss) (%)", "MACs"]
    losses = dict(zip(found.candidates["architecture"], found.candidates["loss"], strict=True))
    for trial in study.get_trials():
        correct, total, loss = trial.user_attrs["counts"]
        assert loss / total / MICRONATS == losses[trial.user_attrs["architecture"]]
        assert trial.values[0] == Counts((correct,), total, loss).worth(TOP1)


def test_the_same_call_scores_nothing_again_and_another_score_trains_nothing(found, verb, monkeypatch):
    before, weights = found.candidates, found.run.supernet.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "score_counts", lambda *a, **o: pytest.fail("scored again"))
        same = [*SMALL, "--epochs", "1", "--score", "loss", "--sampler", "evolution", "--trials", "30"]
        status, _, err = verb("search", *same, "--out", found.folder, "-q")
        assert status == 0, err
    assert SearchResult(found.folder).candidates.equals(before)
    whole = search("digits", out=found.folder, quiet=True, score="divergence", **GIVEN)  # all, as that is affordable
    assert whole.report.certified
    assert whole.report.dense["loss"] == 0
    assert (whole.candidates["loss"] >= 0).all()
    assert whole.run.supernet.read_bytes() == weights
    by_top1 = search("digits", out=found.folder, quiet=True, **GIVEN).candidates  # right answers are known already
    assert "loss" not in by_top1
    assert list(by_top1["correct"]) == list(whole.candidates["correct"])


@pytest.mark.parametrize("value", [[5], [5, 4], [5, 10, -1], [5.0, 10, 3], [True, 10, 3], "5 10 3", None])
def test_counts_that_no_search_writes_are_refused(value):
    with pytest.raises(ValueError, match="its counts are"):
        Counts.from_json(value, "loss")
    assert Counts.from_json([5, 10, 3], "loss") == ((5,), 10, 3)
    assert Counts.from_json([5, 10], "metric") == ((5,), 10, None)
    with pytest.raises(ValueError, match="its counts are"):
        Counts.from_json([5, 10, 3], "metric")
