"""Training: the sandwich against its definition, resuming against an undisturbed run, and what stops it."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from poolshare.space import RunError, SearchSpace, TrainingError
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.checkpoint import load_tensors, save_tensors
from poolshare.supernet.data import open_data
from poolshare.supernet.train import Recipe, Sandwich, sandwich_loss, steps_per_epoch, train_model, train_supernet

SPACE = SearchSpace(depth=3, levels=(64, 16, 4))


def make_net(seed=0):
    torch.manual_seed(seed)
    return SuperNet.from_timm("digits_vit", SPACE, depth=3, embed_dim=16, num_heads=2, mlp_ratio=1.0)


@pytest.fixture(scope="module")
def digits():
    return open_data("digits", img_size=8, in_chans=1, mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def costs():
    return measure_macs(make_net())


def test_sandwich_loss_is_labels_for_the_largest_and_its_detached_logits_for_the_others():
    net = make_net()
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    architectures = [SPACE[0], *(SPACE.sample(random.Random(seed)) for seed in range(3))]
    sandwich_loss(net, images, labels, architectures).backward()
    together = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    net.zero_grad()
    teacher = net(images, architectures[:1])[0]
    F.cross_entropy(teacher, labels).backward()
    for student in architectures[1:]:
        logits = net(images, [student])[0]
        (-(teacher.detach().softmax(-1) * logits.log_softmax(-1)).sum(-1).mean() / 3).backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_sandwich_draws_are_keyed_by_seed_and_step_and_reach_every_band(costs):
    sandwich = Sandwich(SPACE, costs, seed=3)
    assert sandwich.at(7) == Sandwich(SPACE, costs, seed=3).at(7)
    assert [sandwich.at(step) for step in range(20)] != [Sandwich(SPACE, costs, seed=4).at(step) for step in range(20)]
    cheapest = min(SPACE, key=costs.total)
    for step in range(50):
        largest, smallest, *drawn = sandwich.at(step)
        assert (largest, costs.total(smallest)) == (SPACE[0], costs.total(cheapest))
        assert len(drawn) == 2
        assert all(architecture in SPACE for architecture in drawn)
    seen = {band for step in range(200) for a in sandwich.at(step)[2:] for band in sandwich.bands if a in band}
    assert seen == set(sandwich.bands)
    assert sum(band.size for band in sandwich.bands) == SPACE.size  # the bands part the space


def test_a_run_that_was_stopped_and_continued_ends_with_the_weights_of_an_undisturbed_one(digits, costs, tmp_path):
    recipe = Recipe(epochs=3, batch_size=128)
    undisturbed = make_net()
    train_supernet(undisturbed, digits, costs, recipe, seed=5)

    class Stopped(Exception):
        pass

    steps = steps_per_epoch(digits, recipe)
    state = tmp_path / "state.safetensors"
    for seed, stop_at in ((0, steps + 3), (99, 2 * steps + 1)):  # in the second epoch, and again in the third

        def stop(step, loss, stop_at=stop_at):
            if step == stop_at:
                raise Stopped

        with pytest.raises(Stopped):
            train_supernet(make_net(seed), digits, costs, recipe, seed=5, state=state, progress=stop)
    continued = make_net(99)  # its weights come from the state
    train_supernet(continued, digits, costs, recipe, seed=5, state=state)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name


def test_training_learns(digits):
    torch.manual_seed(0)
    net = SuperNet.from_timm("digits_vit", SPACE, depth=3)
    train_supernet(net, digits, measure_macs(net), Recipe(epochs=10, batch_size=32, lr=5e-3))
    [(images, labels)] = digits.eval_loader("search", 1000)
    with torch.inference_mode():
        logits = net(images, [SPACE[0], SPACE[SPACE.size - 1]])
    assert ((logits.argmax(-1) == labels).float().mean(dim=1) > 0.5).all()  # chance is 0.1


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_epoch(digits, tmp_path):
    model = make_net()
    recipe, state = Recipe(epochs=3, batch_size=256), tmp_path / "state.safetensors"
    steps = steps_per_epoch(digits, recipe, full=True)

    def poison(step, loss):
        if step == steps + 1:
            with torch.no_grad():
                model.head.bias[0] = math.nan

    with pytest.raises(TrainingError, match=rf"the loss is nan at step {steps + 2} of {3 * steps} \(epoch 2\).*--lr"):
        train_model(model, digits, recipe, state=state, progress=poison)
    tensors, facts = load_tensors(state)
    assert facts["epochs"] == 1
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_state_begun_with_other_settings_is_refused(digits, tmp_path):
    state, recipe = tmp_path / "state.safetensors", Recipe(epochs=1, batch_size=512)
    train_model(make_net(), digits, recipe, state=state, settings={"seed": 0})
    with pytest.raises(RunError, match=r"\{'seed': 0\} there, \{'seed': 1\} now"):
        train_model(make_net(), digits, recipe, state=state, settings={"seed": 1})


def test_a_damaged_or_foreign_state_is_refused(digits, tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"epochs": 1})
    content = path.read_bytes()
    for damaged in (content[:-2], content[:20], b"", b"\x00" * 64, b"not ours"):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"state\.safetensors"):
            load_tensors(path)
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left
