"""The prefix tree and its price against sets of distinct prefixes, counted one by one."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolshare.space import (
    OPERATORS,
    Architecture,
    CostTable,
    Forecast,
    Layer,
    Operator,
    PrefixTree,
    SearchSpace,
    forecast,
    forecast_space,
)

VIT = SearchSpace(12, (196, 100, 49), ("max2d",), 3)
SPACES = [
    SearchSpace(6, (16, 9, 4), ("max2d",), 3),
    SearchSpace(4, (36, 16, 9, 4), ("max2d", "avg2d"), 2),
    SearchSpace(7, (16,), (), 4),
    SearchSpace(1, (16, 4), ("max2d",), 2),
]


def random_table(space: SearchSpace, seed: int) -> CostTable:
    rng = random.Random(seed)

    def cost() -> int:
        return rng.randint(0, 10**9)

    return CostTable(
        "macs",
        cost(),
        {level: cost() for level in space.levels},
        {level: cost() for level in space.levels},
        {reduction: cost() for reduction in space.reductions},
        {level: cost() for level in space.levels},
    )


def vit_tiny_table() -> CostTable:
    """DeiT-Tiny by hand formulas: d = 192, r = 4, one CLS token."""

    def block(tokens: int, qkv_rows: int, products: int) -> int:
        return (qkv_rows + 1 + 8) * tokens * 192**2 + products * tokens**2 * 192 + 10 * tokens * 192

    return CostTable(
        "macs",
        source=768 * 192 * 196,
        own={level: block(level + 1, 3, 2) for level in VIT.levels},
        shared={level: block(level + 1, 1, 1) for level in VIT.levels},
        pool=dict.fromkeys(VIT.reductions, 0),
        sink={level: 5 * (level + 1) * 192 + 192 * 1000 for level in VIT.levels},
    )


def by_distinct_prefixes(population: list[Architecture], table: CostTable) -> Forecast:
    """Every prefix once, priced from its last two layers; one head per distinct architecture."""
    prefixes = {a.layers[:length] for a in population for length in range(1, a.depth + 1)}
    cost = table.source if population else 0
    for prefix in prefixes:
        last = prefix[-1]
        cost += table.shared[last.tokens] if last.shared else table.own[last.tokens]
        if last.operator is not None:
            cost += table.pool[last.operator, prefix[-2].tokens, last.tokens]
    cost += sum(table.sink[architecture.layers[-1].tokens] for architecture in set(population))
    return Forecast(len(population), len(prefixes), cost, sum(map(table.total, population)))


@given(st.sampled_from(SPACES), st.lists(st.integers(0, 10**6), max_size=30), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_forecast_of_a_population_counts_distinct_prefixes(space: SearchSpace, ranks: list[int], seed: int):
    table = random_table(space, seed)
    population = [space[rank % space.size] for rank in ranks]
    assert forecast(iter(population), table) == by_distinct_prefixes(population, table)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_forecast_of_a_space_equals_a_walk_over_all_of_it(space: SearchSpace):
    table = random_table(space, 1)
    everything = list(space)
    assert forecast_space(space, table) == forecast(everything, table) == by_distinct_prefixes(everything, table)


def test_the_forecast_of_a_space_knows_the_grid_that_an_operator_gave_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        OPERATORS, "cut", Operator("cut", "any smaller count", lambda before, after, whole: after < before)
    )
    space = SearchSpace(5, (16, 9, 4), ("max2d", "cut"), 2)
    table = random_table(space, 2)
    assert forecast_space(space, table) == by_distinct_prefixes(list(space), table)


def test_the_forecast_of_a_space_too_large_to_list_bounds_itself():
    space = SearchSpace(24, (576, 289, 144), ("max2d", "avg2d"), 4)
    table = random_table(space, 3)
    whole = forecast_space(space, table)
    assert whole.architectures == space.size > 10**9
    assert space.size < whole.edges < space.size * space.depth
    assert 0 < whole.share < 1
    mean = whole.one_by_one / space.size
    rng = random.Random(0)
    draws = [table.total(space.sample(rng)) for _ in range(2000)]
    assert sum(draws) / len(draws) == pytest.approx(mean, rel=0.02)


def test_the_whole_space_of_vit_tiny_costs_what_the_design_says():
    whole = forecast_space(VIT, vit_tiny_table())
    assert whole.architectures == 31294
    assert round(whole.edges / (31294 * 12), 3) == 0.154
    assert whole == by_distinct_prefixes(list(VIT), vit_tiny_table())
    blocks = dataclasses.replace(vit_tiny_table(), source=0, sink=dict.fromkeys(VIT.levels, 0), _edges={})
    of_blocks = forecast_space(VIT, blocks)  # the design's 0.075, or 2,340 evaluations, leave out stem and head
    assert round(of_blocks.share, 3) == 0.075
    assert of_blocks.share * of_blocks.architectures == pytest.approx(2340, abs=2)
    assert whole.share < of_blocks.share  # the stem is computed once


@pytest.mark.parametrize(("draws", "share"), [(50, 0.5), (500, 0.30)])
def test_uniform_draws_cost_the_share_that_the_design_says(draws: int, share: float):
    rng = random.Random(0)
    shares = [forecast([VIT.sample(rng) for _ in range(draws)], vit_tiny_table()).share for _ in range(5)]
    assert sum(shares) / len(shares) == pytest.approx(share, abs=0.03)


@given(st.sampled_from(SPACES), st.lists(st.integers(0, 10**6), max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_tree_holds_every_position_once_at_the_end_of_its_path(space: SearchSpace, ranks: list[int]):
    population = [space[rank % space.size] for rank in ranks]
    found: dict[int, tuple[Layer, ...]] = {}

    def walk(tree: PrefixTree, path: tuple[Layer, ...]) -> None:
        for position in tree.ends:
            assert position not in found
            found[position] = path
        for layer, child in tree.children.items():
            walk(child, (*path, layer))

    walk(PrefixTree.of(population), ())
    assert found == {position: architecture.layers for position, architecture in enumerate(population)}


def test_equal_architectures_are_computed_once():
    one = VIT[1234]
    table = vit_tiny_table()
    thrice = forecast([one] * 3, table)
    assert thrice == Forecast(3, 12, table.total(one), 3 * table.total(one))
    assert thrice.share == pytest.approx(1 / 3)


def test_two_that_part_at_the_last_layer_share_eleven():
    first, second = VIT[0], VIT[1]
    assert [a == b for a, b in zip(first.layers, second.layers, strict=True)] == [True] * 11 + [False]
    table = vit_tiny_table()
    both = forecast([first, second], table)
    assert both.edges == 13
    assert both.cost == table.total(first) + table.shared[196] + table.sink[196]
    assert [len(list(group)) for _, group in itertools.groupby(first.layers)] == [12]
