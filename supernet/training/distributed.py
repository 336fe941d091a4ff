"""Training in several processes: joining those that torchrun started, and what they exchange.

Every function also works in a single process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from poolshare.space.processes import launched, launched_rank

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the first process may be checking images while the others wait


def launched_size() -> int:
    """How many processes torchrun started, joined or not."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank() -> int:
    """Which of this machine's processes this is: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def rank() -> int:
    """Which of all processes this is; the first one, 0, writes and prints."""
    return dist.get_rank() if dist.is_initialized() else launched_rank()


def world_size() -> int:
    """How many processes have joined to train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, by nccl on GPUs and gloo on CPUs; alone, do nothing."""
    if not launched() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallel(model: nn.Module, some_unused: bool) -> nn.Module:
    """The model as training calls it: its gradients are the mean over all processes.

    some_unused: whether a step may leave parameters out; looking for them costs a walk over the autograd graph.
    """
    return model if world_size() == 1 else DistributedDataParallel(model, find_unused_parameters=some_unused)


def without_sync(model: nn.Module) -> AbstractContextManager[Any]:
    """A backward in here adds to the gradients of this process alone; the next one outside shares the sum."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def from_first(value: T) -> T:
    """The first process's value, a plain one, on all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def tensors_from_first(tensors: Mapping[str, torch.Tensor], device: torch.device) -> Mapping[str, torch.Tensor]:
    """The first process's tensors by name, on all of them; the others give none."""
    if world_size() == 1:
        return tensors
    kinds = from_first({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    received = {}
    for name, (shape, dtype) in kinds.items():
        tensor = tensors[name].to(device) if rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, 0)
        received[name] = tensor
    return received


def summed(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Whole numbers added up over all processes, on all of them; a process may have none, which count as zeros."""
    if world_size() == 1:
        return list(numbers)
    count = torch.tensor(len(numbers), device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    shared = torch.zeros(int(count), dtype=torch.int64, device=device)
    shared[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(shared)
    return shared.tolist()


def agree(loss: torch.Tensor, stop: int | None) -> tuple[float, int | None]:
    """The mean loss, and a signal to stop where any process got one: the same answer on all of them."""
    if world_size() == 1:
        return loss.item(), stop
    shared = torch.stack([loss.detach().double() / world_size(), loss.new_tensor(stop is not None, dtype=torch.double)])
    dist.all_reduce(shared)
    mean, stopping = shared.tolist()
    return mean, (stop or signal.SIGTERM) if stopping else None


def wait_for_first() -> None:
    """Return when all processes have come here."""
    if world_size() > 1:
        dist.barrier()
