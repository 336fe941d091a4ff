"""An exported model as the backbone of a detector: cars and pedestrians of CamVid, dense and searched.

    python results/camvid/detect.py --exports dense=EXPORT "searched 60%"=EXPORT --seeds 0 --epochs 12

CamVid has no boxes: a box is the extent of a connected part of the pixels of a car or a pedestrian, so cars that touch are
one box. Parts below --least pixels are left out of training and test. The detector is torchvision's Faster R-CNN over a simple
feature pyramid as ViTDet has it (2203.16527): all scales from the last map alone. Average precision is torchmetrics', on the
test images, at the size the exported model takes. Needs `torchmetrics` and `pycocotools`. Each row is written to detection.csv
at once, so the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from scipy import ndimage
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import poolshare.supernet  # noqa: F401  # registers exported models with timm
from poolshare.search.job.records import write_csv

ROWS = Path(__file__).parent / "detection.csv"
THINGS = {1: (8, "car"), 2: (9, "pedestrian")}  # label of the detector: class of the masks, name
WIDTH = 96  # channels of the pyramid


class SimplePyramid(nn.Module):
    """The last map of a plain ViT, at stride 16, as maps of strides 4, 8, 16 and 32. (ViTDet, section 3)"""

    def __init__(self, backbone: nn.Module, channels: int, width: int = WIDTH) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, width
        half, quarter = channels // 2, channels // 4
        scales = {
            "4": [
                nn.ConvTranspose2d(channels, half, 2, 2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ],
            "8": [nn.ConvTranspose2d(channels, half, 2, 2)],
            "16": [],
            "32": [nn.MaxPool2d(2, 2)],
        }
        inner = {"4": quarter, "8": half, "16": channels, "32": channels}
        self.scales = nn.ModuleDict(
            {
                name: nn.Sequential(
                    *layers,
                    nn.Conv2d(inner[name], width, 1, bias=False),
                    LayerNorm2d(width),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    LayerNorm2d(width),
                )
                for name, layers in scales.items()
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        [last] = self.backbone(images)
        return OrderedDict((name, scale(last)) for name, scale in self.scales.items())


def detector(export: Path) -> tuple[FasterRCNN, tuple[int, int]]:
    """Faster R-CNN over an exported model, and the height and width it takes."""
    ours: Any = timm.create_model(f"local-dir:{export}", pretrained=True)
    config, depth = ours.pretrained_cfg, len(ours.blocks)
    _, height, width = config["input_size"]
    options = {"pretrained": True, "features_only": True, "out_indices": (depth - 1,)}
    backbone = SimplePyramid(timm.create_model(f"local-dir:{export}", **options), ours.embed_dim)
    names = list(backbone.scales)
    model = FasterRCNN(
        backbone,
        num_classes=1 + len(THINGS),
        image_mean=config["mean"],
        image_std=config["std"],
        fixed_size=(width, height),
        size_divisible=1,
        min_size=height,
        max_size=width,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * len(names)),
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=300,
        rpn_post_nms_top_n_test=150,
        box_batch_size_per_image=128,
    )
    return model, (height, width)


def boxes_of(mask: np.ndarray, least: int) -> dict[str, Tensor]:
    """Boxes (n, 4) as x0, y0, x1, y1 in pixels, and labels (n,), of the connected parts of each thing."""
    boxes, labels = list[list[int]](), list[int]()
    for label, (index, _) in THINGS.items():
        parts, count = ndimage.label(mask == index)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        for part, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            if sizes[part] >= least:
                boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                labels.append(label)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def read(root: Path, size: tuple[int, int], least: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images (3, H, W), 0 to 1, and their boxes; at the model's size."""
    found = []
    height, width = size
    for path in sorted((root / "images").iterdir()):
        image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        mask = np.asarray(Image.open(root / "masks" / f"{path.stem}.png"))
        target = boxes_of(mask, least)
        target["boxes"] *= torch.tensor([width / mask.shape[1], height / mask.shape[0]] * 2)
        found.append((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, target))
    return found


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[2]
    return image.flip(2), target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}


def train(model: FasterRCNN, samples: list[Any], epochs: int, seed: int, batch: int = 8, lr: float = 3e-4) -> None:
    """On the training images, mirrored at random; the backbone at a third of the rate of what is new."""
    generator = torch.Generator().manual_seed(seed)
    inner = list(model.backbone.backbone.parameters())
    new = [one for one in model.parameters() if all(one is not other for other in inner)]
    optimizer = torch.optim.AdamW([{"params": inner, "lr": lr / 3}, {"params": new}], lr=lr, weight_decay=0.05)
    steps = epochs * (len(samples) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr / 3, lr], total_steps=steps, pct_start=0.1)
    model.train()
    for epoch in range(epochs):
        start, total = time.monotonic(), 0.0
        order = torch.randperm(len(samples), generator=generator).tolist()
        for at in range(0, len(order) - batch + 1, batch):
            chosen = [samples[index] for index in order[at : at + batch]]
            flips = torch.rand(batch, generator=generator) < 0.5
            chosen = [mirrored(*one) if flip else one for one, flip in zip(chosen, flips, strict=True)]
            images, targets = zip(*chosen, strict=True)
            loss = sum(model(list(images), list(targets)).values())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss)
        print(
            f"epoch {epoch + 1}: loss {total / (len(order) // batch):.3f}, {time.monotonic() - start:.0f} s", flush=True
        )


@torch.inference_mode()
def precision(model: FasterRCNN, samples: list[Any]) -> dict[str, float]:
    """AP at IoU 0.5 to 0.95, at 0.5, and of each thing, in percent."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(class_metrics=True)
    model.eval()
    for image, target in samples:
        metric.update(model([image]), [target])
    found = metric.compute()
    named = {THINGS[int(label)][1]: ap for label, ap in zip(found["classes"], found["map_per_class"], strict=True)}
    return {
        name: round(100 * float(ap), 2) for name, ap in {"ap": found["map"], "ap50": found["map_50"], **named}.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exports", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--least", type=int, default=64, help="pixels of a part, at 320×240")
    parser.add_argument("--out", type=Path, default=ROWS)
    options = parser.parse_args()
    root = Path(os.environ["POOLSHARE_DATA"]) / "camvid"
    for seed in options.seeds:
        for name, folder in (one.split("=", 1) for one in options.exports):
            columns = ["backbone", "seed", "epochs"]
            rows = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=columns)
            if ((rows["backbone"] == name) & (rows["seed"] == seed) & (rows["epochs"] == options.epochs)).any():
                continue
            torch.manual_seed(seed)
            model, size = detector(Path(folder))
            parts = {part: read(root / part, size, options.least) for part in ("train", "val", "test")}
            boxes = {part: sum(len(target["labels"]) for _, target in samples) for part, samples in parts.items()}
            train(model, parts["train"] + parts["val"], options.epochs, seed)
            found = precision(model, parts["test"])
            new = pd.DataFrame(
                [{"backbone": name, "seed": seed, "epochs": options.epochs, **found, "test_boxes": boxes["test"]}]
            )
            write_csv(options.out, pd.concat([rows, new], ignore_index=True) if len(rows) else new)
            print(new.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
