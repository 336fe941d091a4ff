"""The verbs that train some architectures alone: `trust` and `finalists`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..console import PlainConsole
from .options import (
    Budget,
    DataDir,
    DataHere,
    Device,
    Json,
    Quiet,
    SearchAmp,
    SearchBatch,
    Seed,
    Threads,
    Workers,
    print_json,
)


def trust(
    run: Annotated[Path, typer.Argument(help="The run folder of a search.", metavar="RUN")],
    architectures: Annotated[int, typer.Option(min=2, help="How many to train alone, drawn across MAC bands.")] = 24,
    twice: Annotated[
        int | None, typer.Option(min=0, help="How many of them a second time, for the ceiling. Default: half.")
    ] = None,
    bands: Annotated[int, typer.Option(min=1, help="MAC bands of equal width.")] = 4,
    epochs: Annotated[int | None, typer.Option(min=0, help="Of each training. Default: the supernet's.")] = None,
    batch_size: SearchBatch = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the supernet's.")] = None,
    amp: SearchAmp = None,
    data: DataHere = None,
    data_dir: DataDir = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Where the weights lie now that the search began with. Default: as there.", metavar="FILE"),
    ] = None,
    workers: Workers = 0,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How well supernet scores rank architectures: Kendall's tau against training them alone.

    Test images stay unseen. The same command continues an interrupted one; the report shows the outcome.
    """
    from ..api import SearchResult

    result = SearchResult(run).trust(
        architectures, twice, bands, seed=seed, epochs=epochs, batch_size=batch_size, lr=lr, amp=amp, data=data,
        data_dir=data_dir, weights=None if weights is None else str(weights), workers=workers, device=device, threads=threads,
        quiet=quiet,
    )  # fmt: skip
    if as_json:
        return print_json(result)
    console = PlainConsole()
    console.print(
        f"{result['n']} architectures trained alone for {result['recipe']['epochs']} epochs, {result['twice']} of them twice, "
        f"scored on {result['images']:,} search-validation images; Kendall tau with 95 % intervals",
        soft_wrap=False,
    )
    for title, part in [
        ("all", result),
        ("inside bands", result["within"]),
        *((f"{band['low_macs'] / 1e6:.3g}-{band['high_macs'] / 1e6:.3g} M MACs", band) for band in result["bands"]),
    ]:
        cells = [
            f"{name.replace('_', ' ')} {_with_interval(part[name])}" for name in ("tau", "ceiling", "share_of_ceiling")
        ]
        console.print(f"{title:<20} {'  '.join(cells)}")


def _with_interval(estimate: dict[str, float | None]) -> str:
    if estimate["value"] is None:
        return "unknown"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def finalists(
    run: Annotated[Path, typer.Argument(help="The run folder of a finished search.", metavar="RUN")],
    count: Annotated[
        int,
        typer.Option(
            min=1, help="How many of the best to train, besides those that the search was given by --include."
        ),
    ] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Of each training, from the weights that export takes.")] = 2,
    batch_size: SearchBatch = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 1e-3; pretrained 3e-4.")] = None,
    amp: SearchAmp = None,
    budget: Budget = None,
    data: DataHere = None,
    data_dir: DataDir = None,
    workers: Workers = 0,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the best within the budget a little further, each alone, and score them again.

    The best of hundreds of scores is partly luck; this compares the best after training. Test images stay unseen. The same
    command continues an interrupted one. `poolshare export RUN --pick finalist` exports the winner; where finalists were
    trained in several ways, that of the largest group.
    """
    from ..api import SearchResult
    from ..report.terminal import finalists_table

    result = SearchResult(run)
    rows = result.finalists(
        count, epochs=epochs, budget=budget, batch_size=batch_size, lr=lr, amp=amp, data=data, data_dir=data_dir,
        workers=workers, device=device, threads=threads, quiet=quiet,
    )  # fmt: skip
    if as_json:
        return print_json({"run": str(run), "finalists": rows.to_dict("records")})
    out = PlainConsole()
    out.print(finalists_table(rows, result.report, out.width))
    name, best = shlex.quote(str(run)), shlex.quote(str(rows["architecture"].iloc[0]))
    out.print(f"export: poolshare export {name} --architecture {best} --out {name}-export")
