"""What a training step of the supernet needs of memory: found with two and four images, so that it fits anywhere."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from poolshare.space import TrainingError
from poolshare.space.quantities import human
from poolshare.supernet.model import seeing_checkpoints
from poolshare.supernet.training import distributed
from poolshare.supernet.training.loop import attention_of, memory_of, precision_of
from poolshare.supernet.training.sandwich import Sandwich

from .prepare import Job


class Memory(NamedTuple):
    """Of one process, in bytes; what the backward pass holds for a moment comes on top, about a block's worth."""

    fixed: int  # weights, their gradients and averages, the optimiser
    image: float  # what the forward of one image leaves for the backward
    images: int  # that are computed at once

    @property
    def step(self) -> int:
        """All that a step holds."""
        return self.fixed + math.ceil(self.images * self.image)

    @property
    def text(self) -> str:
        """For people."""
        return f"a training step of {self.images:,} images at once holds about {human(self.step)}B"


def measure_memory(job: Job, sandwich: Sandwich) -> Memory:
    """By what autograd saves in a step of the sandwich that trains the job, for two and for four images."""
    weights = sum(tensor.nbytes for tensor in job.supernet.parameters())
    copies = 4 if job.recipe.ema is None else 5  # weights, gradients, two moments of AdamW; the moving average
    two, four = (_saved(job, sandwich, images) for images in (2, 4))
    share = min(job.recipe.batch_size, len(job.data.split("train"))) // distributed.launched_size()
    return Memory(copies * weights, (four - two) / 2, math.ceil(share / job.recipe.accumulate))


def _saved(job: Job, sandwich: Sandwich, count: int) -> int:
    """Bytes that autograd keeps for so many images, the weights themselves left out."""
    net, recipe = job.supernet, job.recipe
    device = next(net.parameters()).device
    ours = {tensor.untyped_storage().data_ptr() for tensor in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, or another one would come to lie there

    def keep(value: Any) -> Any:  # None, not the tensor: that would hold the graph that holds it
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in ours:
                kept[storage.data_ptr()] = storage

    def never(_: Any) -> Any:
        raise AssertionError("there is no backward pass")

    images = torch.zeros(count, net.in_chans, *net.patch_embed.img_size, device=device)
    with torch.no_grad():
        targets = job.task.as_targets(net(images))  # of the right shape, which is all that matters
    training = net.training
    with ExitStack() as stack:
        for context in (memory_of(recipe, net), attention_of(recipe, net, device), precision_of(recipe, device)):
            stack.enter_context(context)
        stack.enter_context(saved_tensors_hooks(keep, never))
        stack.enter_context(seeing_checkpoints(keep))
        sandwich.loss(net.train(), images, targets, 0, teacher=net if sandwich.guided else None, task=job.task)
    net.train(training)
    return sum(storage.nbytes() for storage in kept.values())


def check_memory(job: Job, memory: Memory) -> None:
    """Raise TrainingError where a GPU has not enough of it, with the parts that a step can be taken in."""
    free = free_bytes(job.device)
    if free is None or memory.step <= free:
        return
    room = int((free - memory.fixed) / memory.image)
    parts = math.ceil(memory.images * job.recipe.accumulate / max(1, room))
    remedy = f"give --recipe accumulate={parts}, or a smaller --batch-size" if room > 0 else "take a smaller model"
    raise TrainingError(
        f"{memory.text}, and {job.device} has {human(free)}B free: {remedy}, or try --recipe checkpoint=true"
    )


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has left; None for a CPU, whose programs share theirs."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
