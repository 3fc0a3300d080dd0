"""Units kept and removed in every group that may be pruned."""

from __future__ import annotations

from edgeprune.core.branches import dropped_branches
from edgeprune.figures import DENSE, PRUNED, Figure, Run, Table, Trace, axis, bars_height, names_axis

ORDER = 30


def draw(run: Run) -> Figure | None:
    """One bar a group, in the order of the network."""
    groups = run.graph.prunable
    if not groups:
        return None
    names = [group.name for group in groups]
    units = [group.units for group in groups]
    lost = {name for branch in dropped_branches(run.graph, run.plan.widths) for name in branch.parameters}
    kept = [
        0 if lost and {member.parameter for member in group.members} <= lost
        else run.plan.widths.get(group.name, group.units)
        for group in groups
    ]  # fmt: skip
    removed = [unit - width for unit, width in zip(units, kept, strict=True)]
    bar: Trace = {"type": "bar", "orientation": "h", "y": names}
    traces: list[Trace] = [
        {**bar, "name": "kept", "x": kept, "marker": {"color": PRUNED}},
        {**bar, "name": "removed", "x": removed, "marker": {"color": DENSE, "opacity": 0.4}},
        {
            "type": "scatter",
            "mode": "text",
            "y": names,
            "x": units,
            "text": [f" {width} of {unit}" for width, unit in zip(kept, units, strict=True)],
            "textposition": "middle right",
            "cliponaxis": False,
            "hoverinfo": "skip",
            "showlegend": False,
        },
    ]
    return Figure(
        name="widths",
        title="Widths per group",
        says=f"{sum(kept) / sum(units):.0%} of the units stay. Channels that can only go together, such as those of "
        "a residual stream, are one group.",
        traces=traces,
        layout={
            "height": bars_height(len(groups), 26),
            "barmode": "stack",
            "legend": {"traceorder": "normal"},
            "xaxis": axis("units", range=[0, 1.18 * max(units)]),
            "yaxis": names_axis(),
        },
        table=Table(
            header=("group", "kept", "units", "share"),
            rows=tuple(
                (name, str(width), str(unit), f"{width / unit:.0%}")
                for name, width, unit in zip(names, kept, units, strict=True)
            ),
        ),
    )
