"""Which operators a run offers, and whether it offers sharing: what harms its tuned dense model least, tried before training."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from poolshare.space import OPERATORS, Architecture, BudgetError, SearchSpace, SpaceError, forecast
from poolshare.supernet.training import distributed

from ..console import say
from ..job.folder import RunFolder
from ..job.prepare import Job
from ..progress import progress_bar
from .damage import DamageModel, single_reductions
from .racing import Race
from .record import Record, drawn
from .search import first_images

TIMES = 2.0  # the least damage of all operators: one that typically does more is left out


def offered(job: Job, folder: RunFolder | None, console: Console) -> Job:
    """The job without the operators, and without the sharing, that harm its dense model most, where they are defaults.

    One walk scores single reductions of each; they stay in the folder's record, where a race finds them. folder: None in a
    process that only helps the first one, which decides. The decision is written into the run's configuration.
    """
    space, note = distributed.from_first(_least_damaging(job, folder, console) if folder else (job.supernet.space, ""))
    narrower = job.narrowed(space)
    if folder and note:
        say(console, note)
        folder.decide(narrower.config, note)
    return narrower


def _least_damaging(job: Job, folder: RunFolder, console: Console) -> tuple[SearchSpace, str]:
    """The space that remains, and what was seen in words: none where nothing is to be decided."""
    space, free = job.supernet.space, {"operators", "max_run"} & set(folder.defaults)
    singles = single_reductions(space)
    nothing = not free or not singles or (len(space.operators) == 1 and space.max_run == 1)
    if nothing or len(job.data.split("search")) < 2:
        return space, ""
    tried, record = drawn(job), Record(folder)
    images, new = len(tried.data.split("search")), [single for single in singles if single not in record.losses]
    first, dense = first_images(images), job.objective.total(job.dense)
    expected = first * forecast([job.dense, *singles], job.objective).cost / dense
    with progress_bar(console, "trying each operator", expected, "dense images") as advance:
        race = Race(job.dense, job.objective, images, record.scorer(tried, partial(advance, note="")), record.losses)
        race.run(singles, first)
    record.save()
    damage = {single: race.damage(single, first)[0] for single in singles}
    typical = DamageModel(space, damage).typical()
    best = next(iter(typical))
    kept = [name for name in typical if typical[name] <= TIMES * typical[best]] if "operators" in free else [*typical]
    shares, sharing = space.max_run > 1, ""
    if shares and "max_run" in free:
        shares = _sharing_harms_less(job, damage, kept)
        sharing = f"; sharing attention harms {'no more' if shares else 'more'} than dropping tokens for the same cost"
    for layer in (layer for own in job.include for layer in own.layers):  # the user's own are scored in any case
        shares |= layer.shared and space.max_run > 1
        kept += [layer.operator] if layer.operator is not None and layer.operator not in kept else []
    left_out = {name: nats for name, nats in typical.items() if name not in kept}
    note = f"tried on the dense model, the typical damage of a reduction in nats: {_listed(typical, kept)}"
    note += (f"; left out: {_listed(typical, left_out)}" if left_out else "") + sharing
    narrower = _narrower(job, kept, space.max_run if shares else 1)
    return narrower, note if new or narrower != space else ""  # an earlier call has said it


def _narrower(job: Job, operators: list[str], max_run: int) -> SearchSpace:
    """The space of these alone; as it was where that cannot keep the budget."""
    space = job.supernet.space
    operators = [name for name in space.operators if name in operators]
    dense = space.levels[0]
    levels = [dense, *(n for n in space.levels if any(OPERATORS[name].can_reduce(dense, n) for name in operators))]
    try:
        narrower = SearchSpace(space.depth, tuple(levels), tuple(operators), max_run, space.has_cls, space.grid)
        narrower.within(job.objective, None, job.allowed.high)
    except (BudgetError, SpaceError):
        return space
    return narrower


def _sharing_harms_less(job: Job, damage: dict[Architecture, float], operators: list[str]) -> bool:
    """Whether some layer that shares harms less than the least harmful drop of tokens that saves as much."""
    dense = job.objective.total(job.dense)
    saved = {single: dense - job.objective.total(single) for single in damage}
    drops = [one for one in damage if {layer.operator for layer in one.layers} & set(operators)]
    return any(
        all(damage[drop] > damage[single] for drop in drops if saved[drop] >= saved[single])
        for single in damage
        if any(layer.shared for layer in single.layers) and saved[single] > 0
    )


def _listed(typical: dict[str, float], names: list[str] | dict[str, float]) -> str:
    return ", ".join(f"{name} {typical[name]:.3g}" for name in typical if name in names)
