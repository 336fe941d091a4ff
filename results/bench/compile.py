"""Does torch.compile pay for an exported model? Prints its first step's seconds and the ratio of later steps.

    python results/bench/compile.py infer    # or train; some minutes on 2 cores

Compiled and eager steps run in turn; the ratio is that of the medians of 15.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch.nn.functional as F

from poolshare.supernet import Subnet

BATCH, SIZE, ARCHITECTURE = 32, 112, "49*2 49 25@max2d*3 16@max2d*2 16*3 16"


def main(training: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    eager = Subnet.from_base("vit_tiny_patch16_224", ARCHITECTURE, img_size=SIZE, num_classes=10).train(training)
    compiled = torch.compile(eager, fullgraph=True)  # raises where the graph would break
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))

    def seconds(model: torch.nn.Module) -> float:
        begun = time.perf_counter()
        if training:
            eager.zero_grad()
            F.cross_entropy(model(images), labels).backward()
        else:
            with torch.inference_mode():
                model(images)
        return time.perf_counter() - begun

    print(f"first compiled step: {seconds(compiled):.0f} s", flush=True)
    seconds(eager)
    ours, theirs = zip(*[(seconds(compiled), seconds(eager)) for _ in range(15)], strict=True)
    print(f"compiled / eager: {statistics.median(ours) / statistics.median(theirs):.3f}")


if __name__ == "__main__":
    main(sys.argv[1] == "train")
