"""ONNX operators with weights: convolutions, products, normalisations."""

from __future__ import annotations

import operator
from math import sqrt

import numpy as np
import torch
from torch.nn import functional

from edgeprune.formats._onnx_import.operation import Operation, Operator, Result, Unsupported
from edgeprune.formats._onnx_import.padding import find_pads, padded


def convolution(op: Operation) -> Result:
    """Of one, two or three axes of space."""
    weight = op.constant(1)
    space = weight.ndim - 2
    strides, dilations = op.attribute("strides", [1] * space), op.attribute("dilations", [1] * space)
    x, padding = padded(op, op.flow(0), find_pads(op, weight.shape[2:], strides, dilations))
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[space - 1]
    parameters = op.layer_weight(1, "weight"), op.layer_weight(2, "bias")
    return op.call(function, x, *parameters, strides, padding, dilations, op.attribute("group", 1))


def _transposed_convolution(op: Operation) -> Result:
    weight = op.constant(1)
    space = weight.ndim - 2
    strides, dilations = op.attribute("strides", [1] * space), op.attribute("dilations", [1] * space)
    extra = list(op.attribute("output_padding", [0] * space))
    if op.attribute("output_shape", None) or op.attribute("auto_pad", "NOTSET") not in ("NOTSET", "", "VALID"):
        raise Unsupported("sizes that follow from output_shape or auto_pad")
    pads = op.attribute("pads", [0] * 2 * space)
    before, behind = list(pads[:space]), list(pads[space:])
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[space - 1]
    parameters = op.layer_weight(1, "weight"), op.layer_weight(2, "bias")
    if before == behind:
        return op.call(function, op.flow(0), *parameters, strides, before, extra, op.attribute("group", 1), dilations)
    whole = op.call(function, op.flow(0), *parameters, strides, [0] * space, extra, op.attribute("group", 1), dilations)
    cuts = [slice(low, size - high) for low, high, size in zip(before, behind, whole.shape[2:], strict=True)]
    return op.call(operator.getitem, whole, (slice(None), slice(None), *cuts))


def _product(op: Operation) -> Result:
    """A matrix as the right factor is a linear layer, with the sum behind it as its bias."""
    if not op.is_constant(1) or op.constant(1).ndim != 2:
        return op.call(torch.matmul, op.tensor(0), op.tensor(1))
    matrix = op.constant(1)
    weight = op.layer_weight(1, "weight", matrix.T)
    return op.call(functional.linear, op.tensor(0), weight, op.following_bias(matrix.shape[1]))


def gemm(op: Operation) -> Result:
    """alpha A B + beta C; a linear layer where B is a weight."""
    left, alpha, beta = op.tensor(0), op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    if op.attribute("transA", 0):
        left = op.call(torch.transpose, left, 0, 1)
    if op.is_constant(1):
        matrix = op.constant(1) if op.attribute("transB", 0) else op.constant(1).T
        weight = op.layer_weight(1, "weight", matrix * np.asarray(alpha, matrix.dtype) if alpha != 1 else matrix)
        if not op.has(2):
            return op.call(functional.linear, left, weight, op.following_bias(len(matrix)))
        if op.is_constant(2) and op.constant(2).size in (1, len(matrix)) and op.constant(2).shape[:-1] in ((), (1,)):
            bias = np.broadcast_to(op.constant(2).reshape(-1) * np.asarray(beta, matrix.dtype), (len(matrix),))
            return op.call(functional.linear, left, weight, op.layer_weight(2, "bias", bias))
        result = op.call(functional.linear, left, weight)
    else:
        right = op.tensor(1)
        right = op.call(torch.transpose, right, 0, 1) if op.attribute("transB", 0) else right
        result = op.call(torch.mul, op.call(torch.matmul, left, right), alpha)
    return op.call(torch.add, result, op.call(torch.mul, op.tensor(2), beta)) if op.has(2) else result


def _einsum(op: Operation) -> Result:
    return op.call(torch.einsum, op.attribute("equation"), *(op.tensor(index) for index in range(len(op.inputs))))


def _embedding(op: Operation) -> Result:
    return op.call(functional.embedding, op.flow(1), op.layer_weight(0, "weight"))


def _batch_norm(op: Operation) -> Result:
    if op.attribute("training_mode", 0):
        raise Unsupported("training mode; export the model in evaluation mode")
    names = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}
    scale, shift, mean, variance = (op.layer_weight(index, name) for index, name in names.items())
    return op.call(
        functional.batch_norm, op.flow(0), mean, variance, scale, shift, False, 0.1, op.attribute("epsilon", 1e-5)
    )


def _instance_norm(op: Operation) -> Result:
    parameters = op.layer_weight(1, "weight"), op.layer_weight(2, "bias")
    return op.call(
        functional.instance_norm, op.flow(0), None, None, *parameters, True, 0.1, op.attribute("epsilon", 1e-5)
    )


def _last_axes(op: Operation) -> list[int]:
    """The sizes that a layer or RMS norm runs over."""
    rank = op.flow(0).rank
    return list(op.flow(0).shape[op.attribute("axis", -1) % rank :])


def _layer_norm(op: Operation) -> Result:
    sizes = _last_axes(op)
    weight = op.layer_weight(1, "weight", np.broadcast_to(op.constant(1), sizes))
    bias = op.layer_weight(2, "bias", np.broadcast_to(op.constant(2), sizes)) if op.has(2) else None
    return op.call(functional.layer_norm, op.flow(0), sizes, weight, bias, op.attribute("epsilon", 1e-5))


def rms_norm(op: Operation) -> Result:
    """Over the last axes, without a mean."""
    sizes = _last_axes(op)
    weight = op.layer_weight(1, "weight", np.broadcast_to(op.constant(1), sizes))
    return op.call(functional.rms_norm, op.flow(0), sizes, weight, op.attribute("epsilon", 1e-5))


def _group_norm(op: Operation) -> Result:
    groups, channels = op.attribute("num_groups"), op.flow(0).shape[1]
    parameters = []
    for index, name in ((1, "weight"), (2, "bias")):
        given = op.constant(index)  # one number a group before opset 21
        parameters.append(op.layer_weight(index, name, np.repeat(given, channels // len(given))))
    return op.call(functional.group_norm, op.flow(0), groups, *parameters, op.attribute("epsilon", 1e-5))


def _response_norm(op: Operation) -> Result:
    return op.call(
        functional.local_response_norm, op.flow(0), op.attribute("size"), op.attribute("alpha", 1e-4),
        op.attribute("beta", 0.75), op.attribute("bias", 1.0),
    )  # fmt: skip


def _lp_norm(op: Operation) -> Result:
    return op.call(functional.normalize, op.flow(0), p=op.attribute("p", 2), dim=op.attribute("axis", -1))


def _attention(op: Operation) -> Result:
    """Of opset 23, in its four-dimensional form without a cache."""
    if op.flow(0).rank != 4 or op.outputs > 1 or any(op.has(index) for index in (4, 5, 6)):
        raise Unsupported("attention over three axes, or with a cache")
    if op.attribute("softcap", 0.0) or op.attribute("qk_matmul_output_mode", 0):
        raise Unsupported("softcap")
    depth = op.flow(0).shape[-1]
    return op.call(
        functional.scaled_dot_product_attention, op.tensor(0), op.tensor(1), op.tensor(2),
        op.tensor(3) if op.has(3) else None, 0.0, bool(op.attribute("is_causal", 0)),
        scale=op.attribute("scale", 1 / sqrt(depth)),
    )  # fmt: skip


OPERATORS: dict[str, Operator] = {
    "Attention": _attention,
    "BatchNormalization": _batch_norm,
    "Conv": convolution,
    "ConvTranspose": _transposed_convolution,
    "Einsum": _einsum,
    "Gemm": gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _response_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_norm,
    "MatMul": _product,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
}
