"""What an edge, and what a whole model, costs: multiply-adds counted by fvcore, parameters, milliseconds.

fvcore calls one multiply-add a flop; here it is a MAC. Counting is exact and additive, so the table of edges gives
to the integer what fvcore counts on the exported model.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from poolshare.space import CostTable, ModelError
from poolshare.space.operators import Grid, grid_of

from .block import Attended, SharedAttention, run_block
from .counting import counted, level_terms, reduction_class, reduction_terms
from .heads.maps import normed_map, tapped
from .model import SuperNet, added
from .operators.pooling import Pooling, pooling_name
from .operators.relative import shared_bias
from .operators.rotary import rotation
from .tokens import Carry, Tokens

# Operators that move, compare or scale what others computed: fvcore does not count them, and neither do we.
FREE_OPERATORS = frozenset().union(
    # per element, and sums
    ("add", "add_", "sub", "rsub", "mul", "mul_", "div", "neg", "sum", "mean", "linalg_vector_norm", "square"),
    # functions of elements, also in place
    ("softmax", "gelu", "silu", "relu", "sigmoid", "dropout", "exp", "log", "tanh", "mish"),
    ("hardswish", "hardsigmoid", "hardtanh", "relu6", "elu", "celu", "selu", "leaky_relu", "prelu"),
    ("silu_", "relu_", "sigmoid_", "tanh_", "mish_", "hardswish_", "hardsigmoid_", "hardtanh_", "relu6_"),
    ("elu_", "celu_", "selu_", "leaky_relu_"),
    # choices and comparisons
    ("max", "min", "amax", "argmax", "argmin", "adaptive_max_pool2d", "max_pool1d", "max_pool2d"),
    ("eq", "le", "clamp_min", "sort", "bitwise_or", "__or__"),
    # moves, those of rotary tables, and those by index
    ("clone", "expand", "expand_as", "repeat", "unbind", "slice", "select", "stack", "where"),
    ("pad", "reshape_as", "repeat_interleave", "flip", "meshgrid", "cartesian_prod", "sin", "cos"),
    ("diagonal", "gather", "index_select", "index_add", "scatter", "scatter_add", "scatter_reduce"),
    # constants, and the sizes of timm's padding
    ("fill_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "new_full", "arange"),
    ("ceil",),
)


def measure_macs(supernet: SuperNet) -> CostTable:
    """MACs of every kind of edge, per image. Raises ModelError for an operator that can be neither counted nor free.

    fvcore traces a few sizes of each kind; from these the others follow, see `counted`. A process traces each of them
    once for a base model, whatever spaces it is asked of.
    """
    space, part = supernet.space, Parts(supernet)
    fused = [block.attn.fused_attn for block in supernet.blocks]
    known = _TRACED.setdefault(repr((supernet.base, supernet.sharing, supernet.carry, fused)), {})

    def count(*kind: Any) -> int:
        if kind not in known:
            known[kind] = count_macs(*part(kind))
        return known[kind]

    with torch.no_grad():
        costs: dict[Kind, int] = {("source",): count("source")}
        for name in PER_LEVEL:
            found = counted(sorted(space.levels), level_terms, partial(count, name))
            costs |= {(name, level): cost for level, cost in found.items()}
        for reductions in _alike(supernet).values():
            pooled = counted(
                reductions,
                lambda size: reduction_terms(*size[1:]),
                lambda size: count("pool", *size),
                lambda size: reduction_class(*size[1:]),
            )
            costs |= {("pool", *size): cost for size, cost in pooled.items()}
    return table_of("macs", costs)


_TRACED: dict[str, dict[Kind, int]] = {}


def measure_parameters(supernet: SuperNet) -> CostTable:
    """Parameters of every kind of edge; their sum is the size of the exported model."""
    space, part = supernet.space, Parts(supernet)
    kinds: list[Kind] = [("source",), *((name, level) for name in PER_LEVEL for level in space.levels)]
    kinds += [("pool", *reduction) for reduction in space.reductions]
    return table_of("parameters", {kind: part(kind)[0].parameter_total for kind in kinds})


def count_macs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """MACs of one forward of `model` on `inputs`, fused attention included.

    Raises ModelError for an operator that fvcore does not count exactly and that is not among FREE_OPERATORS.
    """
    with warnings.catch_warnings():
        # fvcore still uses torch.jit's tracer, which newer torch calls deprecated; the counts are unaffected.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        from fvcore.nn import FlopCountAnalysis

        with evaluating(model):
            analysis = FlopCountAnalysis(model, inputs)
            for operator, count in HANDLES.items():
                analysis.set_op_handle(f"aten::{operator}", count)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            total = analysis.total()
            uncounted = {name.removeprefix("aten::") for name in analysis.unsupported_ops()} - FREE_OPERATORS
            uncounted |= {"einsum"} & set(analysis.by_operator())  # counted, but only to a few digits
    if uncounted:
        raise ModelError(
            f"fvcore cannot exactly count {', '.join(sorted(uncounted))} in {type(model).__name__}, so its MACs are not exact; "
            "write it with matmul or convolutions, or name it in FREE_OPERATORS if it multiplies nothing"
        )
    if total != int(total):
        raise ModelError(f"fvcore counts {total} MACs in {type(model).__name__}, which is not a whole number")
    return int(total)


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Fused attention: QKᵀ and the map times V, each B·heads·N·N·head_dim; values may have a width of their own."""
    *batch_and_heads, queries, width = inputs[0].type().sizes()
    keys, of_values = inputs[1].type().sizes()[-2], inputs[2].type().sizes()[-1]
    return torch.Size(batch_and_heads).numel() * queries * keys * (width + of_values)


def _rms_norm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Per element: its square added up, the scaling, and the product with the weight where there is one.

    fvcore's 5 of a layer norm, less its mean and the difference from it.
    """
    return (3 if inputs[2].type().kind() == "TensorType" else 2) * math.prod(inputs[0].type().sizes())


def _average_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Windows of `avg_pool2d`: each adds up the pixels in it, those of the border's padding excepted.

    What fvcore counts for `adaptive_avg_pool2d` where windows neither overlap nor leave anything out.
    """
    image, result = inputs[0].type().sizes(), outputs[0].type().sizes()
    kernel, strides, padding = ([number.toIValue() for number in value.node().inputs()] for value in inputs[1:4])
    strides = strides or kernel  # torch's default

    def seen(axis: int) -> int:
        length, at = image[axis - 2], lambda values: values[axis % len(values)]
        starts = [window * at(strides) - at(padding) for window in range(result[axis - 2])]
        return sum(min(start + at(kernel), length) - max(start, 0) for start in starts)

    return math.prod(image[:-2]) * seen(0) * seen(1)


# What fvcore does not count by itself.
HANDLES = {
    "scaled_dot_product_attention": _attention_macs,
    "rms_norm": _rms_norm_macs,
    "avg_pool2d": _average_macs,
}


class _Part(nn.Module):
    """One kind of edge as a module that fvcore can trace."""

    def __init__(self, run: Callable[..., Any], parameters: int, *modules: nn.Module):
        super().__init__()
        self.run, self.parameter_total = run, parameters
        self.held = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(*inputs)


Kind = tuple[Any, ...]  # ("source",), ("own", tokens), ("shared", tokens), ("pool", operator, before, after), …


class Parts:
    """Of each kind of edge of a supernet, a module with inputs of zeros."""

    def __init__(self, supernet: SuperNet, batch_size: int = 1):
        self.supernet, self.batch_size = supernet, batch_size
        self.block, self.taps = supernet.blocks[0], tapped(supernet)
        relative = shared_bias(supernet)  # computed once, with the source
        self.relative = None if relative is None else torch.zeros_like(relative)
        attention, rope = self.block.attn, getattr(supernet, "rope", None)
        block_size = _size(self.block)
        query_key_size = _size(attention) - _size(SharedAttention(attention))
        heads = (supernet.norm, supernet.fc_norm, supernet.attn_pool, *_heads(supernet))
        head_size = sum(_size(part) for part in heads if part)
        rest = len(supernet.blocks) * block_size + head_size + _size(supernet.poolings)
        self.source = _Part(self._embed, _size(supernet) - rest, supernet)
        self.own = _Part(self._attend, block_size, self.block, *([] if rope is None else [rope]))
        self.shared = _Part(self._follow, block_size - query_key_size, self.block)
        self.sink = _Part(self._answer, head_size, supernet)

    def __call__(self, kind: Kind) -> tuple[_Part, tuple[torch.Tensor, ...]]:
        """The module of this kind of edge, and what it takes."""
        supernet = self.supernet
        match kind:
            case ("source",):
                return self.source, (self._zeros(supernet.in_chans, *supernet.patch_embed.img_size),)
            case ("own", level):
                return self.own, (self._tokens(level),)
            case ("shared", level):
                return self.shared, (self._tokens(level), *self._left(level))
            case ("sink", level):
                patches = supernet.patch_embed.num_patches  # whatever the level, maps are of the full grid
                whole = self._zeros(patches, supernet.embed_dim)
                return self.sink, (whole,) * len(self.taps) if self.taps else (self._tokens(level),)
            case ("pool", operator, before, after):
                pooling = supernet.poolings[pooling_name(operator, before, after)]
                part = _Part(partial(_pool, pooling, supernet.carry), _size(pooling), pooling)
                return part, (self._tokens(before), *self._attended(before))
        raise ValueError(f"{kind!r} is not a kind of edge")

    def _zeros(self, *shape: int) -> torch.Tensor:
        reference = next(self.supernet.parameters())
        return torch.zeros(self.batch_size, *shape, device=reference.device, dtype=reference.dtype)

    def _tokens(self, patches: int) -> torch.Tensor:
        return self._zeros(self.supernet.num_prefix_tokens + patches, self.supernet.embed_dim)

    def _attended(self, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.block.attn
        tokens = self.supernet.num_prefix_tokens + patches
        queries_or_keys = self._zeros(attention.num_heads, tokens, attention.head_dim)
        return queries_or_keys, queries_or_keys

    def _left(self, patches: int) -> tuple[torch.Tensor, ...]:
        """What an owner hands to a follower."""
        tokens = self.supernet.num_prefix_tokens + patches
        written = [self._zeros(self.block.attn.num_heads, tokens, tokens)] if self.supernet.sharing == "map" else []
        return (*self._attended(patches), *written)

    def _embed(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.supernet.embed(images)
        return (found.features,) if found.relative is None else (found.features, found.relative)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        supernet, patches = self.supernet, x.shape[1] - self.supernet.num_prefix_tokens
        tokens = _made_up(x, patches, supernet.patch_embed.grid_size, supernet.carry, relative=self.relative)
        return run_block(self.block, x, bias=added(supernet, 0, tokens), turned=rotation(supernet, 0, tokens))[0]

    def _follow(
        self, x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, *written: torch.Tensor
    ) -> torch.Tensor:
        return run_block(self.block, x, Attended(queries, keys, None, *written))[0]

    def _answer(self, *features: torch.Tensor) -> torch.Tensor:
        """Of a head for every pixel, which takes the features of all patches after each of its blocks, or the classifier."""
        if not self.taps:
            return self.supernet.classify(*features)
        return self.supernet.head([normed_map(self.supernet, one) for one in features])


def _pool(pooling: Pooling, carry: Carry, x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A reduction by itself."""
    tokens = _made_up(x, pooling.before, pooling.grid, carry)  # type: ignore[arg-type]
    return pooling.pool(tokens, Attended(queries, keys), carry).features


def _made_up(x: torch.Tensor, count: int, whole: Grid, carry: Carry, relative: torch.Tensor | None = None) -> Tokens:
    """Tokens of which `count` are patch tokens: cells of the grid `whole`, or else some that a path has merged somehow."""
    tokens = Tokens(x, relative=relative)
    if grid_of(count, whole) is not None or carry < Carry.PLACES:
        return tokens
    patches = x[:, -count:]
    tokens = tokens._replace(sizes=torch.ones_like(patches[:, :, 0]), places=torch.zeros_like(patches[:, :, :2]))
    if carry < Carry.SOURCES:
        return tokens
    return tokens._replace(sources=torch.zeros(len(x), math.prod(whole), dtype=torch.int64, device=x.device))


def _alike(supernet: SuperNet) -> dict[Kind, list[tuple[str, int, int]]]:
    """The reductions of the space, smallest first, by operator and the shapes of its weights."""
    groups: dict[Kind, list[tuple[str, int, int]]] = {}
    for reduction in sorted(supernet.space.reductions, key=lambda reduction: reduction[1:]):
        weights = supernet.poolings[pooling_name(*reduction)].parameters()
        groups.setdefault((reduction[0], *(weight.shape for weight in weights)), []).append(reduction)
    return groups


def table_of(quantity: str, costs: Mapping[Kind, int]) -> CostTable:
    """Costs of kinds of edges as a table; where those that share are not among them, no layer does."""

    def at_levels(name: str) -> dict[int, int]:
        return {kind[1]: cost for kind, cost in costs.items() if kind[0] == name}

    own, pool = at_levels("own"), {kind[1:]: cost for kind, cost in costs.items() if kind[0] == "pool"}
    shared, sink, first_shared = own | at_levels("shared"), at_levels("sink"), at_levels("first_shared")
    return CostTable(quantity, costs["source",], own, shared, pool, sink, first_shared)  # type: ignore[arg-type]


def _heads(supernet: SuperNet) -> tuple[nn.Module, ...]:
    heads = supernet.get_classifier()  # a distilled DeiT has two
    return heads if isinstance(heads, tuple) else (heads,)


PER_LEVEL = ("own", "shared", "sink")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that a clock may be read; a CPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_latency(model: nn.Module, images: torch.Tensor, repeats: int = 11) -> float:
    """Median wall-clock milliseconds of one forward on this batch, after a warm-up. The model's device must hold it."""

    def forward() -> float:
        wait_for(images.device)
        start = time.perf_counter()
        model(images)
        wait_for(images.device)
        return (time.perf_counter() - start) * 1e3

    with evaluating(model), torch.inference_mode():
        forward()
        forward()
        return statistics.median(forward() for _ in range(repeats))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
