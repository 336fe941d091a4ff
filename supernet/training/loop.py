"""One training loop, for the supernet (sandwich) and for a single model (labels); it can be stopped at any step."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from poolshare.space import BrokenDataError, ConfigError, CostTable, TrainingError

from ..data.loaders import loader_batch
from ..data.splits import Data
from ..data.transforms import keyed_generators
from ..model import SuperNet
from ..tasks import CLASSIFICATION, Task
from . import distributed
from .checkpoint import TrainingState
from .curve import Curve, Watch
from .interrupt import Stop, kept_signals
from .recipe import Recipe
from .sandwich import Sandwich, answers_of, taught_loss

# model, images, targets, step → scalar loss, the mean over the images
BatchLoss = Callable[[nn.Module, torch.Tensor, torch.Tensor, int], torch.Tensor]
Progress = Callable[[int, float | None], None]  # steps done, loss of the last; None: an earlier process took them
Say = Callable[[str], None]  # a message for the user

SECONDS_BETWEEN_SAVES = 600.0  # and at the end of every epoch


def train_supernet(
    supernet: SuperNet,
    data: Data,
    costs: CostTable,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    task: Task = CLASSIFICATION,
    **options: Any,
) -> None:
    """Train all architectures of the supernet's space at once on the `train` split; options: those of `fit`.

    teacher: the dense model, where they learn from it too, see `Sandwich`.
    """
    sandwich = Sandwich(supernet.space, costs, seed, within=recipe.within, guided=teacher is not None)
    if teacher is not None:
        teacher.to(next(supernet.parameters()).device).eval()
        options["settings"] = {"guided": recipe.distill}

    def loss(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        return sandwich.loss(model, images, targets, step, recipe.label_smoothing, teacher, recipe.distill, task)

    check_recipe(task, recipe)
    fit(supernet, loss, data, recipe, seed=seed, **options)


def train_model(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    task: Task = CLASSIFICATION,
    **options: Any,
) -> None:
    """Train one model on the targets of the `train` split; options: those of `fit`.

    teacher: its outputs for the same images are `recipe.distill` of the loss, see `taught_loss`. Drop-path is on while
    training alone.
    """

    def loss(trained: nn.Module, images: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
        taught = answers_of(teacher, images)
        return taught_loss(task, trained(images), targets, taught, recipe.distill, recipe.label_smoothing)

    check_recipe(task, recipe)
    if teacher is not None:
        teacher.to(next(model.parameters()).device).eval()
    if recipe.drop_path:
        set_drop_path(model, recipe.drop_path)
    try:
        fit(model, loss, data, recipe, **options)
    finally:
        if recipe.drop_path:
            set_drop_path(model, 0.0)


def set_drop_path(model: Any, rate: float) -> None:
    """Let block i of n skip its branches with probability rate · i / (n − 1), as timm does."""
    blocks = model.blocks
    for block, one in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist(), strict=True):
        block.drop_path1, block.drop_path2 = (DropPath(one) if one else nn.Identity() for _ in range(2))


def check_recipe(task: Task, recipe: Recipe) -> None:
    """Raise ConfigError for a recipe that asks for what the task's loss cannot do."""
    for name in ("label_smoothing", "mixup", "cutmix") if not task.mixes else ():
        if value := getattr(recipe, name):
            raise ConfigError(
                f"--recipe {name}={value:g} belongs to classification, and the task is {task.name}: leave it out"
            )


def steps_per_epoch(data: Data, recipe: Recipe) -> int:
    """Optimiser steps in one pass over the `train` split."""
    return len(data.train_loader(0, recipe.batch_size))


def check_batches(data: Data, recipe: Recipe, processes: int) -> None:
    """Raise DataError for batches that so many processes cannot share, ConfigError for those that cannot be mixed."""
    data.train_loader(0, recipe.batch_size, world_size=processes)
    if not (recipe.mixup or recipe.cutmix):
        return
    for images in data.batch_sizes(recipe.batch_size):
        even = images + processes  # of all processes
        if even > len(data.split("train")):
            even = images - processes
        remedy = f"a --batch-size whose share is even, such as {even}"
        if loader_batch(data) is not None:
            remedy = f"a training loader with drop_last=True whose batch size is a multiple of {2 * processes}"
        _check_pairs(images // processes, remedy)


def _check_pairs(images: int, remedy: str) -> None:
    if images % 2:
        raise ConfigError(f"mixup and cutmix pair images, and a process has {images} of them in a step: give {remedy}")


def fit(
    model: nn.Module,
    batch_loss: BatchLoss,
    data: Data,
    recipe: Recipe,
    *,
    seed: int = 0,
    workers: int = 0,
    state: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    save_seconds: float = SECONDS_BETWEEN_SAVES,
    progress: Progress | None = None,
    watch: Watch | None = None,
    say: Say | None = None,
    otherwise: str = "move the file away",
) -> None:
    """Minimise `batch_loss` over the training split, in place; all processes that torchrun started share the work.

    state: a file from which the next call continues as if nothing had happened. It is written after every epoch,
    every `save_seconds`, and when SIGINT or SIGTERM comes: that signal then takes its course. The state before it is
    kept beside it, and so is the `Curve` of the training, as a CSV file. Only the first process reads and writes them.
    watch: told of each row of the curve, where this goes on of the earlier ones too.
    settings: JSON values, beside seed and recipe, that a state must have been begun with, or RunError is raised; the
    epochs of the recipe may differ; `otherwise`: what the error offers. Raises TrainingError where loss or
    weights are not finite, and what `check_batches` does.
    """
    if recipe.epochs == 0:
        return
    check_batches(data, recipe, distributed.world_size())
    steps = steps_per_epoch(data, recipe)
    training = _Training(model, batch_loss, recipe, steps, len(data.classes), seed, state)
    identity = {**recipe.model_dump(exclude={"epochs"}), **(settings or {}), "seed": seed, "steps_per_epoch": steps}
    say = say or (lambda _: None)
    kept = TrainingState(state, identity, model, training.optimizer, training.average, say, otherwise)
    done, total, device = kept.restore(), training.total, training.device
    training.start("guided" in identity)
    curve = Curve(kept.path and kept.path.with_suffix(".csv"), done, total, steps, watch)
    if progress and done:
        progress(done, None)
    batches = _batches(data, recipe, done, steps, workers, device)
    catching = state is not None or distributed.world_size() > 1

    def save() -> None:
        kept.save(done, steps)
        curve.save()

    with memory_of(recipe, model), attention_of(recipe, model, device), kept_signals(catching) as stop:
        while done < total:
            try:
                images, labels = next(batches)
            except BrokenDataError as error:
                save()
                saved = f"; {done:,} of {total:,} steps are saved: mend it, then give the same command again"
                raise BrokenDataError(f"{error}{saved if state else ''}") from None
            loss, norm, stopping = training.take(images, labels, done, stop)
            done += 1
            lr = training.optimizer.param_groups[0]["lr"]
            curve.add(done, loss, norm, lr, len(images) * distributed.world_size())
            if stopping or done % steps == 0 or kept.seconds >= save_seconds:
                training.check_weights(done)
                save()
            if progress:
                progress(done, loss)
            if stopping:
                distributed.wait_for_first()  # it may still be writing
                say(f"stopping after step {done:,} of {total:,}" + (", which is saved" if state else ""))
                stop.obey(stopping)
        if stop.number is not None:  # it came after the last step
            stop.obey(stop.number)
    training.finish()


class _Training:
    """A model with its optimiser, schedule, mixing and moving average: what one step needs.

    steps: of an epoch. state: the file that is kept, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_loss: BatchLoss,
        recipe: Recipe,
        steps: int,
        num_classes: int,
        seed: int,
        state: Path | None,
    ) -> None:
        self.model, self.batch_loss, self.recipe, self.seed, self.state = model, batch_loss, recipe, seed, state
        self.steps, self.total = steps, recipe.epochs * steps
        self.device = next(model.parameters()).device
        self.optimizer = create_optimizer_v2(
            model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
        )
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.total,
            lr_min=recipe.lr * 1e-2,
            warmup_t=math.ceil(recipe.warmup * self.total),
            warmup_lr_init=recipe.lr * 1e-2,
            t_in_epochs=False,
        )
        self.average = None if recipe.ema is None else ModelEmaV3(model, recipe.ema, use_warmup=True)
        self.mixer = _Mixer(recipe, num_classes, seed) if recipe.mixup or recipe.cutmix else None

    def start(self, guided: bool) -> None:
        """Make the model parallel and put it into training mode; after its weights were restored.

        guided: whether a supernet learns from a teacher, so that its largest architecture takes no part.
        """
        # The largest of a sandwich uses every parameter of the base model, but not those of the poolings; without it a
        # step may leave out the norms of queries and keys in a layer that all of its architectures share.
        some_unused = isinstance(self.model, SuperNet) and (
            self.recipe.within is not None or guided or any(True for _ in self.model.poolings.parameters())
        )
        self.parallel = distributed.parallel(self.model, some_unused)
        self.model.train()

    def take(
        self, images: torch.Tensor, labels: torch.Tensor, step: int, stop: Stop
    ) -> tuple[float, torch.Tensor, int | None]:
        """Take a step; returns the mean loss of all processes, the gradient's norm (), and a signal to stop that any got.

        Raises TrainingError for a loss that is not finite.
        """
        loss, stopping = distributed.agree(self._backward(images, labels, step), stop.number)
        if not math.isfinite(loss):
            raise self._failed(f"the loss is {loss}", step)
        return loss, self._update(step), stopping

    def check_weights(self, done: int) -> None:
        """Raise TrainingError for weights that are not finite after so many steps."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise self._failed("a weight is not finite", done - 1)

    def _failed(self, what: str, step: int) -> TrainingError:
        remains = "the last state before is kept; " if self.state is not None and self.state.exists() else ""
        return TrainingError(
            f"{what} at step {step + 1} of {self.total} (epoch {step // self.steps + 1}); {remains}"
            f"try a --lr below {self.recipe.lr:g} with a new --out"
        )

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        """Leave the gradients of a step in the parameters; returns the mean loss, ()."""
        # Dropout and drop-path of a resumed run are those of an undisturbed one.
        torch.manual_seed(_key(self.seed, step, distributed.rank()))
        self.schedule.step_update(step)
        if self.mixer is not None:
            images, labels = self.mixer(images, labels, step)
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(zip(images.chunk(self.recipe.accumulate), labels.chunk(self.recipe.accumulate), strict=True))
        whole = torch.zeros((), device=self.device)
        for index, (some, their_labels) in enumerate(parts):
            # gradients are shared between processes after the last part alone
            with nullcontext() if index == len(parts) - 1 else distributed.without_sync(self.parallel):
                with precision_of(self.recipe, self.device):
                    loss = self.batch_loss(self.parallel, some, their_labels, step)
                weighted = loss if len(parts) == 1 else loss * (len(some) / len(images))
                weighted.backward()
                whole += weighted.detach()
        return whole

    def _update(self, step: int) -> torch.Tensor:
        """Change the weights by their gradient; returns its norm, before it is clipped, ()."""
        limit = math.inf if self.recipe.clip_grad is None else self.recipe.clip_grad
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step + 1)
        return norm

    def finish(self) -> None:
        """Leave the model as it is to be used, with the moving average as its weights where there is one."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.model.eval()


def _batches(
    data: Data, recipe: Recipe, first: int, steps: int, workers: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """From step `first` on, images and labels of this process's share, on the device."""
    epoch, start = divmod(first, steps)
    batches = data.train_loader(
        epoch,
        recipe.batch_size,
        epochs=recipe.epochs - epoch,
        start_step=start,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=workers,
        pin=device.type == "cuda",
    )
    ahead: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # on its way to a GPU that computes with the one before
    for images, labels in batches:
        ahead.append((images.to(device, non_blocking=True), labels.to(device, non_blocking=True)))
        if len(ahead) > (device.type == "cuda"):
            yield ahead.popleft()
    yield from ahead


def precision_of(recipe: Recipe, device: torch.device) -> AbstractContextManager[None]:
    """In what a training's forwards run: bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if recipe.amp == "bf16" else nullcontext()


@contextmanager
def memory_of(recipe: Recipe, model: Any) -> Iterator[None]:
    """Blocks that compute their activations once more in the backward pass, where the recipe says so."""
    before = getattr(model, "grad_checkpointing", False)
    if recipe.checkpoint:
        model.set_grad_checkpointing(True)
    try:
        yield
    finally:
        if recipe.checkpoint:
            model.set_grad_checkpointing(before)


@contextmanager
def attention_of(recipe: Recipe, model: nn.Module, device: torch.device) -> Iterator[None]:
    """How a training's blocks attend: as the model is set, but in bfloat16 on a CPU by timm's explicit path.

    The backward of PyTorch's fused kernel takes up to half of a step there (results/bench).
    """
    slow = recipe.amp == "bf16" and device.type == "cpu"
    fused: list[Any] = [part for part in model.modules() if slow and getattr(part, "fused_attn", False)]
    for part in fused:
        part.fused_attn = False
    try:
        yield
    finally:
        for part in fused:
            part.fused_attn = True


class _Mixer:
    """timm's Mixup and CutMix, keyed by (seed, step), and the same however many processes share the batch."""

    def __init__(self, recipe: Recipe, num_classes: int, seed: int):
        self.seed = seed
        others = {"label_smoothing": recipe.label_smoothing, "num_classes": num_classes}
        self.mixup = Mixup(recipe.mixup, recipe.cutmix, prob=recipe.mix_prob, **others)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, channels, H, W), (B,) → mixed images, (B, classes); in another order."""
        even = distributed.world_size() * (len(images) + 1)  # loaders may have other batches than in their first epoch
        _check_pairs(len(images), f"a --batch-size whose share is even, such as {even}")
        # timm mixes the first with the last: neighbours are put there, so that ranks never split a pair.
        order = [*range(0, len(images), 2), *range(len(images) - 1, 0, -2)]
        with keyed_generators(self.seed, _MIX, step):
            return self.mixup(images[order], labels[order])


_MIX = 17  # sets these draws apart from the others of the same seed


def _key(seed: int, step: int, rank: int) -> int:
    """For the global generator; two processes skip other branches."""
    return random.Random(f"step {seed} {step}" + (f" {rank}" if rank else "")).getrandbits(63)
