"""The graph against enumeration: raw tuples of layers, filtered by a rule of validity written without it."""

import itertools
import random
from collections import Counter
from math import isqrt
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from poolshare.space import OPERATORS, Architecture, ArchitectureError, Layer, Operator, SearchSpace, SpaceError
from poolshare.space.architecture import MAX_DEPTH
from poolshare.space.presets import PRESETS, default_levels, space_for

# Two operators that only these tests know: one to any smaller count, one to exactly half; both give up the grid.
TEST_OPERATORS = {
    "cut": Operator("cut", "any smaller count", lambda before, after, whole: after < before),
    "halve": Operator("halve", "every second token", lambda before, after, whole: after == (before + 1) // 2),
}


@pytest.fixture(autouse=True)
def _more_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, operator in TEST_OPERATORS.items():
        monkeypatch.setitem(OPERATORS, name, operator)


def can_pool(name: str, before: int, after: int, grid: bool) -> bool:
    if name in ("max2d", "avg2d"):
        return grid and after in [side * side for side in range(1, isqrt(before))]
    return after == (before + 1) // 2 if name == "halve" else True


def is_legal(layers: tuple[Layer, ...], levels: tuple[int, ...], max_run: int) -> bool:
    """The compact set of architectures, as a rule about whole tuples."""
    if layers[0] != Layer(levels[0], None, False):
        return False
    counts = [layer.tokens for layer in layers]
    if counts != sorted(counts, reverse=True):
        return False
    grid = levels[0] in [side * side for side in range(1, 100)]
    for before, layer in itertools.pairwise(layers):
        pools = before.tokens != layer.tokens
        if pools != (layer.operator is not None) or (pools and layer.shared):
            return False
        if layer.operator is not None:
            if not can_pool(layer.operator, before.tokens, layer.tokens, grid):
                return False
            grid = grid and layer.operator in ("max2d", "avg2d")
    followers = "".join("s" if layer.shared else "o" for layer in layers)
    return "s" * max_run not in followers


def brute_force(depth: int, levels: tuple[int, ...], operators: tuple[str, ...], max_run: int) -> set[Architecture]:
    choices = [Layer(*parts) for parts in itertools.product(levels, (None, *operators), (False, True))]
    raw = itertools.product(choices, repeat=depth)
    return {Architecture(layers) for layers in raw if is_legal(layers, levels, max_run)}


SMALL = {  # depth, levels, operators, max_run
    "one level": (8, (16,), (), 3),
    "one level, no sharing": (5, (16,), ("max2d",), 1),
    "two levels": (5, (16, 4), ("max2d",), 2),
    "unlimited runs": (5, (16, 4), ("max2d",), 5),
    "three levels": (4, (16, 9, 4), ("max2d",), 3),
    "two operators": (4, (16, 9, 4), ("max2d", "avg2d"), 2),
    "no square": (5, (10, 5), ("cut",), 3),
    "squares and others": (4, (16, 8, 4), ("max2d", "cut"), 3),
    "grid lost and kept": (4, (36, 18, 9), ("cut", "avg2d", "halve"), 2),
    "only halves": (5, (17, 9, 5), ("halve",), 2),
    "depth one": (1, (16, 4), ("max2d",), 3),
}


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> SearchSpace:
    return SearchSpace(*SMALL[request.param])


def test_a_space_holds_exactly_the_legal_tuples(small: SearchSpace):
    expected = brute_force(small.depth, small.levels, small.operators, small.max_run)
    found = list(small)
    assert set(found) == expected
    assert len(found) == len(expected) == small.size
    assert all(architecture in small for architecture in expected)


def test_rank_is_a_bijection_in_the_order_of_iteration(small: SearchSpace):
    assert [small.rank(architecture) for architecture in small] == list(range(small.size))
    assert [small[rank] for rank in range(small.size)] == list(small)
    assert small[0].layers == (Layer(small.levels[0]),) * small.depth


def test_the_order_of_ranks_is_own_then_shared_then_reductions_by_falling_count(small: SearchSpace):
    def key(architecture: Architecture) -> list[tuple[int, bool, int]]:
        return [
            (-layer.tokens, layer.shared, small.operators.index(layer.operator) if layer.operator else 0)
            for layer in architecture.layers
        ]

    assert sorted(small, key=key) == list(small)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_membership_agrees_with_the_rule_for_random_tuples(data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(SMALL)))
    space = SearchSpace(*SMALL[name])
    architecture = space[data.draw(st.integers(0, space.size - 1))]
    layer = st.builds(
        Layer, st.sampled_from([*space.levels, 7]), st.sampled_from([None, "max2d", "cut", "halve"]), st.booleans()
    )
    layers = list(architecture.layers)
    for index in data.draw(st.lists(st.integers(0, space.depth - 1), max_size=2)):
        layers[index] = data.draw(layer)
    try:
        changed = Architecture(tuple(layers))
    except ArchitectureError:
        assert not is_legal(tuple(layers), space.levels, space.max_run)
        return
    known = all(
        layer.tokens in space.levels and (layer.operator is None or layer.operator in space.operators)
        for layer in layers
    )
    assert (changed in space) == (known and is_legal(tuple(layers), space.levels, space.max_run))


TABLE = {  # L = 12: levels -> sizes at m = 1, 2, 3, unlimited
    (196,): (1, 233, 927, 2048),
    (196, 49): (12, 2052, 7077, 13312),
    (196, 100, 49): (78, 10188, 31294, 52736),
}


@pytest.mark.parametrize(
    ("levels", "max_run", "size"),
    [(levels, m, size) for levels, sizes in TABLE.items() for m, size in zip((1, 2, 3, 12), sizes, strict=True)],
)
def test_sizes_of_the_papers_setting(levels: tuple[int, ...], max_run: int, size: int):
    assert SearchSpace(12, levels, ("max2d",), max_run).size == size
    if max_run == 12:
        assert SearchSpace(12, levels, ("max2d",), MAX_DEPTH).size == size
    if size < 3000:
        assert len(set(SearchSpace(12, levels, ("max2d",), max_run))) == size


def multiply(first: list[int], second: list[int]) -> list[int]:
    """Product of two power series, cut at the length of the first."""
    return [sum(first[i] * second[power - i] for i in range(power + 1)) for power in range(len(first))]


def size_by_formula(depth: int, levels: int, max_run: int, operators: int) -> int:
    """[x^L] A/(1-A) · (1 + k·A/(1-A))^(T-1) with A = x + … + x^m: each later level is skipped, or entered k ways."""
    runs = [0] + [int(1 <= power <= max_run) for power in range(1, depth + 1)]
    some = [0] * (depth + 1)  # A/(1-A): one run or more
    power_of_runs = [1] + [0] * depth
    for _ in range(depth):
        power_of_runs = multiply(power_of_runs, runs)
        some = [a + b for a, b in zip(some, power_of_runs, strict=True)]
    series = some
    for _ in range(levels - 1):
        series = multiply(series, [int(power == 0) + operators * value for power, value in enumerate(some)])
    return series[depth]


@given(st.integers(1, 16), st.integers(1, 5), st.integers(1, 16), st.integers(1, 2))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sizes_by_the_generating_formula(depth: int, levels: int, max_run: int, operators: int):
    squares = tuple(side * side for side in range(levels, 0, -1))
    space = SearchSpace(depth, squares, ("max2d", "avg2d")[:operators], max_run)
    assert space.size == size_by_formula(depth, levels, max_run, operators)
    if operators == 1 and levels == 2 and max_run >= depth >= 2:
        assert space.size == (depth + 1) * 2 ** (depth - 2)
    if levels == 1 and max_run >= depth:
        assert space.size == 2 ** (depth - 1)


VIT = SearchSpace(12, (196, 100, 49), ("max2d",), 3)


@pytest.mark.parametrize(
    ("rank", "text"),
    [
        (0, "196 196 196 196 196 196 196 196 196 196 196 196"),
        (1, "196 196 196 196 196 196 196 196 196 196 196*2"),
        (20930, "196*2 196 100@max2d*3 49@max2d*2 49*3 49"),
        (31293, "196 49@max2d*3 49*3 49*3 49*2"),
    ],
)
def test_ranks_never_change(rank: int, text: str):
    assert str(VIT[rank]) == text
    assert VIT.rank(Architecture.parse(text)) == rank


def test_ranks_of_a_large_space_come_back():
    space = SearchSpace(32, (1024, 576, 256, 144, 64), ("max2d", "avg2d"), 6)
    rng = random.Random(5)
    for _ in range(50):
        rank = rng.randrange(space.size)
        assert space.rank(space[rank]) == rank
    assert str(space[space.size - 1]).startswith("1024 64@avg2d*6")


@pytest.mark.parametrize("rank", [-1, 31294, 10**30])
def test_a_rank_outside_is_refused(rank: int):
    with pytest.raises(IndexError, match=rf"rank {rank} is outside 0 … 31293"):
        VIT[rank]


# Draws


def naive_draw(space: SearchSpace, rng: random.Random) -> Architecture:
    """Draw levels, draw sharing bits, repair: what is not uniform."""
    layers: list[Layer] = [Layer(space.levels[0])]
    for _ in range(space.depth - 1):
        tokens = min(rng.choice(space.levels), layers[-1].tokens)
        if tokens < layers[-1].tokens:
            layers.append(Layer(tokens, rng.choice(space.operators)))
        else:
            run = len(list(itertools.takewhile(lambda layer: layer.shared, reversed(layers)))) + 1
            layers.append(Layer(tokens, None, run < space.max_run and rng.random() < 0.5))
    return Architecture(tuple(layers))


@pytest.mark.parametrize("name", ["two operators", "grid lost and kept", "unlimited runs"])
def test_draws_are_uniform(name: str):
    space = SearchSpace(*SMALL[name])
    rng = random.Random(0)
    draws = Counter(space.sample(rng) for _ in range(40 * space.size))
    assert chisquare([draws[architecture] for architecture in space]).pvalue > 0.01


def test_the_test_of_uniformity_tells_a_naive_draw():
    space = SearchSpace(*SMALL["two operators"])
    rng = random.Random(0)
    draws = Counter(naive_draw(space, rng) for _ in range(40 * space.size))
    assert set(draws) == set(space)
    assert chisquare([draws[architecture] for architecture in space]).pvalue < 1e-9


def test_draws_come_from_the_generator_that_is_passed_in():
    def five(seed: int) -> list[Architecture]:
        rng = random.Random(seed)
        return [VIT.sample(rng) for _ in range(5)]

    random.seed(1)
    first = five(7)
    random.seed(2)
    assert five(7) == first != five(8)


# Change


def differing_layers(first: Architecture, second: Architecture) -> list[int]:
    pairs = zip(first.layers, second.layers, strict=True)
    return [index for index, (one, other) in enumerate(pairs) if one != other]


def test_neighbours_are_exactly_those_that_differ_in_two_adjacent_layers_at_most(small: SearchSpace):
    everything = list(small)
    for architecture in everything:
        found = small.neighbours(architecture)
        differences = {other: differing_layers(architecture, other) for other in everything}
        expected = {
            other
            for other, layers in differences.items()
            if len(layers) == 1 or (len(layers) == 2 and layers[1] == layers[0] + 1)
        }
        assert set(found) == expected
        assert len(found) == len(expected)


def test_neighbourhood_is_symmetric_in_the_large():
    rng = random.Random(3)
    for _ in range(5):
        architecture = VIT.sample(rng)
        neighbours = VIT.neighbours(architecture)
        assert neighbours
        assert all(architecture in VIT.neighbours(other) for other in rng.sample(neighbours, 5))


@given(st.sampled_from(sorted(SMALL)), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutation_and_crossover_stay_in_the_space(name: str, one: int, two: int, seed: int):
    space = SearchSpace(*SMALL[name])
    first, second = space[one % space.size], space[two % space.size]
    if space.size == 1:
        with pytest.raises(SpaceError, match=f"'{first}' is the only architecture of this space".replace("*", r"\*")):
            space.mutate(first, random.Random(seed))
        return
    mutant = space.mutate(first, random.Random(seed))
    child = space.crossover(first, second, random.Random(seed))
    assert mutant in space
    assert mutant != first
    assert child in space
    assert child != first
    assert space.mutate(first, random.Random(seed)) == mutant
    assert space.crossover(first, second, random.Random(seed)) == child


def test_a_mutation_touches_three_adjacent_layers_at_most():
    rng = random.Random(4)
    for _ in range(200):
        architecture = VIT.sample(rng)
        layers = differing_layers(architecture, VIT.mutate(architecture, rng))
        assert layers
        assert layers[-1] - layers[0] <= 2


def test_a_child_begins_like_one_parent_and_ends_like_the_other():
    rng = random.Random(5)
    spliced = 0
    for _ in range(200):
        first, second = VIT.sample(rng), VIT.sample(rng)
        child = VIT.crossover(first, second, rng)
        cuts = [
            cut
            for cut in range(1, VIT.depth)
            if child.layers[:cut] == first.layers[:cut] and child.layers[cut + 1 :] == second.layers[cut + 1 :]
        ]
        spliced += bool(cuts) and child != second
    assert spliced > 150  # the others had no legal splice and are mutations


def test_crossover_of_an_architecture_with_itself_is_a_mutation():
    architecture = VIT.sample(random.Random(6))
    child = VIT.crossover(architecture, architecture, random.Random(7))
    assert child != architecture
    assert child in VIT


def test_mutations_reach_the_whole_space():
    space = SearchSpace(*SMALL["squares and others"])
    rng = random.Random(8)
    seen, architecture = {space[0]}, space[0]
    for _ in range(60 * space.size):
        architecture = space.mutate(architecture, rng)
        seen.add(architecture)
    assert seen == set(space)


# Bad input


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"depth": 0}, ["depth is 0", f"from 1 to {MAX_DEPTH}"]),
        ({"depth": MAX_DEPTH + 1}, [f"depth is {MAX_DEPTH + 1}", f"from 1 to {MAX_DEPTH}"]),
        ({"depth": 3.0}, ["depth is 3.0", "whole number"]),
        ({"depth": True}, ["depth is True", "whole number"]),
        ({"depth": "3"}, ["depth is '3'", "whole number"]),
        ({"max_run": 0}, ["max_run is 0", "from 1"]),
        ({"max_run": None}, ["max_run is None", "whole number"]),
        ({"levels": ()}, ["levels are ()", "(196, 100, 49)"]),
        ({"levels": "16"}, ["levels", "(196, 100, 49)", "'16'"]),
        ({"levels": 16}, ["levels", "(196, 100, 49)", "16"]),
        ({"levels": None}, ["levels", "(196, 100, 49)", "None"]),
        ({"levels": (16, 0)}, ["(16, 0)", "positive whole numbers"]),
        ({"levels": (16, 9.0)}, ["(16, 9.0)", "positive whole numbers"]),
        ({"levels": (16, 16)}, ["(16, 16)", "fall strictly"]),
        ({"levels": (4, 16)}, ["(4, 16)", "fall strictly", "beginning with the model's own count"]),
        ({"levels": (16, 10)}, ["level 10 cannot be reached from (16,) by ('max2d',)", "10 is not a square grid"]),
        ({"levels": (17, 16)}, ["level 16 cannot be reached from (17,)", "17 is not a square grid"]),
        ({"levels": (16, 9), "operators": ()}, ["level 9 cannot be reached from (16,) by no operator"]),
        ({"levels": (16, 8, 4), "operators": ("max2d", "halve")}, None),
        ({"levels": (16, 7, 4), "operators": ("max2d", "halve")}, ["level 7 cannot be reached", "7 is not a square"]),
        ({"operators": ("max3d",)}, ["operator 'max3d' is unknown", "known are max2d, avg2d"]),
        ({"operators": "max2d"}, ["operators", "('max2d',)", "'max2d'"]),
        ({"operators": None}, ["operators", "('max2d',)", "None"]),
        ({"operators": (["max2d"],)}, ["operator ['max2d'] is unknown"]),
        ({"operators": ("max2d", "max2d")}, ["('max2d', 'max2d')", "name each one once"]),
        ({"has_cls": "yes"}, ["has_cls is 'yes'", "True, False or None"]),
    ],
)
def test_a_space_that_cannot_exist_is_refused(options: dict[str, Any], fragments: list[str] | None):
    options = {"depth": 3, "levels": (16, 9), **options}
    if fragments is None:
        assert SearchSpace(**options).size > 1
        return
    with pytest.raises(SpaceError) as caught:
        SearchSpace(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("16*3 9@max2d", ["'16*3 9@max2d' has 4 layers", "this space has 5"]),
        ("16*3 9@max2d*3", ["has 6 layers", "this space has 5"]),
        ("9*3 9*2", ["layer 0 (9)", "the levels are 16, 9, 4, beginning with the first"]),
        ("16*3 8@max2d*2", ["layer 3 (8@max2d)", "the levels are 16, 9, 4"]),
        ("16*3 9@foo*2", ["layer 3 (9@foo)", "the operators of this space are max2d, cut"]),
        ("16*4 16", ["layer 3 (16)", "at most 3 layers in a row may use one attention map"]),
        ("16 9@max2d*4", ["layer 4 (9)", "at most 3 layers in a row"]),
        ("16 9@cut 4@max2d*3", ["layer 2 (4@max2d)", "max2d cannot go from 9 to 4 tokens here", "square grid"]),
    ],
)
def test_an_architecture_outside_the_space_is_refused_with_layer_and_reason(text: str, fragments: list[str]):
    space = SearchSpace(5, (16, 9, 4), ("max2d", "cut"), 3)
    architecture = Architecture.parse(text)
    assert architecture not in space
    for refuse in (space.check, space.rank, space.neighbours, lambda a: space.mutate(a, random.Random(0))):
        with pytest.raises(ArchitectureError) as caught:
            refuse(architecture)
        for fragment in fragments:
            assert fragment in str(caught.value)


@pytest.mark.parametrize("value", ["16*2 9@max2d", None, (Layer(16),) * 3])
def test_what_is_no_architecture_is_in_no_space(value: Any):
    space = SearchSpace(3, (16, 9))
    assert value not in space
    with pytest.raises(ArchitectureError, match=r"is not an Architecture; Architecture\.parse reads the text of one"):
        space.check(value)


def test_check_gives_the_architecture_itself():
    architecture = VIT.sample(random.Random(0))
    assert VIT.check(architecture) is architecture


# Value semantics, parts and presets


def test_a_space_is_a_value_that_json_brings_back(small: SearchSpace):
    again = SearchSpace(**small.to_json())
    assert again == small
    assert hash(again) == hash(small)
    assert SearchSpace(**{**small.to_json(), "max_run": small.max_run + 1}) != small


def test_the_reductions_are_those_that_occur(small: SearchSpace):
    found = {
        (layer.operator, before.tokens, layer.tokens)
        for architecture in small
        for before, layer in itertools.pairwise(architecture.layers)
        if layer.operator
    }
    if small.depth < len(small.levels):  # a reduction may need more layers than there are
        assert found <= set(small.reductions)
    else:
        assert found == set(small.reductions)


@pytest.mark.parametrize(
    ("tokens", "levels"),
    [(196, (196, 100, 49)), (256, (256, 121, 64)), (64, (64, 36, 16)), (4, (4, 1)), (1, (1,)), (576, (576, 289, 144))],
)
def test_default_levels_are_all_about_half_and_a_quarter(tokens: int, levels: tuple[int, ...]):
    assert default_levels(tokens) == levels


def test_default_levels_need_a_grid():
    with pytest.raises(
        SpaceError, match="suggest no levels for max2d; name the levels yourself; 197 is not a square grid"
    ):
        default_levels(197)


def test_every_preset_builds_and_is_what_space_for_gives():
    for name, preset in PRESETS.items():
        assert preset.size > 1
        assert space_for(f"{name}.some_tag", preset.depth, preset.levels[0]) == preset
    assert PRESETS["deit_tiny_patch16_224"].size == PRESETS["psvit_1d_tiny"].size == 31294
    assert space_for("psvit_1d_tiny", 12, 49).levels == (49, 25, 13)  # at 112 pixels
    assert space_for("vit_tiny_patch16_224", 12, 196, operators=("max1d",)).levels == (196, 98, 49)
    assert space_for("vit_tiny_patch16_224", 12, 196, operators=("max1d", "max2d")).levels == (196, 100, 49)
    assert space_for("vit_tiny_patch16_224", 12, 64) == SearchSpace(12, (64, 36, 16), ("max2d",), 3)
    assert space_for("unheard_of", 4, 16, max_run=1) == SearchSpace(4, (16, 9, 4), ("max2d",), 1)
    assert space_for("digits_vit", 8, 64, levels=(64, 16), operators=("avg2d",), max_run=2) == SearchSpace(
        8, (64, 16), ("avg2d",), 2
    )
