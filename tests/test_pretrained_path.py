"""The path of a pretrained model: dense model tuned, supernet taught by it, the better weights exported, retraining taught too."""

import itertools
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_identity import OPTIONS, make_photos

from poolshare.search import search
from poolshare.search.analysis.guard import against_dense
from poolshare.search.analysis.pareto import binomial_interval
from poolshare.search.config import SearchConfig
from poolshare.search.exported.export import better_with_dense, load_export
from poolshare.search.exported.retrain import evaluate, retrain
from poolshare.search.job.dense import read_tuned
from poolshare.search.job.prepare import prepare
from poolshare.search.job.records import read_json, write_json
from poolshare.space import Architecture, RunError, SearchSpace
from poolshare.space.presets import WARM_OPERATORS, even_levels, space_for
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.training.loop import train_model
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.sandwich import GUIDED, Sandwich

SMALL = {"depth": 4, "embed_dim": 16, "num_heads": 1, "patch_size": 4}
WARM = {name: value for name, value in OPTIONS.items() if name != "epochs"} | {"model_args": SMALL, "budget": "70%"}
WARM |= {"tune_epochs": 2, "trials": 12, "sampler": "evolution"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos, weights of five other classes to begin with, and a finished run with every default of a warm start."""
    folder = tmp_path_factory.mktemp("pretrained")
    make_photos(folder / "photos")
    torch.manual_seed(0)
    model = timm.create_model(WARM["model"], num_classes=5, img_size=16, **SMALL)
    save_file(model.state_dict(), folder / "start.safetensors")
    search(folder / "photos", out=folder / "run", weights=folder / "start.safetensors", **WARM)
    return folder


@pytest.fixture(scope="module")
def found(made):
    from poolshare.search import SearchResult

    return SearchResult(made / "run")


def test_levels_fall_evenly_and_stand_on_grids_where_one_is_near():
    for tokens in (16, 49, 64, 196, 197, 256, 576, 1024):
        levels = even_levels(tokens)
        step = (tokens - tokens // 12) / 10
        assert levels[0] == tokens
        assert 8 <= len(levels) <= 12
        assert all(0 < before - after <= 2 * step for before, after in itertools.pairwise(levels))
        squares = [level for level in levels if round(level**0.5) ** 2 == level]
        assert len(squares) >= 4  # steps that avg2d can take


def test_a_warm_start_gets_operators_that_keep_what_it_knows_and_a_cold_one_stays_as_it_was():
    warm, cold = (space_for("vit_tiny_patch16_224", 12, 196, warm=warm) for warm in (True, False))
    assert (warm.operators, warm.levels, warm.max_run) == (WARM_OPERATORS, even_levels(196), 1)
    assert (cold.operators, cold.levels, cold.max_run) == (("max2d",), (196, 100, 49), 3)
    assert space_for("vit_tiny_patch16_224", 12, 197, warm=True).operators == ("tome", "kmeans")  # no grid
    given = space_for("vit_tiny_patch16_224", 12, 196, (196, 49), ("max2d",), 2, warm=True)
    assert (given.operators, given.levels, given.max_run) == (("max2d",), (196, 49), 2)
    assert space_for("psvit_1d_tiny", 12, 196, warm=True) == space_for("psvit_1d_tiny", 12, 196)


@pytest.mark.parametrize(
    ("given", "decided"),
    [
        ({}, (0, 30, 1000)),
        ({"weights": "x"}, (15, 3, 200)),
        ({"pretrained": True}, (15, 3, 200)),
        ({"weights": "x", "epochs": 0}, (0, 0, 1000)),  # searched as it is
        ({"weights": "x", "tune_epochs": 0}, (0, 10, 1000)),
        ({"weights": "x", "tune_epochs": 4, "epochs": 0}, (4, 0, 1000)),  # tuned, then searched as it is
        ({"weights": "x", "trials": 7}, (15, 3, 7)),
    ],
)
def test_epochs_of_each_phase(given, decided):
    config = SearchConfig(data="x", **given)
    assert (config.tune_epochs, config.epochs, config.trials) == decided


@pytest.mark.parametrize(("within", "low", "high"), [(0.6, 0.3, 0.6), (0.4, 0.2, 0.4), (None, 0.3, 1.0)])
def test_a_guided_step_draws_below_the_limit_and_not_far_below(within, low, high):
    space = SearchSpace(8, (64, 49, 36, 25, 16, 9, 4), ("avg2d",), 1)
    net = SuperNet.from_timm("digits_vit", space, depth=8, embed_dim=16, num_heads=1)
    costs = measure_macs(net)
    sandwich = Sandwich(space, costs, 0, within=within, guided=True)
    shares = [costs.total(one) / costs.total(space[0]) for step in range(60) for one in sandwich.at(step)]
    assert len(shares) == 60 * GUIDED
    assert low - 0.01 <= min(shares)
    assert max(shares) <= high
    assert np.ptp(shares) > 0.8 * (high - low)


def test_a_guided_loss_is_half_of_labels_and_half_of_the_teachers_distribution():
    space = SearchSpace(3, (64, 36, 16, 9), ("avg2d",), 1)
    torch.manual_seed(0)
    net = SuperNet.from_timm("digits_vit", space, depth=3, embed_dim=16, num_heads=1)
    images, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 10))
    sandwich = Sandwich(space, measure_macs(net), 0, guided=True)
    wanted = []
    for architecture in sandwich.at(3):
        logits = net(images, [architecture])[0]
        log, given = logits.log_softmax(-1), teacher(images).softmax(-1)
        wanted.append(0.5 * F.nll_loss(log, labels) - 0.5 * (given * log).sum(-1).mean())
    loss = sandwich.loss(net, images, labels, 3, teacher=teacher)
    assert loss.item() == pytest.approx(2 * torch.stack(wanted).mean().item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_dense_model_is_tuned_as_it_would_be_alone(made, tmp_path):
    """timm's own model, trained alone on the same images, has the same weights and the same score."""
    torch.manual_seed(1)
    model = timm.create_model(WARM["model"], num_classes=2, img_size=16, **SMALL)
    save_file(model.state_dict(), tmp_path / "two.safetensors")
    found = search(made / "photos", out=tmp_path / "run", weights=tmp_path / "two.safetensors", **WARM | {"epochs": 0})
    data = prepare(found.run.config).data
    train_model(model, data, Recipe(epochs=2, batch_size=8, lr=3e-4, layer_decay=0.75))
    dense, supernet = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("dense", "supernet"))
    assert dense.keys() == model.state_dict().keys()
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(dense[name], value) for name, value in supernet.items())  # no epochs of its own
    tuned = read_tuned(found.run)
    with torch.inference_mode():
        right = sum(int((model(x).argmax(-1) == labels).sum()) for x, labels in data.eval_loader("search", 8))
    assert (tuned.epochs, tuned.correct, tuned.total) == (2, right, len(data.split("search")))
    assert found.report.dense["top1"] == tuned.top1


def test_the_run_says_what_each_phase_took_and_gained(found):
    summary = found.run.read_summary()
    assert set(summary["phases"]) == {"tuning", "training", "scoring"}
    assert summary["phases"]["tuning"]["dense_epochs"] == 2
    assert found.run.config.guided
    assert found.run.config.drawn_within == 0.7
    assert not found.run.tuning.exists()
    time = found.report.facts["Time"]
    assert "as 2.0 epochs of the dense model" in time["tuning"]
    assert "points on the frontier" in time["training"]
    frontier = set(found.frontier["architecture"])
    assert frontier <= set(summary["with_dense_weights"])


def test_an_export_has_the_better_weights(found, made, tmp_path):
    """Its score is the better one of both, and its logits are those of these weights."""
    summary, tuned = found.run.read_summary(), read_tuned(found.run)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = found.pick().architecture
    scored = int(found.candidates.set_index("architecture").loc[text, "correct"])
    for by_dense in (scored + 1, scored):  # of equals the supernet's
        path = found.run.summary
        write_json(path, read_json(path) | {"with_dense_weights": {text: by_dense}})
        better = by_dense > scored
        assert better_with_dense(found.run, Architecture.parse(text)) == (by_dense if better else None)
        facts = found.export(text, tmp_path / f"export-{by_dense}")
        assert facts["search_top1"] == pytest.approx(100 * by_dense / tuned.total)
        assert facts["weights"].startswith("the dense model" if better else "the supernet")
        file = made / "run" / ("dense.safetensors" if better else "supernet.safetensors")
        model = load_export(tmp_path / f"export-{by_dense}").model.eval()
        assert torch.equal(model.blocks[0].attn.qkv.weight, load_file(file)["blocks.0.attn.qkv.weight"])
        assert torch.equal(model(images), found.model(text)(images))
    write_json(path, summary)
    dense = found.export("dense", tmp_path / "dense")
    assert dense["search_top1"] == tuned.top1
    assert dense["weights"].startswith("the dense model, tuned for 2 epochs")


def test_retraining_is_taught_by_the_runs_dense_model(found, tmp_path):
    found.export("dense", tmp_path / "dense")
    found.export(found.pick(), tmp_path / "export")
    options = {"recipe_changes": {"epochs": 1, "batch_size": 8}, "device": "cpu"}
    facts = retrain(tmp_path / "export", tmp_path / "taught", **options)
    explicit = retrain(tmp_path / "export", tmp_path / "explicit", teacher=tmp_path / "dense", **options)
    alone = retrain(tmp_path / "export", tmp_path / "alone", teacher="none", **options)
    taught, same, other = (load_export(tmp_path / name).model.state_dict() for name in ("taught", "explicit", "alone"))
    assert all(torch.equal(taught[name], same[name]) for name in taught)
    assert any(not torch.equal(taught[name], other[name]) for name in taught)
    assert "with the dense model as teacher" in facts["weights"]
    assert "teacher" not in alone["weights"]
    reached = evaluate(tmp_path / "dense", device="cpu")["top1"]
    assert facts["dense"]["test_top1"] == explicit["dense"]["test_top1"] == reached
    assert f"reaches {reached:.2f} % on the same images" in facts["against_dense"]
    assert evaluate(tmp_path / "taught", device="cpu")["dense_top1"] == reached

    (found.run.dense).rename(found.run.path / "elsewhere")
    try:
        with pytest.raises(
            RunError, match=r"dense\.safetensors, the dense model .* is missing or was changed.* --teacher none"
        ):
            retrain(tmp_path / "export", tmp_path / "gone", **options)
        assert not (tmp_path / "gone").exists()
        assert evaluate(tmp_path / "taught", device="cpu")["dense_top1"] is None
    finally:
        (found.run.path / "elsewhere").rename(found.run.dense)


def test_a_run_with_another_budget_trains_nothing_anew(made, found):
    weights = [path.read_bytes() for path in (found.run.dense, found.run.supernet)]
    again = search(made / "photos", out=made / "run", weights=made / "start.safetensors", **WARM | {"budget": "80%"})
    assert [path.read_bytes() for path in (again.run.dense, again.run.supernet)] == weights
    assert again.run.config.drawn_within == 0.7
    search(made / "photos", out=made / "run", weights=made / "start.safetensors", **WARM)


def test_a_head_that_knows_the_classes_needs_no_tuning(made, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model(WARM["model"], num_classes=2, img_size=16, **SMALL)
    save_file(model.state_dict(), tmp_path / "two.safetensors")
    options = {name: value for name, value in WARM.items() if name != "tune_epochs"}
    found = search(made / "photos", out=tmp_path / "run", weights=tmp_path / "two.safetensors", **options)
    assert (found.run.config.tune_epochs, found.run.config.epochs, found.run.config.guided) == (0, 3, True)
    assert read_tuned(found.run).epochs == 0
    dense = load_file(found.run.dense)
    assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())


def test_an_interrupted_tuning_goes_on_as_if_nothing_had_happened(made, found, tmp_path, monkeypatch):
    from poolshare.search.job import dense

    whole = dense.train_model

    def interrupted(*args, **options):
        steps = iter(range(100))

        def stop(done, loss):
            if next(steps) == 1:
                raise KeyboardInterrupt

        whole(*args, **options | {"progress": stop, "save_seconds": 0})

    monkeypatch.setattr(dense, "train_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(made / "photos", out=tmp_path / "run", weights=made / "start.safetensors", **WARM)
    monkeypatch.setattr(dense, "train_model", whole)
    assert (tmp_path / "run" / "tuning.safetensors").exists()
    again = search(made / "photos", out=tmp_path / "run", weights=made / "start.safetensors", **WARM)
    for name in ("dense", "supernet"):
        here, there = (load_file(one.path / f"{name}.safetensors") for one in (again.run, found.run))
        assert all(torch.equal(here[key], there[key]) for key in there)
    assert again.candidates.equals(found.candidates)


def test_a_loss_is_warned_of_where_it_is_large_and_no_accident():
    rng = random.Random(0)
    for _ in range(200):
        total = rng.randint(20, 2000)
        correct, dense = rng.randint(0, total), rng.uniform(0, 100)
        text = against_dense(correct, total, dense, 0.6)
        top1, high = 100 * correct / total, binomial_interval(correct, total)[1]
        assert text.startswith("warning:") == (dense - top1 > 2 and high < dense)
        assert f"{dense:.2f} %" in text
        assert (f"{dense - top1:.2f} points more" in text) == (dense > top1)
    assert "40% fewer MACs" in against_dense(500, 1000, 90.0, 0.6)
