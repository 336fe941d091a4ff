"""Which output of a head is which class: by name, by order, or not at all, and what is said about it."""

import json
import os
import random
from pathlib import Path

import pytest

from poolshare.space import DataError, ModelError
from poolshare.supernet.classes import Head, match_classes, names_of, read_class_map

NAMES = ("cat", "dog", "eel", "fox")


def head(count=4, names=NAMES):
    return Head(count, "mine.pth", names, "its card" if names else "")


def test_classes_are_matched_by_name_whatever_their_order_and_a_subset_keeps_the_whole_head():
    for classes in (NAMES, ("fox", "cat", "eel", "dog"), ("eel", "cat")):
        matched = match_classes(classes, head(), trained=False)
        assert matched.classes == NAMES
        assert [NAMES[index] for index in matched.indices] == list(classes)
        assert not matched.fresh
    assert matched.notes == (
        "classes are matched by name to 2 of the 4 outputs of mine.pth (its card): 'eel' is output 2, 'cat' is output 0",
    )


def test_without_names_the_order_counts_and_three_names_are_shown():
    for one in (head(names=None), head(names=("1", "2", "3", "4"))):
        matched = match_classes(NAMES, one)
        assert (matched.classes, matched.indices, matched.fresh) == (NAMES, (0, 1, 2, 3), False)
        assert "'cat' is output 0, 'dog' is output 1, 'eel' is output 2, …; if that is wrong" in matched.notes[0]


@pytest.mark.parametrize(
    ("classes", "one", "why"),
    [
        (NAMES[:3], head(names=None), "it has 4 classes, the data 3"),
        (
            ("cat", "cow", "dog"),
            head(),
            "it has 4 classes, the data 3, 1 of them not among the names of its card: 'cow'",
        ),
        (("a", "b"), head(), "it has 4 classes, the data 2, none of them among the names of its card"),
        (("n01440764", "mine"), Head(1000, "mine.pth"), "1 of them not among the names of imagenet-1k in timm: 'mine'"),
    ],
)
def test_a_trained_head_that_does_not_fit_is_dropped_with_a_warning_or_refused_where_nothing_is_trained(
    classes, one, why
):
    matched = match_classes(classes, one)
    assert (matched.classes, matched.fresh) == (classes, True)
    assert matched.notes[0].startswith("warning: the trained head of mine.pth is dropped and a new one trained")
    assert why in matched.notes[0]
    with pytest.raises(ModelError) as refused:
        match_classes(classes, one, trained=False)
    assert why in str(refused.value)
    assert "--class-map FILE" in str(refused.value)


def test_names_that_match_in_part_are_no_order():
    with pytest.raises(DataError, match=r"3 of the data's 4 classes are among .* 'cow' not: rename"):
        match_classes(("cat", "cow", "eel", "fox"), head())


def test_a_class_map_decides():
    given = (("fox", "eel", "dog", "cat"), "map.txt")
    for one in (head(), head(names=None), None):
        matched = match_classes(NAMES, one, class_map=given)
        assert (matched.classes, matched.indices, matched.fresh) == (given[0], (3, 2, 1, 0), one is None)
    with pytest.raises(DataError, match=r"names 4 classes, the head of mine.pth has 1000"):
        match_classes(NAMES, head(1000, None), class_map=given)
    with pytest.raises(DataError, match="lacks 'cow', 1 of the data's 2 classes"):
        match_classes(("cow", "cat"), head(), class_map=given)


def test_a_class_map_is_read_in_the_forms_that_people_have(tmp_path):
    forms = [
        ("map.txt", "cat\ndog\neel\nfox\n"),
        ("map.txt", "\ufeffcat\r\ndog \r\neel\r\nfox"),
        ("map.json", json.dumps(NAMES)),
        ("map.json", json.dumps({"fox": 3, "cat": 0, "eel": 2, "dog": 1})),
        ("map.json", json.dumps({"3": "fox", "0": "cat", "2": "eel", "1": "dog"})),
    ]
    for name, text in forms:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_class_map(tmp_path / name) == (NAMES, str(tmp_path / name))
    for text in ("", "cat\n\ndog", "cat\ncat"):
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            read_class_map(tmp_path / "map.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_class_map(tmp_path / "none.txt")


@pytest.mark.parametrize("value", [None, 3, [], [1, 2], ["a", None], {"a": 0, "b": 2}, {"x": "a"}, {"a": 0, "b": 0}])
def test_what_is_no_names_is_none(value):
    with pytest.raises(ValueError):  # noqa: PT011
        names_of(value)


@pytest.mark.skipif("POOLSHARE_DATA" not in os.environ, reason="POOLSHARE_DATA names no folder with ImageNet's classes")
def test_imagenets_folders_are_the_head_of_a_thousand_in_any_order_and_in_part():
    folders = [one.name for one in (Path(os.environ["POOLSHARE_DATA"]) / "imagenet-1k-one-each").iterdir()]
    chosen = random.Random(0).sample(folders, 300)
    matched = match_classes(chosen, Head(1000, "vit.safetensors"), trained=False)
    assert len(matched.classes) == 1000
    assert [matched.classes[index] for index in matched.indices] == chosen
    assert [sorted(folders).index(one) for one in chosen] == list(matched.indices)
