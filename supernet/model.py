"""SuperNet: one timm ViT whose weights run every architecture of a space; the forward walks their prefix tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from poolshare.space import Architecture, Layer, ModelError, PrefixTree, SearchSpace, SpaceError
from poolshare.space.operators import grid_of

from .base import TimmViT, carry_of, embed, fc_norm_option, make_base, outline
from .block import Attended, Sharing, left_for, run_block
from .heads.maps import head_map, tapped
from .operators.pooling import make_poolings, pooling_name
from .operators.relative import relative_bias
from .operators.rotary import rotation
from .options import read_options
from .tokens import Carry, Tokens


class SuperNet(TimmViT):
    """A timm ViT, of one of the `KINDS`, that also takes architectures; made by `from_timm`.

    Differs from timm's: `forward(images, architectures)`, which runs any number of architectures over their shared
    prefixes. Weights and their names are the base model's (plus `poolings.…` of operators that learn), so any of its
    checkpoints is a warm start, and the architecture "all tokens, no sharing" is timm's own forward, bit for bit. So is
    every block that neither follows nor is followed; the others run the same kernels.
    """

    head: Any  # timm's, or a `MapHead`
    space: SearchSpace
    sharing: Sharing
    carry: Carry  # what the operators of the space ask to know of their tokens
    base: tuple[str, dict[str, Any]]  # timm name and options from which the base model can be made again

    @classmethod
    def from_timm(
        cls,
        name: str,
        space: SearchSpace | Callable[[VisionTransformer], SearchSpace],
        pretrained: bool = False,
        *,
        sharing: Sharing = "qk",
        **options: Any,
    ) -> SuperNet:
        """Build the supernet of `space` over timm's model `name`.

        space: or a function that gives it for the base model, which is on the meta device.
        sharing: what an owner hands to its followers. "qk": queries and keys, and all stay in the fused kernel; "map":
        the attention map, written out as in the PSViT paper. One function with the same weights, at other costs.
        options: passed to `timm.create_model` (num_classes, img_size, in_chans, …).
        Raises ModelError for a model that is unknown or unsupported, SpaceError where the space does not fit it; both
        before any weight is allocated.
        """
        check_sharing(sharing)
        options = read_options(name, options)
        base = outline(name, options)
        space = space if isinstance(space, SearchSpace) else space(base)
        check_fit(name, base, space)
        model = make_base(name, options, pretrained)
        # An own class over timm's own module: no weight is renamed, no method is lost.
        model.__class__ = KINDS[type(model)]
        model.space, model.sharing, model.base = space, sharing, (name, options)
        model.carry = carry_of(model, space.operators)
        model.poolings = make_poolings(model, space.reductions)
        return model  # type: ignore[return-value]

    def offer(self, space: SearchSpace) -> None:
        """Run a part of the space alone, by the same weights. Raises SpaceError for one that has more."""
        if not set(space.reductions) <= set(self.space.reductions) or space.depth != self.space.depth:
            raise SpaceError(f"{space} is no part of {self.space}")
        self.space = space
        self.carry = carry_of(self, space.operators)

    def forward(self, images: torch.Tensor, architectures: Sequence[Architecture] | None = None) -> torch.Tensor:  # type: ignore[override]
        """Logits of all architectures: (B, channels, H, W) → (architectures, B, classes), or of every pixel, see `MapHead`.

        Equal, bit for bit on CPU, to running them one by one. Without architectures: timm's own forward, (B, classes), or of
        every pixel the dense one. Raises ArchitectureError for an architecture outside the space.
        """
        if architectures is None:
            return self(images, [self.space[0]])[0] if tapped(self) else super().forward(images)
        if not architectures:
            return images.new_empty(0, len(images), self.num_classes, *(images.shape[2:] if tapped(self) else ()))
        logits: list[torch.Tensor | None] = [None] * len(architectures)
        for positions, output in self.leaves(images, architectures):
            for position in positions:
                logits[position] = output
        return torch.stack(logits)  # type: ignore[arg-type]  # every architecture ends at a leaf

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head, as timm's, or one of the same kind for every pixel; exported models get it too."""
        if tapped(self):
            self.num_classes, self.head = num_classes, self.head.renewed(num_classes)
            self.base = self.base[0], self.base[1] | {"num_classes": num_classes}
            return
        super().reset_classifier(num_classes, global_pool)
        changed: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:
            changed |= {"global_pool": global_pool, **fc_norm_option(self)}
        self.base = self.base[0], self.base[1] | changed

    def set_input_size(self, *args: Any, **options: Any) -> None:
        """Not supported: raises ModelError, as the space's token counts belong to one image size."""
        raise ModelError(
            f"the space of {self.base[0]} belongs to one image size; build a supernet with another img_size"
        )

    def leaves(
        self, images: torch.Tensor, architectures: Sequence[Architecture]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Depth-first over the prefix tree: (positions of an architecture in the sequence, its logits (B, classes)).

        Holds activations of one path only, so memory does not grow with the number of architectures.
        """
        for architecture in architectures:
            self.space.check(architecture)
        return self._walk(PrefixTree.of(architectures), 0, self.embed(images), None, ())

    def embed(self, images: torch.Tensor) -> Tokens:
        """Everything before the first block: (B, channels, H, W) → (B, prefix + P, C)."""
        return embed(self, images)

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Everything after the last block: (B, prefix + P, C) → (B, classes)."""
        return self.forward_head(self.norm(tokens))

    def _walk(
        self,
        tree: PrefixTree,
        index: int,
        tokens: Tokens,
        attended: Attended | None,
        maps: tuple[torch.Tensor, ...],
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """maps: those that a head for every pixel has taken so far."""
        taps = tapped(self)
        if index - 1 in taps:
            maps = (*maps, head_map(self, tokens))
        if tree.ends:
            yield tree.ends, self.head(maps) if taps else self.classify(tokens.features)
        for layer, child in tree.children.items():
            for branch in self._branches(layer, child):
                leave = left_for(branch.children, self.sharing)
                after, used = self.run_layer(index, layer, tokens, attended, leave)
                yield from self._walk(branch, index + 1, after, used if leave else None, maps)

    def _branches(self, layer: Layer, tree: PrefixTree) -> list[PrefixTree]:
        """The tree after a layer, in two where some follow its written map: it leaves the fused kernel for them alone."""
        following = {after: child for after, child in tree.children.items() if after.shared}
        others = {after: child for after, child in tree.children.items() if not after.shared}
        if self.sharing == "qk" or layer.shared or not following or not (others or tree.ends):
            return [tree]
        return [PrefixTree(following), PrefixTree(others, tree.ends)]

    def run_layer(
        self, index: int, layer: Layer, tokens: Tokens, attended: Attended | None, leave: Sharing | None = "qk"
    ) -> tuple[Tokens, Attended | None]:
        """One edge of the graph: pooling where there is any, then block `index`.

        attended: what the block before left; leave: what this one must, see `left_for`. Returns the tokens after the
        block, and what it attended with. With `set_grad_checkpointing` the backward pass computes the edge once more.
        """
        return run_edge(self, index, layer, tokens, attended, leave, self.carry)


_SEE: ContextVar[Callable[[Any], Any] | None] = ContextVar("_SEE", default=None)


def _nothing(_: Any) -> Any:
    return None


@contextmanager
def seeing_checkpoints(see: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, `see` is shown what checkpoints would keep for the backward pass, and there can be none.

    torch's keep it where no hook of saved tensors sees it, and for ever if that pass never comes.
    """
    before = _SEE.set(see)
    try:
        yield
    finally:
        _SEE.reset(before)


def run_edge(
    model: Any,
    index: int,
    layer: Layer,
    tokens: Tokens,
    attended: Attended | None,
    leave: Sharing | None,
    carry: Carry,
) -> tuple[Tokens, Attended | None]:
    """`SuperNet.run_layer`, for whatever has `blocks` and `poolings`. carry: what the path must know of its tokens."""

    def run(tokens: Tokens, attended: Attended | None) -> tuple[Tokens, Attended | None]:
        if layer.operator is not None:
            before = tokens.features.shape[1] - model.num_prefix_tokens
            tokens = model.poolings[pooling_name(layer.operator, before, layer.tokens)].pool(tokens, attended, carry)
        shared, bias, turned = attended if layer.shared else None, None, None
        if shared is None:  # a follower's keys are turned already, and its scores the owner's
            bias, turned = added(model, index, tokens), rotation(model, index, tokens)
        features, used = run_block(model.blocks[index], tokens.features, shared, leave, bias, turned)
        return tokens._replace(features=features), used

    if model.grad_checkpointing and torch.is_grad_enabled():
        if (see := _SEE.get()) is not None:
            for kept in tree_leaves((tokens, attended)):
                see(kept)
            with saved_tensors_hooks(_nothing, _nothing):
                return run(tokens, attended)
        return checkpoint(run, tokens, attended, use_reentrant=False)
    return run(tokens, attended)


def added(model: Any, index: int, tokens: Tokens) -> torch.Tensor | None:
    """What block `index` adds to the scores of its attention: by relative positions, and by sizes; see `Attended`."""
    parts = [part for part in (relative_bias(model, index, tokens), tokens.log_sizes()) if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


def run_layers(
    model: Any,
    layers: Sequence[Layer],
    images: torch.Tensor,
    carry: Carry = Carry.NOTHING,
    wanted: Sequence[int] | None = None,
) -> list[Tokens]:
    """Tokens after layers of an architecture, of a supernet or a subnet. carry: what is to be known of them, beside what
    the operators ask for. wanted: rising indices of layers, of which alone the tokens are kept; None: all.
    """
    wanted = range(len(layers)) if wanted is None else wanted
    tokens, carry, outputs = embed(model, images), max(carry, model.carry), []
    attended: Attended | None = None
    for index, layer in enumerate(layers[: wanted[-1] + 1]):
        leave = left_for(layers[index + 1 : index + 2], model.sharing)
        tokens, attended = run_edge(model, index, layer, tokens, attended, leave, carry)
        if index in wanted:
            outputs.append(tokens)
    return outputs


def check_sharing(sharing: Any) -> None:
    """Raise ModelError for an unknown kind of sharing."""
    if sharing not in get_args(Sharing):
        raise ModelError(
            f"sharing={sharing!r:.80} is unknown; it must be 'qk' (queries and keys) or 'map' (a written map)"
        )


class PlainSuperNet(SuperNet, VisionTransformer):
    """The supernet of timm's VisionTransformer."""


class EvaSuperNet(SuperNet, Eva):
    """The supernet of timm's Eva: DINOv3, EVA-02, PE, RoPE-ViT and others."""


class DistilledSuperNet(SuperNet, VisionTransformerDistilled):
    """The supernet of a distilled DeiT: CLS and distillation token are prefix tokens, the logits are both heads' mean."""


class BeitSuperNet(SuperNet, Beit):
    """The supernet of timm's BEiT."""


class RelPosSuperNet(SuperNet, VisionTransformerRelPos):
    """The supernet of timm's ViT with relative positions."""


KINDS: dict[type, Any] = {
    VisionTransformer: PlainSuperNet,
    VisionTransformerDistilled: DistilledSuperNet,
    Eva: EvaSuperNet,
    Beit: BeitSuperNet,
    VisionTransformerRelPos: RelPosSuperNet,
}


def check_fit(name: str, model: VisionTransformer, space: SearchSpace) -> None:
    """Raise SpaceError where depth, token count or CLS of the space are not the model's."""
    if space.depth != len(model.blocks):
        raise SpaceError(f"the space has depth {space.depth}, but {name} has {len(model.blocks)} blocks")
    if space.levels[0] != model.patch_embed.num_patches:
        raise SpaceError(
            f"the levels begin with {space.levels[0]} patch tokens, but {name} at {model.patch_embed.img_size} has "
            f"{model.patch_embed.num_patches}; begin with that, or choose another image size"
        )
    rows, columns = model.patch_embed.grid_size
    if (space.grid or grid_of(space.levels[0]) or (rows, columns)) != (rows, columns):
        raise SpaceError(
            f"the patches of {name} at {model.patch_embed.img_size} are a grid of {rows}×{columns}: give the space "
            f"grid={(rows, columns)}"
        )
    if space.has_cls is not None and space.has_cls != model.has_class_token:
        raise SpaceError(
            f"the space says has_cls={space.has_cls}, but {name} has {'a' if model.has_class_token else 'no'} CLS token"
        )
