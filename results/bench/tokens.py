"""What do sizes, places and sources of tokens cost the models that ask for none? Writes tokens.json.

    python results/bench/tokens.py                   # two minutes of one core

ViT-Tiny at 112 pixels, batch 16. Interleaved forwards of timm's own model and the dense path of an exported one; and of one
that pools by avg2d twice, as it is (nothing is carried) and with everything carried. Ratios of times within a round, median
and quartiles over the rounds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import timm
import torch

from poolshare.search.job.records import versions
from poolshare.supernet import Subnet, count_macs
from poolshare.supernet.latency import interleaved
from poolshare.supernet.tokens import Carry

NAME, OPTIONS, ROUNDS = "vit_tiny_patch16_224", {"img_size": 112}, 61


def main() -> None:
    """Time them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = timm.create_model(NAME, **OPTIONS).eval()
    dense = Subnet.from_base(NAME, "49 49 49 49 49 49 49 49 49 49 49 49", **OPTIONS).eval()
    dense.load_state_dict(plain.state_dict())
    pooled, carrying = (
        Subnet.from_base(NAME, "49 49 49 49 25@avg2d 25 25 25 9@avg2d 9 9 9", **OPTIONS).eval() for _ in range(2)
    )
    carrying.load_state_dict(pooled.state_dict())
    carrying.carry = Carry.SOURCES  # as heads for pixels ask
    images = torch.randn(16, 3, 112, 112)
    with torch.inference_mode():
        assert torch.equal(plain(images), dense(images))
        assert torch.equal(pooled(images), carrying(images))
    models = {"timm": plain, "dense": dense, "pooled": pooled, "pooled, carrying": carrying}
    times = interleaved([(model, (images,)) for model in models.values()], ROUNDS, random.Random(0))
    columns = dict(zip(models, np.asarray(times).T, strict=True))
    found = {
        "carried": {name: int(model.carry) for name, model in models.items() if name != "timm"},
        "macs": {name: count_macs(model, (images[:1],)) for name, model in models.items()},
        "rounds": ROUNDS,
        "ratios": {
            f"{one} / {other}": [
                round(float(part), 3) for part in np.quantile(columns[one] / columns[other], (0.25, 0.5, 0.75))
            ]
            for one, other in (("dense", "timm"), ("pooled, carrying", "pooled"))
        },
        "versions": versions() | {"torch": torch.__version__},
    }
    print(json.dumps(found["ratios"]), found["macs"], found["carried"])
    Path(__file__).with_name("tokens.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
