"""Operators that compute each position by itself, with broadcasting."""

from __future__ import annotations

from edgeprune.ops import Axes, Axis, Call, Rule

UNARY = """
    abs acos acosh alias asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clip clone
    contiguous cos cosh deg2rad detach dropout elu erf erfc exp exp2 expm1 fill floor frac gelu hardshrink hardsigmoid
    hardswish hardtanh isfinite isinf isnan leaky_relu log log10 log1p log2 log_sigmoid logical_not mish nan_to_num neg
    feature_dropout alpha_dropout feature_alpha_dropout positive reciprocal relu relu6 round rsqrt selu sgn sigmoid sign
    silu sin sinh softplus softshrink softsign sqrt square tan tanh threshold to _to_copy _to_dtype trunc type_as zero
    lift_fresh_copy lift_fresh float half double zeros_like ones_like full_like empty_like rand_like randn_like
""".split()

BROADCAST = """
    add sub rsub mul div true_divide divide multiply subtract floor_divide remainder fmod pow maximum minimum max min
    fmax fmin atan2 where eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    __and__ __or__ addcmul addcdiv lerp copy masked_fill clamp xlogy hypot
""".split()


def elementwise(call: Call) -> Axes:
    """Tie all tensor arguments axis by axis, aligned at the last; an axis of one position broadcasts."""
    rank = len(call.out_shape)
    axes: list[Axis] = []
    for back in range(rank, 0, -1):
        meeting = [v for v in call.values() if len(v.shape) >= back and v.shape[-back] == call.out_shape[-back]]
        axis = meeting[0].axes[-back] if meeting else None
        for other in meeting[1:]:
            axis = call.tie(axis, other.axes[-back], _reason(axis, meeting[0].fixed_because, other.fixed_because))
        axes.append(axis)
    return tuple(axes)


def _reason(axis: Axis, left: str, right: str) -> str:
    return left if axis is None else right


def prelu(call: Call) -> Axes:
    """A slope per channel (axis 1), or one for all."""
    x, weight = call.value("self"), call.value("weight")
    if weight.shape and weight.shape[0] > 1:
        return (x.axes[0], call.tie(x.axes[1], weight.axes[0], x.fixed_because), *x.axes[2:])
    return x.axes


RULES: dict[str, Rule] = {name: elementwise for name in (*UNARY, *BROADCAST)} | {"prelu": prelu}
