"""Peak memory of scoring a whole space, after its first hundred architectures and after all 10,496: memory.json.

    python results/bench/memory.py

One process and one space, for the activations of a path differ from space to space. Every walk is followed by a look at
the greatest resident size so far (`ru_maxrss`); the last line is that of the finished table.
"""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path

import torch

from poolshare.search.config import SearchConfig
from poolshare.search.counts import Counts
from poolshare.search.job.folder import RunFolder
from poolshare.search.progress import no_progress
from poolshare.search.samplers.exhaustive import score_everything
from poolshare.search.scoring import score_counts
from poolshare.search.study.loop import Problem
from poolshare.search.study.open import open_store
from poolshare.space import Architecture, SearchSpace
from poolshare.supernet import SuperNet, measure_macs, measure_parameters

SPACE = SearchSpace(9, (64, 16, 4, 1), ("max2d",), 9)
IMAGES = 256


def peak() -> float:
    """The greatest resident size of this process so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main() -> None:
    net = SuperNet.from_timm("digits_vit", SPACE, depth=SPACE.depth, num_classes=10)
    torch.manual_seed(0)
    batches = [(torch.randn(IMAGES, net.in_chans, *net.patch_embed.img_size), torch.arange(IMAGES) % 10)]
    macs, parameters = measure_macs(net), measure_parameters(net)
    score_counts(net, [SPACE[0]], batches)
    looks = [{"architectures": 1, "peak_mb": peak()}]
    scored = 0

    def score(architectures: list[Architecture], progress: object) -> list[Counts]:
        nonlocal scored
        found = score_counts(net, architectures, batches)
        scored += len(architectures)
        looks.append({"architectures": scored, "peak_mb": peak()})
        return found

    problem = Problem(SPACE, macs, parameters, SPACE.within(macs), score)
    with tempfile.TemporaryDirectory() as path, RunFolder.claim(f"{path}/run", SearchConfig(data="digits")) as folder:
        frame = score_everything(problem, open_store(folder.journal, None, "whole"), no_progress)
    looks.append({"architectures": len(frame), "peak_mb": peak()})
    print(*looks, sep="\n")
    Path(__file__).with_name("memory.json").write_text(json.dumps(looks, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
