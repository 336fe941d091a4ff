"""Latency tables: sums against the whole, on made-up timings with a known truth and on models that are really timed."""

import json
import platform
import random

import numpy as np
import pytest
import torch

from poolshare.space import Architecture, ModelError, SearchSpace
from poolshare.supernet import Latency, SuperNet, latency, measure_latency_table
from poolshare.supernet.latency import (
    counts,
    cpu_name,
    design,
    device_name,
    fit,
    kinds_of,
    measure_shares,
    time_models,
    typical,
)
from poolshare.supernet.measure import Parts, table_of

SPACES = [
    SearchSpace(5, (16, 9, 4), ("max2d",), 3),
    SearchSpace(4, (16, 9, 4), ("tome", "max2d"), 2),
    SearchSpace(4, (16, 6), ("topk",), 1),
    SearchSpace(3, (16,), (), 2),
]


def by_hand(architecture: Architecture, costs: dict) -> int:
    """Nanoseconds of the exported model, block by block; who writes a map for followers takes longer."""
    layers = architecture.layers
    total = costs["source",] + costs["sink", layers[-1].tokens]
    for before, layer in zip((layers[0], *layers), layers, strict=False):
        first = "first_shared" if layer.shared and not before.shared else "shared" if layer.shared else "own"
        total += costs.get((first, layer.tokens), costs["shared" if layer.shared else "own", layer.tokens])
        if layer.operator:
            total += costs["pool", layer.operator, before.tokens, layer.tokens]
    return total


def made_up(space: SearchSpace, seed: int, sharing="qk") -> dict:
    rng = random.Random(seed)
    return {kind: rng.randint(5_000, 9_000) for kind in kinds_of(space, sharing)}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sharing", ["qk", "map"])
def test_a_table_sums_to_the_exported_model_on_every_path(space, seed, sharing):
    costs = made_up(space, seed, sharing)
    table = table_of("latency", costs)
    whole = {architecture: by_hand(architecture, costs) for architecture in space}
    assert {architecture: table.total(architecture) for architecture in space} == whole
    assert bool(table.first_shared) == (sharing == "map" and space.max_run > 1)
    kinds = kinds_of(space, sharing)
    values = np.array([costs[kind] for kind in kinds])
    assert all(counts(architecture, kinds) @ values == total for architecture, total in whole.items())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sharing", ["qk", "map"])
def test_timings_without_noise_give_back_every_sum_though_the_parts_alone_were_wrong(space, sharing):
    costs, kinds, rng = made_up(space, 7, sharing), kinds_of(space, sharing), random.Random(3)
    truth = np.array([costs[kind] for kind in kinds])
    chosen = design(space, kinds, 3 * len(kinds), rng)
    timed = np.array([counts(architecture, kinds) @ truth for architecture in chosen])
    alone = truth * np.array([rng.choice((0.4, 1.1, 1.6)) for _ in kinds])
    table = fit(kinds, alone, chosen, timed)
    for architecture in space:
        assert table.total(architecture) == pytest.approx(by_hand(architecture, costs), rel=0.01)


def test_the_design_tells_apart_all_that_sums_can_tell_apart():
    for space in SPACES:
        kinds = kinds_of(space)
        rows = [counts(architecture, kinds) for architecture in space]
        chosen = [counts(architecture, kinds) for architecture in design(space, kinds, len(kinds), random.Random(0))]
        assert np.linalg.matrix_rank(chosen) == np.linalg.matrix_rank(rows)


def test_a_slow_round_and_a_slow_moment_do_not_count():
    truth = np.array([3.0, 5.0, 11.0, 2.0, 7.0])
    times = np.outer([1, 1, 2.5, 1.2, 1, 0.8, 1], truth)
    times[3, 1] *= 9
    times[5, 4] *= 4
    assert typical(times) == pytest.approx(truth)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    space = SearchSpace(3, (16, 9), ("max2d", "topk"), 2)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    return SuperNet.from_timm("vit_tiny_patch16_224", space, **options)


def test_a_measured_table_holds_every_architecture_and_comes_back_from_json(net):
    calls = []
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = measure_latency_table(net.train(), 2, rounds=1, check=2, progress=lambda *step: calls.append(step))
    assert found.table.quantity == "latency"
    assert (found.batch_size, found.threads) == (2, torch.get_num_threads())
    assert all(found.table.total(architecture) > 0 for architecture in net.space)
    assert [found.table.total(Architecture.parse(text)) for text, _, _ in found.checked] == [
        summed for _, _, summed in found.checked
    ]
    assert len(found.errors) == 2
    assert found.conditions.startswith("batch 2 in fp32 on ")
    assert calls[-1][0] == calls[-1][1] == len(calls)
    again = Latency.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert net.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_models_are_timed_with_the_supernets_own_tensors(net, monkeypatch):
    timed = []
    monkeypatch.setattr(latency, "interleaved", lambda work, *rest: timed.extend(work) or np.ones((1, len(work))))
    architectures = [net.space[0], net.space[5]]
    time_models(net, architectures, 1, 1, random.Random(0))
    for (model, (images,)), architecture in zip(timed, architectures, strict=True):
        with torch.inference_mode():
            expected = net.eval()(images, [architecture])[0]
            assert torch.allclose(model(images), expected, atol=1e-5)
        for name, tensor in model.state_dict().items():
            if name in net.state_dict():
                assert tensor.data_ptr() == net.state_dict()[name].data_ptr()


def test_the_parts_that_are_timed_alone_are_all_kinds(net):
    part = Parts(net)
    assert all(part(kind)[0].parameter_total >= 0 for kind in kinds_of(net.space))


@pytest.mark.parametrize("sharing", ["qk", "map"])
def test_models_are_timed_in_the_precision_asked_for(net, monkeypatch, sharing):
    seen = []

    def made_up(work, rounds, *rest):
        for model, inputs in work:
            seen.extend(value.dtype for value in (*inputs, *model.parameters()))
        return np.ones((2, len(work)))

    monkeypatch.setattr(latency, "interleaved", made_up)
    monkeypatch.setattr(net, "sharing", sharing)
    found = measure_latency_table(net, 2, dtype="bf16", check=1)
    measure_shares(net, [net.space[1]], 2, random.Random(0), dtype="bf16")
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == "bf16"
    assert next(net.parameters()).dtype == torch.float32
    with pytest.raises(ModelError, match="latency in 'int8' cannot be measured; there are fp32, bf16, fp16"):
        measure_latency_table(net, dtype="int8")


def test_no_images_are_refused(net):
    with pytest.raises(ModelError, match="batch size 0 is not possible"):
        measure_latency_table(net, 0)


def test_a_table_of_another_processor_is_told_by_its_name():
    one, other = (f"processor\t: 0\nmodel name\t: {name}\n" * 2 for name in ("EPYC 7B13", "EPYC 9B14"))
    assert (cpu_name(one), cpu_name(other)) == ("EPYC 7B13", "EPYC 9B14")
    assert cpu_name("processor\t: 0\n") in (platform.processor(), platform.machine())
    assert device_name(torch.device("cpu")).removeprefix("cpu ")
