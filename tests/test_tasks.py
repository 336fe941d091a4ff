"""Tasks: what they count against scikit-learn and scipy, and searches for them from a folder to predictions."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Forked, randomise
from opened import open_data
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score
from torch.utils.data import Dataset, TensorDataset

from poolshare.search import SearchResult, evaluate, predict, retrain, search
from poolshare.search.analysis.intervals import difference_interval, score_interval
from poolshare.search.counts import Counts
from poolshare.search.job import together
from poolshare.search.job.prepare import prepare
from poolshare.search.scoring import answers, image_scores, score_counts
from poolshare.space import PoolshareError, SearchSpace
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.tasks import TASKS
from poolshare.supernet.training.sandwich import taught_loss

MULTILABEL, EMBEDDING, CLASSIFICATION = (TASKS[name] for name in ("multilabel", "embedding", "classification"))
SMALL = {
    "model": "digits_vit",
    "model_args": {"depth": 3, "embed_dim": 16, "num_heads": 2},
    "img_size": 8,
    "in_chans": 1,
}
SMALL |= {"batch_size": 16, "device": "cpu", "quiet": True}
SMALL_OWN = {name: value for name, value in SMALL.items() if name not in ("img_size", "in_chans")}
UNTRAINED = {name: value for name, value in SMALL.items() if name != "batch_size"}
LABELS = ("bottom", "left", "top")


def made_up(task, count=200, classes=5, seed=0):
    """Outputs and targets of so many images."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, classes, *((2, 3) if task.targets == "pixels" else ()))
    outputs, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return outputs, task.as_targets(outputs + 1.5 * noise)


def head_of(task):
    """Options of a model for the task."""
    return {"head": "linear"} if task.targets == "pixels" else {}


def contributions_of(task, **options):
    outputs, targets = made_up(task, **options)
    return task.contributions(outputs, targets).numpy()


def score_of(task, contributions):
    return float(
        task.number(contributions.reshape(len(contributions), -1).sum(axis=0, dtype=np.int64), len(contributions))
    )


def test_scores_are_scikit_learns():
    outputs, labels = made_up(CLASSIFICATION)
    top1 = score_of(CLASSIFICATION, CLASSIFICATION.contributions(outputs, labels).numpy())
    assert top1 == pytest.approx(100 * accuracy_score(labels, outputs.argmax(1)))

    outputs, wanted = made_up(MULTILABEL)
    wanted[:, 4] = 0
    outputs[:, 4] = -1.0  # a class that neither occurs nor is predicted
    counted = MULTILABEL.contributions(outputs, wanted).numpy()
    assert score_of(MULTILABEL, counted) == pytest.approx(
        100 * f1_score(wanted, outputs > 0, average="macro", zero_division=0)
    )
    details = MULTILABEL.details(counted, wanted, outputs, list("abcde"))
    assert details["micro_f1"] == pytest.approx(100 * f1_score(wanted, outputs > 0, average="micro"))
    precision = 100 * average_precision_score(wanted[:, :4], outputs[:, :4], average="macro")
    assert details["mean_average_precision"] == pytest.approx(precision)
    each = f1_score(wanted, outputs > 0, average=None, zero_division=0)
    assert [one["score"] for one in details["per_class"]] == pytest.approx(100 * each)
    assert [one["images"] for one in details["per_class"]] == wanted.sum(0).tolist()

    outputs, targets = made_up(EMBEDDING)
    similar = F.cosine_similarity(outputs.double(), targets.double())
    assert score_of(EMBEDDING, EMBEDDING.contributions(outputs, targets).numpy()) == pytest.approx(
        100 * float(similar.mean()), abs=1e-4
    )


def test_losses_are_torchs_and_divergences_those_of_their_definition():
    outputs, wanted = made_up(MULTILABEL)
    other = outputs + 0.3
    loss = F.binary_cross_entropy_with_logits(outputs, wanted.float())
    assert float(MULTILABEL.loss(outputs, wanted)) == pytest.approx(float(loss))
    p, q = (logits.double().sigmoid() for logits in (other, outputs))
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1)
    assert torch.allclose(MULTILABEL.divergence(outputs.double(), other.double()), kl)
    assert torch.allclose(EMBEDDING.divergence(outputs, other), 1 - F.cosine_similarity(outputs, other))
    for task in TASKS.values():
        (outputs, _), (other, _) = (made_up(task, seed=seed) for seed in (0, 1))
        assert float(task.divergence(outputs, outputs).abs().max()) < 1e-6
        # the gradient by a teacher is that of the divergence, whatever constant the loss has besides
        mine, theirs = (outputs.clone().requires_grad_() for _ in range(2))
        task.follow(mine, other).backward()
        task.divergence(theirs, other).mean().backward()
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_intervals_are_those_of_scipy(task):
    ours, theirs = (contributions_of(task, seed=seed) for seed in (0, 1))

    def score(*chosen):
        scores = [score_of(task, part[chosen[0]]) for part in (ours, theirs)[: len(chosen)]]
        return scores[0] - scores[1] if len(scores) > 1 else scores[0]

    options = {"method": "percentile", "n_resamples": 2000, "vectorized": False, "rng": np.random.default_rng(1)}
    found = score_interval(task, ours)
    if task.proportion:
        wilson = stats.binomtest(int(ours.sum()), len(ours)).proportion_ci(0.95, method="wilson")
        assert found == pytest.approx((100 * wilson.low, 100 * wilson.high))
    else:
        expected = stats.bootstrap((np.arange(len(ours)),), score, **options).confidence_interval
        width = expected.high - expected.low
        assert found == pytest.approx((expected.low, expected.high), abs=0.1 * width)
    places = np.arange(len(ours))
    gap = stats.bootstrap((places, places), lambda a, b: score(a, a), paired=True, **options).confidence_interval
    assert difference_interval(task, ours, theirs) == pytest.approx((gap.low, gap.high), abs=0.1 * (gap.high - gap.low))
    assert difference_interval(task, ours, ours) == (0, 0)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_sums_are_the_same_whatever_the_batches_and_whoever_counts(task):
    space = SearchSpace(depth=3, levels=(16, 4), operators=("avg2d",), max_run=2)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2} | head_of(task)
    net = randomise(SuperNet.from_timm("vit_tiny_patch16_224", space, num_classes=task.outputs(5), **options)).eval()
    images = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        targets = task.as_targets(net(images.flip(0)))
    architectures = [space[rank] for rank in range(5)]

    def batches(size, chosen=slice(None)):
        return list(zip(images[chosen].split(size), targets[chosen].split(size), strict=True))

    for score in ("metric", "loss", "divergence"):
        count = partial(score_counts, net, architectures, score=score, task=task)
        whole = count(batches(4))
        assert [one.total for one in whole] == [11] * 5
        assert whole == count(batches(4)[::-1])  # in another order
        parts = count(batches(4, slice(0, 8))), count(batches(4, slice(8, None)))  # two workers, or processes
        assert [one.plus(other) for one, other in zip(*parts, strict=True)] == whole
        for one in whole:
            assert Counts.from_json(json.loads(json.dumps(one.to_json())), score, task) == one
            assert Counts.of_row(one.columns(task), score != "metric") == one
    per_image = image_scores(net, architectures, batches(4), task=task)
    assert per_image.counts == whole
    for row, architecture in enumerate(architectures):
        alone = answers(Subnet.from_supernet(net, architecture), batches(4), task)
        assert (alone.contributions == per_image.contributions[row]).all()
        assert alone.counts.sums == whole[row].sums


def test_without_targets_the_dense_models_answers_are_the_targets():
    space = SearchSpace(depth=3, levels=(16, 4), operators=("avg2d",), max_run=2)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for task in TASKS.values():
        net = randomise(
            SuperNet.from_timm("vit_tiny_patch16_224", space, num_classes=task.outputs(5), **options, **head_of(task))
        ).eval()
        found = image_scores(net, [space[0], space[3]], [(images, torch.zeros(6))], labelled=False, task=task)
        dense, other = (counts.score(task) for counts in found.counts)
        assert dense == pytest.approx(100, abs=30 if task is MULTILABEL else 1e-3)  # no image may have some class
        assert other < dense or task.proportion  # of six images all may be answered alike


def test_a_teacher_of_the_dense_models_features_is_all_there_is_to_learn_from():
    outputs, taught = made_up(EMBEDDING)
    loss = taught_loss(EMBEDDING, outputs, torch.zeros(200), taught, distill=0.3)
    assert float(loss) == pytest.approx(float(1 - F.cosine_similarity(outputs, taught).mean()))
    outputs, wanted = made_up(MULTILABEL)
    mixed = taught_loss(MULTILABEL, outputs, wanted, outputs + 1, distill=0.3)
    both = 0.7 * MULTILABEL.loss(outputs, wanted) + 0.3 * MULTILABEL.follow(outputs, outputs + 1)
    assert float(mixed) == pytest.approx(float(both))


def draw(folder: Path, count: int, seed: int = 0) -> dict[str, list[str]]:
    """Grey images of 8×8 that are bright where their labels say; returns the labels by file."""
    rng, labels = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels, has = rng.integers(0, 90, (8, 8)), rng.random(3) < 0.5
        parts = (np.s_[5:, :], np.s_[:, :3], np.s_[:3, :])
        for part in (part for part, there in zip(parts, has, strict=True) if there):
            pixels[part] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        labels[f"{index}.png"] = [name for name, there in zip(LABELS, has, strict=True) if there]
    return labels


def table(folder: Path, labels: dict[str, list[str]]) -> None:
    rows = [f"{file},{'|'.join(names)}" for file, names in labels.items()]
    (folder / "labels.csv").write_text("\n".join(["file,labels", *rows]) + "\n")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """ROOT/train and ROOT/test, each with a table."""
    root = tmp_path_factory.mktemp("tagged")
    for part, count, seed in (("train", 90, 0), ("test", 30, 1)):
        table(root / part, draw(root / part, count, seed))
    return root


@pytest.fixture(scope="module")
def found(tagged, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tagged"
    return search(tagged, out=out, task="multilabel", epochs=8, trials=12, sampler="evolution", budget="80%", **SMALL)


def test_several_labels_are_searched_exported_retrained_and_predicted(found, tagged, tmp_path, verb):
    frame = found.candidates
    assert list(frame.columns[:4]) == ["architecture", "macro_f1", "sums", "total"]
    assert found.run.classes == LABELS
    best = found.pick()
    assert found.report.metric == "macro F1"
    row = frame.set_index("architecture").loc[best.architecture]
    counts = Counts.of_row(row, False)
    assert len(counts.sums) == 9
    assert counts.score(MULTILABEL) == row["macro_f1"] > 60  # it learns
    low, high, gap_low, gap_high = found.report.intervals[best.architecture]
    assert low < row["macro_f1"] < high
    assert gap_low <= row["macro_f1"] - found.report.dense_score <= gap_high
    assert "macro F1 % (95 %)" in verb("pareto", found.folder)[1]

    found.export(best, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "macro F1, before retraining, search-validation" in card
    facts = retrain(tmp_path / "export", tmp_path / "retrained", recipe_changes={"epochs": 2}, device="cpu")
    assert (facts["metric"], facts["test_total"]) == ("macro F1", 30)
    result = evaluate(tmp_path / "retrained", device="cpu")
    assert result["score"] == facts["test_score"]
    assert result["interval"][0] < result["score"] < result["interval"][1]
    assert [one["class"] for one in result["details"]["per_class"]] == list(LABELS)
    said = predict(tmp_path / "retrained", [tagged / "test"], device="cpu")
    by_hand = {Path(one["image"]).name: {each["class"] for each in one["classes"]} for one in said}
    lines = [line.split(",") for line in (tagged / "test" / "labels.csv").read_text().splitlines()[1:]]
    wanted = {file: {*labels.split("|")} - {""} for file, labels in lines}
    hot = [np.array([[name in one[file] for name in LABELS] for file in wanted]) for one in (wanted, by_hand)]
    assert 100 * f1_score(*hot, average="macro", zero_division=0) == pytest.approx(result["score"])


def test_the_same_call_scores_nothing_again_and_another_budget_only_what_is_new(found, tagged, monkeypatch):
    before = found.candidates
    with monkeypatch.context() as patch:
        patch.setattr(together, "score_counts", lambda *a, **o: pytest.fail("scored again"))
        options = {"task": "multilabel", "epochs": 8, "trials": 12, "sampler": "evolution", "budget": "80%"}
        again = search(tagged, out=found.folder, **options, **SMALL)
    assert again.candidates.equals(before)
    assert again.report.intervals == found.report.intervals


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file of made-up weights with a head, as a model that was trained elsewhere has."""
    torch.manual_seed(0)
    model = timm.create_model("digits_vit", num_classes=7, img_size=8, in_chans=1, **SMALL["model_args"])
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(randomise(model).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images, some of them in folders, none with a label."""
    root = tmp_path_factory.mktemp("pictures")
    draw(root, 30, 0)
    draw(root / "more", 40, 1)
    return root


def test_embeddings_are_learnt_from_the_dense_model_without_labels_or_head(trained, pictures, tmp_path, verb):
    options = SMALL | {
        "weights": str(trained),
        "task": "embedding",
        "levels": (64, 36, 16),
        "operators": ("avg2d",),
        "max_run": 1,
    }
    found = search(pictures, out=tmp_path / "run", epochs=3, trials=8, sampler="evolution", budget="80%", **options)
    frame = found.candidates
    assert list(frame.columns[:4]) == ["architecture", "similarity", "sums", "total"]
    dense = found.model("dense")
    assert dense.num_classes == 0
    assert found.report.dense_score == pytest.approx(100, abs=1e-3)  # to itself
    # The target is the model as it came, not what the supernet made of it.
    reference = features_of(trained)
    data = prepare(found.run.config, classes=found.run.classes, load=False).data
    [(images, _)] = data.eval_loader("search", 1000)
    choice = found.pick()
    with torch.inference_mode():
        similar = F.cosine_similarity(found.model(choice)(images), reference(images))
    scored = frame.set_index("architecture").loc[choice.architecture, "similarity"]
    summary = found.run.read_summary()
    better = summary["with_dense_weights"].get(choice.architecture, -1)
    assert 100 * float(similar.mean()) == pytest.approx(max(scored, better), abs=1e-3)

    found.export(choice, tmp_path / "export")
    facts = retrain(tmp_path / "export", tmp_path / "retrained", recipe_changes={"epochs": 2}, device="cpu")
    result = evaluate(tmp_path / "retrained", device="cpu")
    assert (result["metric"], result["total"], result["score"]) == ("similarity", 14, facts["test_score"])
    status, out, err = verb("predict", tmp_path / "retrained", pictures / "0.png", "--json")
    assert status == 0, err
    assert len(json.loads(out)[0]["embedding"]) == 16
    assert "head" not in {name.partition(".")[0] for name in found.model(choice).state_dict()}


def features_of(weights):
    """The features of a file's model, made by timm alone."""
    model = timm.create_model("digits_vit", num_classes=7, img_size=8, in_chans=1, **SMALL["model_args"])
    model.load_state_dict(load_file(weights))
    model.reset_classifier(0)
    return model.eval()


def test_the_walk_through_of_the_readme_works_as_written(trained, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "search" / "README.md").read_text(encoding="utf-8")
    code = readme.split("<!-- tasks -->\n```python\n")[1].split("```")[0]
    code = code.replace("options = {", "options = small | {")
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 8, 8, generator=rng)
    wanted = torch.stack([images[:, 0, :4].mean((1, 2)) > 0.5, images[:, 0, :, :4].mean((1, 2)) > 0.5], dim=1).float()
    both = TensorDataset(images[:40], wanted[:40]), TensorDataset(images[40:], wanted[40:])
    names = {"train": both[0], "validation": both[1], "torch": torch, "np": np}
    names["small"] = SMALL_OWN | {"levels": (64, 16), "operators": ("avg2d",), "max_run": 1}
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(timm.create_model("digits_vit", **SMALL["model_args"]).state_dict(), tmp_path / "dense.safetensors")
    exec(compile(code, "README.md", "exec"), names)
    for name, by_hand in (
        ("exact", lambda logits: accuracy_score(wanted[40:], logits > 0)),
        ("balanced", lambda logits: recall_score(wanted[40:], logits > 0, average="macro", zero_division=0)),
    ):
        found = names[name]
        row = found.candidates.iloc[0]
        with torch.inference_mode():
            logits = found.model(row["architecture"])(images[40:])
        column = found.report.column
        assert row[column] == pytest.approx(100 * by_hand(logits))
        assert SearchResult(found.folder).candidates.equals(found.candidates)  # it can be looked at without the task
        with pytest.raises(PoolshareError, match="given in Python"):
            SearchResult(found.folder).finalists(1, quiet=True)
    assert "correct" in names["exact"].candidates
    with torch.inference_mode():
        assert names["tower"](images[:2]).shape == (2, names["tower"].num_features)


def changed_table(text):
    """A folder of images whose table is this."""

    def make(root):
        draw(root, 6)
        (root / "labels.csv").write_text(text)
        return root

    return make


def class_folders(root):
    for name in LABELS:
        draw(root / name, 4)
    return root


GOOD = "file,labels\n0.png,top|left\n1.png,\n2.png,bottom\n3.png,top\n4.png,left\n5.png,top\n"


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (changed_table(GOOD + "9.png,top\n"), {}, "line 8 of .* names '9.png', and there is no such image"),
        (changed_table(GOOD + "../0.png,top\n"), {}, "names '../0.png', and there is no such image"),
        (changed_table(GOOD + "0.png,top\n"), {}, "names '0.png' on lines 2 and 8"),
        (changed_table("image;labels\n0.png;top\n"), {}, "begins with 'image;labels': write a first line file,labels"),
        (changed_table("file,labels\n0.png,top,left\n"), {}, "line 2 of .* has 3 cells"),
        (changed_table("file,labels\n"), {}, "names no image"),
        (changed_table("file,labels\n0.png,\n"), {}, "has no image with a label"),
        (class_folders, {}, "labels.csv' cannot be read"),
        (lambda root: "digits", {}, "digits has one class per image, and this task needs any number of them"),
        (
            changed_table(GOOD),
            {"task": "classification"},
            "no class folders .*, but a labels.csv: --task multilabel reads that",
        ),
        (
            changed_table(GOOD),
            {"recipe": {"mixup": 0.2}},
            "mixup=0.2 belongs to classification, and the task is multilabel",
        ),
        (
            changed_table(GOOD),
            {"task": "detection"},
            "task 'detection' is unknown: there are classification, multilabel, seg",
        ),
        (
            changed_table(GOOD),
            {"task": "embedding"},
            "--task embedding makes a trained model cheaper, and digits_vit has no",
        ),
        (
            changed_table(GOOD),
            {"task": "embedding", "training": False, "pretrained": True, "score": "loss"},
            "--score loss: --task embedding never has labels",
        ),
        (
            changed_table(GOOD),
            {"task": "embedding", "training": False, "pretrained": True, "unlabelled": True},
            "--unlabelled: --task embedding never has labels",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(make, options, says, tmp_path):
    (tmp_path / "data").mkdir()
    given = SMALL | {"task": "multilabel", "epochs": 1} | options
    if given.get("training") is False:
        del given["epochs"], given["batch_size"]
    with pytest.raises(PoolshareError, match=says):
        search(make(tmp_path / "data"), out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_classes_txt_fixes_the_classes_and_catches_a_label_that_is_misspelt(tmp_path):
    root = changed_table(GOOD)(tmp_path)
    (root / "classes.txt").write_text("top\nleft\nbottom\nnever\n")
    data = open_data(str(root), img_size=8, in_chans=1, mean=[0.5], std=[0.5], targets="classes", search_fraction=0.5)
    assert data.classes == ("top", "left", "bottom", "never")
    assert any("no image of" in note and "'never'" in note for note in data.notes)
    assert data.split("train_full").labels.sum(0)[3] == 0
    (root / "labels.csv").write_text(GOOD.replace("bottom", "botom"))
    with pytest.raises(PoolshareError, match=r"line 4 of .* has the label 'botom', which is not among .*classes.txt"):
        open_data(str(root), img_size=8, in_chans=1, mean=[0.5], std=[0.5], targets="classes")


def test_labels_follow_their_images_into_every_split_and_the_names_of_a_head(tagged):
    data = open_data(str(tagged), img_size=8, in_chans=1, mean=[0.5], std=[0.5], targets="classes")
    renamed = data.relabelled(("left", "other", "top", "bottom"), [3, 0, 2])
    for part, split in (("train", "train"), ("train", "search"), ("test", "test")):
        lines = [line.split(",") for line in (tagged / part / "labels.csv").read_text().splitlines()[1:]]
        wanted = {file: {*labels.split("|")} - {""} for file, labels in lines}
        for opened in (data, renamed):
            chosen = opened.split(split)
            for index in chosen.indices.tolist():
                hot = chosen.source.labels[index]
                names = {name for name, there in zip(opened.classes, hot, strict=True) if there}
                assert names == wanted[chosen.source.names[index]]
    _, targets = next(iter(data.train_loader(0, 16)))
    assert (targets.shape, targets.dtype) == ((16, 3), torch.uint8)
    assert len({*data.split("train").indices.tolist()} & {*data.split("search").indices.tolist()}) == 0


@pytest.mark.parametrize("label", [3, [0, 1], torch.tensor([0.0, 2.0]), torch.tensor([[0, 1]]), "cat"])
def test_labels_given_in_python_must_fit_the_task(label, tmp_path):
    class Two(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.zeros(1, 8, 8), label if index == 2 else torch.tensor([1, 0, 1])

    says = "differ in length" if label == [0, 1] else "item 2 of the train data .* must be a 0 or 1 for each class"
    with pytest.raises(PoolshareError, match=says):
        search((Two(), Two()), out=tmp_path / "run", task="multilabel", epochs=1, **SMALL_OWN)
    assert not (tmp_path / "run").exists()


def test_a_trained_head_that_does_not_fit_the_labels_is_refused_without_training(tagged, trained, tmp_path):
    with pytest.raises(PoolshareError, match="it has 7 classes, the data 3"):
        search(tagged, out=tmp_path / "run", task="multilabel", weights=str(trained), training=False, **UNTRAINED)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["multilabel", "embedding"])
def test_a_model_is_searched_as_it_is_for_any_task(task, trained, tagged, pictures, tmp_path):
    options = UNTRAINED | {"task": task, "search_images": 40, "levels": (64, 49, 36), "operators": ("avg2d", "tome")}
    if task == "multilabel":
        torch.manual_seed(1)
        model = randomise(timm.create_model("digits_vit", num_classes=3, img_size=8, in_chans=1, **SMALL["model_args"]))
        save_file(model.state_dict(), tmp_path / "three.safetensors")
        options["weights"] = str(tmp_path / "three.safetensors")
    found = search(
        tagged if task == "multilabel" else pictures,
        out=tmp_path / "run",
        training=False,
        **{"weights": str(trained)} | options,
    )
    choice = found.pick()
    row = found.candidates.set_index("architecture").loc[choice.architecture]
    assert Counts.of_row(row, True).score(TASKS[task]) == row[found.report.column]
    assert choice.architecture in found.report.intervals
    found.export(choice, tmp_path / "export")
    facts = retrain(tmp_path / "export", tmp_path / "retrained", recipe_changes={"epochs": 1}, device="cpu")
    assert facts["metric"] == TASKS[task].metric
    assert "dense" in facts


@pytest.mark.slow  # three searches of a minute
@pytest.mark.parametrize("task", ["multilabel", "embedding"])
def test_workers_and_processes_count_what_one_process_counts(task, trained, tagged, pictures, tmp_path):
    data = tagged if task == "multilabel" else pictures
    words = ["search", "--data", data, "--task", task, "--model", "digits_vit", "--img-size", 8, "--in-chans", 1, "-q"]
    words += ["--model-args", "depth=3,embed_dim=16,num_heads=2", "--batch-size", 16, "--device", "cpu", "--epochs", 2]
    words += ["--trials", 60, "--sampler", "evolution"] + (["--weights", trained] if task == "embedding" else [])
    alone = Forked.verb(*words, "--out", tmp_path / "alone")
    assert alone.wait()[0] == 0
    together = Forked.verb(*words, "--out", tmp_path / "together")
    helper = Forked.verb("worker", tmp_path / "together", "-q")
    assert (together.wait()[0], helper.wait()[0]) == (0, 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "poolshare.search.cli", *map(str, words), "--out", str(tmp_path / "two")]
    # one process trained it: two share scoring alone
    shutil.copytree(tmp_path / "alone", tmp_path / "two")
    for name in ("study.journal", "candidates.csv", "summary.json"):
        (tmp_path / "two" / name).unlink()
    subprocess.run(command, check=True, capture_output=True)
    alone, together, two = (SearchResult(tmp_path / name).candidates for name in ("alone", "together", "two"))
    assert alone.equals(together)
    assert alone.equals(two)
