"""Tensors and training states on disk: written atomically with a checksum, read without pickle, shapes checked first."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

from poolshare.space import DamagedError, RunError
from poolshare.space.files import reading, remove_leftovers, write_whole

from . import distributed

FORMAT = 1

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], earlier: Path | None = None
) -> None:
    """Write tensors and JSON facts as one safetensors file with a checksum; `earlier`: see `write_whole`."""
    text = json.dumps({"format": FORMAT, **facts})
    contiguous = on_cpu(tensors)
    metadata = {"poolshare": text, "facts sha256": _checksum(text, {}), "sha256": _checksum(text, contiguous)}
    try:
        write_whole(path, lambda temporary: save_file(contiguous, temporary, metadata), earlier)
    except SafetensorError as error:  # it hides the system's error
        raise RunError(
            f"{path} cannot be written ({error}); free some space, or choose a folder you may write to"
        ) from None


def on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As safetensors takes them."""
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def load_facts(path: Path) -> dict[str, Any]:
    """The facts that `save_tensors` wrote, without reading the tensors. Raises RunError for anything else."""
    return _read(path, None, tensors=False)[1]


def load_tensors(path: Path, shapes: Shapes | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors on the CPU, and the facts.

    shapes: which tensors there may be, and of what shape; looked at before any tensor is read.
    Raises RunError for a file that is damaged, not a poolshare checkpoint, or holds other tensors.
    """
    return _read(path, shapes, tensors=True)


def read_weights(path: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The weights of an exported model, shapes first. Raises RunError for other shapes, SafetensorError for damage."""
    with safe_open(path, framework="pt") as file:
        return _tensors(path, file, shapes)


def _tensors(path: Path, file: Any, shapes: Shapes | None) -> dict[str, torch.Tensor]:
    """The tensors of an open safetensors file, their shapes compared before any is read."""
    names = list(file.keys())
    if shapes is not None:
        _compare(path, {name: tuple(file.get_slice(name).get_shape()) for name in names}, shapes)
    return {name: file.get_tensor(name) for name in names}


def _read(path: Path, shapes: Shapes | None, tensors: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with reading(path, "move it away to begin this part again"):
        try:
            with open(path, "rb"), safe_open(path, framework="pt") as file:  # `open` says why it cannot be opened
                metadata = file.metadata() or {}
                text = metadata["poolshare"]
                if metadata["facts sha256"] != _checksum(text, {}):
                    raise ValueError("the checksum of its facts does not match")
                facts = json.loads(text)
                found = _tensors(path, file, shapes) if tensors else {}
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        if tensors and metadata["sha256"] != _checksum(text, found):
            raise ValueError("its checksum does not match")
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise RunError(f"{path} has another format version than {FORMAT}; use the poolshare version that wrote it")
    return found, facts


def _compare(path: Path, found: Shapes, shapes: Shapes) -> None:
    others = {name: shape for name, shape in found.items() if shapes.get(name) != shape}
    wrong = [f"{one} is {others[one]}, not {shapes[one]}" if one in shapes else f"{one} has no place" for one in others]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RunError(f"{path} is of another model: {'; '.join(wrong[:3])}{more}; use the model it was made with")


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Over the facts, and names, types, shapes and bytes of the tensors."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def state_before(path: Path) -> Path:
    """Where the state before the newest one is kept."""
    return path.with_name(f"{path.stem}-before{path.suffix}")


def load_state(
    path: Path, shapes: Shapes, say: Callable[[str], None]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest state that is whole, as `load_tensors` gives it; None where there is none.

    say: called where the newest one is damaged and the one before it is taken. Raises RunError where both are.
    """
    found = _newest(path, lambda place: load_tensors(place, shapes))
    if found is None:
        return None
    tensors_and_facts, place = found
    if place != path and path.exists():
        say(f"{path} is damaged; training goes on from the state before it")
        os.replace(place, path)  # or the next save would keep the damaged one in its place
    return tensors_and_facts


def load_state_facts(path: Path) -> dict[str, Any] | None:
    """The facts of the newest state that has readable ones; None where there is no state."""
    found = _newest(path, load_facts)
    return found and found[0]


def _newest(path: Path, read: Callable[[Path], T]) -> tuple[T, Path] | None:
    """What `read` gives of the newest state that is not damaged, and where that lies; None where there is no state."""
    places = [place for place in (path, state_before(path)) if place.exists()]  # a power cut may leave the latter alone
    for place in places:
        try:
            return read(place), place
        except DamagedError:
            if place == places[-1]:
                raise
    return None


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights, by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors by "parameter index/name"; hyper-parameters belong to the recipe."""
    return {
        f"{index}/{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def optimizer_shapes(optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, ...]]:
    """What `flatten_optimizer` can give for an AdamW, by name."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, parameter in enumerate(parameters):
        shapes |= {f"{index}/step": (), f"{index}/exp_avg": tuple(parameter.shape)}
        shapes[f"{index}/exp_avg_sq"] = tuple(parameter.shape)
    return shapes


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `flatten_optimizer` took."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class TrainingState:
    """What changes in training, and its file: weights, the optimiser's moments, a moving average, the step."""

    def __init__(
        self,
        path: Path | None,
        identity: Mapping[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: ModelEmaV3 | None,
        say: Callable[[str], None],
        otherwise: str,
    ):
        self.otherwise = otherwise  # what else can be done about a state of another training
        self.path = path if distributed.rank() == 0 else None
        self.identity = json.loads(json.dumps(identity))
        self.model, self.optimizer, self.average, self.say = model, optimizer, average, say
        self.begun = self.saved = time.monotonic()
        self.spent = 0.0  # seconds of this training before it was interrupted
        if self.path is not None:
            remove_leftovers(self.path)

    @property
    def seconds(self) -> float:
        """Since the last save, if there is a file at all."""
        return time.monotonic() - self.saved if self.path is not None else -1.0

    def save(self, step: int, steps: int) -> None:
        """Write the file; `step` steps are done, `steps` make an epoch."""
        if self.path is None:
            return
        parts = {"model": self.model.state_dict(), "optimizer": flatten_optimizer(self.optimizer)}
        if self.average is not None:
            parts["average"] = self.average.module.state_dict()
        tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        self.saved = time.monotonic()
        facts = {"step": step, "epochs": step / steps, "seconds": self.spent + self.saved - self.begun}
        facts["threads"] = torch.get_num_threads()
        save_tensors(self.path, tensors, facts | {"identity": self.identity}, earlier=state_before(self.path))

    def restore(self) -> int:
        """Put back what the file of the first process holds, on all of them; returns the number of steps done."""
        step, moments = self._load()
        step = distributed.from_first(step)
        if step:  # the weights themselves reach the other processes when the model is made parallel
            device = next(self.model.parameters()).device
            restore_optimizer(self.optimizer, distributed.tensors_from_first(moments, device))
            if self.average is not None:
                average = self.average.module
                average.load_state_dict(distributed.tensors_from_first(average.state_dict(), device))
        return step

    def _load(self) -> tuple[int, Mapping[str, torch.Tensor]]:
        """Steps done and the optimiser's tensors; weights and their average are put back."""
        if self.path is None:
            return 0, {}
        weights = shapes_of(self.model)
        parts = {"model": weights, "optimizer": optimizer_shapes(self.optimizer)}
        if self.average is not None:
            parts["average"] = weights
        shapes = {f"{part}/{name}": shape for part, names in parts.items() for name, shape in names.items()}
        facts = load_state_facts(self.path)
        if facts is not None:
            self._refuse_another(facts)
        found = load_state(self.path, shapes, self.say)
        if found is None:
            return 0, {}
        values: dict[str, dict[str, torch.Tensor]] = {part: {} for part in parts}
        for key, value in found[0].items():
            part, name = key.split("/", 1)
            values[part][name] = value
        if missing := weights.keys() - values["model"].keys():
            raise DamagedError(
                f"{self.path} lacks {', '.join(sorted(missing)[:3])}; move it away to begin this part again"
            )
        self.model.load_state_dict(values["model"])
        if self.average is not None:
            self.average.module.load_state_dict(values["average"])
        self.spent = float(found[1]["seconds"])
        return int(found[1]["step"]), values["optimizer"]

    def _refuse_another(self, facts: Mapping[str, Any]) -> None:
        earlier = facts.get("identity", {})
        changed = [
            f"{name}: {earlier.get(name)!r} there, {self.identity.get(name)!r} now"
            for name in {**self.identity, **earlier}
            if earlier.get(name) != self.identity.get(name)
        ]
        if changed:
            raise RunError(
                f"{self.path} is the state of another training ({'; '.join(changed)}), {facts.get('epochs', 0):.3g} epochs "
                f"of which are done; repeat that one to continue it, or {self.otherwise}"
            )
