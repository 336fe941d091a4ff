"""Peak memory of scoring a whole space, at about 100 and about 10,000 architectures of one model: memory.json.

    python results/bench/memory.py

Each space is scored in a process of its own, whose greatest resident size is read at its end (`ru_maxrss`).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SPACES = tuple({"levels": (64, 16, 4, 1), "max_run": longest} for longest in (1, 2, 9))
DEPTH, IMAGES = 9, 256


def score(number: int) -> None:
    """Score one of SPACES and print what it took."""
    import torch

    from poolshare.search.evaluate import count_correct
    from poolshare.search.exhaustive import score_everything
    from poolshare.search.progress import no_progress
    from poolshare.search.run import RunFolder, SearchConfig
    from poolshare.search.storage import open_store
    from poolshare.search.study import Task
    from poolshare.space import SearchSpace
    from poolshare.supernet import SuperNet, measure_macs, measure_parameters

    space = SearchSpace(DEPTH, **SPACES[number])
    net = SuperNet.from_timm("digits_vit", space, depth=DEPTH, num_classes=10)
    torch.manual_seed(0)
    batches = [(torch.randn(IMAGES, *net.patch_embed.proj.weight.shape[1:2], 8, 8), torch.arange(IMAGES) % 10)]
    macs, parameters = measure_macs(net), measure_parameters(net)
    task = Task(
        space, macs, parameters, space.within(macs), lambda a, progress: count_correct(net, a, batches, progress)
    )
    count_correct(net, [space[0]], batches)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as path, RunFolder.claim(f"{path}/run", SearchConfig(data="digits")) as folder:
        score_everything(task, open_store(folder.journal, None, "whole"), no_progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"architectures": space.size, "one_mb": round(before / 1024, 1), "all_mb": round(peak / 1024, 1)}))


def main() -> None:
    found = []
    for number in range(len(SPACES)):
        done = subprocess.run([sys.executable, __file__, str(number)], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    (HERE / "memory.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        score(int(sys.argv[1]))
    else:
        main()
