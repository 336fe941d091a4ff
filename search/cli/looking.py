"""The verbs that show results: `pareto` for a run, `show` for an architecture."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from poolshare.space import COSTS, Architecture, ConfigError, RunError
from poolshare.space.files import reading

from ..console import PlainConsole
from .options import Budget, ImgSize, InChans, Json, ModelArgs, PickName, option, print_json, read_options

if TYPE_CHECKING:
    from ..job.folder import RunFolder
    from ..report.report import Report


def pareto(
    run: Annotated[Path, typer.Argument(help="The run folder of a search.", metavar="RUN")],
    budget: Budget = None,
    cost: Annotated[
        Literal["macs", "parameters", "latency"] | None,
        typer.Option(help="What the frontier weighs against accuracy. Default: the search's objective."),
    ] = None,
    pick: Annotated[
        PickName | None,
        typer.Option(help="Name one point and why. half-point: the cheapest within half a point of dense."),
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Draw another run's frontier too; repeatable.", metavar="RUN")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the frontier as a table.", metavar="FILE")] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw it; the numbers go beside it, with .csv in place of .png.", metavar="FILE")
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Rewrite report.html, pareto.png and their numbers in the run folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The frontier of a run, as table and plot.

    pareto.csv, pareto.png and report.html lie in the run folder.
    """
    from ..job.folder import RunFolder
    from ..job.records import write_csv
    from ..report.report import load_report
    from ..report.terminal import comparison
    from ..report.write import write_report

    folder = RunFolder.open(run)
    report = load_report(folder, budget)
    others = [load_report(RunFolder.open(other), budget) for other in compare or []]
    column = COSTS[cost].column if cost else report.cost
    frontier = report.by(column)  # raises before anything is written
    compared = comparison([report, *others], column)
    chosen = None if pick is None else report.pick(pick, column)
    if png is not None and png.suffix.lower() != ".png":
        raise ConfigError(f"--png {png} does not end in .png; the numbers go beside it, into the same name with .csv")
    if csv is not None:
        write_csv(csv, frontier)
    if png is not None:
        from ..report.figure import figure_numbers, figure_png

        figure_png(report, png, column, others)
        figure_numbers([report, *others], png.with_suffix(".csv"), column)
    if refresh:
        write_report(folder)
    if as_json:
        result = outcome(folder, report, column)
        if chosen is not None:
            result["pick"] = chosen._asdict()
        if others:
            result["compared"] = compared
        return print_json(result)
    present(report, column, others)
    console = PlainConsole()
    for path in (csv, png, png and png.with_suffix(".csv"), folder.report if refresh else None):
        if path is not None:
            console.print(f"written: {path}")
    if chosen is not None:
        console.print(f"{chosen.how}: {chosen.architecture}")
        console.print(f"why: {chosen.why}", soft_wrap=False)  # a sentence, to be read here
        console.print(report.export_command(chosen.architecture))
    else:
        hint(folder, report, budget)


def show(
    what: Annotated[
        str,
        typer.Argument(help='An architecture such as "196*2 100@max2d*3", or an exported folder.', metavar="TEXT|DIR"),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Draw which parts of this photo are one token; repeatable.", metavar="FILE"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where --image draws to. Default: regions.png.", metavar="FILE")
    ] = None,
    model: Annotated[str | None, option("model", help="Of an architecture. Default: vit_tiny_patch16_224.")] = None,
    pretrained: Annotated[bool, option("pretrained", "--pretrained")] = False,
    weights: Annotated[str | None, option("weights")] = None,
    img_size: ImgSize = None,
    in_chans: InChans = None,
    model_args: ModelArgs = None,
    as_json: Json = False,
) -> None:
    """Draw an architecture: tokens per layer as bars, layers that share an attention map in brackets.

    With --image also a PNG: each photo, and beside it the parts that are one token after each reduction. An exported folder
    brings its weights; an architecture needs --pretrained or --weights where its operators look at the contents of tokens.
    """
    from ..report.terminal import draw_architecture

    # unlike Path's isdir takes a text of any length
    architecture, facts = _exported(what) if os.path.isdir(what) else (Architecture.parse(what), {})
    given = {
        "model": model, "pretrained": pretrained or None, "weights": weights, "img_size": img_size, "in_chans": in_chans,
        "model_args": model_args,
    }  # fmt: skip
    drawn = _draw(what, image, out, read_options(given))
    if as_json:
        layers = [layer._asdict() for layer in architecture.layers]
        value = {"architecture": str(architecture), **architecture.to_json(), "layers": layers}
        return print_json(value | ({"regions": str(drawn)} if drawn else {}))
    console = PlainConsole()
    console.print(draw_architecture(architecture, min(console.width, 100)))
    if facts:
        share = facts["macs"] / facts["dense_macs"]
        macs, parameters = (COSTS[name].format(facts[name]) for name in ("macs", "parameters"))
        console.print(f"{macs}, {share:.1%} of dense; {parameters}")
    if drawn:
        console.print(f"written: {drawn}")


def _exported(folder: str) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of an exported folder, and what is known about it; without loading its weights."""
    from ..job.records import read_json

    path = Path(folder, "architecture.json")
    if not path.is_file():
        raise RunError(f"{folder} is not an exported folder: it has no architecture.json")
    with reading(path, "export it again"):
        facts = read_json(path)
        if any(type(facts[name]) is not int or facts[name] <= 0 for name in ("macs", "dense_macs", "parameters")):
            raise ValueError("a cost is not a positive whole number")
        return Architecture.parse(facts["architecture"]), facts


def _draw(what: str, images: list[Path] | None, out: Path | None, model: dict[str, Any]) -> Path | None:
    """The file that --image asks for; None without it."""
    if images:
        from ..exported.regions import draw_regions

        out = out or Path("regions.png")
        draw_regions(what, images, out, **model)
        return out
    for name, value in {"out": out, **model}.items():
        if value:
            text = "" if value is True else f" {value}"
            raise ConfigError(
                f"--{name.replace('_', '-')}{text}: that goes with --image FILE; give one, or leave this out"
            )
    return None


def outcome(folder: RunFolder, report: Report, cost: str) -> dict[str, Any]:
    """A run in JSON: its summary, and its frontier within the report's budget."""
    facts: dict[str, Any] = {
        "budget_macs": report.limits.get("macs"),
        "budget_latency_ms": report.limits.get("latency_ms"),
        "certified": report.certified,
    }
    facts |= {"hypervolume": report.hypervolume, "frontier": report.by(cost).to_dict("records")}
    return {"run": str(folder.path), **folder.read_summary(), **facts}


def present(report: Report, cost: str, others: list[Report] | None = None) -> None:
    """Frontier and plot on the terminal."""
    from ..report.terminal import comparison_table, terminal_plot, terminal_table

    console = PlainConsole()
    console.print(terminal_table(report, limit=20, cost=cost, width=console.width))
    if others:
        console.print(comparison_table([report, *others], cost))
    for warning in report.warnings:
        console.print(warning)
    width = max(40, min(78, console.width))
    print(terminal_plot(report, width, colour=console.is_terminal, cost=cost, others=others or ()))


def hint(folder: RunFolder, report: Report, budget: str | None = None) -> None:
    """Where the report is, and what to do next."""
    console = PlainConsole()
    run = shlex.quote(str(folder.path))
    budget = budget or folder.config.budget
    picks = [each.how for each in report.picks()]
    wishes = [f"--budget {shlex.quote(budget)}"] if budget else []
    if picks[0] == "finalist" or not budget:
        wishes.append(f"--pick {picks[0]}")  # finalist, or else half-point where there is one
    wish = " ".join(wishes)
    console.print(f"report: {folder.report}")
    console.print(f"export: poolshare export {run} {wish} --out {run}-export")
