"""One training loop, for the supernet (sandwich) and for a single model (labels)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from poolshare.space import Architecture, Band, BudgetError, CostTable, RunError, SearchSpace, TrainingError

from .checkpoint import flatten_optimizer, load_tensors, restore_optimizer, save_tensors
from .data import Data
from .model import SuperNet

BatchLoss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]  # images, labels, step → scalar loss
Progress = Callable[[int, float], None]  # steps done, loss of the last


class Recipe(BaseModel):
    """How to train. AdamW with a cosine schedule after a linear warm-up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(30, ge=0)
    batch_size: int = Field(64, ge=1)  # images of one optimiser step
    lr: float = Field(2e-3, gt=0)  # peak learning rate
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, le=1)  # share of all steps
    clip_grad: float | None = Field(1.0, gt=0)  # largest gradient norm
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    layer_decay: float | None = Field(None, gt=0, le=1)  # learning-rate factor from block to block, for warm starts
    amp: Literal["none", "bf16"] = "none"


class Sandwich:
    """Which architectures a supernet step trains: the largest, the smallest, and `students` drawn across MAC bands.

    Bands are of equal width from the cheapest to the dearest, so that small and large networks get equal shares
    whatever their numbers. Draws are keyed by (seed, step) alone: nothing to save, and the same on every process.
    """

    def __init__(self, space: SearchSpace, costs: CostTable, seed: int, students: int = 2, bands: int = 8):
        self.space, self.seed, self.students = space, seed, students
        self.largest, self.smallest = space[0], space.cheapest(costs)
        low, high = costs.total(self.smallest), costs.total(space.dearest(costs))
        borders = [low + (high + 1 - low) * index // bands for index in range(bands + 1)]
        self.bands: list[Band] = []
        for start, stop in pairwise(borders):
            try:
                self.bands.append(space.within(costs, start, stop - 1))
            except BudgetError:  # nothing costs so much: no band to draw from
                continue

    def at(self, step: int) -> list[Architecture]:
        """The architectures of one step, the largest first."""
        rng = random.Random(f"sandwich {self.seed} {step}")
        drawn = [rng.choice(self.bands).sample(rng) for _ in range(self.students)]
        return [self.largest, self.smallest, *drawn]


def sandwich_loss(
    supernet: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    architectures: Sequence[Architecture],
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The first architecture on the labels, the others on its detached logits, in one forward (BigNAS, 2003.11142).

    images (B, channels, H, W), labels (B,). The students' cross-entropies with the teacher's distribution are
    averaged, so all of them together weigh as much as the teacher.
    """
    teacher, *students = supernet(images, architectures).unbind(0)  # each (B, classes)
    loss = F.cross_entropy(teacher, labels, label_smoothing=label_smoothing)
    if not students:
        return loss
    targets = teacher.detach().softmax(dim=-1)
    return loss + torch.stack([F.cross_entropy(student, targets) for student in students]).mean()


def train_supernet(
    supernet: SuperNet,
    data: Data,
    costs: CostTable,
    recipe: Recipe,
    *,
    seed: int = 0,
    workers: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Train all architectures of the supernet's space at once on the `train` split; resumes from `state`."""
    sandwich = Sandwich(supernet.space, costs, seed)

    def loss(images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        return sandwich_loss(supernet, images, labels, sandwich.at(step), recipe.label_smoothing)

    fit(supernet, loss, data, recipe, seed=seed, workers=workers, state=state, progress=progress)


def train_model(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    full: bool = True,
    seed: int = 0,
    workers: int = 0,
    state: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Train one model on the labels of the full training split, or of `train` alone; resumes from `state`."""

    def loss(images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)

    fit(
        model,
        loss,
        data,
        recipe,
        full=full,
        seed=seed,
        workers=workers,
        state=state,
        settings=settings,
        progress=progress,
    )


def steps_per_epoch(data: Data, recipe: Recipe, full: bool = False) -> int:
    """Optimiser steps in one pass over the `train` split, or over `train_full`."""
    return len(data.train_loader(0, recipe.batch_size, full=full))


def fit(
    model: nn.Module,
    batch_loss: BatchLoss,
    data: Data,
    recipe: Recipe,
    *,
    full: bool = False,
    seed: int = 0,
    workers: int = 0,
    state: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Minimise `batch_loss` over the training split, in place.

    state: a file that is written after every epoch, and from which the next call continues: the result is the one
    of an undisturbed run. settings: JSON values that a state must have been begun with, or RunError is raised.
    Raises TrainingError for a loss that is not finite; `state` then holds the last finite epoch.
    """
    if recipe.epochs == 0:
        return
    device = next(model.parameters()).device
    steps = steps_per_epoch(data, recipe, full)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
    )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps,
        lr_min=recipe.lr * 1e-2,
        warmup_t=math.ceil(recipe.warmup * recipe.epochs * steps),
        warmup_lr_init=recipe.lr * 1e-2,
        t_in_epochs=False,
    )
    autocast = torch.autocast(device.type, torch.bfloat16) if recipe.amp == "bf16" else nullcontext()
    first_epoch = _restore(state, model, optimizer, settings) if state is not None and state.exists() else 0
    model.train()
    if progress and first_epoch:
        progress(first_epoch * steps, math.nan)
    for epoch in range(first_epoch, recipe.epochs):
        batches = data.train_loader(epoch, recipe.batch_size, full=full, workers=workers)
        for step, (images, labels) in enumerate(batches, start=epoch * steps):
            # Dropout and drop-path of a resumed run are those of an undisturbed one.
            torch.manual_seed(_key(seed, step))
            schedule.step_update(step)
            with autocast:
                loss = batch_loss(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), step)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {step + 1} of {recipe.epochs * steps} (epoch {epoch + 1}); "
                    f"{'the last finite epoch is kept; ' if state is not None and state.exists() else ''}"
                    f"try a --lr below {recipe.lr:g} with a new --out"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            if progress:
                progress(step + 1, loss.item())
        if state is not None:
            _save(state, model, optimizer, epoch + 1, settings)
    model.eval()


def _key(seed: int, step: int) -> int:
    return random.Random(f"step {seed} {step}").getrandbits(63)


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, settings: Mapping[str, Any] | None
) -> None:
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in flatten_optimizer(optimizer).items()}
    save_tensors(path, tensors, {"epochs": epochs, "settings": settings})


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any] | None) -> int:
    """Put the state back; returns the number of epochs it has seen."""
    tensors, facts = load_tensors(path)
    if facts["settings"] != settings:
        raise RunError(
            f"{path} is the state of a training with other settings: {facts['settings']} there, {settings} now; "
            "repeat those to continue it, or delete the file"
        )
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    for key, value in tensors.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    model.load_state_dict(parts["model"])
    restore_optimizer(optimizer, parts["optimizer"])
    return int(facts["epochs"])
