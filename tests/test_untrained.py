"""Search without training on a made-up model whose damage is known: what it finds, on which images, at what cost."""

import math
import random

import numpy as np
import pytest

from poolshare.search.counts import MICRONATS
from poolshare.search.scoring import ImageScores
from poolshare.search.untrained.cheapest import CheapestPaths
from poolshare.search.untrained.damage import DamageModel, single_reductions, steps
from poolshare.search.untrained.racing import Race
from poolshare.search.untrained.search import Effort, changed, expected_cost, gradual, search_untrained
from poolshare.space import Architecture, CostTable, SearchSpace, forecast
from poolshare.space.presets import aligned_levels, even_levels

SPACE = SearchSpace(depth=8, levels=(100, 90, 80, 70, 60, 50, 40, 30, 20), operators=("kmeans", "tome"), max_run=1)
BLOCK = {tokens: 1000 * tokens + 2 * tokens**2 for tokens in SPACE.levels}
COSTS = CostTable("macs", 5000, BLOCK, BLOCK, dict.fromkeys(SPACE.reductions, 300), dict.fromkeys(SPACE.levels, 100))
IMAGES = 400
HARDNESS = np.exp(np.random.default_rng(0).normal(0, 1, IMAGES))  # how much each image suffers


def edge_damage(index, before, layer):
    """Early and deep cuts harm most; "tome" is better early, "kmeans" late; cutting again harms more than it seems."""
    if before is None or layer.operator is None:
        return 0.0
    factor = 1 + (index - 4) / 10 * (1 if layer.operator == "tome" else -1)
    again = 1.3 if before.tokens < 100 else 1
    depth = lambda tokens: (1 - tokens / 100) ** 2 * math.exp(-index / 3)
    return factor * again * (depth(layer.tokens) - 0.5 * depth(before.tokens))


def true_damage(architecture):
    return sum(edge_damage(*step) for step in steps(architecture))


def score(architectures, start, stop):
    """Each image suffers by its hardness, and a little by chance, the same at every call."""
    rows = []
    for architecture in architectures:
        chance = np.random.default_rng(SPACE.rank(architecture)).normal(1, 0.2, IMAGES)
        rows.append(true_damage(architecture) * HARDNESS * chance)
    loss = (np.array(rows)[:, start:stop] * MICRONATS).round().astype(np.int64)
    return ImageScores(loss, loss < MICRONATS // 10)


class Recorded:
    """The score, and what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, architectures, start, stop):
        self.asked.append((list(architectures), start, stop))
        return score(architectures, start, stop)


@pytest.fixture(scope="module")
def allowed():
    return SPACE.within(COSTS, None, 0.7 * COSTS.total(SPACE[0]))


@pytest.fixture(scope="module")
def found(allowed):
    return search_untrained(allowed, Recorded(), IMAGES)


def test_it_finds_the_frontier_of_a_damage_that_is_nearly_additive(allowed, found):
    paths = CheapestPaths(SPACE, COSTS, edge_damage)
    for share in (1.0, 0.9, 0.8, 0.7):
        limit = share * allowed.high
        optimum = paths.best(limit).damage
        reached = min(true_damage(a) for a in found.finalists if COSTS.total(a) <= limit)
        assert reached <= 1.1 * optimum


def test_it_costs_a_fraction_of_scoring_a_hundred_architectures(found):
    dense = COSTS.total(SPACE[0])
    spent = sum(
        (stop - start) * forecast({SPACE[0], *architectures}, COSTS).cost
        for architectures, start, stop in found.race.score.asked
    )
    assert found.passes == pytest.approx(spent / (dense * IMAGES))
    assert found.passes < 50


def test_finalists_are_scored_on_every_image_once_and_keep_the_budget(allowed, found):
    assert 10 <= len(found.finalists) <= Effort().finalists
    costs = [COSTS.total(architecture) for architecture in found.finalists]
    assert costs == sorted(costs)
    assert costs[0] >= allowed.high // 2
    assert costs[-1] > 0.97 * allowed.high
    for architecture in found.finalists:
        assert architecture in allowed
        assert found.race.losses[architecture].images == IMAGES
        assert (found.race.losses[architecture].loss == score([architecture], 0, IMAGES).loss).all()
    seen = [(a, image) for part, start, stop in found.race.score.asked for a in part for image in range(start, stop)]
    assert len(seen) == len(set(seen))


def test_most_see_few_images(found):
    counts = [losses.images for losses in found.race.losses.values()]
    assert sorted(set(counts)) == [100, 200, 400]
    assert counts.count(100) > counts.count(200) + counts.count(400)


def test_equal_seeds_find_equal_architectures(allowed, found):
    assert search_untrained(allowed, score, IMAGES).finalists == found.finalists


def test_what_an_earlier_call_scored_is_not_scored_again_and_changes_nothing(allowed, found):
    known = dict(found.race.losses)
    again = Recorded()
    assert search_untrained(allowed, again, IMAGES, known=known).finalists == found.finalists
    assert again.asked == []
    first = {architecture: losses for architecture, losses in known.items() if SPACE.rank(architecture) % 2}
    assert search_untrained(allowed, score, IMAGES, known=first).finalists == found.finalists


def test_at_every_step_it_is_known_about_how_much_is_ahead_whatever_an_earlier_call_scored(allowed, found):
    def walked(asked):
        return sum((stop - start) * forecast({SPACE[0], *members}, COSTS).cost for members, start, stop in asked)

    tighter = SPACE.within(COSTS, None, 0.6 * COSTS.total(SPACE[0]))
    for band, known in ((allowed, {}), (tighter, dict(found.race.losses))):
        recorded, steps = Recorded(), []
        note = lambda _, ahead, recorded=recorded, steps=steps: steps.append((len(recorded.asked), ahead))
        search_untrained(band, recorded, IMAGES, note=note, known=known)
        assert len(steps) >= 4
        assert steps[0][1] == expected_cost(band, IMAGES)
        aheads = [ahead for _, ahead in steps]
        assert aheads == sorted(aheads, reverse=True)
        for begun, ahead in steps:
            assert 0 < walked(recorded.asked[begun:]) <= ahead


def test_few_images_are_all_looked_at_from_the_beginning(allowed):
    found = search_untrained(allowed, lambda a, start, stop: score(a, start, stop), 50, Effort(rounds=1))
    assert {losses.images for losses in found.race.losses.values()} == {50}
    assert 0 < len(found.finalists) <= Effort().finalists < len(found.race.losses)


def test_a_space_with_one_way_to_save_is_no_trouble():
    space = SearchSpace(depth=2, levels=(100, 50), operators=("kmeans",), max_run=1)
    found = search_untrained(space.within(COSTS_OF_TWO), two_scores, 10)
    assert [str(architecture) for architecture in found.finalists] == ["100 50@kmeans", "100 100"]


COSTS_OF_TWO = CostTable("macs", 5, {100: 100, 50: 50}, {}, {("kmeans", 100, 50): 1}, {100: 2, 50: 1})


def two_scores(architectures, start, stop):
    loss = np.array([[1000 * (100 - a.layers[-1].tokens)] * (stop - start) for a in architectures], np.int64)
    return ImageScores(loss, loss < 1)


@pytest.mark.parametrize(
    ("patches", "count", "levels"),
    [
        (196, 10, (196, 169, 144, 121, 100, 81, 64, 49, 36, 16)),
        (49, 9, (49, 44, 39, 36, 29, 25, 19, 16, 9, 4)),
        (4, 10, (4, 3, 2, 1)),
        (1, 10, (1,)),
    ],
)
def test_levels_are_evenly_spaced_on_grids_where_one_is_near_and_none_comes_twice(patches, count, levels):
    assert even_levels(patches, count) == levels


def test_gradual_schedules_lose_as_many_tokens_at_every_layer(allowed):
    schedules = gradual(allowed)
    assert {step[2].operator for schedule in schedules for step in steps(schedule)} == set(SPACE.operators)
    for schedule in schedules:
        assert schedule in allowed
        lost = [before.tokens - layer.tokens for _, before, layer in steps(schedule)]
        assert max(lost) - min(lost) <= 10  # one level: counts between levels are rounded
    dearest = {max(COSTS.total(s) for s in schedules if operator in str(s)) for operator in SPACE.operators}
    assert min(dearest) > 0.9 * allowed.high


def test_changes_are_the_neighbours_of_the_best_that_promise_most(allowed):
    low, rng = allowed.high // 2, random.Random(3)
    scored = {(a := allowed.sample(rng)): true_damage(a) for _ in range(30)}
    single = single_reductions(SPACE)
    model = DamageModel(SPACE, dict(zip(single, map(true_damage, single), strict=True)))
    found = changed(allowed, low, model, 8, scored)
    assert 4 <= len(found) <= 8
    for limit in np.linspace(low, allowed.high, 5)[1:]:
        base = min((a for a in scored if COSTS.total(a) <= limit), key=scored.get, default=None)
        if base is None:
            continue
        around = [a for a in SPACE.neighbours(base) if low <= COSTS.total(a) <= limit and a not in scored]
        assert not around or min(around, key=model.total) in found
    everyone = {a for base in scored for a in SPACE.neighbours(base)}
    assert set(found) <= everyone - set(scored)
    assert all(a in allowed and COSTS.total(a) >= low for a in found)


# Racing


def test_a_walk_covers_only_the_images_that_are_lacking():
    recorded = Recorded()
    race = Race(SPACE[0], COSTS, IMAGES, recorded)
    one, two = single_reductions(SPACE)[:2]
    race.run([one], 100)
    race.run([one, two, two], 200)
    race.run([one], 200)
    assert recorded.asked == [([SPACE[0], one], 0, 100), ([two], 0, 200), ([SPACE[0], one], 100, 200)]
    assert race.losses[one].images == race.losses[two].images == 200
    assert race.loss(one) == pytest.approx(score([one], 0, 200).loss.mean() / MICRONATS)


def test_damage_is_the_paired_difference_to_the_dense_model():
    def hard_images(architectures, start, stop):
        """A loss that even the dense model has, as a cross-entropy."""
        found = score(architectures, start, stop)
        return ImageScores(found.loss + (5 * HARDNESS * MICRONATS).astype(np.int64)[start:stop], found.contributions)

    one = single_reductions(SPACE)[0]
    race, plain = (Race(SPACE[0], COSTS, IMAGES, by) for by in (hard_images, score))
    for each in (race, plain):
        each.run([one], 200)
    expected = score([one], 0, 100).loss[0] / MICRONATS
    assert race.loss(one) > 5
    assert race.damage(one, 100) == plain.damage(one, 100)
    assert race.damage(one, 100) == pytest.approx((expected.mean(), expected.std(ddof=1) / 10))
    assert race.damage(SPACE[0], 100) == (0, 0)


def test_only_a_significantly_better_one_that_costs_no_more_beats():
    race = Race(SPACE[0], COSTS, IMAGES, score)
    rng = random.Random(0)
    members = list(dict.fromkeys(SPACE.sample(rng) for _ in range(40)))
    race.run(members, IMAGES)
    beaten = [member for member in members if race.beaten(member, members, IMAGES)]
    assert 0 < len(beaten) < len(members)
    for member in beaten:
        cheaper = [other for other in members if COSTS.total(other) <= COSTS.total(member) and other != member]
        assert min(map(race.loss, cheaper)) < race.loss(member)
    least = min(members, key=race.loss)
    assert not race.beaten(least, members, IMAGES)
    assert not race.beaten(least, [least], IMAGES)


def test_survivors_are_spread_over_costs_and_lack_least_there():
    race = Race(SPACE[0], COSTS, IMAGES, score)
    rng = random.Random(1)
    members = list(dict.fromkeys(SPACE.sample(rng) for _ in range(60)))
    race.run(members, IMAGES)
    everyone = race.survivors(members, len(members), IMAGES)
    assert set(everyone) == {member for member in members if not race.beaten(member, members, IMAGES)}
    few = race.survivors(members, 8, IMAGES)
    costs = sorted(COSTS.total(member) for member in everyone)
    width = (costs[-1] - costs[0]) // 4 + 1
    cells = [{m for m in everyone if (costs[-1] - COSTS.total(m)) // width == cell} for cell in range(4)]
    for cell in filter(None, cells):
        chosen = cell & set(few)
        assert chosen
        on_frontier = [
            m for m in cell if all(race.loss(o) >= race.loss(m) for o in everyone if COSTS.total(o) < COSTS.total(m))
        ]
        assert not on_frontier or chosen & set(on_frontier)
    assert COSTS.total(few[0]) > costs[-1] - width


def test_the_best_of_many_close_ones_survives_the_race():
    """Thirty of equal cost, 2 % apart: the best must be among the few that see all images."""
    space = SearchSpace(depth=31, levels=(2, 1), operators=("kmeans",), max_run=1)
    costs = CostTable("macs", 0, {2: 1, 1: 1}, {}, {("kmeans", 2, 1): 0}, {2: 0, 1: 0})
    members = [Architecture.parse(f"{'2 ' * n}1@kmeans {'1 ' * (30 - n)}".strip()) for n in range(1, 31)]

    def close(architectures, start, stop):
        rows = []
        for architecture in architectures:
            place = next(steps(architecture), (31,))[0]  # later is worse; the dense model never cuts
            chance = np.random.default_rng(place).normal(1, 0.2, IMAGES)
            rows.append(0.1 * (1 + 0.02 * place) * HARDNESS * chance)
        loss = (np.array(rows)[:, start:stop] * MICRONATS).round().astype(np.int64)
        return ImageScores(loss, loss < 1)

    race = Race(space[0], costs, IMAGES, close)
    left = members
    for images, most in ((100, 30), (200, 12), (400, 6)):
        race.run(left, images)
        left = race.survivors(left, most, images)
    assert members[0] in left or members[1] in left
    assert all(member in space for member in left)


@pytest.mark.parametrize(
    ("patches", "prefix", "levels"),
    [
        (196, 1, (196, 175, 159, 143, 127, 103, 87, 71, 55, 31, 15)),
        (49, 1, (49, 47, 39, 31, 23, 15, 7)),
        (49, 5, (49, 43, 35, 27, 19, 11, 3)),
        (4, 1, (4,)),
    ],
)
def test_aligned_levels_make_whole_eights_with_the_prefix_tokens(patches, prefix, levels):
    found = aligned_levels(patches, prefix)
    assert found[0] == patches
    assert all((count + prefix) % 8 == 0 for count in found[1:])
    assert list(found) == sorted(set(found), reverse=True)
    assert found == levels
