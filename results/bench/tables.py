"""Scoring complete sub-trees of a space by one walk, beside scoring the same architectures one by one: times over counts.

    python results/bench/tables.py                                 # all settings, some 30 minutes; writes tables.json
    python results/bench/tables.py "fashion-bench, 256 images"     # one of them, beside those already there

Each setting takes three complete sub-trees of the space, spread over its ranks, and scores one batch of random images with
random weights (times do not depend on either), by `score_counts`, the function that searches use, on the thread's own clock.
Walk and one-by-one take turns; a ratio is the quotient of medians. "measured": that of the times; "counted": that of the MACs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from poolshare.search.job.records import versions
from poolshare.search.samplers.exhaustive import subtrees
from poolshare.search.scoring import score_counts
from poolshare.space import SearchSpace, forecast
from poolshare.supernet import SuperNet, measure_macs

ROUNDS, MEMBERS = 5, (24, 160)  # fewest and most architectures of a sub-tree
DIGITS = (64, 16, 4, 1)
FASHION = {"patch_size": 4, "depth": 7, "num_heads": 2, "mlp_ratio": 2, "in_chans": 1, "img_size": 28}
# name: model, depth, levels, options, images
SETTINGS: dict[str, tuple[str, int, tuple[int, ...], dict[str, Any], int]] = {
    "digits-bench, 256 images": ("digits_vit", 8, DIGITS, {}, 256),
    "digits-bench, 16 images": ("digits_vit", 8, DIGITS, {}, 16),
    "digits-bench, 1 image": ("digits_vit", 8, DIGITS, {}, 1),
    "digits, width 128, 256 images": ("digits_vit", 8, DIGITS, {"embed_dim": 128, "num_heads": 4}, 256),
    "fashion-bench, 256 images": ("vit_tiny_patch16_224", 7, (49, 16, 4, 1), FASHION | {"embed_dim": 48}, 256),
    "fashion-bench, 16 images": ("vit_tiny_patch16_224", 7, (49, 16, 4, 1), FASHION | {"embed_dim": 48}, 16),
    "fashion, width 192, 64 images": ("vit_tiny_patch16_224", 7, (49, 16, 4, 1), FASHION | {"embed_dim": 192}, 64),
    "ViT-Tiny, 112 px, 16 images": ("vit_tiny_patch16_224", 12, (49, 25, 9), {"img_size": 112}, 16),
}


def measure(name: str) -> dict[str, Any]:
    """One line of the table."""
    model, depth, levels, options, images = SETTINGS[name]
    torch.manual_seed(0)
    space = SearchSpace(depth, levels, ("max2d",), 3)
    net = SuperNet.from_timm(model, space, num_classes=10, **options)
    costs = measure_macs(net)
    pieces = list(subtrees(space, costs, 2 * costs.total(space[0])))
    pieces = [piece for piece in pieces if MEMBERS[0] <= piece.architectures <= MEMBERS[1]]
    chosen = [pieces[len(pieces) * place // 6] for place in (1, 3, 5)]
    batch = torch.randn(images, net.in_chans, *net.patch_embed.img_size), torch.randint(10, (images,))
    walk: list[float] = []
    single: list[float] = []
    groups = [piece.members(space) for piece in chosen]
    for round_ in range(ROUNDS + 1):
        spent = [0.0, 0.0]
        for members in groups:
            start = time.thread_time()
            together = score_counts(net, members, [batch])
            spent[0] += time.thread_time() - start
            start = time.thread_time()
            alone = [score_counts(net, [member], [batch])[0] for member in members]
            spent[1] += time.thread_time() - start
            assert alone == together
        if round_:  # the first warms up
            walk.append(spent[0])
            single.append(spent[1])
    counted = [forecast(members, costs) for members in groups]
    share = sum(one.cost for one in counted) / sum(one.one_by_one for one in counted)
    ratio = statistics.median(walk) / statistics.median(single)
    each = statistics.median(single) / sum(map(len, groups))
    return {
        "setting": name,
        "architectures": sum(map(len, groups)),
        "counted": round(share, 4),
        "measured": round(ratio, 4),
        "measured_over_counted": round(ratio / share, 3),
        "ms_one_by_one": round(1e3 * each, 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    target = Path(__file__).with_name("tables.json")
    for name in sys.argv[1:] or SETTINGS:
        row = measure(name)
        print(row, flush=True)
        earlier = json.loads(target.read_text())["rows"] if target.exists() else []
        rows = [*(one for one in earlier if one["setting"] != name), row]
        facts = {"machine": f"{os.cpu_count()} CPU cores, no GPU, one thread", "versions": versions(), "rows": rows}
        target.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
