"""What a recipe says is what training does: mixing, parts, averages, drop-path, smoothing, a teacher."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from opened import open_data
from timm.data import Mixup
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import nn

from poolshare.search.cli.options import recipe_of
from poolshare.search.config import SearchConfig
from poolshare.search.job.prepare import input_config
from poolshare.search.job.recipes import checked_recipe, supernet_recipe
from poolshare.space import ConfigError, SearchSpace
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.data.transforms import keyed_generators
from poolshare.supernet.training.loop import _MIX, _Mixer, check_batches, set_drop_path, train_model
from poolshare.supernet.training.recipe import Recipe

SPACE = SearchSpace(depth=3, levels=(64, 16))
PLAIN = {"epochs": 1, "batch_size": 1000, "clip_grad": None, "warmup": 0.0}  # one batch is the whole training split


@pytest.fixture(scope="module")
def digits():
    return open_data("digits", img_size=8, in_chans=1, mean=(0.5,), std=(0.5,)).full


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    net = SuperNet.from_timm("digits_vit", SPACE, depth=3, embed_dim=16, num_heads=2, mlp_ratio=1.0, **options)
    return Subnet.from_supernet(net, SPACE[6])


def first_gradients(digits, recipe, **options):
    """Of the head's bias and the first block, after one step from the same weights."""
    model, found = make_model(), {}

    def take(step, loss):
        if not found:
            found["loss"] = torch.tensor(loss)
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    train_model(model, digits, recipe, progress=take, **options)
    return found


def by_hand(digits, loss_of):
    model = make_model().train()
    images, labels = next(iter(digits.train_loader(0, 1000)))
    loss = loss_of(model, images, labels)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def test_parts_of_a_batch_add_up_to_its_gradient(digits):
    whole = by_hand(digits, lambda model, images, labels: F.cross_entropy(model(images), labels))
    for parts in (1, 7):
        found = first_gradients(digits, Recipe(**PLAIN, accumulate=parts))
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_mixing_is_timms_over_neighbours_with_generators_keyed_by_seed_and_step(digits):
    recipe = Recipe(**PLAIN, mixup=0.8, cutmix=1.0, label_smoothing=0.1)

    def loss(model, images, labels):
        order = [*range(0, 1000, 2), *range(999, 0, -2)]
        with keyed_generators(5, _MIX, 0):
            images, targets = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)(images[order], labels[order])
        return -(targets * model(images).log_softmax(-1)).sum(-1).mean()

    found = first_gradients(digits, recipe, seed=5)
    for name, gradient in by_hand(digits, loss).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_pair_that_is_mixed_stays_together_however_the_batch_is_shared():
    images, labels = torch.rand(8, 1, 4, 4), torch.arange(8)
    mixer = _Mixer(Recipe(mixup=1.0, cutmix=1.0), 8, seed=1)
    for step in range(20):
        whole_images, whole_targets = mixer(images.clone(), labels, step)
        parts = [mixer(images[part].clone(), labels[part], step) for part in (slice(0, 4), slice(4, 8))]
        part_images, part_targets = (torch.cat(some) for some in zip(*parts, strict=True))
        # In another order: find each by its labels, which pairs and shares decide.
        for target, image in zip(part_targets, part_images, strict=True):
            [position] = torch.nonzero((whole_targets == target).all(dim=1)).flatten().tolist()
            assert torch.equal(whole_images[position], image)
    with pytest.raises(ConfigError, match="3 of them in a step: give a --batch-size whose share is even, such as 4"):
        mixer(images[:3], labels[:3], 0)


@pytest.mark.parametrize(
    ("images", "processes", "share", "better"), [(3, 1, 3, 4), (5000, 1, 1257, 1256), (66, 2, 33, 68)]
)
def test_batches_that_cannot_be_paired_are_refused_with_one_that_can(images, processes, share, better, digits):
    mixed = Recipe(cutmix=1.0, batch_size=images)
    says = f"{share} of them in a step: give a --batch-size whose share is even, such as {better}$"
    with pytest.raises(ConfigError, match=says):
        check_batches(digits, mixed, processes)
    check_batches(digits, mixed.model_copy(update={"batch_size": better}), processes)
    check_batches(digits, mixed.model_copy(update={"cutmix": 0.0}), processes)


def test_mixing_and_smoothing_reach_the_loss_and_a_mixed_step_differs_from_a_plain_one(digits):
    smoothed = first_gradients(digits, Recipe(**PLAIN, label_smoothing=0.2))
    expected = by_hand(digits, lambda m, images, labels: F.cross_entropy(m(images), labels, label_smoothing=0.2))
    torch.testing.assert_close(smoothed["head.weight"], expected["head.weight"], rtol=1e-4, atol=1e-6)
    plain = by_hand(digits, lambda m, images, labels: F.cross_entropy(m(images), labels))
    assert not torch.allclose(plain["head.weight"], smoothed["head.weight"], rtol=1e-3)


def test_a_teachers_distribution_takes_its_share_of_the_loss(digits):
    teacher = make_model(seed=7)

    def loss(model, images, labels):
        logits = model(images)
        with torch.no_grad():
            targets = teacher.eval()(images).softmax(-1)
        return 0.7 * F.cross_entropy(logits, labels) - 0.3 * (targets * logits.log_softmax(-1)).sum(-1).mean()

    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    found = first_gradients(digits, Recipe(**PLAIN, distill=0.3), teacher=teacher)
    for name, gradient in by_hand(digits, loss).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_moving_average_of_the_weights_is_the_result(digits):
    recipe, model, weights = Recipe(epochs=2, batch_size=256, ema=0.6), make_model(), []
    train_model(model, digits, recipe, progress=lambda step, loss: weights.append(model.head.weight.detach().clone()))
    average = weights[0]
    for step, value in enumerate(weights[1:], start=2):
        decay = min(0.6, 1 - (1 + (step - 1)) ** (-2 / 3))  # timm's warm-up of the decay
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(model.head.weight, average)
    assert not torch.allclose(model.head.weight, weights[-1])


def test_layer_decay_moves_each_layer_as_timm_would_move_the_base_models(digits):
    """Adam's first step is lr · g / |g|, so two recipes' first steps have the ratio of their learning rates."""
    base = timm.create_model("digits_vit", depth=3, embed_dim=16, num_heads=2, mlp_ratio=1.0, img_size=8)
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    groups = create_optimizer_v2(base, opt="adamw", lr=1e-3, layer_decay=0.5).param_groups
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert set(scales.values()) == {0.5**power for power in range(5)}  # embedding, three blocks, head
    begun, moved = dict(make_model().named_parameters()), {}
    for decay in (None, 0.5):
        model = make_model()
        train_model(model, digits, Recipe(**PLAIN, weight_decay=0.0, layer_decay=decay))
        moved[decay] = {name: value.detach() - begun[name].detach() for name, value in model.named_parameters()}
    for name, plain in moved[None].items():
        sure = plain.abs() > 0.99 * plain.abs().max()  # not those whose gradient is as small as Adam's epsilon
        expected = scales[name.replace("attn.v.", "attn.qkv.")] * plain[sure]
        torch.testing.assert_close(moved[0.5][name][sure], expected, rtol=1e-2, atol=1e-6, msg=name)


def test_drop_path_is_timms_and_ends_with_training(digits):
    options = {"depth": 3, "embed_dim": 16, "num_heads": 2}
    ours, timms = (
        timm.create_model("digits_vit", **options),
        timm.create_model("digits_vit", drop_path_rate=0.4, **options),
    )
    set_drop_path(ours, 0.4)
    for block, other in zip(ours.blocks, timms.blocks, strict=True):
        for one, two in ((block.drop_path1, other.drop_path1), (block.drop_path2, other.drop_path2)):
            assert type(one) is type(two)
            assert getattr(one, "drop_prob", 0) == pytest.approx(getattr(two, "drop_prob", 0))
    model, seen = make_model(), []
    train_model(
        model,
        digits,
        Recipe(**PLAIN, drop_path=0.4),
        progress=lambda step, loss: seen.append(type(model.blocks[2].drop_path1)),
    )
    assert seen == [DropPath]
    assert all(type(block.drop_path1) is nn.Identity for block in model.blocks)
    set_drop_path(ours, 0.0)
    assert all(type(block.drop_path2) is nn.Identity for block in ours.blocks)


def test_augmentation_of_the_recipe_reaches_the_images(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for index in range(6):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / label / f"{index}.png")
    options = {"img_size": 16, "in_chans": 3, "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    still = Recipe(hflip=0, crop_scale=1, color_jitter=0).augmentation
    images = {}
    for name, augmentation in (
        ("still", still),
        ("erased", Recipe(re_prob=1, hflip=0, crop_scale=1, color_jitter=0).augmentation),
    ):
        data = open_data(str(tmp_path), augmentation=augmentation, **options)
        images[name] = torch.cat([batch for batch, _ in data.train_loader(0, 2)])
    assert (images["still"] != images["erased"]).any()


def test_evaluation_takes_whole_images_where_training_took_no_crops():
    for scale, crop_pct in ((0.35, 0.9), (0.99, 0.9), (1.0, 1.0)):
        config = SearchConfig(data="x", img_size=28, recipe={"crop_scale": scale})
        assert input_config(config)["crop_pct"] == crop_pct


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"drop_path": 0.1}, "--recipe drop_path=0.1: that belongs to `poolshare retrain`"),
        ({"mixupp": 0.1}, "--recipe mixupp=0.1: Extra inputs are not permitted; there are epochs, batch_size"),
        ({"ema": 1.5}, "--recipe ema=1.5: Input should be less than 1"),
        ({"auto_augment": 3}, "--recipe auto_augment=3 cannot be read: input should be a valid string"),
    ],
)
def test_what_a_recipe_cannot_be_is_named(changes, says):
    with pytest.raises(ConfigError) as raised:
        supernet_recipe(SearchConfig(data="digits", recipe=changes))
    assert says in str(raised.value)


def test_defaults_follow_the_situation():
    scratch, warm = (supernet_recipe(SearchConfig(data="x", weights=weights)) for weights in (None, "file"))
    assert (scratch.lr, scratch.layer_decay, scratch.epochs) == (2e-3, None, 30)
    assert (warm.lr, warm.layer_decay, warm.epochs) == (3e-4, 0.75, 3)  # after the dense model's tuning
    assert checked_recipe({"mixup": 1}).mixup == 1.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("clip_grad=None,ema=none", {"clip_grad": None, "ema": None}),
        ("auto_augment=None", {"auto_augment": None}),
        ("mixup=1,hflip=0", {"mixup": 1.0, "hflip": 0.0}),
        ("accumulate=2.0", {"accumulate": 2}),
    ],
)
def test_a_recipe_is_read_by_the_types_of_its_fields(text: str, found: dict[str, Any]):
    assert recipe_of(text) == found
    assert {name: type(value) for name, value in recipe_of(text).items()} == {k: type(v) for k, v in found.items()}


@pytest.mark.parametrize("text", ["hflip=true", "accumulate=True", "mixup=false", "ema=yes", "auto_augment=true"])
def test_what_no_field_of_a_recipe_can_be_is_refused_by_name(text: str):
    with pytest.raises(ConfigError, match=f"--recipe {text.split('=')[0]}=.* cannot be read: "):
        recipe_of(text)
