"""Everything a search depends on, as one checked value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from poolshare.space import ConfigError, budget_quantity

SEARCHING = (
    "budget",
    "sampler",
    "objective",
    "latency_batch",
    "latency_dtype",
    "include",
)  # what to look for; trains nothing
WARM_LR, WARM_LR_PRETRAINED = 1e-3, 3e-4  # where a model begins with the supernet's weights
MAY_DIFFER = ("trials", "epochs", "workers", "device", *SEARCHING)  # between two calls on one run folder


class SearchConfig(BaseModel):
    """Everything a search depends on. What is not given, or None, is decided by the situation or the base model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    data: str
    data_dir: str | None = None
    download: bool = False
    search_fraction: float = Field(gt=0, lt=1)  # of the training images, to score architectures on
    model: str
    model_args: dict[str, Any] = {}
    pretrained: bool = False
    weights: str | None = None  # a safetensors file, instead of timm's pretrained ones
    img_size: int | None = Field(None, ge=1)
    in_chans: Literal[1, 3] | None = None
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

    @model_validator(mode="before")
    @classmethod
    def _decide(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in values.items() if value is not None}
        warm = bool(given.get("pretrained") or given.get("weights"))
        digits = given.get("data") == "digits"
        decided = {
            "model": "digits_vit" if digits else "vit_tiny_patch16_224",
            "search_fraction": 0.3 if digits else 0.2,  # few images: enough of them to tell architectures apart,
            "batch_size": 32 if digits else 64,  # and enough steps
            "epochs": 10 if warm else 40 if digits else 30,
            "lr": 3e-4 if warm else 2e-3,
        }
        if budget_quantity(str(given.get("budget", "%"))) == "nanoseconds":
            decided["objective"] = "latency"
        return decided | given

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
        return "latency_ms" if self.objective == "latency" else "macs"

    @property
    def without_weights(self) -> SearchConfig:
        """The same for those who take the weights from the run folder."""
        return self.model_copy(update={"pretrained": False, "weights": None})


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
