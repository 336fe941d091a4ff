"""An exported model as an ONNX file, for runtimes other than torch; needs the extra `onnx`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from poolshare.space import ModelError
from poolshare.space.files import write_whole

from .operators.relative import RELATIVE
from .subnet import Subnet


def write_onnx(model: Subnet, path: str | Path) -> None:
    """Write `model` with a free batch size: "images" (B, channels, H, W) → "logits" (B, classes), both float32.

    The model itself keeps its mode, its device and its type. The file appears whole or not at all.
    Raises ModelError where onnx and onnxscript are not there, RunError where the file cannot be written.
    """
    try:
        from onnxscript import opset18 as onnx
    except ImportError as error:
        raise ModelError(f"writing ONNX needs onnx and onnxscript ({error}); pip install 'poolshare[onnx]'") from None

    images = torch.zeros(2, model.in_chans, *model.patch_embed.img_size)
    written = copy.deepcopy(model).eval().cpu().float()
    if isinstance(written, RELATIVE):
        # Of fused attention with a bias for each pair torch's exporter gets the strides wrong.
        for block in written.blocks:
            block.attn.fused_attn = False
    program = torch.onnx.export(
        written,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        custom_translation_table=_translations(onnx),
        verbose=False,
    )
    assert program is not None  # dynamo gives one
    write_whole(Path(path), lambda temporary: program.save(temporary, external_data=False))


def _translations(onnx: Any) -> dict[Any, Any]:
    """What torch's exporter lacks, written in onnxscript's operators `onnx`."""

    def stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # torch's exporter does not know it; ONNX's TopK gives equal values in the order of their indices, too.
        axis = dim % len(values.shape)
        count = onnx.Shape(values, start=axis, end=axis + 1)
        return onnx.TopK(values, count, axis=axis, largest=int(descending), sorted=1)

    def cell_maxima(values: Any, size: Sequence[int]) -> Any:
        # torch's exporter knows only cells of equal sizes. Values and, in place of where they stood, themselves.
        for axis, length, cells in zip((2, 3), values.shape[2:], size, strict=True):
            axes: Any = [axis]
            ends: Any = [([length * cell // cells], [-(-length * (cell + 1) // cells)]) for cell in range(cells)]
            parts = [onnx.Slice(values, start, end, axes) for start, end in ends]
            maxima = [onnx.ReduceMax(part, axes, keepdims=1) for part in parts]
            values = onnx.Concat(*maxima, axis=axis) if cells > 1 else maxima[0]
        return values, values

    return {torch.ops.aten.sort.stable: stable_sort, torch.ops.aten.adaptive_max_pool2d.default: cell_maxima}
