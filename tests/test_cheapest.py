"""The least damaging path at every cost, against all paths of small spaces."""

import random

import pytest

from poolshare.search.untrained.cheapest import CheapestPaths
from poolshare.space import BudgetError, CostTable, SearchSpace

SPACES = [
    SearchSpace(depth=6, levels=(64, 36, 16), operators=("max2d", "kmeans"), max_run=2),
    SearchSpace(depth=5, levels=(60, 50, 40, 30, 20), operators=("kmeans",), max_run=1),
    SearchSpace(depth=1, levels=(60,), operators=(), max_run=3),
]


def made_up(space, scale=1):
    """Costs and damages without any pattern; damages may be negative."""
    rng = random.Random(space.depth)
    draw = lambda keys: {key: scale * rng.randint(1, 30) for key in keys}
    costs = CostTable("macs", 7, draw(space.levels), draw(space.levels), draw(space.reductions), draw(space.levels))
    drawn = {}
    return costs, lambda *edge: drawn.setdefault(edge, rng.uniform(-0.1, 1))


def brute_force(space, costs, damage):
    """[(cost, damage)] of the frontier, by falling cost."""
    found = []
    for architecture in space:
        known = [None, *(layer._replace(operator=None) for layer in architecture.layers)]  # what an edge is told
        total = sum(damage(*edge) for edge in zip(range(space.depth), known, architecture.layers, strict=False))
        found.append((costs.total(architecture), total))
    frontier = []
    for cost, total in sorted(found):
        if not frontier or total < frontier[-1][1]:
            frontier.append((cost, total))
    return frontier[::-1]


@pytest.mark.parametrize("space", SPACES, ids=["two operators", "five levels", "one layer"])
def test_the_best_path_at_every_cost_is_that_of_all_paths(space):
    costs, damage = made_up(space)
    paths = CheapestPaths(space, costs, damage)
    frontier = brute_force(space, costs, damage)
    for (cost, total), dearer in zip(frontier, [None, *frontier], strict=False):
        for limit in {cost, dearer[0] - 1 if dearer else 2 * cost}:  # up to the next one's cost it stays the best
            path = paths.best(limit)
            assert (path.cost, path.damage) == (cost, pytest.approx(total))
        assert path.architecture in space
        assert costs.total(path.architecture) == path.cost


@pytest.mark.parametrize("units", [3, 10, 2000])
@pytest.mark.parametrize("space", SPACES, ids=["two operators", "five levels", "one layer"])
def test_the_cheapest_is_found_at_its_own_cost_however_coarse_the_units(space, units):
    costs, damage = made_up(space, scale=100)
    least = min(costs.total(architecture) for architecture in space)
    path = CheapestPaths(space, costs, damage, units).best(least)
    known = (None, *(layer._replace(operator=None) for layer in path.architecture.layers))
    total = sum(damage(*edge) for edge in zip(range(space.depth), known, path.architecture.layers, strict=False))
    assert (path.cost, path.damage) == (least, pytest.approx(total))


def test_a_limit_below_every_path_names_the_cheapest():
    costs, damage = made_up(SPACES[0])
    with pytest.raises(BudgetError, match="no architecture costs 3 or less; the cheapest costs"):
        CheapestPaths(SPACES[0], costs, damage).best(3)


def test_coarse_units_lose_less_than_they_round():
    space = SPACES[0]
    costs, damage = made_up(space, scale=1_000_000)
    paths = CheapestPaths(space, costs, damage, units=500)
    assert paths.unit > 1
    slack = (space.depth + 1) * paths.unit
    for cost, total in brute_force(space, costs, damage):
        assert paths.best(cost + slack).damage <= total + 1e-9
        assert paths.best(cost + slack).cost <= cost + slack
