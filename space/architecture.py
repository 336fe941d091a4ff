"""Architectures: what each layer of a Vision Transformer does with tokens and attention, as a frozen value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .errors import ArchitectureError

MAX_DEPTH = 200  # far above any ViT; a text such as "196*999999999" must not fill the memory

_OPERATOR = re.compile("[a-z][a-z0-9_]*")
_RUN = re.compile(
    rf"(?P<tokens>[1-9][0-9]{{0,8}})(?:@(?P<operator>{_OPERATOR.pattern}))?(?:\*(?P<length>[1-9][0-9]{{0,8}}))?"
)


class Layer(NamedTuple):
    """One block: how many patch tokens it works on, what pooled them before it, whose attention map it uses."""

    tokens: int  # patch tokens, prefix tokens (CLS, registers) not counted
    operator: str | None = None  # the pooling operator just before this block; None where nothing is pooled
    shared: bool = False  # True: uses the previous block's attention map instead of computing its own


class Run(NamedTuple):
    """An owner of an attention map and the followers that use it."""

    tokens: int
    operator: str | None
    length: int

    def __str__(self) -> str:
        operator = f"@{self.operator}" if self.operator else ""
        length = f"*{self.length}" if self.length > 1 else ""
        return f"{self.tokens}{operator}{length}"


@dataclass(frozen=True)
class Architecture:
    """A path through the layered graph: one `Layer` per block.

    The canonical text lists its runs as `tokens[@operator][*length]`: "196*2 196 100@max2d*3" is a block and one
    follower at 196 patch tokens, a block with a map of its own, then max pooling to 100 tokens, a block and two
    followers. Two texts are equal exactly when the networks are.

    Raises ArchitectureError, naming the layer, where the layers contradict each other. Whether a *space* holds the
    architecture is the space's to say: `architecture in space`.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if type(self.layers) is not tuple or not self.layers:
            raise ArchitectureError(
                f"the layers are {self.layers!r:.80}; an architecture is a tuple of at least one Layer, "
                "for example that of Architecture.parse('196*2 100@max2d')"
            )
        if len(self.layers) > MAX_DEPTH:
            raise ArchitectureError(f"{len(self.layers)} layers are more than the {MAX_DEPTH} that any ViT has")
        previous: Layer | None = None
        for index, layer in enumerate(self.layers):
            if not _well_formed(layer):
                raise ArchitectureError(
                    f"layer {index} is {layer!r:.120}; expected Layer(tokens, operator, shared) with tokens a positive "
                    "whole number below 10^9, an operator's name or None, and True or False"
                )
            problem = _contradiction(previous, layer)
            if problem:
                raise ArchitectureError(f"layer {index} ({Run(layer.tokens, layer.operator, 1)}): {problem}")
            previous = layer

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Owners of attention maps with the number of blocks that use each."""
        runs: list[Run] = []
        for layer in self.layers:
            if layer.shared:
                runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
            else:
                runs.append(Run(layer.tokens, layer.operator, 1))
        return tuple(runs)

    def __str__(self) -> str:
        return " ".join(map(str, self.runs))

    @classmethod
    def from_runs(cls, runs: list[Run] | tuple[Run, ...]) -> Architecture:
        """The architecture whose `runs` these are."""
        for run in runs:
            if run.length < 1:
                raise ArchitectureError(f"{run!r} has length {run.length}; an owner alone is a run of length 1")
        depth = sum(run.length for run in runs)
        if depth > MAX_DEPTH:
            raise ArchitectureError(f"{depth:,} layers are more than the {MAX_DEPTH} that any ViT has")
        return cls(
            tuple(
                layer
                for run in runs
                for layer in (
                    Layer(run.tokens, run.operator),
                    *[Layer(run.tokens, None, True)] * (run.length - 1),
                )
            )
        )

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Read the canonical text. Raises ArchitectureError with the offending run and its position."""
        if not isinstance(text, str):
            raise ArchitectureError(f"an architecture is text such as '196*2 100@max2d*3', not {type(text).__name__}")
        runs = []
        for position, word in enumerate(text.split(), start=1):
            match = _RUN.fullmatch(word)
            if match is None:
                raise ArchitectureError(
                    f"run {position} of the architecture is {word[:40]!r}; expected tokens[@operator][*length], "
                    "for example 100@max2d*3"
                )
            runs.append(Run(int(match["tokens"]), match["operator"], int(match["length"] or 1)))
        return cls.from_runs(runs)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one entry per run; `from_json` reads it back."""
        return {"runs": [run._asdict() for run in self.runs]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Architecture:
        """Read what `to_json` gave. Raises ArchitectureError where it is anything else."""
        entries = value.get("runs") if isinstance(value, Mapping) else None
        if not isinstance(entries, list):
            raise ArchitectureError('the JSON of an architecture is an object {"runs": [...]}')
        runs = []
        for position, entry in enumerate(entries, start=1):
            if not isinstance(entry, Mapping) or set(entry) != set(Run._fields):
                raise ArchitectureError(f"run {position} of the JSON needs exactly the keys {', '.join(Run._fields)}")
            run = Run(entry["tokens"], entry["operator"], entry["length"])
            numbers = all(type(number) is int and 0 < number < 10**9 for number in (run.tokens, run.length))
            if not numbers or not (run.operator is None or isinstance(run.operator, str)):
                raise ArchitectureError(
                    f"run {position} of the JSON has a value of the wrong type: {dict(entry)!r:.120}"
                )
            if _RUN.fullmatch(str(run)) is None:
                raise ArchitectureError(f"run {position} of the JSON: {run.operator!r:.40} is not an operator name")
            runs.append(run)
        return cls.from_runs(runs)


def _well_formed(layer: object) -> bool:
    """Whether this is a Layer whose parts the canonical text can hold."""
    return (
        isinstance(layer, Layer)
        and type(layer.tokens) is int
        and 0 < layer.tokens < 10**9
        and type(layer.shared) is bool
        and (layer.operator is None or (type(layer.operator) is str and bool(_OPERATOR.fullmatch(layer.operator))))
    )


def _contradiction(previous: Layer | None, layer: Layer) -> str | None:
    """What is wrong with `layer` after `previous`, or None."""
    if previous is None:
        if layer.operator is not None or layer.shared:
            return "the first layer keeps all tokens and computes its own attention map"
        return None
    if layer.tokens > previous.tokens:
        return f"tokens cannot grow from {previous.tokens} to {layer.tokens}"
    if layer.tokens < previous.tokens:
        if layer.operator is None:
            return f"going from {previous.tokens} to {layer.tokens} tokens needs an operator, e.g. {layer.tokens}@max2d"
        if layer.shared:
            return "the first layer after pooling computes its own attention map"
    elif layer.operator is not None:
        return f"operator {layer.operator!r} has nothing to do: the previous layer has {previous.tokens} tokens too"
    return None
