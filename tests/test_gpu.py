"""The same on a GPU as on a CPU: logits of every operator, exports, latency tables, and the main job. Skipped without one."""

import random

import pandas as pd
import pytest
import torch
from opened import open_data
from safetensors.torch import load_file

from poolshare.space import OPERATORS, SearchSpace
from poolshare.supernet import Subnet, SuperNet, measure_latency_table, measure_macs
from poolshare.supernet.training.loop import train_supernet
from poolshare.supernet.training.recipe import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = ("--data", "digits", "--model-args", "depth=4,embed_dim=16,num_heads=2", "--levels", "64,36,16,4")


def vit() -> SuperNet:
    """A small ViT with all operators, away from identities and zeros."""
    torch.manual_seed(0)
    options = {"img_size": 128, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "depth": 4}
    net = SuperNet.from_timm(
        "vit_tiny_patch16_224", SearchSpace(4, (64, 32, 16, 4), tuple(OPERATORS)), **options
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


def digits_net() -> SuperNet:
    torch.manual_seed(0)
    space = SearchSpace(3, (64, 16, 4), ("max2d_conv",))
    return SuperNet.from_timm("digits_vit", space, depth=3, embed_dim=32, num_heads=2)


@torch.no_grad()
def test_logits_are_the_cpus_and_exports_give_the_same():
    net = vit()
    drawn = [net.space.sample(random.Random(seed)) for seed in range(100)]
    used = [{layer.operator for layer in one.layers} for one in drawn]
    population = [drawn[next(at for at, names in enumerate(used) if name in names)] for name in OPERATORS]
    images = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    # In double precision no rounding can turn the choice of a token round.
    expected = net.double()(images.double(), population)
    net.to(GPU)
    found = net(images.double().to(GPU), population)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
    for architecture, logits in zip(population, found, strict=True):
        alone = Subnet.from_supernet(net, architecture).to(GPU)
        torch.testing.assert_close(alone(images.double().to(GPU)), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"amp": "bf16"}, {"within": 0.6}, {"ema": 0.9, "mixup": 0.8, "accumulate": 2}])
def test_a_supernet_learns_as_on_a_cpu(changes):
    data = open_data("digits", img_size=8, in_chans=1, mean=(0.5,), std=(0.5,))
    losses: dict[torch.device, list[float]] = {}
    for device in (CPU, GPU):
        net, seen = digits_net().to(device), list[float]()
        recipe = Recipe(epochs=6, batch_size=64, lr=1e-2, **changes)
        train_supernet(net, data, measure_macs(net), recipe, progress=lambda _, loss, seen=seen: seen.append(loss))
        losses[device] = seen
    assert len(losses[GPU]) == len(losses[CPU]) > 20
    tolerance = 0.02 if changes.get("amp") else 1e-3  # of the first steps, before roundings have grown
    assert losses[GPU][:5] == pytest.approx(losses[CPU][:5], rel=tolerance)
    assert sum(losses[GPU][-5:]) < 0.96 * sum(losses[GPU][:5])


def test_latency_is_measured_on_the_gpu():
    net = digits_net().to(GPU)
    latency = measure_latency_table(net, 64, rounds=5)
    assert latency.device == torch.cuda.get_device_name()
    assert torch.cuda.get_device_name() in latency.conditions
    assert all(timed > 0 and summed > 0 for _, timed, summed in latency.checked)


@pytest.mark.parametrize(("objective", "budget"), [("macs", "80%"), ("latency", "100%")])
def test_search_export_retrain_evaluate(objective, budget, tmp_path, verb):
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["search", *SMALL, "--device", "cuda", "--epochs", "2", "--amp", "bf16", "--budget", budget]
    status, _, err = verb(*words, "--objective", objective, "--out", run)
    assert status == 0, err
    candidates = pd.read_csv(run / "candidates.csv")
    assert len(candidates) > 20
    best = candidates.sort_values("top1").iloc[-1]["architecture"]
    for command in (
        ["export", run, "--architecture", best, "--out", out],
        ["retrain", out, "--device", "cuda", "--epochs", "2", "--out", tmp_path / "better"],
        ["evaluate", tmp_path / "better", "--device", "cuda"],
        ["finalists", run, "--count", "2", "--epochs", "1", "--device", "cuda"],
    ):
        status, _, err = verb(*command)
        assert status == 0, err
    kept = load_file(run / "supernet.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_a_run_made_on_the_gpu_is_continued_on_the_cpu(tmp_path, verb):
    words = ["search", *SMALL, "--epochs", "1", "--sampler", "random", "--out", tmp_path / "run"]
    assert verb(*words, "--trials", "10", "--device", "cuda")[0] == 0
    status, _, err = verb(*words, "--trials", "20", "--device", "cpu")
    assert status == 0, err
    assert len(pd.read_csv(tmp_path / "run" / "candidates.csv")) == 20
