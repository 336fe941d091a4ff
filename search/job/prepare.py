"""What a configuration means, brought to life: its data, its supernet, exact costs, the budget. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.data import resolve_data_config
from timm.layers import to_2tuple

from poolshare.space import (
    Architecture,
    Band,
    BudgetError,
    ConfigError,
    CostTable,
    ModelError,
    RunError,
    SearchSpace,
    forecast_space,
    parse_budget,
)
from poolshare.space.presets import EVEN_LEVELS, aligned_levels, even_levels, space_for
from poolshare.supernet import SuperNet, measure_macs, measure_parameters
from poolshare.supernet.base import cropped, outline
from poolshare.supernet.classes import Matched
from poolshare.supernet.data import Data, ImageFormat, Place, open_data, open_pictures
from poolshare.supernet.data.given import Parts, open_own
from poolshare.supernet.data.loaders import loader_batch
from poolshare.supernet.data.splits import Batches
from poolshare.supernet.latency import Latency
from poolshare.supernet.options import read_options
from poolshare.supernet.tasks import CLASSIFICATION, TASKS, Task, task_named
from poolshare.supernet.tasks.task import Targets, check_contributions
from poolshare.supernet.threads import choose_threads, computing_with
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import load_facts, load_tensors, shapes_of
from poolshare.supernet.training.loop import check_recipe, steps_per_epoch
from poolshare.supernet.training.recipe import Recipe
from poolshare.supernet.weights import Card, Checkpoint, has_card, load_base_weights, read_card, read_checkpoint

from ..config import FEW_IMAGES, SearchConfig, enough_epochs
from ..console import say
from ..progress import Advance, progress_bar
from ..scoring import SCORING_BATCH
from .classes import matched_classes
from .folder import RunFolder
from .recipes import supernet_recipe, without_usual_recipe

# "auto" scores the whole space where that costs no more than so many single evaluations: about what a published ViT
# search spends on its candidates.
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
    task: Task = CLASSIFICATION  # what the model is trained and judged for
    notes: tuple[str, ...] = ()  # what the user should know of data and weights
    head: str | None = None  # whose trained head is kept; None: it is a new one, or the run's

    @property
    def dense(self) -> Architecture:
        """All tokens, no sharing: the base model."""
        return self.supernet.space[0]

    @property
    def device(self) -> torch.device:
        """Where the supernet is."""
        return next(self.supernet.parameters()).device

    @property
    def search_batches(self) -> Batches:
        """The search-validation images, as architectures are scored on them."""
        return self.data.eval_loader("search", SCORING_BATCH, workers=self.config.workers)

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

    def narrowed(self, space: SearchSpace) -> Job:
        """The same over a part of its space, which has the same costs."""
        if space == self.supernet.space:
            return self
        self.supernet.offer(space)
        config = self.config.changed(levels=space.levels, operators=space.operators, max_run=space.max_run)
        limit = None if config.budget is None else self.allowed.high
        return replace(self, config=config, allowed=space.within(self.allowed.costs, None, limit))

    @property
    def recipe(self) -> Recipe:
        """How to train the supernet."""
        return supernet_recipe(self.config)

    @property
    def exhaustive(self) -> bool:
        """Whether the whole space will be scored."""
        if self.config.races:
            return False
        if self.config.sampler != "auto":
            return self.config.sampler == "exhaustive"
        whole = forecast_space(self.supernet.space, self.macs)
        return whole.cost <= EXHAUSTIVE_PRICE * whole.one_by_one / whole.architectures


def prepare(
    config: SearchConfig,
    console: Console | None = None,
    data: Data | None = None,
    task: Task | None = None,
    classes: Sequence[str] | None = None,
    load: bool = True,
) -> Job:
    """Open data and model of a configuration and measure all costs; nothing is trained or written.

    console: where progress goes while images are decoded as a check; None: nowhere. data, task: those that were given
    in Python, under the names that stand in the configuration.
    classes: those of a run that was begun, in the order of its head; None: the weights and the data decide.
    load: whether the supernet begins with the pretrained weights of the configuration; who has its trained ones need not
    have those. The job's configuration is the `resolved` one.
    Raises the PoolshareError of whatever does not fit.
    """
    task = check_same_task(config, task)
    if config.training and config.unlabelled:
        raise ConfigError("--unlabelled goes with --no-training: give that too, or leave this out")
    config = with_head(config, task)
    options, recipe = model_options(config), supernet_recipe(config)
    if config.budget is not None:  # one that cannot be read is refused first
        parse_budget(config.budget, 1, config.objective)
    include, device = [Architecture.parse(text) for text in config.include], pick_device(config.device)
    space_of(config, outline(config.model, read_options(config.model, options)))  # a model, before images are read
    begin = config if load else config.without_weights
    found = None if begin.weights is None else read_checkpoint(begin.weights)  # what cannot be read is refused first
    data = _opened(config, task, console) if data is None else data
    matched = _matched(config, begin, task, data, found, classes)
    notes = data.notes + matched.notes
    if matched.classes != data.classes:
        data = data.relabelled(matched.classes, matched.indices)
    torch.manual_seed(config.seed)
    if config.guided is None:
        config, said = _guided(config, matched.fresh, data, recipe)
        notes += said
    if config.races and config.score == "metric":  # which tells too little apart on few images
        config = config.changed(score="divergence")
    check_recipe(task, recipe)
    supernet = make_supernet(config, task.outputs(len(data.classes)), begin.pretrained)
    if task is not TASKS.get(task.name):
        _try_task(task, supernet)
    config, notes = resolved(config, supernet), notes + cropped(supernet)
    if found is not None:
        notes += load_base_weights(supernet, found, config.model, matched.fresh or not supernet.num_classes)
    head = None if matched.fresh or classes is not None else found.name if found else config.model
    if head is not None and data.labelled:
        notes += (
            f"the head of {head} was trained before: if it has seen any of these images, scores on search-validation are "
            "higher than on new ones; check with `poolshare evaluate` on test images that it has never seen",
        )
    macs = measure_macs(supernet)
    dense = macs.total(supernet.space[0])
    limit = None if config.budget is None or config.objective == "latency" else parse_budget(config.budget, dense)
    allowed = supernet.space.within(macs, None, limit)
    if config.guided and classes is None and limit is not None and recipe.within is None:
        config = config.changed(drawn_within=min(1.0, math.ceil(1e4 * limit / dense) / 1e4))
    _check_within(config, recipe, supernet.space, macs, limit)
    included = tuple(map(supernet.space.check, include))
    supernet.to(device)
    return Job(config, data, supernet, macs, measure_parameters(supernet), allowed, included, None, task, notes, head)


def _opened(config: SearchConfig, task: Task, console: Console | None) -> Data:
    """The images of a configuration, in the input format of its model."""
    place = Place(
        config.data,
        data_dir=config.data_dir,
        download=config.download,
        search_data=config.search_data,
        scale_16bit=config.scale_16bit,
        targets=task.targets,
        ignore_index=config.ignore_index,
    )
    images = image_format(input_config(config))
    with checking_images(console) as progress:
        common: dict[str, Any] = {"seed": config.seed, "when": config.check_images, "progress": progress}
        if config.unlabelled:
            return open_pictures(place, images, **common)
        return open_data(
            place,
            images,
            search_fraction=config.search_fraction,
            search_images=config.search_images if config.training else None,
            augmentation=supernet_recipe(config).augmentation,
            training=config.training,
            **common,
        )


def _matched(
    config: SearchConfig,
    begin: SearchConfig,
    task: Task,
    data: Data,
    found: Checkpoint | None,
    classes: Sequence[str] | None,
) -> Matched:
    """The classes of the model; none where the dense model's features are learned. begin: with the weights to begin with."""
    if task.targets != "dense":
        return matched_classes(begin, data, found, classes)
    if classes is None and not config.warm:
        raise ConfigError(
            f"--task {task.name} makes a trained model cheaper, and {config.model} has no weights yet: give --pretrained or "
            "--weights FILE"
        )
    if config.tune_epochs and "tune_epochs" in config.given:
        raise ConfigError(f"--tune-epochs {config.tune_epochs}: task {task.name} has nothing to tune on: leave it out")
    return Matched((), (), False)


def _check_within(config: SearchConfig, recipe: Recipe, space: SearchSpace, macs: CostTable, limit: int | None) -> None:
    """Raise ConfigError where --recipe within leaves nothing to train, or not what the budget allows. limit: in MACs."""
    if "within" not in config.recipe or recipe.within is None:
        return
    most = recipe.within * macs.total(space[0])
    try:
        space.within(macs, None, int(most))
    except BudgetError as error:
        raise ConfigError(f"--recipe within={recipe.within:g} leaves nothing to train: {error}") from None
    if config.objective != "latency" and recipe.within < 1 and (limit is None or limit > most):
        raise ConfigError(
            f"--recipe within={recipe.within:g} trains architectures up to {recipe.within:.0%} of the dense MACs alone, and "
            f"{'no --budget' if limit is None else f'--budget {config.budget}'} asks for more expensive ones too: give "
            f"--budget {recipe.within:.0%}, or less"
        )


def check_same_task(config: SearchConfig, task: Task | None) -> Task:
    """The task of a configuration. Raises ConfigError where that was given in Python, and is not given again."""
    task = task_named(config.task if task is None else task)
    if task.name != config.task:
        raise ConfigError(
            f"the task of this run is {config.task}, and {task.name} was given: go on with what `poolshare.search.search` "
            "returned, or give that one to `poolshare.search.work`"
        )
    return task


def with_head(config: SearchConfig, task: Task) -> SearchConfig:
    """The configuration with the head that its task needs. Raises ConfigError for one that does not fit."""
    if task.targets == "pixels":
        return config.changed(head=config.head or "conv")
    if config.head is not None:
        raise ConfigError(
            f"a {config.head} head answers for every pixel, and the task is {task.name}: leave out --head, or give --task "
            "segmentation and images with masks"
        )
    if config.ignore_index != SearchConfig.model_fields["ignore_index"].default:
        raise ConfigError(
            f"--ignore-index {config.ignore_index} is of masks, and the task is {task.name}: leave it out"
        )
    return config


@torch.inference_mode()
def _try_task(task: Task, supernet: SuperNet) -> None:
    """Raise ConfigError for a task given in Python whose contributions or score cannot be used."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, supernet.in_chans, *supernet.patch_embed.img_size, generator=generator)
    check_contributions(task, supernet.eval()(images))


def _guided(config: SearchConfig, fresh: bool, data: Data, recipe: Recipe) -> tuple[SearchConfig, tuple[str, ...]]:
    """The configuration that knows whether there is a dense model to learn from, and notes. fresh: the head is a new one.

    A head that knows these classes needs no tuning, unless it was asked for. Few images do not train a supernet.
    """
    if not config.training:
        return config.changed(guided=False), ()
    if not fresh and "tune_epochs" not in config.given:
        config = config.changed(tune_epochs=0)
    config = config.changed(guided=config.tune_epochs > 0 or (config.warm and not fresh and config.epochs > 0))
    if not config.guided:
        return config, ()
    images, scored = len(data.split("train")), len(data.split("search"))
    notes: tuple[str, ...] = ()
    epochs = enough_epochs(config.tune_epochs, steps_per_epoch(data, recipe))
    if config.tune_epochs and "tune_epochs" not in config.given and epochs > config.tune_epochs:
        notes += (
            f"{images:,} training images are few steps an epoch: the dense model is tuned for {epochs} epochs instead of "
            f"{config.tune_epochs}; --tune-epochs {config.tune_epochs} keeps to these",
        )
        config = config.changed(tune_epochs=epochs)
    if "epochs" in config.given or images >= FEW_IMAGES or scored < 2 or loader_batch(data) is not None:
        return config, notes
    notes += (
        f"{images:,} training images are few for a supernet: the dense model is searched as it is; --epochs {config.epochs} "
        "trains a supernet",
    )
    return config.changed(epochs=0), notes


def with_card(options: Mapping[str, Any], own: bool = False) -> dict[str, Any]:
    """Options of a search with what a card says spelled out: timm's name, its options, and what images it takes.

    A folder or repository as the model brings its weights too; as weights it must be of the model. own: the data were
    given in Python, so their images are as they are.

    Raises ModelError for a folder without a card, or one of another model.
    """
    given = {name: value for name, value in options.items() if value is not None}
    model, weights = given.get("model"), given.get("weights")
    card: Card | None = None
    if isinstance(model, str) and not timm.is_model(model) and has_card(model):
        card = read_card(model, "--model")
        given |= {"model": card.model, "weights": weights or model, "pretrained": False}
    elif isinstance(weights, str) and has_card(weights):
        card = read_card(weights)
        if model is not None and str(model).split(".")[0] != card.model.split(".")[0]:
            raise ModelError(
                f"--weights {weights} are of {card.model}, as its card says, and --model is {model}; leave --model out, or "
                f"give weights of {model}"
            )
        given |= {"model": model or card.model}
    if card is None:
        return given
    of_card = dict(card.model_args)
    given = {name: of_card.pop(name) for name in ("head",) if name in of_card} | given
    given["model_args"] = of_card | dict(given.get("model_args", {}))
    if not own:
        images = {"img_size": card.img_size, "in_chans": card.in_chans, "preprocessing": card.preprocessing}
        given = {name: value for name, value in images.items() if value is not None} | given
    return given


@contextmanager
def checking_images(console: Console | None) -> Iterator[Callable[[int, int], None]]:
    """Yields what shows (images decoded, of all): a bar that appears with the first of them."""
    with ExitStack() as stack:
        bar: list[Advance] = []

        def show(done: int, total: int) -> None:
            if not bar:
                title = "checking images"
                bar.append(stack.enter_context(progress_bar(console or Console(quiet=True), title, total, "images")))
            bar[0](done, total=total)

        yield show


def resolved(config: SearchConfig, supernet: SuperNet) -> SearchConfig:
    """The configuration with what the model decided, as it is kept and compared."""
    known = timm.get_pretrained_cfg(config.model) if timm.is_model(config.model) else None
    space, (height, width), channels = supernet.space, supernet.patch_embed.img_size, supernet.in_chans
    return without_usual_recipe(config).changed(
        model=f"{known.architecture}.{known.tag}" if known and known.tag and "." not in config.model else config.model,
        levels=space.levels,
        operators=space.operators,
        max_run=space.max_run,
        img_size=config.img_size or (height if height == width else (height, width)),
        in_chans=config.in_chans or (channels if channels in (1, 3) and "in_chans" not in config.model_args else None),
    )


def model_options(config: SearchConfig) -> dict[str, Any]:
    """What timm.create_model is given beside the name."""
    if config.pretrained and config.weights is not None:
        raise ConfigError(f"--pretrained and --weights {config.weights} are two beginnings; leave one out")
    decided = {"img_size": "--img-size", "num_classes": "the data", "pretrained_cfg": "--pretrained"}
    decided |= {"drop_path_rate": "--recipe drop_path of retrain", "head": "--head"}
    if config.in_chans not in (None, config.model_args.get("in_chans")):  # own data have said it already
        decided["in_chans"] = "--in-chans"
    for name, instead in decided.items():
        if name in config.model_args:
            raise ModelError(f"--model-args {name}={config.model_args[name]}: leave it out, {instead} decides it")
    given = {"img_size": config.img_size, "in_chans": config.in_chans, "head": config.head}
    return dict(config.model_args) | {name: value for name, value in given.items() if value is not None}


def make_supernet(config: SearchConfig, num_classes: int | None, pretrained: bool = False) -> SuperNet:
    """The supernet of a configuration. num_classes: None: the model's own. pretrained: with timm's weights."""
    options = model_options(config) | ({} if num_classes is None else {"num_classes": num_classes})
    return SuperNet.from_timm(config.model, partial(space_of, config), pretrained, sharing=config.sharing, **options)


def space_of(config: SearchConfig, base: Any) -> SearchSpace:
    """The preset of the base model, changed by what the configuration names."""
    depth, patches, grid = len(base.blocks), base.patch_embed.num_patches, base.patch_embed.grid_size
    levels = config.levels or (None if config.training else "even")
    if levels == "auto":
        levels = aligned_levels(patches, base.num_prefix_tokens)
    elif levels == "even":
        levels = even_levels(patches, EVEN_LEVELS, grid)
    tried = bool(config.guided)
    return space_for(config.model, depth, patches, levels, config.operators, config.max_run, config.warm, tried, grid)


def input_config(config: SearchConfig) -> dict[str, Any]:
    """timm's input_size, mean, std, interpolation and crop_pct for the model of a configuration, trained as that says.

    What a card says of these but the size goes before what timm says of the model.
    """
    options = model_options(config)
    known = timm.get_pretrained_cfg(config.model) if timm.is_model(config.model) else None
    if known is None:
        outline(config.model, {})  # raises ModelError with what is wrong
    found = resolve_data_config({}, pretrained_cfg=known.to_dict() if known else {}) | config.preprocessing
    channels = options.get("in_chans", found["input_size"][0])
    height, width = to_2tuple(options.get("img_size") or found["input_size"][1:])
    if "head" in options:  # whose images are whole
        found["crop_pct"] = 1.0
    kept = {key: found[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return as_trained({"input_size": (channels, height, width)} | kept, supernet_recipe(config))


def as_trained(data_config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The same, but evaluation takes whole images where training knew no others.

    timm's crop_pct makes things as large as random crops do. Without these it shows what training never had: a ViT of
    28 pixels on Fashion-MNIST lost 13 points by it.
    """
    return data_config | ({"crop_pct": 1.0} if recipe.crop_scale == 1 else {})


def image_format(data_config: dict[str, Any]) -> ImageFormat:
    """The same as `open_data` takes it."""
    channels, height, width = data_config["input_size"]
    rest = {key: data_config[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return ImageFormat((height, width), channels, **rest)


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
        why = str(error).splitlines()[0].partition(". ")[0]  # some go on for pages
        raise ModelError(f"device {name!r} cannot be used here ({why:.200}); try cpu") from None
    return device


def open_given(
    parts: Parts,
    name: str,
    classes: Sequence[str] | int | None,
    seed: int,
    workers: int,
    console: Console,
    targets: Targets,
) -> Data:
    """Data given in Python, all of them read once before anything starts; see `open_own`."""
    with progress_bar(console, "reading the data", 1, "images") as advance:
        return open_own(
            parts,
            name,
            classes=classes,
            seed=seed,
            workers=workers,
            progress=lambda n, total: advance(n, total=total),
            targets=targets,
        )


@contextmanager
def computing(
    job: Job, asked: int | None, recorded: int | None, console: Console, recipe: Recipe | None = None
) -> Iterator[None]:
    """Compute with the number of threads that `choose_threads` says, after its note."""
    threads = choose_threads(asked, recorded, job.supernet, recipe)
    if threads.note:
        say(console, threads.note)
    with computing_with(threads.number):
        yield


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
