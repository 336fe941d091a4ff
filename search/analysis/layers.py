"""What architectures have in common, layer by layer: how many tokens, where they are dropped, where maps are shared."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pandas as pd

from poolshare.space import Architecture


def layer_shares(architectures: Sequence[str]) -> pd.DataFrame:
    """The share, 0 to 1, of the architectures that do something at a layer.

    Columns: `kind`, `value`, `layer` (from 0) and `share`. Kinds are "tokens" (value: the patch tokens a layer works
    on, by falling count), "drops" (value: the operator that drops tokens just before the layer) and "shares" (the layer
    uses the map of the layer before it; its value is empty). All architectures have the same depth.
    """
    layers = [Architecture.parse(text).layers for text in architectures]
    tokens = np.array([[layer.tokens for layer in path] for path in layers])  # (architectures, depth)
    operators = np.array([[layer.operator or "" for layer in path] for path in layers])
    shared = np.array([[layer.shared for layer in path] for path in layers])
    parts = [("tokens", str(count), tokens == count) for count in sorted(set(tokens.flat), reverse=True)]
    parts += [("drops", name, operators == name) for name in sorted(set(operators.flat) - {""})]
    parts += [("shares", "", shared)]
    return pd.DataFrame(
        [
            {"kind": kind, "value": value, "layer": layer, "share": share}
            for kind, value, hits in parts
            for layer, share in enumerate(hits.mean(axis=0))
        ]
    )


def in_words(shares: pd.DataFrame) -> str:
    """`layer_shares` in two sentences: where tokens are dropped, and where attention is shared most."""
    sentences = []
    tokens = shares[shares["kind"] == "tokens"]
    full = tokens[tokens["value"] == tokens["value"].iloc[0]].set_index("layer")["share"]
    reduced = full.index[full <= 0.5]
    if len(reduced):
        sentences.append(f"From layer {reduced[0]} on, at least half of these architectures work on fewer tokens.")
    else:
        sentences.append("At every layer most of these architectures still work on all tokens.")
    maps = shares[shares["kind"] == "shares"].set_index("layer")["share"]
    if maps.max() > 0:
        most = [int(layer) for layer in maps.index[maps == maps.max()]]
        where = f"layer{'s' if len(most) > 1 else ''} {ranges(most)}"
        sentences.append(f"Sharing is most common at {where}: {maps.max():.0%} of them.")
    else:
        sentences.append("None of them shares attention.")
    return " ".join(sentences)


def ranges(numbers: Sequence[int]) -> str:
    """Rising whole numbers in short: [3, 4, 5, 8] → "3-5, 8"."""
    parts = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ", ".join(parts)
