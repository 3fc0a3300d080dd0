"""ONNX operators along axes: sums, extremes, softmax."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from edgeprune.formats._onnx_import.operation import Operation, Operator, Result, Unsupported


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def build(op: Operation) -> Result:
        rank = op.flow(0).rank
        if op.opset >= 13:
            return op.call(function, op.flow(0), op.attribute("axis", -1))
        axis = op.attribute("axis", 1) % rank
        if axis == rank - 1:
            return op.call(function, op.flow(0), axis)
        flat = op.call(torch.flatten, op.flow(0), axis)
        return op.call(torch.unflatten, op.call(function, flat, axis), axis, op.flow(0).shape[axis:])

    return build


def _reduction(function: Callable[..., Tensor]) -> Operator:
    """Over axes that are an input in newer opsets and an attribute in older ones; none are all, or none at all."""

    def build(op: Operation) -> Result:
        axes = op.integers(1, "axes")
        if axes is None and op.attribute("noop_with_empty_axes", 0):
            return op.flow(0)
        axes = list(range(op.flow(0).rank)) if axes is None else axes
        return op.call(function, op.flow(0), axes, bool(op.attribute("keepdims", 1)))

    return build


def _sum_of_magnitudes(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.abs().sum(axes, keep)


def _root_of_squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.square().sum(axes, keep).sqrt()


def _sum_of_squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.square().sum(axes, keep)


def _arg(function: Callable[..., Tensor]) -> Operator:
    def build(op: Operation) -> Result:
        if op.attribute("select_last_index", 0):
            raise Unsupported("select_last_index")
        return op.call(function, op.flow(0), op.attribute("axis", 0), bool(op.attribute("keepdims", 1)))

    return build


def _cumulative_sum(op: Operation) -> Result:
    if op.attribute("exclusive", 0) or op.attribute("reverse", 0):
        raise Unsupported("exclusive or reverse sums")
    return op.call(torch.cumsum, op.flow(0), int(op.constant(1)))


def _top_k(op: Operation) -> Result:
    k = op.number(1, "k")
    found = op.call(
        torch.topk, op.flow(0), int(k or 1), op.attribute("axis", -1), bool(op.attribute("largest", 1)),
        bool(op.attribute("sorted", 1)),
    )  # fmt: skip
    return tuple(op.call(operator.getitem, found, item) for item in (0, 1))


OPERATORS: dict[str, Operator] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "CumSum": _cumulative_sum,
    "LogSoftmax": _softmax(torch.log_softmax),
    "ReduceL1": _reduction(_sum_of_magnitudes),
    "ReduceL2": _reduction(_root_of_squares),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "Softmax": _softmax(torch.softmax),
    "TopK": _top_k,
}
