"""The least damaging path at every cost, against all paths of small spaces."""

import random
from itertools import pairwise

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
def test_the_frontier_is_that_of_all_paths(space):
    costs, damage = made_up(space)
    paths = CheapestPaths(space, costs, damage).frontier()
    expected = brute_force(space, costs, damage)
    assert [path.cost for path in paths] == [cost for cost, _ in expected]
    assert [path.damage for path in paths] == pytest.approx([total for _, total in expected])
    for path in paths:
        assert path.architecture in space
        assert costs.total(path.architecture) == path.cost


def test_a_limit_keeps_the_frontier_below_it():
    costs, damage = made_up(SPACES[0])
    paths = CheapestPaths(SPACES[0], costs, damage)
    high = paths.frontier()[3].cost
    assert paths.frontier(high) == paths.frontier()[3:]
    with pytest.raises(BudgetError, match="no architecture costs 3 or less; the cheapest costs"):
        paths.frontier(3)


def test_coarse_units_lose_less_than_they_round():
    space = SPACES[0]
    costs, damage = made_up(space, scale=1_000_000)
    paths = CheapestPaths(space, costs, damage, units=500)
    assert paths.unit > 1
    slack = (space.depth + 1) * paths.unit
    found = paths.frontier()
    for before, after in pairwise(found):
        assert before.cost > after.cost
        assert before.damage < after.damage
    for cost, total in brute_force(space, costs, damage):  # something no worse costs hardly more
        assert any(path.cost <= cost + slack and path.damage <= total + 1e-9 for path in found)
