"""Options that several verbs share, and their texts read: lists, settings, a checked configuration."""

from __future__ import annotations

import json
import logging
import os
from typing import Annotated, Any, Literal

import typer

from poolshare.space.errors import ConfigError, ModelError, SpaceError

from ..console import PlainConsole

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of tables.")]


def _hush(quiet: bool) -> bool:
    if quiet:  # timm's own lines too; our errors and notes say what matters
        logging.getLogger("timm").setLevel(logging.ERROR)
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.", callback=_hush)]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Per image: 60% (of the dense model's MACs, or latency where that is the objective), 0.7G or 350M MACs, or "
        "12ms (latency of one image in a batch of --latency-batch).",
        metavar="BUDGET",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Begin with these instead: a safetensors or torch file for --model, or a folder with timm's config.json.",
        metavar="FILE",
    ),
]
ClassMap = Annotated[
    str | None,
    typer.Option(
        help="The classes of the weights' head: one folder's name a line, in the order of its outputs; or JSON. Default: "
        "as the weights say, else in the data's order.",
        metavar="FILE",
    ),
]
Levels = Annotated[
    str | None,
    typer.Option(
        help="Patch-token counts, falling, e.g. 196,100,49. Default: all, a half, a quarter.", metavar="N,N,…"
    ),
]
Operators = Annotated[
    str | None, typer.Option(help="Pooling operators to choose from, e.g. max2d,avg2d.", metavar="NAME,…")
]
MaxRun = Annotated[
    int | None, typer.Option(help="How many layers in a row may use one attention map, at most (1: no sharing).")
]
Sharing = Annotated[
    Literal["qk", "map"],
    typer.Option(
        help="How attention is shared: by queries and keys (fused kernels), or by a written map (fewer MACs)."
    ),
]
LatencyDtype = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    typer.Option(help="Precision of the models whose latency is measured. Default: bf16 with --amp bf16, else fp32."),
]
ModelArgs = Annotated[
    str | None,
    typer.Option(help="Options for timm.create_model, e.g. depth=6,patch_size=4.", metavar="KEY=VALUE,…"),
]
ImgSize = Annotated[int | None, typer.Option(help="Side of the square input image in pixels. Default: the model's.")]
InChans = Annotated[
    int | None, typer.Option(help="Channels of the input: 3, or 1 for grey image files. Default: the model's.")
]
DataName = Annotated[
    str,
    typer.Option(
        "--data", help="digits, a folder of class folders, torch/fashion_mnist, torch/cifar10, hfds/….", metavar="DATA"
    ),
]
OtherData = Annotated[
    str | None, typer.Option("--data", help="Default: what the model was searched on.", metavar="DATA")
]
DataHere = Annotated[
    str | None,
    typer.Option("--data", help="Where the search's images lie here. Default: as there.", metavar="DATA"),
]
DataDir = Annotated[str | None, typer.Option(help="Where torch/… and hfds/… data lie.", metavar="FOLDER")]
Download = Annotated[bool, typer.Option("--download", help="Let timm download the data set into --data-dir.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: cuda where there is one.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Of PyTorch on a CPU. Default: OMP_NUM_THREADS where it is set; else as recorded; else the fastest by timed "
        "steps.",
    ),
]
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
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images.")]
Amp = Annotated[Literal["none", "bf16"], typer.Option(help="Automatic mixed precision in training.")]
SearchAmp = Annotated[
    Literal["none", "bf16"] | None, typer.Option("--amp", help="Automatic mixed precision. Default: as in the search.")
]
SearchBatch = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images of one training step. Default: as in the search."),
]
RecipeChanges = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="More of how to train: mixup=0.8,cutmix=1,label_smoothing=0.1,ema=0.999,accumulate=2,warmup=0.1,…; "
        "the README lists all.",
        metavar="KEY=VALUE,…",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="What all random choices are keyed by.")]


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2, default=str))


def make_config(**values: Any) -> Any:
    from ..config import checked_config

    return checked_config(**values)


def words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(word) for word in text.split(","))
    except ValueError:
        raise SpaceError(f"{option} {text!r} is no list of whole numbers; write for example 196,100,49") from None


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


def model_args_of(model: str | None, text: str | None) -> dict[str, Any]:
    """--model-args read: options of timm's VisionTransformer, each by its type."""
    settings = settings_of(text)
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
    from ..config import check_recipe_names
    from ..job.prepare import read_recipe

    check_recipe_names(changes)
    return read_recipe(changes)


def helping() -> bool:
    """Whether torchrun started this process to help another one, which writes and prints."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def progress_console(quiet: bool) -> PlainConsole:
    """Where progress goes: standard error."""
    return PlainConsole(stderr=True, quiet=quiet or helping())
