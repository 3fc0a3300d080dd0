"""Matrix products with a weight: linear, addmm, mm, matmul, bmm, and table look-ups."""

from __future__ import annotations

from edgeprune.ops import Axes, Call, NoRule, Rule, Value


def linear(call: Call) -> Axes:
    """weight (out, in)."""
    x, weight, bias = call.value("input"), call.value("weight"), call.optional("bias")
    call.contract_any(x, len(x.shape) - 1, weight, len(weight.shape) - 1)
    out = weight.axes[0]
    if bias is not None:
        out = call.tie(out, bias.axes[0])
    biased = bias is not None and (not bias.masked or any(axis is not None for axis in x.axes[:-1]))
    axes = (*x.axes[:-1], out)
    call.masked = not biased and call.product_masked(axes, (x, (*x.axes[:-1], None)), (weight, weight.axes[:1]))
    return axes


def matmul(call: Call) -> Axes:
    """(..., n, k) @ (..., k, m): the rows of the left and the columns of the right pass, k is summed."""
    names = ("self", "mat2") if call.op in ("mm", "bmm") else ("self", "other")
    left, right = call.value(names[0]), call.value(names[1])
    return _product(call, left, right)


def addmm(call: Call) -> Axes:
    """bias + mat1 @ mat2."""
    bias, out = call.value("self"), _product(call, call.value("mat1"), call.value("mat2"))
    call.masked = call.masked and bias.masked and out[0] is None
    return (out[0], call.tie(out[1], bias.axes[-1]))


def _product(call: Call, left: Value, right: Value) -> Axes:
    if len(left.shape) < 2 or len(right.shape) < 2:
        raise NoRule("a product with a vector")
    call.contract_any(left, len(left.shape) - 1, right, len(right.shape) - 2)
    batch = []
    for back in range(3, len(call.out_shape) + 1):
        sides = [v for v in (left, right) if len(v.shape) >= back and v.shape[-back] > 1]
        axes = [side.axes[-back] for side in sides]
        batch.append(call.tie(axes[0], axes[1]) if len(axes) == 2 else axes[0] if axes else None)
    out = (*reversed(batch), left.axes[-2], right.axes[-1])
    columns = (*right.axes[:-2], None, right.axes[-1])
    call.masked = call.product_masked(out, (left, (*left.axes[:-1], None)), (right, columns))
    return out


def embedding(call: Call) -> Axes:
    """weight (entries, channels) looked up by integers."""
    weight, indices = call.value("weight"), call.value("indices")
    call.freeze(weight.axes[0], "is looked up by index")
    call.masked = weight.masked
    return (*indices.axes, weight.axes[1])


RULES: dict[str, Rule] = {
    "linear": linear,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "addmm": addmm,
    "embedding": embedding,
}
