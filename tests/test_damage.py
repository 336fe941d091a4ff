"""Damage as a sum over edges: what single reductions say, and what scores correct."""

import random

import numpy as np
import pytest
from scipy.stats import kendalltau

from poolshare.search.untrained.damage import LAYERS, DamageModel, single_reductions, steps
from poolshare.space import Architecture, SearchSpace

SPACE = SearchSpace(depth=8, levels=(100, 90, 81, 70, 60, 49, 36), operators=("kmeans", "max2d"), max_run=1)


def reduction(operator, index, tokens):
    """What going to so many tokens before a layer does, in a made-up model: early and deep cuts do most."""
    return (1.0 if operator == "kmeans" else 1.5) * (9 - index) * (1 - tokens / 100) ** 2


def damage(architecture):
    return sum(
        reduction(layer.operator, index, layer.tokens) - 0.5 * reduction(layer.operator, index, before.tokens)
        for index, before, layer in steps(architecture)
    )


def singles(space, probes=99):
    return {single: damage(single) for single in single_reductions(space, probes)}


def test_single_reductions_are_the_dense_model_with_one_change():
    found = single_reductions(SPACE, probes=99)
    # layers × (levels below for kmeans, square ones for max2d)
    assert len(found) == len(set(found)) == LAYERS * (6 + 3)
    for single in found:
        assert single in SPACE
        ((index, before, layer),) = steps(single)
        assert before.tokens == 100
        assert {later.tokens for later in single.layers[index:]} == {layer.tokens}


def test_probes_hold_first_and_last_layer_and_the_largest_and_the_smallest_count_of_every_operator():
    found = {(layer.operator, index, layer.tokens) for s in single_reductions(SPACE, 2) for index, _, layer in steps(s)}
    assert found == {
        (o, i, t) for o, ts in {"kmeans": (90, 36), "max2d": (81, 36)}.items() for i in (1, 2, 4, 6, 7) for t in ts
    }


def test_the_typical_damage_of_an_operator_is_a_geometric_mean_and_the_least_comes_first():
    typical = DamageModel(SPACE, singles(SPACE)).typical()
    measured = [(i, t) for i in (1, 2, 4, 6, 7) for t in SPACE.levels[1:]]
    means = {o: np.exp(np.mean([np.log(reduction(o, i, t)) for i, t in measured])) for o in SPACE.operators}
    assert list(typical) == ["kmeans", "max2d"]
    assert typical["kmeans"] == pytest.approx(means["kmeans"])
    assert typical["max2d"] == pytest.approx(means["max2d"], rel=0.05)  # between its square levels it is interpolated


def test_sharing_is_measured_layer_by_layer_and_adds_up():
    space = SearchSpace(depth=4, levels=(16, 4), operators=("max2d",), max_run=3)
    measured = single_reductions(space)
    assert len(measured) == 3 * 2
    model = DamageModel(space, {s: 0.25 if any(layer.shared for layer in s.layers) else 1.0 for s in measured})
    assert model.total(Architecture.parse("16*3 4@max2d")) == pytest.approx(0.25 + 0.25 + 1.0)


def test_what_was_measured_is_given_back_and_more_tokens_never_harm_more():
    model = DamageModel(SPACE, singles(SPACE, 3))
    for single, measured in singles(SPACE, 3).items():
        assert model.total(single) == pytest.approx(measured)
    for operator, counts in {"kmeans": SPACE.levels, "max2d": (100, 81, 49, 36)}.items():
        for index in range(1, 8):
            found = [model.single(operator, index, tokens) for tokens in counts]
            assert found[0] == pytest.approx(0)
            assert found == sorted(found)
    between = singles(SPACE)
    assert [model.total(s) for s in between] == pytest.approx(list(between.values()), rel=0.1)


def test_noise_that_says_more_tokens_harm_more_is_levelled():
    noisy = singles(SPACE) | {Architecture.parse("100 90@kmeans " + " ".join(["90"] * 6)): 99.0}
    model = DamageModel(SPACE, noisy)
    assert model.single("kmeans", 1, 36) >= model.single("kmeans", 1, 60) >= model.single("kmeans", 1, 90)


def test_the_dense_model_is_undamaged_and_every_step_does_something():
    model = DamageModel(SPACE, dict.fromkeys(single_reductions(SPACE), -1.0))
    assert model.total(SPACE[0]) == 0
    assert model.total(SPACE.sample(random.Random(0))) > 0


def test_scores_correct_what_single_reductions_got_wrong():
    """Truth: one operator harms thrice as much once tokens are gone, and late layers twice as much."""

    def truth(architecture):
        total = 0.0
        for index, before, layer in steps(architecture):
            factor = (3 if layer.operator == "kmeans" and before.tokens < 100 else 1) * (2 if index >= 6 else 1)
            whole = reduction(layer.operator, index, layer.tokens)
            total += factor * (whole - 0.5 * reduction(layer.operator, index, before.tokens))
        return total

    rng = random.Random(0)
    drawn = list(dict.fromkeys(SPACE.sample(rng) for _ in range(160)))
    known, unseen = drawn[:60], drawn[60:]
    model = DamageModel(SPACE, singles(SPACE))
    wanted = [truth(architecture) for architecture in unseen]
    before = kendalltau([model.total(architecture) for architecture in unseen], wanted).statistic
    model.fit(known, [truth(a) for a in known], [0.01] * len(known))
    corrected = [model.total(architecture) for architecture in unseen]
    assert kendalltau(corrected, wanted).statistic > max(0.85, before)
    assert np.median(np.abs(np.array(corrected) / wanted - 1)) < 0.15


def test_draws_vary_around_the_mean_and_less_where_more_is_known():
    model = DamageModel(SPACE, singles(SPACE))
    rng = random.Random(0)
    drawn = list(dict.fromkeys(SPACE.sample(rng) for _ in range(100)))
    edge = next(steps(Architecture.parse("100 81@kmeans " + " ".join(["81"] * 6))))

    def spread(known):
        model.fit(known, [damage(a) for a in known], [0.01] * len(known))
        generator = np.random.default_rng(0)
        draws = [model.drawn(generator)(*edge) for _ in range(300)]
        assert np.mean(draws) == pytest.approx(model(*edge), rel=0.15)
        return np.std(draws) / model(*edge)

    few, many = spread(drawn[:5]), spread(drawn)
    assert 0 < many < few
