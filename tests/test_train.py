"""Training: the sandwich against its definition, resuming against an undisturbed run, and what stops it."""

import contextlib
import math
import os
import random
import shutil
import signal

import pytest
import timm
import torch
import torch.nn.functional as F
from opened import open_data

from poolshare.space import BudgetError, RunError, SearchSpace, TrainingError
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.training import curve
from poolshare.supernet.training.checkpoint import load_tensors, save_tensors, state_before
from poolshare.supernet.training.loop import steps_per_epoch, train_model, train_supernet
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.training.sandwich import Sandwich, sandwich_loss

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


def test_a_step_within_a_limit_trains_six_that_keep_it_on_labels_alone(digits, costs):
    limit = 0.5 * costs.total(SPACE[0])
    sandwich = Sandwich(SPACE, costs, seed=3, within=0.5)
    steps = [sandwich.at(step) for step in range(100)]
    assert all(len(each) == 6 and costs.total(one) <= limit for each in steps for one in each)
    assert steps[:9] == [Sandwich(SPACE, costs, seed=3, within=0.5).at(step) for step in range(9)]
    assert sum(band.size for band in sandwich.bands) == SPACE.within(costs, None, int(limit)).size
    assert {band for each in steps for one in each for band in sandwich.bands if one in band} == set(sandwich.bands)

    net = make_net()
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    one_by_one = [F.cross_entropy(net(images, [one])[0], labels, label_smoothing=0.1) for one in steps[7]]
    expected = 2 * sum(one_by_one) / 6
    torch.testing.assert_close(sandwich.loss(net, images, labels, 7, 0.1), expected)
    train_supernet(net, digits, costs, Recipe(epochs=1, batch_size=256, within=1), seed=3)
    assert sum(band.size for band in Sandwich(SPACE, costs, seed=3, within=1).bands) == SPACE.size
    with pytest.raises(BudgetError, match="this space reaches from"):
        Sandwich(SPACE, costs, seed=3, within=0.01)


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
    continued, seen = make_net(99), []  # its weights come from the state
    train_supernet(continued, digits, costs, recipe, seed=5, state=state, progress=lambda *at: seen.append(at))
    assert seen[0] == (2 * steps, None)  # where it begins; its first loss is still to come
    assert [step for step, _ in seen[1:]] == list(range(2 * steps + 1, 3 * steps + 1))
    assert all(math.isfinite(loss) for _, loss in seen[1:])
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "recipe", "above"),
    [
        ({"embed_dim": 32, "num_heads": 2}, {"epochs": 5, "batch_size": 64, "lr": 1e-2}, 0.3),
        pytest.param({}, {"epochs": 10, "batch_size": 32, "lr": 5e-3}, 0.5, marks=pytest.mark.slow),
    ],
    ids=["small", "main"],
)
def test_training_learns(options, recipe, above, digits):
    torch.manual_seed(0)
    net = SuperNet.from_timm("digits_vit", SPACE, depth=3, **options)
    train_supernet(net, digits, measure_macs(net), Recipe(**recipe))
    [(images, labels)] = digits.eval_loader("search", 1000)
    with torch.inference_mode():
        logits = net(images, [SPACE[0], SPACE[SPACE.size - 1]])
    assert ((logits.argmax(-1) == labels).float().mean(dim=1) > above).all()  # chance is 0.1


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_state(digits, tmp_path):
    model = make_net()
    recipe, state = Recipe(epochs=3, batch_size=256), tmp_path / "state.safetensors"
    steps = steps_per_epoch(digits.full, recipe)

    def poison(step, loss):
        if step == steps + 1:
            with torch.no_grad():
                model.head.bias[0] = math.nan

    with pytest.raises(TrainingError, match=rf"the loss is nan at step {steps + 2} of {3 * steps} \(epoch 2\).*--lr"):
        train_model(model, digits.full, recipe, state=state, progress=poison)
    tensors, facts = load_tensors(state)
    assert (facts["epochs"], facts["step"]) == (1, steps)
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_state_begun_with_other_settings_is_refused(digits, tmp_path):
    state, recipe = tmp_path / "state.safetensors", Recipe(epochs=1, batch_size=512)
    train_model(make_net(), digits.full, recipe, state=state, settings={"data": "a"})
    with pytest.raises(RunError, match=r"\(data: 'a' there, 'b' now\)"):
        train_model(make_net(), digits.full, recipe, state=state, settings={"data": "b"})
    other = recipe.model_copy(update={"lr": 0.1, "mixup": 0.2})
    with pytest.raises(
        RunError, match=r"\(lr: 0.002 there, 0.1 now; mixup: 0.0 there, 0.2 now; seed: 0 there, 1 now\)"
    ):
        train_model(make_net(), digits.full, other, seed=1, state=state, settings={"data": "a"})


class Stopped(Exception):
    pass


def stop_at(*steps):
    def progress(step, loss):
        if step in steps:
            raise Stopped

    return progress


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "accumulate": 3, "drop_path": 0.5},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"ema": 0.9},
                {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
                {"accumulate": 3},
                {"drop_path": 0.5},
                {"amp": "bf16"},
            )
        ),
    ],
)
def test_training_stopped_in_the_middle_of_epochs_ends_bit_for_bit_like_one_that_was_not(changes, digits, tmp_path):
    recipe = Recipe(epochs=2, batch_size=128, **changes)
    undisturbed = make_net()
    train_model(undisturbed, digits.full, recipe, seed=5)
    assert not torch.equal(undisturbed.head.weight, make_net().head.weight)
    state = tmp_path / "state.safetensors"
    steps = steps_per_epoch(digits.full, recipe)
    seconds = [0.0]  # of training, those before an interruption too
    for seed, at in ((0, 3), (99, steps - 1), (98, steps + 2)):
        with pytest.raises(Stopped):
            train_model(make_net(seed), digits.full, recipe, seed=5, state=state, save_seconds=0, progress=stop_at(at))
        facts = load_tensors(state)[1]
        assert facts["step"] == at
        seconds.append(facts["seconds"])
    assert seconds == sorted(set(seconds))
    continued = make_net(97)  # its weights come from the state
    train_model(continued, digits.full, recipe, seed=5, state=state)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name


def test_bf16_trains_another_model_and_workers_train_the_same(digits):
    trained = []
    for amp, workers in (("none", 0), ("none", 2), ("bf16", 0), ("bf16", 2)):
        trained.append(make_net())
        recipe = Recipe(epochs=1, batch_size=256, amp=amp, mixup=0.2)
        train_model(trained[-1], digits.full, recipe, seed=5, workers=workers)
    plain, plain_read_by_workers, short, short_read_by_workers = (model.state_dict() for model in trained)
    for name, value in plain.items():
        assert torch.equal(value, plain_read_by_workers[name]), name
        assert torch.equal(short[name], short_read_by_workers[name]), name
        assert short[name].dtype == value.dtype  # the weights stay in float32
    assert not torch.equal(plain["head.weight"], short["head.weight"])


@pytest.mark.parametrize(("amp", "fused"), [("none", True), ("bf16", False)])
def test_training_in_bf16_on_a_cpu_attends_without_the_fused_kernel_and_leaves_the_model_as_it_was(
    amp, fused, digits, monkeypatch
):
    kernel, seen = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(1) or kernel(*a, **k))
    model = timm.create_model("digits_vit", depth=2)
    assert all(block.attn.fused_attn for block in model.blocks)

    def stop(step, loss):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train_model(model, digits.full, Recipe(epochs=1, batch_size=64, amp=amp), progress=stop)
    assert bool(seen) == fused
    assert all(block.attn.fused_attn for block in model.blocks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_obeyed_after_the_step_it_came_in_is_saved(number, digits, tmp_path):
    recipe, state, said, seen = Recipe(epochs=2, batch_size=256), tmp_path / "state.safetensors", [], []

    def handler(number, frame):
        raise Stopped(number)

    def progress(step, loss):
        seen.append(step)
        if step == 2:
            signal.raise_signal(number)

    before = signal.signal(number, handler)
    try:
        with pytest.raises(Stopped, match=str(int(number))):
            train_model(make_net(), digits.full, recipe, state=state, progress=progress, say=said.append)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert seen == [1, 2, 3]
    assert load_tensors(state)[1]["step"] == 3
    assert said == ["stopping after step 3 of 8, which is saved"]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_a_damaged_state_is_replaced_by_the_one_before_it(digits, tmp_path):
    recipe, state, said = Recipe(epochs=1, batch_size=128), tmp_path / "state.safetensors", []
    before = state_before(state)
    undisturbed = make_net()
    train_model(undisturbed, digits.full, recipe)
    with pytest.raises(Stopped):
        train_model(make_net(), digits.full, recipe, state=state, save_seconds=0, progress=stop_at(5))
    assert [load_tensors(path)[1]["step"] for path in (before, state)] == [4, 5]

    for position in (9, 300, -5):  # in the header, in the facts or names, in a tensor
        shutil.copy(state, tmp_path / "kept")
        flip(state, position)
        with pytest.raises(Stopped):
            train_model(
                make_net(9), digits.full, recipe, state=state, save_seconds=0, progress=stop_at(4), say=said.append
            )
        assert said == [f"{state} is damaged; training goes on from the state before it"]
        assert load_tensors(state)[1]["step"] == 4
        said.clear()
        os.replace(tmp_path / "kept", before)
        os.replace(state, tmp_path / "four")
        os.replace(before, state)
        os.replace(tmp_path / "four", before)

    state.unlink()  # as when the power fails between the two moves of a save
    continued = make_net(9)
    train_model(continued, digits.full, recipe, state=state, say=said.append)
    assert said == []
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name

    for path in (state, before):
        save_tensors(path, {"a": torch.ones(3)}, {"epochs": 1})
        flip(path, -1)
    with pytest.raises(RunError, match="state"):
        train_model(make_net(), digits.full, recipe, state=state)


def test_a_damaged_or_foreign_file_is_refused_and_shapes_are_looked_at_first(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(
        path, {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.tensor(1)}, {"x": 1}
    )
    tensors, facts = load_tensors(path, {"a": (3,), "b": (2, 2), "c": (), "not there": (7,)})
    assert facts == {"x": 1}
    assert torch.equal(tensors["a"], torch.ones(3))
    with pytest.raises(RunError, match=r"a is \(3,\), not \(4,\); b has no place"):
        load_tensors(path, {"a": (4,), "c": ()})
    content = path.read_bytes()
    for damaged in (content[:-2], content[:20], b"", b"\x00" * 64, b"not ours"):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"state\.safetensors"):
            load_tensors(path)
    unnoticed = 0
    for position in range(8, len(content)):  # the first eight bytes are the header's length
        path.write_bytes(content)
        flip(path, position)
        try:
            found, facts = load_tensors(path)
        except RunError:
            continue
        # Only a letter of the checksum's name, or a space after the header, may go unnoticed: nothing has changed.
        assert facts == {"x": 1}
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
        unnoticed += 1
    assert unnoticed < 40
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_a_training_keeps_its_curve_and_a_resumed_one_has_the_same(digits, costs, tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "ROWS", 5)
    recipe, told = Recipe(epochs=2, batch_size=100, lr=1e-3), []
    steps = steps_per_epoch(digits, recipe)
    taken: list[float] = []

    class Stop(Exception):
        pass

    def train(state, stop_at=None):
        def progress(step, loss):
            if loss is not None:
                taken.append(loss)
            if step == stop_at:
                raise Stop

        with contextlib.suppress(Stop):
            train_supernet(
                make_net(), digits, costs, recipe, state=state, progress=progress, watch=told.append, save_seconds=0
            )
        return curve.read_curve(state.with_suffix(".csv"))

    whole = train(tmp_path / "whole.safetensors")
    every = math.ceil(2 * steps / 5)
    assert [row.step for row in whole] == [*range(every, 2 * steps + 1, every)]
    assert [row.loss for row in whole] == pytest.approx(
        [sum(taken[row.step - every : row.step]) / every for row in whole], rel=1e-5
    )
    assert [row.epoch for row in whole] == pytest.approx([row.step / steps for row in whole], rel=1e-5)
    assert [row._replace(images_per_second=0) for row in told] == [
        pytest.approx(row._replace(images_per_second=0), rel=1e-5) for row in whole
    ]
    assert all(row.gradient_norm > 0 and row.images_per_second > 0 and 0 < row.lr <= 1e-3 for row in whole)
    train(tmp_path / "state.safetensors", stop_at=every + 1)
    resumed = train(tmp_path / "state.safetensors")
    for one, other in zip(resumed[:1] + resumed[2:], whole[:1] + whole[2:], strict=True):  # a stop begins a mean anew
        assert one._replace(images_per_second=0) == other._replace(images_per_second=0)
    (tmp_path / "state.csv").write_text("nonsense")
    assert curve.read_curve(tmp_path / "state.csv") == []
