"""Pooling over space and reductions over axes."""

from __future__ import annotations

from edgeprune.ops import Axes, Axis, Call, NoRule, Rule


def pool(call: Call) -> Axes | list[Axes]:
    """Max and average pooling, also adaptive: the last axes are pooled, channels pass."""
    x = call.value("self")
    spatial = int(next(digit for digit in call.op if digit.isdigit()))
    for space in x.axes[-spatial:]:
        call.freeze(space, "is pooled over")
    call.masked = x.masked
    axes: Axes = (*x.axes[:-spatial], *[None] * spatial)
    return axes if len(call.out_shapes) == 1 else [axes] * len(call.out_shapes)


def reduce(call: Call) -> Axes | list[Axes]:
    """Mean, sum, norm ... over `dim` (all axes when absent).

    Channels that are zero when removed add nothing to a sum or a norm; a mean also counts them, so what is left of
    it is scaled. Others that are reduced are frozen.
    """
    x = call.value("self")
    dims = call.plain("dim")
    if dims is None or dims == []:
        dims = list(range(len(x.shape)))
    dims = {d % len(x.shape) for d in (dims if isinstance(dims, list) else [dims])}
    power = call.plain("p", call.plain("ord", 2))
    summed = call.op == "sum" or (call.op in NORMS and isinstance(power, int | float) and power > 0)
    channels = [d for d in dims if x.axes[d] is not None]
    if x.masked and call.op == "mean" and len(channels) == 1:
        call.rescale(x.axes[channels[0]])
    elif not (x.masked and summed):
        for d in channels:
            call.freeze(x.axes[d], f"{call.op} runs over its channels")
    call.masked = x.masked and (summed or call.op in ZERO_OF_ZEROS) and len(call.out_shapes) == 1
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
NORMS = frozenset({"norm", "linalg_vector_norm"})
ZERO_OF_ZEROS = frozenset({"mean", "prod", "max", "min", "amax", "amin", "var", "std"})
RUNNING = ("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod")

RULES: dict[str, Rule] = {
    **dict.fromkeys((f"{kind}{n}d" for kind in POOLS for n in (1, 2, 3)), pool),
    **dict.fromkeys((f"max_pool{n}d_with_indices" for n in (1, 2, 3)), pool),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(RUNNING, mixed_in_place),
}
