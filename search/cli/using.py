"""The verbs for exported models: `export`, `retrain`, `evaluate` and `predict`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from poolshare.space.errors import BrokenDataError, ConfigError
from poolshare.space.processes import launched_rank

from ..config import LEAST_STEPS, RETRAIN_EPOCHS, RETRAIN_EPOCHS_FROM_SCRATCH, RETRAIN_EPOCHS_GUIDED
from ..console import PlainConsole, progress_console
from .options import (
    Amp,
    Budget,
    DataDir,
    Device,
    Download,
    Json,
    OtherData,
    PickName,
    Quiet,
    RecipeChanges,
    SearchBatch,
    Seed,
    Threads,
    Tracker,
    Workers,
    print_json,
    recipe_of,
)

CLASSES_SHOWN = 10


def export(
    run: Annotated[Path, typer.Argument(help="The run folder of a finished search.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist.", metavar="DIR")],
    architecture: Annotated[
        str | None, typer.Option(help="This one, scored or not; dense: all tokens, no sharing.", metavar="TEXT")
    ] = None,
    pick: Annotated[
        PickName | None,
        typer.Option(
            help="finalist: the best that `poolshare finalists` trained. From the frontier; half-point: the cheapest within "
            "half a point of dense; budget: the best within --budget. Default: budget where there is one, the search's or "
            "another, else knee."
        ),
    ] = None,
    budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Export one architecture as a timm model.

    It is chosen by budget, the search's own or another, by text, or as the frontier's knee.
    """
    from .. import SearchResult

    result = SearchResult(run)
    if architecture is None:
        chosen = result.pick(pick, budget).architecture
    elif budget or pick:
        raise ConfigError("--architecture names the architecture; leave out --budget and --pick, or leave out that")
    else:
        chosen = architecture
    facts = result.export(chosen, out)
    if as_json:
        return print_json({"out": str(out), **facts})
    console = PlainConsole()
    console.print(f"{out}: {facts['architecture']}")
    console.print(f"{facts['macs'] / facts['dense_macs']:.1%} of the dense MACs, {facts['parameters']:,} parameters")
    console.print(f"next: poolshare retrain {shlex.quote(str(out))}")


def retrain(
    exported: Annotated[Path, typer.Argument(help="An exported folder.", metavar="DIR")],
    data: OtherData = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make. Default: DIR-retrained.", metavar="DIR")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Begin without the supernet's weights.")] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard what an interrupted call with other options has trained for --out."),
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Default: {RETRAIN_EPOCHS}; taught by the run's dense model {RETRAIN_EPOCHS_GUIDED}; --from-scratch "
            f"{RETRAIN_EPOCHS_FROM_SCRATCH}; more where these are under "
            f"{LEAST_STEPS} steps.",
        ),
    ] = None,
    batch_size: SearchBatch = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: 1e-3; from scratch 2e-3; pretrained 3e-4.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="An export to learn from beside the labels, or none. Default: the run's dense model; none where it was "
            "tuned on few images and searched as it is.",
            metavar="DIR",
        ),
    ] = None,
    recipe: RecipeChanges = None,
    data_dir: DataDir = None,
    download: Download = False,
    workers: Workers = 0,
    amp: Amp = "none",
    tracker: Tracker = None,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an exported model further and test it.

    It trains on all training images, search-validation included, and is kept in a new folder.
    """
    from ..exported.retrain import retrain as run_retrain

    exported = exported.resolve() if exported.name in ("", "..") else exported
    target = out or exported.with_name(f"{exported.name}-retrained")
    changes = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "amp": amp} | recipe_of(recipe)
    facts = run_retrain(
        exported, target, data=data, data_dir=data_dir, download=download, from_scratch=from_scratch, restart=restart,
        teacher=teacher, seed=seed, recipe_changes=changes, workers=workers, device=device, threads=threads, tracker=tracker or (),
        console=progress_console(quiet),
    )  # fmt: skip
    if launched_rank():
        return None
    if as_json:
        return print_json({"out": str(target), **facts})
    PlainConsole().print(
        f"{target}: {facts['metric']} {facts['test_score']:.2f} % on {facts['test_total']:,} test images "
        f"({facts['macs'] / facts['dense_macs']:.1%} of the dense MACs)",
    )
    _print_beside(facts["test_details"])
    if facts["against_dense"]:
        PlainConsole().print(facts["against_dense"])
    if quiet:  # otherwise they were printed at the beginning
        print_notes(facts["notes"])


def print_notes(notes: list[str]) -> None:
    """Notes on data and weights, which belong to the result, quiet or not."""
    for note in notes:
        PlainConsole().print(note)


def _print_beside(details: Mapping[str, Any]) -> None:
    """What a task says beside its score, without the classes."""
    numbers = {name.replace("_", " "): value for name, value in details.items() if isinstance(value, float)}
    if numbers:
        PlainConsole().print(", ".join(f"{name} {value:.2f} %" for name, value in numbers.items()))


def evaluate(
    exported: Annotated[Path, typer.Argument(help="An exported folder.", metavar="DIR")],
    data: OtherData = None,
    data_dir: DataDir = None,
    download: Download = False,
    workers: Workers = 0,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score on test images and speed of an exported model."""
    from ..exported.retrain import evaluate as run_evaluate

    result = run_evaluate(
        exported,
        data=data,
        data_dir=data_dir,
        download=download,
        workers=workers,
        device=device,
        threads=threads,
        console=progress_console(quiet),
    )
    if as_json:
        return print_json(result)
    console = PlainConsole()
    low, high = result["interval"]
    console.print(
        f"{result['metric']} {result['score']:.2f} % (95 % interval {low:.2f} to {high:.2f}) on {result['total']:,} test images"
    )
    if result["against_dense"]:
        console.print(result["against_dense"])
    _print_beside(result["details"])
    worst_first = sorted(result["details"].get("per_class", ()), key=lambda one: (one["score"], -one["images"]))
    for one in worst_first[:CLASSES_SHOWN]:
        console.print(f"  {one['class']}: {one['score']:.2f} % of {one['images']:,} images")
    if len(worst_first) > CLASSES_SHOWN:
        console.print(f"  and {len(worst_first) - CLASSES_SHOWN} classes with a higher score; --json lists all")
    print_notes(result["notes"])
    console.print(f"{result['macs']:,} MACs per image, {result['parameters']:,} parameters")
    threads = result["threads"]
    where = result["device"] + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")
    for batch, latency in result["latency_ms"].items():
        console.print(f"batch {batch}: {latency:.2f} ms, {1000 * int(batch) / latency:,.0f} images/s on {where}")


def predict(
    exported: Annotated[Path, typer.Argument(help="An exported folder.", metavar="DIR")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", metavar="IMAGE…")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for predicted masks, and these over their images.", metavar="DIR")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """What an exported model says of images: their most probable classes, or a mask of the class of every pixel.

    Images that cannot be read are named at the end, with exit status 1.
    """
    from ..exported.predict import predict as run_predict

    aside = PlainConsole(stderr=True)
    console = progress_console(False)
    answers = run_predict(
        exported, images, top=top, out=out, device=device, threads=threads, say=aside.print, console=console
    )
    broken = [one["error"] for one in answers if "error" in one]
    if as_json:
        print_json(answers)
    console = PlainConsole()
    for one in [] if as_json else answers:
        if "error" not in one:
            console.print(f"{one['image']}: {_said(one)}")
    if broken:
        raise BrokenDataError(f"{len(broken)} of {len(answers)} images cannot be read: {'; '.join(broken)}")


def _said(answer: Mapping[str, Any]) -> str:
    """A task's answer for one image in a line: classes with their probabilities, or how much --json shows."""
    if "classes" in answer:
        named = [f"{each['class']} {each['probability']:.1%}" for each in answer["classes"]]
        return ", ".join(named) or "none of the classes"
    return ", ".join(f"{len(value)} numbers, see --json" for name, value in answer.items() if name != "image")
