"""ONNX operators over windows of space: pooling, resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.formats._onnx_import.operation import Operation, Operator, Result, Unsupported
from edgeprune.formats._onnx_import.padding import find_pads, padded


def _window(op: Operation) -> tuple[list[int], list[int], list[int], list[int]]:
    kernel = list(op.attribute("kernel_shape"))
    strides, dilations = (list(op.attribute(name, [1] * len(kernel))) for name in ("strides", "dilations"))
    return kernel, strides, dilations, find_pads(op, kernel, strides, dilations)


def _max_pool(op: Operation) -> Result:
    kernel, strides, dilations, pads = _window(op)
    if op.outputs > 1:
        raise Unsupported("a second output")
    x, padding = op.flow(0), pads[: len(kernel)]
    if padding != pads[len(kernel) :] or any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        pairs = [pads[axis + half] for axis in reversed(range(len(kernel))) for half in (0, len(kernel))]
        x, padding = op.call(functional.pad, x, pairs, value=float("-inf")), [0] * len(kernel)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    return op.call(function, x, kernel, strides, padding, dilations, ceil_mode=bool(op.attribute("ceil_mode", 0)))


def _average_pool(op: Operation) -> Result:
    kernel, strides, dilations, pads = _window(op)
    if any(dilation != 1 for dilation in dilations):
        raise Unsupported("dilations")
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    counts, ceil_mode = bool(op.attribute("count_include_pad", 0)), bool(op.attribute("ceil_mode", 0))
    x, padding = padded(op, op.flow(0), pads)
    result = op.call(function, x, kernel, strides, padding, ceil_mode, counts)
    if x is op.flow(0) or counts:
        return result
    # Asymmetric pads were put before the pool, which counted them: correct by the share that is not padding.
    inside = torch.ones(1, 1, *op.flow(0).shape[2:])
    pairs = [pads[axis + half] for axis in reversed(range(len(kernel))) for half in (0, len(kernel))]
    share = function(functional.pad(inside, pairs), kernel, strides, 0, ceil_mode)
    return op.call(torch.mul, result, op.buffer((1 / share).numpy()))


def _global_pool(function: Callable[..., Tensor]) -> Operator:
    return lambda op: op.call(function, op.flow(0), list(range(2, op.flow(0).rank)), True)


def _resize(op: Operation) -> Result:
    """Of the axes of space; sizes or scales stand in opset 9, 10 and 11 in different places."""
    x = op.flow(0)
    sizes = op.constant(3) if op.has(3) else None
    place = 1 if op.kind == "Upsample" or op.opset < 11 else 2
    scales = op.constant(place) if op.has(place) else np.asarray(op.attribute("scales", []))
    axes = [axis % x.rank for axis in op.attribute("axes", list(range(x.rank)))]
    given = scales if sizes is None or not sizes.size else sizes / np.array([x.shape[axis] for axis in axes])
    factors = dict.fromkeys(range(x.rank), 1.0) | dict(zip(axes, map(float, given), strict=True))
    if op.attribute("keep_aspect_ratio_policy", "stretch") != "stretch" or factors[0] != 1 or factors[1] != 1:
        raise Unsupported("resizing of channels, or of other than all of space")
    space = [factors[axis] for axis in range(2, x.rank)]
    target = [int(np.floor(x.shape[axis] * factors[axis] + 1e-6)) for axis in range(2, x.rank)]
    exact = all(abs(out / size - f) < 1e-9 for out, size, f in zip(target, x.shape[2:], space, strict=True))
    how: dict[str, Any] = {"size": target} if exact else {"scale_factor": space}
    return op.call(functional.interpolate, x, **how, **_interpolation(op, x.rank - 2))


def _interpolation(op: Operation, space: int) -> dict[str, Any]:
    mode = op.attribute("mode", "nearest")
    old = op.kind == "Upsample" or op.opset < 11
    where = op.attribute("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    rounding = op.attribute("nearest_mode", "floor" if old else "round_prefer_floor")
    if mode == "nearest" and (where, rounding) == ("asymmetric", "floor"):
        return {"mode": "nearest"}
    if mode == "nearest" and where in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round_prefer"):
        return {"mode": "nearest-exact"}
    known = {"linear": ("linear", "bilinear", "trilinear")[space - 1], "cubic": "bicubic"}
    if mode in known and where in ("align_corners", "half_pixel", "pytorch_half_pixel"):
        if mode == "cubic" and op.attribute("cubic_coeff_a", -0.75) != -0.75:
            raise Unsupported("cubic_coeff_a other than -0.75")
        if op.attribute("antialias", 0):
            raise Unsupported("antialias")
        return {"mode": known[mode], "align_corners": where == "align_corners"}
    raise Unsupported(f"mode {mode} with {where} coordinates ({rounding})")


def _grid_sample(op: Operation) -> Result:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(op.attribute("mode", "linear"), op.attribute("mode", ""))
    padding, corners = op.attribute("padding_mode", "zeros"), bool(op.attribute("align_corners", 0))
    return op.call(functional.grid_sample, op.flow(0), op.beside(1, op.flow(0)), mode or "bilinear", padding, corners)


OPERATORS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "GridSample": _grid_sample,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Upsample": _resize,
}
