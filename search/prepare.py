"""What a configuration means, brought to life: its data, its supernet, exact costs, the budget. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from rich.console import Console
from timm.data import resolve_data_config

from poolshare.space import (
    Architecture,
    Band,
    BudgetError,
    ConfigError,
    CostTable,
    ModelError,
    RunError,
    forecast_space,
    parse_budget,
)
from poolshare.space.presets import space_for
from poolshare.supernet import SuperNet, distributed, measure_macs, measure_parameters
from poolshare.supernet.checkpoint import load_facts, load_tensors, shapes_of
from poolshare.supernet.data import Data, open_data
from poolshare.supernet.latency import Latency
from poolshare.supernet.model import create_base
from poolshare.supernet.own_data import Parts, open_own
from poolshare.supernet.recipe import Recipe
from poolshare.supernet.weights import load_base_weights

from .config import SearchConfig, check_recipe_names, first_problem
from .evaluate import Metric, check_metric, metric_name, top1
from .progress import progress_bar
from .run import RunFolder

# "auto" scores the whole space where that costs no more than so many single evaluations: what a published ViT search
# spends on the candidates it happens to try (ALGORITHMS: 3,350).
EXHAUSTIVE_PRICE = 3000


@dataclass(frozen=True)
class Job:
    """A configuration brought to life: data, supernet (untrained or pretrained) and exact costs."""

    config: SearchConfig
    data: Data
    supernet: SuperNet
    macs: CostTable
    parameters: CostTable
    allowed: Band  # the architectures within the budget; within one of latency once that is measured
    include: tuple[Architecture, ...] = ()  # the user's own, to be scored in any case
    latency: Latency | None = None
    metric: Metric = top1  # which answers count as right
    notes: tuple[str, ...] = ()  # what the user should know of data and weights

    @property
    def dense(self) -> Architecture:
        """All tokens, no sharing: the base model."""
        return self.supernet.space[0]

    @property
    def objective(self) -> CostTable:
        """What is weighed against accuracy."""
        return self.latency.table if self.latency and self.config.objective == "latency" else self.macs

    def with_latency(self, latency: Latency) -> Job:
        """The same, knowing what a layer takes. Raises BudgetError for a latency budget that no architecture keeps."""
        job, config, table = replace(self, latency=latency), self.config, latency.table
        if config.objective != "latency":
            return job
        dense = table.total(self.dense)
        limit = None if config.budget is None else parse_budget(config.budget, dense, table.quantity)
        return replace(job, allowed=self.supernet.space.within(table, None, limit))

    @property
    def recipe(self) -> Recipe:
        """How to train the supernet."""
        return supernet_recipe(self.config)

    @property
    def exhaustive(self) -> bool:
        """Whether the whole space will be scored."""
        if self.config.sampler != "auto":
            return self.config.sampler == "exhaustive"
        whole = forecast_space(self.supernet.space, self.macs)
        return whole.cost <= EXHAUSTIVE_PRICE * whole.one_by_one / whole.architectures


def supernet_recipe(config: SearchConfig) -> Recipe:
    """How a configuration trains its supernet. Raises ConfigError naming what the recipe cannot have."""
    check_recipe_names(config.recipe)
    for name in ("drop_path", "distill"):
        if name in config.recipe:
            raise ConfigError(
                f"--recipe {name}={config.recipe[name]}: that belongs to `poolshare retrain`; leave it out"
            )
    situation: dict[str, Any] = {"layer_decay": 0.75 if config.warm else None}
    flags = ("epochs", "batch_size", "lr", "weight_decay", "amp")
    return checked_recipe(situation | {name: getattr(config, name) for name in flags} | config.recipe)


def checked_recipe(values: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """A Recipe; changes that are None are left out. Raises ConfigError naming the field and what it may be."""
    values = {**values, **{name: value for name, value in (changes or {}).items() if value is not None}}
    try:
        return Recipe(**values)
    except ValidationError as error:
        name, problem = str(error.errors()[0]["loc"][0]), first_problem(error)
        if name not in ("epochs", "batch_size", "lr", "amp"):  # those that are flags
            problem = f"--recipe {name}={values[name]}: {error.errors()[0]['msg']}; there are {', '.join(Recipe.model_fields)}"
        raise ConfigError(problem) from None


def prepare(
    config: SearchConfig,
    progress: Callable[[int, int], None] | None = None,
    data: Data | None = None,
    metric: Metric = top1,
) -> Job:
    """Open data and model of a configuration and measure all costs; nothing is trained or written.

    data, metric: those that were given in Python, under the names that stand in the configuration.
    Raises the PoolshareError of whatever does not fit.
    """
    if config.metric != metric_name(metric):
        raise ConfigError(
            f"this run is scored by {config.metric}, a function given in Python: go on with what `poolshare.search.search` "
            "returned, or give it to `poolshare.search.work`"
        )
    options, recipe = model_options(config), supernet_recipe(config)
    if config.budget is not None:  # one that cannot be read is refused first
        parse_budget(config.budget, 1, "nanoseconds" if config.objective == "latency" else "macs")
    data_config = input_config(config.model, options, recipe)
    data = data or open_data(
        config.data,
        data_dir=config.data_dir,
        download=config.download,
        search_fraction=config.search_fraction,
        seed=config.seed,
        progress=progress,
        augmentation=recipe.augmentation,
        **opening_options(data_config),
    )
    check_metric(metric, len(data.classes))
    torch.manual_seed(config.seed)
    options |= {"num_classes": len(data.classes)}
    supernet = make_supernet(config, options)
    notes = data.notes
    if config.weights is not None:
        notes += load_base_weights(supernet, Path(config.weights).expanduser(), config.model)
    macs = measure_macs(supernet)
    dense = macs.total(supernet.space[0])
    timed = config.objective == "latency"
    limit = None if config.budget is None or timed else parse_budget(config.budget, dense)
    allowed = supernet.space.within(macs, None, limit)
    if recipe.within is not None:
        try:
            supernet.space.within(macs, None, int(recipe.within * dense))
        except BudgetError as error:
            raise ConfigError(f"--recipe within={recipe.within:g} leaves nothing to train: {error}") from None
        if not timed and recipe.within < 1 and (limit is None or limit > recipe.within * dense):
            raise ConfigError(
                f"--recipe within={recipe.within:g} trains architectures up to {recipe.within:.0%} of the dense MACs alone, and "
                f"{'no --budget' if limit is None else f'--budget {config.budget}'} asks for dearer ones too: give --budget "
                f"{recipe.within:.0%}, or less"
            )
    include = tuple(supernet.space.check(Architecture.parse(text)) for text in config.include)
    supernet.to(pick_device(config.device))
    return Job(config, data, supernet, macs, measure_parameters(supernet), allowed, include, None, metric, notes)


def model_options(config: SearchConfig) -> dict[str, Any]:
    """What timm.create_model is given beside the name."""
    if config.pretrained and config.weights is not None:
        raise ConfigError(f"--pretrained and --weights {config.weights} are two beginnings; leave one out")
    decided = {"img_size": "--img-size", "num_classes": "the data", "pretrained_cfg": "--pretrained"}
    decided |= {"drop_path_rate": "--recipe drop_path of retrain"} | (
        {"in_chans": "--in-chans"} if config.in_chans else {}
    )
    for name, instead in decided.items():
        if name in config.model_args:
            raise ModelError(f"--model-args {name}={config.model_args[name]}: leave it out, {instead} decides it")
    given = {"img_size": config.img_size, "in_chans": config.in_chans}
    return dict(config.model_args) | {name: value for name, value in given.items() if value is not None}


def make_supernet(config: SearchConfig, options: dict[str, Any]) -> SuperNet:
    """The supernet of a configuration; its space is the model's preset, changed by what the configuration names."""
    base = create_base(config.model, **options)  # for its depth and token count
    space = space_for(
        config.model, len(base.blocks), base.patch_embed.num_patches, config.levels, config.operators, config.max_run
    )
    return SuperNet.from_timm(config.model, space, config.pretrained, sharing=config.sharing, **options)


def input_config(model: str, options: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """timm's input_size, mean, std, interpolation and crop_pct for a model made with `options` and trained so."""
    known = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if known is None:
        create_base(model)  # raises ModelError with what is wrong
    config = resolve_data_config({}, pretrained_cfg=known.to_dict() if known else {})
    channels = options.get("in_chans", config["input_size"][0])
    height, width = (options["img_size"],) * 2 if "img_size" in options else config["input_size"][1:]
    keys = ("mean", "std", "interpolation", "crop_pct")
    return as_trained({"input_size": (channels, height, width)} | {key: config[key] for key in keys}, recipe)


def as_trained(data_config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The same, but evaluation takes whole images where training knew no others.

    timm's crop_pct makes things as large as random crops do. Without these it shows what training never had: a ViT of
    28 pixels on Fashion-MNIST lost 13 points by it.
    """
    return data_config | ({"crop_pct": 1.0} if recipe.crop_scale == 1 else {})


def opening_options(data_config: dict[str, Any]) -> dict[str, Any]:
    """The same as arguments of `open_data`."""
    channels, height, width = data_config["input_size"]
    rest = {key: data_config[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return {"img_size": (height, width), "in_chans": channels} | rest


def pick_device(name: str | None) -> torch.device:
    """A usable device; "auto" or None: the GPU where there is one. Raises ModelError for one that is not there."""
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{distributed.local_rank()}"  # each process that torchrun started has its own
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def open_given(
    parts: Parts, name: str, classes: Sequence[str] | None, seed: int, workers: int, console: Console
) -> Data:
    """Data given in Python, all of them read once before anything starts; see `open_own`."""
    with progress_bar(console, "reading the data", 1, "images") as advance:
        return open_own(
            parts, name, classes=classes, seed=seed, workers=workers, progress=lambda n, total: advance(n, total=total)
        )


def supernet_epochs(folder: RunFolder) -> int | None:
    """Those of the supernet that a run's architectures are scored with; None: there is none yet."""
    return load_facts(folder.supernet)["epochs"] if folder.supernet.exists() else None


def is_trained(folder: RunFolder) -> bool:
    """Whether a run's supernet has all its epochs."""
    return supernet_epochs(folder) == folder.config.epochs


def load_weights(supernet: SuperNet, path: Path) -> None:
    """Put the trained weights of a run into its supernet. Raises RunError where they are damaged or another's."""
    tensors, _ = load_tensors(path, shapes_of(supernet))
    try:
        supernet.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{path} does not fit {supernet.base[0]}: {str(error).splitlines()[-1].strip()}") from None
    supernet.eval()
