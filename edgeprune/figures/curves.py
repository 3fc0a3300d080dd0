"""Calibration loss as one group shrinks, and where the plan stopped."""

from __future__ import annotations

import numpy as np

from edgeprune.figures import LIMIT, Figure, Run, Table, Trace, axis

ORDER = 60
LEGEND_GROUPS = 12
"""More curves than this are told apart by hovering and by the table, not by a legend."""


def draw(run: Run) -> Figure | None:
    """One line a group with a measured curve, and a point at the width that was chosen."""
    curves, units = run.importance.curves, run.graph.units
    names = [group.name for group in run.graph.groups if group.name in curves]
    if not names:
        return None
    lines: list[Trace] = []
    rows: list[tuple[str, ...]] = []
    chosen: list[tuple[float, float, str, str]] = []
    for number, name in enumerate(names):
        curve, width = curves[name], run.plan.widths.get(name, units[name])
        colour = f"hsl({(200 + 300 * number // len(names)) % 360}, 60%, 52%)"
        loss = float(np.interp(width, curve.widths, curve.loss))
        chosen.append((100 * width / units[name], loss, f"{name}: {width} of {units[name]}", colour))
        least = f"{float(curve.loss[0]):.4g} at {int(curve.widths[0])}"
        rows.append((name, f"{width} of {units[name]}", f"{loss:.4g}", least))
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [100 * int(kept) / units[name] for kept in curve.widths],
                "y": [float(value) for value in curve.loss],
                "line": {"color": colour, "width": 2},
                "showlegend": len(names) <= LEGEND_GROUPS,
            }
        )
    points: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "chosen width",
        "x": [share for share, *_ in chosen],
        "y": [loss for _, loss, *_ in chosen],
        "text": [text for *_, text, _ in chosen],
        "hoverinfo": "text+y",
        "marker": {"color": [colour for *_, colour in chosen], "size": 9, "line": {"width": 1.5, "color": LIMIT}},
    }
    dense = run.importance.dense_loss
    return Figure(
        name="curves",
        title="Loss per group as it shrinks",
        says=f"Measured by removing the units that {run.importance.criterion} ranks lowest, with the other groups "
        "dense. The points are the widths the plan chose."
        + ("" if dense is None else f" The dense model's loss is {dense:.4g}."),
        traces=[*lines, points],
        layout={
            "height": 460,
            "hovermode": "closest",
            "xaxis": axis("units kept in the group (%)", range=[0, 104]),
            "yaxis": axis("calibration loss", rangemode="tozero"),
        },
        table=Table(header=("group", "chosen", "loss there", "loss at the least width"), rows=tuple(rows)),
    )
