"""Makes torchvision importable where it is built for CUDA and PyTorch is not, for what imports it unused.

Most torchvisions are built for CUDA. Beside a PyTorch without it they have none of their operators, and their
import stops at the first of those that it describes.
"""

from __future__ import annotations

import importlib

import torch

try:
    importlib.import_module("torchvision")
except ModuleNotFoundError:
    pass
except RuntimeError:
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
