"""An exported model trained further, or measured as it is; the only readers of the test split."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from poolshare.space import ConfigError, DataError, RunError
from poolshare.space.data_kind import DataKind
from poolshare.space.files import digest_of, held
from poolshare.space.quantities import check_whole
from poolshare.supernet import Subnet, count_macs, measure_latency
from poolshare.supernet.data import Data, Place, open_data, open_tests
from poolshare.supernet.data.transforms import DEFAULT_AUGMENTATION, Augmentation
from poolshare.supernet.tasks import TASKS, Task, task_named
from poolshare.supernet.threads import Threads, choose_threads, computing_with
from poolshare.supernet.training import distributed
from poolshare.supernet.training.checkpoint import load_facts, load_state_facts, load_tensors
from poolshare.supernet.training.loop import Recipe, check_batches, steps_per_epoch, train_model
from poolshare.supernet.training.trackers import check_trackers, watching

from ..analysis.guard import against_dense
from ..analysis.intervals import score_interval
from ..config import (
    RETRAIN_EPOCHS,
    RETRAIN_EPOCHS_FROM_SCRATCH,
    RETRAIN_EPOCHS_GUIDED,
    WARM_LR,
    WARM_LR_PRETRAINED,
    enough_epochs,
    moved,
    short_name,
)
from ..console import say
from ..job.folder import check_outside
from ..job.images import difference
from ..job.prepare import as_trained, checking_images, image_format, pick_device
from ..job.recipes import checked_recipe
from ..job.records import read_json
from ..progress import advance_loss, progress_bar
from ..scoring import SCORING_BATCH, Answers, answers
from .export import Exported, check_new, load_export, save_export

LATENCY_BATCHES = (1, 64)


def retrain(
    exported: str | Path,
    out: str | Path,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    from_scratch: bool = False,
    restart: bool = False,
    teacher: str | Path | None = None,
    seed: int = 0,
    recipe_changes: Mapping[str, Any] | None = None,
    workers: int = 0,
    device: str | None = None,
    threads: int | None = None,
    tracker: Sequence[str] = (),
    console: Console | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Train an exported model on the full training split, test it, and keep it in the new folder `out`.

    data: default: what the search used. recipe_changes: fields of `Recipe`; None means the default of the situation.
    restart: give up what an interrupted call with other options has trained for `out`, and start again.
    teacher: an exported folder of the same classes and input, from whose probabilities it learns too; "none": none. Default:
    the dense model that the run has tuned or was given; none where it was tuned on few images and searched as it is.
    threads: of PyTorch on a CPU; None: see `choose_threads`.
    tracker: "tensorboard", "wandb" or "mlflow", which show the training from a folder beside `out`, of its name and "-logs".
    task: one that was given in Python to the search.
    Returns what the new folder's architecture.json says. An interrupted call continues where it was; until it is done
    its state lies in a hidden folder beside `out`, which one process at a time holds. Where torchrun started several
    processes they train together; the first one tests and writes, the others return nothing.
    Raises RunError where `out` exists or is being made, DataError where the data has other classes than the model.
    """
    check_whole(0, workers=workers, seed=seed)
    check_whole(1, threads=threads)
    check_trackers(tracker)
    out, console = Path(out).resolve(), console or Console(quiet=True)
    changes = {name: value for name, value in (recipe_changes or {}).items() if value is not None}
    if distributed.rank() == 0:
        _remove_finished(out)
    check_new(out)
    place = pick_device(device)
    source = load_export(exported)
    task = task_of(source, task)
    guide = _teacher(source, teacher, from_scratch and task.targets != "dense")
    if guide is None and task.targets == "dense":
        raise ConfigError(
            f"task {task.name} learns from the dense model of the run alone: leave out --teacher none, and retrain a model that "
            "is not the dense one"
        )
    recipe = _recipe(source, from_scratch, guide is not None and teacher is None, changes)
    source = replace(source, data_config=as_trained(source.data_config, recipe))
    # The seed of the search decides the splits, the seed of the retraining order and augmentation.
    name, data_dir = moved(source.facts["data"], source.facts["data_dir"], data, data_dir)
    check_outside(out, name)
    opened = _open(source, _place(source, name, data_dir, download), ("train", "test"), console, recipe.augmentation)
    opened = replace(_answered(source, opened, task, place), seed=seed)
    training = opened.full
    if "epochs" not in changes:
        epochs = enough_epochs(recipe.epochs, steps_per_epoch(training, recipe))
        recipe = recipe.model_copy(update={"epochs": epochs})
    for note in opened.notes:
        say(console, note)
    torch.manual_seed(seed)
    model = (_untrained(source.model) if from_scratch else source.model).to(place)
    settings = {
        "architecture": str(model.architecture),
        "weights": None if from_scratch else source.digest,
        "teacher": guide and guide.digest,
        "epochs": recipe.epochs,
        "config": source.facts["config_sha256"],  # its input among other things
        "data": opened.fingerprint,
    }
    first = distributed.rank() == 0
    check_batches(training, recipe, distributed.launched_size())
    total = recipe.epochs * steps_per_epoch(training, recipe)
    with _workplace(out, restart) if first else nullcontext() as kept:
        state = kept and kept / "training.safetensors"
        with ExitStack() as stack:
            stack.enter_context(distributed.joined(place))
            chosen = distributed.from_first(_threads(threads, state, source, model, recipe) if first else Threads(None))
            if chosen.note:
                say(console, chosen.note)
            stack.enter_context(computing_with(chosen.number))
            logs = out.with_name(f"{out.name}-logs") if first else None
            watch = stack.enter_context(watching(tracker, logs, "retraining"))
            advance = stack.enter_context(progress_bar(console, "retraining", total, "steps"))
            train_model(
                model,
                training,
                recipe,
                teacher=guide.model if guide else None,
                task=task,
                seed=seed,
                workers=workers,
                state=state,
                settings=settings,
                progress=partial(advance_loss, advance),
                watch=watch,
                say=partial(say, console),
                otherwise=f"give --restart to discard these epochs and start {out.name} again, or choose another --out",
            )
        if not first:
            return {}
        with computing_with(chosen.number):
            tested = Tested.of(task, answers_on_test(model, opened, task, workers), opened.classes)
            dense = _dense_on_test(source, place, opened, task, workers)
        start = "random initialisation" if from_scratch else f"{source.path.name} ({source.facts['weights']})"
        own = ("format", "runs", "classes", "versions")  # which the new folder says of itself
        facts = {key: value for key, value in source.facts.items() if key not in own}
        facts |= _tested_facts(source, opened, tested, dense)
        facts |= {
            "data": name,
            "data_dir": data_dir,
            "recipe": recipe.model_dump(),
            "threads": chosen.number,
            "from_scratch": from_scratch,
            "retrain_seed": seed,
            "weights": f"{start}, retrained for {recipe.epochs} epochs on {short_name(name)}"
            + (f" with {guide.name} as teacher" if guide else ""),
        }
        save_export(out, model.cpu(), opened.classes, source.data_config, facts)
        if state is not None and (curve := state.with_suffix(".csv")).exists():
            shutil.copy(curve, out)
    return facts


def _untrained(model: Any) -> Any:
    """The same model with random weights."""
    base, options = model.base
    fresh: Any = Subnet.from_base(base, str(model.architecture), model.sharing, **options)
    fresh.pretrained_cfg = fresh.default_cfg = model.pretrained_cfg
    return fresh


def _tested_facts(source: Exported, data: Data, tested: Tested, dense: Mapping[str, Any] | None) -> dict[str, Any]:
    """What architecture.json says of a test. dense: see `_dense_on_test`."""
    return {
        "data_fingerprint": data.fingerprint,
        "test_score": tested.score,
        "test_total": tested.total,
        "test_details": tested.details,
        "notes": list(data.notes),
        **({"dense": dense} if dense else {}),
        "against_dense": tested.beside(dense, source.share),
    }


def _threads(asked: int | None, state: Path | None, source: Exported, model: nn.Module, recipe: Recipe) -> Threads:
    """As many as a retraining that goes on has had, else as many as the search."""
    earlier = (load_state_facts(state) or {}) if state is not None else {}
    return choose_threads(asked, earlier.get("threads", source.facts.get("threads")), model, recipe)


@contextmanager
def _workplace(out: Path, restart: bool) -> Iterator[Path]:
    """The hidden folder beside `out` where a retraining keeps its state; held, and gone when all is done.

    restart: remove what state is there.
    """
    folder = _hidden(out)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        for state in folder.glob("training*") if restart else ():
            state.unlink()
        check_new(out)  # who held it may have finished
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(out: Path) -> Path:
    return out.with_name(f".{out.name}.retraining")


def _remove_finished(out: Path) -> None:
    """Remove the state of a retraining that was killed after it had written `out`, its last deed but this one."""
    facts, state = out / "architecture.json", _hidden(out) / "training.safetensors"
    with suppress(OSError, ValueError, KeyError, TypeError):  # a RunError too: a state of somebody else, or in use
        written = facts.stat().st_mtime_ns >= state.stat().st_mtime_ns
        if written and read_json(facts)["recipe"]["epochs"] == load_facts(state)["epochs"]:
            with held(state.parent):
                shutil.rmtree(state.parent, ignore_errors=True)


class Teacher(NamedTuple):
    """A model that knows the same classes."""

    name: str
    model: nn.Module
    digest: str  # of its weights


def _teacher(source: Exported, path: str | Path | None, from_scratch: bool) -> Teacher | None:
    """The exported folder `path`, if it can teach the source; None: the run's dense model, "none": no teacher."""
    if str(path) == "none":
        return None
    if path is None:
        dense = source.facts.get("dense")
        if not dense or not dense["teaches"] or from_scratch or dense["architecture"] == source.facts["architecture"]:
            return None
        if (found := _dense_model(source)) is None:
            raise RunError(
                f"{dense['weights']}, the dense model of the run that {source.path} comes from, is missing or was changed: restore "
                "it, give an export of the dense model as --teacher DIR, or do without: --teacher none"
            )
        return Teacher("the dense model", found, dense["sha256"])
    teacher = load_export(path)
    if teacher.facts["classes"] != source.facts["classes"] or teacher.data_config != source.data_config:
        raise ConfigError(
            f"--teacher {path} knows other classes or takes other images than {source.path} ({teacher.data_config} "
            f"there, {source.data_config} here); take an export of the same search, such as its dense model"
        )
    return Teacher(teacher.path.name, teacher.model, teacher.digest)


def _dense_model(source: Exported) -> Subnet | None:
    """The dense model of the export's run, in evaluation mode; None where its file is gone or another."""
    dense = source.facts.get("dense")
    if not dense or not Path(dense["weights"]).is_file() or digest_of(Path(dense["weights"])) != dense["sha256"]:
        return None
    base, options = source.model.base
    model = Subnet.from_base(base, dense["architecture"], **options)
    tensors, _ = load_tensors(Path(dense["weights"]))
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})  # without a supernet's learned poolings
    return model.eval()


def _answered(source: Exported, data: Data, task: Task, place: torch.device) -> Data:
    """The data with the dense model's outputs as targets, where the task has no others. Raises RunError without that model."""
    if task.targets != "dense":
        return data
    model = _dense_model(source)
    if model is None:
        raise RunError(
            f"{source.path} is judged by the dense model of the run it comes from, and that is missing or was changed: restore "
            "it"
        )
    return data.answered_by(model.to(place))


def _dense_on_test(
    source: Exported, place: torch.device, data: Data, task: Task, workers: int
) -> dict[str, Any] | None:
    """What is known about the run's dense model, with its score on the test images; None: it is not there to be asked."""
    dense, model = source.facts.get("dense"), _dense_model(source)
    if dense is None or model is None or dense["architecture"] == source.facts["architecture"]:
        return None
    counts = answers_on_test(model.to(place), data, task, workers).counts
    return {**dense, "test_score": counts.score(task)}


def evaluate(
    exported: str | Path,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    workers: int = 0,
    device: str | None = None,
    threads: int | None = None,
    console: Console | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """The score on test images with its 95 % interval, MACs, parameters, and milliseconds per batch of a model.

    data: default: what the search used. A folder of other images is taken whole, but for what it has to train on: nothing of
    it was trained on, so nothing is set aside. Raises DataError for the very images that the model was searched on.
    threads: of PyTorch on a CPU, which the times are of; None: see `choose_threads`. task: one that was given in Python
    to the search.
    score is called as metric says. dense_score is that of the dense model of the same run on the same images, None where it
    has none or its file is gone;
    against_dense says in words what is lost.
    details holds what else the task says of its answers, see `Task.details`.
    """
    check_whole(0, workers=workers)
    check_whole(1, threads=threads)
    place = pick_device(device)
    source, console = load_export(exported), console or Console(quiet=True)
    task = task_of(source, task)
    name, data_dir = moved(source.facts["data"], source.facts["data_dir"], data, data_dir)
    opened = _answered(source, _open_tests(source, _place(source, name, data_dir, download), console), task, place)
    inputs = torch.zeros(1, *source.data_config["input_size"])
    macs = count_macs(source.model, (inputs,))
    model = source.model.to(place)
    chosen = choose_threads(threads, source.facts.get("threads"), model)
    with computing_with(chosen.number):
        tested = Tested.of(task, answers_on_test(model, opened, task, workers, console), opened.classes)
        latency = {
            batch: measure_latency(model, inputs.to(place).expand(batch, -1, -1, -1).contiguous())
            for batch in LATENCY_BATCHES
        }
        dense = _dense_on_test(source, place, opened, task, workers)
    return {
        "model": str(source.path),
        "architecture": str(model.architecture),
        "task": task.name,
        **tested._asdict(),
        "macs": macs,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(place),
        "notes": list(opened.notes),
        "dense_score": dense and dense["test_score"],
        "against_dense": tested.beside(dense, source.share),
        "threads": chosen.number if place.type == "cpu" else None,
        "latency_ms": latency,
    }


class Tested(NamedTuple):
    """What a model's answers on test images are worth."""

    metric: str
    score: float
    interval: tuple[float, float]  # 95 %
    total: int  # images
    details: dict[str, Any]  # see `Task.details`

    @classmethod
    def of(cls, task: Task, found: Answers, classes: Sequence[str]) -> Tested:
        """By a task."""
        counts = found.counts
        details = task.details(found.contributions, found.targets, found.outputs, classes)
        interval = score_interval(task, found.contributions)
        return cls(task.metric, counts.score(task), interval, counts.total, details)

    def beside(self, dense: Mapping[str, Any] | None, share: float) -> str:
        """What is lost against the dense model, see `against_dense`; empty without one."""
        return against_dense(self.score, self.interval[1], dense["test_score"], share) if dense else ""


def task_of(source: Exported, task: Task | None) -> Task:
    """The task that a model was searched for. Raises ConfigError where that is one of Python's, and is not given."""
    name = source.facts["task"]
    if task is None and name not in TASKS:
        raise ConfigError(
            f"{source.path} was searched for the task {name}, which was given in Python: give it again, as "
            "poolshare.search.evaluate(…, task=…)"
        )
    task = task_named(name if task is None else task)
    if task.name != name:
        raise ConfigError(f"{source.path} was searched for the task {name}, and {task.name} was given: give that one")
    return task


def answers_on_test(
    model: nn.Module, data: Data, task: Task, workers: int = 0, console: Console | None = None
) -> Answers:
    """What a model says to the test images."""
    batches = data.eval_loader("test", SCORING_BATCH, workers=workers)
    with progress_bar(console or Console(quiet=True), "testing", len(batches), "batches") as advance:
        return answers(model, batches, task, advance)


def _place(source: Exported, name: str, data_dir: str | None, download: bool) -> Place:
    """Where images for a model are, and what they are to it."""
    facts = source.facts
    return Place(
        name,
        data_dir=data_dir,
        download=download,
        search_data=facts.get("search_data") if name == facts["data"] else None,
        scale_16bit=facts.get("scale_16bit", False),
        targets=facts["targets"],
        ignore_index=facts.get("ignore_index", 255),
    )


def _open(
    source: Exported,
    place: Place,
    check: Sequence[str],
    console: Console,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
) -> Data:
    """The data set, in the model's input format. Raises DataError where its classes are not the model's.

    check: what to decode once, `train` or `test`.
    """
    facts, name = source.facts, place.name
    same = name == facts["data"]
    if same and facts.get("unlabelled"):
        raise DataError(
            f"{source.path} was searched on pictures without labels ({name}): give images in class folders as --data FOLDER"
        )
    with checking_images(console) as progress:
        opened = open_data(
            place,
            image_format(source.data_config),
            seed=facts["seed"],  # where test images had to be set aside, the search has not seen them
            augmentation=augmentation,
            check=check,
            progress=progress,
        )
    classes = facts["classes"]
    missing = [one for one in opened.classes if one not in set(classes)]
    if not missing:
        opened = opened.relabelled(classes, [classes.index(one) for one in opened.classes])
    if same and (found := difference(opened.fingerprint, facts["data_fingerprint"], mended=True)):
        raise DataError(
            f"the training images of {name} are not those the model was searched on ({found}), so its test images may "
            "not be either; restore them, or give other test images as --data FOLDER"
        )
    if missing:
        raise DataError(
            f"{name} has the classes {', '.join(missing[:5])}…, which {source.path} does not know: it was made for "
            f"{', '.join(classes[:5])}…; use the data it was searched on, or name the folders as its classes"
        )
    return opened


def _open_tests(source: Exported, place: Place, console: Console) -> Data:
    """Data to test on; of a folder that the model was not searched on, all images that are not there to train on."""
    facts = source.facts
    searched = place.name == facts["data"]
    if searched or place.kind not in (DataKind.FOLDER, DataKind.SHARDS) or not place.path.is_dir():
        return _open(source, place, ("test",), console)
    with suppress(DataError):  # not a folder to train on, as far as that can tell
        opened = _open(source, place, (), console)
        if not difference(opened.fingerprint, facts["data_fingerprint"]):  # the search's, at another place
            return _open(source, place, ("test",), console)
    with checking_images(console) as progress:
        opened = open_tests(place, facts["classes"], image_format(source.data_config), progress=progress)
    if not difference(opened.fingerprint_of("test"), facts["data_fingerprint"]):
        raise DataError(
            f"{place.name} holds the images that {source.path} was searched on: give images it was not trained on"
        )
    return opened


def _recipe(source: Exported, from_scratch: bool, guided: bool, changes: Mapping[str, Any]) -> Recipe:
    if "within" in changes:
        raise ConfigError(f"--recipe within={changes['within']}: that belongs to `poolshare search`; leave it out")
    warm_vit = bool(source.facts.get("pretrained")) and not from_scratch
    situation: dict[str, Any] = {
        "batch_size": source.facts["batch_size"],
        "epochs": RETRAIN_EPOCHS_FROM_SCRATCH if from_scratch else RETRAIN_EPOCHS_GUIDED if guided else RETRAIN_EPOCHS,
        "lr": 2e-3 if from_scratch else WARM_LR_PRETRAINED if warm_vit else WARM_LR,
        "layer_decay": 0.75 if warm_vit else None,
    }
    return checked_recipe(situation, changes)
