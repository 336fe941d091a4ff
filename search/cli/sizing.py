"""The verb `space`: how large a search space is and what its architectures cost, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import SearchConfig, checked_config
from ..console import PlainConsole
from .options import (
    Budget,
    Device,
    ImgSize,
    InChans,
    Json,
    LatencyBatch,
    LatencyDtype,
    Levels,
    MaxRun,
    ModelArgs,
    Operators,
    Sharing,
    Threads,
    print_json,
    read_options,
)

if TYPE_CHECKING:
    from poolshare.space import Band, CostTable
    from poolshare.supernet import SuperNet


def space(
    model: Annotated[str, typer.Option(help="A timm Vision Transformer.")] = "vit_tiny_patch16_224",
    levels: Levels = None,
    operators: Operators = None,
    max_run: MaxRun = None,
    sharing: Sharing = "qk",
    budget: Budget = None,
    img_size: ImgSize = None,
    in_chans: InChans = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the head: as many as your data have. Default: the model's.")
    ] = None,
    model_args: ModelArgs = None,
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", help="Of a search that begins with pretrained weights: its defaults are others."),
    ] = False,
    no_training: Annotated[bool, typer.Option("--no-training", help="Of a search without training.")] = False,
    latency_batch: LatencyBatch = 1,
    latency_dtype: LatencyDtype = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Size and costs of a search space; trains nothing.

    With the classes of the data, and the options of the search that decide its defaults, it says what `search` will say.
    """
    from poolshare.space import parse_budget
    from poolshare.supernet import measure_macs

    from ..job.prepare import make_supernet, with_card

    given = {
        "model": model, "levels": levels, "operators": operators, "max_run": max_run, "sharing": sharing, "budget": budget,
        "img_size": img_size, "in_chans": in_chans, "model_args": model_args, "pretrained": pretrained,
        "training": not no_training, "latency_batch": latency_batch, "latency_dtype": latency_dtype, "device": device,
    }  # fmt: skip
    config = checked_config(data="", **with_card(read_options(given)))
    budget = config.budget
    net = make_supernet(config, num_classes)  # costs ask for no weights, so none are fetched
    macs = measure_macs(net)
    costs, conditions = (macs, "") if config.objective == "macs" else _latency(net, config, threads)
    limit = None if budget is None else parse_budget(budget, costs.total(net.space[0]), costs.quantity)
    allowed = net.space.within(costs, None, limit)
    facts = {"model": config.model} | _facts(net, macs, allowed, None if budget is None else limit)
    if as_json:
        return print_json(facts)
    within = (
        budget and f"within {budget:<9} {allowed.size_text} architectures cost at most {costs.format(allowed.high)}"
    )
    took = conditions and f"dense            {costs.format(costs.total(net.space[0]))} per image, {conditions}"
    path = _path(config, allowed) if config.tune_epochs else ""
    _print(net, macs, facts, "" if num_classes else " (--num-classes: those of your data)", [within, took, path])


def _latency(net: SuperNet, config: SearchConfig, threads: int | None) -> tuple[CostTable, str]:
    """The latency table of this machine, and where it holds."""
    from poolshare.supernet import measure_latency_table
    from poolshare.supernet.threads import choose_threads, computing_with

    from ..job.prepare import pick_device

    net.to(pick_device(config.device))
    with computing_with(choose_threads(threads, None, net).number):
        latency = measure_latency_table(net, config.latency_batch, dtype=config.deployed)
    return latency.table, latency.conditions


def _path(config: SearchConfig, allowed: Band) -> str:
    """What the phases of a pretrained start cost, with few images and with many."""
    from ..config import FEW_IMAGES, retraining_epochs
    from ..job.forecast import path_epochs

    train, scored = (round(FEW_IMAGES * share) for share in (1 - config.search_fraction, config.search_fraction))
    few, many = (config.changed(guided=True, epochs=epochs) for epochs in (0, config.epochs))
    costs = [sum(path_epochs(one, allowed, train, scored).values()) for one in (few, many)]
    again = [retraining_epochs(one, FEW_IMAGES) for one in (few, many)]
    return (
        f"path             {config.tune_epochs} epochs of the dense model, the search and {again[0]} epochs of retraining: about "
        f"{costs[0]:.0f} epochs of the dense model; from {FEW_IMAGES:,} training images on {config.epochs} of a supernet too, and "
        f"{again[1]} of a retraining with the dense model as teacher: about {costs[1]:.0f}"
    )


def _facts(net: SuperNet, macs: CostTable, allowed: Band, limit: int | None) -> dict[str, Any]:
    from poolshare.space import forecast_space
    from poolshare.supernet import measure_parameters
    from poolshare.supernet.base import cropped

    dense, cheapest, whole = net.space[0], net.space.cheapest(macs), forecast_space(net.space, macs)
    parameters, costs = measure_parameters(net), allowed.costs
    timed = costs.quantity == "latency"
    return {
        "num_classes": net.num_classes,
        **net.space.to_json(),
        "size": net.space.size,
        "dense_macs": macs.total(dense),
        "dense_parameters": parameters.total(dense),
        "cheapest": str(cheapest),
        "cheapest_macs": macs.total(cheapest),
        "cheapest_parameters": parameters.total(cheapest),
        "within_budget": allowed.size,
        "within_budget_is_exact": allowed.exact,
        "budget_macs": None if timed else limit,
        "budget_latency_ms": costs.value(limit) if timed and limit is not None else None,
        "dense_latency_ms": costs.value(costs.total(dense)) if timed else None,
        "notes": cropped(net),
        "scoring_all_macs_per_image": whole.cost,
        "scoring_all_in_single_evaluations": round(whole.cost * whole.architectures / whole.one_by_one, 1),
        "scoring_all_share_of_one_by_one": round(whole.share, 4),
    }


def _print(net: SuperNet, macs: CostTable, facts: dict[str, Any], head: str, budget: list[str | None]) -> None:
    share = facts["cheapest_macs"] / facts["dense_macs"]
    lines = [
        f"{facts['model']}: depth {net.space.depth}, levels {', '.join(map(str, net.space.levels))}, operators "
        f"{', '.join(net.space.operators)}, at most {net.space.max_run} layers on one attention map",
        f"architectures    {facts['size']:,}",
        f"dense            {macs.format(facts['dense_macs'])} per image, {facts['dense_parameters']:,} parameters, with a "
        f"head of {net.num_classes:,} classes{head}",
        f"cheapest         {macs.format(facts['cheapest_macs'])} ({share:.1%}), {facts['cheapest_parameters']:,} "
        f"parameters: {facts['cheapest']}",
        *filter(None, budget),
        f"scoring all      costs {facts['scoring_all_in_single_evaluations']:,.0f} single evaluations, "
        f"{facts['scoring_all_share_of_one_by_one']:.1%} of one by one",
        *facts["notes"],
    ]
    for line in lines:
        PlainConsole().print(line)
