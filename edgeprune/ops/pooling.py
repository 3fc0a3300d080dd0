"""Pooling over space and reductions over axes."""

from __future__ import annotations

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule


def pool(call: Call) -> Axes | list[Axes]:
    """Max and average pooling, also adaptive: the last axes are pooled, channels pass."""
    x = call.value("self")
    spatial = int(next(digit for digit in call.op if digit.isdigit()))
    for space in x.axes[-spatial:]:
        call.freeze(space, "is pooled over")
    axes: Axes = (*x.axes[:-spatial], *[None] * spatial)
    return axes if len(call.out_shapes) == 1 else [axes] * len(call.out_shapes)


def reduce(call: Call) -> Axes | list[Axes]:
    """Mean, sum, norm ... over `dim` (all axes when absent); reduced channels are frozen."""
    x = call.value("self")
    dims = call.plain("dim")
    if dims is None or dims == []:
        dims = list(range(len(x.shape)))
    dims = {d % len(x.shape) for d in (dims if isinstance(dims, list) else [dims])}
    for d in dims:
        call.freeze(x.axes[d], f"{call.op} runs over its channels")
    keep = call.plain("keepdim", False)
    axes: list[Axis] = [None if d in dims else axis for d, axis in enumerate(x.axes) if keep or d not in dims]
    return tuple(axes) if len(call.out_shapes) == 1 else [tuple(axes)] * len(call.out_shapes)


def mixed_in_place(call: Call) -> Axes:
    """Softmax and cumulative sums: the shape stays, the channels along `dim` depend on each other."""
    x, dim = call.value("self"), call.plain("dim")
    if not isinstance(dim, int):
        raise NoRule("no dim")
    call.freeze(x.axes[dim], f"{call.op} runs over its channels")
    return x.axes


POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool")
REDUCTIONS = (
    *("mean", "sum", "prod", "max", "min", "amax", "amin", "argmax", "argmin", "any", "all", "var", "std"),
    *("norm", "linalg_vector_norm", "logsumexp"),
)
RUNNING = ("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod")

RULES: dict[str, Rule] = {
    **dict.fromkeys((f"{kind}{n}d" for kind in POOLS for n in (1, 2, 3)), pool),
    **dict.fromkeys((f"max_pool{n}d_with_indices" for n in (1, 2, 3)), pool),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(RUNNING, mixed_in_place),
}
