"""The verbs. Nothing heavy is imported before a verb runs, so `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from poolshare.space.errors import PoolshareError
from poolshare.space.files import remedy
from poolshare.space.processes import keep_memory, launched_rank

from ..console import PlainConsole, never_fail, printable, progress_console
from . import judging, looking, sizing, using
from .options import (
    DataDir,
    DataHere,
    Device,
    Json,
    Quiet,
    Storage,
    Threads,
    Workers,
    print_json,
    read_options,
    with_search_options,
)


def examples(*commands: str) -> str:
    """The end of a verb's help: each command on a line of its own, which is not wrapped, so that it can be copied."""
    return "\b\n" + "\n".join(["Examples:" if commands[1:] else "Example:", *(f"  {command}" for command in commands)])


app = typer.Typer(
    name="poolshare",
    help="Search for cheaper Vision Transformers: which layers drop tokens, which reuse their neighbour's attention.",
    epilog="Begin with:  poolshare search --data digits --out runs/digits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"poolshare {version('poolshare')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Search for cheaper Vision Transformers: which layers drop tokens, which reuse their neighbour's attention."""


app.command(epilog=examples("poolshare space --model vit_tiny_patch16_224 --budget 60%"))(sizing.space)


@app.command(
    epilog=examples(
        "poolshare search --data digits --out runs/digits",
        "poolshare search --data photos/ --pretrained --budget 60% --out runs/photos",
        "poolshare search --data photos/ --weights mine.safetensors --no-training --out runs/mine",
    )
)
@with_search_options
def search(
    out: Annotated[Path, typer.Option(help="The run folder; an existing one is continued.", metavar="RUN")],
    no_training: Annotated[
        bool,
        typer.Option(
            "--no-training",
            help="Search the model as it is, with its trained head, in minutes. --data: class folders, or any folder of "
            "pictures. Defaults: --budget 70%, token counts evenly spaced, operators that need no training, no sharing.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what it would take, with torchrun by all its processes: time, memory, disk. Writes nothing.",
        ),
    ] = False,
    storage: Storage = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Tune a pretrained model, train the supernet where images are many, score architectures, report.

    The same command continues an interrupted run.
    """
    from .. import search as run_search

    if no_training:
        options["training"] = False
    if dry_run:
        quiet = False
    data = options.pop("data")
    result = run_search(data, out=out, storage=storage, quiet=quiet, dry_run=dry_run, **read_options(options))
    if launched_rank() or dry_run:
        return None
    if as_json:
        return print_json(looking.outcome(result.run, result.report, result.report.cost))
    looking.present(result.report, result.report.cost)
    if quiet:  # otherwise they were printed at the beginning
        using.print_notes(result.run.read_summary().get("notes", []))
    looking.hint(result.run, result.report)


@app.command(epilog=examples("poolshare worker runs/photos    (beside `poolshare search … --out runs/photos`)"))
def worker(
    run: Annotated[Path, typer.Argument(help="The run folder of a search.", metavar="RUN")],
    storage: Storage = None,
    data: DataHere = None,
    data_dir: DataDir = None,
    workers: Workers = 0,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """One more searcher on the study of a running or stopped search.

    Start any number of them, anywhere that sees RUN (or a copy of it and the same database), at any time; stop them at
    any time. `poolshare search` itself counts as one, and alone writes the report.
    """
    from ..job.worker import work

    result = work(run, storage, data, data_dir, workers, device, progress_console(quiet), threads=threads)
    if launched_rank():
        return None
    if as_json:
        return print_json(result)
    console = PlainConsole()
    console.print(f"{run}: {result['scored']:,} of its {result['candidates']:,} architectures were scored here")
    console.print("the `poolshare search` command of this run shows the frontier and writes the report")


app.command(epilog=examples("poolshare pareto runs/digits --budget 60% --pick knee"))(looking.pareto)
app.command(
    epilog=examples(
        'poolshare show "196*2 196 100@max2d*3 49@max2d*2 49*3 49"',
        "poolshare show exports/photos --image cat.jpg --image dog.jpg --out regions.png",
    )
)(looking.show)
app.command(
    epilog=examples(
        "poolshare export runs/digits --budget 60% --out exports/digits",
        'poolshare export runs/digits --architecture "64*2 36@max2d*3 16@max2d*3" --out exports/mine',
    )
)(using.export)
app.command(epilog=examples("poolshare retrain exports/digits --epochs 30"))(using.retrain)
app.command(epilog=examples("poolshare evaluate exports/digits-retrained"))(using.evaluate)
app.command(epilog=examples("poolshare predict exports/photos-retrained holiday.jpg more-photos/"))(using.predict)
app.command(epilog=examples("poolshare trust runs/digits --architectures 24 --twice 12"))(judging.trust)
app.command(epilog=examples("poolshare finalists runs/photos --budget 60% --count 8 --epochs 2"))(judging.finalists)


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; no KeyboardInterrupt, which the command-line library would turn into exit status 130."""


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    owner = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a worker that loads images: its parent will end it
            os._exit(1)
        raise _Stopped

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def main() -> None:
    """Entry point: exit status 0 (fine), 1 (failed or stopped), 2 (wrong use)."""
    for stream in (sys.stdout, sys.stderr):
        never_fail(stream)
    keep_memory()
    try:
        with _stopping_on_signals():
            app()
    except PoolshareError as error:
        where = f" in process {rank}" if (rank := launched_rank()) else ""
        print(printable(f"error{where}: {error}"), file=sys.stderr)
        sys.exit(error.exit_status)
    except _Stopped:
        if not launched_rank():
            print("stopped; the same command continues where it was", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(printable(f"error: {error}; {remedy(error)}"), file=sys.stderr)
        sys.exit(1)
