"""Do supernet scores rank architectures as training them alone does? Several seeds, on digits or Fashion-MNIST.

    python results/trust/reproduce.py digits                      # about 20 minutes a seed on one core
    python results/trust/reproduce.py fashion --data-dir FOLDER   # hours on one core; a GPU is better

For each seed a supernet is trained, then architectures drawn across MAC bands are trained alone, each twice (see
`poolshare trust --help`). Writes results/trust/<name>-<seed>.csv and <name>.json after every seed and resumes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from poolshare.search.job import run_job
from poolshare.search.run import SearchConfig, versions, write_json
from poolshare.search.trust import Plan, measure_trust

HERE = Path(__file__).parent
# Settings whose true spread exceeds their noise. On digits that takes an operator that can do harm: with max2d alone all
# 3,344 architectures lie within a standard deviation of 0.86 points, which is the noise of 377 images.
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits", "operators": ("random", "max2d"), "search_fraction": 0.4},
    "fashion": {
        "data": "torch/fashion_mnist",
        "model": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 4, "embed_dim": 48, "depth": 7, "num_heads": 2, "mlp_ratio": 2},
        "in_chans": 1,
        "img_size": 28,
        "levels": (49, 16, 4, 1),
        "search_fraction": 0.8,
        "epochs": 15,
        "recipe": {"hflip": 0, "crop_scale": 1, "color_jitter": 0},
    },
}


def main() -> None:
    """Train, search, train alone, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--architectures", type=int, default=24)
    parser.add_argument("--twice", type=int, help="default: all of them")
    parser.add_argument("--epochs", type=int, help="of training alone; default: the supernet's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/trust"))
    options = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(1)
    twice = options.architectures if options.twice is None else options.twice
    found = []
    for seed in range(options.seeds):
        config = SearchConfig(
            **SETTINGS[options.name],
            data_dir=options.data_dir,
            seed=seed,
            device=options.device,
            sampler="random",  # only the supernet is needed here, and scores of the architectures that are drawn
            trials=1,
        )
        folder = run_job(config, options.work / f"{options.name}-{seed}", console)
        result = measure_trust(
            folder,
            Plan(options.architectures, twice, bands=4, seed=seed),
            epochs=options.epochs,
            device=options.device,
            console=console,
        )
        shutil.copy(folder.path / "trust.csv", HERE / f"{options.name}-{seed}.csv")
        found.append({"seed": seed} | {name: value for name, value in result.items() if name != "points"})
        facts = {"versions": versions(), "threads": 1, "device": options.device, "seeds": found}
        write_json(HERE / f"{options.name}.json", facts)


if __name__ == "__main__":
    main()
