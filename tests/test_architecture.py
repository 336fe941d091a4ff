"""Architectures: the canonical text and JSON against layers spelled out by hand; damaged ones against one promise."""

import json
import pickle
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolshare.space import Architecture, ArchitectureError, Layer, Run, SearchSpace
from poolshare.space.architecture import MAX_DEPTH

SPACE = SearchSpace(12, (196, 100, 49), ("max2d", "avg2d"), 3)
TEXT = "196*2 196 100@max2d*3 49@max2d*2 49*3 49"


def own(tokens: int, operator: str | None = None) -> Layer:
    return Layer(tokens, operator, False)


def shared(tokens: int) -> Layer:
    return Layer(tokens, None, True)


LAYERS = (
    *(own(196), shared(196), own(196)),
    *(own(100, "max2d"), shared(100), shared(100)),
    *(own(49, "max2d"), shared(49), own(49), shared(49), shared(49), own(49)),
)


def test_text_and_layers_spelled_out_by_hand_are_the_same_architecture():
    assert Architecture.parse(TEXT).layers == LAYERS
    assert str(Architecture(LAYERS)) == TEXT
    assert Architecture(LAYERS).depth == 12
    assert Architecture(LAYERS).runs == (
        *(Run(196, None, 2), Run(196, None, 1), Run(100, "max2d", 3)),
        *(Run(49, "max2d", 2), Run(49, None, 3), Run(49, None, 1)),
    )


def test_json_is_one_object_per_run():
    assert Architecture.parse("16*2 9@avg2d").to_json() == {
        "runs": [
            {"tokens": 16, "operator": None, "length": 2},
            {"tokens": 9, "operator": "avg2d", "length": 1},
        ]
    }


@st.composite
def architectures(draw: Any) -> Architecture:
    """Legal by construction, far outside any space: any token counts, any operator names."""
    levels = sorted(draw(st.lists(st.integers(1, 10**9 - 1), min_size=1, max_size=4, unique=True)), reverse=True)
    layers = []
    for position, tokens in enumerate(levels):
        operator = draw(st.from_regex("[a-z][a-z0-9_]{0,8}", fullmatch=True)) if position else None
        layers.append(own(tokens, operator))
        layers += [Layer(tokens, None, share) for share in draw(st.lists(st.booleans(), max_size=5))]
    return Architecture(tuple(layers))


@given(architectures())
@settings(max_examples=200, deadline=None)
def test_text_json_and_pickle_give_the_architecture_back(architecture: Architecture):
    assert Architecture.parse(str(architecture)) == architecture
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture
    assert Architecture.from_runs(architecture.runs) == architecture
    copy = pickle.loads(pickle.dumps(architecture))
    assert copy == architecture
    assert hash(copy) == hash(architecture)


def test_no_two_architectures_of_a_space_have_the_same_text_or_json():
    space = SearchSpace(6, (16, 9, 4), ("max2d", "avg2d"), 3)
    assert len({str(architecture) for architecture in space}) == space.size
    assert len({json.dumps(architecture.to_json()) for architecture in space}) == space.size


def test_spelling_that_means_the_same_is_read_as_the_same():
    assert Architecture.parse("  16*1\t16*2\n9@max2d ") == Architecture.parse("16 16*2 9@max2d")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["at least one Layer", "196*2 100@max2d"]),
        (" \n", ["at least one Layer"]),
        ("16 x", ["run 2", "'x'", "tokens[@operator][*length]", "100@max2d*3"]),
        ("16 9@max2d*", ["run 2", "'9@max2d*'"]),
        ("16 9@", ["run 2", "'9@'"]),
        ("16*0", ["run 1", "'16*0'"]),
        ("016", ["run 1", "'016'"]),
        ("16.0", ["run 1", "'16.0'"]),
        ("-16", ["run 1", "'-16'"]),
        ("1_6", ["run 1", "'1_6'"]),
        ("१६", ["run 1", "'१६'"]),
        ("16²", ["run 1", "'16²'"]),
        ("16,9", ["run 1", "'16,9'"]),
        ("16*2@max2d", ["run 1", "'16*2@max2d'"]),
        ("16 9@Max2D", ["run 2", "'9@Max2D'"]),
        ("16@max2d", ["layer 0", "16@max2d", "the first layer keeps all tokens"]),
        ("9 16", ["layer 1", "(16)", "tokens cannot grow from 9 to 16"]),
        ("9 16@max2d", ["layer 1", "16@max2d", "tokens cannot grow from 9 to 16"]),
        ("16*3 9", ["layer 3", "from 16 to 9 tokens needs an operator", "9@max2d"]),
        ("16 16@max2d", ["layer 1", "'max2d' has nothing to do", "has 16 tokens too"]),
        ("16*201", ["201", str(MAX_DEPTH)]),
        ("16*150 16*51", ["201", str(MAX_DEPTH)]),
        ("16*999999999", ["999,999,999", str(MAX_DEPTH)]),
        ("16*9999999999", ["run 1", "'16*9999999999'"]),
        ("1" * 5000, ["run 1", "'" + "1" * 40 + "'"]),
    ],
)
def test_a_malformed_text_is_refused_with_the_value_the_place_and_what_would_be_right(text: str, fragments: list[str]):
    with pytest.raises(ArchitectureError) as caught:
        Architecture.parse(text)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [None, 16, b"16", ["16"], Architecture.parse("16")])
def test_what_is_no_text_is_refused_by_its_type(value: Any):
    with pytest.raises(ArchitectureError, match=rf"text such as '196\*2 100@max2d\*3', not {type(value).__name__}"):
        Architecture.parse(value)


ALPHABET = st.sampled_from("0123456789*@ _maxvgd-+.,;:\t\n\x00\x1cé٣²Ａ\ud800")
EDITS = st.lists(
    st.tuples(st.sampled_from(["insert", "delete", "replace", "swap"]), st.integers(0, 80), ALPHABET), max_size=4
)


@given(st.integers(0, SPACE.size - 1), EDITS)
@settings(max_examples=400, deadline=None)
def test_a_damaged_text_is_refused_or_means_what_its_canonical_text_means(rank: int, edits: list[tuple[str, int, str]]):
    text = str(SPACE[rank])
    for kind, where, character in edits:
        where %= len(text) + 1
        rest = text[where:] if kind == "insert" else text[where + 1 :]
        text = text[:where] + ("" if kind == "delete" else character) + rest
        if kind == "swap":
            words = text.split(" ")
            random.Random(where).shuffle(words)
            text = " ".join(words)
    _refused_or_canonical(text)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_refused_or_means_what_its_canonical_text_means(text: str):
    _refused_or_canonical(text)


def _refused_or_canonical(text: str) -> None:
    try:
        architecture = Architecture.parse(text)
    except ArchitectureError:
        return
    assert Architecture.parse(str(architecture)) == architecture
    # Canonical: nothing is left to normalise but white space and "*1".
    assert [word.removesuffix("*1") for word in text.split()] == str(architecture).split()


@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        (None, ['{"runs": [...]}']),
        ([], ['{"runs": [...]}']),
        ({}, ['{"runs": [...]}']),
        ({"runs": "16"}, ['{"runs": [...]}']),
        ({"runs": []}, ["at least one Layer"]),
        ({"runs": ["16"]}, ["run 1", "tokens, operator, length"]),
        ({"runs": [{"tokens": 16, "length": 1}]}, ["run 1", "tokens, operator, length"]),
        ({"runs": [{"tokens": 16, "operator": None, "length": 1, "x": 1}]}, ["run 1", "tokens, operator, length"]),
        ({"runs": [{"tokens": 16.0, "operator": None, "length": 1}]}, ["run 1", "wrong type", "16.0"]),
        ({"runs": [{"tokens": True, "operator": None, "length": 1}]}, ["run 1", "wrong type", "True"]),
        ({"runs": [{"tokens": 16, "operator": None, "length": 0}]}, ["run 1", "'length': 0"]),
        ({"runs": [{"tokens": 16, "operator": 3, "length": 1}]}, ["run 1", "'operator': 3"]),
        ({"runs": [{"tokens": 16, "operator": None, "length": 1}, 3]}, ["run 2"]),
        (
            {"runs": [{"tokens": 16, "operator": None, "length": 1}, {"tokens": 9, "operator": "a b", "length": 1}]},
            ["run 2", "'a b'", "not an operator name"],
        ),
        ({"runs": [{"tokens": 16, "operator": "", "length": 1}]}, ["layer 0", "operator"]),
        ({"runs": [{"tokens": 16, "operator": "max2d", "length": 1}]}, ["layer 0", "first layer"]),
        ({"runs": [{"tokens": 16, "operator": None, "length": 10**8}]}, ["100,000,000", str(MAX_DEPTH)]),
    ],
)
def test_malformed_json_is_refused_with_the_value_and_the_place(value: Any, fragments: list[str]):
    with pytest.raises(ArchitectureError) as caught:
        Architecture.from_json(value)
    for fragment in fragments:
        assert fragment in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([16, 9, "max2d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["runs", *Run._fields]), inner),
    max_leaves=8,
)


@given(st.integers(0, SPACE.size - 1), st.lists(st.tuples(st.integers(0, 11), VALUES, VALUES), min_size=1, max_size=2))
@settings(max_examples=300, deadline=None)
def test_damaged_json_is_refused_or_is_the_json_of_an_architecture(rank: int, damage: list[tuple[int, Any, Any]]):
    value: Any = SPACE[rank].to_json()
    for where, key, inner in damage:
        runs = value["runs"]
        if isinstance(key, str) and key in Run._fields:
            runs[where % len(runs)] = {**runs[where % len(runs)], key: inner}
        elif isinstance(key, int) and type(key) is int:
            del runs[where % len(runs)]
            runs.append(inner)
        else:
            runs.insert(where, inner)
    try:
        architecture = Architecture.from_json(value)
    except ArchitectureError:
        return
    assert architecture.to_json() == value


@pytest.mark.parametrize(
    ("layers", "fragments"),
    [
        ((), ["()", "at least one Layer"]),
        (None, ["None", "tuple"]),
        ([Layer(16)], ["tuple"]),
        ("16", ["'16'", "tuple"]),
        ((16,), ["layer 0 is 16", "Layer(tokens, operator, shared)"]),
        (((16, None, False),), ["layer 0 is (16, None, False)"]),
        ((Layer(0),), ["layer 0", "tokens=0"]),
        ((Layer(-4),), ["layer 0", "tokens=-4"]),
        ((Layer(16.0),), ["layer 0", "tokens=16.0"]),  # type: ignore[arg-type]
        ((Layer(True),), ["layer 0", "tokens=True"]),
        ((Layer(10**9),), ["layer 0", "10^9"]),
        ((Layer(16), Layer(16, None, 1)), ["layer 1", "shared=1"]),  # type: ignore[arg-type]
        ((Layer(16), Layer(9, "")), ["layer 1", "operator=''"]),
        ((Layer(16), Layer(9, "a b")), ["layer 1", "operator='a b'"]),
        ((Layer(16), Layer(9, "max2d", True)), ["layer 1", "after pooling computes its own attention map"]),
        ((Layer(16, None, True),), ["layer 0", "computes its own attention map"]),
        ((Layer(16),) * (MAX_DEPTH + 1), [str(MAX_DEPTH + 1), str(MAX_DEPTH)]),
    ],
)
def test_layers_that_no_text_could_hold_are_refused(layers: Any, fragments: list[str]):
    with pytest.raises(ArchitectureError) as caught:
        Architecture(layers)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("length", [0, -3])
def test_a_run_without_an_owner_is_refused(length: int):
    with pytest.raises(ArchitectureError, match=f"length={length}.*an owner alone is a run of length 1"):
        Architecture.from_runs([Run(16, None, 2), Run(16, None, length)])
