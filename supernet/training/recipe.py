"""How to train: one frozen value with everything that changes the result."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..data.transforms import Augmentation


class Recipe(BaseModel):
    """AdamW with a cosine schedule after a linear warm-up, and what goes with it; pydantic refuses other values.

    The order of the images, augmentation, mixing and drop-path are keyed by seed, epoch and step, not kept here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(30, ge=0)
    batch_size: int = Field(64, ge=1)  # images of one optimiser step, over all processes
    accumulate: int = Field(1, ge=1)  # parts in which a step's images are run, to need less memory
    # Keep no activations inside blocks: about a third more time, less memory.
    checkpoint: bool = Field(False, strict=True)
    lr: float = Field(2e-3, gt=0)  # peak learning rate
    weight_decay: float = Field(0.05, ge=0)
    layer_decay: float | None = Field(None, gt=0, le=1)  # learning-rate factor from block to block, for warm starts
    warmup: float = Field(0.1, ge=0, le=1)  # share of all steps
    clip_grad: float | None = Field(1.0, gt=0)  # largest gradient norm
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)  # α of Mixup's Beta(α, α), 0: off; with both on, each step takes one of them
    cutmix: float = Field(0.0, ge=0)  # α of CutMix
    mix_prob: float = Field(1.0, gt=0, le=1)  # share of the steps that mix
    ema: float | None = Field(None, gt=0, lt=1)  # decay of a moving average of the weights, which is then the result
    # Share of the dense MACs that a supernet's steps keep to, see `Sandwich`; a search's alone.
    within: float | None = Field(None, gt=0, le=1, strict=True)
    drop_path: float = Field(0.0, ge=0, lt=1)  # largest rate, at the last block; retraining only
    distill: float = Field(0.5, gt=0, le=1)  # a teacher's share of the loss; retraining only
    hflip: float = Field(0.5, ge=0, le=1)  # augmentation, see `Augmentation`
    crop_scale: float = Field(0.35, gt=0, le=1)  # least share of the area that a random crop keeps
    color_jitter: float = Field(0.3, ge=0)
    auto_augment: str | None = None
    re_prob: float = Field(0.0, ge=0, le=1)
    amp: Literal["none", "bf16"] = "none"

    @property
    def augmentation(self) -> Augmentation:
        """How training images vary."""
        return Augmentation(
            hflip=self.hflip,
            scale=(self.crop_scale, 1.0),
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            re_prob=self.re_prob,
        )
