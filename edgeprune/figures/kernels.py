"""Where the time goes: every fused kernel, dense and pruned."""

from __future__ import annotations

from collections import Counter
from statistics import median

from edgeprune.core.cost import kernel_latency, kernel_sizes, left_kernels
from edgeprune.core.records import Graph, Kernel, Profile, Widths
from edgeprune.figures import DENSE, PRUNED, Figure, Run, Table, Trace, axis, bars_height, names_axis, time_scale

ORDER = 40
TALLEST = 40
"""Kernels drawn one by one, the slowest of the dense model; the others are one bar."""


def draw(run: Run) -> Figure | None:
    """Two bars a kernel, in the order of execution."""
    kernels = run.profile.kernels
    if not kernels:
        return None
    dense, dense_measured = kernel_times(run.graph, run.profile, {})
    pruned, pruned_measured = kernel_times(run.graph, run.profile, run.plan.widths)
    slowest = {kernel.name for kernel in sorted(kernels, key=lambda kernel: -dense[kernel.name])[:TALLEST]}
    rest = [kernel.name for kernel in kernels if kernel.name not in slowest]
    labels = _labels(run.graph, [kernel for kernel in kernels if kernel.name in slowest])
    scale, unit = time_scale(dense.values())

    def series(times: dict[str, float]) -> list[float]:
        others = [sum(times[name] for name in rest) * scale] if rest else []
        return [times[name] * scale for name in labels] + others

    names = [*labels.values(), *([f"{len(rest)} others"] if rest else [])]
    before, after = series(dense), series(pruned)
    bar: Trace = {"type": "bar", "orientation": "h", "y": names}
    return Figure(
        name="kernels",
        title="Time per kernel, dense and pruned",
        says="A kernel is a chain of operations that the runtime executes as one, named after its layer. Times are "
        "the runtime's own, in the order of execution.",
        traces=[
            {**bar, "name": _legend("dense", dense_measured), "x": before, "marker": {"color": DENSE}},
            {**bar, "name": _legend("pruned", pruned_measured), "x": after, "marker": {"color": PRUNED}},
        ],
        layout={
            "height": bars_height(len(names), 32),
            "barmode": "group",
            "bargap": 0.3,
            "legend": {"traceorder": "normal"},
            "xaxis": axis(f"time ({unit})"),
            "yaxis": names_axis(),
        },
        table=Table(
            header=("kernel", f"dense ({unit})", f"pruned ({unit})", "left"),
            rows=tuple(
                (name, f"{a:.4g}", f"{b:.4g}", f"{b / a:.0%}" if a else "–")
                for name, a, b in zip(names, before, after, strict=True)
            ),
        ),
    )


def kernel_times(graph: Graph, profile: Profile, widths: Widths) -> tuple[dict[str, float], bool]:
    """Seconds per kernel at `widths`, and whether they were measured or come from the tables."""
    units = graph.units
    full = {**units, **widths}
    found = [m.kernels for m in profile.measurements if m.kernels and {**units, **m.widths} == full]
    if found:
        return {k.name: median([times.get(k.name, 0.0) for times in found]) for k in profile.kernels}, True
    tables = {table.signature: table for table in profile.tables}
    left = {kernel.name for kernel in left_kernels(graph, widths, profile.kernels)}
    return {
        k.name: kernel_latency(tables[k.signature], *kernel_sizes(k, widths, units)) if k.name in left else 0.0
        for k in profile.kernels
    }, False


def _labels(graph: Graph, kernels: list[Kernel]) -> dict[str, str]:
    """Kernel name -> the layer of its first operation with weights; the runtime's name where that is not unique."""
    nodes = {node.name: node for node in graph.nodes}

    def layer(kernel: Kernel) -> str:
        covered = [nodes[name] for name in kernel.nodes if name in nodes]
        return next((node.path for node in covered if node.path and node.parameters), kernel.name)

    times = Counter(layer(kernel) for kernel in kernels)
    return {
        k.name: layer(k) if times[layer(k)] == 1 else f"{layer(k)} · {k.name}" if layer(k) != k.name else k.name
        for k in kernels
    }


def _legend(name: str, measured: bool) -> str:
    return name if measured else f"{name} (from the tables)"
