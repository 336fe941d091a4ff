"""`search --no-training`: a model with its trained head is made cheaper as it is, with labels and without them."""

import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from poolshare.search import search
from poolshare.search.config import checked_config
from poolshare.search.exported.retrain import evaluate, retrain
from poolshare.search.job import job as job_module
from poolshare.search.job.folder import RunFolder
from poolshare.search.job.prepare import prepare, space_of
from poolshare.search.untrained import job as untrained_job
from poolshare.search.untrained import record as untrained_record
from poolshare.search.untrained import search as untrained_search
from poolshare.search.untrained.job import run_untrained
from poolshare.search.untrained.record import Record
from poolshare.space import Architecture, CostTable, PoolshareError
from poolshare.space.presets import UNTRAINED, aligned_levels, even_levels
from poolshare.supernet.base import outline
from poolshare.supernet.latency import Latency, device_name
from poolshare.supernet.training.checkpoint import load_tensors

OPTIONS = {"depth": 4, "embed_dim": 24, "num_heads": 2}
MODEL = {"model": "vit_tiny_patch16_224", "img_size": 64, "model_args": OPTIONS, "training": False, "device": "cpu"}
SMALL = {"levels": (16, 8, 4), "operators": ("tome", "evit")}
CLASSES = ("ash", "beech", "cedar")


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 64)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights of a small ViT, 24 images in class folders, and 20 pictures without labels."""
    root = tmp_path_factory.mktemp("models")
    model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, **OPTIONS))
    save_file(model.state_dict(), root / "model.safetensors")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for index in range(24):
        picture(root / "labelled" / CLASSES[index % 3] / f"{index}.png", index)
    for index in range(20):
        picture(root / "pictures" / ("holiday" if index % 2 else ".") / f"{index}.png", 100 + index)
    return root


@pytest.fixture(scope="module")
def labelled(place):
    weights, data = place / "model.safetensors", place / "labelled"
    return search(data, out=place / "run", weights=weights, quiet=True, **MODEL | {"levels": (16, 8, 4)})


@pytest.fixture(scope="module")
def unlabelled(place):
    given = {"weights": place / "model.safetensors", "class_map": place / "classes.txt", "unlabelled": True}
    return search(place / "pictures", out=place / "run-2", quiet=True, **MODEL, **given, **SMALL)


def test_its_defaults_suit_a_model_that_is_not_trained_for_any_of_this(labelled):
    config = labelled.run.config
    assert (config.operators, config.max_run, config.budget, config.epochs) == (UNTRAINED, 1, "70%", 0)
    assert labelled.frontier["macs"].max() <= 0.7 * labelled.report.dense["macs"]
    usual = checked_config(data="photos", training=False, weights="mine.pth")
    tiny, registers = (outline(name, {}) for name in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3"))
    assert space_of(usual, tiny).levels == even_levels(196)
    auto = checked_config(data="photos", training=False, weights="mine.pth", levels="auto")
    assert space_of(auto, tiny).levels == aligned_levels(196, 1)
    assert space_of(auto, registers).levels == aligned_levels(256, 5)


def test_the_model_is_the_users_own(place, labelled, tmp_path):
    labelled.export("dense", tmp_path / "dense")
    exported, given = load_file(tmp_path / "dense" / "model.safetensors"), load_file(place / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in given.items())


@torch.inference_mode()
def test_losses_and_accuracies_are_those_of_the_exported_models_on_every_image(labelled):
    data = prepare(labelled.run.config.without_weights, None, None, classes=labelled.run.classes).data
    images, labels = zip(*data.eval_loader("search", 8), strict=True)
    images, labels = torch.cat(images), torch.cat(labels)
    assert len(images) == 19
    assert labelled.report.images == 19
    dense = labelled.model("dense")(images).double().log_softmax(dim=-1)
    assert len(labelled.candidates) > 3
    for row in labelled.candidates.to_dict("records"):
        logits = labelled.model(row["architecture"])(images)
        losses = F.kl_div(logits.double().log_softmax(dim=-1), dense, reduction="none", log_target=True).sum(dim=-1)
        assert row["loss"] == pytest.approx(float(losses.mean()), abs=2e-5)
        assert row["loss_margin"] == pytest.approx(2.1009 * float(losses.std()) / 19**0.5, rel=1e-3, abs=2e-5)
        assert row["correct"] == int((logits.argmax(dim=-1) == labels).sum())


def test_what_was_spent_is_kept_in_a_unit_that_no_objective_changes(labelled):
    passes = load_tensors(labelled.run.losses)[1]["spent"] / labelled.report.images
    assert labelled.run.read_summary()["dense_passes"] == pytest.approx(passes, abs=0.05)


def test_its_frontier_and_picks_are_by_loss(labelled):
    rows, candidates = labelled.frontier, labelled.candidates
    within = candidates[candidates["macs"] <= 0.7 * labelled.report.dense["macs"]]
    wanted = [r for r in within.to_dict("records") if not any(
        (o["macs"] <= r["macs"] and o["loss"] < r["loss"]) or (o["macs"] < r["macs"] and o["loss"] <= r["loss"])
        for o in within.to_dict("records")
    )]  # fmt: skip
    assert set(rows["architecture"]) == {row["architecture"] for row in wanted}
    assert labelled.pick("budget").architecture == within.loc[within["loss"].idxmin(), "architecture"]
    assert "least damaging within" in labelled.pick("budget").why


def test_a_stopped_search_goes_on_and_finds_the_same(place, monkeypatch):
    given = {"weights": place / "model.safetensors", "class_map": place / "classes.txt", "unlabelled": True}
    walks, real = [], untrained_record.image_scores

    def counted(supernet, architectures, batches, **options):
        if "progress" in options:  # no trial for the forecast
            walks.append(len(architectures))
        if stop and len(walks) == stop:
            raise KeyboardInterrupt
        return real(supernet, architectures, batches, **options)

    monkeypatch.setattr(untrained_record, "image_scores", counted)

    def again(name):
        walks.clear()
        return search(place / "pictures", out=place / name, quiet=True, **MODEL, **given, **SMALL)

    monkeypatch.setattr(untrained_search, "FEWEST", 4)  # so that there is a race on 10 and on 20 images
    stop = 0
    whole, all_of_them = again("whole"), list(walks)
    assert len(all_of_them) >= 3
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        again("stopped")
    assert not (place / "stopped" / "candidates.csv").exists()
    stop = 0
    found = again("stopped")
    assert walks == all_of_them[2:]
    assert (found.folder / "candidates.csv").read_bytes() == (whole.folder / "candidates.csv").read_bytes()
    again("stopped")
    assert walks == []  # all is known


def test_another_budget_is_forecast_beside_what_the_record_holds(place, tmp_path, monkeypatch):
    monkeypatch.setattr("poolshare.search.progress.SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(untrained_search, "FEWEST", 4)
    given = {"weights": str(place / "model.safetensors"), "class_map": str(place / "classes.txt"), "unlabelled": True}
    for budget in ("90%", "70%"):
        config = checked_config(data=str(place / "pictures"), budget=budget, **MODEL, **given, **SMALL)
        console = Console(file=io.StringIO(), width=300)
        run_untrained(config, tmp_path / "run", console)
        said = console.file.getvalue()
        assert "searching without training: 100%" in said
        assert "longer than forecast" not in said
        assert float(re.search(r"as long as the dense model on ([\d,]+) images", said)[1].replace(",", "")) > 0
        assert ("goes on" in said) == (budget == "70%")
        record = Record(RunFolder.open(tmp_path / "run"))
        record.spent *= 10  # as in a larger space, of which other budgets allow other parts
        record.save()


def test_pictures_without_labels_are_scored_by_agreement(place, unlabelled, verb, tmp_path):
    report = unlabelled.report
    assert (report.metric, report.images, report.dense["top1"], report.baseline) == ("agreement", 20, 100.0, None)
    assert unlabelled.run.classes == CLASSES
    status, out, _ = verb("pareto", unlabelled.folder)
    assert status == 0
    assert "agreement %" in out
    assert "loss" in out
    assert "top-1" not in out
    page = (unlabelled.folder / "report.html").read_text()
    assert '"score":"agreement"' in page
    assert '"loss":[' in page
    facts = unlabelled.export(unlabelled.pick(), tmp_path / "export")
    assert "search_score" not in facts
    assert facts["search_loss"] > 0
    status, _, err = verb("evaluate", tmp_path / "export")
    assert status == 2
    assert "searched on pictures without labels" in err
    assert "--data FOLDER" in err
    status, out, err = verb("evaluate", tmp_path / "export", "--data", place / "labelled", "--json")
    assert status == 0, err
    assert json.loads(out)["total"] == 24
    assert verb("predict", tmp_path / "export", place / "pictures" / "0.png")[0] == 0
    status, _, err = verb("finalists", unlabelled.folder)
    assert status == 1
    assert "--no-training" in err


def test_by_cross_entropy_labels_decide_and_the_dense_model_is_what_losses_are_compared_with(place, tmp_path):
    given = {"weights": place / "model.safetensors", "quiet": True, **MODEL, **SMALL}
    found = search(place / "labelled", out=tmp_path / "run", score="loss", **given)
    data = prepare(found.run.config.without_weights, None, None, classes=found.run.classes).data
    [(images, labels)] = data.eval_loader("search", 100)

    def losses(text):
        with torch.inference_mode():
            return F.cross_entropy(found.model(text)(images).double(), labels, reduction="none").numpy()

    dense = losses("dense")
    assert found.report.dense["loss"] == pytest.approx(dense.mean(), abs=2e-5)
    for row in found.candidates.to_dict("records"):
        more = losses(row["architecture"]) - dense
        assert row["loss"] == pytest.approx((more + dense).mean(), abs=2e-5)
        assert row["loss_margin"] == pytest.approx(2.1009 * more.std(ddof=1) / 19**0.5, rel=1e-3, abs=2e-5)
    assert "The loss is the cross-entropy with the labels" in found.report.verdict
    card = (tmp_path / "export" / "README.md") if found.export(found.pick(), tmp_path / "export") else None
    assert "cross-entropy with the labels |" in card.read_text()
    again = search(
        place / "labelled", out=tmp_path / "run", **given
    )  # by divergence: losses of another kind do not mix
    assert again.report.dense["loss"] == 0
    assert "divergence from the dense network's answers" in again.report.verdict


def test_one_epoch_of_repair_is_taught_by_the_dense_model(place, labelled, tmp_path):
    facts = labelled.export(labelled.pick(), tmp_path / "export")
    assert facts["dense"]["search_score"] == labelled.report.dense["top1"]
    labelled.export("dense", tmp_path / "dense")
    options = {"device": "cpu", "recipe_changes": {"epochs": 1, "batch_size": 8}}
    taught = retrain(tmp_path / "export", tmp_path / "taught", **options)
    assert "retrained for 1 epochs" in taught["weights"]
    assert "with the dense model as teacher" in taught["weights"]
    retrain(tmp_path / "export", tmp_path / "explicit", teacher=tmp_path / "dense", **options)
    retrain(tmp_path / "export", tmp_path / "alone", teacher="none", **options)
    one, two, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("taught", "explicit", "alone"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert any(not torch.equal(one[name], tensor) for name, tensor in alone.items())
    reached = evaluate(tmp_path / "dense", device="cpu")["score"]
    assert taught["dense"]["test_score"] == evaluate(tmp_path / "taught", device="cpu")["dense_score"] == reached


def test_a_budget_in_milliseconds_is_kept_by_the_table(place, tmp_path, monkeypatch):
    measured = []

    def table(supernet, batch_size, **_):
        """A microsecond for each token of a block, and no clock."""
        space = supernet.space
        own = {tokens: 1000 * tokens for tokens in space.levels}
        pools, sinks = dict.fromkeys(space.reductions, 500), dict.fromkeys(space.levels, 100)
        measured.append(CostTable("latency", 2000, own, own, pools, sinks))
        return Latency(measured[-1], batch_size, device_name(torch.device("cpu")), torch.get_num_threads(), "fp32", ())

    monkeypatch.setattr(job_module, "measure_latency_table", table)
    monkeypatch.setattr(untrained_job, "time_models", lambda *_: None)
    given = {"weights": place / "model.safetensors", "quiet": True, "search_images": 6, "latency_batch": 4, **MODEL}
    given |= {"operators": ("evit",), "levels": "auto"}
    best = {}
    for limit in (60_000, 50_000):
        found = search(place / "labelled", out=tmp_path / "run", budget=f"{limit / 1e6}ms", **given)
        assert (found.run.config.objective, found.report.limits) == ("latency", {"latency_ms": limit / 1e6})
        assert found.run.config.levels == (16, 15, 7)  # with the CLS token 16 and 8
        totals = [measured[0].total(Architecture.parse(text)) for text in found.candidates["architecture"]]
        assert list(found.candidates["latency_ms"] * 1e6) == pytest.approx(totals)
        within = found.candidates[[total <= limit for total in totals]].set_index("architecture")["loss"]
        best[limit] = within.min()
        assert within[found.pick("budget").architecture] == best[limit]
    assert best[60_000] <= best[50_000]
    assert len(measured) == 1  # kept in the run folder


def test_loose_pictures_are_noticed_without_being_told(place, tmp_path):
    for index in range(6):
        picture(tmp_path / "loose" / f"{index}.png", index)
    found = search(
        tmp_path / "loose", out=tmp_path / "run", weights=place / "model.safetensors", quiet=True, **MODEL, **SMALL
    )
    assert found.run.config.unlabelled
    assert found.run.classes == ("0", "1", "2")
    assert any("6 images distinguish architectures poorly" in note for note in found.run.notes)


def first_half(logits, labels):
    return logits.argmax(dim=-1) // 2 == labels // 2


class Opened:
    def __reduce__(self):
        return (open, ("/dev/null",))


def make_bad(root: Path, place: Path) -> None:
    for index in range(4):
        picture(root / "two" / ("oak", "yew")[index % 2] / f"{index}.png", index)
        picture(root / "part" / ("ash", "beech", "oak")[index % 3] / f"{index}.png", index)
    picture(root / "one" / "0.png", 0)
    (root / "none").mkdir()
    other = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, **OPTIONS | {"embed_dim": 48})
    save_file(other.state_dict(), root / "other.safetensors")
    resnet = timm.create_model("resnet10t", num_classes=3)
    save_file(resnet.state_dict(), root / "resnet.safetensors")
    headless = {k: v for k, v in load_file(place / "model.safetensors").items() if not k.startswith("head")}
    save_file(headless, root / "headless.safetensors")
    (root / "code.pth").write_bytes(pickle.dumps({"model": Opened()}))
    torch.save({"code": Opened()}, root / "code.pt")
    named = {"state_dict": load_file(place / "model.safetensors"), "classes": list(CLASSES)}
    torch.save(named, root / "named.pth")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "two"}, "it has 3 classes, the data 2"),
        ({"data": "part", "weights": "named.pth"}, "2 of the data's 3 classes are among the names"),
        ({"data": "one"}, "holds 1 image to score on"),
        ({"data": "none"}, "no class folders in"),
        ({"data": "none", "unlabelled": True}, "no image"),
        ({"data": "absent"}, "no data at"),
        ({"data": "absent", "unlabelled": True}, "no folder of pictures at"),
        ({"data": "digits", "unlabelled": True}, "--unlabelled goes with a folder of pictures"),
        (
            {"weights": "other.safetensors"},
            "other.safetensors does not fit vit_tiny_patch16_224.augreg_in21k_ft_in1k: it has in another shape",
        ),
        ({"weights": "resnet.safetensors"}, "resnet.safetensors is not a checkpoint of vit_tiny_patch16_224"),
        ({"weights": "headless.safetensors"}, "without a head for classes"),
        ({"weights": "code.pth"}, "code.pth holds pickled code"),
        ({"weights": "code.pt"}, "code.pt holds pickled code (io.open)"),
        ({"weights": None}, "has no trained weights yet"),
        ({"data": "loose", "score": "loss"}, "--score loss is the cross-entropy with labels, and the pictures of"),
        ({"score": "metric"}, "--score metric tells too little apart without training"),
        ({"epochs": 3}, "--epochs 3 belongs to training"),
        ({"recipe": {"mixup": 0.5}}, "--recipe"),
        ({"trials": 10}, "--trials 10 belongs to training"),
        ({"search_images": 1}, "--search-images 1"),
        ({"training": True, "unlabelled": True}, "--unlabelled goes with --no-training"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes, says, place, bad, tmp_path):
    given = MODEL | SMALL | {"data": place / "labelled", "weights": place / "model.safetensors"} | changes
    for name in ("data", "weights"):
        if isinstance(given[name], str) and given[name] != "digits":
            given[name] = bad / given[name]
    data = given.pop("data")
    with pytest.raises(PoolshareError) as caught:
        search(data if data == "digits" else str(data), out=tmp_path / "run", quiet=True, **given)
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def bad(place, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    make_bad(root, place)
    for index in range(4):
        picture(root / "loose" / f"{index}.png", index)
    return root


def test_of_many_images_some_are_drawn_and_of_each_class_one_is_enough(place, tmp_path):
    for index, name in enumerate(CLASSES):
        picture(tmp_path / "data" / name / "only.png", index)
    weights = place / "model.safetensors"
    found = search(
        tmp_path / "data", out=tmp_path / "run", weights=weights, quiet=True, search_images=2, **MODEL, **SMALL
    )
    assert found.report.images == 2
    assert sum(found.run.read_summary()["images"]["search"]) == 2
    assert any("2 of the 3 images are scored on" in note for note in found.run.notes)
    assert any("none of its 3 images were set aside as test" in note for note in found.run.notes)


def test_the_command_line_has_it(verb, place, tmp_path):
    words = [
        "search",
        "--data",
        place / "pictures",
        "--unlabelled",
        "--no-training",
        "--search-images",
        12,
        "--levels",
        "16,4",
    ]
    words += ["--weights", place / "model.safetensors", "--img-size", 64, "--operators", "tome"]
    words += ["--model-args", ",".join(f"{name}={value}" for name, value in OPTIONS.items()), "--device", "cpu"]
    status, out, err = verb(*words, "--out", tmp_path / "run")
    assert status == 0, err
    assert "takes about as long as the dense model on" in err  # beforehand
    assert "tried without training" in " ".join(out.split())
    assert "agreement" in out
