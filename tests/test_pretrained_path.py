"""The path of a pretrained model: dense model tuned, supernet taught by it, the better weights exported, retraining taught too."""

import itertools
import math
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_identity import OPTIONS, make_photos

from poolshare.search import SearchResult, search, work
from poolshare.search.analysis import finalists
from poolshare.search.analysis.guard import against_dense
from poolshare.search.analysis.pareto import binomial_interval
from poolshare.search.cli import sizing
from poolshare.search.config import SearchConfig, enough_epochs
from poolshare.search.exported.export import better_with_dense, load_export
from poolshare.search.exported.retrain import evaluate, retrain
from poolshare.search.job import prepare as preparing
from poolshare.search.job.dense import read_tuned
from poolshare.search.job.forecast import path_epochs
from poolshare.search.job.prepare import prepare
from poolshare.search.job.records import read_json, write_json
from poolshare.search.untrained import offered as offers
from poolshare.search.untrained import record
from poolshare.search.untrained.damage import single_reductions, steps
from poolshare.search.untrained.search import expected_cost
from poolshare.space import Architecture, CostTable, RunError, SearchSpace
from poolshare.space.presets import WARM_OPERATORS, even_levels, space_for
from poolshare.supernet import Subnet, SuperNet, measure_macs
from poolshare.supernet.training.loop import train_model
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.sandwich import GUIDED, Sandwich

SMALL = {"depth": 4, "embed_dim": 16, "num_heads": 1, "patch_size": 4}
WARM = {name: value for name, value in OPTIONS.items() if name != "epochs"} | {"model_args": SMALL, "budget": "70%"}
RACE = {name: value for name, value in WARM.items() if name not in ("trials", "sampler")} | {"tune_epochs": 2}
WARM |= {"tune_epochs": 2, "epochs": 3, "trials": 12, "sampler": "evolution", "levels": (16, 9, 4)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos, weights of five other classes to begin with, and a finished run with a supernet."""
    folder = tmp_path_factory.mktemp("pretrained")
    make_photos(folder / "photos")
    torch.manual_seed(0)
    model = timm.create_model(WARM["model"], num_classes=5, img_size=16, **SMALL)
    save_file(model.state_dict(), folder / "start.safetensors")
    search(folder / "photos", out=folder / "run", weights=folder / "start.safetensors", **WARM)
    return folder


@pytest.fixture(scope="module")
def found(made):
    return SearchResult(made / "run")


@pytest.fixture(scope="module")
def raced(made):
    """A run with every default of a warm start."""
    return search(made / "photos", out=made / "raced", weights=made / "start.safetensors", **RACE)


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
    assert space_for("vit_tiny_patch16_224", 12, 197, warm=True).operators == WARM_OPERATORS[:-1]  # no grid
    assert space_for("vit_tiny_patch16_224", 12, 196, warm=True, tried=True).max_run == 2
    given = space_for("vit_tiny_patch16_224", 12, 196, (196, 49), ("max2d",), 2, warm=True)
    assert (given.operators, given.levels, given.max_run) == (("max2d",), (196, 49), 2)
    assert space_for("psvit_1d_tiny", 12, 196, warm=True) == space_for("psvit_1d_tiny", 12, 196)


@pytest.mark.parametrize(
    ("given", "decided"),
    [
        ({}, (0, 30, 1000)),
        ({"weights": "x"}, (15, 3, 100)),
        ({"pretrained": True}, (15, 3, 100)),
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


def test_the_forecast_of_the_path_counts_the_teacher_and_every_phase():
    space = SearchSpace(8, (64, 49, 36, 25, 16, 9, 4), ("avg2d",), 1)
    costs = measure_macs(SuperNet.from_timm("digits_vit", space, depth=8, embed_dim=16, num_heads=1))
    dense, train, search_images = costs.total(space[0]), 4000, 1000
    allowed = space.within(costs, None, 0.6 * dense)
    share = allowed.high / dense
    config = SearchConfig(data="x", weights="x", guided=True)
    path = path_epochs(config, allowed, train, search_images)
    sandwich = Sandwich(space, costs, 0, within=0.6, guided=True)
    # in epochs: a forward and a backward of every architecture, and the teacher's forward, of three for the dense model
    steps = [sum(3 * costs.total(one) for one in sandwich.at(step)) / dense + 1 for step in range(200)]
    assert path["tuning"] == 15
    assert path["training"] == pytest.approx(3 * np.mean(steps) / 3, rel=0.05)
    assert path["scoring"] == pytest.approx(100 * share * 1000 / (3 * 4000))
    assert path["retraining"] == pytest.approx(8 * 5000 * (3 * share + 1) / (3 * 4000))
    raced = path_epochs(config.changed(epochs=0), allowed, train, search_images)
    assert raced["retraining"] == pytest.approx(15 * 5000 * share / 4000)  # by labels alone
    assert set(raced) == {"tuning", "scoring", "retraining"}
    assert raced["scoring"] == pytest.approx(expected_cost(allowed, 1000) / dense / (3 * 4000))
    assert sum(raced.values()) < sum(path.values()) < 2 * 15 * 5000 / 4000  # two tunings on all training images
    few, many = (round(sum(one.values())) for one in (raced, path))
    told = sizing._path(config, allowed)
    assert f"15 epochs of retraining: about {few} epochs of the dense model;" in told
    assert told.endswith(f"8 of a retraining with the dense model as teacher: about {many}")


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
    assert (tuned.epochs, tuned.counts.sums, tuned.counts.total) == (2, (right,), len(data.split("search")))
    assert found.report.dense["top1"] == tuned.score


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
    sizes = summary["split_sizes"]
    images = sizes["train"] + sizes["search"]
    epochs = math.ceil(250 / (images // found.run.config.batch_size))  # of the dense model, on all training images
    assert summary["seconds"]["tuning"] == pytest.approx(read_tuned(found.run).seconds, abs=0.001)  # however short
    seconds = summary["seconds"]["tuning"] / 2 / sizes["train"] * images * epochs
    assert found.report.retraining == (epochs, pytest.approx(seconds), found.report.dense["macs"], pytest.approx(1 / 3))


def test_an_export_has_the_better_weights(found, made, tmp_path):
    """Its score is the better one of both, and its logits are those of these weights."""
    summary, tuned = found.run.read_summary(), read_tuned(found.run)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = found.pick().architecture
    scored = float(found.candidates.set_index("architecture").loc[text, "top1"])
    for by_dense in (scored + 1, scored):  # of equals the supernet's
        path = found.run.summary
        write_json(path, read_json(path) | {"with_dense_weights": {text: by_dense}})
        better = by_dense > scored
        assert better_with_dense(found.run, Architecture.parse(text)) == (by_dense if better else None)
        facts = found.export(text, tmp_path / f"export-{by_dense}")
        assert facts["search_score"] == by_dense
        assert facts["weights"].startswith("the dense model" if better else "the supernet")
        file = made / "run" / ("dense.safetensors" if better else "supernet.safetensors")
        model = load_export(tmp_path / f"export-{by_dense}").model.eval()
        assert torch.equal(model.blocks[0].attn.qkv.weight, load_file(file)["blocks.0.attn.qkv.weight"])
        assert torch.equal(model(images), found.model(text)(images))
    write_json(path, summary)
    dense = found.export("dense", tmp_path / "dense")
    assert dense["search_score"] == tuned.score
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
    reached = evaluate(tmp_path / "dense", device="cpu")["score"]
    assert facts["dense"]["test_score"] == explicit["dense"]["test_score"] == reached
    assert f"reaches {reached:.2f} % on the same images" in facts["against_dense"]
    assert evaluate(tmp_path / "taught", device="cpu")["dense_score"] == reached

    (found.run.dense).rename(found.run.path / "elsewhere")
    try:
        with pytest.raises(
            RunError, match=r"dense\.safetensors, the dense model .* is missing or was changed.* --teacher none"
        ):
            retrain(tmp_path / "export", tmp_path / "gone", **options)
        assert not (tmp_path / "gone").exists()
        assert evaluate(tmp_path / "taught", device="cpu")["dense_score"] is None
    finally:
        (found.run.path / "elsewhere").rename(found.run.dense)


def test_finalists_begin_with_the_better_weights_and_have_the_dense_model_as_teacher(found, tmp_path, monkeypatch):
    shutil.copytree(found.folder, tmp_path / "run")
    here, seen = SearchResult(tmp_path / "run"), []

    def seen_not_trained(model, data, recipe, *, teacher, **options):
        seen.append([{name: tensor.clone() for name, tensor in one.state_dict().items()} for one in (model, teacher)])

    monkeypatch.setattr(finalists, "train_model", seen_not_trained)
    first, second = finalists.choose(here.report.allowed, 2, "macs")["architecture"]
    score = here.candidates.set_index("architecture")["top1"]
    write_json(here.run.summary, here.run.read_summary() | {"with_dense_weights": {first: float(score[first]) + 1}})
    rows = here.finalists(2, epochs=1, quiet=True).set_index("architecture")["supernet_score"]
    assert (rows[first], rows[second]) == (score[first] + 1, score[second])
    dense, supernet = load_file(here.run.dense), load_file(here.run.supernet)
    for (start, teacher), weights in zip(seen, (dense, supernet), strict=True):
        whole = start.keys() & weights.keys()  # a layer that shares has a part of its weights
        assert len(whole) > 40
        assert all(torch.equal(start[name], weights[name]) for name in whole)
        assert all(torch.equal(tensor, dense[name]) for name, tensor in teacher.items())


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
        top1, high = 100 * correct / total, binomial_interval(correct, total)[1]
        text = against_dense(top1, high, dense, 0.6)
        assert text.startswith("warning:") == (dense - top1 > 2 and high < dense)
        assert f"{dense:.2f} %" in text
        assert (f"{dense - top1:.2f} points more" in text) == (dense > top1)
    assert "40% fewer MACs" in against_dense(50.0, 53.0, 90.0, 0.6)


def test_few_images_train_no_supernet_and_the_tuned_dense_model_is_searched_as_it_is(made, raced, tmp_path):
    config, summary = raced.run.config, raced.run.read_summary()
    images = len(prepare(config).data.split("train"))
    assert (config.tune_epochs, config.epochs, config.guided, config.races) == (2, 0, True, True)
    assert any(note.startswith(f"{images} training images are few for a supernet") for note in raced.run.notes)
    assert set(summary["phases"]) == {"tuning", "scoring"}
    assert not raced.run.journal.exists()
    dense, supernet = (load_file(path) for path in (raced.run.dense, raced.run.supernet))
    assert all(torch.equal(dense[name], value) for name, value in supernet.items())
    assert raced.report.dense["top1"] == read_tuned(raced.run).score
    assert raced.frontier["macs"].max() <= 0.7 * raced.report.dense["macs"]
    assert "the dense model of the same training reaches" in raced.report.verdict
    facts = raced.export(raced.pick(), tmp_path / "export")
    assert facts["weights"].startswith("the dense model, tuned for 2 epochs")
    assert facts["dense"]["search_score"] == raced.report.dense["top1"]
    with pytest.raises(RunError, match="has no supernet"):
        work(raced.folder, quiet=True)
    raced.export("dense", tmp_path / "dense")
    # labels of all images say more than a model that was tuned on a part of few
    options = {"recipe_changes": {"batch_size": 8, "epochs": 1}, "device": "cpu"}
    taught = retrain(tmp_path / "export", tmp_path / "taught", teacher=tmp_path / "dense", **options)
    alone = retrain(tmp_path / "export", tmp_path / "alone", **options)
    assert ("as teacher" in taught["weights"], "as teacher" in alone["weights"]) == (True, False)
    assert alone["dense"]["test_score"] == taught["dense"]["test_score"]


def test_of_few_images_as_many_epochs_are_taken_as_250_steps_need(made):
    assert [enough_epochs(15, steps) for steps in (1, 7, 15, 16, 17, 15_625)] == [250, 36, 17, 16, 15, 15]
    options = {name: value for name, value in RACE.items() if name not in ("tune_epochs", "quiet")}
    job = prepare(SearchConfig(data=str(made / "photos"), weights=str(made / "start.safetensors"), **options))
    images = len(job.data.split("train"))
    assert job.config.tune_epochs == math.ceil(250 / (images // RACE["batch_size"])) > 15
    assert f"{images} training images are few steps an epoch: the dense model is tuned for" in " ".join(job.notes)


def test_a_race_is_continued_and_asked_for_another_budget_without_scoring_anything_twice(made, raced, monkeypatch):
    scored, real = [], record.image_scores

    def counted(supernet, architectures, *args, **options):
        scored.extend(map(str, architectures))
        return real(supernet, architectures, *args, **options)

    monkeypatch.setattr(record, "image_scores", counted)
    before, weights = raced.run.candidates.read_bytes(), raced.run.dense.read_bytes()
    for budget, new in (("70%", False), ("85%", True), ("70%", False)):
        scored.clear()
        given = RACE | {"budget": budget}
        again = search(made / "photos", out=raced.folder, weights=made / "start.safetensors", **given)
        assert bool(scored) == new
        assert len(scored) == len(set(scored))
        assert again.run.config.operators == raced.run.config.operators
    assert raced.run.candidates.read_bytes() == before
    assert raced.run.dense.read_bytes() == weights


def test_many_images_train_a_supernet(made, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "FEW_IMAGES", 5)
    given = {name: value for name, value in RACE.items() if name != "quiet"}
    job = prepare(SearchConfig(data=str(made / "photos"), weights=str(made / "start.safetensors"), **given))
    assert (job.config.epochs, job.config.races) == (3, False)


def test_operators_that_harm_the_tuned_model_most_are_left_out(made, tmp_path):
    """The damage of each single reduction by models that are run alone, one by one."""
    levels = (16, 9, 4)  # each is measured, so nothing is interpolated
    found = search(
        made / "photos", out=tmp_path / "run", weights=made / "start.safetensors", **RACE | {"levels": levels}
    )
    wide = space_for(WARM["model"], 4, 16, levels, warm=True, tried=True)
    images = torch.cat([images for images, _ in prepare(found.run.config).data.eval_loader("search", 8)])
    base, options = found.model("dense").base

    @torch.inference_mode()
    def answers(architecture):
        model = Subnet.from_base(base, str(architecture), **options)
        model.load_state_dict(load_file(found.run.dense))
        return model.eval()(images).double().log_softmax(-1)

    dense, nats = answers(wide[0]), {}
    for single in single_reductions(wide):
        ((index, _, layer),) = steps(single)
        if layer.shared:
            continue
        kl = F.kl_div(answers(single), dense, reduction="none", log_target=True).sum(-1).mean().item()
        nats.setdefault(layer.operator, {})[index, layer.tokens] = max(kl, 1e-6)
    for measured in nats.values():
        for index in (1, 2, 3):  # fewer tokens are taken to harm no less
            measured[index, 4] = max(measured[index, 4], measured[index, 9])
    typical = {name: np.exp(np.mean(np.log([*measured.values()]))) for name, measured in nats.items()}
    least = min(typical.values())
    assert set(found.run.config.operators) == {name for name, value in typical.items() if value <= 2 * least}
    [note] = [note for note in found.run.notes if note.startswith("tried on the dense model")]
    for name, value in typical.items():
        assert float(re.search(rf"\b{name} ([\d.e-]+)", note)[1]) == pytest.approx(
            value, rel=0.01, abs=5e-7
        )  # a loss is whole micronats
    assert (found.run.config.max_run == 2) == ("harms no more" in note)


def test_operators_that_were_asked_for_stay(made, tmp_path):
    given = RACE | {"operators": ("avg2d", "topk"), "levels": (16, 9, 4), "max_run": 2}
    config = search(made / "photos", out=tmp_path / "run", weights=made / "start.safetensors", **given).run.config
    assert (config.operators, config.max_run, config.levels) == (("avg2d", "topk"), 2, (16, 9, 4))


def test_sharing_is_offered_where_a_layer_that_shares_harms_less_than_dropping_tokens_for_as_much():
    space = SearchSpace(4, (16, 9, 4), ("tome",), 2)
    own, shared = {16: 100, 9: 60, 4: 30}, {16: 90, 9: 55, 4: 28}
    costs = CostTable("macs", 0, own, shared, dict.fromkeys(space.reductions, 1), dict.fromkeys(space.levels, 0))
    job = SimpleNamespace(objective=costs, dense=space[0])
    drops = {"16*1 16 16 9@tome": 0.2, "16 16 16 4@tome": 0.5, "16 9@tome 9 9": 0.1}
    for nats, wanted in ((0.09, True), (0.11, False)):
        damage = {Architecture.parse(text): value for text, value in drops.items()}
        damage |= {Architecture.parse("16 16 16*2"): nats, Architecture.parse("16*2 16 16"): 9.0}
        assert offers._sharing_harms_less(job, damage, ["tome"]) == wanted
