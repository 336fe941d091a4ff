"""Everything a search depends on, as one checked value."""

from __future__ import annotations

import json
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
from poolshare.space.presets import UNTRAINED

SEARCHING = (
    "budget",
    "sampler",
    "objective",
    "latency_batch",
    "latency_dtype",
    "include",
)  # what to look for; trains nothing
WARM_LR, WARM_LR_PRETRAINED = 1e-3, 3e-4  # where a model begins with the supernet's weights
ONLY_TRAINING = ("epochs", "batch_size", "lr", "weight_decay", "amp", "recipe", "search_fraction", "trials", "sampler")
IMAGES = 1000  # scored on, at most, where nothing is trained: more tell little more, and take time
# What lies there is compared, not its path.
PLACES = ("data", "data_dir", "download", "search_data", "weights", "class_map")
# Between two calls on one run folder.
MAY_DIFFER = ("trials", "epochs", "workers", "device", "threads", *SEARCHING, *PLACES)
NAMES = ("torch/", "hfds/", "python/")  # begin names of data; all others but "digits" are paths
ADDRESSES = ("hf-hub:", "hf_hub:", "local-dir:")  # begin weights that are no plain path


class SearchConfig(BaseModel):
    """Everything a search depends on. What is not given, or None, is decided by the situation or the base model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    data: str
    data_dir: str | None = None
    download: bool = False
    search_fraction: float = Field(gt=0, lt=1)  # of the training images, to score architectures on
    search_data: str | None = None  # a folder of images to score on instead
    training: bool = True  # False: search the model as it is, see `search.untrained`
    unlabelled: bool = False  # whether the images are a folder of pictures, scored by the dense model's answers alone
    images: int | None = Field(None, ge=2)  # without training: scored on at most so many
    scale_16bit: bool = False  # whether 16-bit grey images are taken, 65,535 as white
    model: str
    model_args: dict[str, Any] = {}
    pretrained: bool = False
    weights: str | None = None  # a file, folder or repository, instead of timm's pretrained ones
    class_map: str | None = None  # a file that names the outputs of the head
    preprocessing: dict[str, Any] = {}  # mean, std, interpolation and crop_pct, where the weights' card says other ones
    img_size: int | None = Field(None, ge=1)
    in_chans: int | None = Field(None, ge=1)
    levels: tuple[int, ...] | None = None
    operators: tuple[str, ...] | None = None
    max_run: int | None = Field(None, ge=1)
    sharing: Literal["qk", "map"] = "qk"  # what an owner hands to its followers, see `SuperNet.from_timm`
    budget: str | None = None
    sampler: Literal["auto", "exhaustive", "evolution", "random", "nsga2", "tpe"] = "auto"
    objective: Literal["macs", "latency"] = "macs"  # what is weighed against accuracy, and what a budget in % is of
    latency_batch: int = Field(1, ge=1)  # images of one forward whose latency counts
    latency_dtype: Literal["fp32", "bf16", "fp16"] | None = None  # of the models that are timed; None: see `deployed`
    include: tuple[str, ...] = ()  # architectures of the user's own
    trials: int = Field(1000, ge=1)
    epochs: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    amp: Literal["none", "bf16"] = "none"
    metric: str = "top1"  # name of the function that says which answers are right
    recipe: dict[str, Any] = {}  # other fields of `Recipe`
    workers: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    threads: int | None = Field(
        None, ge=1, le=1024
    )  # of PyTorch on a CPU; a run's record holds those it was computed with

    @model_validator(mode="wrap")
    @classmethod
    def _decide(cls, values: dict[str, Any], handler: ModelWrapValidatorHandler[SearchConfig]) -> SearchConfig:
        given = {name: value for name, value in values.items() if value is not None}
        warm = bool(given.get("pretrained") or given.get("weights"))
        digits = given.get("data") == "digits"
        decided: dict[str, Any] = {
            "model": "digits_vit" if digits else "vit_tiny_patch16_224",
            "search_fraction": 0.3 if digits else 0.2,  # few images: enough of them to tell architectures apart,
            "batch_size": 32 if digits else 64,  # and enough steps
            "epochs": 10 if warm else 40 if digits else 30,
            "lr": 3e-4 if warm else 2e-3,
        }
        if given.get("training") is False:
            decided |= {"epochs": 0, "operators": UNTRAINED, "max_run": 1, "budget": "70%", "images": IMAGES}
        if budget_quantity(str((decided | given).get("budget", "%"))) == "latency":
            decided["objective"] = "latency"
        config = handler(decided | given | normal_places(given))
        config.model_fields_set.intersection_update(given)
        return config

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
        return None if self.recipe.get("within") is None else float(self.recipe["within"])

    @property
    def cost(self) -> str:
        """The candidates' column of the objective."""
        return COSTS[self.objective].column

    @property
    def without_weights(self) -> SearchConfig:
        """The same for those who take the weights from the run folder."""
        return self.model_copy(update={"pretrained": False, "weights": None})


def normal_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """What names a place, where it is among the values, as an absolute path: one spelling for one place.

    A folder below `data_dir` becomes one path; names such as torch/cifar10 stay as they are.
    """
    normal = dict(values)
    data, data_dir = normal.get("data"), normal.get("data_dir")
    if isinstance(data, str) and data and isinstance(data_dir, str | os.PathLike | None):
        if data == "digits":
            normal["data_dir"] = None
        elif not data.startswith(NAMES):
            normal |= {"data": _absolute(Path(data_dir or "", data)), "data_dir": None}
        elif data_dir:
            normal["data_dir"] = _absolute(data_dir)
    for name in ("weights", "search_data", "class_map"):
        place = normal.get(name)
        if isinstance(place, str | os.PathLike) and os.fspath(place) and not str(place).startswith(ADDRESSES):
            normal[name] = _absolute(place)
    return {name: normal[name] for name in PLACES if name in normal}


def moved(data: str, data_dir: str | None, now: str | None, now_dir: str | None) -> tuple[str, str | None]:
    """Where data that were at `data` and `data_dir` are to be found, None meaning there, as `normal_places`.

    Raises ConfigError for a folder of data sets alone where the images are a folder of their own.
    """
    if now is None and now_dir is not None and not data.startswith(NAMES):
        raise ConfigError(f"--data-dir {now_dir} belongs to torch/… and hfds/… data; give --data FOLDER instead")
    wished = normal_places({"data": now or data, "data_dir": now_dir})
    same = wished["data"] == data
    return wished["data"], wished["data_dir"] or (data_dir if same else None)


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.path.expanduser(path))


def short_name(data: str) -> str:
    """What data are called where their place does not matter: the folder's own name."""
    return data if data.startswith(NAMES) else Path(data).name or data


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
