"""What an edge costs in time, on this device and at this batch size: nanoseconds per image, fitted to whole models.

Parts timed alone are not parts inside a model: caches, allocations and launches differ. So whole exported models are
timed, and the table is the one whose sums fit them best (least squares of relative errors, no edge below zero, no
pooling near it). Parts timed alone only decide what the sums leave open.
"""

from __future__ import annotations

import copy
import math
import platform
import random
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from poolshare.space import Architecture, CostTable, ModelError, SearchSpace

from .block import Sharing
from .measure import Kind, Parts, evaluating, table_of, wait_for
from .model import SuperNet
from .subnet import Subnet, checkpoint_filter_fn

POOL = 500  # random architectures among which the ones to time are chosen
TIMING = 0.002  # seconds of work in one timing, at least
WARM = 0.05  # seconds; a forward that takes less is run once before it is timed, so that caches are its own
ROUNDS, SPEND = (5, 40), 60.0  # as many rounds as fit into so many seconds, within these limits
NOISE, DOUBT = 0.01, 0.5  # relative doubt of a timed whole model, and of a part that was timed alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights and images
LEAST = 0.25  # of what a pooling took alone: no less in a table, or a search would take it for free


class Latency(NamedTuple):
    """A table of nanoseconds per image, where it holds, and how well its sums fit models that it was not fitted to."""

    table: CostTable
    batch_size: int
    device: str  # its name
    threads: int  # of torch, on a CPU
    dtype: str  # a key of DTYPES
    checked: tuple[tuple[str, int, int], ...]  # architecture, nanoseconds per image timed, and summed

    @property
    def errors(self) -> list[float]:
        """Relative errors of the sums, without sign, rising."""
        return sorted(abs(summed / timed - 1) for _, timed, summed in self.checked)

    @property
    def conditions(self) -> str:
        """Where the table holds, in words."""
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        return f"batch {self.batch_size} in {self.dtype} on {self.device}{threads}"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return {**self._asdict(), "table": self.table.to_json(), "checked": [list(row) for row in self.checked]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Latency:
        """Read what `to_json` gave. Raises KeyError, TypeError or a ValueError where it is anything else."""
        checked = tuple((str(text), int(timed), int(summed)) for text, timed, summed in value["checked"])
        place = int(value["batch_size"]), str(value["device"]), int(value["threads"]), str(value["dtype"])
        return cls(CostTable.from_json(value["table"]), *place, checked)


def device_name(device: torch.device) -> str:
    """What a table that was measured here is not valid without."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    return f"{device.type} {cpu_name(listing.read_text(encoding='utf-8') if listing.exists() else '')}"


def cpu_name(listing: str) -> str:
    """What a processor calls itself in Linux's list of them; without that, its kind: two of a kind differ in speed."""
    names = [line.partition(":")[2].strip() for line in listing.splitlines() if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def measure_latency_table(
    supernet: SuperNet,
    batch_size: int = 1,
    *,
    dtype: str = "fp32",
    rounds: int | None = None,
    check: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Nanoseconds per image of every kind of edge of the supernet's space, on its device, at this batch size.

    Some architectures (twice as many as there are kinds of edges) are chosen so that they tell the kinds apart,
    exported, and timed in turn, in another order each round; `check` others are timed among them and not fitted. What
    other programs do at the same time cancels in the ratios of a round; on a CPU with one thread it is not even
    counted, for there the clock is the thread's own. rounds: None for as many as fit into a minute, 5 to 40.
    progress: called with timings done, and all of them. dtype: in which the exported models run, "fp32", "bf16" or
    "fp16". Raises ModelError for a batch without images and for another dtype.
    """
    if batch_size < 1:
        raise ModelError(f"batch size {batch_size} is not possible; latency is measured with at least one image")
    supernet = deployed(supernet, dtype)
    space, rng = supernet.space, random.Random(f"latency {seed}")
    kinds = kinds_of(space, supernet.sharing)
    alone = time_parts(supernet, batch_size, kinds)
    others = list(dict.fromkeys(space.sample(rng) for _ in range(50 * check)))[: min(check, space.size // 4)]
    chosen = design(space, kinds, 2 * len(kinds), rng, set(others))
    timed = typical(time_models(supernet, [*chosen, *others], batch_size, rounds, rng, progress)) * 1e9
    table = fit(kinds, alone, chosen, timed[: len(chosen)] / batch_size)
    checked = tuple(
        (str(architecture), round(whole / batch_size), table.total(architecture))
        for architecture, whole in zip(others, timed[len(chosen) :], strict=True)
    )
    device = next(supernet.parameters()).device
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return Latency(table, batch_size, device_name(device), threads, dtype, checked)


def deployed(supernet: SuperNet, dtype: str) -> SuperNet:
    """The supernet itself, or a copy in another precision. Raises ModelError for one that is not among DTYPES."""
    if dtype not in DTYPES:
        raise ModelError(f"latency in {dtype!r:.80} cannot be measured; there are {', '.join(DTYPES)}")
    same = next(supernet.parameters()).dtype == DTYPES[dtype]
    return supernet if same else copy.deepcopy(supernet).to(DTYPES[dtype])


class Share(NamedTuple):
    """The time of a whole model as a share of the dense one's, both timed in turn."""

    median: float
    high: float  # the end of the median's 95 % interval


def measure_shares(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batch_size: int,
    rng: random.Random,
    dtype: str = "fp32",
) -> tuple[float, list[Share]]:
    """Nanoseconds per image of the dense exported model, and what part of that each architecture's takes."""
    supernet = deployed(supernet, dtype)
    seconds = time_models(supernet, [supernet.space[0], *architectures], batch_size, None, rng)
    shares = np.sort(seconds[:, 1:] / seconds[:, :1], axis=0)  # (rounds, architectures)
    rounds = len(shares)
    high = min(rounds - 1, math.ceil(rounds / 2 + 0.98 * math.sqrt(rounds)))  # by the binomial distribution of ranks
    dense = float(typical(seconds)[0]) * 1e9 / batch_size
    return dense, [Share(float(np.median(column)), float(column[high])) for column in shares.T]


# Kinds of edges


def kinds_of(space: SearchSpace, sharing: Sharing = "qk") -> list[Kind]:
    """What the time of any exported model of the space is made of.

    An owner that must write its map leaves the fused kernel: its first follower then costs other than the next.
    """
    levels = space.levels
    kinds: list[Kind] = [("source",)]
    kinds += [("own", level) for level in levels]
    kinds += [("shared", level) for level in levels if space.max_run > 1]
    kinds += [("first_shared", level) for level in levels if space.max_run > 1 and sharing == "map"]
    kinds += [("pool", *reduction) for reduction in space.reductions]
    return kinds + [("sink", level) for level in levels]


def counts(architecture: Architecture, kinds: Sequence[Kind]) -> np.ndarray:
    """(kinds,) how often each occurs in the exported model of the architecture."""
    index = {kind: position for position, kind in enumerate(kinds)}
    row, layers = np.zeros(len(kinds)), architecture.layers
    row[index["source",]] = row[index["sink", layers[-1].tokens]] = 1
    for before, layer in zip((layers[0], *layers), layers, strict=False):
        first = ("first_shared", layer.tokens)
        kind = first if not before.shared and first in index else ("shared", layer.tokens)
        row[index[kind if layer.shared else ("own", layer.tokens)]] += 1
        if layer.operator is not None:
            row[index["pool", layer.operator, before.tokens, layer.tokens]] += 1
    return row


def design(
    space: SearchSpace, kinds: Sequence[Kind], size: int, rng: random.Random, others: Set[Architecture] = frozenset()
) -> list[Architecture]:
    """Up to `size` architectures whose timings tell the kinds apart: each time the one about which least is known.

    None of the `others`.
    """
    drawn = dict.fromkeys([space[0], *(space.sample(rng) for _ in range(POOL))])
    pool = [architecture for architecture in drawn if architecture not in others]
    rows = np.array([counts(architecture, kinds) for architecture in pool])  # (pool, kinds)
    known = np.linalg.inv(1e-3 * np.eye(len(kinds)) + np.outer(rows[0], rows[0]))
    taken = [0]
    while len(taken) < min(size, len(pool)):
        doubt = np.einsum("ij,jk,ik->i", rows, known, rows)
        doubt[taken] = -1
        best = int(doubt.argmax())
        taken.append(best)
        step = known @ rows[best]
        known -= np.outer(step, step) / (1 + rows[best] @ step)
    return [pool[index] for index in taken]


def fit(
    kinds: Sequence[Kind], alone: np.ndarray, architectures: Sequence[Architecture], timed: np.ndarray
) -> CostTable:
    """The table whose sums come closest to `timed` (architectures,), in nanoseconds per image; relative least squares.

    alone: (kinds,) nanoseconds of parts timed alone; scaled as a whole to the models, they are held to loosely. They
    decide what sums cannot tell, such as a constant moved from every block into the embedding.
    """
    from scipy.optimize import nnls

    rows = np.array([counts(architecture, kinds) for architecture in architectures])  # (architectures, kinds)
    expected = alone * np.median(timed / (rows @ alone))
    doubt = DOUBT * expected + 0.02 * expected.max()
    least = np.array([LEAST * part if kind[0] == "pool" else 0.0 for kind, part in zip(kinds, expected, strict=True)])
    equations = np.vstack([rows / (NOISE * timed)[:, None], np.diag(1 / doubt)])
    wanted = np.concatenate([np.full(len(timed), 1 / NOISE), expected / doubt])
    above, _ = nnls(equations, wanted - equations @ least)
    return table_of("latency", {kind: round(cost) for kind, cost in zip(kinds, least + above, strict=True)})


# Timing


def time_models(
    supernet: SuperNet,
    architectures: Sequence[Architecture],
    batch_size: int,
    rounds: int | None,
    rng: random.Random,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(rounds, architectures) seconds of one forward of each exported model, interleaved; see `interleaved`."""
    reference = next(supernet.parameters())
    shape = (batch_size, supernet.in_chans, *supernet.patch_embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(reference.device, reference.dtype)
    with evaluating(supernet):
        models = []
        for architecture in architectures:
            model = Subnet.from_supernet(supernet, architecture)
            # The supernet's own tensors: memory does not grow with the number of models.
            model.load_state_dict(checkpoint_filter_fn(supernet.state_dict(), model), assign=True)
            models.append(model)
        return interleaved([(model, (images,)) for model in models], rounds, rng, progress)


def interleaved(
    work: Sequence[tuple[nn.Module, tuple[torch.Tensor, ...]]],
    rounds: int | None,
    rng: random.Random,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(rounds, work) seconds of one forward each: every round times each of them once, in an order of its own."""
    done = 0
    with torch.inference_mode():
        for model, inputs in work:
            model(*inputs)
        first = [_seconds(model, inputs, 1) for model, inputs in work]
        repeats = [max(1, min(20, int(TIMING / seconds))) for seconds in first]
        if rounds is None:
            one = sum((times + (seconds < WARM)) * seconds for times, seconds in zip(repeats, first, strict=True))
            rounds = max(ROUNDS[0], min(ROUNDS[1], int(SPEND / one)))
        timed = np.zeros((rounds, len(work)))
        for round_ in range(rounds):
            for position in rng.sample(range(len(work)), len(work)):
                model, inputs = work[position]
                if first[position] < WARM:
                    model(*inputs)
                timed[round_, position] = _seconds(model, inputs, repeats[position])
                done += 1
                if progress:
                    progress(done, timed.size)
    return timed


def typical(times: np.ndarray) -> np.ndarray:
    """(rounds, work) → (work,): medians over rounds, once each round is scaled to the others."""
    logs = np.log(times)
    logs -= np.median(logs - np.median(logs, axis=0), axis=1, keepdims=True)
    return np.exp(np.median(logs, axis=0))


def _seconds(model: nn.Module, inputs: tuple[torch.Tensor, ...], repeats: int) -> float:
    device = inputs[0].device
    own_clock = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if own_clock else time.perf_counter
    wait_for(device)
    start = clock()
    for _ in range(repeats):
        model(*inputs)
    wait_for(device)
    return max(clock() - start, 1e-9) / repeats


def time_parts(supernet: SuperNet, batch_size: int, kinds: Sequence[Kind]) -> np.ndarray:
    """(kinds,) nanoseconds per image of each part by itself."""
    part = Parts(supernet, batch_size)
    work = [part(("shared", *kind[1:]) if kind[0] == "first_shared" else kind) for kind in kinds]
    with evaluating(supernet):
        return typical(interleaved(work, 3, random.Random(0))) * 1e9 / batch_size
