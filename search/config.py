"""Everything a search depends on, as one checked value."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from poolshare.space import COSTS, ConfigError, budget_quantity
from poolshare.space.data_kind import DataKind, is_place, split_name
from poolshare.space.presets import UNTRAINED

# What to look for; trains nothing.
SEARCHING = ("budget", "sampler", "score", "objective", "latency_batch", "latency_dtype", "include")
WARM_LR, WARM_LR_PRETRAINED = 1e-3, 3e-4  # where a model begins with the supernet's weights
# The path of a pretrained model, at 60 % of its MACs, in epochs of the tuning: 15 of it, 3 × 1.7 of a supernet, 5 for the
# trials, 9 for a retraining on all training images; without a supernet about 4 for the race instead of the 10, and 11.
TUNE_EPOCHS, GUIDED_EPOCHS, GUIDED_TRIALS = 15, 3, 100
RETRAIN_EPOCHS, RETRAIN_EPOCHS_GUIDED, RETRAIN_EPOCHS_FROM_SCRATCH = 15, 8, 30
LEAST_STEPS = 250  # of a tuning or retraining by default: of few images an epoch is a few steps (results/defaults)
FEW_IMAGES = 5000  # to train on: with fewer, the tuned dense model is searched as it is (results/defaults)
ONLY_TRAINING = (
    "tune_epochs",
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "amp",
    "recipe",
    "search_fraction",
    "trials",
    "sampler",
)
IMAGES = 1000  # scored on, at most, where nothing is trained: more add little and take time
# What lies there is compared, not its path.
PLACES = ("data", "data_dir", "download", "search_data", "weights", "class_map")
# Between two calls on one run folder.
MAY_DIFFER = ("trials", "epochs", "workers", "device", "threads", "check_images", "tracker", *SEARCHING, *PLACES)
LOCAL = "local-dir:"  # begins a folder in timm's words
ADDRESSES = ("hf-hub:", "hf_hub:", LOCAL)  # begin weights that are no plain path


def option(default: Any, help: str, metavar: str | None = None, **limits: Any) -> Any:
    """A field that is an option of the command line too, which reads here what it needs to know of it.

    default: ... where it is decided by the situation, or required. A help text with "Default:" describes such a decision.
    """
    return Field(default, description=help, json_schema_extra={"metavar": metavar}, **limits)


class SearchConfig(BaseModel):
    """Everything a search depends on. What is not given, or None, is decided by the situation or the base model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    data: str = option(
        ...,
        "digits, a folder of class folders, wds/FOLDER of WebDataset shards, torch/fashion_mnist, torch/cifar10, hfds/….",
        metavar="DATA",
    )
    model: str = option(
        ...,
        "A timm Vision Transformer, or local-dir:FOLDER or hf-hub:NAME, with its weights. Default: vit_tiny_patch16_224.",
    )
    task: str = option(
        "classification",
        "What the model is trained and judged for: classification, multilabel (--data with a labels.csv), segmentation "
        "(with images/ and masks/), or embedding (the dense model's features, without labels).",
        metavar="NAME",
    )
    head: Literal["linear", "conv"] | None = option(
        None,
        "What answers for every pixel: a linear or a light convolutional head. Default: conv with --task segmentation.",
    )
    ignore_index: int = option(255, "The value of a mask's pixels that count for nothing.", ge=0)
    training: bool = True  # False: search the model as it is, see `search.untrained`
    unlabelled: bool = option(False, "With --no-training: take all pictures below --data, and no labels.")
    pretrained: bool = option(False, "Begin with timm's pretrained weights.")
    weights: str | None = option(
        None,
        "Begin with these instead: a safetensors or torch file for --model, or a folder with timm's config.json.",
        metavar="FILE",
    )
    class_map: str | None = option(
        None,
        "The classes of the weights' head: one folder's name a line, in the order of its outputs; or JSON. Default: as the "
        "weights say, else in the data's order.",
        metavar="FILE",
    )
    preprocessing: dict[str, Any] = {}  # mean, std, interpolation and crop_pct, where the weights' card says other ones
    budget: str | None = option(
        None,
        "Per image: 60% (of the dense model's MACs, or latency where that is the objective), 0.7G or 350M MACs, or 12ms "
        "(latency of one image in a batch of --latency-batch).",
        metavar="BUDGET",
    )
    levels: tuple[int, ...] | Literal["auto", "even"] | None = option(
        None,
        "Patch-token counts, falling, e.g. 196,100,49; even: about ten, evenly spaced; auto: likewise, where matrices with the "
        "prefix tokens are of sizes that devices like. Default: all, a half, a quarter; of pretrained weights even.",
        metavar="N,N,…",
    )
    operators: tuple[str, ...] | None = option(
        None, "Pooling operators to choose from, e.g. max2d,avg2d; help lists them.", metavar="NAME,…"
    )
    max_run: int | None = option(
        None, "How many layers in a row may use one attention map, at most (1: no sharing).", ge=1
    )
    sharing: Literal["qk", "map"] = option(
        "qk", "How attention is shared: by queries and keys (fused kernels), or by a written map (fewer MACs)."
    )
    sampler: Literal["auto", "exhaustive", "evolution", "random", "nsga2", "tpe"] = option(
        "auto", "auto scores the whole space where affordable, and races where no supernet is trained."
    )
    score: Literal["metric", "loss", "divergence"] = option(
        ...,
        "What architectures are compared by: the task's score (top-1), its loss, or divergence from the dense model's "
        "answers. Default: metric; with --no-training divergence.",
    )
    objective: Literal["macs", "latency"] = option(
        "macs", "Weighed against accuracy; latency is measured on --device. Default: macs; latency for 12ms."
    )
    latency_batch: int = option(1, "Images in the batch whose latency counts.", ge=1)
    latency_dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, "Precision of the models whose latency is measured. Default: bf16 with --amp bf16, else fp32."
    )
    include: tuple[str, ...] = option((), "Score this architecture of yours too; repeatable.", metavar="TEXT")
    trials: int = option(..., "Architectures to try where not all are scored. Default: 1000, after a tuning 100.", ge=1)
    tune_epochs: int = option(
        ..., "Epochs of the dense model, before all else. Default: 15 for a warm start's new head, else 0.", ge=0
    )
    epochs: int = option(
        ...,
        f"Supernet epochs. Default: 30, digits 40, warm start 10, after a tuning 3, or 0 for fewer than {FEW_IMAGES} training "
        "images: the dense model is then searched as it is.",
        ge=0,
    )
    guided: bool | None = None  # whether the supernet learns from the dense model; None: the model's head decides
    drawn_within: float | None = None  # share of the dense MACs that a guided training keeps to: the first budget's
    batch_size: int = option(..., "Images of one training step. Default: 64, digits 32.", ge=1)
    lr: float = option(..., "Peak learning rate. Default: 2e-3, warm start 3e-4.", gt=0)
    weight_decay: float = Field(0.05, ge=0)
    img_size: int | tuple[int, int] | None = option(
        None,
        "The input image in pixels: the side of a square, or its height and width, as in 240x320. Default: the model's.",
        metavar="N|HxW",
    )
    in_chans: int | None = option(
        None, "Channels of the input: 3, or 1 for grey image files. Default: the model's.", ge=1
    )
    model_args: dict[str, Any] = option(
        {}, "Options for timm.create_model, e.g. depth=6,patch_size=4.", metavar="KEY=VALUE,…"
    )
    data_dir: str | None = option(None, "Where torch/… and hfds/… data lie.", metavar="FOLDER")
    download: bool = option(False, "Let timm download the data set into --data-dir.")
    search_fraction: float = option(
        ..., "Share of the training images to score on. Default: 0.2, digits 0.3.", gt=0, lt=1
    )
    search_data: str | None = option(
        None,
        "Score on these class folders instead. Default: val/ where there is a test/ beside it.",
        metavar="FOLDER",
    )
    search_images: int = option(
        ..., "Score on at most so many images. Default: 10000, with --no-training 1000.", metavar="N", ge=2
    )
    check_images: Literal["once", "now", "never"] = option(
        "once",
        "When image files are decoded as a check: once, and again where a file has changed; now, all of them; never.",
    )
    scale_16bit: bool = option(False, "Take 16-bit grey images, 65,535 as white; else they are refused.")
    workers: int = option(0, "Processes that load images.", ge=0)
    amp: Literal["none", "bf16"] = option("none", "Automatic mixed precision in training.")
    tracker: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = option(
        (), "tensorboard, wandb or mlflow show the training too, from files in RUN; repeatable.", metavar="NAME"
    )
    recipe: dict[str, Any] = option(
        {},
        "More of how to train: mixup=0.8,cutmix=1,label_smoothing=0.1,ema=0.999,accumulate=2,warmup=0.1,…; supernet/README.md "
        "lists all.",
        metavar="KEY=VALUE,…",
    )
    seed: int = option(0, "What all random choices are keyed by.", ge=0, le=2**32 - 1)
    device: str = option("auto", "cpu, cuda, cuda:1, … Default: cuda where there is one.")
    threads: int | None = option(
        None,
        "Of PyTorch on a CPU. Default: OMP_NUM_THREADS where it is set; else as recorded; else the fastest by timed steps.",
        ge=1,
        le=1024,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _decide(cls, values: dict[str, Any], handler: ModelWrapValidatorHandler[SearchConfig]) -> SearchConfig:
        given = {name: value for name, value in values.items() if value is not None}
        warm = bool(given.get("pretrained") or given.get("weights"))
        digits = DataKind.of(str(given.get("data"))) is DataKind.DIGITS
        decided: dict[str, Any] = {
            "model": "digits_vit" if digits else "vit_tiny_patch16_224",
            "search_fraction": 0.3 if digits else 0.2,  # few images: enough of them to tell architectures apart,
            "batch_size": 32 if digits else 64,  # and enough steps
            "epochs": 10 if warm else 40 if digits else 30,
            "lr": 3e-4 if warm else 2e-3,
            "trials": 1000,
            "tune_epochs": 0,
            "score": "metric",
            "search_images": 10_000,
        }
        if given.get("training") is False:
            decided |= {
                "epochs": 0,
                "operators": UNTRAINED,
                "max_run": 1,
                "budget": "70%",
                "search_images": IMAGES,
                "score": "divergence",
            }
        elif warm and given.get("epochs") != 0 and given.get("tune_epochs") != 0:
            decided |= {"tune_epochs": TUNE_EPOCHS, "epochs": GUIDED_EPOCHS, "trials": GUIDED_TRIALS}
        if budget_quantity(str((decided | given).get("budget", "%"))) == "latency":
            decided["objective"] = "latency"
        config = handler(decided | given | normal_places(given))
        config.model_fields_set.intersection_update(given)
        return config

    @field_validator("img_size", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        """One number for a square, so that there is one way to write it."""
        sides = value if isinstance(value, (tuple, list)) else (value, value)
        if value is None:
            return None
        if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
            raise ValueError("a size in pixels is a number such as 224, or height and width such as 240 and 320")
        return sides[0] if sides[0] == sides[1] else tuple(sides)

    @field_validator("model_args", "recipe")
    @classmethod
    def _finite(cls, values: dict[str, Any]) -> dict[str, Any]:
        """JSON, in which a run is kept, knows neither inf nor nan."""
        try:
            json.dumps(values, allow_nan=False)
        except ValueError:
            raise ValueError("inf and nan cannot be kept in a run's record; give finite numbers") from None
        except TypeError:  # no JSON at all: whoever takes these values says what is wrong
            pass
        return values

    @property
    def given(self) -> frozenset[str]:
        """The names of what was not left to a default."""
        return frozenset(self.model_fields_set)

    def at(self, data: str | None = None, data_dir: str | None = None, weights: str | None = None) -> SearchConfig:
        """The same, with the images or the weights elsewhere, see `moved`; None: where they were."""
        there, folder = moved(self.data, self.data_dir, data, data_dir)
        return self.changed(data=there, data_dir=folder, **normal_places({"weights": weights} if weights else {}))

    def changed(self, **values: Any) -> SearchConfig:
        """The same with other values, which are not checked and do not count as given."""
        copy = self.model_copy(update=values)
        copy.model_fields_set.intersection_update(self.given)
        return copy

    @property
    def title(self) -> str:
        """Model and data as people name them."""
        return f"{self.model.partition('.')[0]} on {short_name(self.data)}"

    @property
    def warm(self) -> bool:
        """Whether the supernet begins with pretrained weights."""
        return self.pretrained or self.weights is not None

    @property
    def deployed(self) -> str:
        """The precision of the models that are timed: the one asked for, else that of the training."""
        return self.latency_dtype or ("bf16" if self.amp == "bf16" else "fp32")

    @property
    def finetune_lr(self) -> float:
        """Peak learning rate where a model goes on from the supernet's weights."""
        return WARM_LR_PRETRAINED if self.warm else WARM_LR

    @property
    def within(self) -> float | None:
        """Share of the dense MACs that the supernet's training keeps to; None: it trains the whole space."""
        within = self.recipe.get("within") or self.drawn_within
        return None if within is None else float(within)

    @property
    def trains(self) -> bool:
        """Whether anything is trained before the search."""
        return self.epochs > 0 or self.tune_epochs > 0

    @property
    def races(self) -> bool:
        """Whether a dense model is searched as it is, see `search.untrained`: there is no supernet to train, and no study."""
        return not self.training or (bool(self.guided) and self.epochs == 0 and self.sampler == "auto")

    @property
    def teaches(self) -> bool:
        """Whether the dense model teaches a retraining by default.

        Not where it was tuned here on a part of few images: labels of all of them teach more (results/defaults).
        """
        return not (self.races and self.tune_epochs > 0)

    @property
    def cost(self) -> str:
        """The candidates' column of the objective."""
        return COSTS[self.objective].column

    @property
    def without_weights(self) -> SearchConfig:
        """The same for those who take the weights from the run folder."""
        return self.model_copy(update={"pretrained": False, "weights": None})


def enough_epochs(epochs: int, steps: int) -> int:
    """So many epochs of so many steps, or as many more as LEAST_STEPS take."""
    return max(epochs, math.ceil(LEAST_STEPS / steps))


def retraining_epochs(config: SearchConfig, images: int) -> int:
    """Of `retrain` by default, from the weights of a search."""
    usual = RETRAIN_EPOCHS_GUIDED if config.guided and config.teaches else RETRAIN_EPOCHS
    return enough_epochs(usual, max(images // config.batch_size, 1))


def normal_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """What names a place, where it is among the values, as an absolute path: one spelling for one place.

    A folder below `data_dir` becomes one path; names such as torch/cifar10 stay as they are.
    """
    normal = dict(values)
    data, data_dir = normal.get("data"), normal.get("data_dir")
    if isinstance(data, str) and data and isinstance(data_dir, str | os.PathLike | None):
        kind = DataKind.of(data)
        if kind is DataKind.DIGITS:
            normal["data_dir"] = None
        elif kind in (DataKind.FOLDER, DataKind.SHARDS):
            prefix, path = split_name(data)
            normal |= {"data": prefix + _absolute(Path(data_dir or "", path)), "data_dir": None}
        else:
            prefix, path = split_name(data)
            if kind is DataKind.HUB and os.path.isdir(os.path.expanduser(path)):
                normal["data"] = prefix + _absolute(path)
            if data_dir:
                normal["data_dir"] = _absolute(data_dir)
    for name in ("weights", "search_data", "class_map"):
        place = normal.get(name)
        if isinstance(place, str | os.PathLike) and os.fspath(place):
            normal[name] = _address(os.fspath(place))
    return {name: normal[name] for name in PLACES if name in normal}


def moved(data: str, data_dir: str | None, now: str | None, now_dir: str | None) -> tuple[str, str | None]:
    """Where data that were at `data` and `data_dir` are to be found, None meaning there, as `normal_places`.

    Raises ConfigError for a folder of data sets alone where the images are a folder of their own.
    """
    if now is None and now_dir is not None and DataKind.of(data) not in (DataKind.TORCH, DataKind.HUB):
        raise ConfigError(f"--data-dir {now_dir} belongs to torch/… and hfds/… data; give --data FOLDER instead")
    wished = normal_places({"data": now or data, "data_dir": now_dir})
    same = wished["data"] == data
    return wished["data"], wished["data_dir"] or (data_dir if same else None)


def _address(place: str) -> str:
    if place.startswith(LOCAL):
        return LOCAL + _absolute(place.removeprefix(LOCAL))
    return place if place.startswith(ADDRESSES) else _absolute(place)


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.path.expanduser(path))


def short_name(data: str) -> str:
    """What data are called where their place does not matter: the folder's own name."""
    return (Path(data).name or data) if is_place(data) else data


def check_recipe_names(recipe: Mapping[str, Any]) -> None:
    """Raise ConfigError where a recipe names what has an option of its own."""
    for name in ("epochs", "batch_size", "lr", "amp"):
        if name in recipe:
            raise ConfigError(f"--recipe {name}={recipe[name]}: leave it out, --{name.replace('_', '-')} decides it")


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic found wrong, with the option's name."""
    problem = error.errors()[0]
    option = "--" + ".".join(map(str, problem["loc"])).replace("_", "-")
    return f"{option} {problem.get('input')!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def checked_config(**values: Any) -> SearchConfig:
    """A SearchConfig. Raises ConfigError naming the option and what it may be."""
    try:
        return SearchConfig(**values)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None
