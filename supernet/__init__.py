"""One set of weights that runs every architecture, on timm. Importing it registers poolshare's models with timm."""

from .latency import Latency, measure_latency_table
from .measure import count_macs, measure_latency, measure_macs, measure_parameters
from .model import SuperNet
from .models import digits_vit, psvit_1d_small, psvit_1d_tiny, psvit_2d_small, psvit_2d_tiny
from .subnet import Subnet, poolshare_vit

__all__ = [
    "Latency",
    "Subnet",
    "SuperNet",
    "count_macs",
    "digits_vit",
    "measure_latency",
    "measure_latency_table",
    "measure_macs",
    "measure_parameters",
    "poolshare_vit",
    "psvit_1d_small",
    "psvit_1d_tiny",
    "psvit_2d_small",
    "psvit_2d_tiny",
]
