"""Where the time goes on a GPU: attention by kernels, pooling by kernels, a supernet step beside a dense one. Prints them.

    python results/bench/gpu.py

Times are medians in microseconds of bfloat16 kernels over 512 images (3 heads of 64 channels, as in ViT-Tiny at 224 pixels);
steps are forward and backward under bfloat16 autocast, without an optimiser, in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from triton.testing import do_bench

from poolshare.space import SearchSpace, forecast
from poolshare.supernet import SuperNet, measure_macs
from poolshare.supernet.training.sandwich import Sandwich

IMAGES, HEADS, CHANNELS = 512, 3, 64


def microseconds(run: Callable[[], object]) -> int:
    """The median."""
    return round(1e3 * do_bench(run, warmup=10, rep=40, return_mode="median"))


def attention(tokens: int) -> dict[str, int]:
    """One attention fused, by its parts, and by parts whose keys are padded to a multiple of 8."""
    qkv = torch.randn(IMAGES, tokens, 3, HEADS, CHANNELS, device="cuda", dtype=torch.bfloat16)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scaled, more = queries * CHANNELS**-0.5, -tokens % 8
    scores = scaled @ keys.transpose(-2, -1)
    used, padded, longer = scores.softmax(-1), F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))
    wide = F.pad(used, (0, more))
    return {
        "tokens": tokens,
        "fused": microseconds(lambda: F.scaled_dot_product_attention(queries, keys, values)),
        "scaling": microseconds(lambda: queries * CHANNELS**-0.5),
        "scores": microseconds(lambda: scaled @ keys.transpose(-2, -1)),
        "softmax": microseconds(lambda: scores.softmax(-1)),
        "map × values": microseconds(lambda: used @ values),
        "padding": microseconds(lambda: F.pad(keys, (0, 0, 0, more))),
        "padded scores": microseconds(lambda: scaled @ padded.transpose(-2, -1)),
        "padded softmax": microseconds(lambda: wide.softmax(-1)),
        "padded map × values": microseconds(lambda: wide @ longer),
    }


def pooling(before: int, after: int) -> dict[str, int]:
    """Adaptive maximum and mean of a grid of channels-last tokens, given by the lengths of its sides."""
    patches = torch.randn(IMAGES, before**2 + 1, HEADS * CHANNELS, device="cuda", dtype=torch.bfloat16)[:, 1:]
    grid = patches.transpose(1, 2).reshape(IMAGES, HEADS * CHANNELS, before, before)
    found: dict[str, Callable[..., object]] = {"maximum": F.adaptive_max_pool2d, "mean": F.adaptive_avg_pool2d}
    sides = {"side before": before, "side after": after}
    return sides | {name: microseconds(partial(pool, grid, after)) for name, pool in found.items()}


def steps(batch: int) -> dict[str, float]:
    """Milliseconds of a dense step and of a sandwich of four, what MACs say of their ratio, and the peak memory so far."""
    torch.manual_seed(0)
    space = SearchSpace(12, (196, 100, 49, 25), ("avg2d",), 3)
    net = SuperNet.from_timm("vit_tiny_patch16_224", space, num_classes=10).to("cuda")
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=10).to("cuda")
    costs = measure_macs(net)
    sandwich = Sandwich(space, costs, 0)
    images, labels = torch.randn(batch, 3, 224, 224, device="cuda"), torch.randint(10, (batch,), device="cuda")
    times: dict[str, list[float]] = {"dense": [], "sandwich": []}
    for step in range(12):
        for name, seen in times.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (
                    F.cross_entropy(dense(images), labels)
                    if name == "dense"
                    else sandwich.loss(net, images, labels, step)
                )
            loss.backward()
            torch.cuda.synchronize()
            seen.append(1e3 * (time.perf_counter() - start))
    counted = statistics.mean(forecast(sandwich.at(step), costs).cost for step in range(3, 12)) / costs.total(space[0])
    found = {name: statistics.median(seen[3:]) for name, seen in times.items()}
    memory = torch.cuda.max_memory_allocated() / 2**30
    return {"batch": batch} | found | {"ratio": found["sandwich"] / found["dense"], "counted": counted, "GiB": memory}


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    with torch.inference_mode():
        for tokens in (197, 101, 50):
            print(attention(tokens))
        for sides in ((14, 10), (10, 7), (14, 7)):
            print(pooling(*sides))
    for batch in (32, 128):
        print({name: round(value, 2) for name, value in steps(batch).items()})


if __name__ == "__main__":
    main()
