"""A class for every pixel: its score against scikit-learn's, and one tiny set from search to predicted masks."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from test_masks import write_part

from poolshare.search.analysis.intervals import score_interval
from poolshare.search.exported.masks import PALETTE
from poolshare.supernet.data.pictures import IGNORED
from poolshare.supernet.tasks import TASKS
from poolshare.supernet.tasks.task import check_contributions

TASK = TASKS["segmentation"]


def made_up(count=6, classes=5, seed=0, absent=()):
    """Logits (N, classes, 7, 9) and targets with ignored pixels and classes that are missing."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, 7, 9, generator=generator)
    targets = torch.randint(0, classes, (count, 7, 9), generator=generator)
    for one in absent:
        targets[targets == one] = 0
        logits[:, one] = -100
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    return logits, targets


@pytest.mark.parametrize("absent", [(), (3,), (1, 4)])
def test_the_score_is_the_mean_iou_of_scikit_learn(absent):
    logits, targets = made_up(absent=absent)
    found = TASK.contributions(logits, targets)
    assert found.shape == (6, 15)
    kept = targets != IGNORED
    wanted, answers = targets[kept].numpy(), logits.argmax(dim=1)[kept].numpy()
    sums = found.sum(dim=0).numpy()
    assert TASK.number(sums, 6) == pytest.approx(100 * jaccard_score(wanted, answers, average="macro"))
    assert TASK.number(np.stack([sums, 2 * sums]), 6).shape == (2,)
    details = TASK.details(found.numpy(), targets, logits, [f"class {index}" for index in range(5)])
    assert details["pixel_accuracy"] == pytest.approx(100 * accuracy_score(wanted, answers))
    assert details["mean_class_accuracy"] == pytest.approx(100 * recall_score(wanted, answers, average="macro"))
    ious = jaccard_score(wanted, answers, average=None)
    present = [f"class {index}" for index in range(5) if index not in absent]
    assert [one["class"] for one in details["per_class"]] == present
    assert [one["score"] for one in details["per_class"]] == pytest.approx(100 * ious)
    images = [(targets == int(name.split()[1])).flatten(1).any(dim=1).sum() for name in present]
    assert [one["images"] for one in details["per_class"]] == images


def test_contributions_are_those_of_each_image_alone_and_add_up():
    logits, targets = made_up()
    check_contributions(TASK, logits)
    whole = TASK.contributions(logits, targets)
    parts = [TASK.contributions(logits[at : at + 2], targets[at : at + 2]) for at in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    perfect = TASK.contributions(logits, TASK.as_targets(logits)).sum(dim=0).numpy()
    assert TASK.number(perfect, 6) == 100
    assert TASK.number(np.zeros(15, np.int64), 6) == 0
    low, high = score_interval(TASK, whole.numpy())
    assert low < TASK.number(whole.sum(dim=0).numpy(), 6) < high


def test_losses_are_those_of_labelled_pixels():
    logits, targets = made_up()
    targets[0] = IGNORED
    by_hand = [
        F.cross_entropy(one[:, kept].T, target[kept])
        for one, target, kept in zip(logits[1:], targets[1:], targets[1:] != IGNORED, strict=True)
    ]
    torch.testing.assert_close(TASK.losses(logits, targets), torch.stack([torch.zeros(()), *by_hand]))
    kept = targets != IGNORED
    rows = logits.permute(0, 2, 3, 1)[kept]
    torch.testing.assert_close(TASK.loss(logits, targets), F.cross_entropy(rows, targets[kept]))
    assert TASK.loss(logits[:1], targets[:1]) == 0  # and not 0 / 0
    assert (TASK.divergence(logits, logits) == 0).all()
    other = torch.randn_like(logits)
    pixels = [values.permute(0, 2, 3, 1).flatten(0, 2) for values in (other, logits)]
    expected = F.kl_div(*(one.log_softmax(dim=1) for one in pixels), reduction="none", log_target=True).sum(dim=1)
    torch.testing.assert_close(TASK.divergence(other, logits), expected.unflatten(0, (6, 63)).mean(dim=1))
    followed = F.cross_entropy(pixels[0], pixels[1].softmax(dim=1))
    torch.testing.assert_close(TASK.follow(other, logits), followed)


SEARCH = ("search", "--task", "segmentation", "--img-size", "48x64", "--batch-size", "8", "--device", "cpu")
SEARCH += ("--model-args", "depth=3,embed_dim=32,num_heads=2", "--levels", "12,6", "--operators", "max2d,topk")
SEARCH += ("--max-run", "1", "--lr", "0.01", "--recipe", "crop_scale=0.8,color_jitter=0")


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    root = tmp_path_factory.mktemp("streets")
    for seed, (part, count) in enumerate({"train": 24, "val": 8, "test": 8}.items()):
        write_part(root / part, count, seed, void=9)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    return root


@pytest.fixture(scope="module")
def searched(streets, tmp_path_factory):
    """A search of a space that is scored as a whole, with the supernet's epochs, and what it printed."""
    run = tmp_path_factory.mktemp("run") / "run"
    status, out, err = call(*SEARCH, "--data", streets, "--ignore-index", "9", "--epochs", "12", "--out", run)
    assert status == 0, err
    return run, out, err


def test_from_search_to_masks(searched, streets, tmp_path):
    run, out, err = searched
    assert "mIoU" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["classes"] == ["sky", "road", "tree"]
    assert summary["certified"]
    header = (run / "candidates.csv").read_text().splitlines()[0]
    assert header.startswith("architecture,miou")
    # By hand: the dense model's score, from its export's masks of the images that were scored on.
    status, out, err = call("export", run, "--architecture", "12 12 6@topk", "--out", tmp_path / "out")
    assert status == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["head"] == "conv"
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    shown, photo = tmp_path / "shown.png", next((streets / "test" / "images").iterdir())
    status, out, err = call("show", tmp_path / "out", "--image", photo, "--out", shown)
    assert status == 0, err
    width, height = Image.open(shown).size
    assert width > height  # one line, of panels of the photo's shape
    status, out, err = call("retrain", tmp_path / "out", "--epochs", "2", "--lr", "0.003", "--out", tmp_path / "more")
    assert status == 0, err
    assert "mIoU" in out
    assert "pixel accuracy" in out
    status, out, err = call("evaluate", tmp_path / "more", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert facts["metric"] == "mIoU"
    assert facts["score"] > 50  # greys are easy to tell apart
    assert facts["interval"][0] < facts["score"] < facts["interval"][1]
    predicted = tmp_path / "predicted"
    status, out, err = call("predict", tmp_path / "more", streets / "test" / "images", "--out", predicted, "--json")
    assert status == 0, err
    answers, masks = json.loads(out), []
    for answer in answers:
        mask = Image.open(answer["mask"])
        assert mask.mode == "P"
        assert mask.size == Image.open(answer["overlay"]).size == (64, 48)
        assert np.array_equal(np.asarray(mask.convert("RGB")), PALETTE[np.asarray(mask)])
        shares = np.bincount(np.asarray(mask).ravel(), minlength=3) / mask.width / mask.height
        named = {one["class"]: one["probability"] for one in answer["classes"]}
        # At the size of the image, which here is that of the model's input.
        assert named == pytest.approx(
            {name: share for name, share in zip(summary["classes"], shares, strict=True) if share}
        )
        masks.append(np.asarray(mask))
    # The masks on disk are worth what was evaluated.
    wanted = [np.asarray(Image.open(streets / "test" / "masks" / f"{index}.png")) for index in range(8)]
    kept = np.stack(wanted) != 9
    iou = jaccard_score(np.stack(wanted)[kept], np.stack(masks)[kept], average="macro")
    assert facts["score"] == pytest.approx(100 * iou)
    status, out, err = call("predict", tmp_path / "more", streets / "test" / "images", "--out", predicted)
    assert status == 1
    assert "exists already" in err


def test_the_same_command_continues_and_other_heads_and_masks_are_another_run(searched, streets):
    run, _, _ = searched
    same = (*SEARCH, "--data", streets, "--ignore-index", "9", "--epochs", "12", "--out", run)
    before = (run / "candidates.csv").read_text()
    status, _, err = call(*same)
    assert status == 0, err
    assert (run / "candidates.csv").read_text() == before
    status, _, err = call(*same, "--head", "linear")
    assert status == 1
    assert "head: 'conv' there, 'linear' now" in err
    changed = shutil.copytree(streets, run.parent / "changed")
    path = changed / "train" / "masks" / "0.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[0, -1] = (mask[0, -1] + 1) % 3
    Image.fromarray(mask).save(path)
    words = [changed if word is streets else word for word in same]
    status, _, err = call(*words)
    assert status == 1
    assert "0.png" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--head", "conv", "--task", "classification"), "answers for every pixel, and the task is classification"),
        (("--ignore-index", "9", "--task", "classification"), "--ignore-index 9 is of masks"),
        (("--model-args", "head=conv"), "--model-args head=conv: leave it out, --head decides it"),
        (("--model-args", "head_blocks=9"), "head_blocks=9: the model has 3 blocks"),
        (("--data", "torch/fashion_mnist"), "torch/fashion_mnist has no masks"),
        (("--recipe", "mixup=0.8"), "mixup=0.8 belongs to classification"),
        (("--recipe", "auto_augment=rand-m9-mstd0.5"), "would move the image and not its mask"),
        (("--ignore-index", "1"), "holds 9, which is neither one of the 3 classes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(streets, tmp_path, words, said):
    given = dict(zip(words[::2], words[1::2], strict=True))
    base = dict(zip(SEARCH[1::2], SEARCH[2::2], strict=True)) | {"--data": str(streets), "--ignore-index": "9"}
    if given.get("--task") == "classification" and "--head" in given:
        base.pop("--ignore-index")
    if "head_blocks" in given.get("--model-args", ""):
        given["--model-args"] += "," + base["--model-args"]
    status, _, err = call(
        "search", *(word for pair in (base | given).items() for word in pair), "--out", tmp_path / "run"
    )
    assert status
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_finalists_and_trust_compare_by_the_mean_iou(searched):
    run, _, _ = searched
    status, out, err = call("finalists", run, "--count", "2", "--epochs", "1")
    assert status == 0, err
    assert "mIoU" in out
    status, out, err = call("trust", run, "--architectures", "4", "--twice", "2", "--bands", "2", "--epochs", "1")
    assert status == 0, err


@pytest.mark.slow
def test_without_training_a_searched_model_is_searched_as_it_is(searched, streets, tmp_path):
    run, _, _ = searched
    assert call("export", run, "--architecture", "dense", "--out", tmp_path / "dense")[0] == 0
    words = ("search", "--no-training", "--task", "segmentation", "--model", f"local-dir:{tmp_path / 'dense'}")
    words += (
        "--data",
        streets,
        "--ignore-index",
        "9",
        "--device",
        "cpu",
        "--budget",
        "90%",
        "--out",
        tmp_path / "free",
    )
    status, out, err = call(*words)
    assert status == 0, err
    assert "mIoU" in out
