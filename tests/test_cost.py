"""Costs against hand formulas, bands against enumeration."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import poolshare.space.band as band_module
import poolshare.space.counting as counting_module
from poolshare.space import (
    OPERATORS,
    Architecture,
    Band,
    BudgetError,
    CostTable,
    Layer,
    Operator,
    SearchSpace,
    SpaceError,
    budget_quantity,
    forecast,
    forecast_space,
    parse_budget,
)


def own_block(tokens: int, width: int, ratio: int = 4) -> int:
    """MACs of a block with its own map; `tokens` with prefix."""
    qkv, scores, mix = 3 * tokens * width**2, tokens**2 * width, tokens**2 * width
    return qkv + scores + mix + tokens * width**2 + 2 * ratio * tokens * width**2 + 10 * tokens * width


def shared_block(tokens: int, width: int, ratio: int = 4) -> int:
    values, mix = tokens * width**2, tokens**2 * width
    return values + mix + tokens * width**2 + 2 * ratio * tokens * width**2 + 10 * tokens * width


def vit_tiny_table(levels: tuple[int, ...] = (196, 100, 49)) -> CostTable:
    """DeiT-Tiny at 224 by hand: 16×16 patches of 3 channels, d = 192, one CLS token, 1,000 classes."""
    width = 192
    return CostTable(
        "macs",
        source=16 * 16 * 3 * width * 196,
        own={level: own_block(level + 1, width) for level in levels},
        shared={level: shared_block(level + 1, width) for level in levels},
        pool={("max2d", b, a): 0 for b in levels for a in levels if a < b},
        sink={level: 5 * (level + 1) * width + width * 1000 for level in levels},
    )


VIT = SearchSpace(12, (196, 100, 49), ("max2d",), 3)


def test_the_published_numbers_of_one_block():
    assert own_block(197, 192) == 102_427_392
    assert shared_block(197, 192) == 80_451_648
    assert own_block(197, 192) - shared_block(197, 192) == 2 * 197 * 192**2 + 197**2 * 192


def test_the_dense_path_costs_what_deit_tiny_costs():
    assert vit_tiny_table().total(VIT[0]) == 1_258_411_200
    assert vit_tiny_table().total(VIT.most_expensive(vit_tiny_table())) == 1_258_411_200


def test_an_architecture_costs_the_sum_along_its_path():
    table = CostTable(
        "macs",
        source=10**9,
        own={16: 1, 9: 10, 4: 100},
        shared={16: 1_000, 9: 10_000, 4: 100_000},
        pool={("max2d", 16, 9): 10**6, ("max2d", 9, 4): 10**7, ("avg2d", 16, 4): 10**8},
        sink={16: 10**10, 9: 2 * 10**10, 4: 3 * 10**10},
    )
    two_grids = Architecture.parse("16*3 16 9@max2d 9*2")
    assert table.total(two_grids) == 10**9 + 2 + 2_000 + 10**6 + 20 + 10_000 + 2 * 10**10
    assert table.total(Architecture.parse("16 4@avg2d*2")) == 10**9 + 1 + 10**8 + 100 + 100_000 + 3 * 10**10
    assert table.total(Architecture.parse("16")) == 10**9 + 1 + 10**10


def random_table(space: SearchSpace, seed: int, largest: int = 50) -> CostTable:
    """Every other seed has first followers that cost other than the next."""
    rng = random.Random(seed)

    def cost() -> int:
        return rng.randint(0, largest)

    own, shared = {level: cost() for level in space.levels}, {level: cost() for level in space.levels}
    pool = {reduction: cost() for reduction in space.reductions}
    first = {level: cost() for level in space.levels}
    source, sink = cost(), {level: cost() for level in space.levels}
    return CostTable("macs", source, own, shared, pool, sink, first if seed % 2 else {})


def cost_by_hand(architecture: Architecture, table: CostTable) -> int:
    total = table.source + table.sink[architecture.layers[-1].tokens]
    before = architecture.layers[0]
    for layer in architecture.layers:
        first = table.first_shared and layer.shared and not before.shared
        kind = table.first_shared if first else table.shared if layer.shared else table.own
        total += kind[layer.tokens]
        if layer.operator:
            total += table.pool[layer.operator, before.tokens, layer.tokens]
        before = layer
    return total


SPACES = [
    SearchSpace(6, (16, 9, 4), ("max2d",), 3),
    SearchSpace(4, (36, 16, 9, 4), ("max2d", "avg2d"), 2),
    SearchSpace(7, (16,), (), 4),
    SearchSpace(1, (16, 4), ("max2d",), 2),
    SearchSpace(3, (16, 4, 1), ("avg2d",), 1),
    SearchSpace(4, (16, 9, 4), ("tome", "max2d"), 2),
]
spaces = st.sampled_from(SPACES)


@given(spaces, st.integers(0, 10**6), st.sampled_from([0, 1, 50, 10**12]))
@settings(max_examples=60, deadline=None)
def test_totals_cheapest_and_dearest_by_enumeration(space: SearchSpace, seed: int, largest: int):
    table = random_table(space, seed, largest)
    totals = {architecture: cost_by_hand(architecture, table) for architecture in space}
    assert {architecture: table.total(architecture) for architecture in space} == totals
    everything = list(space)  # in the order of ranks, so that min and max take the lowest rank of equals
    assert space.cheapest(table) == min(everything, key=totals.__getitem__)
    assert space.most_expensive(table) == max(everything, key=totals.__getitem__)


def test_the_first_follower_may_cost_other_than_the_next():
    reductions = {("tome", 16, 9): 1, ("max2d", 16, 9): 1}
    table = CostTable("latency", 0, {16: 10, 9: 10}, {16: 5, 9: 5}, reductions, {9: 0}, {16: 100, 9: 5})
    for text, total in [
        ("16 16 9@max2d", 31),  # nobody follows
        ("16*2 9@max2d", 121),
        ("16*3 9@max2d", 126),
        ("16 9@tome 9", 31),  # scores by queries and keys, which cost nothing
        ("16 9@max2d*2", 26),  # 9 tokens cost no more
    ]:
        assert table.total(Architecture.parse(text)) == total, text


@given(spaces, st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_forecasts_of_the_whole_space_agree_whatever_edges_carry(space: SearchSpace, seed: int):
    table = random_table(space, 2 * seed + 1)
    counted = forecast_space(space, table)
    assert counted == forecast(space, table)
    assert counted.one_by_one == sum(table.total(architecture) for architecture in space)


# The table itself


def test_a_table_comes_back_from_json_as_the_same_value():
    table = random_table(SPACES[1], 0)
    for sort_keys in (False, True):
        again = CostTable.from_json(json.loads(json.dumps(table.to_json(), sort_keys=sort_keys)))
        assert again == table
        assert hash(again) == hash(table)
        assert again.total(SPACES[1][7]) == table.total(SPACES[1][7])
    other = CostTable.from_json({**table.to_json(), "source": table.source + 1})
    assert other != table


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        ({"source": None}, "None"),
        ({"source": 1.5}, "1.5"),
        ({"source": math.inf}, "inf"),
        ({"source": math.nan}, "nan"),
        ({"source": True}, "True"),
        ({"source": "12"}, "'12'"),
        ({"source": -1}, "-1"),
        ({"own": {"16": 1.5}}, "1.5"),
        ({"own": {"x": 1}}, "'x'"),
        ({"own": [1]}, "list"),
        ({"shared": None}, "NoneType"),
        ({"sink": {"16": None}}, "None"),
        ({"pool": {"max2d 16": 1}}, "expected 3, got 2"),
        ({"pool": {"max2d 16 9 4": 1}}, "expected 3"),
        ({"pool": {"max2d 16 nine": 1}}, "'nine'"),
        ({"quantity": 3}, "quantity is 3"),
    ],
)
def test_damaged_json_of_a_table_is_refused(damage: dict[str, Any], fragment: str):
    with pytest.raises(SpaceError, match="this is not a cost table in JSON") as caught:
        CostTable.from_json({**random_table(SPACES[0], 0).to_json(), **damage})
    assert fragment in str(caught.value)


@pytest.mark.parametrize("missing", ["quantity", "source", "own", "shared", "pool", "sink"])
def test_a_table_without_a_part_is_refused_by_that_part(missing: str):
    value = random_table(SPACES[0], 0).to_json()
    del value[missing]
    with pytest.raises(SpaceError, match=f"not a cost table in JSON: KeyError\\('{missing}'\\)"):
        CostTable.from_json(value)


@pytest.mark.parametrize("value", [None, [], "macs", 3])
def test_what_is_no_object_is_no_table(value: Any):
    with pytest.raises(SpaceError, match="not a cost table in JSON"):
        CostTable.from_json(value)


def test_a_table_of_another_space_names_what_it_lacks():
    table = random_table(SPACES[0], 0)
    with pytest.raises(SpaceError, match=r"macs table has no entry for 36; measure it on this space"):
        table.total(Architecture.parse("36"))
    with pytest.raises(SpaceError, match=r"macs table has no entry for \('avg2d', 16, 9\); measure"):
        table.total(Architecture.parse("16 9@avg2d"))
    with pytest.raises(SpaceError, match=r"macs table has no entry for 4 tokens; measure"):
        CostTable("macs", 0, {4: 1}, {4: 1}, {}, {16: 1}).total(Architecture.parse("4"))


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("macs", 1_258_411_200, "1.26 G MACs"),
        ("macs", 80_451_648, "80.5 M MACs"),
        ("parameters", 5_717_416, "5.72 M parameters"),
        ("latency", 1_500, "0.0015 ms"),
        ("macs", 12, "12 MACs"),
    ],
)
def test_values_for_people(quantity: str, value: int, text: str):
    assert CostTable(quantity, 0, {}, {}, {}, {}).format(value) == text


# Budgets in words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("60%", 755_046_720),
        ("100%", 1_258_411_200),
        ("12.5 %", 157_301_400),
        ("0.7G", 700_000_000),
        (".7G", 700_000_000),
        ("350M", 350_000_000),
        ("1.5k", 1_500),
        (" 700000000 ", 700_000_000),
        ("1.001M", 1_001_000),
        ("150%", 1_887_616_800),
    ],
)
def test_budgets_in_words(text: str, value: int):
    assert parse_budget(text, 1_258_411_200) == value


@given(st.integers(1, 10**13), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_a_percentage_is_exact_and_all_is_all(dense: int, hundredths: int):
    assert parse_budget(f"{hundredths / 100:.2f}%", dense) == math.floor(Fraction(hundredths, 10_000) * dense)
    assert parse_budget("100%", dense) == dense


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["budget '' is not understood", "60%", "0.7G"]),
        ("cheap", ["budget 'cheap' is not understood"]),
        ("-60%", ["'-60%'"]),
        ("60%%", ["'60%%'"]),
        ("1e9", ["'1e9'"]),
        ("nan%", ["'nan%'"]),
        ("inf", ["'inf'"]),
        ("٣%", ["'٣%'"]),
        ("0.7g", ["'0.7g'"]),
        ("12ms", ["'12ms' limits latency", "60% or 0.7G"]),
        ("12us", ["'12us' is not understood", "12ms"]),
        ("60", ["budget '60' has no unit", "60%", "60G", "60M"]),
        ("0.6", ["budget '0.6' has no unit", "0.6%"]),
    ],
)
def test_a_budget_that_is_not_understood_is_refused_with_examples(text: str, fragments: list[str]):
    with pytest.raises(BudgetError) as caught:
        parse_budget(text, 1_258_411_200)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("12ms", 12_000_000), (" 0.25 ms", 250_000), ("60%", 30), ("1.5%", 0)])
def test_latency_budgets_in_words_are_nanoseconds(text: str, value: int):
    assert parse_budget(text, 50, "latency") == value


@pytest.mark.parametrize("text", ["0.7G", "350M", "12000000"])
def test_a_budget_of_macs_does_not_limit_latency(text: str):
    with pytest.raises(BudgetError, match=r"limits MACs.*60% or 12ms"):
        parse_budget(text, 50, "latency")


def test_what_a_budget_limits():
    assert [budget_quantity(text) for text in ("12 ms", "60%", "0.7G", "5")] == ["latency", "macs", "macs", "macs"]
    assert budget_quantity("60%", "latency") == "latency"


# Bands


def count_coarsely(monkeypatch: pytest.MonkeyPatch, memory: int = counting_module.MEMORY, few: int = -1) -> None:
    """From here on no space is small enough for exact counts; `few`: how many members a band may look at singly."""
    counting_module.paths_of.cache_clear()
    monkeypatch.setattr(counting_module, "MAX_BEGINNINGS", 0)
    monkeypatch.setattr(counting_module, "MAX_SUMS", 0)
    monkeypatch.setattr(counting_module, "MEMORY", memory)
    monkeypatch.setattr(band_module, "FEW", few)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For `count_coarsely`: the remembered counts are clean before and after."""
    counting_module.paths_of.cache_clear()
    yield monkeypatch
    counting_module.paths_of.cache_clear()


@given(spaces, st.integers(0, 10**6), st.data())
@settings(max_examples=100, deadline=None)
def test_a_band_counts_and_holds_what_enumeration_finds(space: SearchSpace, seed: int, data: st.DataObject):
    table = random_table(space, seed)
    totals = {architecture: table.total(architecture) for architecture in space}
    edge = st.none() | st.integers(min(totals.values()) - 3, max(totals.values()) + 3)
    low, high = data.draw(edge), data.draw(edge)
    expected = [
        architecture
        for architecture, total in totals.items()
        if (low is None or total >= low) and (high is None or total <= high)
    ]
    if not expected:
        with pytest.raises(BudgetError):
            space.within(table, low, high)
        return
    band = space.within(table, low, high)
    assert band.exact
    assert band.size == len(expected)
    assert list(band) == expected  # both in the order of ranks
    assert [architecture in band for architecture in space] == [architecture in expected for architecture in space]
    assert band.sample(random.Random(seed)) in expected


def rich_band(space: SearchSpace, low: float = 0.3, high: float = 0.7, seed: int = 2) -> Band:
    table = random_table(space, seed, largest=3000)
    totals = sorted(table.total(architecture) for architecture in space)
    return space.within(table, totals[int(low * len(totals))], totals[int(high * len(totals))])


def test_draws_from_a_band_are_uniform():
    band = rich_band(SPACES[1])
    members = list(band)
    assert 50 < len(members) == band.size < SPACES[1].size
    rng = random.Random(0)
    draws = Counter(band.sample(rng) for _ in range(40 * len(members)))
    assert set(draws) <= set(members)
    assert chisquare([draws[member] for member in members]).pvalue > 0.01


@pytest.mark.parametrize("memory", [10_000, 1000, 100])
def test_a_coarsely_counted_band_holds_the_same_and_draws_uniformly(coarse: pytest.MonkeyPatch, memory: int):
    members = list(rich_band(SPACES[1]))
    count_coarsely(coarse, memory)
    band = rich_band(SPACES[1])
    assert not band.exact
    assert list(band) == members
    rng = random.Random(1)
    draws = Counter(band.sample(rng) for _ in range(40 * len(members)))
    assert set(draws) <= set(members)
    assert chisquare([draws[member] for member in members]).pvalue > 0.01


@given(st.integers(0, 10**6), st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_coarse_bands_lose_no_member_and_admit_no_other(
    coarse: pytest.MonkeyPatch, seed: int, memory: int, one: float, other: float
):
    space = SPACES[0]
    table = random_table(space, seed, largest=10**5)
    totals = sorted(table.total(architecture) for architecture in space)
    low, high = sorted(totals[int(share * (len(totals) - 1))] for share in (one, other))
    expected = [architecture for architecture in space if low <= table.total(architecture) <= high]
    count_coarsely(coarse, memory)
    assert list(space.within(table, low, high)) == expected
    count_coarsely(coarse, memory, few=space.size)
    band = space.within(table, low, high)
    assert band.exact
    assert (band.size, list(band)) == (len(expected), expected)
    assert band.sample(random.Random(seed)) in expected


@pytest.mark.parametrize(("memory", "error"), [(2**20, 0.01), (2**16, 0.05)])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.6, 0.9])
def test_an_estimated_size_is_close_and_says_about(coarse: pytest.MonkeyPatch, memory: int, error: float, share: float):
    table = vit_tiny_table()
    exact = VIT.within(table, None, share * 1_258_411_200)
    count_coarsely(coarse, memory)
    band = VIT.within(table, None, share * 1_258_411_200)
    assert (exact.exact, band.exact) == (True, False)
    assert band.size == pytest.approx(exact.size, rel=error)
    assert exact.size_text == f"{exact.size:,}"
    about, number = band.size_text.split()
    assert about == "about"
    assert int(number.replace(",", "")) == pytest.approx(band.size, rel=0.005)


@pytest.mark.parametrize("memory", [2**12, 2**16, 2**20])
def test_coarse_counts_keep_to_their_memory_and_use_it(coarse: pytest.MonkeyPatch, memory: int):
    count_coarsely(coarse, memory)
    ways = counting_module.Paths(VIT, vit_tiny_table()).ways
    assert isinstance(ways, counting_module.CoarseWays)
    rows = [counts for row in ways._counts for _, counts in row.values()]
    width = VIT.size.bit_length() // 8 + 1
    assert (
        memory / 2 < sum(map(len, rows)) < memory + VIT.depth * width * len(rows)
    )  # ends of a range are sums of rounded costs


def test_an_open_band_is_the_space_and_needs_no_counting(coarse: pytest.MonkeyPatch):
    table = vit_tiny_table()
    count_coarsely(coarse, 1)
    for low, high in [(None, None), (0, 10**12), (None, 1_258_411_200)]:
        band = VIT.within(table, low, high)
        assert (band.exact, band.size, band.size_text) == (True, 31294, "31,294")
        assert "ways" not in vars(counting_module.paths_of(VIT, table))
        assert band.sample(random.Random(4)) == VIT.sample(random.Random(4))


# Levels of ViT-Base, pooled by max2d (free) or by tome, whose similarities cost 64 for each pair that may be merged.
BASE = SearchSpace(12, (196, 144, 100, 64, 49), ("max2d", "tome"), 3)


def vit_base_table() -> CostTable:
    def tome(before: int, after: int) -> int:
        first = 64 * (before // 2) * (before - before // 2)
        left = before - before // 2
        return first if left <= after else first + 64 * (left // 2) * (left - left // 2)

    width, levels = 768, BASE.levels
    return CostTable(
        "macs",
        source=16 * 16 * 3 * width * 196,
        own={level: own_block(level + 1, width) for level in levels},
        shared={level: shared_block(level + 1, width) for level in levels},
        pool={
            (name, b, a): tome(b, a) if name == "tome" else 0
            for name in BASE.operators
            for b in levels
            for a in levels
            if a < b
        },
        sink={level: 5 * (level + 1) * width + width * 1000 for level in levels},
    )


def test_a_space_of_five_levels_and_two_operators_is_counted_exactly():
    table = vit_base_table()
    assert table.own[196] == 1_455_467_520
    prices = {
        node: [(after, table.edge(BASE.last_layer(node), layer)) for layer, after in out.items()]
        for node, out in BASE.edges.items()
    }
    arrivals: Counter[tuple[Any, int]] = Counter({(None, table.source): 1})  # node and cost so far, over all layers
    for _ in range(BASE.depth):
        ahead: Counter[tuple[Any, int]] = Counter()
        for (node, spent), times in arrivals.items():
            for after, price in prices[node]:
                ahead[after, spent + price] += times
        arrivals = ahead
    for percent, size in [(60, 627_995), (40, 64_556)]:
        limit = percent * table.total(BASE[0]) // 100
        band = BASE.within(table, None, limit)
        assert (band.exact, band.size) == (True, size)
        found = sum(n for (node, spent), n in arrivals.items() if spent + table.head(BASE.levels[node.level]) <= limit)
        assert found == size


def test_a_space_of_many_levels_and_operators_is_counted_about_and_drawn_from_within_the_band():
    levels = tuple(range(1369, 369, -100))
    space = SearchSpace(24, levels, ("tome", "topk", "kmeans", "mstm"), 3)
    table = CostTable(
        "macs",
        source=0,
        own={level: own_block(level + 1, 1024) for level in levels},
        shared={level: shared_block(level + 1, 1024) for level in levels},
        pool={
            (name, b, a): 1024 * (b * index + a)
            for index, name in enumerate(space.operators)
            for b in levels
            for a in levels
            if a < b
        },
        sink=dict.fromkeys(levels, 0),
    )
    dense, rng = table.total(space[0]), random.Random(0)
    assert space.size > 10**16
    band = space.within(table, 0.5 * dense, 0.51 * dense)
    assert not band.exact
    drawn = [band.sample(rng) for _ in range(200)]
    assert all(0.5 * dense <= table.total(architecture) <= 0.51 * dense for architecture in drawn)
    # Of uniform draws from a wider band, about the share that the sizes promise falls into this one.
    wider = space.within(table, 0.5 * dense, 0.52 * dense)
    share, draws = band.size / wider.size, 1000
    inside = sum(wider.sample(rng) in band for _ in range(draws))
    assert abs(inside - draws * share) < 4 * math.sqrt(draws * share * (1 - share))
    cheapest = table.total(space.cheapest(table))
    tight = space.within(table, None, cheapest)
    assert tight.exact  # few are looked at one by one
    assert {table.total(architecture) for architecture in tight} == {cheapest}


@pytest.mark.parametrize("coarsely", [False, True])
def test_an_impossible_budget_is_refused_with_the_reachable_range(coarse: pytest.MonkeyPatch, coarsely: bool):
    if coarsely:
        count_coarsely(coarse, 1000)
    table = vit_tiny_table()
    cheapest = min(table.total(architecture) for architecture in VIT)
    assert table.format(cheapest) == "357 M MACs"
    for low, high in [(None, cheapest - 1), (1_258_411_201, None), (900_000_000, 800_000_000)]:
        with pytest.raises(BudgetError) as caught:
            VIT.within(table, low, high)
        message = str(caught.value)
        assert f"reaches from 357 M MACs ({cheapest:,}) to 1.26 G MACs (1,258,411,200)" in message
        assert f"{low if low is not None else cheapest:,}" in message
        assert f"{high if high is not None else 1_258_411_200:,}" in message


def test_a_gap_inside_the_range_is_refused_with_the_nearest_costs():
    space = SPACES[0]
    table = random_table(space, 3, largest=10**6)
    totals = sorted({table.total(architecture) for architecture in space})
    for below, above in list(pairwise(totals))[:20]:
        if above - below > 1:
            with pytest.raises(BudgetError, match=f"the nearest that exist cost {below:,} and {above:,}$"):
                space.within(table, below + 1, above - 1)


def test_a_gap_that_coarse_counting_cannot_see_is_refused_too(coarse: pytest.MonkeyPatch):
    space = SPACES[0]
    table = random_table(space, 3, largest=10**6)
    totals = sorted({table.total(architecture) for architecture in space})
    below, above = max(pairwise(totals), key=lambda pair: pair[1] - pair[0])
    coarse.setattr(band_module, "_MAX_DRAWS", 1000)
    for few, problem in [(-1, "none of 1,000 draws costs"), (space.size, "no architecture costs")]:
        count_coarsely(coarse, 1000, few)
        with pytest.raises(BudgetError, match=f"{problem} .*reaches from .*{totals[0]:,}.*{totals[-1]:,}"):
            space.within(table, below + 1, above - 1)


def test_a_broken_limit_is_rounded_into_the_band():
    space, table = SPACES[0], random_table(SPACES[0], 5)
    totals = sorted({table.total(architecture) for architecture in space})
    low, high = totals[2] + 0.5, totals[-3] - 0.5
    expected = [architecture for architecture in space if low <= table.total(architecture) <= high]
    band = space.within(table, low, high)
    assert list(band) == expected
    assert band.size == len(expected)
    assert space.within(table, Fraction(2 * totals[2] + 1, 2)).size == space.within(table, totals[3]).size


@pytest.mark.parametrize(("name", "value"), [("low", "60%"), ("high", math.nan), ("high", math.inf), ("low", [3])])
def test_a_limit_that_is_no_number_is_refused(name: str, value: Any):
    with pytest.raises(BudgetError) as caught:
        SPACES[0].within(random_table(SPACES[0], 0), **{name: value})
    assert f"{name} is {value!r}; a limit is a number" in str(caught.value)


def test_a_band_of_the_real_space_is_counted_exactly():
    table = vit_tiny_table()
    totals = [table.total(architecture) for architecture in VIT]
    low, high = 700_000_000, 755_046_720
    band = VIT.within(table, low, high)
    assert band.exact
    assert band.size == sum(low <= total <= high for total in totals) > 1000
    rng = random.Random(0)
    assert all(low <= table.total(band.sample(rng)) <= high for _ in range(100))


def test_bands_follow_the_grid_where_an_operator_gives_it_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        OPERATORS, "cut", Operator("cut", "any smaller count", lambda before, after, whole: after < before)
    )
    space = SearchSpace(5, (16, 9, 4), ("max2d", "cut"), 2)
    table = random_table(space, 9)
    totals = {architecture: table.total(architecture) for architecture in space}
    middle = sorted(totals.values())[len(totals) // 2]
    assert list(space.within(table, None, middle)) == [a for a, total in totals.items() if total <= middle]
    assert Layer(9, "max2d") in space.edges[space.follow(None, (Layer(16),))]
    assert space.follow(None, (Layer(16), Layer(9, "cut"), Layer(4, "max2d"))) is None
