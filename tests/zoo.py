"""torchvision and timm next to a CPU build of torch: torchvision's operators are declared before it is imported."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
from torch import nn

_LIBRARY: Any = None


def torchvision_models() -> ModuleType:
    """`torchvision.models`, or a skip with the reason where it is not installed.

    The wheel on PyPI is built for CUDA; beside a CPU torch its extension cannot load and the import
    fails on the missing `torchvision::nms`. Declaring the two operators it looks for is enough.
    """
    global _LIBRARY
    pytest.importorskip("torch")
    import torch

    if _LIBRARY is None and not hasattr(torch.ops.torchvision, "nms"):
        _LIBRARY = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _imported("torchvision.models")


def timm_model(name: str, **options: Any) -> nn.Module:
    """A timm model without weights, or a skip where timm is not installed."""
    torchvision_models()  # timm imports it
    model = _imported("timm").create_model(name, pretrained=False, **options)
    assert isinstance(model, nn.Module)
    return model


def _imported(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        pytest.skip(f"{module.partition('.')[0]} is not installed (pip install 'edgeprune[zoo]')")
