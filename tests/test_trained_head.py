"""What is said of a trained head's answers, and one model's answers class by class, against scikit-learn."""

import numpy as np
import pytest
import timm
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from poolshare.search.config import checked_config
from poolshare.search.job.prepare import prepare
from poolshare.search.job.trained_head import head_notes
from poolshare.supernet.tasks.classification import class_report

CLASSES = [f"kind {index}" for index in range(10)]


def answered(share: float, images: int = 400, seed: int = 0):
    """Labels, and answers of which about a share is right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(10, size=images)
    other = (labels + generator.integers(1, 10, size=images)) % 10
    return labels, np.where(generator.random(images) < share, labels, other)


def test_answers_in_the_classes_order_give_no_warning():
    labels, predicted = answered(0.74)
    [note] = head_notes(labels, predicted, CLASSES)
    assert f"right on {100 * np.mean(labels == predicted):.2f} % of the 400 search-validation images" in note
    assert f"the most frequent class alone makes {100 * np.bincount(labels).max() / 400:.2f} %" in note


def test_a_head_in_another_order_is_noticed_and_named_though_it_is_far_from_chance():
    labels, predicted = answered(0.9)
    order = np.array([0, 1, 2, 4, 5, 6, 7, 8, 9, 3])
    _, warning = head_notes(labels, order[predicted], CLASSES)
    assert warning.startswith("warning: the head seems to have its classes in another order: it predicts 'kind ")
    assert f"in the best order {100 * np.mean(labels == predicted):.2f} % would be right" in warning
    assert "--class-map" in warning


def test_answers_near_chance_are_warned_of():
    labels, predicted = answered(0.1)
    _, warning = head_notes(labels, predicted, CLASSES)
    assert warning.startswith("warning: the trained head's predictions are near chance")
    few = head_notes(np.arange(10), np.roll(np.arange(10), 1), CLASSES)  # one image a class tells of no order
    assert [note.partition(":")[0] for note in few[1:]] == ["warning"]


@pytest.mark.parametrize("classes", [10, 25])  # of a head with more classes than the images have
def test_accuracies_by_class_are_those_of_scikit_learn(classes):
    generator = np.random.default_rng(1)
    labels = generator.choice(10, size=306, p=[0.82] + [0.02] * 9)
    predicted = np.where(generator.random(306) < 0.8, labels, generator.integers(10, size=306))
    found = class_report(labels, predicted, [f"kind {index}" for index in range(classes)])
    assert found["balanced_top1"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    assert found["most_frequent_class_alone"] == pytest.approx(100 * accuracy_score(labels, np.zeros(306, dtype=int)))
    assert [one["class"] for one in found["per_class"]] == CLASSES
    for index, one in enumerate(found["per_class"]):
        mine = labels == index
        assert (one["images"], one["correct"]) == (mine.sum(), (predicted[mine] == index).sum())
        assert one["score"] == pytest.approx(100 * one["correct"] / one["images"])


def test_one_class_for_all_images_is_no_better_than_its_baseline():
    labels = np.array([0] * 300 + [1] * 6)
    found = class_report(labels, np.zeros(306, dtype=int), ["many", "few"])
    assert (found["most_frequent_class_alone"], found["balanced_top1"]) == (pytest.approx(100 * 300 / 306), 50)


@pytest.mark.parametrize("classes", [10, 7])
def test_a_head_that_was_trained_before_may_have_seen_the_images_and_that_is_said(classes, tmp_path):
    options = {"depth": 3, "embed_dim": 16, "num_heads": 2}
    weights = tmp_path / "fine-tuned.safetensors"
    save_file(timm.create_model("digits_vit", num_classes=classes, **options).state_dict(), weights)
    job = prepare(
        checked_config(data="digits", model_args=options, device="cpu", weights=str(weights), levels=(64, 16))
    )
    said = [note for note in job.notes if "was trained before: if it has seen any of these images" in note]
    assert len(said) == (classes == 10)  # a head of other classes is a new one, which has seen nothing
    if said:
        assert weights.name in said[0]
        assert "check with `poolshare evaluate` on test images" in said[0]
