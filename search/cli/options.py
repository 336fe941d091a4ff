"""Options that several verbs share, and their texts read: lists, settings, a checked configuration."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from poolshare.space import OPERATORS
from poolshare.space.errors import ConfigError, ModelError, SpaceError

from ..config import SearchConfig, check_recipe_names

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of tables.")]


def _hush(quiet: bool) -> bool:
    if quiet:  # timm's own lines too; our errors and notes say what matters
        logging.getLogger("timm").setLevel(logging.ERROR)
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.", callback=_hush)]


def option(name: str, *declarations: str, help: str | None = None) -> Any:
    """The option of a verb that is a field of SearchConfig: its help, limits and name there."""
    field = SearchConfig.model_fields[name]
    extra: Any = field.json_schema_extra or {}
    limits = {
        key: value for part in field.metadata for key in ("ge", "le") if (value := getattr(part, key, None)) is not None
    }
    return typer.Option(
        *declarations,
        help=help or field.description,
        metavar=extra.get("metavar"),
        min=limits.get("ge"),
        max=limits.get("le"),
        callback=_list_operators if name == "operators" else None,
        is_eager=name == "operators",
    )


def _list_operators(text: str | None) -> str | None:
    if text == "help":
        for operator in OPERATORS.values():
            print(f"{operator.name:<11} {operator.summary}")
        raise typer.Exit
    return text


Budget = Annotated[str | None, option("budget")]
ImgSize = Annotated[str | None, option("img_size")]
InChans = Annotated[int | None, option("in_chans")]
Levels = Annotated[str | None, option("levels")]
MaxRun = Annotated[int | None, option("max_run")]
ModelArgs = Annotated[str | None, option("model_args")]
Operators = Annotated[str | None, option("operators")]
Sharing = Annotated[Literal["qk", "map"], option("sharing")]
RecipeChanges = Annotated[str | None, option("recipe")]
DataDir = Annotated[str | None, option("data_dir")]
Download = Annotated[bool, option("download", "--download")]
Device = Annotated[str | None, option("device")]
LatencyBatch = Annotated[int, option("latency_batch")]
LatencyDtype = Annotated[Literal["fp32", "bf16", "fp16"] | None, option("latency_dtype")]
Threads = Annotated[int | None, option("threads")]
Workers = Annotated[int, option("workers")]
Amp = Annotated[Literal["none", "bf16"], option("amp")]
Tracker = Annotated[
    list[str] | None,
    option("tracker", help="tensorboard, wandb or mlflow show the training too, from the folder DIR-logs; repeatable."),
]
Seed = Annotated[int, option("seed")]
OtherData = Annotated[str | None, option("data", "--data", help="Default: what the model was searched on.")]
DataHere = Annotated[
    str | None, option("data", "--data", help="Where the search's images lie here. Default: as there.")
]
SearchAmp = Annotated[
    Literal["none", "bf16"] | None, option("amp", help="Automatic mixed precision. Default: as in the search.")
]
SearchBatch = Annotated[
    int | None, option("batch_size", help="Images of one training step. Default: as in the search.")
]
PickName = Literal["finalist", "half-point", "knee", "budget", "accuracy"]
Storage = Annotated[
    str | None,
    typer.Option(
        help="PostgreSQL that holds the study, for workers on several machines: postgresql://USER:PASSWORD@HOST/DATABASE. "
        "Default: a journal in RUN.",
        metavar="URL",
        envvar="POOLSHARE_STORAGE",
        show_envvar=True,
    ),
]


def with_search_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with every option of SearchConfig before its own; it gets them as its last parameter, **options."""
    *own, _ = inspect.signature(verb, eval_str=True).parameters.values()
    generated = [_parameter(name, field) for name, field in SearchConfig.model_fields.items() if field.description]
    parameters = [*generated, *(part.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in own)]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {part.name: part.annotation for part in parameters}
    return verb


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A field as typer takes a parameter: lists and settings as text, for `read_options`."""
    annotation: Any = field.annotation
    default, flag = field.default, f"--{name.replace('_', '-')}"
    if "Default:" in (field.description or ""):  # as the help says, and only known once all is given
        annotation, default = annotation | None, None
    if name in READERS:
        annotation, default = str | None, None
    elif default == ():  # repeatable
        annotation, default = list[str] | None, None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is PydanticUndefined else default,
        annotation=Annotated[annotation, option(name, flag)],
    )


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2, default=str))


def words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(word) for word in text.split(","))
    except ValueError:
        raise SpaceError(f"{option} {text!r} is not a list of whole numbers; write for example 196,100,49") from None


def sides_of(text: str) -> int | tuple[int, ...]:
    """--img-size read: "224" → 224, "240x320" → (240, 320)."""
    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", text):
        raise ConfigError(f"--img-size {text!r} is not a size in pixels; write 224, or height and width as in 240x320")
    height, *width = map(int, text.split("x"))
    return (height, *width) if width else height


def levels(text: str) -> tuple[int, ...] | str | None:
    """--levels read: token counts, or the name of a rule for them."""
    return text if text in ("auto", "even") else integers("--levels", text)


def settings_of(
    text: str | None, option: str = "--model-args", example: str = "depth=6,patch_size=4"
) -> dict[str, Any]:
    """ "depth=6,patch_size=4" → {"depth": 6, "patch_size": 4}; values are JSON where they can be, else text.

    What a value means is its owner's to say: `model_args_of` and `recipe_of` read it by its type.
    """
    settings: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"{option} {part!r} is not KEY=VALUE; write for example {example}")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = value.strip()
    return settings


def model_args_of(model: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of --model-args read: options of timm's VisionTransformer, each by its type."""
    if not settings:
        return {}
    from poolshare.supernet.options import read_options

    try:
        return read_options(model or "the default", settings)
    except ModelError as error:
        raise ModelError(f"--model-args {error}") from None


def recipe_of(text: str | None) -> dict[str, Any]:
    """--recipe read: fields of `Recipe`, each by its type; those that have a flag of their own are refused."""
    changes = settings_of(text, "--recipe", "mixup=0.8,label_smoothing=0.1")
    if not changes:
        return {}
    from ..job.recipes import read_recipe

    check_recipe_names(changes)
    return read_recipe(changes)


READERS: dict[str, Callable[[str], Any]] = {
    "levels": levels, "operators": words, "img_size": sides_of, "model_args": settings_of, "recipe": recipe_of,
}  # fmt: skip


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a search with those that are lists or settings read; what was not given is left out."""
    given = {name: value for name, value in options.items() if value is not None}
    values = {name: READERS[name](value) if name in READERS else value for name, value in given.items()}
    if "model_args" in values:
        values["model_args"] = model_args_of(values.get("model"), values["model_args"])
    return values
