"""SuperNet: one timm ViT whose weights run every architecture of a space; the forward walks their prefix tree."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from poolshare.space import Architecture, Layer, ModelError, PrefixTree, SearchSpace, SpaceError
from poolshare.space.architecture import MAX_DEPTH

from .block import Attended, Sharing, left_for, run_block
from .pooling import make_poolings, pooling_name


def create_base(name: str, pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A timm ViT that poolshare can search. Raises ModelError where timm does not know it or a part is unsupported."""
    if not isinstance(name, str) or not timm.is_model(name):
        close = difflib.get_close_matches(str(name).split(".")[0], timm.list_models(["vit_*", "deit*"]), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; `timm.list_models('vit*')` lists what there is"
        raise ModelError(f"timm knows no model {name!r}{hint}")
    try:
        if options:
            check_options(name, options)
            _check_memory(name, options)
        model = timm.create_model(name, pretrained=pretrained, **options)
    except ModelError:
        raise
    except Exception as error:  # what odd options raise inside timm may be anything
        problem = str(error).strip() or type(error).__name__
        raise ModelError(f"timm cannot make model {name!r} with options {options!r:.200}: {problem:.300}") from None
    reason = unsupported_part(model)
    if reason:
        raise ModelError(f"model {name!r} cannot be searched: {reason}")
    return model


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ModelError for an option that is no property of a VisionTransformer.

    Options come from files too, and timm's own ones beside these would read other files, or load weights from them.
    """
    known = set(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "device", "dtype"}
    for option, value in options.items():
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"{option}={value!r:.80} is no option of model {name!r} that may be given here{hint}")
    depth = options.get("depth")
    if isinstance(depth, int) and depth > MAX_DEPTH:
        raise ModelError(f"depth={depth} of model {name!r}: at most {MAX_DEPTH} layers are supported")


def _check_memory(name: str, options: Mapping[str, Any]) -> None:
    """Raise ModelError where the weights would not fit the machine, before any is allocated."""
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in timm.create_model(name, **options).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights > memory:
        raise ModelError(
            f"model {name!r} with options {dict(options)!r:.200} has {weights / 1e9:,.1f} GB of weights, more than this "
            f"machine's memory of {memory / 1e9:,.1f} GB"
        )


def unsupported_part(model: Any) -> str | None:
    """Why poolshare cannot run this model faithfully, or None where it can."""
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}; only timm's plain VisionTransformer is supported"
    for part in model.blocks:
        if type(part) is not Block:
            return f"its blocks are {type(part).__name__}; only sequential pre-norm Blocks are supported"
        if type(part.attn) is not Attention:
            return f"its attention is {type(part.attn).__name__}; only timm's standard Attention is supported"
        if not isinstance(part.norm1, nn.LayerNorm):
            return f"its norms are {type(part.norm1).__name__}, which fvcore cannot count; only LayerNorm is supported"
    if not isinstance(model.patch_embed, PatchEmbed):
        return f"its patch embedding is {type(model.patch_embed).__name__}; only timm's PatchEmbed is supported"
    if model.global_pool == "":
        return "it has no pooled head to classify with; choose global_pool='avg' or 'token'"
    if model.dynamic_img_size:
        return "dynamic_img_size lets the token count vary from image to image; leave it off"
    if not isinstance(model.patch_drop, nn.Identity):
        return "patch dropout changes the token count in training; set patch_drop_rate=0"
    if 0 in model.patch_embed.grid_size:
        return (
            f"its images of {model.patch_embed.img_size} are smaller than its patches of {model.patch_embed.patch_size}"
        )
    if len(set(model.patch_embed.grid_size)) != 1:
        return f"its patch grid is {model.patch_embed.grid_size}; only square images are supported"
    return None


class SuperNet(VisionTransformer):
    """A timm VisionTransformer that also takes architectures; made by `from_timm`.

    Differs from timm's: `forward(images, architectures)`, which runs any number of architectures over their shared
    prefixes. Weights and their names are the base model's (plus `poolings.…` of operators that learn), so any of its
    checkpoints is a warm start, and the architecture "all tokens, no sharing" is timm's own forward, bit for bit. So is
    every block that neither follows nor is followed; the others run the same kernels.
    """

    space: SearchSpace
    sharing: Sharing
    base: tuple[str, dict[str, Any]]  # timm name and options from which the base model can be made again

    @classmethod
    def from_timm(
        cls, name: str, space: SearchSpace, pretrained: bool = False, *, sharing: Sharing = "qk", **options: Any
    ) -> SuperNet:
        """Build the supernet of `space` over timm's model `name`.

        sharing: what an owner hands to its followers. "qk": queries and keys, and all stay in the fused kernel; "map":
        the attention map, written out as in the PSViT paper. One function with the same weights, at other costs.
        options: passed to `timm.create_model` (num_classes, img_size, in_chans, …).
        Raises ModelError for a model that is unknown or unsupported, SpaceError where the space does not fit it.
        """
        check_sharing(sharing)
        model = create_base(name, pretrained, **options)
        check_fit(name, model, space)
        model.__class__ = cls  # an own class over timm's own module: no weight is renamed, no method is lost
        model.space, model.sharing, model.base = space, sharing, (name, options)
        model.poolings = make_poolings(model, space.reductions)
        return model  # type: ignore[return-value]

    def forward(self, images: torch.Tensor, architectures: Sequence[Architecture] | None = None) -> torch.Tensor:  # type: ignore[override]
        """Logits of all architectures: (B, channels, H, W) → (architectures, B, classes).

        Equal, bit for bit on CPU, to running them one by one. Without architectures: timm's own forward, (B, classes).
        Raises ArchitectureError for an architecture outside the space.
        """
        if architectures is None:
            return super().forward(images)
        if not architectures:
            return images.new_empty(0, len(images), self.num_classes)
        logits: list[torch.Tensor | None] = [None] * len(architectures)
        for positions, output in self.leaves(images, architectures):
            for position in positions:
                logits[position] = output
        return torch.stack(logits)  # type: ignore[arg-type]  # every architecture ends at a leaf

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head, as timm's; exported models get it too."""
        super().reset_classifier(num_classes, global_pool)
        changed: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:  # timm leaves the norms where they are
            changed |= {"global_pool": global_pool, "fc_norm": not isinstance(self.fc_norm, nn.Identity)}
        self.base = self.base[0], self.base[1] | changed

    def leaves(
        self, images: torch.Tensor, architectures: Sequence[Architecture]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Depth-first over the prefix tree: (positions of an architecture in the sequence, its logits (B, classes)).

        Holds activations of one path only, so memory does not grow with the number of architectures.
        """
        for architecture in architectures:
            self.space.check(architecture)
        return self._walk(PrefixTree.of(architectures), 0, self.embed(images), None)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Everything before the first block: (B, channels, H, W) → (B, prefix + P, C)."""
        return self.norm_pre(self._pos_embed(self.patch_embed(images)))

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Everything after the last block: (B, prefix + P, C) → (B, classes)."""
        return self.forward_head(self.norm(tokens))

    def _walk(
        self, tree: PrefixTree, index: int, tokens: torch.Tensor, attended: Attended | None
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        if tree.ends:
            yield tree.ends, self.classify(tokens)
        for layer, child in tree.children.items():
            for branch in self._branches(layer, child):
                leave = left_for(branch.children, self.sharing)
                after, used = self.run_layer(index, layer, tokens, attended, leave)
                yield from self._walk(branch, index + 1, after, used if leave else None)

    def _branches(self, layer: Layer, tree: PrefixTree) -> list[PrefixTree]:
        """The tree after a layer, in two where some follow its written map: it leaves the fused kernel for them alone."""
        following = {after: child for after, child in tree.children.items() if after.shared}
        others = {after: child for after, child in tree.children.items() if not after.shared}
        if self.sharing == "qk" or layer.shared or not following or not (others or tree.ends):
            return [tree]
        return [PrefixTree(following), PrefixTree(others, tree.ends)]

    def run_layer(
        self, index: int, layer: Layer, tokens: torch.Tensor, attended: Attended | None, leave: Sharing | None = "qk"
    ) -> tuple[torch.Tensor, Attended | None]:
        """One edge of the graph: pooling where there is any, then block `index`.

        attended: what the block before left; leave: what this one must, see `left_for`. Returns the tokens after the
        block, and what it attended with. With `set_grad_checkpointing` the backward pass computes the edge once more.
        """
        return run_edge(self, index, layer, tokens, attended, leave)


def run_edge(
    model: Any, index: int, layer: Layer, tokens: torch.Tensor, attended: Attended | None, leave: Sharing | None
) -> tuple[torch.Tensor, Attended | None]:
    """`SuperNet.run_layer`, for whatever has `blocks` and `poolings`."""

    def run(tokens: torch.Tensor, attended: Attended | None) -> tuple[torch.Tensor, Attended | None]:
        if layer.operator is not None:
            before = tokens.shape[1] - model.num_prefix_tokens
            tokens = model.poolings[pooling_name(layer.operator, before, layer.tokens)](tokens, attended)
        return run_block(model.blocks[index], tokens, attended if layer.shared else None, leave)

    if model.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(run, tokens, attended, use_reentrant=False)
    return run(tokens, attended)


def check_sharing(sharing: Any) -> None:
    """Raise ModelError for what is no kind of sharing."""
    if sharing not in get_args(Sharing):
        raise ModelError(
            f"sharing={sharing!r:.80} is unknown; it must be 'qk' (queries and keys) or 'map' (a written map)"
        )


def check_fit(name: str, model: VisionTransformer, space: SearchSpace) -> None:
    """Raise SpaceError where depth, token count or CLS of the space are not the model's."""
    if space.depth != len(model.blocks):
        raise SpaceError(f"the space has depth {space.depth}, but {name} has {len(model.blocks)} blocks")
    if space.levels[0] != model.patch_embed.num_patches:
        raise SpaceError(
            f"the levels begin with {space.levels[0]} patch tokens, but {name} at {model.patch_embed.img_size} has "
            f"{model.patch_embed.num_patches}; begin with that, or choose another image size"
        )
    if space.has_cls is not None and space.has_cls != model.has_class_token:
        raise SpaceError(
            f"the space says has_cls={space.has_cls}, but {name} has {'a' if model.has_class_token else 'no'} CLS token"
        )
