"""Options of base models and of training, read by the type their owner declares: timm's signature, a recipe's field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from poolshare.space import ModelError
from poolshare.space.architecture import MAX_DEPTH

from .heads.maps import HeadKind

# Values below these pass timm's checks, or fail deep inside it.
AT_LEAST = {"img_size": 1, "patch_size": 1, "in_chans": 1, "embed_dim": 1, "depth": 1, "num_heads": 1}
AT_LEAST |= {"num_classes": 0, "reg_tokens": 0, "mlp_ratio": 0}


def read_value(wanted: Any, value: Any) -> Any:
    """`value`, which may be text from a command line, as the annotated type `wanted`: "False" is False for a bool.

    Raises ValueError saying what it should be.
    """
    plain = [part for part in _parts(wanted) if part in (bool, int, float, str) or get_origin(part) in (tuple, Literal)]
    if isinstance(value, str) and value.strip().lower() in ("none", "null") and NoneType in _parts(wanted):
        return None
    if isinstance(value, bool) and plain and bool not in plain:  # pydantic reads it as 0 or 1, or as a text
        raise ValueError("a number is wanted, not true or false" if str not in plain else "a text is wanted")
    if not plain:  # a class or a function: only Python can give one
        if value is None or callable(value):
            return value
        raise ValueError("a class or a function is wanted, which only Python can give")
    if callable(value) and len(plain) < len(_parts(wanted)):
        return value
    try:
        union: Any = Union[tuple(plain)]  # noqa: UP007  # as many as there are
        return TypeAdapter(union, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        if value is None and NoneType in _parts(wanted):
            return None
        message = error.errors()[0]["msg"]
        raise ValueError(message[:1].lower() + message[1:]) from None


def _parts(wanted: Any) -> tuple[Any, ...]:
    """The members of a union, or the type by itself."""
    union = get_origin(wanted) is Union or type(wanted).__name__ == "UnionType"
    return get_args(wanted) if union else (wanted,)


@cache
def model_option_types() -> dict[str, Any]:
    """Options of the kinds of timm's models that are supported, and the types of their values."""
    hints: dict[str, Any] = {}
    for kind in (VisionTransformerRelPos, Beit, Eva, VisionTransformer):
        hints |= get_type_hints(kind.__init__)
    hints |= {"head": HeadKind | None, "head_blocks": int | None}  # ours, see `heads.maps`
    names = hints.keys() - {"self", "device", "dtype", "return"}
    return {name: hints[name] for name in sorted(names)}


def read_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of model `name`, each read by the type that timm's signature has.

    Options come from files and command lines too, and timm's own ones beside these would read other files, or load
    weights from them. Raises ModelError for one that is not a property of a supported model, or has another type.
    """
    known, found = model_option_types(), {}
    for option, value in options.items():
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"{option}={value!r:.80} is not an option of model {name!r} that may be given here{hint}")
        try:
            found[option] = read_value(known[option], value)
        except ValueError as error:
            raise ModelError(f"{option}={value!r:.80} of model {name!r} cannot be read: {error}") from None
        least, numbers = AT_LEAST.get(option), found[option]
        if least is not None and min(numbers if isinstance(numbers, tuple) else (numbers,)) < least:
            raise ModelError(f"{option}={value!r:.80} of model {name!r} must be at least {least}")
    depth = found.get("depth", 1)
    if depth > MAX_DEPTH:
        raise ModelError(f"depth={depth} of model {name!r}: at most {MAX_DEPTH} layers are supported")
    return found
