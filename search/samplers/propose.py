"""Samplers: our own are plain functions; Optuna's see architectures through a total encoding."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

from poolshare.space import Architecture, Band, CostTable, Layer, SearchSpace
from poolshare.space.band import even_borders

from .surrogate import Surrogate, expected_gain

_BANDS, _ELITE = 10, 3  # of cost, and the best of each, which have offspring
_TRIES = 50  # for a proposal that is new and within the budget, before drawing one
_WHOLE = 5000  # architectures within the budget that the model looks at one and all
_OFFSPRING = 40  # that it looks at for each proposal in a larger space
_KNOWN = 1000  # scored architectures that the model is fitted to
_TURNS = 4  # one of so many proposals is the best of a cost band of its own
_BAND = 1.25  # width of a proposal's own cost band, as a factor


@dataclass(frozen=True)
class Scored:
    """An architecture with its score on search-validation (at most 100) and its cost."""

    architecture: Architecture
    score: float
    cost: int


Proposer = Callable[[Band, CostTable, Sequence[Scored], str, int], list[Architecture]]


def random_draws(allowed: Band, costs: CostTable, scored: Sequence[Scored], key: str, count: int) -> list[Architecture]:
    """`count` uniform draws from the allowed architectures, new ones as long as there are any left."""
    seen = {candidate.architecture for candidate in scored}
    return _fill([], seen, allowed, key, count)


def evolution(allowed: Band, costs: CostTable, scored: Sequence[Scored], key: str, count: int) -> list[Architecture]:
    """The offspring that a model of accuracy expects to improve the frontier most.

    allowed: the budget. scored: everything scored so far. key: what the randomness is keyed by; equal keys and
    equal records give equal proposals. The first generation is drawn below limits that grow by equal factors, with
    the cheapest architecture and, where the budget allows, the dense one.

    Each later proposal is the offspring whose expected gain of hypervolume is highest, once those before it are taken to
    score as expected; every fourth the one of highest expected gain over the frontier inside a cost band of its own, so
    that the whole frontier is worked on and not only where it is widest. Offspring come from the best architectures of
    every cost band; a space of few architectures is looked at whole.
    """
    seen = {candidate.architecture for candidate in scored}
    inside = [candidate for candidate in scored if candidate.cost <= allowed.high]
    if len(inside) < _BANDS:
        proposals = _founders(allowed, costs, seen, key, count)
        return _fill(proposals, seen, allowed, key, count)
    pool = _pool(allowed, _elites(allowed, inside), seen, random.Random(f"{key} pool"), count)
    proposals = _most_promising(allowed, costs, inside, pool, key, count) if pool else []
    return proposals if allowed.size <= _WHOLE else _fill(proposals, seen, allowed, key, count)


def _founders(allowed: Band, costs: CostTable, seen: set[Architecture], key: str, count: int) -> list[Architecture]:
    children: dict[Architecture, None] = {}
    founders = (allowed.space.cheapest(costs), allowed.space[0])
    for index in range(count):
        rng = random.Random(f"{key} {index}")
        child = founders[index] if index < 2 and founders[index] in allowed else None
        limit = max(allowed.low, _between(allowed, (index % _BANDS + 1) / _BANDS))
        child = child or allowed.space.within(costs, None, limit).sample(rng)
        if child in allowed and child not in seen:
            children[child] = None
    return list(children)


def _between(allowed: Band, share: float) -> int:
    """A cost in the band, `share` of the way up by equal factors."""
    low = max(1, allowed.low)
    return round(low * (max(low, allowed.high) / low) ** share)


def _pool(
    allowed: Band, parents: list[list[Scored]], seen: set[Architecture], rng: random.Random, count: int
) -> list[Architecture]:
    """What the model may choose from: all that is new in a small space, else offspring and some uniform draws."""
    if allowed.size <= _WHOLE:
        return [architecture for architecture in allowed if architecture not in seen]
    pool: dict[Architecture, None] = {}
    for index in range(_OFFSPRING * count):
        child = _offspring(allowed, parents, seen, rng) if index % 4 else allowed.sample(rng)
        if child is not None and child not in seen:
            pool[child] = None
    return list(pool)


def _most_promising(
    allowed: Band, costs: CostTable, inside: Sequence[Scored], pool: list[Architecture], key: str, count: int
) -> list[Architecture]:
    steps: list[Scored] = []  # the frontier, by rising cost and accuracy
    for candidate in sorted(inside, key=lambda c: (c.cost, -c.score)):
        if not steps or candidate.score > steps[-1].score:
            steps.append(candidate)
    known = _nearest(inside, steps)
    model = Surrogate(allowed.space, [c.architecture for c in known], [c.score for c in known], pool)
    cost = np.array([costs.total(architecture) for architecture in pool])
    heights = np.array([step.score for step in steps])  # (steps,)
    edges = np.array([step.cost for step in steps] + [allowed.high])
    # How much of each step's width a candidate of this cost lies before: (pool, steps)
    widths = np.maximum(edges[1:] - np.maximum(edges[:-1], cost[:, None]), 0)
    below = heights[np.maximum(np.searchsorted(edges[:-1], cost, side="right") - 1, 0)]  # (pool,)
    free = np.ones(len(pool), bool)
    proposals: list[Architecture] = []
    for index in range(min(count, len(pool))):
        band, spread = np.flatnonzero(free), model.spread
        if index % _TURNS == _TURNS - 1:
            limit = _between(allowed, random.Random(f"{key} {index}").random())
            near = np.flatnonzero(free & (cost <= limit) & (cost >= limit / _BAND))
            band = near if len(near) else band
            gains = expected_gain(model.mean[band], spread[band], below[band])
        else:
            gains = expected_gain(model.mean[band, None], spread[band, None], heights)
            gains = (gains * widths[band]).sum(axis=1)
        # Rounded, so that another machine's last bits seldom change who is first; of equals the first.
        best = int(band[int(np.argmax([float(f"{gain:.9g}") for gain in gains]))])
        free[best] = False
        model.expect(best)
        proposals.append(pool[best])
    return proposals


def _nearest(inside: Sequence[Scored], steps: Sequence[Scored]) -> list[Scored]:
    """The `_KNOWN` candidates that lack least to the frontier at their cost."""
    if len(inside) <= _KNOWN:
        return list(inside)
    edges, heights = [step.cost for step in steps], [step.score for step in steps]
    lack = [heights[bisect_right(edges, candidate.cost) - 1] - candidate.score for candidate in inside]
    order = sorted(range(len(inside)), key=lambda position: (lack[position], position))
    return [inside[position] for position in sorted(order[:_KNOWN])]


def _elites(allowed: Band, scored: Sequence[Scored]) -> list[list[Scored]]:
    """The best of each cost band, cheapest band first; empty bands are left out."""
    borders = even_borders(allowed.low, allowed.high, _BANDS)
    members: dict[int, list[Scored]] = {}
    for candidate in sorted(scored, key=lambda c: (-c.score, c.cost, str(c.architecture))):
        members.setdefault(bisect_right(borders, candidate.cost), []).append(candidate)
    return [members[band][:_ELITE] for band in sorted(members)]


def _offspring(
    allowed: Band, pool: list[list[Scored]], seen: set[Architecture], rng: random.Random
) -> Architecture | None:
    for _ in range(_TRIES):
        band = rng.randrange(len(pool))
        parent = rng.choice(pool[band]).architecture
        if rng.random() < 0.5:
            mate = rng.choice(pool[min(max(band + rng.randint(-1, 1), 0), len(pool) - 1)]).architecture
            child = allowed.space.crossover(parent, mate, rng)
        else:
            child = allowed.space.mutate(parent, rng)
        if child not in seen and child in allowed:
            return child
    return None


def _fill(
    proposals: list[Architecture], seen: set[Architecture], allowed: Band, key: str, count: int
) -> list[Architecture]:
    """Add uniform draws up to `count`, new ones where a bounded number of tries finds them."""
    proposals, seen = list(proposals), set(seen) | set(proposals)
    for index in range(count - len(proposals)):
        rng = random.Random(f"{key} draw {index}")
        draws = (allowed.sample(rng) for _ in range(_TRIES))
        draw = next((draw for draw in draws if draw not in seen), None)
        if draw is not None:
            proposals.append(draw)
            seen.add(draw)
    return proposals


# The total encoding: flat, static parameters of which every combination is exactly one architecture.


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """One level, one share bit and (with several operators) one operator for every layer but the first."""
    parameters: dict[str, BaseDistribution] = {}
    for index in range(1, space.depth):
        if len(space.levels) > 1:
            parameters[f"level_{index}"] = IntDistribution(0, len(space.levels) - 1)
        if space.max_run > 1:
            parameters[f"share_{index}"] = IntDistribution(0, 1)
        if len(space.operators) > 1:
            parameters[f"operator_{index}"] = CategoricalDistribution(space.operators)
    return parameters


def decode(params: dict[str, Any], space: SearchSpace) -> Architecture:
    """Any combination of parameters → one architecture of the space.

    The level is the lower of its own and the previous layer's; the share bit counts where sharing is legal; the
    operator counts where tokens are dropped, and where it cannot make that drop the next of the space's operators
    that can does; where none can, the tokens stay.
    """
    layers: list[Layer] = [Layer(space.levels[0])]
    node = space.follow(None, (layers[0],))
    for index in range(1, space.depth):
        options = space.edges[node]
        tokens = min(space.levels[params.get(f"level_{index}", 0)], layers[-1].tokens)
        layer = Layer(layers[-1].tokens)
        if tokens < layers[-1].tokens:
            first = space.operators.index(params.get(f"operator_{index}", space.operators[0]))
            wanted = [Layer(tokens, name) for name in space.operators[first:] + space.operators[:first]]
            layer = next((candidate for candidate in wanted if candidate in options), layer)
        elif params.get(f"share_{index}", 0) and Layer(tokens, None, True) in options:
            layer = Layer(tokens, None, True)
        layers.append(layer)
        node = space.follow(node, (layer,))
    return Architecture(tuple(layers))


def encode(architecture: Architecture, space: SearchSpace) -> dict[str, Any]:
    """The plainest parameters that decode to this architecture."""
    params: dict[str, Any] = {}
    for index, layer in enumerate(architecture.layers[1:], start=1):
        params[f"level_{index}"] = space.levels.index(layer.tokens)
        params[f"share_{index}"] = int(layer.shared)
        params[f"operator_{index}"] = layer.operator or (space.operators[0] if space.operators else None)
    return {name: params[name] for name in distributions(space)}


PROPOSERS: dict[str, Proposer] = {"evolution": evolution, "random": random_draws}


def optuna_sampler(name: str, seed: int) -> BaseSampler:
    """Optuna's NSGA-II (population 50) or multivariate TPE."""
    if name == "nsga2":
        return NSGAIISampler(seed=seed)
    return TPESampler(multivariate=True, constant_liar=True, seed=seed)
