"""Training state on disk: written whole or not at all, read back without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from poolshare.space import RunError
from poolshare.space.files import write_whole

FORMAT = 1


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts as one safetensors file."""
    metadata = {"poolshare": json.dumps({"format": FORMAT, **facts})}
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        write_whole(path, lambda temporary: save_file(contiguous, temporary, metadata))
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be written ({error}); free some space, or choose a folder you may write to"
        ) from None


def load_facts(path: Path) -> dict[str, Any]:
    """The facts that `save_tensors` wrote, without reading the tensors. Raises RunError for anything else."""
    return _read(path, tensors=False)[1]


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors on the CPU, and the facts. Raises RunError for anything else."""
    return _read(path, tensors=True)


def _read(path: Path, tensors: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["poolshare"])
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is no file of ours, or damaged ({error}); delete it to begin this part again") from None
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise RunError(f"{path} has another format version than {FORMAT}; use the poolshare version that wrote it")
    return found, facts


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors by "parameter index/name"; hyper-parameters belong to the recipe."""
    return {
        f"{index}/{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `flatten_optimizer` took."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
