"""ONNX operators that compute each position by itself, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from onnx import helper
from torch import Tensor
from torch.nn import functional

from edgeprune.formats._onnx_import.operation import Operation, Operator, Result, Unsupported


def _unary(function: Callable[..., Tensor], **attributes: float) -> Operator:
    """A function of one tensor, with its attributes and their defaults."""

    def build(op: Operation) -> Result:
        return op.call(function, op.flow(0), **{name: op.attribute(name, value) for name, value in attributes.items()})

    return build


def _binary(function: Callable[..., Tensor]) -> Operator:
    return lambda op: op.call(function, op.operand(0), op.operand(1))


def _folded(function: Callable[..., Tensor]) -> Operator:
    """A function of two, over any number of inputs."""

    def build(op: Operation) -> Result:
        result = op.tensor(0)
        for index in range(1, len(op.inputs)):
            result = op.call(function, result, op.tensor(index))
        return result

    return build


def _mean_of_all(op: Operation) -> Result:
    return op.call(torch.div, _folded(torch.add)(op), len(op.inputs))


def _divide(op: Operation) -> Result:
    rounding = None if op.is_float(0) else "trunc"
    return op.call(torch.div, op.operand(0), op.operand(1), rounding_mode=rounding)


def _remainder(op: Operation) -> Result:
    return op.call(torch.fmod if op.attribute("fmod", 0) else torch.remainder, op.operand(0), op.operand(1))


def _power(op: Operation) -> Result:
    if op.operand(1) == 0.5:
        return op.call(torch.sqrt, op.operand(0))
    return op.call(torch.pow, op.operand(0), op.operand(1))


def _clip(op: Operation) -> Result:
    bounds = [op.number(index, name) for index, name in ((1, "min"), (2, "max"))]
    if bounds == [0.0, 6.0]:
        return op.call(functional.relu6, op.flow(0))
    return op.call(torch.clamp, op.flow(0), *bounds)


def _gelu(op: Operation) -> Result:
    return op.call(functional.gelu, op.flow(0), approximate=op.attribute("approximate", "none"))


def _swish(op: Operation) -> Result:
    alpha = op.attribute("alpha", 1.0)
    if alpha == 1.0:
        return op.call(functional.silu, op.flow(0))
    return op.call(torch.mul, op.flow(0), op.call(torch.sigmoid, op.call(torch.mul, op.flow(0), alpha)))


def _hard_sigmoid(op: Operation) -> Result:
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return op.call(functional.hardsigmoid, op.flow(0))
    return op.call(torch.clamp, op.call(torch.add, op.call(torch.mul, op.flow(0), alpha), beta), 0, 1)


def _selu(op: Operation) -> Result:
    alpha, gamma = op.attribute("alpha", 1.6732632), op.attribute("gamma", 1.0507010)
    return op.call(torch.mul, op.call(functional.elu, op.flow(0), alpha=alpha), gamma)


def _thresholded(op: Operation) -> Result:
    return op.call(functional.threshold, op.flow(0), op.attribute("alpha", 1.0), 0.0)


def _prelu(op: Operation) -> Result:
    slope, rank = op.constant(1), op.flow(0).rank
    channels = slope.size
    per_channel = channels == 1 or (slope.ndim >= rank - 1 and slope.shape[-(rank - 1)] == channels)
    if not per_channel:
        raise Unsupported(f"a slope of shape {list(slope.shape)}")
    return op.call(functional.prelu, op.flow(0), op.layer_weight(1, "weight", slope.reshape(-1)))


def _cast(op: Operation) -> Result:
    kind = helper.tensor_dtype_to_np_dtype(op.attribute("to"))
    return op.call(torch.Tensor.to, op.flow(0), torch.from_numpy(np.zeros(1, kind)).dtype)


def _cast_like(op: Operation) -> Result:
    return op.call(torch.Tensor.to, op.flow(0), op.tensor(1).now.dtype)


def _where(op: Operation) -> Result:
    return op.call(torch.where, op.tensor(0), op.tensor(1), op.tensor(2))


def _same(op: Operation) -> Result:
    return op.flow(0)


OPERATORS: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Acos": _unary(torch.acos),
    "Acosh": _unary(torch.acosh),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Asin": _unary(torch.asin),
    "Asinh": _unary(torch.asinh),
    "Atan": _unary(torch.atan),
    "Atanh": _unary(torch.atanh),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _unary(torch.ceil),
    "Celu": _unary(functional.celu, alpha=1.0),
    "Clip": _clip,
    "Cos": _unary(torch.cos),
    "Cosh": _unary(torch.cosh),
    "Div": _divide,
    "Dropout": _same,
    "Elu": _unary(functional.elu, alpha=1.0),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "Gelu": _gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "Identity": _same,
    "LeakyRelu": lambda op: op.call(functional.leaky_relu, op.flow(0), op.attribute("alpha", 0.01)),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "Max": _folded(torch.maximum),
    "Mean": _mean_of_all,
    "Min": _folded(torch.minimum),
    "Mish": _unary(functional.mish),
    "Mod": _remainder,
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Round": _unary(torch.round),
    "Selu": _selu,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Sinh": _unary(torch.sinh),
    "Softplus": _unary(functional.softplus),
    "Softsign": _unary(functional.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _folded(torch.add),
    "Swish": _swish,
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "ThresholdedRelu": _thresholded,
    "Where": _where,
    "Xor": _binary(torch.logical_xor),
}
