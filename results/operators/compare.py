"""Every pooling operator on the same trained base model at the same token schedules.

    python results/operators/compare.py digits                                              # minutes
    python results/operators/compare.py eurosat --data FOLDER --weights vit_tiny.safetensors  # about an hour on 2 cores
    python results/operators/compare.py eurosat --data FOLDER --weights … --img-size 224 --device cuda

The base model is trained once (kept in --work). Then each operator is put in at each schedule it can make: accuracy on
test as it is, and after a short fine-tuning on labels; MACs with the operator's own share; milliseconds at batch 1 and
64, in turn with the dense model. Writes results/operators/<name>.csv after every row and resumes after the last.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file

from poolshare.search.analysis.pareto import binomial_interval
from poolshare.search.job.records import write_csv, write_json
from poolshare.search.progress import advance_loss, progress_bar
from poolshare.search.scoring import answers
from poolshare.space import OPERATORS, Architecture
from poolshare.supernet import count_macs
from poolshare.supernet.data import ImageFormat, Place, open_data
from poolshare.supernet.data.transforms import Augmentation
from poolshare.supernet.subnet import checkpoint_filter_fn
from poolshare.supernet.training.checkpoint import load_tensors, save_tensors
from poolshare.supernet.training.loop import Recipe, steps_per_epoch, train_model

HERE = Path(__file__).parent
# Runs of (patch tokens, layers) by the base model's own patch tokens.
SCHEDULES = {
    64: [[(64, 3), (16, 5)], [(64, 2), (32, 3), (16, 3)], [(64, 2), (16, 3), (4, 3)]],
    49: [[(49, 4), (25, 8)], [(49, 3), (25, 4), (9, 5)], [(49, 4), (16, 8)]],
    196: [[(196, 4), (98, 8)], [(196, 4), (49, 8)], [(196, 3), (100, 4), (49, 5)]],
}


def architecture_of(operator: str, schedule: list[tuple[int, int]]) -> Architecture | None:
    """The schedule with this operator at each reduction and no sharing; None where it cannot make a reduction."""
    declared = OPERATORS[operator]
    counts = [tokens for tokens, _ in schedule]
    if not all(declared.can_reduce(before, after) for before, after in itertools.pairwise(counts)):
        return None
    words = []
    for index, (tokens, layers) in enumerate(schedule):
        words += [f"{tokens}@{operator}" if index else f"{tokens}"] + [str(tokens)] * (layers - 1)
    return Architecture.parse(" ".join(words))


def milliseconds(models: dict[str, Any], images: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median of each model's forward on these images, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if repeat:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Train or load the base, then fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("digits", "eurosat"))
    parser.add_argument("--data", help="folder of eurosat/train and eurosat/test")
    parser.add_argument("--weights", type=Path, help="safetensors of the pretrained vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=112)
    parser.add_argument("--base-epochs", type=int, default=5)
    parser.add_argument("--tune-epochs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/operators"))
    parser.add_argument("--operators", nargs="+", help="these alone")
    parser.add_argument("--suffix", default="", help="of the names of the files that are written")
    parser.add_argument("--schedules", type=int, nargs="+", help="by number, from 0; default: all")
    options = parser.parse_args()
    console, device = Console(stderr=True), torch.device(options.device)

    augmentation = Augmentation()
    if options.name == "digits":
        base_name, base_options = "digits_vit", {}
        data = open_data(
            Place("digits"), ImageFormat(8, in_chans=1, mean=(0.5,), std=(0.5,)), augmentation=augmentation
        )
        base_recipe = Recipe(epochs=40, batch_size=32, lr=2e-3)
        tune_recipe = Recipe(epochs=5 * options.tune_epochs, batch_size=32, lr=5e-4)
    else:
        base_name, base_options = "vit_tiny_patch16_224", {"img_size": options.img_size, "num_classes": 10}
        images = ImageFormat(options.img_size, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
        data = open_data(Place(options.data), images, augmentation=augmentation)
        base_recipe = Recipe(epochs=options.base_epochs, batch_size=32, lr=5e-4, layer_decay=0.75)
        tune_recipe = Recipe(epochs=options.tune_epochs, batch_size=32, lr=2e-4, layer_decay=0.75)

    def train(model: Any, recipe: Recipe, title: str, state: Path | None = None) -> None:
        with progress_bar(console, title, recipe.epochs * steps_per_epoch(data.full, recipe), "steps") as advance:
            train_model(model, data.full, recipe, state=state, progress=partial(advance_loss, advance))

    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / f"{options.name}-{options.img_size}.safetensors"
    torch.manual_seed(0)
    base = timm.create_model(base_name, **base_options).to(device)
    if kept.exists():
        base.load_state_dict(load_tensors(kept)[0])
    else:
        if options.weights:
            pretrained = load_file(options.weights)
            pretrained = {name: value for name, value in pretrained.items() if not name.startswith("head.")}
            reference = timm.create_model(base_name, num_classes=10)  # at the weights' own image size
            reference.load_state_dict(pretrained, strict=False)
            reference.set_input_size(img_size=options.img_size)  # timm resamples the position embedding
            base.load_state_dict(reference.state_dict())
        train(base, base_recipe, "base", kept.with_suffix(".training.safetensors"))
        save_tensors(kept, base.state_dict(), {})
    base.eval()
    channels, (height, width) = data.in_chans, data.img_size
    image = torch.zeros(1, channels, height, width, device=device)
    batches = {1: torch.randn(1, channels, height, width, device=device)}
    batches[64] = torch.randn(64, channels, height, width, device=device)
    dense_macs = count_macs(base, (image,))
    (correct,), total, _ = answers(base, data.eval_loader("test", 256)).counts
    facts = {
        "base": base_name,
        "options": base_options,
        "dense_macs": dense_macs,
        "dense_correct": correct,
        "total": total,
    }
    facts |= {"dense_top1": 100 * correct / total, "base_recipe": base_recipe.model_dump()}
    facts |= {"tune_recipe": tune_recipe.model_dump(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(HERE / f"{options.name}{options.suffix}.json", facts)

    table = HERE / f"{options.name}{options.suffix}.csv"
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    schedules = {
        " → ".join(f"{tokens}×{layers}" for tokens, layers in schedule): schedule
        for number, schedule in enumerate(SCHEDULES[base.patch_embed.num_patches])
        if options.schedules is None or number in options.schedules
    }
    done = {(row["operator"], row["schedule"]) for row in rows}
    for text, schedule in schedules.items():
        for operator in options.operators or OPERATORS:
            architecture = architecture_of(operator, schedule)
            if architecture is None or (operator, text) in done:
                continue
            torch.manual_seed(0)
            made = timm.create_model("poolshare_vit", base=base_name, architecture=str(architecture), **base_options)
            model: Any = made.to(device)
            missing, unexpected = model.load_state_dict(checkpoint_filter_fn(base.state_dict(), model), strict=False)
            assert not unexpected
            assert all(name.startswith("poolings.") for name in missing), missing
            model.eval()
            macs = count_macs(model, (image,))
            without = architecture_of("random", schedule)
            assert without is not None
            plain = timm.create_model("poolshare_vit", base=base_name, architecture=str(without), **base_options)
            share = macs - count_macs(plain.to(device), (image,))
            row: dict[str, Any] = {"operator": operator, "schedule": text, "macs": macs, "of_dense": macs / dense_macs}
            row |= {"operator_macs": share, "architecture": str(architecture)}
            for size, inputs in batches.items():
                measured = milliseconds({"model": model, "dense": base}, inputs, 21 if size == 1 else 5)
                row |= {
                    f"ms_batch{size}": measured["model"],
                    f"time_of_dense_batch{size}": measured["model"] / measured["dense"],
                }
            (row["correct_as_is"],), row["total"], _ = answers(model, data.eval_loader("test", 256)).counts
            train(model, tune_recipe, f"{operator}, {text}")
            (row["correct_tuned"],), _, _ = answers(model, data.eval_loader("test", 256)).counts
            for stage in ("as_is", "tuned"):
                low, high = binomial_interval(row[f"correct_{stage}"], row["total"])
                row |= {
                    f"top1_{stage}": 100 * row[f"correct_{stage}"] / row["total"],
                    f"low_{stage}": low,
                    f"high_{stage}": high,
                }
            rows.append(row)
            write_csv(table, pd.DataFrame(rows))
            console.print(f"{operator} {text}: {row['top1_as_is']:.1f} % as it is, {row['top1_tuned']:.1f} % tuned")


if __name__ == "__main__":
    main()
