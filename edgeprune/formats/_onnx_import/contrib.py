"""Operators of ONNX Runtime's own (`com.microsoft`) that its optimiser and transformer exporters write."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.formats._onnx_import.layers import convolution, gemm
from edgeprune.formats._onnx_import.operation import Flow, Operation, Operator, Result, Unsupported


def _fused_convolution(op: Operation) -> Result:
    """A convolution, a sum with another tensor where there is one, an activation."""
    result = convolution(op)
    assert isinstance(result, Flow)
    if op.has(3):
        result = op.call(torch.add, result, op.tensor(3))
    return _activated(op, result, op.attribute("activation_params", []))


def _fused_gemm(op: Operation) -> Result:
    result = gemm(op)
    assert isinstance(result, Flow)
    parameters = [op.attribute(f"activation_{name}", None) for name in ("alpha", "beta", "gamma")]
    return _activated(op, result, [number for number in parameters if number is not None])


def _activated(op: Operation, x: Flow, parameters: list[float]) -> Flow:
    kind = op.attribute("activation", "")
    plain = {"Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
    if kind == "":
        return x
    if kind in plain:
        return op.call(plain[kind], x)
    if kind == "LeakyRelu":
        return op.call(functional.leaky_relu, x, parameters[0] if parameters else 0.01)
    if kind == "Clip" and len(parameters) == 2:
        return op.call(functional.relu6, x) if parameters == [0.0, 6.0] else op.call(torch.clamp, x, *parameters)
    if kind == "HardSigmoid" and len(parameters) == 2:
        return op.call(torch.clamp, op.call(torch.add, op.call(torch.mul, x, parameters[0]), parameters[1]), 0, 1)
    raise Unsupported(f"the activation {kind} with {parameters}")


def _gelu(approximate: str) -> Operator:
    """Of a tensor, or of its sum with a bias."""

    def build(op: Operation) -> Result:
        x = op.call(torch.add, op.tensor(0), op.tensor(1)) if op.has(1) else op.flow(0)
        return op.call(functional.gelu, x, approximate=approximate)

    return build


def _quick_gelu(op: Operation) -> Result:
    gate = op.call(torch.sigmoid, op.call(torch.mul, op.flow(0), op.attribute("alpha", 1.702)))
    return op.call(torch.mul, op.flow(0), gate)


def _skip_norm(op: Operation) -> Result:
    """A norm of a sum, and the sum itself."""
    if any(op.node.output[1:3]):
        raise Unsupported("the outputs mean and inv_std_var")
    simple = op.kind == "SkipSimplifiedLayerNormalization"
    bias = 3 if simple else 4
    whole = op.call(torch.add, op.tensor(0), op.tensor(1))
    whole = op.call(torch.add, whole, op.tensor(bias)) if op.has(bias) else whole
    sizes, epsilon = [whole.shape[-1]], op.attribute("epsilon", 1e-12)
    if simple:
        result = op.call(functional.rms_norm, whole, sizes, op.layer_weight(2, "weight"), epsilon)
    else:
        shift = op.layer_weight(3, "bias") if op.has(3) else None
        result = op.call(functional.layer_norm, whole, sizes, op.layer_weight(2, "weight"), shift, epsilon)
    return (result, result, result, whole)[: len(op.node.output)]


def _fused_product(op: Operation) -> Result:
    if op.attribute("transBatchA", 0) or op.attribute("transBatchB", 0):
        raise Unsupported("batches that are transposed")
    left, alpha = op.tensor(0), op.attribute("alpha", 1.0)
    left = op.call(torch.transpose, left, -2, -1) if op.attribute("transA", 0) else left
    if op.is_constant(1) and op.constant(1).ndim == 2:
        matrix = op.constant(1) if op.attribute("transB", 0) else op.constant(1).T
        return op.call(functional.linear, left, op.layer_weight(1, "weight", matrix * np.asarray(alpha, matrix.dtype)))
    right = op.tensor(1)
    right = op.call(torch.transpose, right, -2, -1) if op.attribute("transB", 0) else right
    result = op.call(torch.matmul, left, right)
    return result if alpha == 1.0 else op.call(torch.mul, result, alpha)


def _attention(op: Operation) -> Result:
    """Queries, keys and values by one product, then heads: (batch, tokens, channels)."""
    if any(op.has(index) for index in range(3, 7)) or op.outputs > 1 or op.attribute("qkv_hidden_sizes", None):
        raise Unsupported("masks, biases of attention, a cache, or widths that differ")
    if op.attribute("do_rotary", 0):
        raise Unsupported("rotary embeddings")
    heads, width = op.attribute("num_heads"), op.constant(1).shape[1] // 3
    packed = op.call(functional.linear, op.flow(0), op.layer_weight(1, "weight", op.constant(1).T),
                     op.layer_weight(2, "bias") if op.has(2) else None)  # fmt: skip
    scale = op.attribute("scale", 0.0) or (width // heads) ** -0.5
    return op.call(_attend, packed, heads, bool(op.attribute("unidirectional", 0)), scale)


def _attend(packed: Tensor, heads: int, causal: bool, scale: float) -> Tensor:
    query, key, value = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


OPERATORS: dict[str, Operator] = {
    "Attention": _attention,
    "BiasGelu": _gelu("none"),
    "FastGelu": _gelu("tanh"),
    "FusedConv": _fused_convolution,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_product,
    "Gelu": _gelu("none"),
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
}
