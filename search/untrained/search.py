"""Search without training: what reductions do to a model as it is, in a handful of walks over the prefix tree.

The cost of an architecture is a sum over the edges of its path, and so, nearly, is the damage to a model that is not
trained for it. One walk measures single reductions; the least damaging path at every cost is then a shortest path,
computed exactly; what such paths score corrects the model of damage, until it proposes nothing new. Everything until
here sees few images. A race shows more of them to those that may still be the best, and all of them to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from poolshare.space import Architecture, Band, Layer, forecast

from ..scoring import ImageScores
from .cheapest import CheapestPaths, EdgeDamage
from .damage import DamageModel, single_reductions
from .racing import Race, ScoreImages

FIRST = 0.25  # of the images: what everything is scored on before the race
_SHARE = 0.7  # of an architecture's cost that a walk over many pays, as they share prefixes
FEWEST = 64  # images before the race, where there are so many
_BASES = 4  # architectures that are changed a little in each round, each at a cost of its own


@dataclass(frozen=True)
class Effort:
    """How much is scored. The defaults take about as long as scoring 100 architectures one by one."""

    rounds: int = 5  # of proposing and correcting, at most
    proposals: int = 24  # in each round
    finalists: int = 16  # scored on all images
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """The finalists, scored on all images, by rising cost, and what it took."""

    finalists: list[Architecture]
    race: Race
    rounds: int

    @property
    def passes(self) -> float:
        """The whole search's cost, in dense models scored on all images."""
        return self.race.spent / (self.race.costs.total(self.race.dense) * self.race.images)


def search_untrained(
    allowed: Band,
    score: ScoreImages,
    images: int,
    effort: Effort = Effort(),
    note: Callable[[str, float], None] = lambda text, ahead: None,
    known: dict[Architecture, ImageScores] | None = None,
) -> Found:
    """The least damaging architectures within `allowed`, down to half of its highest cost.

    score: losses of architectures on a range of the `images`, in a fixed order. note: told what happens, and about what all
    from there on costs. known: what an earlier call scored, whatever became of it; it is not scored again, and this call's
    losses are added to it.
    """
    space, costs = allowed.space, allowed.costs
    race = Race(space[0], costs, images, score, known if known is not None else {})
    first, ahead = first_images(images), _expected_steps(allowed, images, effort)
    singles = single_reductions(space)
    note(f"{len(singles)} single reductions on {first} of {images} images", sum(ahead))
    race.run(singles, first)
    model = DamageModel(space, {single: race.damage(single, first)[0] for single in singles})
    low = max(allowed.low, allowed.high // 2)
    candidates = {single: None for single in singles if low <= costs.total(single) <= allowed.high}
    measured = {space[0], *singles}
    seen = set(measured)  # in this call: what is known of an earlier one must not change what is proposed
    rng = np.random.default_rng(effort.seed)
    scored: dict[Architecture, float] = {}  # candidates with their damage on the first images
    rounds = 0
    while rounds < effort.rounds:
        proposals = _proposals(allowed, low, model, effort.proposals, rng, scored)
        candidates |= dict.fromkeys(proposals)
        new = [proposal for proposal in proposals if proposal not in seen]
        if not new:
            break
        seen.update(new)
        rounds += 1
        note(f"round {rounds}: {len(new)} new architectures on {first} images", sum(ahead[rounds:]))
        race.run(new, first)
        damages = {candidate: race.damage(candidate, first) for candidate in candidates if candidate not in measured}
        model.fit(list(damages), *zip(*damages.values(), strict=True))
        scored = {candidate: damage for candidate, (damage, _) in damages.items()}
    left, seen_by_all = list(candidates), first
    for step, stage in enumerate(_stages(first, images), start=1 + effort.rounds):
        left = race.survivors(left, effort.finalists * images // stage, seen_by_all)
        note(f"race: {len(left)} of {len(candidates)} architectures on {stage} of {images} images", sum(ahead[step:]))
        race.run(left, stage)
        seen_by_all = stage
    return Found(sorted(left, key=costs.total), race, rounds)


def expected_cost(allowed: Band, images: int) -> float:
    """About what `search_untrained` spends, in units of cost, known before it begins: rather more than less."""
    return sum(_expected_steps(allowed, images, Effort()))


def _expected_steps(allowed: Band, images: int, effort: Effort) -> list[float]:
    """What the single reductions, each round, and each stage of the race cost."""
    space, costs = allowed.space, allowed.costs
    first = first_images(images)
    singles = first * forecast([space[0], *single_reductions(space)], costs).cost
    each_round = first * effort.proposals * _SHARE * allowed.high
    race = [
        (stage - before) * (effort.finalists * images // stage * _SHARE * allowed.high + costs.total(space[0]))
        for before, stage in pairwise([first, *_stages(first, images)])
    ]
    return [singles, *[each_round] * effort.rounds, *race]


def gradual(allowed: Band) -> list[Architecture]:
    """For each operator schedules that lose about as many tokens at every layer, as costly as is allowed, and cheaper.

    Single reductions do not say what many small ones do, and operators differ most in that.
    """
    space, costs = allowed.space, allowed.costs
    found: dict[Architecture, None] = {}
    for operator in space.operators:
        schedules = []
        for end in space.levels[1:]:
            wanted = np.linspace(space.levels[0], end, space.depth)
            layers, node = [Layer(space.levels[0])], space.follow(None, (Layer(space.levels[0]),))
            for count in wanted[1:]:
                options = [x for x in space.edges[node] if x.operator in (operator, None) and not x.shared]
                layers.append(min(options, key=lambda x: abs(x.tokens - count)))
                node = space.follow(node, (layers[-1],))
            schedules.append(Architecture(tuple(layers)))
        for limit in (allowed.high, 0.8 * allowed.high):
            affordable = [schedule for schedule in schedules if schedule in allowed and costs.total(schedule) <= limit]
            if affordable:
                found[max(affordable, key=costs.total)] = None
    return list(found)


def first_images(images: int) -> int:
    """How many images everything is scored on before the race."""
    return min(images, max(FEWEST, round(FIRST * images)))


def _stages(first: int, images: int) -> list[int]:
    """How many images are seen from stage to stage: each time twice as many, in the end all."""
    stages = [min(2 * first, images)]
    while stages[-1] < images:
        stages.append(min(2 * stages[-1], images))
    return stages


def _proposals(
    allowed: Band,
    low: int,
    model: DamageModel,
    count: int,
    rng: np.random.Generator,
    scored: Mapping[Architecture, float],
) -> list[Architecture]:
    """A third of them the best paths at costs evenly spread, a third the best where the damage is as it may also be, a third
    small changes of the best so far.

    Every second of the middle third has the highest cost that is allowed: it is what the user asked for. scored: the
    candidates so far with their damage; none: gradual schedules take the place of changes.
    """
    costs, share = allowed.costs, max(1, count // 3)
    found = dict.fromkeys(_best(allowed, model, np.linspace(low, allowed.high, max(2, share)).tolist()))
    for index in range(share):
        limit = allowed.high if index % 2 else rng.uniform(low, allowed.high)
        found |= dict.fromkeys(_best(allowed, model.drawn(rng), [limit]))
    found |= dict.fromkeys(changed(allowed, low, model, share, scored) if scored else gradual(allowed))
    return [architecture for architecture in found if costs.total(architecture) >= low] or list(found)


def _best(allowed: Band, damage: EdgeDamage, limits: Sequence[float]) -> list[Architecture]:
    """The best path below each limit that any path keeps."""
    space, costs = allowed.space, allowed.costs
    paths, least = CheapestPaths(space, costs, damage), costs.total(space.cheapest(costs))
    return [paths.best(limit).architecture for limit in limits if limit >= least]


def changed(
    allowed: Band, low: int, model: DamageModel, count: int, scored: Mapping[Architecture, float]
) -> list[Architecture]:
    """Neighbours of the best so far at costs evenly spread, those that promise most.

    The model may be wrong about a whole path and right about one change of it.
    """
    space, costs = allowed.space, allowed.costs
    found: dict[Architecture, None] = {}
    for limit in np.linspace(low, allowed.high, _BASES + 1)[1:]:
        affordable = [architecture for architecture in scored if costs.total(architecture) <= limit]
        if affordable:
            base = min(affordable, key=lambda architecture: scored[architecture])
            around = [other for other in space.neighbours(base) if low <= costs.total(other) <= limit]
            new = [other for other in around if other not in scored and other not in found]
            found |= dict.fromkeys(sorted(new, key=model.total)[: max(1, count // _BASES)])
    return list(found)
