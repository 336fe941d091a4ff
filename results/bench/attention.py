"""What fused attention costs in training on a CPU: prints a ratio for each precision and size.

    python results/bench/attention.py    # some 3 minutes on one core

Forward and backward of timm's ViT-Tiny, batch 32, with PyTorch's fused attention and with timm's explicit one, in turn;
the ratio is that of the medians of 7, the times are the explicit one's.
"""

from __future__ import annotations

import statistics
import time

import timm
import torch
import torch.nn.functional as F

BATCH = 32


def main() -> None:
    """Print one line for each precision and size."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for size in (112, 224):
        model = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=10)
        images, labels = torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))

        def seconds(fused: bool, bf16: bool, model=model, images=images, labels=labels) -> float:
            for block in model.blocks:
                block.attn.fused_attn = fused
            model.zero_grad()
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return time.perf_counter() - begun

        for bf16 in (False, True):
            seconds(True, bf16), seconds(False, bf16)
            fused, explicit = zip(*[(seconds(True, bf16), seconds(False, bf16)) for _ in range(7)], strict=True)
            ratio = statistics.median(fused) / statistics.median(explicit)
            name = "bfloat16" if bf16 else "float32"
            print(
                f"{size} px, {name}: fused / explicit {ratio:.2f}, {statistics.median(explicit):.2f} s a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
