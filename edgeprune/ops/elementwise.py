"""Operators that compute each position by itself, with broadcasting."""

from __future__ import annotations

import numpy as np

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule, Value

UNARY = set(
    """
    abs acos acosh alias asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clip clone
    contiguous cos cosh deg2rad detach dropout elu erf erfc exp exp2 expm1 fill floor frac gelu hardshrink hardsigmoid
    hardswish hardtanh isfinite isinf isnan leaky_relu log log10 log1p log2 log_sigmoid logical_not mish nan_to_num neg
    feature_dropout alpha_dropout feature_alpha_dropout positive reciprocal relu relu6 round rsqrt selu sgn sigmoid sign
    silu sin sinh softplus softshrink softsign sqrt square tan tanh threshold to _to_copy _to_dtype trunc type_as zero
    lift_fresh_copy lift_fresh float half double zeros_like ones_like full_like empty_like rand_like randn_like
    """.split()  # noqa: SIM905 - a hundred quoted names do not read better
)
BROADCAST = set(
    """
    add sub rsub mul div true_divide divide multiply subtract floor_divide remainder fmod pow maximum minimum
    fmax fmin atan2 where eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    __and__ __or__ addcmul addcdiv lerp copy masked_fill xlogy hypot
    """.split()  # noqa: SIM905
)
# f(0) = 0, so that what is computed by these is masked as its argument is; those of the second line by their bounds.
KEEPS_ZEROS = set(
    """
    hardtanh clamp clamp_max clamp_min clip
    abs alias asin asinh atan ceil celu clone contiguous detach dropout elu erf expm1 feature_dropout floor frac gelu
    hardshrink hardswish leaky_relu log1p mish nan_to_num neg positive relu relu6 round selu sgn sign silu sin sinh
    softshrink softsign sqrt square tan tanh to _to_copy _to_dtype trunc type_as float half double zeros_like
    """.split()  # noqa: SIM905
)
SUMS = {"add", "sub", "subtract", "maximum", "minimum"}


def elementwise(call: Call) -> Axes:
    """Tie all tensor arguments axis by axis, aligned at the last; an axis of one position broadcasts."""
    rank, values = len(call.out_shape), call.values()
    if np.broadcast_shapes(*(v.shape for v in values)) != call.out_shape:
        raise NoRule("the output has another shape than its inputs together")
    axes: list[Axis] = []
    for back in range(rank, 0, -1):
        meeting = [v for v in values if len(v.shape) >= back and v.shape[-back] == call.out_shape[-back]]
        axis = meeting[0].axes[-back] if meeting else None
        for other in meeting[1:]:
            fixed = meeting[0] if axis is None else other
            axis = call.tie(axis, other.axes[-back], fixed.fixed_because)
        axes.append(axis)
    call.masked = _masked(call, tuple(axes))
    return tuple(axes)


def _masked(call: Call, axes: Axes) -> bool:
    """Whether zeros of removed channels stay zeros."""
    values = call.values()
    if call.op in KEEPS_ZEROS:
        lows = [call.plain(name) for name in ("min", "min_val")]
        highs = [call.plain(name) for name in ("max", "max_val")]
        known = all(bound is None or isinstance(bound, int | float) for bound in lows + highs)
        return values[0].masked and known and all((b or 0) <= 0 for b in lows) and all((b or 0) >= 0 for b in highs)
    if call.op in ("mul", "multiply"):
        return call.product_masked(axes, *((value, value.axes) for value in values))
    if call.op in SUMS:
        both = isinstance(call.plain("self"), Value) and isinstance(call.plain("other"), Value)
        return both and all(call.product_masked(axes, (value, value.axes)) for value in values)
    if call.op in ("div", "divide", "true_divide") and isinstance(call.plain("self"), Value):
        # A divisor with zeros of its own would make them undefined.
        return call.product_masked(axes, (values[0], values[0].axes)) and not any(v.masked for v in values[1:])
    if call.op == "pow" and isinstance(power := call.plain("exponent"), int | float):
        return power > 0 and values[0].masked
    return False


def prelu(call: Call) -> Axes:
    """A slope per channel (axis 1), or one for all."""
    x, weight = call.value("self"), call.value("weight")
    call.masked = x.masked
    if weight.shape and weight.shape[0] > 1:
        return (x.axes[0], call.tie(x.axes[1], weight.axes[0], x.fixed_because), *x.axes[2:])
    return x.axes


RULES: dict[str, Rule] = {"prelu": prelu, **dict.fromkeys(UNARY | BROADCAST, elementwise)}
